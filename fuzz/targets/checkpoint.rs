//! An object where a checkpoint should be: it is given as what was stored, or not to its end.
#![no_main]

use std::sync::Arc;

use bytes::Bytes;
use coordinator::checkpoints::{CheckpointLimits, CheckpointStore, Place};
use futures::StreamExt;
use libfuzzer_sys::fuzz_target;
use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory, path::Path};
use prost::Message;
use proto::v1::{CheckpointHeader, CheckpointKey, Products, get_checkpoint_response::Part};
use sha2::{Digest, Sha256};
use worker::payload_wire::Incoming;

const JOB: &str = "6fa459ea-ee8a-4ca4-894e-db77e160355e";

/// The object: as it is, or with a header that is right as far as it can be.
fn object(how: u8, rest: &[u8], key: &CheckpointKey) -> Vec<u8> {
    if how & 1 == 0 {
        return rest.to_vec();
    }
    let (header, body) = rest.split_at(rest.len().min(usize::from(how >> 2) * 4));
    let mut header = CheckpointHeader::decode(header).unwrap_or_default();
    header.key = Some(key.clone());
    header.sha256 = Bytes::copy_from_slice(&Sha256::digest(body));
    if how & 2 != 0 {
        header.byte_size = body.len() as u64;
    }
    let header = header.encode_to_vec();
    [&(header.len() as u32).to_le_bytes()[..], &header, body].concat()
}

fuzz_target!(|bytes: &[u8]| {
    let Some((how, rest)) = bytes.split_first() else { return };
    let step = u32::from(rest.first().is_some_and(|byte| byte & 1 == 1));
    let key = CheckpointKey { job_id: JOB.into(), stage: "denoise".into(), step, products: Products::F32.into() };
    let object = object(*how, rest, &key);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let objects = Arc::new(InMemory::new());
        let path = Path::from_iter(["checkpoints", JOB, "denoise", "f32", &step.to_string()]);
        objects.put(&path, object.into()).await.expect("an object");
        let store = CheckpointStore::open(&Place::Memory(objects), CheckpointLimits::default(), Arc::new(|_| true)).await;
        let Ok(parts) = store.expect("a store").get(Some(key.clone())).await else { return };
        let mut parts = Box::pin(parts);
        let (mut incoming, mut whole, mut expected) = (None, Vec::new(), None);
        while let Some(part) = parts.next().await {
            match part.map(|response| response.part) {
                Ok(Some(Part::Header(header))) => {
                    expected = Some((header.byte_size, header.sha256.clone()));
                    incoming = Incoming::of_checkpoint(header, &key, "").ok();
                }
                Ok(Some(Part::Chunk(chunk))) => {
                    incoming = incoming.and_then(|mut incoming| incoming.push(&chunk).is_ok().then_some(incoming));
                    whole.extend_from_slice(&chunk);
                }
                Ok(None) => panic!("an empty message"),
                Err(_) => return,
            }
        }
        let (byte_size, sha256) = expected.expect("a header comes first");
        assert_eq!(whole.len() as u64, byte_size);
        if byte_size > 0 {
            assert_eq!(Sha256::digest(&whole)[..], sha256[..], "given to its end, it is what was stored");
        }
        if let Some(incoming) = incoming {
            drop(if step > 0 { incoming.finish_state().map(drop) } else { incoming.finish().map(drop) });
        }
    });
});
