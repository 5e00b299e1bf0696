//! What a checkpoint claims to be, checked before anything is stored: a header costs nothing and may claim what it likes.

use proto::v1::{CheckpointHeader, CheckpointKey, Products, TensorHeader};
use uuid::Uuid;

use super::CheckpointError;

/// Most tensors in one checkpoint: a solver's history beside the latents, with room.
pub const MAX_TENSORS: usize = 64;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 8;
/// Longest name of a tensor.
const MAX_NAME_BYTES: usize = 128;
/// Longest id of a stage.
const MAX_STAGE_BYTES: usize = 64;
/// Longest digest of a model: sha256 in hex.
const MAX_DIGEST_BYTES: usize = 64;
/// What may be stored: outputs of stages, and a denoiser's state.
const KINDS: [&str; 4] = ["conditioning", "image_latents", "latents", "denoise_state"];
/// What a tensor may consist of, and the bytes of one element.
const DTYPES: [(&str, u64); 6] = [("f32", 4), ("bf16", 2), ("f16", 2), ("i64", 8), ("u32", 4), ("u8", 1)];

/// Where a checkpoint is kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) job_id: String,
    pub(super) stage: String,
    /// [`Products::Unspecified`] of what an older program stored: it can be removed, and is what nobody asks for.
    pub(super) products: Products,
    pub(super) step: u32,
}

impl Key {
    /// Names nothing outside its own folder, whatever was sent.
    pub(super) fn check(key: Option<CheckpointKey>) -> Result<Self, CheckpointError> {
        let CheckpointKey { job_id, stage, step, products } = key.ok_or_else(|| refused("key", "is missing"))?;
        if !is_job_id(&job_id) {
            return Err(refused("key.job_id", "must be a UUID in lower case, with hyphens"));
        }
        let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if stage.is_empty() || stage.len() > MAX_STAGE_BYTES || !stage.chars().all(is_word) {
            return Err(refused("key.stage", "must be 1 to 64 of a to z, 0 to 9 and _"));
        }
        let products =
            Products::try_from(products).map_err(|_| refused("key.products", format!("{products} is no known way")))?;
        Ok(Self { job_id, stage, products, step })
    }
}

/// A UUID as the coordinator writes it: one spelling, so that one job has one folder.
fn is_job_id(id: &str) -> bool {
    Uuid::try_parse(id).is_ok_and(|uuid| uuid.to_string() == id)
}

/// Checks all that a header claims, and gives its key.
pub(super) fn check(header: &mut CheckpointHeader, most: u64) -> Result<Key, CheckpointError> {
    let key = Key::check(header.key.clone())?;
    if key.products == Products::Unspecified {
        return Err(refused("key.products", "must say what it was multiplied in"));
    }
    if !KINDS.contains(&header.kind.as_str()) {
        return Err(refused("kind", "must be conditioning, image_latents, latents or denoise_state"));
    }
    if (header.kind == "denoise_state") != (key.step > 0) {
        return Err(refused("key.step", "must be above 0 for a denoise_state, and 0 for a stage's output"));
    }
    if header.sha256.len() != 32 {
        return Err(refused("sha256", "must have 32 bytes"));
    }
    if header.model_digest.len() > MAX_DIGEST_BYTES {
        return Err(refused("model_digest", "must have at most 64 bytes"));
    }
    if header.tensors.is_empty() || header.tensors.len() > MAX_TENSORS {
        return Err(refused("tensors", format!("must be 1 to {MAX_TENSORS}")));
    }
    let mut bytes = 0u64;
    for tensor in &header.tensors {
        let of = tensor_bytes(tensor)?;
        bytes = bytes.checked_add(of).filter(|bytes| *bytes <= most).ok_or(CheckpointError::TooLarge { limit: most })?;
    }
    if bytes != header.byte_size {
        return Err(refused("byte_size", format!("is {}; the tensors have {bytes} bytes", header.byte_size)));
    }
    Ok(key)
}

fn tensor_bytes(tensor: &TensorHeader) -> Result<u64, CheckpointError> {
    let TensorHeader { name, dtype, shape } = tensor;
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(refused("tensors.name", format!("must have 1 to {MAX_NAME_BYTES} bytes")));
    }
    let bad = |problem: &str| refused(&format!("tensors[{name}]"), problem);
    let (_, size) = DTYPES.iter().find(|(known, _)| known == dtype).ok_or_else(|| bad("its dtype does not travel"))?;
    if shape.len() > MAX_DIMS {
        return Err(bad("has more than 8 dimensions"));
    }
    // A dimension of nothing must not hide others that no arithmetic can hold: who takes this up would refuse it.
    let most = shape.iter().try_fold(*size, |bytes, dim| bytes.checked_mul((*dim).max(1))).ok_or_else(|| bad("is too large"))?;
    Ok(if shape.contains(&0) { 0 } else { most })
}

pub(super) fn refused(field: &str, problem: impl Into<String>) -> CheckpointError {
    CheckpointError::Invalid { field: field.to_owned(), problem: problem.into() }
}
