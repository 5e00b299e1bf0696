//! The network as this program sees it: the system's, or one that a test makes up.

use std::{fmt, io, sync::Arc};

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use identity::{Identity, Role};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::{Channel, Endpoint, Uri};

/// A connection.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

type Connect = dyn Fn(Uri) -> BoxFuture<'static, io::Result<Box<dyn Io>>> + Send + Sync;

/// How others are reached. Cheap to clone.
#[derive(Clone, Default)]
pub struct Dial(Option<Arc<Connect>>);

impl Dial {
    /// By the system's TCP.
    pub fn tcp() -> Self {
        Self(None)
    }

    /// As `identity`, to workers.
    pub fn to_workers(identity: &Identity) -> Self {
        let connector = identity.connector(Role::Worker);
        Self::through(move |uri| {
            let connector = connector.clone();
            Box::pin(async move { connector.connect(&uri).await.map(|stream| Box::new(stream) as Box<dyn Io>) })
        })
    }

    /// By `connect`, which is given `http://host:port`.
    pub fn through(connect: impl Fn(Uri) -> BoxFuture<'static, io::Result<Box<dyn Io>>> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(connect)))
    }

    /// No network is made up.
    pub(crate) fn is_tcp(&self) -> bool {
        self.0.is_none()
    }

    /// Connects now.
    ///
    /// # Errors
    /// When nobody is there.
    pub async fn connect(&self, endpoint: Endpoint) -> Result<Channel, tonic::transport::Error> {
        match &self.0 {
            None => endpoint.connect().await,
            Some(connect) => {
                let connect = connect.clone();
                let connector = tower::service_fn(move |uri: Uri| {
                    let connecting = connect(uri);
                    async move { connecting.await.map(TokioIo::new) }
                });
                endpoint.connect_with_connector(connector).await
            }
        }
    }
}

impl fmt::Debug for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Dial(made up)" } else { "Dial(tcp)" })
    }
}
