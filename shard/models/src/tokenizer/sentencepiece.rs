//! A unigram tokenizer from a bare `spiece.model`.
//!
//! Follows `transformers/models/t5/tokenization_t5.py` (5.23.0) in its pipeline and sentencepiece in its byte fallback. One
//! difference from both: a text that spells a byte piece (`<0x41>`) gets it, which sentencepiece alone would not give.

use std::path::Path;

use serde_json::json;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::{Precompiled, Sequence};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

use super::{SpecialTokens, guard, malformed, read};
use crate::{Error, Result};

/// Most pieces of a vocabulary; mT5 has 250,100.
const MAX_PIECES: usize = 1 << 20;
/// `<extra_id_N>` that T5's tokenizer adds where its configuration does not say how many.
const DEFAULT_EXTRA_IDS: usize = 100;
/// The value of `TrainerSpec.model_type` for the one kind that is read here.
const UNIGRAM: u64 = 1;

pub(super) fn load(path: &Path, special: &SpecialTokens) -> Result<Tokenizer> {
    let mut file = Model::parse(&read(path)?).map_err(|reason| malformed(path, reason))?;
    if file.model_type != UNIGRAM {
        return Err(Error::Unsupported { field: "spiece.model: model_type".into(), value: file.model_type.to_string() });
    }
    let extra = (0..special.extra_ids.unwrap_or(DEFAULT_EXTRA_IDS).min(MAX_PIECES)).rev();
    let extra: Vec<String> = extra.map(|i| format!("<extra_id_{i}>")).collect();
    file.pieces.extend(extra.iter().map(|piece| (piece.clone(), 0.0)));
    let unknown = usize::try_from(file.unk_id).ok();
    let model = guard(path, || Unigram::from(file.pieces, unknown, file.byte_fallback))?;
    let mut tokenizer = Tokenizer::new(model);

    let piece = |value| serde_json::from_value::<NormalizerWrapper>(value).map_err(|e| malformed(path, e));
    let mut normalizers = Vec::new();
    if !file.charsmap.is_empty() {
        normalizers.push(Precompiled::from(&file.charsmap).map_err(|e| malformed(path, e))?.into());
    }
    normalizers.push(piece(json!({"type": "Strip", "strip_left": false, "strip_right": true}))?);
    normalizers.push(piece(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}))?);
    tokenizer.with_normalizer(Some(Sequence::new(normalizers))).map_err(|e| malformed(path, e))?;

    let words = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let words: PreTokenizerWrapper = serde_json::from_value(words).map_err(|e| malformed(path, e))?;
    tokenizer.with_pre_tokenizer(Some(words));

    let end = special.token("eos_token").map_or("</s>", |token| token.content.as_str());
    let id = tokenizer.token_to_id(end).ok_or_else(|| malformed(path, "it has no end-of-text piece"))?;
    let closing = TemplateProcessing::builder()
        .try_single(format!("$A {end}"))
        .map_err(|e| malformed(path, e))?
        .special_tokens(vec![(end.to_owned(), id)])
        .build()
        .map_err(|e| malformed(path, e))?;
    tokenizer.with_post_processor(Some(closing));
    guard(path, || tokenizer.add_special_tokens(extra.into_iter().map(|piece| AddedToken::from(piece, true))))?;
    Ok(tokenizer)
}

/// The part of sentencepiece's `ModelProto` that is needed to encode.
#[derive(Debug)]
struct Model {
    /// Pieces and their log probabilities, by id.
    pieces: Vec<(String, f64)>,
    model_type: u64,
    byte_fallback: bool,
    unk_id: u64,
    charsmap: Vec<u8>,
}

impl Model {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut model = Model { pieces: Vec::new(), model_type: UNIGRAM, byte_fallback: false, unk_id: 0, charsmap: Vec::new() };
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (1, Field::Bytes(piece)) => model.add_piece(piece)?,
                (2, Field::Bytes(trainer)) => model.read_trainer(trainer)?,
                (3, Field::Bytes(normalizer)) => model.read_normalizer(normalizer)?,
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("it has no pieces".into());
        }
        Ok(model)
    }

    fn add_piece(&mut self, bytes: &[u8]) -> Result<(), String> {
        let (mut text, mut score, id) = ("", 0f32, self.pieces.len());
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (1, Field::Bytes(bytes)) => text = std::str::from_utf8(bytes).map_err(|e| format!("piece {id}: {e}"))?,
                (2, Field::Fixed32(bits)) => score = f32::from_bits(bits),
                _ => {}
            }
        }
        if text.is_empty() || !score.is_finite() || id >= MAX_PIECES {
            return Err(format!("piece {id} is empty, has no finite score, or is one too many"));
        }
        self.pieces.push((text.to_owned(), f64::from(score)));
        Ok(())
    }

    fn read_trainer(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (3, Field::Varint(kind)) => self.model_type = kind,
                (35, Field::Varint(flag)) => self.byte_fallback = flag != 0,
                (40, Field::Varint(id)) => self.unk_id = id,
                _ => {}
            }
        }
        Ok(())
    }

    fn read_normalizer(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            if let (2, Field::Bytes(charsmap)) = (number, value) {
                self.charsmap = charsmap.to_vec();
            }
        }
        Ok(())
    }
}

/// A field of a protobuf message.
enum Field<'a> {
    Varint(u64),
    Fixed64,
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// The fields of a protobuf message, as far as they are read.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Fixed64
            }
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| "a field is too long")?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Fixed32(self.take(4)?.try_into().map(u32::from_le_bytes).map_err(|_| "a field is too short")?),
            kind => return Err(format!("it has a field of the unknown kind {kind}")),
        };
        Ok(Some((key >> 3, field)))
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("it has a number of more than 64 bits".into())
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (head, rest) = self.0.split_at_checked(n).ok_or("it ends in the middle of a field")?;
        self.0 = rest;
        Ok(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer;

    fn bytes_field(number: u8, data: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(data.len()).unwrap()], data].concat()
    }

    fn piece(text: &str, score: f32) -> Vec<u8> {
        bytes_field(1, &[bytes_field(1, text.as_bytes()), vec![2 << 3 | 5], score.to_le_bytes().to_vec()].concat())
    }

    /// Three control pieces, all bytes, and a word; byte fallback on.
    fn tiny() -> Vec<u8> {
        let mut file = [piece("<pad>", 0.0), piece("</s>", 0.0), piece("<unk>", 0.0)].concat();
        for byte in 0..=255u8 {
            file.extend(piece(&format!("<0x{byte:02X}>"), 0.0));
        }
        file.extend(piece("▁word", -1.0));
        file.extend(piece("▁", -2.0));
        // byte_fallback (35) and unk_id (40) have keys of two bytes.
        file.extend(bytes_field(2, &[0x98, 0x02, 1, 0xc0, 0x02, 2]));
        file
    }

    fn load_tiny(file: &[u8]) -> Result<tokenizer::Tokenizer> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("spiece.model"), file).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"pad_token": "<pad>", "extra_ids": 1}"#).unwrap();
        tokenizer::Tokenizer::load(dir.path())
    }

    #[test]
    fn what_no_piece_covers_becomes_bytes() {
        let tokenizer = load_tiny(&tiny()).unwrap();
        let byte = |b: u32| 3 + b;
        assert_eq!(tokenizer.encode("word ß", 6).unwrap().input_ids, [259, 260, byte(0xc3), byte(0x9f), 1, 0]);
    }

    #[test]
    fn extra_ids_follow_the_vocabulary() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("spiece.model"), tiny()).unwrap();
        let config = r#"{"pad_token": "<pad>", "extra_ids": 2}"#;
        std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let tokenizer = tokenizer::Tokenizer::load(dir.path()).unwrap();
        assert_eq!(tokenizer.encode("word<extra_id_0>", 3).unwrap().input_ids, [259, 262, 1]);
    }

    #[test]
    fn every_cut_of_a_model_is_read_or_refused_without_a_panic() {
        let file = tiny();
        for length in (0..file.len()).step_by(13) {
            let _ = Model::parse(&file[..length]);
        }
        for at in (0..file.len()).step_by(11) {
            let mut file = file.clone();
            file[at] ^= 0xff;
            let _ = Model::parse(&file);
        }
    }

    #[test]
    fn malformed_models_are_typed_errors() {
        let long = [0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        let wild_table = bytes_field(3, &bytes_field(2, &[4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]));
        let cases = [
            vec![],
            vec![0x0a],
            long.to_vec(),
            vec![0xff; 30],
            piece("", 0.0),
            piece("x", f32::NAN),
            [tiny(), bytes_field(3, &bytes_field(2, &[9, 0, 0]))].concat(),
            [tiny(), wild_table].concat(),
        ];
        for file in cases {
            let error = load_tiny(&file).unwrap_err();
            assert!(matches!(error, Error::ModelDir { .. }), "{error}");
        }
    }
}
