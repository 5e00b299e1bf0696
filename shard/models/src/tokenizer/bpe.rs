//! Byte-level BPE from `vocab.json` and `merges.txt`.
//!
//! Follows `transformers/models/clip/tokenization_clip.py` and `models/qwen2/tokenization_qwen2.py` (5.23.0).

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};
use tokenizers::models::bpe::BPE;
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

use super::{SpecialTokens, guard, malformed, read, read_json};
use crate::{Error, Result};

const CLIP_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub(super) fn load(dir: &Path, special: &SpecialTokens) -> Result<Tokenizer> {
    let class = special.class.as_deref().ok_or_else(|| malformed(dir, "tokenizer_config.json names no tokenizer_class"))?;
    match class.strip_suffix("Fast").unwrap_or(class) {
        "CLIPTokenizer" => clip(dir, special),
        "Qwen2Tokenizer" => qwen2(dir),
        other => Err(Error::Unsupported { field: "tokenizer_class".into(), value: other.to_owned() }),
    }
}

/// Lower case, white space to single blanks, words end in `</w>`, start and end marked.
fn clip(dir: &Path, special: &SpecialTokens) -> Result<Tokenizer> {
    let unknown = special.token("unk_token").map(|token| token.content.clone());
    let mut tokenizer = Tokenizer::new(model(dir, "</w>", unknown)?);
    pipeline(
        &mut tokenizer,
        dir,
        json!({"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]}),
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": CLIP_WORDS}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]}),
    )?;
    let mark = |name: &str| {
        let content = special.token(name).map(|token| token.content.clone());
        let content = content.ok_or_else(|| malformed(dir, format!("it names no {name}")))?;
        let id = tokenizer.token_to_id(&content).ok_or_else(|| malformed(dir, format!("its {name} is not in vocab.json")))?;
        Ok::<_, Error>((content, id))
    };
    let (end, start) = (mark("eos_token")?, mark("bos_token")?);
    tokenizer.with_post_processor(Some(RobertaProcessing::new(end, start).trim_offsets(false).add_prefix_space(false)));
    Ok(tokenizer)
}

/// Case and white space kept, nothing added.
fn qwen2(dir: &Path) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(model(dir, "", None)?);
    pipeline(
        &mut tokenizer,
        dir,
        json!({"type": "NFC"}),
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        ]}),
    )?;
    Ok(tokenizer)
}

fn model(dir: &Path, end_of_word: &str, unknown: Option<String>) -> Result<BPE> {
    let vocabulary: HashMap<String, u32> = read_json(&dir.join("vocab.json"))?;
    let vocabulary: tokenizers::models::bpe::Vocab = vocabulary.into_iter().collect();
    let mut builder = BPE::builder().vocab_and_merges(vocabulary, merges(&dir.join("merges.txt"))?);
    if !end_of_word.is_empty() {
        builder = builder.end_of_word_suffix(end_of_word.to_owned());
    }
    if let Some(token) = unknown {
        builder = builder.unk_token(token);
    }
    guard(&dir.join("merges.txt"), || builder.build())
}

/// One pair a line, the most frequent first, after a line of comment.
fn merges(path: &Path) -> Result<Vec<(String, String)>> {
    let text = String::from_utf8(read(path)?).map_err(|e| malformed(path, e))?;
    let comment = |i: usize, line: &str| i == 0 && line.starts_with("#version");
    let lines = text.lines().enumerate().filter(|(i, line)| !line.is_empty() && !comment(*i, line));
    let pair = |(i, line): (usize, &str)| match line.split_once(' ') {
        Some((a, b)) if !b.contains(' ') => Ok((a.to_owned(), b.to_owned())),
        _ => Err(malformed(path, format!("line {} is not a pair", i + 1))),
    };
    lines.map(pair).collect()
}

fn pipeline(tokenizer: &mut Tokenizer, dir: &Path, normalizer: Value, words: Value) -> Result<()> {
    let normalizer: NormalizerWrapper = serde_json::from_value(normalizer).map_err(|e| malformed(dir, e))?;
    let words: PreTokenizerWrapper = serde_json::from_value(words).map_err(|e| malformed(dir, e))?;
    tokenizer.with_normalizer(Some(normalizer)).map_err(|e| malformed(dir, e))?;
    tokenizer.with_pre_tokenizer(Some(words));
    Ok(())
}
