//! The coordinator: takes jobs, plans them, places them on groups of workers, and hands back what comes of it.
//!
//! It may not know a model and links no tensor library: a worker registers a `ModelCard`, and that is all there is to
//! know. It never sees a tensor either: outputs go from worker to worker.
//!
//! Start reading at [`state`], which decides everything; [`run`] puts a network around it.

pub mod config;
pub mod context;
pub mod error;
pub mod models_file;
pub mod placement;
pub mod plan;
pub mod request;
pub mod stand_in;
pub mod state;
pub mod store;
pub mod world;

pub mod api;
pub mod auth;
pub mod blobs;
pub mod checkpoints;
mod control;
mod followers;
pub mod leadership;
mod live;
pub mod membership;
pub mod metrics;
mod runtime;
mod server;
mod standby;
#[cfg(test)]
mod testing;
mod turns;

pub use config::{Args, Config};
pub use error::{Error, Result};
pub use server::{World, run, run_in, run_measured};
