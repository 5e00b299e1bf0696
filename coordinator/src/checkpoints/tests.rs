//! Checkpoints in a folder and in a real S3 server on loopback.

use std::{collections::HashSet, sync::RwLock};

use bytes::Bytes;
use futures::stream;
use hyper_util::rt::{TokioExecutor, TokioIo};
use object_store::aws::AmazonS3Builder;
use proto::v1::{CheckpointHeader, TensorHeader, get_checkpoint_response};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;

use super::*;

const JOB: &str = "6b1c2b0e-7f7e-4a51-8a53-0d9c4d1f8a01";
const OTHER: &str = "6b1c2b0e-7f7e-4a51-8a53-0d9c4d1f8a02";

/// Something that happens to a file.
type Damage = dyn Fn(&mut Vec<u8>);

/// A place that lives as long as this.
pub(crate) struct Home {
    folder: tempfile::TempDir,
    pub(crate) place: Place,
    live: Arc<RwLock<HashSet<String>>>,
}

impl Home {
    fn folder() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::Folder(folder.path().to_owned());
        Self::new(folder, place)
    }

    pub(crate) async fn s3() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("pictures")).unwrap();
        let endpoint = serve_s3(folder.path()).await;
        let client = || {
            AmazonS3Builder::new()
                .with_endpoint(endpoint)
                .with_region("us-east-1")
                .with_access_key_id("key")
                .with_secret_access_key("secret")
        };
        let place = Place::parse("s3://pictures/atelier", client).unwrap();
        Self::new(folder, place)
    }

    fn new(folder: tempfile::TempDir, place: Place) -> Self {
        let live = [JOB, OTHER].map(str::to_owned).into_iter().collect();
        Self { folder, place, live: Arc::new(RwLock::new(live)) }
    }

    async fn open(&self) -> CheckpointStore {
        self.open_with(CheckpointLimits::default()).await
    }

    async fn open_with(&self, limits: CheckpointLimits) -> CheckpointStore {
        let live = self.live.clone();
        let is_live = Arc::new(move |job_id: &str| live.read().unwrap().contains(job_id));
        CheckpointStore::open(&self.place, limits, is_live).await.unwrap()
    }

    /// Every file of a checkpoint on the disk behind.
    fn files(&self) -> Vec<std::path::PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let is_stored = path.to_string_lossy().contains("/checkpoints/");
                if path.is_dir() {
                    folders.push(path);
                } else if is_stored && !path.file_name().unwrap().to_string_lossy().starts_with('.') {
                    found.push(path);
                }
            }
        }
        found
    }
}

async fn serve_s3(folder: &std::path::Path) -> String {
    let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(folder).unwrap());
    service.set_auth(SimpleAuth::from_single("key", "secret"));
    let service = service.build();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let service = service.clone();
            let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            tokio::spawn(async move { drop(server.serve_connection(TokioIo::new(socket), service).await) });
        }
    });
    endpoint
}

fn bytes(length: usize, seed: u32) -> Vec<u8> {
    (0..length as u32).map(|i| (i.wrapping_mul(seed * 2 + 7) >> 3) as u8).collect()
}

fn key(job_id: &str, products: Products, step: u32) -> CheckpointKey {
    CheckpointKey { job_id: job_id.into(), stage: "denoise".into(), step, products: products.into() }
}

fn header(job_id: &str, step: u32, bytes: &[u8]) -> CheckpointHeader {
    let kind = if step == 0 { "latents" } else { "denoise_state" };
    CheckpointHeader {
        key: Some(key(job_id, Products::F32, step)),
        kind: kind.into(),
        tensors: vec![TensorHeader { name: "latents".into(), dtype: "u8".into(), shape: vec![bytes.len() as u64] }],
        sha256: Bytes::copy_from_slice(&Sha256::digest(bytes)),
        byte_size: bytes.len() as u64,
        model_digest: "d".repeat(64),
    }
}

fn messages(header: CheckpointHeader, bytes: &[u8]) -> Vec<Result<PutCheckpointRequest, Status>> {
    let chunks = bytes.chunks(proto::CHUNK_BYTES).map(|chunk| Part::Chunk(Bytes::copy_from_slice(chunk)));
    let parts = std::iter::once(Part::Header(header)).chain(chunks);
    parts.map(|part| Ok(PutCheckpointRequest { part: Some(part) })).collect()
}

async fn put(store: &CheckpointStore, job_id: &str, step: u32, bytes: &[u8]) -> Result<(), CheckpointError> {
    store.put(stream::iter(messages(header(job_id, step, bytes), bytes))).await
}

async fn get(store: &CheckpointStore, job_id: &str, step: u32) -> Result<(CheckpointHeader, Vec<u8>), CheckpointError> {
    let parts: Vec<_> = store.get(Some(key(job_id, Products::F32, step))).await?.try_collect().await?;
    let mut header = None;
    let mut bytes = Vec::new();
    for part in parts {
        match part.part.unwrap() {
            get_checkpoint_response::Part::Header(found) => header = Some(found),
            get_checkpoint_response::Part::Chunk(chunk) => {
                assert!(chunk.len() <= proto::CHUNK_BYTES);
                bytes.extend_from_slice(&chunk);
            }
        }
    }
    Ok((header.unwrap(), bytes))
}

fn steps(store: &CheckpointStore, job_id: &str) -> Vec<u32> {
    store.list(job_id).into_iter().map(|saved| saved.step).collect()
}

/// All that a store does; the same in a folder and in S3.
async fn proves_itself(home: Home) {
    let store = home.open().await;
    // One request, and many parts.
    for (step, length) in [(1, 300_000), (2, 12_000_000), (3, 1), (4, 600_000)] {
        let sent = bytes(length, step);
        put(&store, JOB, step, &sent).await.unwrap();
        let (found, back) = get(&store, JOB, step).await.unwrap();
        assert!(found == header(JOB, step, &sent) && back == sent, "step {step} comes back bit for bit");
    }
    put(&store, JOB, 0, &bytes(100, 0)).await.unwrap();
    put(&store, OTHER, 9, &bytes(100, 9)).await.unwrap();
    assert_eq!(steps(&store, JOB), [0, 3, 4], "the output and the two newest states");
    let latest = get(&store, JOB, 1).await.unwrap().0;
    assert_eq!(latest.key.unwrap().step, 4, "the latest comes in place of one that is gone");
    assert!(matches!(get(&store, JOB, 5).await, Err(CheckpointError::NotFound(_))), "nothing earlier does");
    assert!(matches!(get(&store, OTHER, 0).await, Err(CheckpointError::NotFound(_))), "an output is no state");
    put(&store, JOB, 4, &bytes(50, 1)).await.unwrap();
    assert_eq!(get(&store, JOB, 4).await.unwrap().1, bytes(50, 1), "the newest put counts");

    // A try that began anew.
    put(&store, JOB, 1, &bytes(50, 1)).await.unwrap();
    put(&store, JOB, 2, &bytes(50, 1)).await.unwrap();
    assert_eq!(steps(&store, JOB), [0, 1, 2]);

    let reopened = home.open().await;
    assert_eq!((steps(&reopened, JOB), steps(&reopened, OTHER)), (vec![0, 1, 2], vec![9]));
    reopened.sweep(&[OTHER.to_owned()].into()).await;
    assert_eq!((steps(&reopened, JOB), steps(&reopened, OTHER)), (vec![], vec![9]));
    reopened.forget(OTHER).await;
    assert_eq!((home.files(), reopened.bytes()), (vec![], 0));

    // The coordinator before does not know yet that it is followed by another, and what it stores late is found.
    put(&store, JOB, 1, &bytes(50, 1)).await.unwrap();
    put(&store, OTHER, 1, &bytes(50, 1)).await.unwrap();
    home.live.write().unwrap().remove(JOB);
    reopened.sweep(&[OTHER.to_owned()].into()).await;
    assert_eq!((steps(&reopened, JOB), steps(&reopened, OTHER), home.files().len()), (vec![1], vec![], 2));
    reopened.sweep(&[OTHER.to_owned()].into()).await;
    assert_eq!((steps(&reopened, JOB), home.files().len()), (vec![], 1));
    home.live.write().unwrap().insert(JOB.to_owned());
    store.forget(OTHER).await;

    // What is not as announced leaves nothing.
    let store = reopened;
    let sent = bytes(7_000_000, 1);
    let mut cut = messages(header(JOB, 1, &sent), &sent);
    cut.pop();
    assert!(matches!(store.put(stream::iter(cut)).await, Err(CheckpointError::Invalid { field, .. }) if field == "chunk"));
    let mut broken = messages(header(JOB, 1, &sent), &sent);
    broken.truncate(13);
    broken.push(Err(Status::cancelled("gone")));
    assert!(store.put(stream::iter(broken)).await.is_err());
    let mut flipped = sent.clone();
    flipped[6_900_000] ^= 1;
    let flipped = messages(header(JOB, 1, &sent), &flipped);
    assert!(matches!(store.put(stream::iter(flipped)).await, Err(CheckpointError::Invalid { field, .. }) if field == "sha256"));
    assert!(matches!(get(&store, JOB, 1).await, Err(CheckpointError::NotFound(_))));
    assert_eq!(home.files(), Vec::<std::path::PathBuf>::new());

    // What was damaged afterwards is not given.
    put(&store, JOB, 1, &bytes(900_000, 1)).await.unwrap();
    let file = home.files().pop().unwrap();
    let whole = std::fs::read(&file).unwrap();
    let damages: [&Damage; 4] =
        [&|bytes| bytes[800_000] ^= 1, &|bytes| bytes.truncate(900_000), &|bytes| bytes[1] ^= 1, &|bytes| bytes.clear()];
    for damage in damages {
        let mut bytes = whole.clone();
        damage(&mut bytes);
        std::fs::write(&file, bytes).unwrap();
        let error = get(&store, JOB, 1).await.unwrap_err();
        assert!(matches!(error, CheckpointError::Damaged(_)), "{error:?}");
    }
    std::fs::write(&file, whole).unwrap();

    // A job that is over.
    home.live.write().unwrap().remove(JOB);
    let over = put(&store, JOB, 2, &bytes(10, 1)).await.unwrap_err();
    assert_eq!(Status::from(over).code(), Code::FailedPrecondition);
    assert_eq!(steps(&store, JOB), [1]);
}

#[tokio::test]
async fn checkpoints_in_a_folder() {
    proves_itself(Home::folder()).await;
}

#[tokio::test]
async fn checkpoints_in_s3() {
    proves_itself(Home::s3().await).await;
}

#[tokio::test]
async fn what_was_multiplied_in_another_way_is_another_checkpoint() {
    let home = Home::folder();
    let store = home.open().await;
    let put_in = async |products: Products, step: u32| {
        let sent = bytes(50, step);
        let header = CheckpointHeader { key: Some(key(JOB, products, step)), ..header(JOB, step, &sent) };
        store.put(stream::iter(messages(header, &sent))).await.unwrap();
    };
    for step in [1, 2, 3] {
        put_in(Products::Bf16, step).await;
    }
    // Stored late, by a worker that was given up and does not know it.
    put_in(Products::F32, 7).await;
    put_in(Products::F32, 0).await;
    let way = |products: Products, step: u32| Saved { stage: "denoise".into(), step, products };
    let expected = [way(Products::F32, 0), way(Products::F32, 7), way(Products::Bf16, 2), way(Products::Bf16, 3)];
    assert_eq!(store.list(JOB), expected, "of each way the newest are kept");
    let found = async |products: Products, step: u32| match store.get(Some(key(JOB, products, step))).await {
        Ok(parts) => match parts.try_collect::<Vec<_>>().await.unwrap().swap_remove(0).part {
            Some(get_checkpoint_response::Part::Header(header)) => header.key,
            _ => None,
        },
        Err(error) => panic!("{error}"),
    };
    assert_eq!(found(Products::Bf16, 1).await, Some(key(JOB, Products::Bf16, 3)), "a later state serves, in the same way");
    for (products, step) in [(Products::Bf16, 4), (Products::Bf16, 0), (Products::Amx, 1), (Products::Unspecified, 7)] {
        let error = store.get(Some(key(JOB, products, step))).await.err().unwrap();
        assert!(matches!(error, CheckpointError::NotFound(_)), "{products} {step}: {error:?}");
    }

    // As an older program named it: it is known as such, and goes with the others.
    let older = home.folder.path().join("checkpoints").join(JOB).join("denoise").join("5");
    std::fs::write(&older, b"older").unwrap();
    let reopened = home.open().await;
    assert_eq!(reopened.list(JOB)[0], way(Products::Unspecified, 5));
    assert_eq!(reopened.list(JOB)[1..], expected);
    reopened.forget(JOB).await;
    assert_eq!(home.files(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn a_server_that_is_away_is_an_error_in_time() {
    let client =
        || AmazonS3Builder::new().with_endpoint("http://127.0.0.1:1").with_access_key_id("k").with_secret_access_key("s");
    let place = Place::parse("s3://pictures", client).unwrap();
    let opened = CheckpointStore::open(&place, CheckpointLimits::default(), Arc::new(|_| true));
    assert!(timeout(Duration::from_secs(20), opened).await.expect("in time").is_err());
}

#[tokio::test]
async fn the_store_has_limits() {
    let home = Home::folder();
    let store = home.open_with(CheckpointLimits { bytes: 1000, total_bytes: 1500 }).await;
    put(&store, JOB, 1, &bytes(1000, 1)).await.unwrap();
    assert!(matches!(put(&store, JOB, 2, &bytes(1001, 1)).await, Err(CheckpointError::TooLarge { limit: 1000 })));
    assert!(matches!(put(&store, JOB, 2, &bytes(501, 1)).await, Err(CheckpointError::Full(1500))));
    store.forget(JOB).await;
    put(&store, JOB, 2, &bytes(501, 1)).await.unwrap();
}

#[tokio::test]
async fn a_header_is_checked_before_anything_is_stored() {
    let home = Home::folder();
    let store = home.open().await;
    let sent = bytes(10, 1);
    let check = async |change: &dyn Fn(&mut CheckpointHeader), named: &str| {
        let mut header = header(JOB, 1, &sent);
        change(&mut header);
        let error = store.put(stream::iter(messages(header, &sent))).await.unwrap_err();
        assert!(error.to_string().contains(named), "`{error}` does not name `{named}`");
        let status = Status::from(error);
        assert!(status.get_error_details().error_info().is_some());
    };
    let key = |job_id: &str, stage: &str| Some(CheckpointKey { stage: stage.into(), ..key(job_id, Products::F32, 1) });
    let in_way = |products: i32| Some(CheckpointKey { products, ..key(JOB, "denoise").unwrap_or_default() });
    check(&|h| h.key = None, "key").await;
    for job_id in ["", "..", "../../etc", &JOB.to_uppercase(), &JOB.replace('-', "")] {
        check(&|h| h.key = key(job_id, "denoise"), "key.job_id").await;
    }
    for stage in ["", "..", "a/b", "Denoise", "a.b", &"a".repeat(65)] {
        check(&|h| h.key = key(JOB, stage), "key.stage").await;
    }
    for way in [Products::Unspecified as i32, -1, 99] {
        check(&|h| h.key = in_way(way), "key.products").await;
    }
    check(&|h| h.kind = "image".into(), "kind").await;
    check(&|h| h.kind = "latents".into(), "key.step").await;
    check(&|h| h.sha256 = Bytes::from_static(b"short"), "sha256").await;
    check(&|h| h.tensors.clear(), "tensors").await;
    check(&|h| h.tensors[0].dtype = "i4".into(), "dtype").await;
    check(&|h| h.tensors[0].name.clear(), "name").await;
    check(&|h| h.tensors[0].shape = vec![u64::MAX, 2], "too large").await;
    check(&|h| h.tensors[0].shape = vec![1; 9], "dimensions").await;
    check(&|h| h.byte_size = 11, "byte_size").await;
    check(&|h| h.model_digest = "d".repeat(65), "model_digest").await;
    assert_eq!((home.files(), store.bytes()), (vec![], 0));
}

#[tokio::test]
async fn what_a_new_try_stores_does_not_go_with_what_was_no_good() {
    let home = Home::folder();
    let store = home.open().await;
    let (done_with, mut done) = DoneWith::new(store.clone());
    for step in [0, 1, 2] {
        put(&store, JOB, step, &bytes(100, 1)).await.unwrap();
    }
    put(&store, OTHER, 1, &bytes(100, 1)).await.unwrap();
    done_with.with_what_there_is(JOB.to_owned());
    // The next try is quicker than whoever removes.
    for step in [1, 3] {
        put(&store, JOB, step, &bytes(100, 2)).await.unwrap();
    }
    done.recv().await.unwrap().remove(&store).await;
    let steps = |job: &str| store.list(job).into_iter().map(|saved| saved.step).collect::<Vec<_>>();
    assert_eq!((steps(JOB), steps(OTHER)), (vec![1, 3], vec![1]));
    assert_eq!(get(&store, JOB, 1).await.unwrap().1, bytes(100, 2), "it was overwritten, and stays");
    done_with.with_job(JOB.to_owned());
    put(&store, JOB, 4, &bytes(100, 2)).await.unwrap();
    done.recv().await.unwrap().remove(&store).await;
    assert_eq!(steps(JOB), [0; 0]);
}
