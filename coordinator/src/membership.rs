//! Who is there: workers that registered, at this coordinator or in etcd. Both tell the same [`Change`]s.
//!
//! Membership says whom to dial. Whether a worker is alive is seen on its control stream (`control.rs`).

pub mod embedded;
pub mod etcd;

use proto::v1::Registration;

use crate::error::{Error, Result};

/// Changes that wait to be acted upon.
pub const MAX_CHANGES: usize = 1024;
/// The longest id of a worker.
pub const MAX_WORKER_ID_CHARS: usize = 128;
/// The most labels of a worker.
pub const MAX_LABELS: usize = 64;
/// The most ways to multiply that a worker may have: more than there are, for those that only newer ones know.
pub const MAX_PRODUCTS: usize = 64;

/// Somebody came or went.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// A worker registered. If one of the same id is there with other addresses, it is replaced.
    Joined(Registration),
    /// A worker's registration ended.
    Left {
        /// Which worker.
        worker_id: String,
        /// Why, for people.
        cause: String,
    },
}

/// Refuses a registration that cannot be dialled or shown.
pub fn check(registration: &Registration) -> Result<()> {
    let refuse = |problem: &str| Err(Error::InvalidRegistration(problem.to_owned()));
    let id = &registration.worker_id;
    if id.is_empty() || id.len() > MAX_WORKER_ID_CHARS || !id.chars().all(|c| c.is_ascii_graphic() && c != '/') {
        return refuse("worker_id must be 1 to 128 visible ASCII characters without a slash");
    }
    if !is_host_and_port(&registration.address) {
        return refuse("address must be host:port");
    }
    if !is_host_and_port(&registration.data_address) {
        return refuse("data_address must be host:port");
    }
    if !registration.metrics_address.is_empty() && !is_host_and_port(&registration.metrics_address) {
        return refuse("metrics_address must be host:port or empty");
    }
    if registration.labels.len() > MAX_LABELS {
        return refuse("there may be at most 64 labels");
    }
    if registration.products.len() > MAX_PRODUCTS {
        return refuse("there may be at most 64 products");
    }
    Ok(())
}

fn is_host_and_port(address: &str) -> bool {
    let parts = address.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>()));
    matches!(parts, Some((host, Ok(port))) if !host.is_empty() && port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_registration_must_be_dialable() {
        assert!(check(&testing::worker("w1", "any")).is_ok());
        for address in ["", "host", "host:0", ":1", "host:70000"] {
            assert!(check(&Registration { address: address.into(), ..testing::worker("w1", "any") }).is_err());
        }
        assert!(check(&testing::worker("a/b", "any")).is_err());
        assert!(check(&Registration { products: vec![1; MAX_PRODUCTS + 1], ..testing::worker("w1", "any") }).is_err());
    }
}
