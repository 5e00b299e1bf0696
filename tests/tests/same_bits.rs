//! One promise: a job's latents after every step, and its picture, have the same bits on every layout, with any number of
//! threads, alone and in a batch with others. Here on the bundled model; of each other family in a file of its own.
//!
//! Nothing is recorded: instruction sets differ in the last bits (fused multiply-adds), layouts on one machine do not.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use models::Error;
use models::blocks::Layout;
use models::registry::Limits;
use models::stage::{Inputs, Stage, StageEvent};
use tests::same_bits::{JOB, Model, STEPS, check_every_layout, conditioning, drain, draw, emoji, with_leader};
use tests::stages;

#[path = "same_bits/deepfloyd_if.rs"]
mod deepfloyd_if;
#[path = "same_bits/dit.rs"]
mod dit;
#[path = "same_bits/hunyuan.rs"]
mod hunyuan;
#[path = "same_bits/pixart.rs"]
mod pixart;
#[path = "same_bits/sd3.rs"]
mod sd3;
#[path = "same_bits/sdxl.rs"]
mod sdxl;

#[test]
fn latents_and_pictures_have_the_same_bits_on_every_layout_alone_and_batched() {
    check_every_layout(&emoji());
}

/// The layouts with lanes that are compared, smallest first.
const LANES: [Layout; 5] = [
    Layout::new(1, 1).with_cfg_parallel(2),
    Layout::new(1, 1).with_cfg_parallel(3),
    Layout::new(2, 1).with_cfg_parallel(2),
    Layout::new(1, 3).with_cfg_parallel(2),
    Layout::new(2, 2).with_cfg_parallel(2),
];

/// Each of `layouts` gives what one rank gives.
fn check_lanes(model: &Model<'_>, layouts: &[Layout]) {
    let [expected, _] = draw(model, Layout::SOLO, 1);
    for layout in layouts {
        let [alone, batched] = draw(model, *layout, 1);
        assert_eq!(alone, expected, "alone, {layout}");
        assert_eq!(batched, expected, "batched, {layout}");
    }
}

#[test]
fn the_two_passes_of_guidance_side_by_side_have_the_bits_of_one_batch() {
    check_lanes(&emoji(), &LANES);
}

#[test]
fn the_two_passes_of_guidance_one_after_the_other_have_the_bits_of_one_batch() {
    let (model, inputs) = (emoji(), conditioning(&emoji(), 1, 1));
    let steps = |max_batch| {
        let limits = Limits { max_batch, ..Limits::default() };
        let run = |stage: &mut dyn Stage| drain(&model, stage, (0..).zip(inputs.clone()).collect()).1;
        stages::with_leader_within(limits, model.dir, "transformer", Layout::SOLO, 1, run)
    };
    assert_eq!(steps(1), steps(8));
}

/// What came of [`JOB`] when `stop` was done to it after `steps` steps, among jobs that were left alone: its last event.
fn disturb(layout: Layout, inputs: &[Inputs], steps: usize, stop: fn(&mut dyn Stage)) -> Error {
    with_leader(&emoji(), "transformer", layout, 1, |stage| {
        inputs.iter().zip(0..).for_each(|(inputs, key)| stage.start(key, (emoji().request)(key), inputs.clone()));
        let (mut done, mut others, mut end) = (0, 0, None);
        while end.is_none() || others + 1 < inputs.len() {
            let more = stage.turn(&mut |event| match event {
                StageEvent::Step { key: JOB, .. } => done += 1,
                StageEvent::Failed { key: JOB, error, .. } => end = Some(error),
                StageEvent::Done { .. } => others += 1,
                StageEvent::Failed { key, error, .. } => panic!("job {key}: {error}"),
                _ => {}
            });
            assert!(more.unwrap(), "all are over, {layout}");
            if done == steps && end.is_none() {
                stop(stage);
            }
        }
        end.unwrap()
    })
}

#[test]
fn a_job_parked_on_lanes_goes_on_elsewhere_with_the_same_bits_and_a_cancelled_one_stops_alone() {
    let inputs = conditioning(&emoji(), 1, 1)[..3].to_vec();
    let (_, expected) =
        with_leader(&emoji(), "transformer", Layout::SOLO, 1, |stage| drain(&emoji(), stage, vec![(JOB, inputs[0].clone())]));
    for (from, to) in LANES.into_iter().zip(LANES.into_iter().rev()) {
        let cancelled = disturb(from, &inputs, 1, |stage| stage.cancel(JOB));
        assert!(matches!(cancelled, Error::Cancelled), "{from}: {cancelled}");
        let parked = disturb(from, &inputs, 2, |stage| stage.park(JOB));
        let Error::Parked(Some(checkpoint)) = parked else { panic!("{from}: {parked}") };
        let step = checkpoint.step;
        assert!((2..STEPS).contains(&step), "{from}: parked after {step}");
        let rest = Inputs { checkpoint: Some(*checkpoint), ..inputs[0].clone() };
        let (_, steps) = with_leader(&emoji(), "transformer", to, 1, |stage| drain(&emoji(), stage, vec![(JOB, rest)]));
        assert_eq!(steps, expected[step..], "from {from} to {to}");
    }
}
