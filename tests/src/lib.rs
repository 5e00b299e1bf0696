//! What the tests of the whole share: the reader of golden cases, and clusters of real processes.

pub mod cluster;
pub mod golden;
