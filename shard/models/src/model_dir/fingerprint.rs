//! A short look at the files of a component, by which workers find that they were given different models.
//!
//! A model's digest takes seconds per gigabyte and every file; a rank reads its own part, and there are many ranks. What is looked at here is a thousandth:
//! another architecture, precision or quantisation has other sizes, and another training changes every part of a file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use parallel::weights::checkpoint_files;
use sha2::{Digest, Sha256};

use super::{INDEX, ModelDir, SCHEDULER, bad, hex, io};
use crate::{Error, Result};

const TEXT_ENCODER: &str = "text_encoder";
const PROCESSOR: &str = "processor";
const CONFIG: &str = "config.json";
/// Files of no more are read whole; of larger ones their ends, where a checkpoint has its header.
const ENDS: u64 = 64 << 10;
/// And this much at every [`STRIDE`].
const SAMPLE: u64 = 4 << 10;
const STRIDE: u64 = 16 << 20;

impl ModelDir {
    /// sha256, in hex, over the names, sizes and samples of what a component's stages read here: its configuration and weights, the index of the model, of a
    /// text encoder its tokenizer and processor, of any other the schedulers and every component's configuration (a denoiser goes by the
    /// autoencoder's). Reads about 6 MB of 24 GB.
    ///
    /// # Errors
    /// When the model has no such component, or a file cannot be read.
    pub fn fingerprint(&self, component: &str) -> Result<String> {
        let (dir, component) = self.part(component);
        let mut files = vec![dir.root.join(INDEX)];
        files.extend(files_of(&dir.require(component)?.path)?);
        let reads_text = component.starts_with(TEXT_ENCODER);
        let tokenizer = component.replacen(TEXT_ENCODER, "tokenizer", 1);
        let is_read = |name: &str| match reads_text {
            true => name == tokenizer || name == PROCESSOR,
            false => name.contains(SCHEDULER),
        };
        for folder in dir.components.keys().map(|name| (name, dir.root.join(name))).filter(|(_, folder)| folder.is_dir()) {
            match folder {
                (name, folder) if is_read(name) => files.extend(plain_files(&folder)?),
                (_, folder) => files.extend(Some(folder.join(CONFIG)).filter(|config| !reads_text && config.is_file())),
            }
        }
        of_files(&dir.root, files)
    }

    /// Refuses a component that is another than the one of which a card was read: `expected` is its fingerprint there, empty on the card of a worker that
    /// knows of none.
    ///
    /// # Errors
    /// [`Error::Differs`], and as [`Self::fingerprint`].
    pub fn check_fingerprint(&self, component: &str, expected: &str) -> Result<()> {
        check(component, &self.part(component).0.root, expected, || self.fingerprint(component))
    }
}

/// As [`ModelDir::fingerprint`], of a network in a folder of its own.
pub(crate) fn of_network(folder: &Path) -> Result<String> {
    of_files(folder, files_of(folder)?)
}

/// As [`ModelDir::check_fingerprint`].
pub(crate) fn check_network(name: &str, folder: &Path, expected: &str) -> Result<()> {
    check(name, folder, expected, || of_network(folder))
}

fn check(name: &str, path: &Path, expected: &str, own: impl FnOnce() -> Result<String>) -> Result<()> {
    if expected.is_empty() || own()? == expected {
        return Ok(());
    }
    Err(Error::Differs { name: name.to_owned(), path: path.to_owned() })
}

/// A network's configuration and weights.
fn files_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let config = folder.join(CONFIG);
    Ok(checkpoint_files(folder)?.into_iter().chain(config.is_file().then_some(config)).collect())
}

fn plain_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).map_err(io(folder))?;
    let is_hidden = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    Ok(entries.into_iter().map(|entry| entry.path()).filter(|path| path.is_file() && !is_hidden(path)).collect())
}

fn of_files(root: &Path, mut files: Vec<PathBuf>) -> Result<String> {
    files.sort();
    files.dedup();
    let mut digest = Sha256::new();
    for path in &files {
        let name = path.strip_prefix(root).unwrap_or(path).to_str().ok_or_else(|| bad(path, "its name is not UTF-8"))?;
        digest.update((name.len() as u64).to_le_bytes());
        digest.update(name);
        sample(path, &mut digest).map_err(io(path))?;
    }
    Ok(hex(&digest.finalize()))
}

fn sample(path: &Path, digest: &mut Sha256) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    digest.update(size.to_le_bytes());
    let between = (STRIDE..size.saturating_sub(ENDS)).step_by(STRIDE as usize).map(|at| (at, SAMPLE));
    let last = (size > ENDS).then(|| (size.saturating_sub(ENDS).max(ENDS), ENDS));
    let mut buffer = Vec::new();
    for (at, most) in [(0, ENDS)].into_iter().chain(between).chain(last) {
        buffer.clear();
        file.seek(SeekFrom::Start(at))?;
        file.by_ref().take(most).read_to_end(&mut buffer)?;
        digest.update(&buffer);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const FILES: [&str; 8] = [
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer_2/tokenizer.json",
        "processor/preprocessor_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "vae/config.json",
    ];

    /// A model whose weights have so many bytes.
    fn model(bytes: usize) -> (tempfile::TempDir, ModelDir) {
        let dir = tempfile::tempdir().unwrap();
        let mut index = serde_json::json!({"_class_name": "A"});
        for name in FILES {
            let path = dir.path().join(name);
            let folder = path.parent().unwrap();
            index[folder.file_name().unwrap().to_str().unwrap()] = serde_json::json!(["library", "Class"]);
            fs::create_dir_all(folder).unwrap();
            fs::write(&path, if name.ends_with("safetensors") { vec![1; bytes] } else { b"{}".to_vec() }).unwrap();
        }
        fs::write(dir.path().join("model_index.json"), index.to_string()).unwrap();
        let model = ModelDir::open(dir.path()).unwrap();
        (dir, model)
    }

    #[test]
    fn it_is_the_same_wherever_the_model_is_and_another_after_any_change_of_what_is_read() {
        let (dir, here) = model(1000);
        let (_elsewhere, there) = model(1000);
        for (component, read) in [("text_encoder_2", &FILES[..4]), ("transformer", &[&FILES[..1], &FILES[4..]].concat())] {
            let print = here.fingerprint(component).unwrap();
            assert_eq!(there.fingerprint(component).unwrap(), print);
            fs::write(dir.path().join(component).join("notes.md"), "notes").unwrap();
            here.check_fingerprint(component, &print).unwrap();
            here.check_fingerprint(component, "").unwrap();
            for file in FILES {
                let before = fs::read(dir.path().join(file)).unwrap();
                fs::write(dir.path().join(file), [&before[..before.len() - 1], b"0"].concat()).unwrap();
                let checked = here.check_fingerprint(component, &print);
                let differs = matches!(&checked, Err(Error::Differs { name, .. }) if name == component);
                assert_eq!(differs, read.contains(&file), "{component}: {file}: {checked:?}");
                fs::write(dir.path().join(file), before).unwrap();
            }
        }
        assert!(here.fingerprint("nobody").is_err());
    }

    #[test]
    fn a_large_file_is_looked_at_at_its_ends_and_at_every_stride() {
        let (dir, model) = model((2 * STRIDE + ENDS) as usize + 5);
        let weights = dir.path().join("text_encoder_2/model.safetensors");
        let (whole, print) = (fs::read(&weights).unwrap(), model.fingerprint("text_encoder_2").unwrap());
        let seen = |at: usize| {
            let mut changed = whole.clone();
            changed[at] = 2;
            fs::write(&weights, changed).unwrap();
            model.fingerprint("text_encoder_2").unwrap() != print
        };
        let stride = STRIDE as usize;
        assert!([0, stride, 2 * stride, whole.len() - 1].into_iter().all(seen));
        assert!(!seen(stride / 2));
    }
}
