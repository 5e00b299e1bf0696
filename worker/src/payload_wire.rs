//! A payload as it travels: a header that says all, then the tensors' bytes in chunks.
//!
//! What comes in is checked before anything is allocated for it: a header can claim what it likes and costs nothing.

use bytes::Bytes;
use models::{Checkpoint, Payload};
use parallel::{DType, Device, Tensor, Tensors, bytes as tensor_bytes};
use proto::v1::put_payload_request::Part;
use proto::v1::{
    CheckpointHeader, CheckpointKey, PayloadHeader, PutCheckpointRequest, PutPayloadRequest, TaskRef, TensorHeader,
    put_checkpoint_request,
};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Most bytes in one payload. FLUX's prompt embeddings are 8 MiB, the latents of ten 2048 x 2048 pictures 42 MiB.
pub(crate) const MAX_PAYLOAD_BYTES: u64 = 1 << 30;
/// Most tensors in one payload. The largest has five: masked picture, mask and two moments of each.
const MAX_TENSORS: usize = 64;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 8;
/// Longest name of a tensor.
const MAX_NAME_BYTES: usize = 128;

/// What passes between stages.
const PAYLOADS: [&str; 3] = ["conditioning", "image_latents", "latents"];
/// The kind of a checkpoint that holds what a denoiser has done.
pub(crate) const DENOISE_STATE: &str = "denoise_state";

/// A payload on its way out, encoded once for however many destinations.
pub(crate) struct Outgoing {
    kind: &'static str,
    tensors: Vec<TensorHeader>,
    bytes: Bytes,
    sha256: Bytes,
}

impl Outgoing {
    /// As [`Self::encode`], of what passes between stages.
    pub(crate) fn of(payload: &Payload) -> Result<Self> {
        Self::encode(payload.kind(), payload.tensors())
    }

    /// Copies and hashes every tensor: not for tokio's threads.
    pub(crate) fn encode(kind: &'static str, each: &Tensors) -> Result<Self> {
        let mut bytes = Vec::with_capacity(each.byte_size());
        let mut tensors = Vec::with_capacity(each.len());
        for (name, tensor) in each.iter() {
            tensor_bytes::append(tensor, &mut bytes).map_err(models::Error::from)?;
            let shape = tensor.dims().iter().map(|d| *d as u64).collect();
            let dtype = tensor_bytes::dtype_name(tensor.dtype()).to_owned();
            tensors.push(TensorHeader { name: name.to_owned(), dtype, shape });
        }
        let sha256 = Bytes::copy_from_slice(&Sha256::digest(&bytes));
        Ok(Self { kind, tensors, bytes: bytes.into(), sha256 })
    }

    /// The messages that hand it to `task`.
    pub(crate) fn messages(&self, task: TaskRef, from_stage: &str) -> impl Iterator<Item = PutPayloadRequest> + use<> {
        let header = PayloadHeader {
            task: Some(task),
            from_stage: from_stage.to_owned(),
            kind: self.kind.to_owned(),
            tensors: self.tensors.clone(),
            sha256: self.sha256.clone(),
        };
        let parts = std::iter::once(Part::Header(header)).chain(self.chunks().map(Part::Chunk));
        parts.map(|part| PutPayloadRequest { part: Some(part) })
    }

    /// The messages that store it as `key`.
    pub(crate) fn checkpoint_messages(
        &self,
        key: CheckpointKey,
        model_digest: &str,
    ) -> impl Iterator<Item = PutCheckpointRequest> + use<> {
        use put_checkpoint_request::Part;
        let header = CheckpointHeader {
            key: Some(key),
            kind: self.kind.to_owned(),
            tensors: self.tensors.clone(),
            sha256: self.sha256.clone(),
            byte_size: self.bytes.len() as u64,
            model_digest: model_digest.to_owned(),
        };
        let parts = std::iter::once(Part::Header(header)).chain(self.chunks().map(Part::Chunk));
        parts.map(|part| PutCheckpointRequest { part: Some(part) })
    }

    fn chunks(&self) -> impl Iterator<Item = Bytes> + use<> {
        let bytes = self.bytes.clone();
        (0..bytes.len()).step_by(proto::CHUNK_BYTES).map(move |start| {
            let end = bytes.len().min(start + proto::CHUNK_BYTES);
            bytes.slice(start..end)
        })
    }
}

/// A payload on its way in.
#[derive(Debug)]
pub struct Incoming {
    /// Of a checkpoint: the steps done.
    step: u32,
    kind: String,
    tensors: Vec<Slot>,
    sha256: Bytes,
    expected: u64,
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct Slot {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    bytes: usize,
}

impl Incoming {
    /// Checks what the header claims.
    ///
    /// # Errors
    /// [`Error::Message`] with the field that cannot be.
    pub fn new(header: PayloadHeader) -> Result<Self> {
        Self::begin(header.kind, &PAYLOADS, header.tensors, header.sha256)
    }

    /// Checks what the header of a checkpoint claims, and that it is the one that was asked for, or a later state in its place.
    ///
    /// # Errors
    /// [`Error::Message`] with the field that cannot be.
    pub fn of_checkpoint(header: CheckpointHeader, key: &CheckpointKey, model_digest: &str) -> Result<Self> {
        let is_it =
            |found: &&CheckpointKey| (&found.job_id, &found.stage, found.products) == (&key.job_id, &key.stage, key.products);
        let found = header.key.as_ref().filter(is_it);
        let step = found.map(|found| found.step).filter(|step| *step == key.step || (key.step > 0 && *step > key.step));
        let Some(step) = step else {
            return Err(Error::message("header.key", "is another than was asked for"));
        };
        if header.model_digest != model_digest {
            return Err(Error::message("header.model_digest", "is that of other weights"));
        }
        let kinds: &[&str] = if key.step > 0 { &[DENOISE_STATE] } else { &PAYLOADS };
        let incoming = Self { step, ..Self::begin(header.kind, kinds, header.tensors, header.sha256)? };
        if header.byte_size != incoming.expected {
            return Err(Error::message("header.byte_size", format!("is not the {} bytes of its tensors", incoming.expected)));
        }
        Ok(incoming)
    }

    fn begin(kind: String, kinds: &[&str], tensors: Vec<TensorHeader>, sha256: Bytes) -> Result<Self> {
        if !kinds.contains(&kind.as_str()) {
            return Err(Error::message("header.kind", format!("must be {}", kinds.join(", "))));
        }
        if sha256.len() != 32 {
            return Err(Error::message("header.sha256", "must have 32 bytes"));
        }
        if tensors.is_empty() || tensors.len() > MAX_TENSORS {
            return Err(Error::message("header.tensors", format!("must be 1 to {MAX_TENSORS}")));
        }
        let tensors = tensors.into_iter().map(Slot::new).collect::<Result<Vec<_>>>()?;
        let expected: u64 = tensors.iter().map(|slot| slot.bytes as u64).sum();
        if expected > MAX_PAYLOAD_BYTES {
            return Err(Error::message("header.tensors", format!("are {expected} bytes; the limit is {MAX_PAYLOAD_BYTES}")));
        }
        Ok(Self { step: 0, kind, tensors, sha256, expected, bytes: Vec::new() })
    }

    /// Bytes it will have.
    pub fn byte_size(&self) -> u64 {
        self.expected
    }

    /// Takes the next bytes in.
    ///
    /// # Errors
    /// [`Error::Message`] when there are more than the header said.
    pub fn push(&mut self, chunk: &[u8]) -> Result<()> {
        if (self.bytes.len() + chunk.len()) as u64 > self.expected {
            return Err(Error::message("chunk", format!("goes beyond the {} bytes of the header's tensors", self.expected)));
        }
        self.bytes.extend_from_slice(chunk);
        Ok(())
    }

    /// The payload, if all has come and is what was sent. Hashes and copies: not for tokio's threads.
    ///
    /// # Errors
    /// [`Error::Message`] when bytes are missing, or are others.
    pub fn finish(self) -> Result<Payload> {
        let kind = self.kind.clone();
        Payload::from_parts(&kind, self.finish_tensors()?).ok_or_else(|| Error::message("header.kind", "is unknown"))
    }

    /// As [`Self::finish`], for a denoiser's state.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub fn finish_state(self) -> Result<Checkpoint> {
        let step = self.step as usize;
        Ok(Checkpoint { step, tensors: self.finish_tensors()? })
    }

    /// As [`Self::finish`], whatever kind it is of.
    fn finish_tensors(self) -> Result<Tensors> {
        if self.bytes.len() as u64 != self.expected {
            let reason = format!("ended after {} of {} bytes", self.bytes.len(), self.expected);
            return Err(Error::message("chunk", reason));
        }
        if Sha256::digest(&self.bytes)[..] != self.sha256[..] {
            return Err(Error::message("header.sha256", "is not that of the bytes"));
        }
        let mut tensors = Tensors::new();
        let mut rest = &self.bytes[..];
        for slot in self.tensors {
            let (data, after) = rest.split_at(slot.bytes);
            rest = after;
            let tensor = Tensor::from_raw_buffer(data, slot.dtype, &slot.shape, &Device::Cpu).map_err(models::Error::from)?;
            tensors.insert(slot.name, tensor);
        }
        Ok(tensors)
    }
}

impl Slot {
    fn new(header: TensorHeader) -> Result<Self> {
        let TensorHeader { name, dtype, shape } = header;
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(Error::message("header.tensors.name", format!("must have 1 to {MAX_NAME_BYTES} bytes")));
        }
        let bad = |reason: String| Error::message(format!("header.tensors[{name}]"), reason);
        let dtype = tensor_bytes::dtype_of(&dtype).ok_or_else(|| bad("its dtype does not travel".into()))?;
        if shape.len() > MAX_DIMS {
            return Err(bad(format!("has {} dimensions; the limit is {MAX_DIMS}", shape.len())));
        }
        // A dimension of nothing must not hide others that no arithmetic can hold.
        let most = shape.iter().try_fold(dtype.size_in_bytes() as u64, |bytes, dim| bytes.checked_mul((*dim).max(1)));
        let most = most.filter(|bytes| *bytes <= MAX_PAYLOAD_BYTES);
        let most = most.ok_or_else(|| bad(format!("is larger than {MAX_PAYLOAD_BYTES} bytes")))?;
        let bytes = if shape.contains(&0) { 0 } else { most };
        let dims = shape.iter().map(|dim| usize::try_from(*dim)).collect::<Result<Vec<_>, _>>();
        let shape = dims.map_err(|_| bad("has a dimension that is too large".into()))?;
        Ok(Self { name, dtype, shape, bytes: bytes as usize })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload() -> Payload {
        let f32s = Tensor::arange(0f32, 300_000., &Device::Cpu).unwrap().reshape((1, 300, 1000)).unwrap();
        let bf16 = Tensor::new(&[[1.5f32, -2.0]], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        Payload::Conditioning(Tensors::new().with("prompt_embeds", f32s).with("pooled_prompt_embeds", bf16))
    }

    fn messages(payload: &Payload) -> (PayloadHeader, Vec<Vec<u8>>) {
        let mut header = None;
        let mut chunks = Vec::new();
        for message in Outgoing::of(payload).unwrap().messages(TaskRef::default(), "encode_text") {
            match message.part {
                Some(Part::Header(h)) => header = Some(h),
                Some(Part::Chunk(c)) => chunks.push(c.to_vec()),
                None => panic!("an empty message"),
            }
        }
        (header.unwrap(), chunks)
    }

    fn receive(header: PayloadHeader, chunks: &[Vec<u8>]) -> Result<Payload> {
        let mut incoming = Incoming::new(header)?;
        chunks.iter().try_for_each(|chunk| incoming.push(chunk))?;
        incoming.finish()
    }

    #[test]
    fn a_payload_comes_back_bit_for_bit() {
        let (header, chunks) = messages(&payload());
        assert_eq!((header.kind.as_str(), header.tensors.len(), chunks.len()), ("conditioning", 2, 3));
        assert!(chunks.iter().all(|c| c.len() <= proto::CHUNK_BYTES));
        let back = receive(header, &chunks).unwrap();
        for ((name, sent), (back_name, got)) in payload().tensors().iter().zip(back.tensors().iter()) {
            assert_eq!((name, sent.dims(), sent.dtype()), (back_name, got.dims(), got.dtype()));
            let bytes = |t: &Tensor| {
                let mut out = Vec::new();
                tensor_bytes::append(t, &mut out).unwrap();
                out
            };
            assert_eq!(bytes(sent), bytes(got));
        }
    }

    #[test]
    fn bytes_that_are_not_what_was_sent_are_refused() {
        let check = |change: &dyn Fn(&mut PayloadHeader, &mut Vec<Vec<u8>>), named: &str| {
            let (mut header, mut chunks) = messages(&payload());
            change(&mut header, &mut chunks);
            let error = receive(header, &chunks).unwrap_err().to_string();
            assert!(error.contains(named), "`{error}` does not name `{named}`");
        };
        check(&|_, chunks| drop(chunks.pop()), "ended after 1048576 of 1200004 bytes");
        check(&|_, chunks| chunks[0][7] ^= 1, "header.sha256");
        check(&|_, chunks| chunks.push(vec![0]), "beyond the 1200004 bytes");
        check(&|header, _| header.kind = "image".into(), "header.kind");
        check(&|header, _| header.sha256.truncate(31), "header.sha256");
        check(&|header, _| header.tensors.clear(), "header.tensors");
        check(&|header, _| header.tensors[0].dtype = "i4".into(), "dtype");
        check(&|header, _| header.tensors[1].shape[0] = 2, "ended after");
        check(&|header, _| header.tensors[0].shape = vec![u64::MAX, 2], "larger than");
        check(&|header, _| header.tensors[0].shape = vec![1 << 40, 1 << 40, 0], "larger than");
        check(&|header, _| header.tensors[0].shape = vec![0, 1 << 40, 1 << 40], "larger than");
        check(&|header, _| header.tensors[0].shape = vec![1; 9], "dimensions");
        check(&|header, _| header.tensors[0].name.clear(), "name");
    }
}
