//! The connection to a coordinator, and the calls that take more than one message.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use identity::{Dialled, Files, Identity, Role};
use proto::v1::blob_service_client::BlobServiceClient;
use proto::v1::cluster_service_client::ClusterServiceClient;
use proto::v1::download_blob_response::Part as DownloadPart;
use proto::v1::job_service_client::JobServiceClient;
use proto::v1::upload_blob_request::Part as UploadPart;
use proto::v1::{BlobHeader, DownloadBlobRequest, UploadBlobRequest};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::{Interceptor, interceptor::InterceptedService};
use tonic::transport::Endpoint;
use tonic::{Request, Status};

use crate::error::Error;

/// Longest wait for a connection: a host that is gone does not say so.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a connection is asked whether it is there, and how long it may take to answer: the coordinator's own (its `KEEPALIVE`).
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// Longest wait for the beginning of an answer: an upload of 32 MiB at a third of a megabyte a second comes before it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(100);

/// Largest picture that is sent: the coordinator takes no more.
const MAX_PICTURE_BYTES: u64 = 32 << 20;

/// Where the coordinator is.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ServerArgs {
    /// The coordinator's address: http://host:port, or https://host:port with --tls-ca.
    #[arg(long, global = true, env = "ATELIER_SERVER", default_value = "http://127.0.0.1:7700")]
    pub(crate) server: String,
    /// The authorities that the coordinator's certificate is checked against (PEM).
    #[arg(long, global = true, env = "ATELIER_TLS_CA")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// The certificate to show, of a client (PEM).
    #[arg(long, global = true, env = "ATELIER_TLS_CERT", requires_all = ["tls_ca", "tls_key"])]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, global = true, env = "ATELIER_TLS_KEY", requires_all = ["tls_ca", "tls_cert"])]
    pub(crate) tls_key: Option<PathBuf>,
    /// A file that holds the API key, or the token, of this client.
    #[arg(long, global = true, env = "ATELIER_API_KEY_FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
}

impl ServerArgs {
    /// A coordinator in plain text.
    pub(crate) fn plain(server: String) -> Self {
        Self { server, ..Self::default() }
    }

    async fn channel(&self) -> Result<Dialled, Error> {
        let connect = |source| Error::Connect { address: self.server.clone(), source };
        let wrong = |reason: &str| Error::Flag { flag: "--server", reason: format!("`{}`: {reason}", self.server) };
        match (self.server.strip_prefix("https://"), &self.tls_ca) {
            (Some(address), Some(ca)) => {
                let own = self.tls_cert.clone().zip(self.tls_key.clone());
                let identity = Identity::open(Files { own, ca: ca.clone() }, Role::Client)?;
                // The connector makes it TLS; see there.
                let endpoint = patient(Endpoint::from_shared(format!("http://{address}")).map_err(connect)?);
                let connector = identity.connector_by_name(Role::Coordinator);
                Ok(endpoint.connect_with_connector(connector).await.map_err(connect)?.into())
            }
            (Some(_), None) => Err(wrong("https:// needs --tls-ca")),
            (None, Some(_)) => Err(wrong("--tls-ca goes with https://")),
            (None, None) => {
                if !self.server.starts_with("http://") {
                    return Err(wrong("is not http://host:port"));
                }
                let endpoint = patient(Endpoint::from_shared(self.server.clone()).map_err(connect)?);
                Dialled::plain(endpoint).await.map_err(connect)
            }
        }
    }

    /// What every call says of this client.
    fn bearer(&self) -> Result<Bearer, Error> {
        let Some(path) = &self.api_key_file else {
            return Ok(Bearer(None));
        };
        let file = |source| Error::File { path: path.display().to_string(), source };
        let text = std::fs::read_to_string(path).map_err(file)?;
        let value = MetadataValue::try_from(format!("Bearer {}", text.trim()));
        let mut value = value.map_err(|_| Error::Flag { flag: "--api-key-file", reason: "holds no key".into() })?;
        value.set_sensitive(true);
        Ok(Bearer(Some(value)))
    }
}

/// What every connection keeps to, so that none waits for ever for a coordinator whose host is gone.
fn patient(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(ANSWER_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE.0)
        .keep_alive_timeout(KEEP_ALIVE.1)
        .keep_alive_while_idle(true)
}

/// Adds the key to every call.
#[derive(Clone)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

impl std::fmt::Debug for Bearer {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Bearer(..)" } else { "Bearer(none)" })
    }
}

/// The way to a service.
pub(crate) type Calls = InterceptedService<Dialled, Bearer>;

/// Clients of the three services over one connection.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    pub(crate) jobs: JobServiceClient<Calls>,
    pub(crate) cluster: ClusterServiceClient<Calls>,
    blobs: BlobServiceClient<Calls>,
}

impl Client {
    pub(crate) async fn connect(args: &ServerArgs) -> Result<Self, Error> {
        let calls = InterceptedService::new(args.channel().await?, args.bearer()?);
        Ok(Self {
            jobs: JobServiceClient::new(calls.clone()),
            cluster: ClusterServiceClient::new(calls.clone()),
            blobs: BlobServiceClient::new(calls),
        })
    }

    /// Uploads the picture that a flag names and returns its blob id.
    pub(crate) async fn upload(&mut self, flag: &'static str, path: &Path) -> Result<String, Error> {
        let failed = |source| Error::File { path: format!("{flag} {}", path.display()), source };
        let wrong = |reason: String| Error::Flag { flag, reason: format!("`{}` {reason}", path.display()) };
        let media_type = media_type(path).ok_or_else(|| wrong("is not a .png, .jpg or .webp".into()))?;
        let file = tokio::fs::metadata(path).await.map_err(failed)?;
        if !file.is_file() || !(1..=MAX_PICTURE_BYTES).contains(&file.len()) {
            return Err(wrong(format!("is not a file of at most {} MiB", MAX_PICTURE_BYTES >> 20)));
        }
        let bytes = tokio::fs::read(path).await.map_err(failed)?;
        if !is_picture(&bytes) {
            return Err(wrong("is called a picture and is none".into()));
        }
        let header = BlobHeader { byte_size: bytes.len() as u64, sha256: String::new(), media_type };
        let bytes = prost_bytes(bytes);
        let chunks = (0..bytes.len()).step_by(proto::CHUNK_BYTES).map(move |at| {
            let end = (at + proto::CHUNK_BYTES).min(bytes.len());
            UploadBlobRequest { part: Some(UploadPart::Chunk(bytes.slice(at..end))) }
        });
        let header = UploadBlobRequest { part: Some(UploadPart::Header(header)) };
        let messages = tokio_stream::iter(std::iter::once(header).chain(chunks).collect::<Vec<_>>());
        Ok(self.blobs.upload_blob(messages).await?.into_inner().blob_id)
    }

    /// Downloads a blob whole.
    pub(crate) async fn download(&mut self, blob_id: &str) -> Result<Vec<u8>, Error> {
        let mut stream = self.blobs.download_blob(DownloadBlobRequest { blob_id: blob_id.to_owned() }).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(message) = stream.message().await? {
            if let Some(DownloadPart::Chunk(chunk)) = message.part {
                bytes.extend_from_slice(&chunk);
            }
        }
        Ok(bytes)
    }
}

fn prost_bytes(bytes: Vec<u8>) -> bytes::Bytes {
    bytes.into()
}

/// Whether it begins as a PNG, a JPEG or a WebP does.
fn is_picture(bytes: &[u8]) -> bool {
    let is_webp = bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP");
    bytes.starts_with(b"\x89PNG\r\n\x1a\n") || bytes.starts_with(b"\xff\xd8\xff") || is_webp
}

fn media_type(path: &Path) -> Option<String> {
    let extension = path.extension()?.to_string_lossy().to_lowercase();
    match extension.as_str() {
        "png" => Some("image/png".into()),
        "jpg" | "jpeg" => Some("image/jpeg".into()),
        "webp" => Some("image/webp".into()),
        _ => None,
    }
}
