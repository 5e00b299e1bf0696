//! Coordinators that stand for the lead in a real etcd, and what a former leader can still do.

use std::{
    io::{BufRead, BufReader},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
};

use futures::{StreamExt, stream};
use prost::Message;
use proto::v1::{JobRecord, JobSpec};
use tempfile::TempDir;

use super::*;
use crate::store::{Change, EtcdStore, MAX_ACCEPTED_BYTES, MAX_RECORD_BYTES, StoreHandle};

/// Longest wait for what must happen.
const DEADLINE: Duration = Duration::from_secs(20);
/// Longest that nobody may lead.
const TAKEOVER: Duration = Duration::from_secs(6);
/// In which a process of this test program finds the etcd in which it shall stand.
const STAND_IN: &str = "ATELIER_TEST_STAND_IN";

struct Etcd {
    folder: TempDir,
    ports: [u16; 2],
    child: Child,
}

impl Etcd {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ports = free_ports();
        let child = spawn_etcd(folder.path(), ports);
        let etcd = Self { folder, ports, child };
        etcd.until_it_answers().await;
        etcd
    }

    fn config(&self) -> EtcdConfig {
        EtcdConfig::new(vec![format!("http://127.0.0.1:{}", self.ports[0])], "/atelier")
    }

    async fn client(&self) -> Client {
        connect(&self.config()).await.unwrap()
    }

    async fn until_it_answers(&self) {
        let start = Instant::now();
        while async { in_time(connect(&self.config()).await?.get("x", None)).await }.await.is_err() {
            assert!(start.elapsed() < DEADLINE, "etcd does not come up");
            sleep(Duration::from_millis(50)).await;
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    async fn restart(&mut self) {
        self.child = spawn_etcd(self.folder.path(), self.ports);
        self.until_it_answers().await;
    }

    async fn lead(&self, address: &str) -> Led {
        timeout(DEADLINE, campaign(&self.config(), address, &CancellationToken::new())).await.unwrap().unwrap()
    }

    async fn open(&self, led: &Led) -> (StoreHandle, Vec<JobRecord>) {
        let (handle, recovered) = EtcdStore::open(&self.config(), led).await.unwrap();
        assert_eq!(recovered.term, led.term);
        (handle, recovered.jobs)
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

fn spawn_etcd(folder: &Path, [client, peer]: [u16; 2]) -> Child {
    let [client, peer] = [client, peer].map(|port| format!("http://127.0.0.1:{port}"));
    Command::new("etcd")
        .args(["--name", "test", "--log-level", "error", "--data-dir"])
        .arg(folder)
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("test={peer}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("this test needs the etcd binary: apt-get install etcd-server")
}

fn signal(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

fn record(number: u64, attempt: u32) -> JobRecord {
    JobRecord { id: format!("job-{number:05}"), number, attempt, ..JobRecord::default() }
}

fn put(number: u64, attempt: u32) -> Change {
    Change::Put(Box::new(record(number, attempt)))
}

async fn written(handle: &StoreHandle, changes: Vec<Change>) -> Result<(), String> {
    let batch = handle.write(changes);
    timeout(DEADLINE, handle.until_durable(batch)).await.expect("a write ends")
}

/// A leader in a process of its own, which does nothing but lead.
struct Leader(Child);

impl Leader {
    /// Returns once it leads.
    fn start(etcd: &Etcd) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "leadership::tests::stands_in_another_process", "--nocapture"])
            .env(STAND_IN, &etcd.config().endpoints[0])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map_while(std::result::Result::ok).any(|line| line.contains("leads now")), "the other process leads");
        Self(child)
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[tokio::test]
#[ignore = "a process that other tests start"]
async fn stands_in_another_process() {
    let Ok(endpoint) = std::env::var(STAND_IN) else { return };
    let config = EtcdConfig::new(vec![endpoint], "/atelier");
    let led = campaign(&config, "other:1", &CancellationToken::new()).await.unwrap();
    println!("leads now");
    led.lost.cancelled().await;
}

#[tokio::test]
async fn who_leads_is_known_and_gives_the_lead_up() {
    let etcd = Etcd::start().await;
    assert_eq!(leader(&etcd.config()).await.unwrap(), None);
    let first = etcd.lead("a:1").await;
    assert_eq!(leader(&etcd.config()).await.unwrap().as_deref(), Some("a:1"));
    let config = etcd.config();
    let second = tokio::spawn(async move { campaign(&config, "b:1", &CancellationToken::new()).await.unwrap() });
    sleep(LEASE_TTL + Duration::from_secs(1)).await;
    assert!(!second.is_finished() && !first.lost.is_cancelled(), "the lease is kept");
    let (term, start) = (first.term, Instant::now());
    drop(first);
    let second = timeout(DEADLINE, second).await.unwrap().unwrap();
    assert!(start.elapsed() < LEASE_TTL, "no lease has to expire: {:?}", start.elapsed());
    assert!(second.term > term);
    assert_eq!(leader(&etcd.config()).await.unwrap().as_deref(), Some("b:1"));
}

#[tokio::test]
async fn another_takes_over_when_the_leader_is_killed_or_stopped() {
    let etcd = Etcd::start().await;
    for how in ["-KILL", "-STOP"] {
        let leader = Leader::start(&etcd);
        let start = Instant::now();
        signal(leader.0.id(), how);
        let led = etcd.lead("b:1").await;
        let took = start.elapsed();
        println!("leadership: taken over {took:.1?} after {how}");
        assert!(took <= TAKEOVER, "{how}: {took:?}");
        drop(led);
    }
}

#[tokio::test]
async fn the_jobs_are_there_for_the_next_leader() {
    let etcd = Etcd::start().await;
    let first = etcd.lead("a:1").await;
    let (handle, jobs) = etcd.open(&first).await;
    assert_eq!(jobs, []);
    // More than a page, and one batch larger than a transaction.
    written(&handle, (0..1000).map(|number| put(number, 1)).collect()).await.unwrap();
    let batches: Vec<u64> = (0..1000).map(|number| handle.write(vec![put(number, 2)])).collect();
    let last = handle.write(vec![Change::Forget { job_id: record(999, 0).id }, put(0, 3)]);
    handle.until_durable(last).await.unwrap();
    assert!(batches.into_iter().all(|batch| batch < last));
    drop((handle, first));
    let second = etcd.lead("b:1").await;
    let (_handle, jobs) = etcd.open(&second).await;
    let expected: Vec<_> = (0..999).map(|number| record(number, if number == 0 { 3 } else { 2 })).collect();
    assert!(jobs == expected, "found {} jobs", jobs.len());
}

#[tokio::test]
async fn no_write_of_a_former_leader_lands() {
    let etcd = Etcd::start().await;
    let former = etcd.lead("a:1").await;
    let (stale, _) = etcd.open(&former).await;
    written(&stale, vec![put(0, 1)]).await.unwrap();
    // As after a pause: the key is gone, and the former leader does not know.
    etcd.client().await.delete(leader_key("/atelier"), None).await.unwrap();
    let led = etcd.lead("b:1").await;
    assert!(led.term > former.term);
    let (handle, jobs) = etcd.open(&led).await;
    assert_eq!(jobs, [record(0, 1)]);

    // Through the store: the first refusal is final.
    let refused = written(&stale, vec![put(1, 1)]).await.unwrap_err();
    assert_eq!(refused, "another coordinator leads");
    let later = stale.write(vec![put(0, 9)]);
    assert!(stale.until_durable(later).await.is_err());
    // And without it, as if its guard were all there is.
    let client = etcd.client().await;
    let write = |number| {
        let put = TxnOp::put(format!("/atelier/jobs/{}", record(number, 9).id), record(number, 9).encode_to_vec(), None);
        let (mut client, guard) = (client.clone(), former.fence.compare());
        async move { client.txn(Txn::new().when([guard]).and_then([put])).await.unwrap().succeeded() }
    };
    let outcomes: Vec<bool> = stream::iter(0..10_000).map(write).buffer_unordered(64).collect().await;
    let landed = outcomes.into_iter().filter(|landed| *landed).count();
    println!("leadership: {landed} of 10000 writes of a former leader landed");
    assert_eq!(landed, 0);
    written(&handle, vec![put(0, 2)]).await.unwrap();
    drop((handle, led));
    let (_handle, jobs) = etcd.open(&etcd.lead("c:1").await).await;
    assert_eq!(jobs, [record(0, 2)]);
}

#[tokio::test]
async fn a_short_outage_is_waited_out_and_a_long_one_ends_the_lead() {
    let mut etcd = Etcd::start().await;
    let led = etcd.lead("a:1").await;
    let (handle, _) = etcd.open(&led).await;
    signal(etcd.child.id(), "-STOP");
    let batch = handle.write(vec![put(1, 1)]);
    sleep(Duration::from_millis(300)).await;
    signal(etcd.child.id(), "-CONT");
    timeout(DEADLINE, handle.until_durable(batch)).await.unwrap().unwrap();
    assert!(!led.lost.is_cancelled());

    let start = Instant::now();
    etcd.kill();
    let batch = handle.write(vec![put(2, 1)]);
    timeout(DEADLINE, led.lost.cancelled()).await.unwrap();
    println!("the loss is seen after {:.2} s, the lease has {} s", start.elapsed().as_secs_f64(), LEASE_TTL.as_secs());
    assert!(start.elapsed() <= 2 * LEASE_TTL, "the loss is seen by itself: {:?}", start.elapsed());
    assert_eq!(handle.until_durable(batch).await.unwrap_err(), "another coordinator leads");
    etcd.restart().await;
    let led = etcd.lead("a:1").await;
    let (handle, jobs) = etcd.open(&led).await;
    assert_eq!(jobs, [record(1, 1)], "what was acknowledged, and nothing else");
    written(&handle, vec![put(2, 2)]).await.unwrap();
}

#[tokio::test]
async fn a_lease_that_etcd_says_is_over_is_lost_though_the_answer_is_ok() {
    let etcd = Etcd::start().await;
    let led = etcd.lead("a:1").await;
    let (handle, _) = etcd.open(&led).await;
    let mut client = etcd.client().await;
    let lease = client.get(leader_key("/atelier"), None).await.unwrap().kvs()[0].lease();
    client.lease_revoke(lease).await.unwrap();
    timeout(LEASE_TTL, led.lost.cancelled()).await.expect("the loss is seen within the lease");
    assert_eq!(written(&handle, vec![put(1, 1)]).await.unwrap_err(), "another coordinator leads");
}

#[tokio::test]
async fn a_record_that_is_too_large_is_refused() {
    let etcd = Etcd::start().await;
    let led = etcd.lead("a:1").await;
    let (handle, _) = etcd.open(&led).await;
    let with_prompt = |bytes: usize| {
        let spec = JobSpec { prompt: "x".repeat(bytes), ..JobSpec::default() };
        JobRecord { spec: Some(spec), ..record(1, 1) }
    };
    assert_eq!(handle.max_accepted_bytes(), Some(MAX_ACCEPTED_BYTES));
    written(&handle, vec![Change::Put(Box::new(with_prompt(MAX_RECORD_BYTES - 100)))]).await.unwrap();
    let broken = written(&handle, vec![Change::Put(Box::new(with_prompt(MAX_RECORD_BYTES)))]).await.unwrap_err();
    assert!(broken.contains("the limit in etcd is 73728"), "{broken}");
}

#[tokio::test]
async fn any_number_of_the_largest_records_is_written_and_read() {
    let etcd = Etcd::start().await;
    let led = etcd.lead("a:1").await;
    let (handle, _) = etcd.open(&led).await;
    let large = |number: u64| {
        let spec = JobSpec { prompt: "x".repeat(MAX_RECORD_BYTES - 200), ..JobSpec::default() };
        Change::Put(Box::new(JobRecord { spec: Some(spec), ..record(number, 1) }))
    };
    // One batch, and many that wait together.
    written(&handle, (0..300).map(large).collect()).await.unwrap();
    let batches: Vec<_> = (300..500).map(|number| handle.write(vec![large(number)])).collect();
    for batch in batches {
        timeout(DEADLINE, handle.until_durable(batch)).await.unwrap().unwrap();
    }
    drop((handle, led));
    let led = etcd.lead("b:1").await;
    assert_eq!(etcd.open(&led).await.1.len(), 500);
}
