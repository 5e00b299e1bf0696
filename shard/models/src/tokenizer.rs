//! Text to token ids, as the reference's tokenizers give them.
//!
//! The algorithms are the `tokenizers` crate's. A folder holds either its `tokenizer.json`, or a vocabulary from which the
//! pipeline is put together here as `transformers` does: `vocab.json` + `merges.txt` (`bpe.rs`: CLIP, Qwen2), or a bare
//! `spiece.model` (`sentencepiece.rs`: T5, mT5), or `vocab.txt` (`wordpiece.rs`: BERT). Where the two differ on mT5, sentencepiece is followed: characters that no
//! piece covers become bytes, not `<unk>`.

mod bpe;
mod sentencepiece;
mod wordpiece;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokenizers::AddedToken;

use crate::{Error, Result};

/// Longest tokenizer file that is read; Qwen2.5's tokenizer.json is 7 MB, mT5's is 16 MB.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// A text as a text encoder takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoding {
    /// `max_length` ids.
    pub input_ids: Vec<u32>,
    /// One for a token, zero for padding.
    pub attention_mask: Vec<u32>,
}

/// A tokenizer and its padding.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pad_id: u32,
    /// Whether texts are taken in lower case and without white space around them.
    captions: bool,
}

impl Tokenizer {
    /// Reads a tokenizer's folder.
    ///
    /// # Errors
    /// When files are missing, malformed, or of a kind that is not known here; the error names the file.
    pub fn load(dir: &Path) -> Result<Self> {
        let special = SpecialTokens::read(dir)?;
        let whole = dir.join("tokenizer.json");
        let mut inner = if whole.is_file() {
            let bytes = read(&whole)?;
            guard(&whole, || tokenizers::Tokenizer::from_bytes(&bytes))?
        } else if dir.join("vocab.json").is_file() {
            bpe::load(dir, &special)?
        } else if dir.join("spiece.model").is_file() {
            sentencepiece::load(&dir.join("spiece.model"), &special)?
        } else if dir.join("vocab.txt").is_file() {
            wordpiece::load(dir, &special)?
        } else {
            return Err(malformed(dir, "there is no tokenizer.json, vocab.json, spiece.model or vocab.txt"));
        };
        // Length is the caller's business.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| malformed(dir, e))?;
        special.add_to(&mut inner, dir)?;
        let pad = special.token("pad_token").ok_or_else(|| malformed(dir, "it names no pad_token"))?;
        let pad_id = inner.token_to_id(&pad.content).ok_or_else(|| malformed(dir, "its pad_token is not in the vocabulary"))?;
        let tokenizer = Self { inner, pad_id, captions: false };
        // A table that points outside itself shows when it is used.
        tokenizer.ids("A photo of naïve ①２ 日本 😀.").map_err(|e| malformed(dir, e))?;
        Ok(tokenizer)
    }

    /// The same, of texts in lower case and without white space around them: PixArt's and IF's captions, before they are cleaned of markup.
    pub fn of_captions(self) -> Self {
        Self { captions: true, ..self }
    }

    /// The ids of `text`, exactly `max_length` of them: padded on the right, or cut so that the closing token stays.
    pub fn encode(&self, text: &str, max_length: usize) -> Result<Encoding> {
        let (mut input_ids, closing) = self.ids(text)?;
        if input_ids.len() > max_length {
            let kept = max_length.checked_sub(closing).ok_or_else(|| Error::Invalid {
                field: "max_sequence_length",
                reason: format!("{max_length} has no room for the closing token"),
            })?;
            let end = input_ids.split_off(input_ids.len() - closing);
            input_ids.truncate(kept);
            input_ids.extend(end);
        }
        let mut attention_mask = vec![1; input_ids.len()];
        input_ids.resize(max_length, self.pad_id);
        attention_mask.resize(max_length, 0);
        Ok(Encoding { input_ids, attention_mask })
    }

    /// How many ids `text` comes to, without padding or cutting.
    pub fn count(&self, text: &str) -> Result<usize> {
        Ok(self.ids(text)?.0.len())
    }

    /// What texts are padded with.
    pub fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// All ids of `text`, and how many of them close it.
    fn ids(&self, text: &str) -> Result<(Vec<u32>, usize)> {
        let caption = self.captions.then(|| text.to_lowercase());
        let text = caption.as_deref().map_or(text, str::trim);
        let encode = || self.inner.encode_fast(text, true);
        // The crate indexes the tables of its files unchecked. The error must not hold the text, nor does the panic's.
        let encoding = catch_unwind(AssertUnwindSafe(encode))
            .map_err(|_| Error::Tokenizer("its tables are inconsistent".into()))?
            .map_err(|e| Error::Tokenizer(e.to_string()))?;
        let closing = encoding.get_special_tokens_mask().iter().rev().take_while(|special| **special == 1).count();
        Ok((encoding.get_ids().to_vec(), closing))
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({} tokens, pad {})", self.inner.get_vocab_size(true), self.pad_id)
    }
}

/// What `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` say.
struct SpecialTokens {
    class: Option<String>,
    /// `bos_token`, `eos_token`, `unk_token`, `pad_token`, `cls_token`, `sep_token`, `mask_token`.
    named: BTreeMap<String, TokenEntry>,
    /// Without a name of their own.
    additional: Vec<TokenEntry>,
    /// With the id each must have.
    by_id: BTreeMap<u32, TokenEntry>,
    /// How many `<extra_id_N>` follow a T5 vocabulary.
    extra_ids: Option<usize>,
}

/// A token, written as a string or as an object.
#[derive(Clone, Deserialize)]
#[serde(from = "TokenForm")]
struct TokenEntry {
    content: String,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    single_word: bool,
    special: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenForm {
    Text(String),
    Full {
        content: String,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        #[serde(default)]
        normalized: bool,
        #[serde(default)]
        single_word: bool,
        special: Option<bool>,
    },
}

impl From<TokenForm> for TokenEntry {
    fn from(form: TokenForm) -> Self {
        match form {
            TokenForm::Text(content) => {
                Self { content, lstrip: false, rstrip: false, normalized: false, single_word: false, special: true }
            }
            TokenForm::Full { content, lstrip, rstrip, normalized, single_word, special } => {
                Self { content, lstrip, rstrip, normalized, single_word, special: special.unwrap_or(true) }
            }
        }
    }
}

impl TokenEntry {
    fn added(&self) -> AddedToken {
        AddedToken::from(self.content.as_str(), self.special)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized)
            .single_word(self.single_word)
    }
}

/// The keys shared by `tokenizer_config.json` and `special_tokens_map.json`.
#[derive(Default, Deserialize)]
struct TokensFile {
    tokenizer_class: Option<String>,
    bos_token: Option<TokenEntry>,
    eos_token: Option<TokenEntry>,
    unk_token: Option<TokenEntry>,
    pad_token: Option<TokenEntry>,
    cls_token: Option<TokenEntry>,
    sep_token: Option<TokenEntry>,
    mask_token: Option<TokenEntry>,
    additional_special_tokens: Option<Vec<TokenEntry>>,
    added_tokens_decoder: Option<BTreeMap<u32, TokenEntry>>,
    extra_ids: Option<usize>,
}

impl SpecialTokens {
    fn read(dir: &Path) -> Result<Self> {
        let config: TokensFile = read_json_if_there(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let map: TokensFile = read_json_if_there(&dir.join("special_tokens_map.json"))?.unwrap_or_default();
        let named = [
            ("bos_token", map.bos_token.or(config.bos_token)),
            ("eos_token", map.eos_token.or(config.eos_token)),
            ("unk_token", map.unk_token.or(config.unk_token)),
            ("pad_token", map.pad_token.or(config.pad_token)),
            ("cls_token", map.cls_token.or(config.cls_token)),
            ("sep_token", map.sep_token.or(config.sep_token)),
            ("mask_token", map.mask_token.or(config.mask_token)),
        ];
        let mut by_id = config.added_tokens_decoder.unwrap_or_default();
        if by_id.is_empty() {
            let added: Option<BTreeMap<String, u32>> = read_json_if_there(&dir.join("added_tokens.json"))?;
            by_id.extend(added.unwrap_or_default().into_iter().map(|(content, id)| (id, TokenForm::Text(content).into())));
        }
        Ok(Self {
            class: config.tokenizer_class,
            named: named.into_iter().filter_map(|(name, token)| Some((name.to_owned(), token?))).collect(),
            additional: map.additional_special_tokens.or(config.additional_special_tokens).unwrap_or_default(),
            by_id,
            extra_ids: config.extra_ids,
        })
    }

    fn token(&self, name: &str) -> Option<&TokenEntry> {
        self.named.get(name)
    }

    /// Makes `inner` cut these tokens out of a text before anything else happens to it.
    fn add_to(&self, inner: &mut tokenizers::Tokenizer, dir: &Path) -> Result<()> {
        let all = self.by_id.values().chain(self.named.values()).chain(&self.additional);
        let added: Vec<AddedToken> = all.map(TokenEntry::added).collect();
        guard(dir, || inner.add_tokens(added))?;
        // Tokens beyond the vocabulary are numbered in the order they are added in.
        match self.by_id.iter().find(|(id, token)| inner.token_to_id(&token.content) != Some(**id)) {
            Some((id, token)) => Err(malformed(dir, format!("its added token `{}` cannot have the id {id}", token.content))),
            None => Ok(()),
        }
    }
}

/// Runs `build` on what was read from `path`; whatever the tokenizers crate makes of a malformed file is a typed error.
fn guard<T>(path: &Path, build: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(build))
        .map_err(|_| malformed(path, "its tables are inconsistent"))?
        .map_err(|e| malformed(path, e))
}

fn malformed(path: &Path, reason: impl fmt::Display) -> Error {
    Error::ModelDir { path: path.to_owned(), reason: reason.to_string() }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let io = |source| Error::from(parallel::Error::Io { path: PathBuf::from(path), source });
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > MAX_FILE_BYTES {
        return Err(malformed(path, format!("it has {size} bytes; the limit is {MAX_FILE_BYTES}")));
    }
    std::fs::read(path).map_err(io)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&read(path)?).map_err(|e| malformed(path, e))
}

fn read_json_if_there<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if path.is_file() { read_json(path).map(Some) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A CLIP tokenizer of six tokens.
    fn tiny(dir: &Path) {
        let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        write("vocab.json", r#"{"a": 0, "b": 1, "b</w>": 2, "ab</w>": 3, "<|startoftext|>": 4, "<|endoftext|>": 5, "a</w>": 6}"#);
        write("merges.txt", "#version: 0.2\na b</w>\n");
        write(
            "special_tokens_map.json",
            r#"{"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}"#,
        );
        write("tokenizer_config.json", r#"{"tokenizer_class": "CLIPTokenizer"}"#);
    }

    #[test]
    fn a_text_is_padded_or_cut_before_its_closing_token() {
        let dir = tempfile::tempdir().unwrap();
        tiny(dir.path());
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let padded = tokenizer.encode("AB a", 6).unwrap();
        assert_eq!((padded.input_ids, padded.attention_mask), (vec![4, 3, 6, 5, 5, 5], vec![1, 1, 1, 1, 0, 0]));
        let cut = tokenizer.encode("ab ab ab ab", 4).unwrap();
        assert_eq!((cut.input_ids, cut.attention_mask), (vec![4, 3, 3, 5], vec![1; 4]));
        assert!(matches!(tokenizer.encode("ab", 0), Err(Error::Invalid { .. })));
    }

    #[test]
    fn captions_are_taken_in_lower_case_and_without_white_space_around_them() {
        let dir = tempfile::tempdir().unwrap();
        tiny(dir.path());
        // One that tells cases apart.
        std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"tokenizer_class": "Qwen2Tokenizer"}"#).unwrap();
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let plain = tokenizer.encode("ab", 4).unwrap();
        assert_ne!(tokenizer.encode(" AB\n", 4).unwrap(), plain);
        let tokenizer = tokenizer.of_captions();
        assert_eq!(tokenizer.encode(" AB\n", 4).unwrap(), plain);
        assert_eq!(tokenizer.count(" AB\n").unwrap(), tokenizer.count("ab").unwrap());
    }

    #[test]
    fn malformed_files_are_typed_errors() {
        let cases = [
            ("vocab.json", "{"),
            ("vocab.json", r#"{"a": "b"}"#),
            ("vocab.json", "{}"),
            ("merges.txt", "#version: 0.2\na b c d\n"),
            ("merges.txt", "#version: 0.2\na nowhere\n"),
            ("special_tokens_map.json", "[]"),
            ("special_tokens_map.json", r#"{"bos_token": "x"}"#),
            ("tokenizer_config.json", r#"{"tokenizer_class": "NewTokenizer"}"#),
            ("added_tokens.json", r#"{"<x>": 4000000000}"#),
            ("tokenizer.json", "null"),
        ];
        for (name, text) in cases {
            let dir = tempfile::tempdir().unwrap();
            tiny(dir.path());
            std::fs::write(dir.path().join(name), text).unwrap();
            let error = Tokenizer::load(dir.path()).unwrap_err();
            assert!(matches!(error, Error::ModelDir { .. } | Error::Unsupported { .. }), "{name} {text}: {error}");
        }
    }
}
