//! Hostile input is refused before it costs anything: each by the code that takes it from outside, with an error that names the field
//! or the file. Time and memory of each are printed; memory, which does not depend on the machine, is held to a limit.
//!
//! One test, since memory is the whole process's.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use coordinator::blobs::BlobStore;
use coordinator::checkpoints::{CheckpointLimits, CheckpointStore, Place};
use coordinator::config::Limits;
use coordinator::models_file;
use coordinator::request::{Context, Request};
use futures::stream;
use models::image_io::{PictureLimits, decode_picture};
use models::lora::file::AdapterFile;
use object_store::memory::InMemory;
use parallel::{DType, Device, Solo, Weights};
use peak_alloc::PeakAlloc;
use prost::Message;
use proto::v1::{
    Adapter, BlobHeader, CheckpointHeader, CheckpointKey, JobSpec, Lora, ModelCard, Parameter, PayloadHeader, Products,
    PutCheckpointRequest, TensorHeader, UploadBlobRequest, put_checkpoint_request, upload_blob_request::Part,
};
use worker::payload_wire::Incoming;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What a refusal may cost beside the input itself.
const MOST_EXTRA_MIB: f32 = 16.0;
const JOB: &str = "6fa459ea-ee8a-4ca4-894e-db77e160355e";

/// The error of an input that must not be taken; what it cost.
fn refused<T>(what: &str, named: &str, take: impl FnOnce() -> Result<T, String>) {
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage_as_mb();
    let started = Instant::now();
    let outcome = take().map(drop);
    let spent = started.elapsed();
    let extra = MEMORY.peak_usage_as_mb() - before;
    let error = outcome.expect_err(what);
    println!(
        "{what:<62} {:>9.3} ms {extra:>7.2} MiB  {}",
        spent.as_secs_f64() * 1e3,
        error.chars().take(110).collect::<String>()
    );
    assert!(error.contains(named), "{what}: `{error}` does not name `{named}`");
    assert!(error.len() < 4096, "{what}: an error of {} bytes", error.len());
    assert!(extra <= MOST_EXTRA_MIB, "{what}: {extra} MiB");
}

#[test]
fn each_hostile_input_is_refused_by_name_and_costs_no_memory() {
    pictures();
    let folder = tempfile::tempdir().unwrap();
    checkpoint_files(folder.path());
    jobs();
    names(folder.path());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    uploads(&runtime);
    checkpoints(&runtime);
    payloads();
}

fn pictures() {
    let decode = |bytes: &[u8]| decode_picture(bytes, &PictureLimits::default()).map_err(|error| error.to_string());
    let huge = png(30_000, 30_000);
    assert!(huge.len() < 1024);
    refused("a PNG of 30000 x 30000 in under 1 KB", "image", || decode(&huge));
    refused("a PNG of 2^31 - 1 x 2^31 - 1", "image", || decode(&png(i32::MAX as u32, i32::MAX as u32)));
    refused("a PNG of 8000 x 8000, which is within both sides", "image", || decode(&png(8000, 8000)));
    refused("a PNG of 4000 x 4000 whose pixels are missing", "image", || decode(&png(4000, 4000)));
    refused("a JPEG of 65535 x 65535", "image", || decode(&jpeg(65_535, 65_535)));
    refused("a WebP of 16384 x 16384", "image", || decode(&webp(16_384, 16_384)));
    refused("a GIF", "image", || decode(b"GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\xff\xff\x00\x00\x00;"));
}

fn checkpoint_files(folder: &Path) {
    let path = folder.join("model.safetensors");
    let weights = || Weights::open(folder, Arc::new(Solo), DType::F32, &Device::Cpu).map_err(|error| error.to_string());
    let adapter = || AdapterFile::open(&path).map_err(|error| error.to_string());
    let both = |what: &str, named: &str| {
        refused(&format!("weights: {what}"), named, weights);
        refused(&format!("adapter: {what}"), named, adapter);
    };
    // Sparse: as long as it claims, and no more than a block of disk.
    let claim = |header: u64, file: u64| {
        std::fs::write(&path, header.to_le_bytes()).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(file).unwrap();
    };
    claim(100_000_000, 100_000_008);
    both("a header of 100 MB", "model.safetensors");
    claim(u64::MAX, 16);
    both("a header of 2^64 - 1 bytes", "model.safetensors");
    claim(8 << 20, 1 << 20);
    both("a header beyond the file", "truncated");
    let entry = |i: usize| format!(r#""t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
    whole(&path, &(0..100_000).map(entry).collect::<Vec<_>>().join(","), 0);
    both("100,000 entries", "more than 20000 tensors");
    let dims = vec!["1"; 2_000_000].join(",");
    whole(&path, &format!(r#""t":{{"dtype":"U8","shape":[{dims}],"data_offsets":[0,1]}}"#), 1);
    both("a shape of two million dimensions", "more than 8 dimensions");
    let shape = "[4611686018427387904,4611686018427387904]";
    whole(&path, &format!(r#""t":{{"dtype":"F32","shape":{shape},"data_offsets":[0,8]}}"#), 8);
    both("a shape whose product overflows", "model.safetensors");
    whole(&path, r#""t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#, 7);
    both("a byte too few", "truncated");
    whole(&path, &"[".repeat(1 << 20), 0);
    both("a million brackets", "model.safetensors");
    std::fs::remove_file(&path).unwrap();
    let index = r#"{"weight_map":{"a":"../../etc/passwd"}}"#;
    std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    refused("weights: an index that names ../../etc/passwd", "not a plain file name", weights);
    std::fs::remove_file(folder.join("model.safetensors.index.json")).unwrap();

    let path = folder.join("model.gguf");
    let gguf = |what: &str, named: &str, tensors: u64, entries: u64, rest: &[u8], zeros: u64| {
        let bytes = [&b"GGUF"[..], &3u32.to_le_bytes(), &tensors.to_le_bytes(), &entries.to_le_bytes(), rest].concat();
        std::fs::write(&path, &bytes).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(bytes.len() as u64 + zeros).unwrap();
        refused(&format!("GGUF: {what}"), named, weights);
    };
    gguf("2^64 - 1 tensors", "more than 20000 tensors", u64::MAX, 0, &[], 0);
    gguf("2^64 - 1 entries of metadata", "entries of metadata", 0, u64::MAX, &[], 0);
    let list = |kind: u32, count: u64| {
        [&1u64.to_le_bytes()[..], b"k", &9u32.to_le_bytes(), &kind.to_le_bytes(), &count.to_le_bytes()].concat()
    };
    gguf("a list of 2^64 - 1 texts", "truncated", 0, 1, &list(8, u64::MAX), 1 << 20);
    // A parser that keeps them pays thirty times their bytes.
    gguf("a list of thirty million bytes, then nothing", "truncated", 1, 1, &list(0, 30 << 20), 30 << 20);
    let tensor = |dims: [u64; 2]| {
        let dims = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect::<Vec<u8>>();
        [&1u64.to_le_bytes()[..], b"w", &2u32.to_le_bytes(), &dims, &8u32.to_le_bytes(), &0u64.to_le_bytes()].concat()
    };
    gguf("a shape whose product overflows", "goes beyond the file", 1, 0, &tensor([1 << 62, 1 << 62]), 64);
    std::fs::remove_file(&path).unwrap();
}

/// A safetensors file of these entries.
fn whole(path: &Path, entries: &str, data: usize) {
    let header = format!("{{{entries}}}");
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
    std::fs::write(path, bytes).unwrap();
}

fn jobs() {
    let card = card();
    let parse = |bytes: &[u8]| {
        let spec = JobSpec::decode(bytes).map_err(|error| format!("not a job: {error}"))?;
        let context = Context { seed: 7, max_pixels: 10 * 2048 * 2048, missing_blobs: &[] };
        Request::parse(spec, &card, context).map_err(|error| error.to_string())
    };
    let job = JobSpec { model: "model".into(), prompt: "a red car".into(), ..JobSpec::default() };
    parse(&job.encode_to_vec()).expect("the job itself is taken");
    let refuse = |what: &str, field: &str, job: JobSpec| {
        let bytes = job.encode_to_vec();
        assert!(bytes.len() <= proto::MAX_MESSAGE_BYTES, "{what}: no message has {} bytes", bytes.len());
        refused(what, field, || parse(&bytes));
    };
    let long = || "馬".repeat(proto::MAX_PROMPT_CHARS + 1);
    refuse("a prompt of 32,001 characters", "spec.prompt", JobSpec { prompt: long(), ..job.clone() });
    refuse("a second prompt of 32,001 characters", "spec.prompt_2", JobSpec { prompt_2: Some(long()), ..job.clone() });
    refuse("a negative prompt of 32,001", "spec.negative_prompt", JobSpec { negative_prompt: Some(long()), ..job.clone() });
    refuse("a prompt that is a whole message", "spec.prompt", JobSpec { prompt: "a".repeat(1 << 19), ..job.clone() });
    for (what, value) in [("NaN", f64::NAN), ("infinity", f64::INFINITY)] {
        refuse(&format!("guidance of {what}"), "spec.guidance_scale", JobSpec { guidance_scale: Some(value), ..job.clone() });
        let loras = vec![Lora { name: "a".into(), scale: Some(value) }];
        refuse(&format!("an adapter's scale of {what}"), "spec.loras[0].scale", JobSpec { loras, ..job.clone() });
    }
    let sides = |width, height| JobSpec { width: Some(width), height: Some(height), ..job.clone() };
    refuse("10^9 pixels", "spec.width", sides(32_000, 31_264));
    refuse(
        "2^64 pixels of 2^32 pictures",
        "spec.width",
        JobSpec { num_images_per_prompt: Some(u32::MAX), ..sides(u32::MAX - 15, u32::MAX - 15) },
    );
    refuse("no pixels", "spec.width", sides(0, 0));
    refuse(
        "a million blocks to skip",
        "spec.skip_guidance_layers",
        JobSpec { skip_guidance_layers: vec![99; 1_000_000], ..job.clone() },
    );
    let many = vec![Lora { name: "a".into(), scale: None }; 100_000];
    refuse("100,000 adapters", "spec.loras", JobSpec { loras: many, ..job.clone() });
    for name in ["../../etc/passwd", "/etc/passwd", "..", "a\0b", "https://example.org/a.safetensors"] {
        let loras = vec![Lora { name: name.into(), scale: None }];
        refuse(&format!("an adapter named {name:?}"), "spec.loras[0].name", JobSpec { loras, ..job.clone() });
    }
    for id in ["../../etc/passwd", "https://example.org/a.png", &"A".repeat(64)] {
        let job = JobSpec { image_blob_id: id.into(), ..job.clone() };
        refuse(&format!("a picture named {id:?}"), "spec.image_blob_id", job);
    }
    refused("bytes that are no job", "not a job", || parse(&[0xff; 1 << 16]));
}

fn names(folder: &Path) {
    let parse = |text: &str| models_file::parse(text, Path::new("models.toml"), folder).map_err(|error| error.to_string());
    let adapter = |name: &str| {
        format!("[[model]]\nname = \"m\"\npath = \"m\"\n[[adapter]]\nname = {name:?}\npath = \"a\"\nmodels = [\"m\"]\n")
    };
    parse(&adapter("mono")).expect("the file itself is taken");
    for name in ["../mono", "a/b", ""] {
        refused(&format!("models.toml: an adapter named {name:?}"), "models.toml", || parse(&adapter(name)));
    }
    refused("models.toml: 65536 ranks", "models.toml", || {
        parse("[[model]]\nname = \"m\"\npath = \"m\"\n[model.components.transformer]\ntp = 8\nblock_ranges = 8192\n")
    });
}

fn uploads(runtime: &tokio::runtime::Runtime) {
    let limits = Limits::default();
    let place = Place::Memory(Arc::new(InMemory::new()));
    let store = runtime.block_on(BlobStore::open_in_memory(&place, &limits)).unwrap();
    let receive = |header: BlobHeader, chunks: Vec<Vec<u8>>, breaks_off: bool| {
        let parts = std::iter::once(Part::Header(header)).chain(chunks.into_iter().map(|chunk| Part::Chunk(chunk.into())));
        let mut parts: Vec<_> = parts.map(|part| Ok(UploadBlobRequest { part: Some(part) })).collect();
        if breaks_off {
            parts.push(Err(tonic::Status::cancelled("gone")));
        }
        runtime.block_on(store.receive(stream::iter(parts))).map_err(|error| error.to_string())
    };
    let header = |byte_size| BlobHeader { byte_size, media_type: "image/png".into(), sha256: String::new() };
    let chunk = || vec![7u8; 1000];
    refused("an upload of 10^12 bytes", "header.byte_size", || receive(header(1_000_000_000_000), vec![chunk()], false));
    refused("an upload of 2^64 - 1 bytes", "header.byte_size", || receive(header(u64::MAX), vec![chunk()], false));
    refused("an upload that ends early", "header.byte_size", || receive(header(5000), vec![chunk(); 4], false));
    refused("an upload that goes on", "header.byte_size", || receive(header(5000), vec![chunk(); 6], false));
    refused("an upload that breaks off", "chunk", || receive(header(5000), vec![chunk(); 2], true));
    refused("an upload of another type", "header.media_type", || {
        receive(BlobHeader { media_type: "application/x-pickle".into(), ..header(1000) }, vec![chunk()], false)
    });
    refused("an upload that is not what it says", "header.sha256", || {
        receive(BlobHeader { sha256: "0".repeat(64), ..header(1000) }, vec![chunk()], false)
    });
    assert_eq!(store.bytes(), 0, "refused uploads give back what they had of the store");
}

fn checkpoints(runtime: &tokio::runtime::Runtime) {
    use put_checkpoint_request::Part;
    let place = Place::Memory(Arc::new(InMemory::new()));
    let store = runtime.block_on(CheckpointStore::open(&place, CheckpointLimits::default(), Arc::new(|_| true))).unwrap();
    let put = |header: CheckpointHeader| {
        let parts = [Part::Header(header), Part::Chunk(vec![0; 8].into())];
        let parts: Vec<_> = parts.map(|part| Ok(PutCheckpointRequest { part: Some(part) })).into();
        runtime.block_on(store.put(stream::iter(parts))).map_err(|error| error.to_string())
    };
    let tensor = |shape: &[u64]| TensorHeader { name: "latents".into(), dtype: "f32".into(), shape: shape.to_vec() };
    let header = |job_id: &str, tensors: Vec<TensorHeader>| CheckpointHeader {
        key: Some(CheckpointKey { job_id: job_id.into(), stage: "denoise".into(), step: 3, products: Products::F32.into() }),
        kind: "denoise_state".into(),
        tensors,
        sha256: vec![0; 32].into(),
        byte_size: 8,
        model_digest: String::new(),
    };
    refused("a checkpoint of job ../../etc", "key.job_id", || put(header("../../etc", vec![tensor(&[2])])));
    refused("a checkpoint of 50,000 tensors", "tensors", || put(header(JOB, vec![tensor(&[2]); 50_000])));
    refused("a checkpoint whose shape overflows", "tensors[latents]", || put(header(JOB, vec![tensor(&[1 << 40, 1 << 40])])));
    refused("a checkpoint whose overflow hides behind a 0", "tensors[latents]", || {
        put(header(JOB, vec![tensor(&[0, 1 << 40, 1 << 40])]))
    });
    refused("a checkpoint of other bytes than its shape", "byte_size", || put(header(JOB, vec![tensor(&[3])])));
    assert_eq!(store.bytes(), 0);
}

fn payloads() {
    let take = |shape: &[u64], bytes: usize| {
        let tensors = vec![TensorHeader { name: "prompt_embeds".into(), dtype: "f32".into(), shape: shape.to_vec() }];
        let header =
            PayloadHeader { kind: "conditioning".into(), tensors, sha256: vec![0; 32].into(), ..PayloadHeader::default() };
        let mut incoming = Incoming::new(header).map_err(|error| error.to_string())?;
        incoming.push(&vec![0; bytes]).map_err(|error| error.to_string())?;
        incoming.finish().map_err(|error| error.to_string())
    };
    refused("embeddings of 10^18 elements", "header.tensors[prompt_embeds]", || take(&[1, 1_000_000_000, 1_000_000_000], 8));
    refused("embeddings of nine dimensions", "header.tensors[prompt_embeds]", || take(&[1; 9], 4));
    refused("embeddings whose overflow hides behind a 0", "header.tensors[prompt_embeds]", || take(&[0, 1 << 62, 1 << 62], 0));
    refused("embeddings of more bytes than their shape", "chunk", || take(&[1, 2], 12));
    refused("embeddings of fewer bytes than their shape", "chunk", || take(&[1, 512, 4096], 12));
    refused("embeddings that are not what was announced", "header.sha256", || take(&[1, 2], 8));
}

fn card() -> ModelCard {
    let number = |name: &str, minimum, maximum| Parameter { name: name.into(), minimum, maximum, ..Parameter::default() };
    let fields =
        ["prompt_2", "negative_prompt", "image_blob_id"].map(|name| Parameter { name: name.into(), ..Parameter::default() });
    let numbers = [
        number("width", 16.0, 1e10),
        number("height", 16.0, 1e10),
        number("guidance_scale", 0.0, 20.0),
        number("num_images_per_prompt", 1.0, 1e10),
        number("skip_guidance_layers", 0.0, 23.0),
    ];
    ModelCard {
        name: "model".into(),
        parameters: fields.into_iter().chain(numbers).collect(),
        max_pixels: u64::MAX,
        adapters: vec![Adapter { name: "a".into(), ..Adapter::default() }],
        ..ModelCard::default()
    }
}

/// A header, a few bytes where its pixels should be, and an end.
fn png(width: u32, height: u32) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().unwrap();
    writer.write_chunk(png::chunk::IDAT, &[0x78, 0x9c, 0x63, 0x00, 0x00, 0x00, 0x01, 0x00, 0x01]).unwrap();
    drop(writer);
    file
}

/// A frame header of three channels and the beginning of a scan.
fn jpeg(width: u16, height: u16) -> Vec<u8> {
    let [h, w] = [height, width].map(u16::to_be_bytes);
    let mut file = vec![0xff, 0xd8, 0xff, 0xc0, 0, 17, 8, h[0], h[1], w[0], w[1], 3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0];
    file.extend([0xff, 0xda, 0, 12, 3, 1, 0, 2, 0, 3, 0, 0, 63, 0]);
    file.extend([0; 64]);
    file
}

/// An extended header with a canvas, and a lossy frame of nothing.
fn webp(width: u32, height: u32) -> Vec<u8> {
    let side = |side: u32| (side - 1).to_le_bytes()[..3].to_vec();
    let canvas = [vec![0, 0, 0, 0], side(width), side(height)].concat();
    let chunks =
        [b"VP8X".to_vec(), 10u32.to_le_bytes().to_vec(), canvas, b"VP8 ".to_vec(), 10u32.to_le_bytes().to_vec(), vec![0; 10]];
    let chunks = chunks.concat();
    [b"RIFF".to_vec(), (chunks.len() as u32 + 4).to_le_bytes().to_vec(), b"WEBP".to_vec(), chunks].concat()
}
