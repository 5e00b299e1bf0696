//! Which stages a job has and what flows between them. Pure: a request and a card in, a plan out.

use std::collections::BTreeSet;

use proto::v1::{ModelCard, StageCondition, StageKind, StageTemplate};

use crate::request::Request;

/// A job's stages, upstream first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The stages whose condition the job meets.
    pub stages: Vec<Stage>,
}

/// One stage of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Its id in the card.
    pub id: String,
    /// What kind of work it is.
    pub kind: StageKind,
    /// The component that does it.
    pub component: String,
    /// Stages of this plan whose outputs it takes.
    pub inputs: Vec<String>,
    /// It is given the job's own pictures.
    pub with_pictures: bool,
    /// It is given the pictures of the job's controls.
    pub with_controls: bool,
}

impl Plan {
    /// The stages of `card` that `request` needs. An input whose stage the job does not have is no edge; one that a later stage replaces is that one.
    pub fn new(request: &Request, card: &ModelCard) -> Self {
        let met = |stage: &&StageTemplate| match stage.condition() {
            StageCondition::Unspecified => true,
            StageCondition::WithImage => request.has_image() || (stage.with_controls && request.has_controls()),
            StageCondition::WithRefiner => request.has_refiner(),
        };
        let templates: Vec<_> = card.stages.iter().filter(met).collect();
        let present: BTreeSet<&str> = templates.iter().map(|stage| stage.id.as_str()).collect();
        let replaced = |at: usize, input: &str| {
            let last = templates[..at].iter().rev().find(|before| before.replaces == input);
            last.map_or(input, |last| last.id.as_str()).to_owned()
        };
        let stage = |(at, template): (usize, &&StageTemplate)| Stage {
            id: template.id.clone(),
            kind: template.kind(),
            component: template.component.clone(),
            inputs: template.inputs.iter().filter(|id| present.contains(id.as_str())).map(|id| replaced(at, id)).collect(),
            with_pictures: template.with_pictures,
            with_controls: template.with_controls,
        };
        Self { stages: templates.iter().enumerate().map(stage).collect() }
    }

    /// What is left to do of it when the outputs of `stored` are there already: the last stage, and whatever it needs and
    /// nobody has.
    pub fn without(&self, stored: &BTreeSet<String>) -> Self {
        let mut needed: BTreeSet<&str> = BTreeSet::new();
        for stage in self.stages.iter().rev() {
            let mut consumers = self.consumers(&stage.id).peekable();
            let is_sink = consumers.peek().is_none();
            if is_sink || (!stored.contains(&stage.id) && consumers.any(|consumer| needed.contains(consumer.id.as_str()))) {
                needed.insert(&stage.id);
            }
        }
        Self { stages: self.stages.iter().filter(|stage| needed.contains(stage.id.as_str())).cloned().collect() }
    }

    /// The stages that take the output of `stage`. None: it is the sink, and its output are the pictures.
    pub fn consumers<'a>(&'a self, stage: &'a str) -> impl Iterator<Item = &'a Stage> {
        self.stages.iter().filter(move |other| other.inputs.iter().any(|input| input == stage))
    }

    /// The stage of this id.
    pub fn stage(&self, id: &str) -> Option<&Stage> {
        self.stages.iter().find(|stage| stage.id == id)
    }
}

/// Checks that a card's stages can be planned at all: unique ids, inputs named before they are used, one sink.
pub fn check_stages(card: &ModelCard) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for stage in &card.stages {
        if let Some(input) = stage.inputs.iter().find(|input| !seen.contains(input.as_str())) {
            return Err(format!("card: stage {:?} takes {input:?}, which is no stage before it", stage.id));
        }
        if !card.components.iter().any(|component| component.name == stage.component) {
            return Err(format!("card: stage {:?} needs component {:?}, which is not there", stage.id, stage.component));
        }
        if stage.kind() == StageKind::Unspecified {
            return Err(format!("card: stage {:?} has no kind", stage.id));
        }
        if !stage.replaces.is_empty() && !stage.inputs.contains(&stage.replaces) {
            return Err(format!("card: stage {:?} replaces {:?} and does not take it", stage.id, stage.replaces));
        }
        if !seen.insert(stage.id.as_str()) {
            return Err(format!("card: two stages are named {:?}", stage.id));
        }
    }
    let mut consumed: BTreeSet<&str> = card.stages.iter().flat_map(|stage| &stage.inputs).map(String::as_str).collect();
    // What replaces another goes to the stages behind it that take that.
    for (at, stage) in card.stages.iter().enumerate().filter(|(_, stage)| !stage.replaces.is_empty()) {
        if card.stages[at + 1..].iter().any(|later| later.inputs.contains(&stage.replaces)) {
            consumed.insert(&stage.id);
        }
    }
    match seen.difference(&consumed).count() {
        1 => Ok(()),
        sinks => Err(format!("card: {sinks} stages give pictures, there must be one")),
    }
}

#[cfg(test)]
mod tests {
    use proto::v1::{JobSpec, Parameter};

    use super::*;
    use crate::{request::Context, testing};

    fn plan(image: &str) -> Plan {
        let mut card = testing::card("emoji");
        card.parameters.push(Parameter { name: "image_blob_id".into(), ..Parameter::default() });
        let spec = JobSpec { image_blob_id: image.to_owned(), ..testing::spec("emoji") };
        let context = Context { seed: 1, max_pixels: 1 << 30, missing_blobs: &[] };
        Plan::new(&Request::parse(spec, &card, context).unwrap(), &card)
    }

    fn ids(plan: &Plan) -> Vec<&str> {
        plan.stages.iter().map(|stage| stage.id.as_str()).collect()
    }

    #[test]
    fn a_job_has_the_stages_whose_condition_it_meets() {
        assert_eq!(ids(&plan("")), ["encode_text", "denoise", "decode"]);
        assert_eq!(ids(&plan(&"a".repeat(64))), ["encode_text", "encode_image", "denoise", "decode"]);
    }

    #[test]
    fn a_stage_the_job_does_not_have_is_nobodys_input() {
        assert_eq!(plan("").stage("denoise").unwrap().inputs, ["encode_text"]);
        assert_eq!(plan(&"a".repeat(64)).stage("denoise").unwrap().inputs, ["encode_text", "encode_image"]);
    }

    #[test]
    fn what_is_stored_is_not_done_again_nor_what_only_it_needed() {
        let plan = plan(&"a".repeat(64));
        let without = |stored: &[&str]| {
            let stored = stored.iter().map(|id| (*id).to_owned()).collect();
            ids(&plan.without(&stored)).iter().map(|id| (*id).to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(without(&[]), ["encode_text", "encode_image", "denoise", "decode"]);
        assert_eq!(without(&["encode_text"]), ["encode_image", "denoise", "decode"]);
        assert_eq!(without(&["denoise"]), ["decode"]);
        assert_eq!(without(&["decode"]), ["encode_text", "encode_image", "denoise", "decode"], "pictures are not stored there");
    }

    /// The card of a model with a refiner, and a job that leaves it the last fifth, or nothing.
    fn refined(denoising_end: f64) -> (ModelCard, Plan) {
        let mut card = testing::card("emoji");
        let refine = StageTemplate {
            id: "refine".into(),
            kind: StageKind::Denoise.into(),
            component: "transformer".into(),
            inputs: vec!["encode_text".into(), "denoise".into()],
            condition: StageCondition::WithRefiner.into(),
            replaces: "denoise".into(),
            ..StageTemplate::default()
        };
        card.stages.insert(card.stages.len() - 1, refine);
        card.parameters.push(Parameter { name: "denoising_end".into(), maximum: 1.0, ..Parameter::default() });
        let spec = JobSpec { denoising_end: Some(denoising_end), ..testing::spec("emoji") };
        let context = Context { seed: 1, max_pixels: 1 << 30, missing_blobs: &[] };
        let plan = Plan::new(&Request::parse(spec, &card, context).unwrap(), &card);
        (card, plan)
    }

    #[test]
    fn a_stage_that_replaces_another_is_between_it_and_what_takes_its_output() {
        let (card, plan) = refined(0.8);
        assert_eq!(check_stages(&card), Ok(()));
        assert_eq!(ids(&plan), ["encode_text", "denoise", "refine", "decode"]);
        assert_eq!(plan.stage("refine").unwrap().inputs, ["encode_text", "denoise"]);
        assert_eq!(plan.stage("decode").unwrap().inputs, ["refine"]);
        let stored = BTreeSet::from(["denoise".to_owned(), "encode_text".to_owned()]);
        assert_eq!(ids(&plan.without(&stored)), ["refine", "decode"]);
        let (_, plan) = refined(1.0);
        assert_eq!(ids(&plan), ["encode_text", "denoise", "decode"]);
        assert_eq!(plan.stage("decode").unwrap().inputs, ["denoise"]);
    }

    #[test]
    fn a_card_whose_stage_replaces_what_it_does_not_take_is_refused() {
        let (mut card, _) = refined(0.8);
        let refine = card.stages.len() - 2;
        card.stages[refine].inputs.pop();
        assert!(check_stages(&card).unwrap_err().contains("replaces"));
        let (mut card, _) = refined(0.8);
        card.stages.pop();
        assert_eq!(check_stages(&card), Ok(()), "it is the last one then");
        let last = card.stages.len() - 1;
        card.stages[last].inputs = vec!["denoise".into()];
        card.stages.push(StageTemplate {
            id: "decode".into(),
            inputs: vec!["encode_text".into()],
            ..card.stages[last - 1].clone()
        });
        assert!(check_stages(&card).is_err(), "two give pictures");
    }

    #[test]
    fn the_sink_has_no_consumers() {
        assert_eq!(plan("").consumers("decode").count(), 0);
        assert_eq!(plan("").consumers("denoise").next().unwrap().id, "decode");
    }

    #[test]
    fn a_card_with_a_dangling_input_is_refused() {
        let mut card = testing::card("emoji");
        assert_eq!(check_stages(&card), Ok(()));
        card.stages[0].inputs.push("nothing".into());
        assert!(check_stages(&card).unwrap_err().contains("\"nothing\""));
    }
}
