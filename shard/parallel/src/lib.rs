//! What the models are made of: ranks that talk to each other, weights seen from one rank, layers that know their slice.
//!
//! This crate knows no model, no job and no network protocol but that between the ranks of a group. It is synchronous:
//! calls block the rank's own thread. Start reading at [`Collective`], then [`Weights`], then [`linear`].
//!
//! Shapes, everywhere: `B` batch, `L` tokens, `D` width, `N` heads, `Dh` head width, `C` channels, `HxW` latent grid, `tp`
//! ranks of a tensor-parallel group.

pub mod bytes;
mod error;
mod tensors;

pub mod collective;
pub mod mesh;

pub mod in_process;
pub mod tcp;

pub mod device;
#[cfg(feature = "nccl")]
pub mod nccl;

pub mod checkpoint;
pub mod safetensors_header;
pub mod weights;

pub mod ops;

pub mod convolution;
pub mod linear;
pub mod lora;

pub mod rng;

pub use candle_core::{DType, Device, Tensor};
pub use collective::{Collective, Solo};
pub use convolution::{ColumnParallelConv2d, Conv2d};
pub use error::{Error, Result};
pub use in_process::InProcess;
pub use linear::{ColumnParallelLinear, Linear, Part, RowParallelLinear};
pub use tensors::Tensors;
pub use weights::{Shard, Weights};
