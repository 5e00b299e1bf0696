//! The EncodeText stage: prompts to embeddings, and the embeddings kept for prompts that come again.

use std::collections::{HashMap, VecDeque};

use parallel::{Tensor, Tensors};

use crate::block_runner::BlockRunner;
use crate::lora::Share;
use crate::request::{Encoder, Guidance};
use crate::stage::{Inputs, OneAtATime, Waiting};
use crate::tokenizer::Tokenizer;
use crate::{Error, Payload, Request, Result};

/// What of a text encoder's outputs is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The one of that name, such as `last_hidden_state`.
    Output(&'static str),
    /// `hidden_states[-n]`; the job's `clip_skip` is added to n. As in the reference, not for the negative prompt.
    HiddenState(usize),
    /// The same after the encoder's final norm: of the last one, what `last_hidden_state` is.
    NormedState(usize),
}

/// What a family does with one text encoder.
#[derive(Debug)]
pub struct TextEncoding {
    /// Turns text to ids.
    pub tokenizer: Tokenizer,
    /// How many tokens the encoder reads; `None`: the job's `max_sequence_length`.
    pub tokens: Option<usize>,
    /// What is kept, each with what the denoiser calls it (`prompt_embeds`, `pooled_prompt_embeds`).
    pub outputs: Vec<(Kept, &'static str)>,
    /// Whether it takes `attention_mask` besides `input_ids`.
    pub with_mask: bool,
    /// Which of the job's prompts it reads.
    pub encoder: Encoder,
    /// Another's prompts, which it reads besides where they differ, and what its outputs of them begin with.
    pub besides: Option<(Encoder, &'static str)>,
    /// Whether it reads a negative prompt too.
    pub guidance: Guidance,
}

/// A text encoder, on the leader of its group.
pub struct TextStage {
    encoding: TextEncoding,
    runner: BlockRunner,
    waiting: Waiting,
    cache: PromptCache,
}

impl TextStage {
    /// For the leader of the group that holds the encoder. Keeps at most `cache_bytes` of embeddings.
    pub fn new(encoding: TextEncoding, runner: BlockRunner, cache_bytes: usize) -> Self {
        Self { encoding, runner, waiting: Waiting::default(), cache: PromptCache::new(cache_bytes) }
    }

    /// The ids the encoder is given for `text`: `input_ids: [1, L]`, and `attention_mask` if it takes one.
    pub fn tokenize(&self, text: &str, request: &Request) -> Result<Tensors> {
        let tokens = self.encoding.tokens.unwrap_or(request.max_sequence_length);
        let encoding = self.encoding.tokenizer.encode(text, tokens)?;
        let row = |ids: Vec<u32>| {
            let len = ids.len();
            Tensor::from_vec(ids, (1, len), &parallel::Device::Cpu)
        };
        let mut inputs = Tensors::new().with("input_ids", row(encoding.input_ids)?);
        if self.encoding.with_mask {
            inputs.insert("attention_mask", row(encoding.attention_mask)?);
        }
        Ok(inputs)
    }

    /// What the denoiser is given for `text`, by its names.
    fn encode(&mut self, text: &str, request: &Request, clip_skip: usize) -> Result<Tensors> {
        let skips = self.encoding.outputs.iter().any(|(kept, _)| matches!(kept, Kept::HiddenState(_) | Kept::NormedState(_)));
        let key = Key {
            text: text.to_owned(),
            tokens: self.encoding.tokens.unwrap_or(request.max_sequence_length),
            clip_skip: if skips { clip_skip } else { 0 },
            picture: None,
            share: Share::new(1, &self.runner.relevant(&request.loras)?),
        };
        if let Some(known) = self.cache.get(&key) {
            return Ok(known);
        }
        let inputs = self.tokenize(text, request)?;
        let mut network = self.runner.forward(&inputs, std::slice::from_ref(&key.share))?;
        let mut embeds = Tensors::new();
        for (kept, name) in &self.encoding.outputs {
            let output = match kept {
                Kept::Output(output) => network.take(output)?,
                Kept::HiddenState(n) => hidden_state(&network, "hidden_states", *n, clip_skip)?,
                Kept::NormedState(n) => hidden_state(&network, "normed_states", *n, clip_skip)?,
            };
            embeds.insert(*name, output);
        }
        self.cache.put(key, embeds.clone());
        Ok(embeds)
    }

    fn run(&mut self, request: &Request) -> Result<Payload> {
        let TextEncoding { encoder, guidance, besides, .. } = self.encoding;
        let mut out = self.prompts(encoder, request)?;
        let said = |encoder| (request.prompt_of(encoder), request.negative_prompt_of(encoder, guidance));
        if let Some((other, prefix)) = besides.filter(|(other, _)| said(*other) != said(encoder)) {
            let embeds = self.prompts(other, request)?;
            out.extend(embeds.into_iter().map(|(name, embeds)| (format!("{prefix}{name}"), embeds)).collect());
        }
        Ok(Payload::Conditioning(out))
    }

    /// The embeddings of an encoder's prompt and, where it has one, of its negative prompt.
    fn prompts(&mut self, encoder: Encoder, request: &Request) -> Result<Tensors> {
        let mut out = self.encode(request.prompt_of(encoder), request, request.clip_skip.unwrap_or(0))?;
        if let Some(negative) = request.negative_prompt_of(encoder, self.encoding.guidance) {
            let negative = self.encode(negative, request, 0)?;
            negative.into_iter().for_each(|(name, embeds)| out.insert(format!("negative_{name}"), embeds));
        }
        Ok(out)
    }
}

impl OneAtATime for TextStage {
    fn waiting(&mut self) -> &mut Waiting {
        &mut self.waiting
    }

    fn do_task(&mut self, request: &Request, _inputs: &Inputs) -> Result<Payload> {
        self.run(request)
    }
}

impl std::fmt::Debug for TextStage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TextStage({:?})", self.encoding.outputs)
    }
}

/// `states[-(n + clip_skip)]`, where the first is the embeddings and the last the last block's output.
fn hidden_state(network: &Tensors, states: &str, n: usize, clip_skip: usize) -> Result<Tensor> {
    let states = network.list(states);
    let at = n.checked_add(clip_skip).and_then(|n| states.len().checked_sub(n));
    let state = at.and_then(|at| states.into_iter().nth(at));
    state.ok_or_else(|| Error::Invalid { field: "clip_skip", reason: format!("{clip_skip} is more than the encoder's blocks") })
}

/// All that an encoder's embeddings of a text depend on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) text: String,
    pub(crate) tokens: usize,
    pub(crate) clip_skip: usize,
    /// sha256 of a picture that is read along.
    pub(crate) picture: Option<[u8; 32]>,
    /// The adapters that change the encoder.
    pub(crate) share: Share,
}

/// Embeddings that were made, the least recently used dropped first. One cache an encoder: its digest is its place.
#[derive(Debug)]
pub(crate) struct PromptCache {
    limit: usize,
    bytes: usize,
    entries: HashMap<Key, Tensors>,
    order: VecDeque<Key>,
}

impl PromptCache {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, bytes: 0, entries: HashMap::new(), order: VecDeque::new() }
    }

    pub(crate) fn get(&mut self, key: &Key) -> Option<Tensors> {
        let found = self.entries.get(key)?.clone();
        self.order.retain(|k| k != key);
        self.order.push_back(key.clone());
        Some(found)
    }

    pub(crate) fn put(&mut self, key: Key, embeds: Tensors) {
        let size = embeds.byte_size() + key.text.len();
        if size > self.limit {
            return;
        }
        while self.bytes + size > self.limit {
            let Some(oldest) = self.order.pop_front() else { break };
            if let Some(gone) = self.entries.remove(&oldest) {
                self.bytes -= gone.byte_size() + oldest.text.len();
            }
        }
        self.bytes += size;
        self.order.push_back(key.clone());
        self.entries.insert(key, embeds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_drops_what_was_used_longest_ago() {
        let embeds = |floats: usize| {
            let zeros = Tensor::zeros(floats, parallel::DType::F32, &parallel::Device::Cpu).unwrap();
            Tensors::new().with("prompt_embeds", zeros)
        };
        let mut cache = PromptCache::new(220);
        let share = Share::default();
        let key = |s: &str| Key { text: s.to_owned(), tokens: 8, clip_skip: 0, picture: None, share: share.clone() };
        cache.put(key("a"), embeds(25)); // 100 bytes
        cache.put(key("b"), embeds(25));
        assert!(cache.get(&key("a")).is_some());
        cache.put(key("c"), embeds(25));
        assert!(cache.get(&key("b")).is_none() && cache.get(&key("a")).is_some() && cache.get(&key("c")).is_some());
        assert!(cache.bytes <= 220);
        cache.put(key("too big"), embeds(100));
        assert!(cache.get(&key("too big")).is_none());
    }

    #[test]
    fn clip_skip_counts_from_the_end_and_may_not_pass_the_beginning() {
        let state = |i: u32| (format!("hidden_states.{i}"), Tensor::new(&[i], &parallel::Device::Cpu).unwrap());
        let network: Tensors = (0..4).map(state).collect();
        let at =
            |n, clip_skip| hidden_state(&network, "hidden_states", n, clip_skip).map(|state| state.to_vec1::<u32>().unwrap()[0]);
        assert_eq!((at(2, 0).unwrap(), at(2, 1).unwrap(), at(2, 2).unwrap()), (2, 1, 0));
        for too_many in [3, usize::MAX] {
            assert!(matches!(at(2, too_many), Err(Error::Invalid { field: "clip_skip", .. })));
        }
    }
}
