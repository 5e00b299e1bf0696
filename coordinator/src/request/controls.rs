//! A job's controls, and the pictures that it names.

use proto::v1::{Control, ControlNetwork, JobSpec, ModelCard};

use super::{Check, MAX_MORE_IMAGES, is_blob_id};

/// Most controls of one job: each has a picture of the job's size in every forward.
const MAX_CONTROLS: usize = 4;
/// Largest scale of a control, and smallest with a minus: beyond it nothing is left of the picture.
const MAX_CONTROL_SCALE: f64 = 10.0;
/// Networks that are named to one who names another.
const NAMED: usize = 5;

/// Most blobs that a job may begin with.
pub const MAX_BLOBS: usize = 2 + MAX_MORE_IMAGES + MAX_CONTROLS;

/// Every blob that a job begins with, by the field that names it; those that it has none of are empty.
pub fn blobs(spec: &JobSpec) -> impl Iterator<Item = (String, &str)> {
    let own = [("image_blob_id", &spec.image_blob_id), ("mask_image_blob_id", &spec.mask_image_blob_id)];
    let more = spec.more_image_blob_ids.iter().enumerate();
    let more = more.map(|(k, id)| (format!("more_image_blob_ids[{k}]"), id.as_str()));
    let of_controls = spec.controls.iter().enumerate();
    let of_controls = of_controls.map(|(k, control)| (format!("controls[{k}].image_blob_id"), control.image_blob_id.as_str()));
    own.into_iter().map(|(field, id)| (field.to_owned(), id.as_str())).chain(more).chain(of_controls)
}

/// The ids of every blob that a job begins with.
pub fn blob_ids(spec: &JobSpec) -> impl Iterator<Item = &str> {
    let own = [&spec.image_blob_id, &spec.mask_image_blob_id].into_iter();
    let of_controls = spec.controls.iter().map(|control| &control.image_blob_id);
    own.chain(&spec.more_image_blob_ids).chain(of_controls).map(String::as_str).filter(|id| !id.is_empty())
}

/// How many pictures a job brings that its model may look at while it draws.
pub fn brought(spec: &JobSpec) -> u64 {
    u64::from(!spec.image_blob_id.is_empty()) + spec.more_image_blob_ids.len() as u64
}

/// Takes what a job's controls leave open.
pub(super) fn fill_in(controls: &mut [Control]) {
    for control in controls {
        control.conditioning_scale = control.conditioning_scale.or(Some(1.0));
        control.guidance_start = control.guidance_start.or(Some(0.0));
        control.guidance_end = control.guidance_end.or(Some(1.0));
    }
}

fn network<'a>(card: &'a ModelCard, name: &str) -> Option<&'a ControlNetwork> {
    card.controls.iter().find(|network| network.name == name)
}

/// Those of a model, for one who named none of them.
fn known(card: &ModelCard) -> String {
    let usable = || card.controls.iter().filter(|network| network.problem.is_empty()).map(|network| network.name.as_str());
    let names: Vec<&str> = usable().take(NAMED).collect();
    match (names.is_empty(), usable().count() - names.len()) {
        (true, _) => "no control networks".to_owned(),
        (false, 0) => format!("only {}", names.join(", ")),
        (false, more) => format!("only {}, … and {more} more", names.join(", ")),
    }
}

impl Check<'_> {
    /// Ids that can be no blob's, or no blob has. A job that names more than it may is refused for that.
    pub(super) fn blobs(&mut self, spec: &JobSpec, missing: &[String]) {
        for (field, id) in blobs(spec).take(MAX_BLOBS + 1).filter(|(_, id)| !id.is_empty()) {
            if !is_blob_id(id) {
                self.refuse(&field, "must be the id of an uploaded blob: 64 hex digits");
            } else if missing.contains(&field) {
                self.refuse(&field, "no blob has this id: upload it first");
            }
        }
    }

    /// After defaults were filled in, the sides among them.
    pub(super) fn controls(&mut self, spec: &JobSpec) {
        if spec.controls.len() > MAX_CONTROLS {
            return self.refuse("controls", format!("must be at most {MAX_CONTROLS}"));
        }
        for (k, control) in spec.controls.iter().enumerate() {
            self.control(spec, k, control);
            self.sums(spec, k, control);
        }
        let guesses = |control: &Control| network(self.card, &control.name).is_some_and(|network| network.takes_guess_mode);
        if spec.guess_mode && !spec.controls.iter().any(guesses) {
            self.refuse("guess_mode", "needs a control whose network takes it");
        }
    }

    fn control(&mut self, spec: &JobSpec, k: usize, control: &Control) {
        let field = |name: &str| format!("controls[{k}].{name}");
        let card = self.card;
        match network(card, &control.name) {
            None => {
                let problem = format!("model {:?} has no control network of this name, {}", card.name, known(card));
                self.refuse(&field("name"), problem);
            }
            Some(network) if !network.problem.is_empty() => {
                self.refuse(&field("name"), format!("{:?} cannot be used: {}", network.name, network.problem));
            }
            Some(network) => self.fits(spec, k, control, network),
        }
        if control.image_blob_id.is_empty() {
            self.refuse(&field("image_blob_id"), "must be named");
        }
        let [scale, start, end] =
            [control.conditioning_scale, control.guidance_start, control.guidance_end].map(Option::unwrap_or_default);
        if !(scale.is_finite() && scale.abs() <= MAX_CONTROL_SCALE) {
            self.refuse(&field("conditioning_scale"), format!("must be -{MAX_CONTROL_SCALE} to {MAX_CONTROL_SCALE}"));
        }
        if !(0.0..=1.0).contains(&start) {
            self.refuse(&field("guidance_start"), "must be 0 to 1");
        } else if !(0.0..=1.0).contains(&end) {
            self.refuse(&field("guidance_end"), "must be 0 to 1");
        } else if start >= end {
            self.refuse(&field("guidance_end"), format!("must be more than guidance_start = {start}"));
        }
    }

    /// Whether what a control gives can be added to what those before it give.
    fn sums(&mut self, spec: &JobSpec, k: usize, control: &Control) {
        let Some(own) = network(self.card, &control.name) else { return };
        let before = spec.controls[..k].iter().filter_map(|control| network(self.card, &control.name));
        let differs = |other: &ControlNetwork| {
            let (of, count) = own.residuals.iter().find(|(of, count)| other.residuals.get(*of).is_some_and(|n| n != *count))?;
            Some(format!(
                "{:?} gives {count} tensors of {of} and {:?} {}: they cannot be added",
                own.name, other.name, other.residuals[of]
            ))
        };
        if let Some(problem) = before.into_iter().find_map(differs) {
            self.refuse(&format!("controls[{k}].name"), problem);
        }
    }

    /// Whether a network can be given such a control.
    fn fits(&mut self, spec: &JobSpec, k: usize, control: &Control, network: &ControlNetwork) {
        let field = format!("controls[{k}].mode");
        match (control.mode, network.modes) {
            (None, 0) => {}
            (Some(_), 0) => self.refuse(&field, format!("{:?} has no modes", network.name)),
            (Some(mode), modes) if mode < modes => {}
            (_, modes) => self.refuse(&field, format!("{:?} needs one of 0 to {}", network.name, modes - 1)),
        }
        let multiple = network.multiple_of.max(1);
        for (side, pixels) in [("width", spec.width), ("height", spec.height)] {
            if pixels.is_some_and(|pixels| pixels % multiple != 0) {
                self.refuse(side, format!("must be a multiple of {multiple} for {:?}", network.name));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::request::{Context, Request};
    use crate::testing;

    fn card() -> ModelCard {
        let network = |name: &str| ControlNetwork { name: name.into(), takes_guess_mode: true, ..ControlNetwork::default() };
        let controls = vec![
            network("canny"),
            ControlNetwork { modes: 7, takes_guess_mode: false, ..network("union") },
            ControlNetwork { multiple_of: 48, ..network("sketch") },
            ControlNetwork { problem: "it is truncated".into(), ..network("torn") },
            ControlNetwork { residuals: [("blocks".into(), 3)].into(), ..network("three") },
            ControlNetwork { residuals: [("blocks".into(), 5)].into(), ..network("five") },
        ];
        ModelCard { controls, ..testing::card("emoji") }
    }

    fn control(name: &str) -> Control {
        Control { name: name.into(), image_blob_id: "a".repeat(64), ..Control::default() }
    }

    fn fields(controls: Vec<Control>, guess_mode: bool) -> Vec<String> {
        refused(controls, guess_mode, &["controls[1].image_blob_id".to_owned()])
    }

    fn refused(controls: Vec<Control>, guess_mode: bool, missing_blobs: &[String]) -> Vec<String> {
        let spec = JobSpec { controls, guess_mode, ..testing::spec("emoji") };
        match Request::parse(spec, &card(), Context { seed: 1, max_pixels: 1 << 30, missing_blobs }) {
            Err(Error::InvalidRequest(violations)) => violations.into_iter().map(|violation| violation.field).collect(),
            Err(other) => panic!("{other}"),
            Ok(_) => Vec::new(),
        }
    }

    #[test]
    fn a_control_gets_its_defaults() {
        let spec = JobSpec { controls: vec![control("canny")], ..testing::spec("emoji") };
        let request = Request::parse(spec, &card(), Context { seed: 1, max_pixels: 1 << 30, missing_blobs: &[] }).unwrap();
        let filled = &request.spec().controls[0];
        assert_eq!((filled.conditioning_scale, filled.guidance_start, filled.guidance_end), (Some(1.0), Some(0.0), Some(1.0)));
        assert!(request.has_controls());
    }

    #[test]
    fn controls_whose_tensors_cannot_be_added_are_refused_together() {
        let named = |names: [&str; 3]| refused(names.map(control).into(), false, &[]);
        assert!(named(["three", "three", "canny"]).is_empty());
        assert_eq!(named(["three", "canny", "five"]), ["spec.controls[2].name"]);
    }

    #[test]
    fn of_very_many_pictures_few_problems_are_told() {
        let spec = JobSpec {
            image_blob_id: "x".into(),
            more_image_blob_ids: vec!["x".into(); 100_000],
            controls: vec![Control { image_blob_id: "x".into(), ..control("canny") }; 100_000],
            ..testing::spec("emoji")
        };
        let context = Context { seed: 1, max_pixels: 1 << 30, missing_blobs: &[] };
        let Err(Error::InvalidRequest(violations)) = Request::parse(spec, &card(), context) else { panic!("it was taken") };
        let fields: Vec<&str> = violations.iter().map(|violation| violation.field.as_str()).collect();
        assert!(fields.len() < 2 * MAX_BLOBS, "{} problems", fields.len());
        for field in ["spec.more_image_blob_ids", "spec.controls", "spec.image_blob_id"] {
            assert!(fields.contains(&field), "{field} of {fields:?}");
        }
    }

    #[test]
    fn every_blob_that_is_named_by_a_field_is_among_the_ids() {
        let spec = JobSpec {
            image_blob_id: "a".into(),
            more_image_blob_ids: vec!["b".into(), String::new(), "c".into()],
            controls: vec![Control { image_blob_id: "d".into(), ..Control::default() }],
            ..JobSpec::default()
        };
        let named: Vec<&str> = blobs(&spec).map(|(_, id)| id).filter(|id| !id.is_empty()).collect();
        assert_eq!(blob_ids(&spec).collect::<Vec<_>>(), named);
        assert_eq!(named, ["a", "b", "c", "d"]);
    }

    #[test]
    fn a_control_that_cannot_be_is_refused_by_field() {
        assert!(fields(vec![control("canny")], true).is_empty());
        let wrong = |control: Control, expected: &str| assert_eq!(fields(vec![control], false), [expected]);
        for name in ["", "nobody", "../canny", "torn"] {
            wrong(control(name), "spec.controls[0].name");
        }
        wrong(Control { image_blob_id: String::new(), ..control("canny") }, "spec.controls[0].image_blob_id");
        wrong(Control { image_blob_id: "../a".into(), ..control("canny") }, "spec.controls[0].image_blob_id");
        for scale in [f64::NAN, f64::INFINITY, 11.0] {
            wrong(Control { conditioning_scale: Some(scale), ..control("canny") }, "spec.controls[0].conditioning_scale");
        }
        wrong(Control { guidance_start: Some(f64::NAN), ..control("canny") }, "spec.controls[0].guidance_start");
        wrong(Control { guidance_end: Some(1.5), ..control("canny") }, "spec.controls[0].guidance_end");
        wrong(
            Control { guidance_start: Some(0.5), guidance_end: Some(0.5), ..control("canny") },
            "spec.controls[0].guidance_end",
        );
        wrong(Control { mode: Some(0), ..control("canny") }, "spec.controls[0].mode");
        wrong(control("union"), "spec.controls[0].mode");
        wrong(Control { mode: Some(7), ..control("union") }, "spec.controls[0].mode");
        assert_eq!(fields(vec![control("canny"); 2], false), ["spec.controls[1].image_blob_id"], "no such blob");
        assert!(fields(vec![control("canny"); MAX_CONTROLS + 1], false).contains(&"spec.controls".to_owned()));
        assert_eq!(fields(vec![control("sketch")], false), ["spec.width", "spec.height"]);
        assert_eq!(fields(vec![], true), ["spec.guess_mode"]);
        assert_eq!(fields(vec![Control { mode: Some(1), ..control("union") }], true), ["spec.guess_mode"]);
    }
}
