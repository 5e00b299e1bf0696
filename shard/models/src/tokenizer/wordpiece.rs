//! WordPiece from `vocab.txt`: BERT's.
//!
//! Follows `transformers/models/bert/tokenization_bert.py` (5.23.0).

use std::path::Path;

use serde::Deserialize;
use tokenizers::Tokenizer;
use tokenizers::models::bpe::Vocab;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;

use super::{SpecialTokens, guard, malformed, read, read_json};
use crate::{Error, Result};

/// What `tokenizer_config.json` says of the text before it is cut. Defaults are the reference's.
#[derive(Deserialize)]
#[serde(default)]
struct Config {
    do_basic_tokenize: bool,
    do_lower_case: bool,
    tokenize_chinese_chars: bool,
    /// `None`: as `do_lower_case`.
    strip_accents: Option<bool>,
}

impl Default for Config {
    fn default() -> Self {
        Self { do_basic_tokenize: true, do_lower_case: true, tokenize_chinese_chars: true, strip_accents: None }
    }
}

pub(super) fn load(dir: &Path, special: &SpecialTokens) -> Result<Tokenizer> {
    let config: Config = read_json(&dir.join("tokenizer_config.json"))?;
    if !config.do_basic_tokenize {
        return Err(Error::Unsupported { field: "do_basic_tokenize".into(), value: "false".into() });
    }
    let path = dir.join("vocab.txt");
    let text = String::from_utf8(read(&path)?).map_err(|e| malformed(&path, e))?;
    let vocabulary: Vocab = text.lines().zip(0..).map(|(piece, id)| (piece.to_owned(), id)).collect();
    let mark = |name: &str| {
        let content = special.token(name).map(|token| token.content.clone());
        let content = content.ok_or_else(|| malformed(dir, format!("it names no {name}")))?;
        let id = vocabulary.get(&content).ok_or_else(|| malformed(&path, format!("the {name} is not in it")))?;
        Ok::<_, Error>((content.clone(), *id))
    };
    let (unknown, sep, cls) = (mark("unk_token")?, mark("sep_token")?, mark("cls_token")?);
    let model = guard(&path, || WordPiece::builder().vocab(vocabulary).unk_token(unknown.0).build())?;
    let mut tokenizer = Tokenizer::new(model);
    let Config { do_lower_case, tokenize_chinese_chars, strip_accents, .. } = config;
    let normalizer = BertNormalizer::new(true, tokenize_chinese_chars, strip_accents, do_lower_case);
    guard(&path, || tokenizer.with_normalizer(Some(normalizer)).map(|_| ()))?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_post_processor(Some(BertProcessing::new(sep, cls)));
    Ok(tokenizer)
}
