//! Flags and environment in, a `Config` that cannot be wrong out. Below `main.rs` nobody reads the environment.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::Parser;
use identity::{EtcdTls, Identity, Role, TlsArgs};
use object_store::aws::AmazonS3Builder;

use crate::{
    auth::JwtConfig,
    checkpoints::Place,
    error::{Error, Result},
    models_file::{self, ModelConfig},
    state::Millis,
    world::Dial,
};

/// Jobs that may wait. At one a second this is a quarter of an hour of waiting, more than anyone waits for a picture.
pub const DEFAULT_QUEUE_LIMIT: usize = 1024;
/// Finished jobs that can be asked for.
pub const DEFAULT_FINISHED_JOBS: usize = 100_000;
/// For how long: a day.
pub const DEFAULT_FINISHED_JOB_SECONDS: u64 = 24 * 60 * 60;
/// Bytes of one blob: a 4096 x 2160 PNG of noise, the worst case, has 26 MiB.
pub const DEFAULT_MAX_BLOB_BYTES: u64 = 32 << 20;
/// Bytes of all blobs together.
pub const DEFAULT_MAX_TOTAL_BLOB_BYTES: u64 = 1 << 30;
/// Pixels of one job, over all its pictures: ten of 2048 x 2048. A card may allow less, never more.
pub const DEFAULT_MAX_PIXELS: u64 = 10 * 2048 * 2048;
/// Where the coordinator's keys live in etcd.
pub const DEFAULT_ETCD_PREFIX: &str = "/atelier";

/// The coordinator's flags. Every one can be given as an environment variable instead.
#[derive(Debug, Clone, Parser)]
#[command(name = "atelier-coordinator", version, about = "Takes jobs for text-to-image models and runs them on workers")]
pub struct Args {
    /// Where to listen for clients and workers.
    #[arg(long, env = "ATELIER_LISTEN", default_value = "127.0.0.1:7700")]
    pub listen: SocketAddr,

    /// host:port at which workers reach this coordinator, if that is not the listen address.
    #[arg(long, env = "ATELIER_ADVERTISE")]
    pub advertise: Option<String>,

    /// The models to serve.
    #[arg(long, env = "ATELIER_MODELS", default_value = "models.toml")]
    pub models: PathBuf,

    /// Where pictures are kept. Without it: a temporary folder that is removed at the end.
    #[arg(long, env = "ATELIER_DATA_DIR")]
    pub data_dir: Option<PathBuf>,

    /// Where pictures and checkpoints are kept: s3://bucket/prefix, with the usual AWS_* variables (AWS_ENDPOINT_URL for
    /// other servers than Amazon's), or file:///folder. Without it: in the data folder.
    #[arg(long, env = "ATELIER_OBJECT_STORE")]
    pub object_store: Option<String>,

    /// etcd endpoints, by comma. Workers then register there, not at this coordinator.
    #[arg(long, env = "ATELIER_ETCD", value_delimiter = ',')]
    pub etcd: Vec<String>,

    /// What every key in etcd begins with.
    #[arg(long, env = "ATELIER_ETCD_PREFIX", default_value = DEFAULT_ETCD_PREFIX)]
    pub etcd_prefix: String,

    /// Where metrics are read by HTTP, at /metrics. Without it: nowhere.
    #[arg(long, env = "ATELIER_METRICS_LISTEN")]
    pub metrics_listen: Option<SocketAddr>,
    /// How etcd is talked to.
    #[command(flatten)]
    pub etcd_tls: EtcdTls,

    /// Who this coordinator is.
    #[command(flatten)]
    pub tls: TlsArgs,

    /// Who clients are.
    #[command(flatten)]
    pub auth: AuthArgs,

    /// Most jobs that may wait.
    #[arg(long, env = "ATELIER_QUEUE_LIMIT", default_value_t = DEFAULT_QUEUE_LIMIT)]
    pub queue_limit: usize,

    /// Finished jobs that can still be asked for, under their request ids too. Their pictures go earlier if they take more than
    /// seven sixteenths of --max-total-blob-bytes: the oldest first.
    #[arg(long, env = "ATELIER_KEEP_JOBS", default_value_t = DEFAULT_FINISHED_JOBS)]
    pub keep_jobs: usize,

    /// Seconds for which a finished job can be asked for, under its request id too. Its pictures go earlier if all take more
    /// than seven sixteenths of --max-total-blob-bytes: the oldest first.
    #[arg(long, env = "ATELIER_KEEP_JOBS_FOR", default_value_t = DEFAULT_FINISHED_JOB_SECONDS)]
    pub keep_jobs_for: u64,

    /// Most bytes of one blob.
    #[arg(long, env = "ATELIER_MAX_BLOB_BYTES", default_value_t = DEFAULT_MAX_BLOB_BYTES)]
    pub max_blob_bytes: u64,

    /// Most bytes of all pictures together. What clients bring may fill half of it. Pictures of finished jobs may fill seven
    /// sixteenths of it: beyond that the oldest are given up before their time.
    #[arg(long, env = "ATELIER_MAX_TOTAL_BLOB_BYTES", default_value_t = DEFAULT_MAX_TOTAL_BLOB_BYTES)]
    pub max_total_blob_bytes: u64,

    /// How to write the log: `text`, or `json` for one object a line.
    #[arg(long, env = "ATELIER_LOG_FORMAT", default_value = "text")]
    pub log_format: telemetry::log::Format,

    /// Most pixels of one job, over all its pictures.
    #[arg(long, env = "ATELIER_MAX_PIXELS", default_value_t = DEFAULT_MAX_PIXELS)]
    pub max_pixels: u64,
}

/// The flags that say who clients are. Both ways need TLS.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct AuthArgs {
    /// API keys of tenants and what each may use (TOML; `atelier keys new` makes them); a tenant with `operator = true` sees
    /// everybody's jobs. Read again when it changes.
    #[arg(long, env = "ATELIER_API_KEYS")]
    pub api_keys: Option<PathBuf>,
    /// Keys of those whose tokens (JWT) are taken (JWKS). Read again when it changes.
    #[arg(long, env = "ATELIER_JWKS", requires_all = ["jwt_issuer", "jwt_audience"])]
    pub jwks: Option<PathBuf>,
    /// What the tokens' `iss` must be.
    #[arg(long, env = "ATELIER_JWT_ISSUER", requires = "jwks")]
    pub jwt_issuer: Option<String>,
    /// What the tokens' `aud` must be or hold.
    #[arg(long, env = "ATELIER_JWT_AUDIENCE", requires = "jwks")]
    pub jwt_audience: Option<String>,
    /// The claim that names the tenant.
    #[arg(long, env = "ATELIER_JWT_TENANT_CLAIM", default_value = "tenant")]
    pub jwt_tenant_claim: String,
}

impl AuthArgs {
    /// What they say, for a coordinator with TLS or without.
    ///
    /// # Errors
    /// When keys would travel in plain text.
    pub fn config(self, has_tls: bool) -> Result<AuthConfig> {
        let given = [("--api-keys", &self.api_keys), ("--jwks", &self.jwks)];
        if let Some((flag, _)) = given.iter().find(|(_, path)| path.is_some() && !has_tls) {
            return Err(wrong(flag, "needs TLS: in plain text anybody could read the keys"));
        }
        let jwt = self.jwks.zip(self.jwt_issuer.zip(self.jwt_audience));
        let jwt = jwt.map(|(jwks, (issuer, audience))| JwtConfig { jwks, issuer, audience, tenant_claim: self.jwt_tenant_claim });
        Ok(AuthConfig { api_keys: self.api_keys, jwt })
    }
}

/// Who clients are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuthConfig {
    /// The file of API keys.
    pub api_keys: Option<PathBuf>,
    /// Whose tokens are taken.
    pub jwt: Option<JwtConfig>,
}

impl AuthConfig {
    /// What its files hold.
    pub(crate) fn contents(&self) -> std::io::Result<Vec<Vec<u8>>> {
        self.api_keys.iter().chain(self.jwt.iter().map(|jwt| &jwt.jwks)).map(std::fs::read).collect()
    }
}

/// What a coordinator needs to run. The listen address is not here: the caller of [`crate::run`] owns the socket.
#[derive(Debug, Clone)]
pub struct Config {
    /// The models to serve.
    pub models: Vec<ModelConfig>,
    /// Who this coordinator is; without it, connections are plain.
    pub identity: Option<Identity>,
    /// host:port at which workers reach this coordinator; the listener's own address if absent.
    pub advertise: Option<String>,
    /// Who clients are; without it, all are one tenant.
    pub auth: AuthConfig,
    /// Where pictures are kept; a temporary folder if absent.
    pub data_dir: Option<PathBuf>,
    /// Where pictures and checkpoints are kept instead, for several coordinators.
    pub object_store: Option<Place>,
    /// Where workers are found; without it they register at the coordinator itself.
    pub etcd: Option<EtcdConfig>,
    /// What clients may ask for.
    pub limits: Limits,
}

/// Where workers are found.
#[derive(Debug, Clone)]
pub struct EtcdConfig {
    /// URLs.
    pub endpoints: Vec<String>,
    /// What every key begins with; no slash at the end.
    pub prefix: String,
    /// How it is talked to.
    pub tls: EtcdTls,
    /// How it is reached.
    pub dial: Dial,
}

impl EtcdConfig {
    /// An etcd that is reached by the system's TCP.
    pub fn new(endpoints: Vec<String>, prefix: impl Into<String>) -> Self {
        Self { endpoints, prefix: prefix.into(), tls: EtcdTls::default(), dial: Dial::tcp() }
    }
}

/// Ceilings that no caller can raise.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Jobs that may wait.
    pub queued_jobs: usize,
    /// Finished jobs that can be asked for.
    pub finished_jobs: usize,
    /// For how long, in milliseconds.
    pub finished_job_age: Millis,
    /// Bytes of one blob.
    pub blob_bytes: u64,
    /// Bytes of all blobs.
    pub total_blob_bytes: u64,
    /// Pixels of one job, over all its pictures.
    pub pixels: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            queued_jobs: DEFAULT_QUEUE_LIMIT,
            finished_jobs: DEFAULT_FINISHED_JOBS,
            finished_job_age: DEFAULT_FINISHED_JOB_SECONDS * 1000,
            blob_bytes: DEFAULT_MAX_BLOB_BYTES,
            total_blob_bytes: DEFAULT_MAX_TOTAL_BLOB_BYTES,
            pixels: DEFAULT_MAX_PIXELS,
        }
    }
}

impl Config {
    /// A coordinator for the models of a file, all else by default: what `atelier up` and tests start from.
    pub fn for_models(models_file: &Path) -> Result<Self> {
        Ok(Self {
            models: models_file::read(models_file)?,
            identity: None,
            auth: AuthConfig::default(),
            advertise: None,
            data_dir: None,
            object_store: None,
            etcd: None,
            limits: Limits::default(),
        })
    }
}

impl TryFrom<Args> for Config {
    type Error = Error;

    fn try_from(args: Args) -> Result<Self> {
        let limits = Limits {
            queued_jobs: args.queue_limit,
            finished_jobs: args.keep_jobs,
            finished_job_age: args.keep_jobs_for.saturating_mul(1000),
            blob_bytes: args.max_blob_bytes,
            total_blob_bytes: args.max_total_blob_bytes,
            pixels: args.max_pixels,
        };
        at_least_one("--queue-limit", limits.queued_jobs as u64)?;
        at_least_one("--keep-jobs", limits.finished_jobs as u64)?;
        at_least_one("--keep-jobs-for", limits.finished_job_age)?;
        at_least_one("--max-pixels", limits.pixels)?;
        at_least_one("--max-blob-bytes", limits.blob_bytes)?;
        if limits.total_blob_bytes < limits.blob_bytes {
            return Err(wrong("--max-total-blob-bytes", "is less than --max-blob-bytes"));
        }
        if args.advertise.is_none() && args.listen.ip().is_unspecified() {
            return Err(wrong("--advertise", "is needed when --listen names no single address"));
        }
        if !args.etcd_prefix.starts_with('/') || args.etcd_prefix.ends_with('/') {
            return Err(wrong("--etcd-prefix", "must start with a slash and not end with one"));
        }
        args.tls.check_listen("--listen", args.listen.ip())?;
        if let Some(metrics) = args.metrics_listen {
            args.tls.check_plain("--metrics-listen", metrics.ip())?;
        }
        let has_etcd = !args.etcd.is_empty();
        let etcd = has_etcd.then(|| EtcdConfig { tls: args.etcd_tls, ..EtcdConfig::new(args.etcd, args.etcd_prefix) });
        let object_store = args.object_store.as_deref().map(|url| Place::parse(url, AmazonS3Builder::from_env)).transpose();
        Ok(Self {
            models: models_file::read(&args.models)?,
            identity: args.tls.identity(Role::Coordinator)?,
            auth: args.auth.config(args.tls.tls_cert.is_some())?,
            advertise: args.advertise,
            data_dir: args.data_dir,
            object_store: object_store.map_err(|problem| wrong("--object-store", &problem))?,
            etcd,
            limits,
        })
    }
}

fn at_least_one(setting: &'static str, value: u64) -> Result<()> {
    if value == 0 { Err(wrong(setting, "must be at least 1")) } else { Ok(()) }
}

fn wrong(setting: &'static str, problem: &str) -> Error {
    Error::Setting { setting, problem: problem.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(flags: &[&str]) -> Result<Config> {
        let folder = tempfile::tempdir().unwrap();
        let models = folder.path().join("models.toml");
        std::fs::write(&models, "[[model]]\nname = \"emoji\"\npath = \"emoji\"\n").unwrap();
        let name = ["coordinator", "--models", models.to_str().unwrap()];
        Args::parse_from(name.iter().chain(flags)).try_into()
    }

    #[test]
    fn the_defaults_are_valid() {
        let config = config(&[]).unwrap();
        assert_eq!(config.models[0].name, "emoji");
        assert_eq!(config.limits.queued_jobs, 1024);
        assert!(config.etcd.is_none());
    }

    #[test]
    fn what_is_kept_has_limits_that_are_not_nothing() {
        let limits = config(&["--keep-jobs", "5", "--keep-jobs-for", "60"]).unwrap().limits;
        assert_eq!((limits.finished_jobs, limits.finished_job_age), (5, 60_000));
        for flag in ["--keep-jobs", "--keep-jobs-for"] {
            let error = config(&[flag, "0"]).err().unwrap();
            assert!(matches!(error, Error::Setting { setting, .. } if setting == flag), "{error}");
        }
    }

    #[test]
    fn etcd_endpoints_are_split_by_comma() {
        let etcd = config(&["--etcd", "http://a:1,http://b:2"]).unwrap().etcd.unwrap();
        assert_eq!(etcd.endpoints, ["http://a:1", "http://b:2"]);
        assert_eq!(etcd.prefix, "/atelier");
    }

    #[test]
    fn an_object_store_is_a_bucket_or_a_folder() {
        let place = config(&["--object-store", "s3://pictures/atelier"]).unwrap().object_store.unwrap();
        assert_eq!(format!("{place:?}"), "s3://pictures/atelier");
        let problem = config(&["--object-store", "pictures"]).unwrap_err().to_string();
        assert!(problem.starts_with("--object-store: must be"), "{problem}");
    }

    #[test]
    fn a_listener_on_every_address_must_say_where_it_is_reached() {
        let problem = config(&["--listen", "0.0.0.0:7700"]).unwrap_err().to_string();
        assert!(problem.starts_with("--advertise: is needed"), "{problem}");
        assert!(config(&["--listen", "0.0.0.0:7700", "--advertise", "coordinator:7700", "--insecure"]).is_ok());
    }

    #[test]
    fn a_port_that_others_can_reach_needs_tls_or_leave_to_be_open() {
        let problem = config(&["--listen", "0.0.0.0:7700", "--advertise", "a:7700"]).unwrap_err().to_string();
        assert!(problem.starts_with("--listen: 0.0.0.0") && problem.contains("--insecure"), "{problem}");
        let problem = config(&["--api-keys", "keys.toml"]).unwrap_err().to_string();
        assert!(problem.starts_with("--api-keys: needs TLS"), "{problem}");
        let problem = config(&["--tls-cert", "a.crt", "--tls-ca", "ca.crt"]).unwrap_err().to_string();
        assert!(problem.starts_with("--tls-key: is missing"), "{problem}");
    }

    #[test]
    fn metrics_that_others_can_read_need_leave_of_their_own_with_tls_too() {
        let folder = tempfile::tempdir().unwrap();
        identity::authority::write(folder.path(), &[], identity::authority::Existing::Refuse).unwrap();
        let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (cert, key, ca) = (file("coordinator.crt"), file("coordinator.key"), file("ca.crt"));
        let with_tls = |more: &[&str]| {
            let tls = ["--tls-cert", &cert, "--tls-key", &key, "--tls-ca", &ca, "--metrics-listen", "0.0.0.0:7709"];
            config(&[&tls, more].concat())
        };
        let problem = with_tls(&[]).unwrap_err().to_string();
        assert!(problem.starts_with("--metrics-listen: 0.0.0.0") && problem.contains("--metrics-insecure"), "{problem}");
        assert!(with_tls(&["--metrics-insecure"]).is_ok());
        let problem = config(&["--metrics-insecure", "--listen", "0.0.0.0:1", "--advertise", "a:1"]).unwrap_err().to_string();
        assert!(problem.starts_with("--listen: 0.0.0.0"), "{problem}");
    }

    #[test]
    fn every_flag_has_an_environment_variable() {
        use clap::CommandFactory;
        for argument in Args::command().get_arguments().filter(|a| !["help", "version"].contains(&a.get_id().as_str())) {
            let variable = argument.get_env().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            assert!(variable.starts_with("ATELIER_"), "--{} has {variable:?}", argument.get_id());
        }
    }
}
