//! Flags and environment in, a [`Config`] that cannot be wrong out.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clap::ArgGroup;
use identity::{EtcdTls, Identity, Role, TlsArgs};
use models::lora::store::DEFAULT_CACHE_BYTES;
use parallel::device::Place;

use crate::{Error, Result};

/// Longest id of a worker; it is part of an etcd key and of every log line.
const MAX_ID_CHARS: usize = 64;
/// Most labels; they travel with every registration.
const MAX_LABELS: usize = 32;

/// The label that says which workers share a machine.
const HOST_LABEL: &str = "host";
/// What was a flag and a label of workers before it was a setting of models.
const PRODUCTS: &str = "products";
/// Where it is said now.
const PRODUCTS_INSTEAD: &str =
    "what a model is multiplied in is a setting of the model: `products` under its [[model]] in models.toml";

/// How long ranks and tasks go on without a coordinator. A restarted one reads its journal and is back within seconds, the next
/// leader has the lease within six, and an etcd outage of a minute is to stop nothing, however long the next election takes;
/// memory that nobody asks for again is not held longer than that.
pub const ORPHAN_GRACE: Duration = Duration::from_secs(180);

/// The worker's flags. Every one can be given as an environment variable instead.
#[derive(Clone, Debug, clap::Args)]
#[command(group = ArgGroup::new("membership").required(true).args(["coordinator", "etcd"]))]
pub struct Args {
    /// Where to listen for the coordinator and other workers (gRPC).
    #[arg(long, env = "ATELIER_WORKER_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Where to listen for the other ranks of this worker's groups (TCP).
    #[arg(long, env = "ATELIER_WORKER_DATA_LISTEN", default_value = "127.0.0.1:0")]
    pub data_listen: SocketAddr,
    /// Where metrics are read by HTTP, at /metrics. Without it: nowhere.
    #[arg(long, env = "ATELIER_WORKER_METRICS_LISTEN")]
    pub metrics_listen: Option<SocketAddr>,
    /// Name or address by which others reach this host; needed when listening on 0.0.0.0.
    #[arg(long, env = "ATELIER_WORKER_ADVERTISE_HOST")]
    pub advertise_host: Option<String>,
    /// Register at this coordinator: http://host:port, or https://host:port with TLS.
    #[arg(long, env = "ATELIER_WORKER_COORDINATOR")]
    pub coordinator: Option<String>,
    /// Register in etcd: endpoints by comma, http://host:port, or https:// with --etcd-ca.
    #[arg(long, env = "ATELIER_WORKER_ETCD", value_delimiter = ',')]
    pub etcd: Vec<String>,
    /// What every key in etcd begins with.
    #[arg(long, env = "ATELIER_WORKER_ETCD_PREFIX", default_value = "/atelier")]
    pub etcd_prefix: String,
    /// A label models.toml may select by: key=value. May be repeated. `host` is this machine's name if it is not given: the
    /// tensor-parallel ranks of a block range are kept on one host if they can be.
    #[arg(long = "label", env = "ATELIER_WORKER_LABELS", value_delimiter = ',')]
    pub labels: Vec<String>,
    /// This worker's id; drawn at random when absent.
    #[arg(long, env = "ATELIER_WORKER_ID")]
    pub worker_id: Option<String>,
    /// The device to compute on: `cpu`, or `cuda:N` in a build for GPUs. A worker has one.
    #[arg(long, env = "ATELIER_WORKER_DEVICE", default_value = "cpu")]
    pub device: String,
    /// No flag any more: whoever gives it is told where it is said now.
    #[arg(long, env = "ATELIER_WORKER_PRODUCTS", hide = true)]
    pub products: Option<String>,
    /// Threads to compute with; 0: one per core.
    #[arg(long, env = "ATELIER_WORKER_THREADS", default_value_t = 0)]
    pub threads: usize,
    /// Bytes of prompt embeddings kept for prompts that come again.
    #[arg(long, env = "ATELIER_WORKER_PROMPT_CACHE_BYTES", default_value_t = 256 << 20)]
    pub prompt_cache_bytes: usize,
    /// Bytes of adapters (LoRA) that a rank keeps for jobs that come again, counted as f32 and whole; the most that one forward
    /// may need.
    #[arg(long, env = "ATELIER_WORKER_ADAPTER_CACHE_BYTES", default_value_t = DEFAULT_CACHE_BYTES)]
    pub adapter_cache_bytes: u64,
    /// Seconds a rank may take to read its weights.
    #[arg(long, env = "ATELIER_WORKER_LOAD_TIMEOUT", default_value_t = 1800)]
    pub load_timeout: u64,
    /// Seconds to wait, at the signal to stop, until the coordinator has taken over what this worker does.
    #[arg(long, env = "ATELIER_WORKER_DRAIN_TIMEOUT", default_value_t = 30)]
    pub drain_timeout: u64,
    /// Who this worker is.
    #[command(flatten)]
    pub tls: TlsArgs,
    /// How etcd is talked to.
    #[command(flatten)]
    pub etcd_tls: EtcdTls,
    /// How to write the log: `text`, or `json` for one object a line.
    #[arg(long, env = "ATELIER_WORKER_LOG_FORMAT", default_value = "text")]
    pub log_format: telemetry::log::Format,
}

/// What a worker needs to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen for gRPC.
    pub listen: SocketAddr,
    /// Where to listen for ranks.
    pub data_listen: SocketAddr,
    /// Where to listen for readers of metrics.
    pub metrics_listen: Option<SocketAddr>,
    /// By which others reach this host, if not by the listen address.
    pub advertise_host: Option<String>,
    /// Who this worker is; without it, connections are plain.
    pub identity: Option<Identity>,
    /// Where to register.
    pub membership: Membership,
    /// What models.toml may select by.
    pub labels: BTreeMap<String, String>,
    /// Unique for the life of the process.
    pub worker_id: String,
    /// What to compute on.
    pub place: Place,
    /// Threads to compute with; 0: one per core.
    pub threads: usize,
    /// Bytes of prompt embeddings kept.
    pub prompt_cache_bytes: usize,
    /// Bytes of adapters that a rank keeps.
    pub adapter_cache_bytes: u64,
    /// How long a rank may take to read its weights.
    pub load_timeout: Duration,
    /// How long to wait, at the signal to stop, until the coordinator has taken over what this worker does.
    pub drain_timeout: Duration,
    /// How long ranks and tasks go on without a coordinator: [`ORPHAN_GRACE`].
    pub orphan_grace: Duration,
}

/// Where a worker registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Membership {
    /// At the coordinator itself.
    Coordinator {
        /// http://host:port
        url: String,
    },
    /// In etcd.
    Etcd(EtcdPlace),
}

/// Where in which etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdPlace {
    /// http://host:port or https://host:port of each member.
    pub endpoints: Vec<String>,
    /// What every key begins with.
    pub prefix: String,
    /// How it is talked to.
    pub tls: EtcdTls,
}

impl TryFrom<Args> for Config {
    type Error = Error;

    fn try_from(args: Args) -> Result<Self> {
        let place = args.device.parse().map_err(|error: parallel::Error| bad("device", error.to_string()))?;
        if let Some(given) = args.products {
            return Err(bad(PRODUCTS, format!("`{given}`: {PRODUCTS_INSTEAD}")));
        }
        if args.load_timeout == 0 {
            return Err(bad("load-timeout", "must be at least one second"));
        }
        let identity = args.tls.identity(Role::Worker)?;
        for (flag, name, address) in
            [("listen", "--listen", args.listen.ip()), ("data-listen", "--data-listen", args.data_listen.ip())]
        {
            args.tls.check_listen(name, address)?;
            check_reachable(flag, address, args.advertise_host.as_deref())?;
        }
        if let Some(metrics) = args.metrics_listen {
            args.tls.check_plain("--metrics-listen", metrics.ip())?;
            check_reachable("metrics-listen", metrics.ip(), args.advertise_host.as_deref())?;
        }
        let worker_id = args.worker_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        if !is_plain(&worker_id) || worker_id.len() > MAX_ID_CHARS {
            return Err(bad("worker-id", format!("must be 1 to {MAX_ID_CHARS} letters, digits, `-`, `_` or `.`")));
        }
        Ok(Self {
            listen: args.listen,
            data_listen: args.data_listen,
            metrics_listen: args.metrics_listen,
            advertise_host: args.advertise_host,
            membership: membership(args.coordinator, identity.is_some(), args.etcd, args.etcd_prefix, args.etcd_tls)?,
            identity,
            labels: with_host(labels(&args.labels)?),
            worker_id,
            place,
            threads: args.threads,
            prompt_cache_bytes: args.prompt_cache_bytes,
            adapter_cache_bytes: args.adapter_cache_bytes,
            load_timeout: Duration::from_secs(args.load_timeout),
            drain_timeout: Duration::from_secs(args.drain_timeout),
            orphan_grace: ORPHAN_GRACE,
        })
    }
}

fn membership(coordinator: Option<String>, secure: bool, etcd: Vec<String>, prefix: String, tls: EtcdTls) -> Result<Membership> {
    match (coordinator, etcd.is_empty()) {
        (Some(url), true) => {
            check_url("coordinator", &url, secure)?;
            Ok(Membership::Coordinator { url })
        }
        (None, false) => {
            etcd.iter().try_for_each(|url| check_url("etcd", url, tls.etcd_ca.is_some()))?;
            if !prefix.starts_with('/') || prefix.ends_with('/') {
                return Err(bad("etcd-prefix", "must begin with `/` and not end with it"));
            }
            Ok(Membership::Etcd(EtcdPlace { endpoints: etcd, prefix, tls }))
        }
        _ => Err(bad("coordinator", "exactly one of --coordinator and --etcd must be given")),
    }
}

fn check_url(flag: &'static str, url: &str, secure: bool) -> Result<()> {
    let (scheme, other) = if secure { ("https://", "http://") } else { ("http://", "https://") };
    if url.starts_with(other) {
        let flags = if flag == "etcd" { "--etcd-ca" } else { "--tls-cert, --tls-key and --tls-ca" };
        return Err(bad(flag, format!("`{url}`: https:// goes with {flags}, http:// with none of them")));
    }
    let rest = url.strip_prefix(scheme).unwrap_or_default();
    let host_and_port = rest.rsplit_once(':').filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    host_and_port.map(drop).ok_or_else(|| bad(flag, format!("`{url}` is not {scheme}host:port")))
}

fn check_reachable(flag: &'static str, address: IpAddr, advertise_host: Option<&str>) -> Result<()> {
    if address.is_unspecified() && advertise_host.is_none() {
        return Err(bad(flag, format!("{address} is no address others can dial; give --advertise-host")));
    }
    Ok(())
}

fn labels(labels: &[String]) -> Result<BTreeMap<String, String>> {
    if labels.len() > MAX_LABELS {
        return Err(bad("label", format!("at most {MAX_LABELS} can be given")));
    }
    let pairs = labels.iter().map(|label| {
        let (key, value) = label
            .split_once('=')
            .filter(|(key, _)| is_plain(key))
            .ok_or_else(|| bad("label", format!("`{label}` is not key=value")))?;
        if key == PRODUCTS {
            return Err(bad("label", format!("`{label}`: {PRODUCTS_INSTEAD}")));
        }
        Ok((key.to_owned(), value.to_owned()))
    });
    pairs.collect()
}

/// These, and where they leave it open, `host` after this machine.
fn with_host(mut labels: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if !name.trim().is_empty() {
        labels.entry(HOST_LABEL.to_owned()).or_insert_with(|| name.trim().to_owned());
    }
    labels
}

fn is_plain(word: &str) -> bool {
    !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

fn bad(flag: &'static str, reason: impl Into<String>) -> Error {
    Error::Config { flag, reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn config(flags: &str) -> Result<Config, String> {
        let flags = ["worker"].into_iter().chain(flags.split_whitespace());
        let cli = Cli::try_parse_from(flags).map_err(|e| e.to_string())?;
        Config::try_from(cli.args).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_become_a_config() {
        let config = config("--coordinator http://localhost:7700 --label role=encoder --label host=b --device cuda:1").unwrap();
        assert_eq!(config.membership, Membership::Coordinator { url: "http://localhost:7700".into() });
        assert_eq!(
            config.labels,
            BTreeMap::from([("role", "encoder"), ("host", "b")].map(|(name, value)| (name.into(), value.into())))
        );
        assert_eq!(config.place, Place::Cuda { ordinal: 1 });
        assert!(!config.worker_id.is_empty());
    }

    #[test]
    fn the_host_is_a_label() {
        let labels = config("--coordinator http://a:1").unwrap().labels;
        assert!(!labels[HOST_LABEL].is_empty() && labels.len() == 1, "{labels:?}");
    }

    #[test]
    fn who_says_what_to_multiply_in_here_is_told_where_it_is_said_now() {
        for (flags, begins) in [("--products bf16", "--products: `bf16`"), ("--label products=amx", "--label: `products=amx`")] {
            let error = config(&format!("--coordinator http://a:1 {flags}")).unwrap_err();
            assert!(error.starts_with(begins) && error.ends_with("`products` under its [[model]] in models.toml"), "{error}");
        }
    }

    #[test]
    fn a_flag_that_cannot_be_used_is_named() {
        let check = |flags: &str, named: &str| {
            let error = config(flags).unwrap_err();
            assert!(error.contains(named), "`{flags}` gave `{error}`");
        };
        check("", "--coordinator");
        check("--coordinator http://a:1 --etcd http://b:2", "--etcd");
        check("--coordinator a:1", "--coordinator");
        check("--etcd http://a:1,http://b", "--etcd");
        check("--etcd http://a:1 --etcd-prefix x", "--etcd-prefix");
        check("--coordinator http://a:1 --device cuda", "--device");
        check("--coordinator http://a:1 --label role", "--label");
        check("--coordinator http://a:1 --listen 0.0.0.0:7701 --insecure", "--advertise-host");
        check("--coordinator http://a:1 --data-listen 0.0.0.0:7702 --advertise-host b", "--insecure");
        check("--coordinator https://a:1", "--coordinator");
        check("--coordinator http://a:1 --tls-cert a.crt", "--tls-key");
        check("--etcd https://a:1", "--etcd-ca");
        check("--coordinator http://a:1 --worker-id a/b", "--worker-id");
    }
}
