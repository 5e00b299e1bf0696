//! Models put together of parts of others.

use std::fs;
use std::io::{Error, Result};
use std::os::unix::fs::symlink;
use std::path::Path;

use models::model_dir::read_json;
use serde_json::Value;
use tempfile::TempDir;

/// The model in `pipeline`, whose index names no text encoder, with that of another and its tokenizer.
///
/// # Errors
/// When either cannot be read.
pub fn with_text_encoder_of(pipeline: &Path, other: &Path) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    let index = |model: &Path| read_json::<Value>(&model.join("model_index.json")).map_err(Error::other);
    let (mut own, others) = (index(pipeline)?, index(other)?);
    for entry in fs::read_dir(pipeline)? {
        let entry = entry?;
        if entry.file_name() != "model_index.json" {
            symlink(entry.path().canonicalize()?, folder.path().join(entry.file_name()))?;
        }
    }
    for part in ["text_encoder", "tokenizer"] {
        symlink(other.join(part).canonicalize()?, folder.path().join(part))?;
        own[part] = others[part].clone();
    }
    fs::write(folder.path().join("model_index.json"), own.to_string())?;
    Ok(folder)
}

/// A LaMa directory of the generator in a folder of a golden case.
///
/// # Errors
/// When it cannot be read.
pub fn lama(generator: &Path) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    symlink(generator.canonicalize()?, folder.path().join("generator"))?;
    let index = r#"{"_class_name": "LaMaPipeline", "generator": ["lama", "FFCResNetGenerator"]}"#;
    fs::write(folder.path().join("model_index.json"), index)?;
    Ok(folder)
}
