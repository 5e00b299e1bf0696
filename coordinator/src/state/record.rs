//! A job as it is written down, and back.

use std::sync::Arc;

use proto::v1::{JobEnd, JobRecord, JobState, PlannedStage, StageKind};

use telemetry::TraceContext;

use super::{
    Millis,
    job::{Job, NewJob, timestamp},
};
use crate::plan::{Plan, Stage};

impl Job {
    /// All that another coordinator needs to go on with it, or to show how it ended.
    pub(super) fn record(&self) -> JobRecord {
        let stage = |stage: &Stage| PlannedStage {
            id: stage.id.clone(),
            kind: stage.kind as i32,
            component: stage.component.clone(),
            inputs: stage.inputs.clone(),
            with_pictures: stage.with_pictures,
            with_controls: stage.with_controls,
        };
        let end = self.finished.map(|finished| JobEnd {
            state: self.state as i32,
            time: Some(timestamp(finished)),
            sequence: self.sequence(),
            failure: self.failure.as_deref().cloned(),
            images: self.images.clone(),
            pictures_dropped: self.pictures_dropped,
        });
        JobRecord {
            id: self.id.clone(),
            request_id: self.request_id.clone(),
            fingerprint: self.fingerprint.to_vec().into(),
            spec: Some(self.spec.clone()),
            create_time: Some(timestamp(self.created())),
            number: self.number,
            priority: self.priority,
            deadline: self.deadline.map(timestamp),
            attempt: self.attempt,
            losses: self.losses,
            cancelling: self.cancelling,
            tenant: self.tenant.to_string(),
            end,
            stages: self.plan.stages.iter().map(stage).collect(),
            traceparent: self.trace.map(|trace| trace.to_string()).unwrap_or_default(),
            products: self.products as i32,
            pixels_per_image: self.pixels_per_image,
        }
    }

    /// The job as it was written down, seen by the coordinator of `term`. One that is not over waits.
    pub(super) fn recovered(record: JobRecord, term: u64) -> Self {
        let products = record.products();
        let stages = record.stages.into_iter().map(|stage| Stage {
            // Records of before this was written down: only that kind had pictures then.
            with_pictures: stage.with_pictures || stage.kind() == StageKind::EncodeImage,
            with_controls: stage.with_controls,
            kind: stage.kind(),
            id: stage.id,
            component: stage.component,
            inputs: stage.inputs,
        });
        let new = NewJob {
            id: record.id,
            request_id: record.request_id,
            tenant: record.tenant.into(),
            fingerprint: <[u8; 32]>::try_from(&record.fingerprint[..]).unwrap_or_default(),
            spec: record.spec.unwrap_or_default(),
            products,
            pixels_per_image: record.pixels_per_image,
            plan: Arc::new(Plan { stages: stages.collect() }),
            priority: record.priority,
            deadline: record.deadline.as_ref().map(millis),
            trace: TraceContext::parse(&record.traceparent),
        };
        let mut job = Self::new(record.number, new, record.create_time.as_ref().map_or(0, millis));
        job.attempt = record.attempt.max(1);
        job.losses = record.losses;
        job.cancelling = record.cancelling;
        match record.end {
            Some(end) => {
                job.number_from(end.sequence);
                job.failure = end.failure.map(Box::new);
                job.images = end.images;
                job.pictures_dropped = end.pictures_dropped;
                let state = JobState::try_from(end.state).unwrap_or(JobState::Failed);
                job.enter(state, end.time.as_ref().map_or(0, millis));
            }
            None => job.number_from_term(term),
        }
        job
    }
}

fn millis(timestamp: &prost_types::Timestamp) -> Millis {
    let seconds = u64::try_from(timestamp.seconds).unwrap_or_default();
    seconds.saturating_mul(1000).saturating_add(u64::try_from(timestamp.nanos / 1_000_000).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use proto::v1::{ImageResult, JobSpec, Products, StageKind};

    use super::*;

    fn job() -> Job {
        let stage = Stage {
            id: "denoise".into(),
            kind: StageKind::Denoise,
            component: "transformer".into(),
            inputs: vec![],
            with_pictures: false,
            with_controls: false,
        };
        let new = NewJob {
            id: "j".into(),
            request_id: "r".into(),
            tenant: "studio".into(),
            fingerprint: [7; 32],
            spec: JobSpec { prompt: "a car".into(), seed: Some(3), ..JobSpec::default() },
            products: Products::Amx,
            pixels_per_image: 1 << 20,
            plan: Arc::new(Plan { stages: vec![stage] }),
            priority: 5,
            deadline: Some(9000),
            trace: TraceContext::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        };
        Job::new(17, new, 1234)
    }

    #[test]
    fn a_waiting_job_comes_back_with_higher_numbers_for_its_events() {
        let job = job();
        let back = Job::recovered(job.record(), 3);
        assert_eq!(back.record(), job.record());
        // Whoever asks, and then watches after that, misses nothing and is told nothing twice.
        let asked = back.view().sequence;
        assert_eq!((back.view().state(), asked), (JobState::Queued, (3 << 20) - 1));
        assert_eq!(back.events_after(asked).count(), 0);
        let mut back = back;
        back.enter(JobState::Running, 5000);
        assert_eq!(back.sequence(), 3 << 20, "above all that was told before");
        assert_eq!(back.events_after(asked).count(), 1);
    }

    #[test]
    fn a_finished_job_comes_back_as_it_was() {
        let mut job = job();
        job.enter(JobState::Running, 2000);
        job.images.push(ImageResult { blob_id: "b".into(), ..ImageResult::default() });
        job.enter(JobState::Succeeded, 3000);
        let back = Job::recovered(job.record(), 3);
        assert_eq!(back.view(), job.view());
        let last = back.events_after(2).last().map(|event| event.sequence);
        assert_eq!(last, Some(3), "a watcher that saw two events is told the third");
    }
}
