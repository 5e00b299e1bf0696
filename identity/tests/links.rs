//! Both ends of a connection check each other, over gRPC's sockets and over those of threads that block.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use identity::authority::{Authority, Leaf};
use identity::{Files, Identity, Incoming, Port, Role, Wire};
use tonic::transport::Uri;
use tonic::transport::server::Connected;

fn open(leaf: &Leaf, authority: &Authority, role: Role) -> Identity {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let own = Some((place("crt", &leaf.certificate), place("key", &leaf.key)));
    Identity::open(Files { own, ca: place("ca", &authority.certificate) }, role).unwrap()
}

fn identity(authority: &Authority, role: Role, hosts: &[&str]) -> Identity {
    let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
    open(&authority.certificate(role, &hosts).unwrap(), authority, role)
}

/// A server that accepts for as long as the test lasts, and says who came.
async fn serve(identity: Identity, port: Port) -> (Uri, tokio::sync::mpsc::UnboundedReceiver<Option<Role>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (came, who) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut incoming = Incoming::new(listener, Some((identity, port)));
        while let Some(Ok(socket)) = incoming.next().await {
            let _ = came.send(socket.connect_info().role);
        }
    });
    (format!("http://{address}").parse().unwrap(), who)
}

#[tokio::test]
async fn who_dials_checks_the_servers_authority_its_time_its_role_and_its_name() {
    let (ours, other) = (Authority::new().unwrap(), Authority::new().unwrap());
    let client = identity(&ours, Role::Client, &[]);
    let (good, mut who) = serve(identity(&ours, Role::Coordinator, &["127.0.0.1"]), Port::COORDINATOR).await;
    client.connector_by_name(Role::Coordinator).connect(&good).await.unwrap();
    assert_eq!(who.recv().await, Some(Some(Role::Client)));

    let error = client.connector(Role::Worker).connect(&good).await.unwrap_err();
    assert!(error.to_string().contains("ApplicationVerificationFailure"), "it is no worker: {error}");
    let (elsewhere, _who) = serve(identity(&ours, Role::Coordinator, &["example.org"]), Port::COORDINATOR).await;
    client.connector(Role::Coordinator).connect(&elsewhere).await.unwrap();
    let error = client.connector_by_name(Role::Coordinator).connect(&elsewhere).await.unwrap_err();
    assert!(error.to_string().contains("NotValidForName"), "{error}");
    let (stranger, _who) = serve(identity(&other, Role::Coordinator, &["127.0.0.1"]), Port::COORDINATOR).await;
    let error = client.connector(Role::Coordinator).connect(&stranger).await.unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    let day = Duration::from_secs(24 * 3600);
    let (from, until) = (SystemTime::now() - 2 * day, SystemTime::now() - day);
    let expired = ours.certificate_for(Role::Coordinator, &[], from, until).unwrap();
    let (late, _who) = serve(open(&expired, &ours, Role::Coordinator), Port::COORDINATOR).await;
    let error = client.connector(Role::Coordinator).connect(&late).await.unwrap_err();
    assert!(error.to_string().contains("Expired"), "{error}");
}

#[tokio::test]
async fn one_who_says_nothing_holds_up_nobody() {
    let ours = Authority::new().unwrap();
    let (address, mut who) = serve(identity(&ours, Role::Worker, &[]), Port::WORKER).await;
    let socket: SocketAddr = address.authority().unwrap().as_str().parse().unwrap();
    let _silent: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(socket).unwrap()).collect();
    let worker = identity(&ours, Role::Worker, &[]);
    worker.connector(Role::Worker).connect(&address).await.unwrap();
    assert_eq!(who.recv().await, Some(Some(Role::Worker)));
}

/// Two ends of a connection of threads.
fn wires(dials: Identity, accepts: Identity) -> (io::Result<Wire>, io::Result<Wire>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let accepting = thread::spawn(move || accepts.wire_from(Port::RANKS, listener.accept().unwrap().0));
    let dialled = dials.wire_to(Role::Worker, TcpStream::connect(&address).unwrap(), &address);
    (dialled, accepting.join().unwrap())
}

#[test]
fn both_directions_of_a_wire_are_full_at_once_and_every_byte_arrives_in_order() {
    let ours = Authority::new().unwrap();
    let worker = || identity(&ours, Role::Worker, &[]);
    let (one, other) = wires(worker(), worker());
    let ends = [Arc::new(one.unwrap()), Arc::new(other.unwrap())];
    let bytes: Arc<Vec<u8>> = Arc::new((0..20_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect());
    let threads = ends.into_iter().flat_map(|end| {
        let (writer, sent, expected) = (end.clone(), bytes.clone(), bytes.clone());
        let write = thread::spawn(move || {
            for piece in sent.chunks(777_777) {
                writer.write_all(piece).unwrap();
            }
        });
        let read = thread::spawn(move || {
            let (mut at, mut buffer) = (0, vec![0; 100_000]);
            while at < expected.len() {
                let read = end.read(&mut buffer).unwrap();
                assert!(read > 0 && buffer[..read] == expected[at..at + read], "at {at}");
                at += read;
            }
        });
        [write, read]
    });
    for thread in threads.collect::<Vec<_>>() {
        thread.join().unwrap();
    }
}

#[test]
fn a_wire_ends_when_its_other_end_does_and_takes_workers_alone() {
    let (ours, other) = (Authority::new().unwrap(), Authority::new().unwrap());
    let (one, two) = wires(identity(&ours, Role::Worker, &[]), identity(&ours, Role::Worker, &[]));
    drop(two.unwrap());
    assert_eq!(one.unwrap().read(&mut [0; 8]).unwrap(), 0);
    let (_, refused) = wires(identity(&ours, Role::Coordinator, &[]), identity(&ours, Role::Worker, &[]));
    assert!(refused.unwrap_err().to_string().contains("ApplicationVerificationFailure"));
    let (refused, _) = wires(identity(&ours, Role::Worker, &[]), identity(&other, Role::Worker, &[]));
    assert!(refused.unwrap_err().to_string().contains("UnknownIssuer"));
}
