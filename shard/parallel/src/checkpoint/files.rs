//! Which files of a component's folder its weights are.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::{Error, Result};

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The files with a component's weights: safetensors as diffusers names them (`diffusion_pytorch_model` or `model`, one file or
/// several with an index), or the one GGUF file of the folder, whatever its name.
///
/// # Errors
/// When there are none, when there are several that could be meant, or when an index names a file outside the folder.
pub fn checkpoint_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let bad = |reason: String| Error::Checkpoint { path: dir.to_owned(), reason };
    let safetensors = safetensors_files(dir)?;
    let mut quantised = gguf_files(dir);
    match (safetensors, quantised.len()) {
        (Some(files), 0) => Ok(files),
        (None, 1) => Ok(quantised),
        (None, 0) => Err(bad(
            "there is no diffusion_pytorch_model.safetensors or model.safetensors (and no index of several), and no .gguf".into(),
        )),
        (safetensors, _) => {
            quantised.extend(safetensors.unwrap_or_default());
            let names: Vec<_> = quantised.iter().filter_map(|file| file.file_name()?.to_str()).collect();
            Err(bad(format!("one of these has to go: {}", names.join(", "))))
        }
    }
}

/// Whether a file is one in ggml's format.
pub(super) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

fn safetensors_files(dir: &Path) -> Result<Option<Vec<PathBuf>>> {
    for stem in ["diffusion_pytorch_model", "model"] {
        let one = dir.join(format!("{stem}.safetensors"));
        if one.is_file() {
            return Ok(Some(vec![one]));
        }
        let index = dir.join(format!("{stem}.safetensors.index.json"));
        if index.is_file() {
            return index_files(dir, &index).map(Some);
        }
    }
    Ok(None)
}

/// In the order of their names; a folder that cannot be read has none, which is said of it above.
fn gguf_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| is_gguf(path) && path.is_file()).collect();
    files.sort();
    files
}

fn index_files(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let bad = |reason: String| Error::Checkpoint { path: index.to_owned(), reason };
    let text = std::fs::read(index).map_err(|source| Error::Io { path: index.to_owned(), source })?;
    let index: Index = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if let Some(name) = names.iter().find(|n| n.contains('/') || n.contains('\\') || n.starts_with('.')) {
        return Err(bad(format!("`{name}` is not a plain file name")));
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_may_not_leave_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../secret.safetensors"}}"#)
            .unwrap();
        let error = checkpoint_files(dir.path()).unwrap_err();
        assert!(error.to_string().contains("../secret.safetensors"), "{error}");
    }

    #[test]
    fn a_folder_has_one_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| std::fs::write(dir.path().join(name), b"").unwrap();
        assert!(checkpoint_files(dir.path()).unwrap_err().to_string().contains("no .gguf"));
        file("flux1-dev-Q4_K_S.gguf");
        assert_eq!(checkpoint_files(dir.path()).unwrap(), [dir.path().join("flux1-dev-Q4_K_S.gguf")]);
        file("model.safetensors");
        let error = checkpoint_files(dir.path()).unwrap_err().to_string();
        assert!(error.contains("flux1-dev-Q4_K_S.gguf, model.safetensors"), "{error}");
    }
}
