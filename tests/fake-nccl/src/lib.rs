//! A stand-in for libnccl.so and libcuda.so, for tests without a GPU: the functions that `parallel::nccl` calls, as C sees them.
//!
//! Device memory is the host's ([`cuda`]); a send is a file that the receiver takes away ([`nccl`]). Like the real ones it does
//! nothing at once: an exchange is first taken up (`ncclInProgress`), then under way on its stream (`CUDA_ERROR_NOT_READY`), and
//! it ends by itself never if a peer does not come. What goes wrong is said by the environment ([`faults`]).
//!
//! It shows that our side of these interfaces is right as far as their documents go. It shows nothing of kernels, of the order
//! of real streams, or of the real libraries' own faults.

pub mod cuda;
pub mod faults;
pub mod nccl;
mod transfer;
