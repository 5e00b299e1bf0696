//! Membership in a real etcd, which is stopped, killed and started again.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use etcd_client::Client;
use prost::Message;
use proto::v1::Registration;
use worker::config::{EtcdPlace, Membership};

use crate::coordinator::PATIENCE;
use crate::running::{Running, Waits};

/// The lease's TTL and some.
const PAST_TTL: Duration = Duration::from_secs(7);

/// An etcd of one member.
struct Etcd {
    child: Child,
    url: String,
}

impl Etcd {
    fn start(data: &Path, url: &str, peer_url: &str) -> Self {
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(data)
            .args(["--listen-client-urls", url, "--advertise-client-urls", url])
            .args(["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url])
            .args(["--initial-cluster", &format!("default={peer_url}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, url: url.into() }
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// The lease of the worker's key, if it is there and says what it should.
    async fn lease(&self, registration: &Registration) -> Option<i64> {
        let look = async {
            let mut client = Client::connect([&self.url], None).await.ok()?;
            let found = client.get(format!("/test/workers/{}", registration.worker_id), None).await.ok()?;
            let key = found.kvs().first()?;
            assert_eq!(Registration::decode(key.value()).unwrap(), *registration);
            Some(key.lease())
        };
        tokio::time::timeout(Duration::from_secs(2), look).await.ok().flatten()
    }

    /// Waits until the worker is there under another lease than `before`.
    async fn new_lease(&self, registration: &Registration, before: Option<i64>) -> i64 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lease(registration).await {
                Some(lease) if lease != 0 && Some(lease) != before => return lease,
                found => assert!(Instant::now() < deadline, "still {found:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_url() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn a_worker_registers_in_etcd_again_whatever_happens_to_etcd() {
    if Command::new("etcd").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("skipped: there is no etcd on this machine");
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let (url, peer_url) = (free_url(), free_url());
    let etcd = Etcd::start(data.path(), &url, &peer_url);
    let place = EtcdPlace { endpoints: vec![url.clone()], prefix: "/test".into(), tls: identity::EtcdTls::default() };
    let worker = Running::with(Membership::Etcd(place), Waits::default()).await;
    let first = etcd.new_lease(&worker.registration, None).await;

    // The passing of time is what is tested: nothing happens that could be waited for. Stopped again and again, because
    // somebody else may let it go on.
    let until = Instant::now() + PAST_TTL;
    while Instant::now() < until {
        etcd.signal("-STOP");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    etcd.signal("-CONT");
    let second = etcd.new_lease(&worker.registration, Some(first)).await;

    drop(etcd);
    let etcd = Etcd::start(data.path(), &url, &peer_url);
    let third = etcd.new_lease(&worker.registration, Some(second)).await;

    let registration = worker.registration.clone();
    worker.stop().await;
    // Revoked, not run out: the key is gone at once.
    assert_eq!(etcd.lease(&registration).await, None, "the key is there under {third}");
}
