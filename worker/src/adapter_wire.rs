//! Adapters as they travel: where they are, and what a worker says of them.

use models::lora::card::{AdapterCard, Registered};
use models::lora::store::{Source, Sources};
use proto::v1::{self, AdapterFile, JoinGroup};

/// An adapter that is to be checked.
pub(crate) fn registered(file: &AdapterFile) -> Registered {
    let defaults = file.defaults.iter().map(|default| (default.name.clone(), default.value)).collect();
    Registered { name: file.name.clone(), path: file.path.clone().into(), defaults }
}

/// The adapters that a rank may be asked for.
pub(crate) fn sources(join: &JoinGroup, cache_bytes: u64) -> Sources {
    let source = |file: &AdapterFile| Source {
        name: file.name.clone(),
        path: file.path.clone().into(),
        digest: file.digest.clone(),
        components: file.components.clone(),
    };
    Sources { named: join.adapters.iter().map(source).collect(), cache_bytes }
}

/// What was read of an adapter.
pub(crate) fn card(card: AdapterCard) -> v1::Adapter {
    let default = |(name, value)| v1::AdapterDefault { name, value };
    v1::Adapter {
        name: card.name,
        digest: card.digest,
        byte_size: card.bytes,
        components: card.components,
        defaults: card.defaults.into_iter().map(default).collect(),
        problem: card.problem,
    }
}
