//! Prompts of any Unicode, up to the longest that is taken, through every kind of tokenizer: exactly as many ids as asked for, all
//! within the vocabulary.
#![no_main]

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::LazyLock;

use flate2::read::GzDecoder;
use libfuzzer_sys::fuzz_target;
use models::tokenizer::Tokenizer;

static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tokenizers");
    let load = |name: &&str| Tokenizer::load(unpacked(&cases.join(name)).path()).expect("a tokenizer");
    ["clip_l", "t5", "mt5", "qwen2_5"].iter().map(load).collect()
});

/// A copy of a folder in which nothing is packed.
fn unpacked(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a folder");
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("a file").path();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let stored = File::open(&path).expect("a file");
        let (name, mut stored): (&str, Box<dyn Read>) = match file.strip_suffix(".gz") {
            Some(name) => (name, Box::new(GzDecoder::new(stored))),
            None => (&file, Box::new(stored)),
        };
        std::io::copy(&mut stored, &mut File::create(copy.path().join(name)).expect("a file")).expect("a copy");
    }
    copy
}

// Loaded before the first input: a vocabulary of 250,000 pieces takes the sanitizer longer than an input may.
fuzz_target!(init: { LazyLock::force(&TOKENIZERS); }, |input: (u16, u8, &str)| {
    let (length, repeats, text) = input;
    let (length, repeats) = (usize::from(length % 513), usize::from(repeats));
    // Some inputs as long as a prompt may be: through one tokenizer, since the sanitizer makes that a matter of seconds.
    let (most, tokenizers) = match repeats {
        255 => (proto::MAX_PROMPT_CHARS, std::slice::from_ref(&TOKENIZERS[length % TOKENIZERS.len()])),
        _ => (400, TOKENIZERS.as_slice()),
    };
    let prompt: String =
        text.chars().cycle().take(if text.is_empty() { 0 } else { most.min(text.len() * (repeats + 1)) }).collect();
    for tokenizer in tokenizers {
        let Ok(encoding) = tokenizer.encode(&prompt, length) else {
            assert!(length < 4, "only what has no room for the closing token is refused");
            continue;
        };
        assert_eq!((encoding.input_ids.len(), encoding.attention_mask.len()), (length, length));
        let used = encoding.attention_mask.iter().take_while(|mask| **mask == 1).count();
        assert!(encoding.input_ids[used..].iter().all(|id| *id == tokenizer.pad_id()));
    }
});
