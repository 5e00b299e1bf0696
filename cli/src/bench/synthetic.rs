//! Networks with weights that were never trained, at the published widths: so that a step can be timed, and memory counted, without a
//! download.

use std::path::Path;

use models::autoencoder_kl::AutoencoderKl;
use models::blocks::{BlockModel, RangeOf, RankGroup, recv_tensors, send_tensors};
use parallel::{DType, Device, Tensor, Tensors, Weights};

pub(super) mod flux;
mod layers;
pub(super) mod t5;
pub(super) mod unet;
pub(super) mod vae;
mod write;

pub(super) use write::Format;

/// A network's shape.
pub(super) trait Network: Sync {
    /// Names and shapes of its tensors, by the reference's names.
    fn shapes(&self) -> Vec<(String, Vec<usize>)>;
    /// One rank of it.
    fn load(&self, weights: &Weights, range: RangeOf) -> models::Result<Model>;
    /// Its inputs, of one picture or one text.
    fn inputs(&self) -> models::Result<Tensors>;
    /// The name of its output.
    fn output(&self) -> &'static str;
    /// Floating-point operations of its blocks, or of a decoding, in one forward.
    fn flops(&self) -> f64;
}

/// A network in memory.
pub(super) enum Model {
    /// Of blocks: embed, blocks, output.
    Blocks(Box<dyn BlockModel>),
    /// Latents to a picture.
    Decoder(Box<AutoencoderKl>),
}

/// A network's weights, in a folder that goes with this, and its inputs.
pub(super) struct Checkpoint<N> {
    folder: tempfile::TempDir,
    pub(super) network: N,
    inputs: Tensors,
}

impl<N: Network> Checkpoint<N> {
    /// Writes them below `parent`, telling `progress` of bytes written and all bytes.
    pub(super) fn write(network: N, format: Format, parent: &Path, progress: &mut dyn FnMut(u64, u64)) -> models::Result<Self> {
        let folder = tempfile::tempdir_in(parent).map_err(|source| parallel::Error::Io { path: parent.to_owned(), source })?;
        write::write(folder.path(), &network.shapes(), format, progress)?;
        let inputs = network.inputs()?;
        Ok(Self { folder, network, inputs })
    }

    /// What one rank holds of it, in bytes, by its loading code.
    pub(super) fn held(&self, group: &RankGroup) -> models::Result<u64> {
        let weights = Weights::open(self.folder.path(), group.tensor.clone(), DType::F32, &Device::Cpu)?.measuring();
        self.network.load(&weights, group.range)?;
        Ok(weights.bytes_held())
    }

    /// One rank's part of it.
    pub(super) fn load(&self, group: &RankGroup) -> models::Result<Loaded> {
        let device = group.device.clone();
        let weights = Weights::open(self.folder.path(), group.tensor.clone(), DType::F32, &device)?;
        let model = self.network.load(&weights, group.range)?;
        Ok(Loaded { model, inputs: self.inputs.to_device(&device)?, output: self.network.output(), device })
    }
}

/// A network that can be run.
pub(super) struct Loaded {
    model: Model,
    inputs: Tensors,
    output: &'static str,
    device: Device,
}

impl Loaded {
    /// One forward of a network that is held whole, done when it returns.
    pub(super) fn forward(&self) -> models::Result<Tensor> {
        let output = match &self.model {
            Model::Blocks(model) => model.output(model.blocks(model.embed(&self.inputs)?)?)?.take(self.output)?,
            Model::Decoder(model) => model.decode(self.inputs.get("latents")?)?,
        };
        self.device.synchronize()?;
        Ok(output)
    }

    /// This rank's part of one forward: what the range before it gives becomes what the one after it takes, or the output.
    pub(super) fn part(&self, group: &RankGroup) -> models::Result<Option<Tensors>> {
        let Model::Blocks(model) = &self.model else {
            return Ok(Some(Tensors::new().with(self.output, self.forward()?)));
        };
        let hidden =
            if group.range.is_first() { model.embed(&self.inputs)? } else { recv_tensors(group.whole(), group.previous())?? };
        let hidden = model.blocks(hidden);
        if group.range.is_last() {
            return Ok(Some(model.output(hidden?)?));
        }
        send_tensors(group.whole(), &hidden, group.next())?;
        hidden.map(|_| None)
    }
}

/// In -1..1, without a pattern that a product could see.
fn noise(i: usize) -> f32 {
    let mut z = (i as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}
