//! The coordinator's store of pictures is away or full for a while.

use proto::v1::control_request::Command;
use proto::v1::control_response::Report;
use proto::v1::{Destination, JobSpec, RunTask, StageKind, TaskRef};
use tonic::Code;

use crate::coordinator::{Coordinator, join};
use crate::job::Bench;
use crate::running::Running;
use crate::{run, spec, task};

#[tokio::test]
async fn a_result_waits_until_there_is_room_for_it_and_says_that_it_is_computed() {
    let coordinator = Coordinator::start().await;
    let mut bench = Bench::start(&coordinator, "transformer").await;
    for code in [Code::ResourceExhausted, Code::Unavailable] {
        coordinator.trouble(Some(code));
        let job = bench.job(&coordinator, "job", 1 + code as u32, 2);
        for run in job.whole() {
            bench.send(run).await;
        }
        let computed = |report: &Report| match report {
            Report::TaskComputed(computed) if computed.task.as_ref() == Some(&job.decode) => Some(()),
            _ => None,
        };
        bench.control.wait("an output that is not taken", computed).await;
        coordinator.trouble(None);
        assert!(!bench.control.done(&job.decode).await.images.is_empty());
    }
    bench.worker.stop().await;
}

#[tokio::test]
async fn a_picture_that_a_store_cannot_give_for_now_is_no_fault_of_the_job() {
    let coordinator = Coordinator::start().await;
    let worker = Running::start(&coordinator).await;
    let mut control = worker.control().await;
    control.send(Command::JoinGroup(join("g", 1, "vae", &[&worker]))).await;
    control.ready("g", 1).await;
    // sha256 of "abc".
    let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    coordinator.store(abc, b"abc");
    for (attempt, code, reason) in [(1, Code::ResourceExhausted, "STORE_UNAVAILABLE"), (2, Code::Internal, "PAYLOAD_REFUSED")] {
        coordinator.trouble(Some(code));
        let task = TaskRef { attempt, ..task("encode_image", "g", 1) };
        // Nobody starts the task it goes to; that it is held is enough.
        let outputs = vec![Destination { task: Some(task.clone()), address: worker.address() }];
        let spec = Some(JobSpec { image_blob_id: abc.into(), ..spec(1) });
        let run = RunTask { spec, outputs, blob_address: coordinator.address(), ..run(task.clone(), 1) };
        assert_eq!(run.kind(), StageKind::EncodeImage);
        control.send(Command::RunTask(run)).await;
        assert_eq!(control.failed(&task).await.reason, reason);
    }
    worker.stop().await;
}
