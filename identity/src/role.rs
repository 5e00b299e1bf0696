//! What a process of the cluster is, as its certificate says.

use std::fmt;

/// What the holder of a certificate is.
///
/// The role is a URI among the certificate's alternative names, in the form of SPIFFE: `spiffe://atelier/worker`. A URI, since
/// whoever issues certificates (cert-manager, SPIRE, a plain CA) can write one; it is taken for no host's name; and a host's
/// name would not do: workers come and go at addresses that nobody knew when the certificate was made. So between the
/// cluster's processes the chain and the role are checked, not the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Decides.
    Coordinator,
    /// Computes.
    Worker,
    /// Asks for pictures.
    Client,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Coordinator, Self::Worker, Self::Client];

    /// Its word: `coordinator`, `worker`, `client`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
            Self::Client => "client",
        }
    }

    /// The URI that a certificate of this role has among its alternative names.
    pub fn uri(self) -> &'static str {
        match self {
            Self::Coordinator => "spiffe://atelier/coordinator",
            Self::Worker => "spiffe://atelier/worker",
            Self::Client => "spiffe://atelier/client",
        }
    }

    /// The role that one of these URIs names.
    pub(crate) fn among<'a>(mut uris: impl Iterator<Item = &'a str>) -> Option<Self> {
        uris.find_map(|uri| Self::ALL.into_iter().find(|role| role.uri() == uri))
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Who may connect to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// Certificates of these roles are taken.
    pub roles: &'static [Role],
    /// Somebody without a certificate is let in too, and shows who it is in another way.
    pub anonymous: bool,
}

impl Port {
    /// The coordinator's: clients, who may have a key in place of a certificate, and workers.
    pub const COORDINATOR: Self = Self { roles: &[Role::Client, Role::Worker], anonymous: true };
    /// A worker's for calls: the coordinator, and workers that hand payloads on.
    pub const WORKER: Self = Self { roles: &[Role::Coordinator, Role::Worker], anonymous: false };
    /// A worker's for the ranks of its groups: workers.
    pub const RANKS: Self = Self { roles: &[Role::Worker], anonymous: false };
}
