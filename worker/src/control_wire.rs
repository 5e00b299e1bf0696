//! Control networks as they travel: where they are, and what a worker says of them.

use models::control::ControlSource;
use models::control::card::{ControlCard, RegisteredControl};
use proto::v1::{self, ControlFolder};

/// A control network that is to be checked.
pub(crate) fn registered(folder: &ControlFolder) -> RegisteredControl {
    RegisteredControl { name: folder.name.clone(), path: folder.path.clone().into() }
}

/// A control network that a rank is to hold.
pub(crate) fn source(folder: &ControlFolder) -> ControlSource {
    ControlSource { name: folder.name.clone(), path: folder.path.clone().into(), fingerprint: folder.fingerprint.clone() }
}

/// What was read of a control network.
pub(crate) fn card(card: ControlCard) -> v1::ControlNetwork {
    v1::ControlNetwork {
        takes_guess_mode: card.guesses,
        name: card.name,
        class: card.class,
        digest: card.digest,
        fingerprint: card.fingerprint,
        weight_bytes: card.weight_bytes,
        modes: u32::try_from(card.modes).unwrap_or(u32::MAX),
        multiple_of: u32::try_from(card.multiple).unwrap_or(u32::MAX),
        problem: card.problem,
        residuals: card
            .residuals
            .into_iter()
            .map(|(of, count)| (of.to_owned(), u32::try_from(count).unwrap_or(u32::MAX)))
            .collect(),
        tp_options: card.tp_options.into_iter().map(|tp| u32::try_from(tp).unwrap_or(u32::MAX)).collect(),
    }
}
