//! What the tests of the whole share: golden cases, ranks that are threads, made-up checkpoints, clusters of real processes.

pub mod assembled;
pub mod cluster;
pub mod equivalence;
pub mod etcd;
pub mod gguf;
pub mod golden;
pub mod hosts;
pub mod nccl;
pub mod prometheus;
pub mod proxy;
pub mod published;
pub mod ranks;
pub mod same_bits;
pub mod stages;
pub mod synthetic;
