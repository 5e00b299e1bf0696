//! What travels between processes: the generated messages and services of `atelier.v1`, and the limits both ends keep.
//!
//! Nothing of ours is imported here. The `.proto` files beside this crate are the contract; read those first.

/// The messages and services of package `atelier.v1`.
#[allow(missing_docs, unreachable_pub, missing_debug_implementations, clippy::all, rustdoc::all)] // generated
pub mod v1 {
    tonic::include_proto!("atelier.v1");
}

mod layout;
mod products;

/// The compiled descriptors, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Most bytes in one message in either direction: small messages keep a slow reader's memory bounded.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Bytes of payload in one chunk; leaves room for the framing within [`MAX_MESSAGE_BYTES`].
pub const CHUNK_BYTES: usize = 512 << 10;

/// Longest prompt, in characters. The same as the OpenAI image API's.
pub const MAX_PROMPT_CHARS: usize = 32_000;

/// In the metadata of an upload to the blob service: it is a job's result. Believed where nobody shows a certificate; elsewhere a
/// worker's certificate says it.
pub const RESULT: &str = "atelier-result";

/// Domain of every `ErrorInfo` in a gRPC status.
pub const ERROR_DOMAIN: &str = "atelier.v1";
