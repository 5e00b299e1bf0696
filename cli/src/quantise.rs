//! `atelier quantise`: a model's directory again, with some components in ggml's blocks.
//!
//! The matrices of blocks (layers with a number in their name) are quantised; what is outside of them, biases and norms stay as they
//! are: together they are about a hundredth, and a picture shows it most when they are rounded.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use models::model_dir::ModelDir;
use models::registry;
use parallel::{DType, Device, Solo, Tensor, Weights};
use rayon::prelude::*;

use crate::error::Error;
use crate::gguf;

/// Values that are quantised at once on one thread.
const PART: usize = 1 << 20;

#[derive(Debug, Args)]
pub(crate) struct QuantiseArgs {
    /// A model's directory (diffusers' layout).
    model: PathBuf,
    /// Where the new one is to be; it must not exist. Files that do not change are links to the old ones, or copies.
    to: PathBuf,
    /// A component to quantise. May be repeated.
    #[arg(long = "component", default_values_t = ["transformer".to_owned()])]
    components: Vec<String>,
    /// Bits of a weight, with its scale: 8.5, 6.6, 5.5 or 4.5.
    #[arg(long, value_enum, default_value_t = Format::Q8_0)]
    format: Format,
}

/// What matrices are stored as. Rows that are no whole blocks of 256 are `q8_0`, or stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q6_k")]
    Q6K,
    #[value(name = "q5_k")]
    Q5K,
    #[value(name = "q4_k")]
    Q4K,
}

pub(crate) fn run(args: &QuantiseArgs) -> Result<(), Error> {
    let dir = ModelDir::open(&args.model)?;
    registry::outline(&dir)?; // a model that is served at all
    for component in &args.components {
        let known: Vec<&str> = dir.components().collect();
        if !known.contains(&component.as_str()) {
            return Err(Error::Flag {
                flag: "--component",
                reason: format!("the model has no `{component}`, only {}", known.join(", ")),
            });
        }
    }
    std::fs::create_dir(&args.to).map_err(|source| Error::File { path: args.to.display().to_string(), source })?;
    let written = write(args, &dir);
    if written.is_err() {
        // What is there is this command's own.
        let _ = std::fs::remove_dir_all(&args.to);
    }
    written
}

fn write(args: &QuantiseArgs, dir: &ModelDir) -> Result<(), Error> {
    let weights: Vec<Component> = args.components.iter().map(|name| Component::open(dir, name)).collect::<Result<_, Error>>()?;
    let replaced: Vec<&PathBuf> = weights.iter().flat_map(|component| &component.replaced).collect();
    link_all(dir.root(), &args.to, &|path| !replaced.contains(&path))?;
    for component in &weights {
        let name = &component.name;
        let path = args.to.join(name).join(format!("{name}-{:?}.gguf", args.format));
        let before = dir.weight_bytes(name)?;
        let (after, kinds) = component.write(&path, args.format)?;
        println!("{name}: {} -> {}, {}", gigabytes(before), gigabytes(after), path.display());
        println!("  weights: {}", said(&kinds));
    }
    registry::outline(&ModelDir::open(&args.to)?)?;
    Ok(())
}

/// How many weights became what, the most first.
fn said(kinds: &Kinds) -> String {
    let mut kinds: Vec<_> = kinds.iter().collect();
    kinds.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let total = kinds.iter().map(|(_, count)| **count).sum::<usize>().max(1) as f64;
    kinds.iter().map(|(kind, count)| format!("{:.1} % {kind}", 100.0 * **count as f64 / total)).collect::<Vec<_>>().join(", ")
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.3} GB", bytes as f64 / 1e9)
}

/// How many weights are stored as what.
type Kinds = BTreeMap<String, usize>;

/// A component's weights, to be written again.
struct Component {
    name: String,
    weights: Weights,
    /// The files they are in.
    replaced: Vec<PathBuf>,
}

impl Component {
    fn open(dir: &ModelDir, name: &str) -> Result<Self, Error> {
        let path = dir.require(name)?.path;
        let mut replaced = parallel::weights::checkpoint_files(&path).map_err(models::Error::from)?;
        // Of several files there is an index too.
        let indices = ["diffusion_pytorch_model", "model"].map(|stem| path.join(format!("{stem}.safetensors.index.json")));
        replaced.extend(indices);
        Ok(Self { name: name.to_owned(), weights: registry::open(dir, &path, Arc::new(Solo), &Device::Cpu)?, replaced })
    }

    /// Writes a GGUF file and gives its length, and what became of the weights.
    fn write(&self, path: &Path, format: Format) -> Result<(u64, Kinds), Error> {
        let io = |source| Error::File { path: path.display().to_string(), source };
        let tensors = self.weights.tensors();
        let kinds: Vec<GgmlDType> = tensors.iter().map(|(name, shape, stored)| kind(name, shape, *stored, format)).collect();
        if kinds.iter().all(|kind| kind.block_size() == 1) {
            let reason = format!("`{}` has no matrix that could be in blocks: nothing of it can be quantised", self.name);
            return Err(Error::Flag { flag: "--component", reason });
        }
        let mut counted = Kinds::new();
        for ((_, shape, _), kind) in tensors.iter().zip(&kinds) {
            *counted.entry(format!("{kind:?}")).or_default() += shape.iter().product::<usize>();
        }
        let all = tensors.iter().zip(&kinds);
        let header = all.clone().map(|((name, shape, _), kind)| gguf::Tensor { name, shape, kind: *kind });
        let total: usize = header.clone().map(|tensor| tensor.bytes()).sum();
        let bar = ProgressBar::new(total as u64).with_style(style()).with_message(self.name.clone());
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
        file.write_all(&gguf::header(&self.name, header.collect::<Vec<_>>().into_iter())).map_err(io)?;
        for ((name, shape, _), kind) in all {
            let data = self.data(name, shape, *kind)?;
            file.write_all(&data).map_err(io)?;
            file.write_all(&vec![0; data.len().next_multiple_of(gguf::ALIGNMENT) - data.len()]).map_err(io)?;
            bar.inc(data.len() as u64);
        }
        bar.finish_and_clear();
        let file = file.into_inner().map_err(|error| io(error.into_error()))?;
        file.sync_all().map_err(io)?;
        Ok((file.metadata().map_err(io)?.len(), counted))
    }

    /// A tensor's bytes as `kind`.
    fn data(&self, name: &str, shape: &[usize], kind: GgmlDType) -> models::Result<Vec<u8>> {
        let tensor = self.weights.get_narrow(name, shape, parallel::Shard::Replicated)?;
        let mut data = Vec::new();
        let plain = match kind {
            GgmlDType::F16 => DType::F16,
            GgmlDType::BF16 => DType::BF16,
            _ => DType::F32,
        };
        let tensor = tensor.to_dtype(plain)?;
        if kind.block_size() == 1 {
            parallel::bytes::append(&tensor, &mut data)?;
            return Ok(data);
        }
        let (rows, columns) = tensor.dims2()?;
        let at_once = (PART / columns.max(1)).max(1);
        let part = |first: usize| -> models::Result<Vec<u8>> {
            let part: Tensor = tensor.narrow(0, first, at_once.min(rows - first))?;
            Ok(QTensor::quantize(&part, kind)?.data()?.into_owned())
        };
        let starts: Vec<usize> = (0..rows).step_by(at_once).collect();
        let parts: Vec<Vec<u8>> = starts.into_par_iter().map(part).collect::<models::Result<_>>()?;
        Ok(parts.concat())
    }
}

/// What a tensor is to be stored as.
fn kind(name: &str, shape: &[usize], stored: Option<DType>, format: Format) -> GgmlDType {
    let plain = match stored {
        Some(DType::F16) => GgmlDType::F16,
        Some(DType::BF16) => GgmlDType::BF16,
        _ => GgmlDType::F32,
    };
    let in_a_block = name.split('.').any(|part| part.parse::<usize>().is_ok());
    let [_, columns] = shape else { return plain };
    let wanted = match format {
        Format::Q8_0 => GgmlDType::Q8_0,
        Format::Q6K => GgmlDType::Q6K,
        Format::Q5K => GgmlDType::Q5K,
        Format::Q4K => GgmlDType::Q4K,
    };
    // A table that is no layer: few numbers that all heads share.
    if !in_a_block || name.contains("relative_attention_bias") {
        return plain;
    }
    [wanted, GgmlDType::Q8_0].into_iter().find(|kind| columns.is_multiple_of(kind.block_size())).unwrap_or(plain)
}

/// Makes the directory again, of links to the files that `keep` wants, or copies where there can be no links.
fn link_all(from: &Path, to: &Path, keep: &impl Fn(&PathBuf) -> bool) -> Result<(), Error> {
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |source| Error::File { path, source }
    };
    for entry in std::fs::read_dir(from).map_err(failed(from))? {
        let from = entry.map_err(failed(from))?.path();
        let Some(name) = from.file_name() else { continue };
        let to = to.join(name);
        if std::fs::metadata(&from).map_err(failed(&from))?.is_dir() {
            std::fs::create_dir(&to).map_err(failed(&to))?;
            link_all(&from, &to, keep)?;
        } else if keep(&from) {
            // The file itself, where a download tool's cache holds links.
            let file = std::fs::canonicalize(&from).map_err(failed(&from))?;
            if std::fs::hard_link(&file, &to).is_err() {
                std::fs::copy(&file, &to).map_err(failed(&to))?;
            }
        }
    }
    Ok(())
}

fn style() -> ProgressStyle {
    let template = "{msg:16} {bar:30} {bytes:>10}/{total_bytes:<10} {elapsed:>4}, {eta} left";
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_of_blocks_are_quantised_and_nothing_else() {
        let kind = |name: &str, shape: &[usize]| kind(name, shape, Some(DType::BF16), Format::Q4K);
        assert_eq!(kind("transformer_blocks.0.attn.to_q.weight", &[8, 3072]), GgmlDType::Q4K);
        assert_eq!(kind("transformer_blocks.0.attn.to_q.weight", &[8, 96]), GgmlDType::Q8_0, "no blocks of 256");
        assert_eq!(kind("transformer_blocks.0.attn.to_q.weight", &[8, 33]), GgmlDType::BF16, "no blocks at all");
        for name in ["x_embedder.weight", "transformer_blocks.0.attn.to_q.bias", "encoder.block.0.relative_attention_bias.weight"]
        {
            let shape: &[usize] = if name.ends_with("bias") { &[256] } else { &[8, 256] };
            assert_eq!(kind(name, shape), GgmlDType::BF16, "{name}");
        }
    }
}
