//! What can go wrong in this crate: what failed and with which values, never what to do about it.

use std::path::PathBuf;

/// Everything that can fail below the models.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// candle refused an operation.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// Operands that do not fit together.
    #[error("an operation got {reason}")]
    Operands {
        /// What it got.
        reason: String,
    },
    /// Adapters are active on a layer whose input does not have an item for each.
    #[error("a layer got {found:?} where adapters are active on {items} items")]
    Adapted {
        /// Dimensions of the input.
        found: Vec<usize>,
        /// Items that adapters were said for.
        items: usize,
    },
    /// A file could not be read.
    #[error("could not read `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not a checkpoint, or not a whole one.
    #[error("`{}` is not a valid checkpoint: {reason}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor that the model needs is not there.
    #[error("tensor `{name}` is missing from the checkpoint")]
    MissingTensor {
        /// Its full name.
        name: String,
    },
    /// Tensors that the model has no use for: most likely another architecture.
    #[error("the checkpoint holds {} tensors that the model does not use, among them `{}`", names.len(), names.first().map_or("", String::as_str))]
    UnusedTensors {
        /// Their full names.
        names: Vec<String>,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Its full name.
        name: String,
        /// In the checkpoint.
        found: Vec<usize>,
        /// By the configuration.
        expected: Vec<usize>,
    },
    /// A dimension cannot be divided over the ranks.
    #[error("{what} = {size} cannot be divided by tp = {tp}")]
    Indivisible {
        /// The dimension, such as `num_attention_heads` or a tensor's name.
        what: String,
        /// Its size.
        size: usize,
        /// The degree.
        tp: usize,
    },
    /// A group of a size that has no fixed order of summation.
    #[error("a tensor-parallel group has 1, 2, 4 or 8 ranks, not {size}")]
    GroupSize {
        /// The size asked for.
        size: usize,
    },
    /// Another rank of the group is gone, or said something that its epoch forbids.
    #[error("rank {rank} of the group is lost: {reason}")]
    PeerLost {
        /// The rank, in its group.
        rank: usize,
        /// What was seen.
        reason: String,
    },
    /// A named tensor that an input should have held.
    #[error("input `{name}` is missing")]
    MissingInput {
        /// Its name.
        name: String,
    },
    /// A frame between ranks that cannot be understood.
    #[error("malformed frame: {0}")]
    Frame(String),
    /// A device that cannot be computed on.
    #[error("cannot compute on `{device}`: {reason}")]
    Device {
        /// As it was asked for.
        device: String,
        /// Why not.
        reason: String,
    },
    /// A library of the GPU's vendor that the loader does not find.
    #[error("lib{library}.so cannot be opened: it is not installed, or not where the loader looks (LD_LIBRARY_PATH)")]
    LibraryMissing {
        /// Without `lib` and `.so`.
        library: &'static str,
    },
    /// A library without a function that is called here.
    #[error("lib{library}.so has no function {symbol}")]
    SymbolMissing {
        /// The library.
        library: &'static str,
        /// The function.
        symbol: &'static str,
    },
    /// A library of another time.
    #[error("lib{library}.so has version {found}; at least {needed} is needed")]
    LibraryTooOld {
        /// The library.
        library: &'static str,
        /// Its version, as it says it.
        found: i32,
        /// The oldest that will do.
        needed: i32,
    },
    /// A call into the GPU's libraries came to nothing. The communicator is given up.
    #[error("{call} failed: {reason}")]
    Gpu {
        /// The function.
        call: &'static str,
        /// What it said.
        reason: String,
    },
    /// Ranks that did not come together in time. The communicator is given up.
    #[error("{call} was not done within {} ms", limit.as_millis())]
    Stalled {
        /// The function.
        call: &'static str,
        /// How long was waited.
        limit: std::time::Duration,
    },
}

impl Error {
    /// Whether the group is over after this: a rank is lost, or what the ranks talk by.
    pub fn loses_group(&self) -> bool {
        matches!(self, Self::PeerLost { .. } | Self::Frame(_) | Self::Gpu { .. } | Self::Stalled { .. })
    }
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
