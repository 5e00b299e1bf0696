//! The family's EncodeText stage: the prompt within its template, and for editing the pictures that it speaks of.

use parallel::{Device, Tensor, Tensors};
use sha2::{Digest, Sha256};

use super::edit::working_size;
use super::{Editing, GUIDANCE, MAX_PROMPT_TOKENS};
use crate::autoencoder_stage::of_more;
use crate::block_runner::BlockRunner;
use crate::image_io::{self, PictureLimits};
use crate::lora::Share;
use crate::model_dir::ModelDir;
use crate::qwen2_5_vl::ImageProcessor;
use crate::request::Encoder;
use crate::stage::{Inputs, OneAtATime, Pictures, Waiting};
use crate::text_stage::{Key, PromptCache};
use crate::tokenizer::Tokenizer;
use crate::{Error, Payload, Request, Result};

/// Where a picture goes in a text: as often as the picture has tokens.
const IMAGE_PAD: &str = "<|image_pad|>";
/// Tokens of a text with a picture. Positions of both networks end at 4,096 or later.
const MAX_TOKENS_WITH_PICTURE: usize = 4096;

/// What a prompt is put in, and how much of what comes out is dropped.
#[derive(Clone, Copy, Debug)]
struct Template {
    before: &'static str,
    after: &'static str,
    /// Leading tokens that are not given to the denoiser, whatever the tokenizer makes of the template: a fixed number, as in
    /// the reference.
    start_idx: usize,
}

const GENERATE: Template = Template {
    before: "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial \
             relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    after: "<|im_end|>\n<|im_start|>assistant\n",
    start_idx: 34,
};

const EDIT: Template = Template {
    before: "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, \
             background), then explain how the user's text instruction should alter or modify the image. Generate a new image \
             that meets the user's requirements while maintaining consistency with the original input where \
             appropriate.<|im_end|>\n<|im_start|>user\n",
    after: "<|im_end|>\n<|im_start|>assistant\n",
    start_idx: 64,
};

/// Qwen2.5-VL as the family's text encoder, on the leader of its group.
///
/// Texts are encoded one by one and not padded, so `prompt_embeds: [1, L, D]` is as long as its text.
pub struct PromptStage {
    tokenizer: Tokenizer,
    /// Of a model that edits.
    eyes: Option<Eyes>,
    runner: BlockRunner,
    waiting: Waiting,
    cache: PromptCache,
}

/// How pictures are read along.
#[derive(Debug)]
struct Eyes {
    processor: ImageProcessor,
    limits: PictureLimits,
    editing: Editing,
}

/// Pictures as the network takes them.
struct Seen {
    /// `pixel_values: [patches of all, C T P P]` and `image_grid_thw: [pictures, 3]`.
    inputs: Tensors,
    /// What stands for them in a text: as many pads for each as it has tokens.
    text: String,
    /// Of their files.
    sha256: [u8; 32],
}

impl PromptStage {
    /// For the leader of the group that holds the encoder of `dir`. Keeps at most `cache_bytes` of embeddings; looks at
    /// pictures as `editing` says.
    pub fn load(dir: &ModelDir, runner: BlockRunner, cache_bytes: usize, editing: Option<Editing>) -> Result<Self> {
        let (folder, eyes) = match editing {
            Some(editing) => {
                let processor = ImageProcessor::load(&dir.root().join("processor"))?;
                ("processor", Some(Eyes { processor, limits: PictureLimits::default(), editing }))
            }
            None => ("tokenizer", None),
        };
        let tokenizer = Tokenizer::load(&dir.root().join(folder))?;
        Ok(Self { tokenizer, eyes, runner, waiting: Waiting::default(), cache: PromptCache::new(cache_bytes) })
    }

    /// The ids that the encoder is given for a text, behind the pictures that it speaks of.
    fn tokenize(&self, text: &str, field: &'static str, request: &Request, seen: Option<&Seen>) -> Result<Vec<u32>> {
        let Some(seen) = seen else {
            // Nothing that is cut off could reach back into what is kept, so it need not be computed.
            let tokens = request.max_sequence_length.min(MAX_PROMPT_TOKENS) + GENERATE.start_idx;
            return self.ids(&GENERATE.around(text), tokens);
        };
        if text.contains(IMAGE_PAD) {
            return Err(Error::Invalid { field, reason: format!("it holds {IMAGE_PAD}, which stands for the picture") });
        }
        let whole = EDIT.around(&format!("{}{text}", seen.text));
        match self.tokenizer.count(&whole)? {
            tokens if tokens <= MAX_TOKENS_WITH_PICTURE => self.ids(&whole, tokens),
            tokens => {
                let own = seen.text.matches(IMAGE_PAD).count();
                let reason = format!("{tokens} tokens with the pictures' {own}: at most {MAX_TOKENS_WITH_PICTURE}");
                Err(Error::Invalid { field, reason })
            }
        }
    }

    /// At most `most` ids of a whole text, not padded.
    fn ids(&self, whole: &str, most: usize) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(whole, most)?;
        let tokens = encoding.attention_mask.iter().filter(|real| **real == 1).count();
        Ok(encoding.input_ids.into_iter().take(tokens).collect())
    }

    /// `prompt_embeds` of a text; `field` is where it stands in the request.
    fn encode(&mut self, text: &str, field: &'static str, request: &Request, seen: Option<&Seen>) -> Result<Tensor> {
        let key = Key {
            text: text.to_owned(),
            tokens: request.max_sequence_length,
            clip_skip: 0,
            picture: seen.map(|seen| seen.sha256),
            share: Share::new(1, &self.runner.relevant(&request.loras)?),
        };
        if let Some(mut known) = self.cache.get(&key) {
            return Ok(known.take("prompt_embeds")?);
        }
        let ids = self.tokenize(text, field, request, seen)?;
        let (len, start_idx) = (ids.len(), if seen.is_some() { EDIT.start_idx } else { GENERATE.start_idx });
        let mut inputs = seen.map(|seen| seen.inputs.clone()).unwrap_or_default();
        inputs.insert("input_ids", Tensor::from_vec(ids, (1, len), &Device::Cpu)?);
        let last_hidden_state = self.runner.forward(&inputs, std::slice::from_ref(&key.share))?.take("last_hidden_state")?; // [1, L, D]
        let kept = len.checked_sub(start_idx).filter(|kept| *kept > 0).ok_or_else(|| Error::Invalid {
            field,
            reason: format!("{len} tokens within its template, of which the first {start_idx} are not used"),
        })?;
        let embeds = last_hidden_state.narrow(1, start_idx, kept)?.contiguous()?;
        self.cache.put(key, Tensors::new().with("prompt_embeds", embeds.clone()));
        Ok(embeds)
    }

    fn run(&mut self, request: &Request, inputs: &Inputs) -> Result<Payload> {
        let seen = self.eyes.as_ref().map(|eyes| eyes.look(&inputs.pictures)).transpose()?;
        let prompt = self.encode(request.prompt_of(Encoder::First), "prompt", request, seen.as_ref())?;
        let mut out = Tensors::new().with("prompt_embeds", prompt);
        if let Some(negative) = request.negative_prompt_of(Encoder::First, GUIDANCE) {
            out.insert("negative_prompt_embeds", self.encode(negative, "negative_prompt", request, seen.as_ref())?);
        }
        Ok(Payload::Conditioning(out))
    }
}

impl Template {
    fn around(&self, text: &str) -> String {
        format!("{}{text}{}", self.before, self.after)
    }
}

impl Eyes {
    /// The job's pictures at their working sizes, as the network takes them.
    fn look(&self, pictures: &Pictures) -> Result<Seen> {
        let missing = || Error::Invalid { field: "image", reason: "there is none, and this model edits one".into() };
        let first = pictures.image.as_ref().ok_or_else(missing)?;
        if !self.editing.several && !pictures.more.is_empty() {
            return Err(Error::Invalid { field: "image", reason: "there are several, and this model edits one".into() });
        }
        let (mut patches, mut grids, mut text, mut sha256) = (Vec::new(), Vec::new(), String::new(), Sha256::new());
        for (number, file) in (1..).zip(std::iter::once(first).chain(&pictures.more)) {
            let (inputs, tokens) = self.see(file).map_err(|error| if number > 1 { of_more(number - 1, error) } else { error })?;
            patches.push(inputs.get("pixel_values")?.clone());
            grids.push(inputs.get("image_grid_thw")?.clone());
            if self.editing.several {
                text += &format!("Picture {number}: ");
            }
            text += &format!("<|vision_start|>{}<|vision_end|>", IMAGE_PAD.repeat(tokens));
            sha256.update(Sha256::digest(file));
        }
        let inputs =
            Tensors::new().with("pixel_values", Tensor::cat(&patches, 0)?).with("image_grid_thw", Tensor::cat(&grids, 0)?);
        Ok(Seen { inputs, text, sha256: sha256.finalize().into() })
    }

    /// One picture, and how many tokens it has.
    fn see(&self, file: &[u8]) -> Result<(Tensors, usize)> {
        let picture = image_io::decode_picture(file, &self.limits)?;
        let (width, height) = working_size(&picture, self.editing.seen)?;
        self.processor.process(&image_io::resize(&picture, width, height)?)
    }
}

impl OneAtATime for PromptStage {
    fn waiting(&mut self) -> &mut Waiting {
        &mut self.waiting
    }

    fn do_task(&mut self, request: &Request, inputs: &Inputs) -> Result<Payload> {
        self.run(request, inputs)
    }
}

impl std::fmt::Debug for PromptStage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PromptStage({:?}, {:?})", self.tokenizer, self.eyes)
    }
}
