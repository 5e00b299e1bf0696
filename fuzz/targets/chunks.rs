//! Streams of a header and chunks: uploads of clients at the coordinator, payloads between workers. Whole and as announced, or refused.
#![no_main]

use std::sync::Arc;

use bytes::Bytes;
use coordinator::blobs::BlobStore;
use coordinator::checkpoints::Place;
use coordinator::config::Limits;
use futures::stream;
use libfuzzer_sys::fuzz_target;
use object_store::memory::InMemory;
use prost::Message;
use proto::v1::{BlobHeader, PayloadHeader, UploadBlobRequest, upload_blob_request::Part};
use sha2::{Digest, Sha256};
use worker::payload_wire::Incoming;

/// `length header`, then chunks of `length bytes`.
fn pieces(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut pieces = Vec::new();
    while let Some((length, rest)) = bytes.split_first() {
        let (piece, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        pieces.push(piece);
        bytes = rest;
    }
    pieces
}

fn payload(header: &[u8], chunks: &[&[u8]], honest: bool) {
    let Ok(mut header) = PayloadHeader::decode(header) else { return };
    let whole: Vec<u8> = chunks.concat();
    if honest {
        header.sha256 = Bytes::copy_from_slice(&Sha256::digest(&whole));
    }
    let Ok(mut incoming) = Incoming::new(header) else { return };
    let expected = incoming.byte_size();
    if chunks.iter().any(|chunk| incoming.push(chunk).is_err()) {
        assert!(whole.len() as u64 > expected, "more than was announced");
        return;
    }
    if let Ok(payload) = incoming.finish() {
        assert_eq!(whole.len() as u64, expected);
        assert_eq!(payload.tensors().byte_size() as u64, expected);
    }
}

fn upload(header: &[u8], chunks: &[&[u8]], honest: bool) {
    let whole: Vec<u8> = chunks.concat();
    let header = if honest {
        BlobHeader { byte_size: whole.len() as u64, sha256: String::new(), media_type: "image/png".into() }
    } else {
        let Ok(header) = BlobHeader::decode(header) else { return };
        header
    };
    let announced = header.byte_size;
    let chunk = |chunk: &&[u8]| Part::Chunk(Bytes::copy_from_slice(chunk));
    let parts = std::iter::once(Part::Header(header)).chain(chunks.iter().map(chunk));
    let parts = stream::iter(parts.map(|part| Ok(UploadBlobRequest { part: Some(part) })).collect::<Vec<_>>());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let limits = Limits { blob_bytes: 1 << 10, total_blob_bytes: 1 << 11, ..Limits::default() };
        let store = BlobStore::open_in_memory(&Place::Memory(Arc::new(InMemory::new())), &limits).await.expect("a store");
        match store.receive(parts).await {
            Ok(id) => {
                assert!(store.contains(&id) && whole.len() as u64 == announced);
                assert_eq!(store.bytes(), announced);
            }
            Err(_) => assert_eq!(store.bytes(), 0, "a refused upload gives its share back"),
        }
    });
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, rest)) = bytes.split_first() else { return };
    let pieces = pieces(rest);
    let Some((header, chunks)) = pieces.split_first() else { return };
    let honest = kind & 1 == 1;
    if kind & 2 == 0 { payload(header, chunks, honest) } else { upload(header, chunks, honest) }
});
