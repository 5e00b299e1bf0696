//! A payload as it travels: a header that says all, then the tensors' bytes in chunks.
//!
//! What comes in is checked before anything is allocated for it: a header can claim what it likes and costs nothing.

use bytes::Bytes;
use models::Payload;
use parallel::{DType, Device, Tensor, Tensors, bytes as tensor_bytes};
use proto::v1::put_payload_request::Part;
use proto::v1::{PayloadHeader, PutPayloadRequest, TaskRef, TensorHeader};
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

/// A payload on its way out, encoded once for however many destinations.
pub(crate) struct Outgoing {
    kind: &'static str,
    tensors: Vec<TensorHeader>,
    bytes: Bytes,
    sha256: Bytes,
}

impl Outgoing {
    /// Copies and hashes every tensor: not for tokio's threads.
    pub(crate) fn encode(payload: &Payload) -> Result<Self> {
        let mut bytes = Vec::with_capacity(payload.tensors().byte_size());
        let mut tensors = Vec::with_capacity(payload.tensors().len());
        for (name, tensor) in payload.tensors().iter() {
            tensor_bytes::append(tensor, &mut bytes).map_err(models::Error::from)?;
            let shape = tensor.dims().iter().map(|d| *d as u64).collect();
            let dtype = tensor_bytes::dtype_name(tensor.dtype()).to_owned();
            tensors.push(TensorHeader { name: name.to_owned(), dtype, shape });
        }
        let sha256 = Bytes::copy_from_slice(&Sha256::digest(&bytes));
        Ok(Self { kind: payload.kind(), tensors, bytes: bytes.into(), sha256 })
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
        let bytes = self.bytes.clone();
        let chunks = (0..bytes.len()).step_by(proto::CHUNK_BYTES).map(move |start| {
            let end = bytes.len().min(start + proto::CHUNK_BYTES);
            Part::Chunk(bytes.slice(start..end))
        });
        std::iter::once(Part::Header(header)).chain(chunks).map(|part| PutPayloadRequest { part: Some(part) })
    }
}

/// A payload on its way in.
pub(crate) struct Incoming {
    kind: String,
    tensors: Vec<Slot>,
    sha256: Bytes,
    expected: u64,
    bytes: Vec<u8>,
}

struct Slot {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    bytes: usize,
}

impl Incoming {
    /// Checks what the header claims.
    pub(crate) fn new(header: PayloadHeader) -> Result<Self> {
        if !matches!(header.kind.as_str(), "conditioning" | "image_latents" | "latents") {
            return Err(Error::message("header.kind", "must be conditioning, image_latents or latents"));
        }
        if header.sha256.len() != 32 {
            return Err(Error::message("header.sha256", "must have 32 bytes"));
        }
        if header.tensors.is_empty() || header.tensors.len() > MAX_TENSORS {
            return Err(Error::message("header.tensors", format!("must be 1 to {MAX_TENSORS}")));
        }
        let tensors = header.tensors.into_iter().map(Slot::new).collect::<Result<Vec<_>>>()?;
        let expected: u64 = tensors.iter().map(|slot| slot.bytes as u64).sum();
        if expected > MAX_PAYLOAD_BYTES {
            return Err(Error::message("header.tensors", format!("are {expected} bytes; the limit is {MAX_PAYLOAD_BYTES}")));
        }
        Ok(Self { kind: header.kind, tensors, sha256: header.sha256, expected, bytes: Vec::new() })
    }

    /// Bytes it will have.
    pub(crate) fn byte_size(&self) -> u64 {
        self.expected
    }

    /// Takes the next bytes in.
    pub(crate) fn push(&mut self, chunk: &[u8]) -> Result<()> {
        if (self.bytes.len() + chunk.len()) as u64 > self.expected {
            return Err(Error::message("chunk", format!("goes beyond the {} bytes of the header's tensors", self.expected)));
        }
        self.bytes.extend_from_slice(chunk);
        Ok(())
    }

    /// The payload, if all has come and is what was sent. Hashes and copies: not for tokio's threads.
    pub(crate) fn finish(self) -> Result<Payload> {
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
        Payload::from_parts(&self.kind, tensors).ok_or_else(|| Error::message("header.kind", "is unknown"))
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
        let bytes = shape.iter().try_fold(dtype.size_in_bytes() as u64, |bytes, dim| bytes.checked_mul(*dim));
        let bytes = bytes.filter(|bytes| *bytes <= MAX_PAYLOAD_BYTES);
        let bytes = bytes.ok_or_else(|| bad(format!("is larger than {MAX_PAYLOAD_BYTES} bytes")))?;
        // No dimension can be beyond usize: a zero among them is the only way past the product.
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
        for message in Outgoing::encode(payload).unwrap().messages(TaskRef::default(), "encode_text") {
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
        check(&|header, _| header.tensors[0].shape = vec![1; 9], "dimensions");
        check(&|header, _| header.tensors[0].name.clear(), "name");
    }
}
