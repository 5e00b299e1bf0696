//! What is to go wrong, by environment variables.
//!
//! | variable | means |
//! |---|---|
//! | `FAKE_NCCL_DIR` | the folder that messages go through; must be set |
//! | `FAKE_NCCL_VERSION` | the version that is told, such as 21600 |
//! | `FAKE_NCCL_FAULT` | `kind` or `kind:n`: at the n-th exchange, counted from 0; without n while joining |
//!
//! Kinds: `die` (SIGABRT in the middle of a call), `hang` (never done), `error` (told later, by `ncclCommGetAsyncError`), `refuse`
//! (told at once), `unknown` (an error of a later version), `abort` (an error, after which aborting fails too).

use std::sync::OnceLock;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process dies.
    Die,
    /// It is never done.
    Hang,
    /// It fails later.
    Error,
    /// It fails at once.
    Refuse,
    /// It fails later, with a number nobody knows.
    Unknown,
    /// It fails later, and so does giving up.
    Abort,
}

/// The fault, and at which exchange; `None`: while joining.
fn asked() -> Option<(Fault, Option<u64>)> {
    static ASKED: OnceLock<Option<(Fault, Option<u64>)>> = OnceLock::new();
    *ASKED.get_or_init(|| {
        let text = std::env::var("FAKE_NCCL_FAULT").ok()?;
        let (kind, at) = text.split_once(':').map_or((text.as_str(), None), |(kind, at)| (kind, at.parse().ok()));
        let kind = match kind {
            "die" => Fault::Die,
            "hang" => Fault::Hang,
            "error" => Fault::Error,
            "refuse" => Fault::Refuse,
            "unknown" => Fault::Unknown,
            "abort" => Fault::Abort,
            _ => return None,
        };
        Some((kind, at))
    })
}

/// What goes wrong at an exchange (or, without a number, while joining).
pub(crate) fn at(exchange: Option<u64>) -> Option<Fault> {
    let (fault, _) = asked().filter(|(_, at)| *at == exchange)?;
    if fault == Fault::Die {
        std::process::abort();
    }
    Some(fault)
}

/// Whether aborting fails.
pub(crate) fn abort_fails() -> bool {
    matches!(asked(), Some((Fault::Abort, _)))
}

/// The version that is told.
pub(crate) fn version() -> i32 {
    std::env::var("FAKE_NCCL_VERSION").ok().and_then(|version| version.parse().ok()).unwrap_or(23_004)
}
