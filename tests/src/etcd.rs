//! A real etcd of the tests' own: one member, or three.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::cluster::{Process, free_port};
use crate::proxy::Proxy;

/// An etcd of one member.
#[derive(Debug)]
pub struct Etcd {
    /// The process.
    pub process: Process,
    /// Its client URL.
    pub url: String,
    peer: String,
    dir: tempfile::TempDir,
}

impl Etcd {
    /// Starts one on free ports.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let [url, peer] = [(); 2].map(|()| free_url());
        let process = member("default", dir.path(), &url, &peer, &format!("default={peer}"));
        Self { process, url, peer, dir }
    }

    /// Starts it again where it was, with what it had.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = member("default", self.dir.path(), &self.url, &self.peer, &format!("default={}", self.peer));
    }
}

/// An etcd of three members. Clients reach each through a proxy; the members reach each other directly.
#[derive(Debug)]
pub struct Members {
    /// What stands before each.
    pub proxies: Vec<Proxy>,
    /// The client URLs of all, by comma.
    pub urls: String,
    _processes: Vec<Process>,
    _dir: tempfile::TempDir,
}

impl Members {
    /// Starts three on free ports.
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let peers = [(); 3].map(|()| free_url());
        let cluster: Vec<String> = (0..).zip(&peers).map(|(number, peer)| format!("m{number}={peer}")).collect();
        let (mut proxies, mut urls, mut processes) = (vec![], vec![], vec![]);
        for (number, peer) in (0..).zip(&peers) {
            let (name, url, address) = (format!("m{number}"), free_url(), SocketAddr::from(([127, 0, 0, 1], free_port())));
            processes.push(member(&name, &dir.path().join(&name), &url, peer, &cluster.join(",")));
            let upstream = url.trim_start_matches("http://").parse().expect("an address");
            proxies.push(Proxy::start(address, upstream).await);
            urls.push(format!("http://{address}"));
        }
        Self { proxies, urls: urls.join(","), _processes: processes, _dir: dir }
    }
}

fn free_url() -> String {
    format!("http://127.0.0.1:{}", free_port())
}

fn member(name: &str, dir: &Path, url: &str, peer: &str, cluster: &str) -> Process {
    let mut command = Command::new("etcd");
    command.args(["--name", name, "--data-dir"]).arg(dir);
    command.args(["--listen-client-urls", url, "--advertise-client-urls", url, "--initial-cluster", cluster]);
    command.args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    Process(child.expect("etcd starts (scripts/setup --tests installs it)"))
}
