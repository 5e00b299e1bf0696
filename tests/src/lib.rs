//! What the tests of the whole share: golden cases, ranks that are threads, made-up checkpoints, clusters of real processes.

pub mod cluster;
pub mod golden;
pub mod published;
pub mod ranks;
pub mod synthetic;
