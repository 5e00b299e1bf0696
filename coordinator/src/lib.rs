//! The coordinator: takes jobs, plans them, places them on groups of workers, and hands back what comes of it.
//!
//! It may not know a model and links no tensor library: a worker registers a `ModelCard`, and that is all there is to
//! know. It never sees a tensor either: outputs go from worker to worker.

pub mod config;
pub mod error;
pub mod models_file;
pub mod placement;
pub mod plan;
pub mod request;
pub mod state;
#[cfg(test)]
mod testing;
