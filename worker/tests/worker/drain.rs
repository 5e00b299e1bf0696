//! The signal to stop: what runs here is handed over, and then the worker goes.

use std::time::{Duration, Instant};

use proto::v1::control_request::Command;
use proto::v1::control_response::Report;
use proto::v1::{LeaveGroup, ParkTask};

use crate::coordinator::{Coordinator, PATIENCE, join, until};
use crate::job::Bench;
use crate::running::{Running, Waits};

/// Two steps and two seconds.
const QUICK: Duration = Duration::from_millis(2010);

const PATIENT: Waits = Waits { drain: PATIENCE, orphan: PATIENCE };

#[tokio::test]
async fn a_worker_that_is_to_stop_hands_its_tasks_over_and_goes() {
    let coordinator = Coordinator::start().await;
    let mut first = Bench::of(Running::waiting(&coordinator, PATIENT).await, "transformer").await;
    let job = first.job(&coordinator, "job", 1, 100);
    for run in job.whole() {
        first.send(run).await;
    }
    first.control.stepped(&job.denoise, 2).await;
    let began = Instant::now();
    first.worker.signal();
    let draining = |report: &Report| matches!(report, Report::Draining(_)).then_some(());
    first.control.wait("that it wants to go", draining).await;
    // Until it is let go it is a member and works, but nothing new comes to it.
    first.control.send(Command::JoinGroup(join("new", 1, "transformer", &[&first.worker]))).await;
    assert_eq!(first.control.lost("new", 1).await.reason, "DRAINING");
    assert!(coordinator.members().contains(&first.worker.registration));
    for task in [&job.decode, &job.denoise] {
        first.control.send(Command::ParkTask(ParkTask { task: Some(task.clone()) })).await;
    }
    let step = first.control.parked(&job.denoise).await;
    assert!((2..100).contains(&step), "parked after {step}");
    for group_id in ["e", "t", "v"] {
        first.control.send(Command::LeaveGroup(LeaveGroup { group_id: group_id.into(), epoch: 1 })).await;
    }
    for group_id in ["e", "t", "v"] {
        assert_eq!(first.control.lost(group_id, 1).await.reason, "LEFT");
    }
    first.worker.ended().await;
    assert!(began.elapsed() < QUICK, "it took {:?}", began.elapsed());
    let mut second = Bench::start(&coordinator, "transformer").await;
    let resumed = second.job(&coordinator, "job", 2, 100);
    let picture = second.draw_from(&resumed, step).await;
    let straight = second.job(&coordinator, "straight", 1, 100);
    assert_eq!(second.draw(&straight).await, picture);
    second.worker.stop().await;
}

#[tokio::test]
async fn a_worker_with_nothing_to_hand_over_or_nobody_to_take_it_goes_at_once() {
    let coordinator = Coordinator::start().await;
    let mut idle = Running::waiting(&coordinator, PATIENT).await;
    let control = idle.control().await;
    until("it is a member", || coordinator.members().contains(&idle.registration)).await;
    let began = Instant::now();
    idle.signal();
    idle.ended().await;
    assert!(began.elapsed() < QUICK, "it took {:?}", began.elapsed());
    drop(control);

    let mut orphan = Bench::of(Running::waiting(&coordinator, PATIENT).await, "transformer").await;
    let job = orphan.job(&coordinator, "job", 1, crate::ENDLESS);
    for run in job.whole() {
        orphan.send(run).await;
    }
    orphan.control.stepped(&job.denoise, 1).await;
    let Bench { mut worker, control } = orphan;
    drop(control);
    let began = Instant::now();
    worker.signal();
    worker.ended().await;
    assert!(began.elapsed() < QUICK, "it took {:?}", began.elapsed());
}

#[tokio::test]
async fn a_drain_lasts_through_a_change_of_coordinators_or_until_its_time_is_over() {
    let coordinator = Coordinator::start().await;
    let waits = Waits { drain: Duration::from_millis(700), ..PATIENT };
    let mut worker = Running::waiting(&coordinator, waits).await;
    let mut first = worker.control().await;
    first.send(Command::JoinGroup(join("g", 1, "transformer", &[&worker]))).await;
    first.ready("g", 1).await;
    worker.signal();
    first.wait("that it wants to go", |report| matches!(report, Report::Draining(_)).then_some(())).await;
    let (_second, holding) = worker.led(proto::v1::Lead { term: 2, ..Default::default() }).await;
    assert!(holding.draining && holding.ranks.len() == 1, "{holding:?}");
    worker.ended().await;
    until("it is no member any more", || coordinator.members().is_empty()).await;
}

#[tokio::test]
async fn a_second_signal_ends_the_drain() {
    let coordinator = Coordinator::start().await;
    let mut bench = Bench::of(Running::waiting(&coordinator, PATIENT).await, "transformer").await;
    bench.worker.signal();
    bench.control.wait("that it wants to go", |report| matches!(report, Report::Draining(_)).then_some(())).await;
    let began = Instant::now();
    bench.worker.hurry();
    bench.worker.ended().await;
    assert!(began.elapsed() < QUICK, "it took {:?}", began.elapsed());
}
