//! `atelier keys`: API keys of tenants.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use clap::Subcommand;

use crate::error::Error;

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key. It is printed once; the coordinator keeps its hash alone.
    New {
        /// Whose key it is.
        tenant: String,
        /// The file that the coordinator reads (--api-keys): the key's hash is added to it.
        #[arg(long, default_value = "keys.toml")]
        file: PathBuf,
    },
}

pub(crate) fn run(command: KeysCommand) -> Result<(), Error> {
    let KeysCommand::New { tenant, file } = command;
    let (key, entry) = coordinator::auth::new_key(&tenant)?;
    let added = OpenOptions::new().append(true).create(true).mode(0o600).open(&file);
    let added = added.and_then(|mut opened| opened.write_all(format!("\n{entry}").as_bytes()));
    added.map_err(|source| Error::File { path: file.display().to_string(), source })?;
    println!("{key}");
    Ok(())
}
