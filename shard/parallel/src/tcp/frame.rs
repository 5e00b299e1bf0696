//! What ranks say to each other on a connection.

use std::io::{self, ErrorKind, Read};

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// Longest tensor: a whole activation of the largest model served (4608 x 21504 f32) is 0.4 GB.
const MAX_TENSOR_BYTES: u64 = 1 << 30;
/// Most dimensions of a tensor.
const MAX_RANK: u8 = 8;

/// First bytes that no tensor has.
const BEAT: u8 = 0xff;
const OFFER: u8 = 0xfe;
const ANSWER: u8 = 0xfd;
const SHARED: u8 = 0xfc;

const DTYPES: [DType; 7] = [DType::F32, DType::BF16, DType::F16, DType::I64, DType::U32, DType::U8, DType::F64];

/// A heartbeat.
pub(super) const HEARTBEAT: &[u8] = &[BEAT];

/// The next thing a peer says.
#[derive(Debug)]
pub(super) enum Frame {
    Beat,
    Tensor(Tensor),
    /// Memory that the peer would rather write large tensors into.
    Offer(Offer),
    /// Whether this end's offer was taken.
    Answer(bool),
    /// A tensor that lies in the memory that was offered, at this place in all that was ever written there.
    Shared {
        head: Head,
        at: u64,
    },
}

/// Where memory that can be shared is found, if both processes are on one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) process: u32,
    pub(super) file: u32,
    pub(super) bytes: u64,
    /// Written at its beginning.
    pub(super) token: [u8; 16],
}

/// A tensor's type and shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
}

impl Head {
    pub(super) fn of(x: &Tensor) -> Self {
        Self { dtype: x.dtype(), shape: x.dims().to_vec() }
    }

    pub(super) fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()
    }

    pub(super) fn tensor(&self, data: &[u8]) -> io::Result<Tensor> {
        Tensor::from_raw_buffer(data, self.dtype, &self.shape, &Device::Cpu).map_err(|e| invalid(e.to_string()))
    }

    /// dtype (1 byte), number of dimensions (1), dimensions (8 each), little endian.
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        let dtype = DTYPES.iter().position(|dtype| *dtype == self.dtype);
        out.push(dtype.ok_or_else(|| Error::Frame(format!("{:?} does not travel", self.dtype)))? as u8);
        out.push(self.shape.len() as u8);
        self.shape.iter().for_each(|dim| out.extend((*dim as u64).to_le_bytes()));
        Ok(())
    }

    fn decode(dtype: u8, stream: &mut impl Read) -> io::Result<Self> {
        let dtype = *DTYPES.get(usize::from(dtype)).ok_or_else(|| invalid(format!("dtype {dtype}")))?;
        let [rank] = bytes(stream)?;
        if rank > MAX_RANK {
            return Err(invalid(format!("a tensor of {rank} dimensions")));
        }
        let (mut shape, mut size) = (Vec::new(), dtype.size_in_bytes() as u64);
        for _ in 0..rank {
            let dim = u64::from_le_bytes(bytes(stream)?);
            size =
                size.checked_mul(dim).filter(|b| *b <= MAX_TENSOR_BYTES).ok_or_else(|| invalid("an oversized tensor".into()))?;
            shape.push(dim as usize);
        }
        Ok(Self { dtype, shape })
    }
}

/// That a tensor of this (encoded) head lies in shared memory.
pub(super) fn shared(at: u64, head: &[u8]) -> Vec<u8> {
    [&[SHARED], &at.to_le_bytes()[..], head].concat()
}

pub(super) fn encode_offer(offer: &Offer) -> Vec<u8> {
    let mut out = vec![OFFER];
    out.extend(offer.process.to_le_bytes());
    out.extend(offer.file.to_le_bytes());
    out.extend(offer.bytes.to_le_bytes());
    out.extend(offer.token);
    out
}

pub(super) fn encode_answer(taken: bool) -> [u8; 2] {
    [ANSWER, u8::from(taken)]
}

/// The next frame.
pub(super) fn decode(stream: &mut impl Read) -> io::Result<Frame> {
    let [kind] = bytes(stream)?;
    Ok(match kind {
        BEAT => Frame::Beat,
        OFFER => Frame::Offer(Offer {
            process: u32::from_le_bytes(bytes(stream)?),
            file: u32::from_le_bytes(bytes(stream)?),
            bytes: u64::from_le_bytes(bytes(stream)?),
            token: bytes(stream)?,
        }),
        ANSWER => Frame::Answer(bytes::<1>(stream)? == [1]),
        SHARED => {
            let at = u64::from_le_bytes(bytes(stream)?);
            let [dtype] = bytes(stream)?;
            Frame::Shared { head: Head::decode(dtype, stream)?, at }
        }
        dtype => {
            let head = Head::decode(dtype, stream)?;
            let mut data = vec![0; head.bytes()];
            stream.read_exact(&mut data)?;
            Frame::Tensor(head.tensor(&data)?)
        }
    })
}

fn bytes<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub(super) fn invalid(what: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_that_claims_too_much_is_refused() {
        let mut frame = vec![0, 2];
        frame.extend(u64::MAX.to_le_bytes());
        frame.extend(2u64.to_le_bytes());
        assert_eq!(decode(&mut frame.as_slice()).unwrap_err().kind(), ErrorKind::InvalidData);
        let shared = [&[SHARED], &[0; 8][..], &frame].concat();
        assert_eq!(decode(&mut shared.as_slice()).unwrap_err().kind(), ErrorKind::InvalidData);
        assert_eq!(decode(&mut &[200u8, 1][..]).unwrap_err().kind(), ErrorKind::InvalidData, "an unknown type");
    }

    #[test]
    fn what_is_said_is_understood() {
        let offer = Offer { process: 7, file: 9, bytes: 1 << 20, token: [3; 16] };
        assert!(matches!(decode(&mut &encode_offer(&offer)[..]).unwrap(), Frame::Offer(got) if got == offer));
        for taken in [true, false] {
            assert!(matches!(decode(&mut &encode_answer(taken)[..]).unwrap(), Frame::Answer(got) if got == taken));
        }
        let head = Head { dtype: DType::BF16, shape: vec![2, 3] };
        let mut encoded = Vec::new();
        head.encode(&mut encoded).unwrap();
        assert!(matches!(decode(&mut &shared(40, &encoded)[..]).unwrap(), Frame::Shared { head: got, at: 40 } if got == head));
        assert!(matches!(decode(&mut &HEARTBEAT[..]).unwrap(), Frame::Beat));
    }
}
