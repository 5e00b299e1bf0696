//! Membership in a real etcd: a child process on free ports, which is stopped, killed and restarted.

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use coordinator::{
    config::EtcdConfig,
    membership::{Change, etcd},
};
use etcd_client::{Client, PutOptions};
use prost::Message;
use proto::v1::{JobState, Products, Registration};
use tempfile::TempDir;
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    fake_worker::{FakeWorker, Pace},
    harness::{Coordinator, DEADLINE, spec, terminal},
};

/// A little longer than the watch takes to see that etcd is silent.
const OUTAGE: Duration = Duration::from_secs(6);
/// etcd grants no lease shorter than this.
const LEASE_SECONDS: i64 = 2;

struct Etcd {
    folder: TempDir,
    client_port: u16,
    peer_port: u16,
    child: Child,
}

impl Etcd {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [client_port, peer_port] = free_ports();
        let child = spawn(folder.path(), client_port, peer_port);
        let etcd = Self { folder, client_port, peer_port, child };
        etcd.until_it_answers().await;
        etcd
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    fn config(&self) -> EtcdConfig {
        EtcdConfig::new(vec![self.url()], "/atelier")
    }

    async fn client(&self) -> Client {
        Client::connect([self.url()], None).await.unwrap()
    }

    async fn until_it_answers(&self) {
        let start = Instant::now();
        loop {
            let answer = async { Client::connect([self.url()], None).await?.get("x", None).await };
            if let Ok(Ok(_)) = timeout(Duration::from_secs(2), answer).await {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "etcd does not come up at {}", self.url());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn register(&self, worker: &Registration, lease: Option<i64>) {
        let key = format!("{}{}", etcd::workers_prefix("/atelier"), worker.worker_id);
        let options = lease.map(|lease| PutOptions::new().with_lease(lease));
        self.client().await.put(key, worker.encode_to_vec(), options).await.unwrap();
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success(), "kill {signal} failed");
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    async fn restart(&mut self) {
        self.child = spawn(self.folder.path(), self.client_port, self.peer_port);
        self.until_it_answers().await;
    }

    async fn restart_empty(&mut self) {
        self.folder = tempfile::tempdir().unwrap();
        self.restart().await;
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn free_ports() -> [u16; 2] {
    let listeners = [0, 0].map(|port: u16| TcpListener::bind(("127.0.0.1", port)).unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

fn spawn(folder: &Path, client_port: u16, peer_port: u16) -> Child {
    let (client, peer) = (format!("http://127.0.0.1:{client_port}"), format!("http://127.0.0.1:{peer_port}"));
    Command::new("etcd")
        .args(["--name", "test", "--data-dir"])
        .arg(folder.join("data"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("test={peer}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("this test needs the etcd binary: apt-get install etcd-server")
}

fn worker(id: &str) -> Registration {
    Registration {
        worker_id: id.into(),
        address: "127.0.0.1:1".into(),
        data_address: "127.0.0.1:2".into(),
        device: "cpu".into(),
        products: vec![Products::F32.into()],
        ..Registration::default()
    }
}

/// Watches from the moment of the call until the guard is dropped.
fn watch(etcd: &Etcd) -> (mpsc::Receiver<Change>, DropGuard) {
    let (changes, changed) = mpsc::channel(16);
    let stop = CancellationToken::new();
    tokio::spawn(etcd::watch(etcd.config(), changes, stop.clone()));
    (changed, stop.drop_guard())
}

async fn next(changed: &mut mpsc::Receiver<Change>) -> Change {
    timeout(DEADLINE, changed.recv()).await.expect("a change comes").unwrap()
}

fn left(change: Change) -> String {
    match change {
        Change::Left { worker_id, .. } => worker_id,
        Change::Joined(worker) => {
            panic!("{} joined, where somebody should leave", worker.worker_id)
        }
    }
}

#[tokio::test]
async fn workers_are_found_and_leave_when_their_lease_expires() {
    let etcd = Etcd::start().await;
    etcd.register(&worker("early"), None).await;
    let (mut changed, _watch) = watch(&etcd);
    assert_eq!(next(&mut changed).await, Change::Joined(worker("early")), "who is there already is listed");
    let lease = etcd.client().await.lease_grant(LEASE_SECONDS, None).await.unwrap().id();
    etcd.register(&worker("late"), Some(lease)).await;
    assert_eq!(next(&mut changed).await, Change::Joined(worker("late")), "who comes later is seen");
    assert_eq!(left(next(&mut changed).await), "late", "nobody renewed the lease");
}

#[tokio::test]
async fn what_is_no_registration_is_ignored() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    client.put("/atelier/workers/garbage", "not protobuf", None).await.unwrap();
    client.put("/atelier/workers/liar", worker("other").encode_to_vec(), None).await.unwrap();
    etcd.register(&worker("honest"), None).await;
    let (mut changed, _watch) = watch(&etcd);
    assert_eq!(next(&mut changed).await, Change::Joined(worker("honest")));
}

#[tokio::test]
async fn nobody_leaves_while_etcd_is_frozen_and_changes_are_seen_when_it_goes_on() {
    let etcd = Etcd::start().await;
    etcd.register(&worker("first"), None).await;
    let (mut changed, _watch) = watch(&etcd);
    assert_eq!(next(&mut changed).await, Change::Joined(worker("first")));
    etcd.signal("-STOP");
    assert!(timeout(OUTAGE, changed.recv()).await.is_err(), "membership stays as it was");
    etcd.signal("-CONT");
    etcd.register(&worker("second"), None).await;
    assert_eq!(next(&mut changed).await, Change::Joined(worker("second")));
}

#[tokio::test]
async fn nobody_leaves_while_etcd_is_down_and_changes_are_seen_when_it_is_back() {
    let mut etcd = Etcd::start().await;
    etcd.register(&worker("first"), None).await;
    let (mut changed, _watch) = watch(&etcd);
    assert_eq!(next(&mut changed).await, Change::Joined(worker("first")));
    etcd.kill();
    etcd.restart().await;
    etcd.register(&worker("second"), None).await;
    assert_eq!(next(&mut changed).await, Change::Joined(worker("second")));
}

#[tokio::test]
async fn a_worker_that_is_missing_after_an_outage_may_register_again_before_it_counts_as_left() {
    let mut etcd = Etcd::start().await;
    etcd.register(&worker("gone"), None).await;
    etcd.register(&worker("stays"), None).await;
    let (mut changed, _watch) = watch(&etcd);
    assert_eq!(next(&mut changed).await, Change::Joined(worker("gone")));
    assert_eq!(next(&mut changed).await, Change::Joined(worker("stays")));
    etcd.kill();
    etcd.restart_empty().await;
    etcd.register(&worker("stays"), None).await;
    assert_eq!(left(next(&mut changed).await), "gone");
    etcd.register(&worker("new"), None).await;
    assert_eq!(next(&mut changed).await, Change::Joined(worker("new")), "and the other one never left");
}

#[tokio::test]
async fn a_cluster_that_finds_its_workers_in_etcd_draws_pictures() {
    let etcd = Etcd::start().await;
    let coordinator = Coordinator::start_with(Some(etcd.config())).await;
    let workers = ["w1", "w2"].map(|id| FakeWorker::serve(id, Pace::Run));
    for worker in &workers {
        etcd.register(&worker.registration, None).await;
    }
    coordinator.until_ready().await;
    let job = coordinator.create(spec()).await;
    assert_eq!(terminal(&coordinator.watch(&job.id, 0).await).state(), JobState::Succeeded);
}
