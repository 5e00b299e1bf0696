//! Token ids of the full public vocabularies. Case: `tokenizers`.

use std::fs::File;
use std::path::Path;

use candle_core::{Device, Tensor};
use flate2::read::GzDecoder;
use models::tokenizer::Tokenizer;
use tests::golden::{Case, Outcome};

pub(crate) fn run(case: &mut Case) -> Outcome {
    let texts: Vec<String> = serde_json::from_value(case.json["texts"].clone()).map_err(text)?;
    let known = case.json["tokenizers"].as_object().cloned().unwrap_or_default();
    for (name, recorded) in known {
        // Its vocabulary's licence is unclear, so this repository's copy of the case is without it.
        if name == "bert_hunyuan" && !case.dir.join(&name).is_dir() {
            println!("tokenizers: the folder {name} is not part of this copy");
            continue;
        }
        let max_length = recorded["call"]["max_length"].as_u64().ok_or("no max_length")? as usize;
        // A folder of its own, as in a model: clip_g's vocabulary is stored once, with clip_l.
        let dir = tempfile::tempdir().map_err(text)?;
        copy(&case.dir.join(&name), dir.path(), &[])?;
        if name == "clip_g" {
            copy(&case.dir.join("clip_l"), dir.path(), &["vocab.json", "merges.txt"])?;
        }
        check(case, &name, dir.path(), &texts, max_length)?;
        if dir.path().join("tokenizer.json").is_file() && dir.path().join("spiece.model").is_file() {
            // The same ids without the ready-made pipeline.
            std::fs::remove_file(dir.path().join("tokenizer.json")).map_err(text)?;
            check(case, &name, dir.path(), &texts, max_length).map_err(|e| format!("bare spiece.model: {e}"))?;
        }
    }
    Ok(())
}

fn check(case: &mut Case, name: &str, dir: &Path, texts: &[String], max_length: usize) -> Outcome {
    let tokenizer = Tokenizer::load(dir).map_err(|e| format!("{name}: {e}"))?;
    let (mut ids, mut masks) = (Vec::new(), Vec::new());
    for (row, input) in texts.iter().enumerate() {
        let encoding = tokenizer.encode(input, max_length).map_err(|e| format!("{name}, text {row}: {e}"))?;
        let recorded = case.json["tokenizers"][name]["ids_without_padding"][row].as_array().map_or(0, Vec::len);
        let count = tokenizer.count(input).map_err(text)?;
        if count != recorded {
            return Err(format!("{name}, text {row}: {count} tokens, expected {recorded}: {:?}", encoding.input_ids));
        }
        ids.extend(encoding.input_ids);
        masks.extend(encoding.attention_mask);
    }
    let tensor = |v: Vec<u32>| Tensor::from_vec(v, (texts.len(), max_length), &Device::Cpu).map_err(text);
    case.check_within(&format!("{name}.input_ids"), &tensor(ids)?, 0.0)?;
    case.check_within(&format!("{name}.attention_mask"), &tensor(masks)?, 0.0)
}

/// All files of a folder, or those of these names. One that is packed (`NAME.gz`) is unpacked.
fn copy(from: &Path, to: &Path, names: &[&str]) -> Outcome {
    for entry in std::fs::read_dir(from).map_err(|e| format!("{}: {e}", from.display()))? {
        let path = entry.map_err(text)?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = file.strip_suffix(".gz").unwrap_or(&file);
        if !names.is_empty() && !names.contains(&name) {
            continue;
        }
        let mut stored = File::open(&path).map_err(text)?;
        let mut copy = File::create(to.join(name)).map_err(text)?;
        let copied = match name == file {
            true => std::io::copy(&mut stored, &mut copy),
            false => std::io::copy(&mut GzDecoder::new(stored), &mut copy),
        };
        copied.map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}
