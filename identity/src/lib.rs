//! Who is who between Atelier's processes: certificates with roles, TLS that is checked on both sides, files that are read
//! again when they change.
//!
//! It may not know what the processes say to each other. Start reading at [`Role`], then [`Identity`], which dials, accepts
//! and follows its files. [`Incoming`] and [`Connector`] are for gRPC, [`Wire`] is for threads that block; [`authority`] makes
//! certificates for development.

pub mod authority;
mod connector;
mod error;
pub mod etcd;
mod files;
mod incoming;
mod material;
mod plain;
mod role;
mod verify;
mod wire;

pub use connector::Connector;
pub use error::{Error, Result};
pub use etcd::EtcdTls;
pub use files::{Files, TlsArgs};
pub use incoming::{Incoming, Peer, Socket};
pub use material::Identity;
pub use plain::Dialled;
pub use role::{Port, Role};
pub use wire::Wire;
