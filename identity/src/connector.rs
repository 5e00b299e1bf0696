//! Connections as a gRPC client makes them.

use std::{
    io,
    task::{Context, Poll},
};

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::Uri;

use crate::{Identity, Role};

const PROTOCOLS: [&[u8]; 1] = [b"h2"];

/// Dials servers of one role, for [`tonic::transport::Endpoint::connect_with_connector`]. The endpoint's address must begin
/// with `http://`: with `https://` tonic would wrap the connection once more.
#[derive(Debug, Clone)]
pub struct Connector {
    identity: Identity,
    role: Role,
    host: bool,
}

impl Identity {
    /// Dials servers of `role` at whatever address.
    pub fn connector(&self, role: Role) -> Connector {
        Connector { identity: self.clone(), role, host: false }
    }

    /// Dials servers of `role` whose certificate names the host that is dialled.
    pub fn connector_by_name(&self, role: Role) -> Connector {
        Connector { identity: self.clone(), role, host: true }
    }
}

impl Connector {
    /// Connects to the host and port of `uri`.
    ///
    /// # Errors
    /// When nobody is there, or it is not who it should be.
    pub async fn connect(&self, uri: &Uri) -> io::Result<TlsStream<TcpStream>> {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let port = uri.port_u16().ok_or_else(|| invalid("the address has no port"))?;
        let name = ServerName::try_from(host.to_owned()).map_err(|_| invalid("the address has no host"))?;
        let config = self.identity.client(self.role, self.host, &PROTOCOLS).map_err(io::Error::other)?;
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        TlsConnector::from(config).connect(name, stream).await
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect(&uri).await.map(TokioIo::new) })
    }
}
