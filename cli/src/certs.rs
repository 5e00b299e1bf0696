//! `atelier certs`: an authority for development, and a certificate for each role.

use std::path::PathBuf;

use clap::Args;
use identity::authority::{self, Existing};

use crate::error::Error;

/// Where certificates are put when nobody says.
pub(crate) const DEFAULT_DIR: &str = "atelier-tls";

#[derive(Debug, Args)]
pub(crate) struct CertsArgs {
    /// The folder for the files, which this user alone may read.
    #[arg(long, default_value = DEFAULT_DIR)]
    dir: PathBuf,
    /// A name or an address at which the coordinator is reached; may be repeated. localhost, 127.0.0.1 and ::1 are always there.
    #[arg(long = "host")]
    hosts: Vec<String>,
    /// Keep the authority that is there, and replace the certificates that it made.
    #[arg(long, conflicts_with = "force")]
    renew: bool,
    /// Replace what is there, the authority too: whoever believes the old one must be given the new one.
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: CertsArgs) -> Result<(), Error> {
    let existing = match (args.renew, args.force) {
        (true, _) => Existing::Renew,
        (_, true) => Existing::Replace,
        _ => Existing::Refuse,
    };
    for path in authority::write(&args.dir, &hosts(args.hosts), existing)? {
        println!("{}", path.display());
    }
    Ok(())
}

/// These, and this machine for itself.
pub(crate) fn hosts(mut hosts: Vec<String>) -> Vec<String> {
    hosts.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
    hosts
}
