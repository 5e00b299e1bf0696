//! The papers: one file per network, readable beside its reference, sharded by construction.
//!
//! Knows tensors and ranks, but no job queue, no worker and no wire. Synchronous. Start reading at [`stage`] (what a worker
//! runs), then [`flux`] for a family, then [`engine`] for how many jobs are denoised at once.

pub mod card;
pub mod error;
pub mod payload;
pub mod request;

pub mod model_dir;

pub mod blocks;

pub mod lora;

pub mod control;

pub mod block_runner;

pub mod tokenizer;

pub mod bert;
pub mod clip;
pub mod qwen2_5_vl;
pub mod t5;
mod token_embedding;

pub mod autoencoder_kl;
pub mod autoencoder_kl_qwen;

pub mod image_io;

pub mod scheduler;

mod mmdit;

pub mod dit_transformer;
pub mod flux_transformer;
pub mod hunyuan_dit;
pub mod if_unet;
pub mod lama_generator;
pub mod pixart_transformer;
pub mod qwen_image_transformer;
pub mod sd3_transformer;
pub mod t2i_adapter;
pub mod unet_2d_condition;

pub mod checkpoint;
pub mod denoise;

pub mod stage;

pub mod autoencoder_stage;
pub mod engine;
pub mod text_stage;

mod diffusion;
mod flow;
mod packing;

pub mod deepfloyd_if;
pub mod dit;
pub mod flux;
pub mod hunyuan;
pub mod lama;
pub mod pixart;
pub mod qwen_image;
pub mod sd3;
pub mod stable_diffusion;
pub mod stable_diffusion_xl;

mod checkpoint_names;
pub mod registry;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
pub use payload::Payload;
pub use request::Request;
