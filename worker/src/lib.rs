//! The worker: holds ranks of groups, runs their stages, and moves what flows between stages.
//!
//! It may not decide. Which rank to hold, which task to run, where its output goes and whether to try again is said by the
//! coordinator over `service`; a worker only reports. It knows no model either: what a component is made of is behind
//! `Backend`.
//!
//! Two worlds meet here and touch in `groups` only: tokio tasks, which wait for sockets and never for a tensor, and one
//! thread per rank (`rank`), which computes and waits for no socket but those of its group's collective. Start reading at
//! `worker`, then `service`, then `tasks` and `task`. What a coordinator is told goes through `outbox`, because ranks and tasks
//! outlive the stream they were started on.

pub mod error;

pub mod config;

mod adapter_wire;
mod card_wire;
mod control_wire;
mod request_wire;

pub mod payload_wire;

mod counted;
mod meters;
mod spans;

mod inbox;
mod mail;
mod outbox;

mod products;
mod provenance;

pub mod backend;

mod memory;
mod mesh;
mod rank;
mod routes;

mod groups;

mod cards;
mod dial;
mod home;

mod blobs;
mod checkpoints;

mod failure;
mod pictures;
mod saver;
mod task;
mod tasks;

mod session;

mod service;

mod embedded;
mod etcd;

mod drain;
pub mod health;
pub mod signals;
pub mod worker;

pub use backend::{Backend, RankSpec, RegistryBackend};
pub use config::{Args, Config};
pub use error::{Error, Result};
pub use worker::{Worker, run};
