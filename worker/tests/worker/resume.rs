//! What was done of a job is stored, and another worker goes on from it with the same bits.

use proto::v1::control_request::Command;
use proto::v1::{ParkTask, RunTask};
use sha2::{Digest, Sha256};

use crate::coordinator::{Coordinator, until};
use crate::job::Bench;

/// The same straight job is run this often at most until each of its steps was stored; a slow machine skips some.
const TRIES: u32 = 50;

#[tokio::test]
async fn a_job_taken_up_after_any_step_or_stage_gives_the_same_picture() {
    for (transformer, steps, evaluations) in [("transformer", 4, 4), ("transformer-heun", 3, 5)] {
        let coordinator = Coordinator::start().await;
        let mut first = Bench::start(&coordinator, transformer).await;
        let mut picture = Vec::new();
        for attempt in 1..=TRIES {
            let job = first.job(&coordinator, "job", attempt, steps);
            picture = first.draw(&job).await;
            for task in [&job.encode, &job.denoise] {
                assert!(first.control.done(task).await.stored, "{task:?}");
            }
            assert!(!first.control.done(&job.decode).await.stored);
            // The state after the last step makes way for the output.
            if (0..evaluations).all(|step| coordinator.checkpoints.steps("job", "denoise").contains(&step)) {
                break;
            }
        }
        drop(first);
        let mut second = Bench::start(&coordinator, transformer).await;
        for step in 0..evaluations {
            let job = second.job(&coordinator, "job", 100 + step, steps);
            assert_eq!(second.draw_from(&job, step).await, picture, "{transformer} from {step}");
        }
        let job = second.job(&coordinator, "job", 200, steps);
        second.send(job.decoding()).await;
        assert_eq!(second.pictures(&job).await, picture, "{transformer} from its latents");
        coordinator.checkpoints.change("job", "denoise", 1, |header, bytes| {
            bytes[..4].copy_from_slice(&3f32.to_le_bytes());
            header.sha256 = Sha256::digest(&bytes).to_vec().into();
        });
        let job = second.job(&coordinator, "job", 300, steps);
        assert_ne!(second.draw_from(&job, 1).await, picture, "the picture is made of what was stored");
        second.worker.stop().await;
    }
}

#[tokio::test]
async fn a_job_whose_worker_is_killed_goes_on_elsewhere() {
    let coordinator = Coordinator::start().await;
    let first = Bench::start(&coordinator, "transformer-heun").await;
    let job = first.job(&coordinator, "job", 1, 40);
    for run in job.whole() {
        first.send(run).await;
    }
    let stored = || coordinator.checkpoints.steps("job", "denoise");
    until("five steps are stored", || stored().iter().any(|step| *step >= 5)).await;
    drop(first);
    let mut second = Bench::start(&coordinator, "transformer-heun").await;
    let step = *stored().last().unwrap();
    assert!(step < 79, "it was killed in the middle, after {step}");
    let resumed = second.job(&coordinator, "job", 2, 40);
    let picture = second.draw_from(&resumed, step).await;
    let straight = second.job(&coordinator, "straight", 1, 40);
    assert_eq!(second.draw(&straight).await, picture, "from {step}");
    second.worker.stop().await;
}

#[tokio::test]
async fn a_parked_task_is_stored_before_it_is_told() {
    let coordinator = Coordinator::start().await;
    let mut first = Bench::start(&coordinator, "transformer-heun").await;
    let job = first.job(&coordinator, "job", 1, 40);
    for run in job.whole() {
        first.send(run).await;
    }
    first.control.stepped(&job.denoise, 3).await;
    let park = |task: &proto::v1::TaskRef| Command::ParkTask(ParkTask { task: Some(task.clone()) });
    first.control.send(park(&job.denoise)).await;
    first.control.send(park(&job.decode)).await;
    let step = first.control.parked(&job.denoise).await;
    assert!((3..79).contains(&step), "parked after {step}");
    assert_eq!(coordinator.checkpoints.steps("job", "denoise").last(), Some(&step));
    assert_eq!(first.steps(&job).last(), Some(&step), "nothing was done after");
    assert_eq!(first.control.parked(&job.decode).await, 0, "it had not begun");

    // One that waits with a state of its own keeps that.
    let waiting = first.job(&coordinator, "job", 2, 40);
    let [_, denoise] = <[RunTask; 2]>::try_from(waiting.resumed(step)).unwrap();
    first.send(RunTask { inputs: vec!["never".into()], ..denoise }).await;
    first.control.send(park(&waiting.denoise)).await;
    assert_eq!(first.control.parked(&waiting.denoise).await, step);

    let mut second = Bench::start(&coordinator, "transformer-heun").await;
    let resumed = second.job(&coordinator, "job", 3, 40);
    let picture = second.draw_from(&resumed, step).await;
    let straight = second.job(&coordinator, "straight", 1, 40);
    assert_eq!(second.draw(&straight).await, picture);
}

#[tokio::test]
async fn a_store_that_fails_holds_nothing_up_and_is_told() {
    let coordinator = Coordinator::start().await;
    let mut bench = Bench::start(&coordinator, "transformer").await;
    coordinator.checkpoints.break_down(true);
    let job = bench.job(&coordinator, "job", 1, 3);
    let picture = bench.draw(&job).await;
    assert!(!bench.control.done(&job.denoise).await.stored);
    let endless = bench.job(&coordinator, "job", 2, crate::ENDLESS);
    for run in endless.whole() {
        bench.send(run).await;
    }
    bench.control.stepped(&endless.denoise, 2).await;
    bench.control.send(Command::ParkTask(ParkTask { task: Some(endless.denoise.clone()) })).await;
    assert_eq!(bench.control.parked(&endless.denoise).await, 0);

    coordinator.checkpoints.break_down(false);
    let again = bench.job(&coordinator, "job", 3, 3);
    assert_eq!(bench.draw(&again).await, picture);
    assert!(bench.control.done(&again.denoise).await.stored);
    bench.worker.stop().await;
}

#[tokio::test]
async fn a_checkpoint_that_is_not_what_it_should_be_is_not_gone_on_from() {
    let coordinator = Coordinator::start().await;
    let mut bench = Bench::start(&coordinator, "transformer").await;
    let job = bench.job(&coordinator, "job", 1, 40);
    for run in job.whole() {
        bench.send(run).await;
    }
    bench.control.stepped(&job.denoise, 3).await;
    bench.control.send(Command::ParkTask(ParkTask { task: Some(job.denoise.clone()) })).await;
    let step = bench.control.parked(&job.denoise).await;
    let whole = coordinator.checkpoints.fork();
    let mut attempt = 1;
    let mut lost = async |bench: &mut Bench, step: u32, named: &str| {
        attempt += 1;
        let job = bench.job(&coordinator, "job", attempt, 40);
        bench.send(job.resumed(step).remove(1)).await;
        let failed = bench.control.failed(&job.denoise).await;
        assert_eq!(failed.reason, "CHECKPOINT_LOST", "{failed:?}");
        assert!(failed.message.contains(named), "`{}` does not name `{named}`", failed.message);
        coordinator.checkpoints.restore(&whole);
    };
    lost(&mut bench, step + 1, "no such checkpoint").await;
    let change = |stage: &str, step: u32, change: &dyn Fn(&mut proto::v1::CheckpointHeader, &mut Vec<u8>)| {
        coordinator.checkpoints.change("job", stage, step, change);
    };
    change("denoise", step, &|_, bytes| bytes[5] ^= 1);
    lost(&mut bench, step, "sha256").await;
    change("denoise", step, &|_, bytes| bytes.truncate(bytes.len() - 1));
    lost(&mut bench, step, "ended after").await;
    change("denoise", step, &|header, _| header.model_digest = "abd".into());
    lost(&mut bench, step, "model_digest").await;
    change("denoise", step, &|header, _| header.key.as_mut().unwrap().step -= 1);
    lost(&mut bench, step, "header.key").await;
    change("denoise", step, &|header, _| header.tensors[0].shape.reverse());
    lost(&mut bench, step, "latents").await;
    change("encode_text", 0, &|_, bytes| bytes[0] ^= 1);
    lost(&mut bench, step, "sha256").await;
    bench.worker.stop().await;
}
