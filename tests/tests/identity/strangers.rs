//! Whoever knocks: with the wrong words, the wrong certificate, or the right one.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use identity::authority::{Authority, Leaf};
use identity::{Files, Identity, Role};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint, Uri};

/// Longer than any answer takes; who says nothing until then neither refuses nor answers.
const PATIENCE: Duration = Duration::from_secs(30);
/// An HTTP/2 client's first words: the preface and empty settings.
const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// The type of the frame that answers them.
const SETTINGS: u8 = 4;

/// What a port is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Coordinator,
    Worker,
    Ranks,
}

impl Kind {
    fn server(self) -> Role {
        if self == Self::Coordinator { Role::Coordinator } else { Role::Worker }
    }
}

/// A role that is let in.
pub(crate) fn role_for(kind: Kind) -> Role {
    if kind == Kind::Coordinator { Role::Client } else { Role::Worker }
}

/// Somebody with a certificate of its own, or without.
pub(crate) struct Stranger {
    identity: Identity,
    _dir: tempfile::TempDir,
}

impl Stranger {
    fn with(leaf: Option<Leaf>, ca: &str, role: Role) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str, text: &str| -> PathBuf {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let own = leaf.map(|leaf| (place("own.crt", &leaf.certificate), place("own.key", &leaf.key)));
        let files = Files { own, ca: place("ca.crt", ca) };
        Self { identity: Identity::open(files, role).unwrap(), _dir: dir }
    }

    /// With a certificate by `authority`, believing the authority of the cluster in `tls`.
    pub(crate) fn by(authority: &Authority, tls: &Path, role: Role) -> Self {
        Self::with(Some(authority.certificate(role, &[]).unwrap()), &ca(tls), role)
    }

    /// With a certificate by `authority`, believing `ca`.
    pub(crate) fn trusting(authority: &Authority, ca: &str, role: Role) -> Self {
        Self::with(Some(authority.certificate(role, &[]).unwrap()), ca, role)
    }

    /// With a certificate that was good until an hour ago.
    pub(crate) fn expired(authority: &Authority, tls: &Path, role: Role) -> Self {
        let hour = Duration::from_secs(3600);
        let (from, until) = (SystemTime::now() - 24 * hour, SystemTime::now() - hour);
        Self::with(Some(authority.certificate_for(role, &[], from, until).unwrap()), &ca(tls), role)
    }

    /// Without a certificate.
    pub(crate) fn nobody(tls: &Path) -> Self {
        Self::with(None, &ca(tls), Role::Client)
    }

    /// A gRPC channel to a server of `role`.
    pub(crate) async fn channel(&self, role: Role, port: u16) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap();
        endpoint.connect_with_connector(self.identity.connector(role)).await.unwrap()
    }
}

fn ca(tls: &Path) -> String {
    std::fs::read_to_string(tls.join("ca.crt")).unwrap()
}

/// Whether the port takes this certificate. With TLS 1.3 a server refuses after the client believes it is through: so what
/// counts is whether the next word is an alert.
pub(crate) async fn is_let_in(stranger: &Stranger, kind: Kind, port: u16) -> bool {
    let uri: Uri = format!("http://127.0.0.1:{port}").parse().unwrap();
    let connected = timeout(PATIENCE, stranger.identity.connector(kind.server()).connect(&uri)).await.unwrap();
    let Ok(mut stream) = connected else { return false };
    if stream.write_all(HELLO).await.is_err() {
        return false;
    }
    drop(stream.flush().await);
    match (kind, first_frame(&mut stream).await) {
        // Such words are none of a rank: it hangs up, without an alert.
        (Kind::Ranks, Err(error)) => error.kind() == std::io::ErrorKind::UnexpectedEof,
        (_, Ok(frame)) => frame == SETTINGS,
        (_, Err(_)) => false,
    }
}

/// The type of the first HTTP/2 frame that comes.
async fn first_frame(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<u8> {
    let mut head = [0; 9];
    timeout(PATIENCE, stream.read_exact(&mut head)).await.unwrap()?;
    Ok(head[3])
}

/// Whether the port talks HTTP/2 to somebody without TLS, or waits for more of it.
pub(crate) async fn plain_text_is_answered(port: u16) -> bool {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(HELLO).await.unwrap();
    let mut said = Vec::new();
    // An alert, and the end; or a reset, since it did not read all.
    drop(timeout(PATIENCE, stream.read_to_end(&mut said)).await.expect("the connection is ended"));
    !(said.is_empty() || said[0] == 0x15)
}

/// The certificate that a port shows.
pub(crate) async fn served_certificate(tls: &Path, kind: Kind, port: u16) -> Option<Vec<u8>> {
    let anyone = Stranger::nobody(tls);
    let uri: Uri = format!("http://127.0.0.1:{port}").parse().unwrap();
    let stream = anyone.identity.connector(kind.server()).connect(&uri).await.ok()?;
    Some(stream.get_ref().1.peer_certificates()?.first()?.to_vec())
}
