//! What the tests of the whole share: the reader of golden cases, groups of ranks that are threads, made-up checkpoints.

pub mod golden;
pub mod ranks;
pub mod synthetic;
