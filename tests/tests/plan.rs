//! What each rank would read of the published models, by the loading code against their true headers: every byte once, but for
//! a small share that every rank has whole, each tensor of it for a reason.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use models::blocks::Layout;
use models::model_dir::ModelDir;
use models::registry;
use parallel::Device;
use tests::published::{self, Published};

/// A published model: the next one is an entry here and a folder in `tests/plan`.
struct Model {
    name: &'static str,
    /// Recorded pipelines of the same classes at a small size: each component is in the first that has it, and the tokenizers of
    /// the last stand in for the model's own.
    recorded: &'static [&'static str],
    components: &'static [Component],
}

struct Component {
    name: &'static str,
    parameters: u64,
    /// Most bytes in 10,000 that every rank may read whole.
    whole: u64,
    /// Which tensors these are (`*` is anything), and why.
    reasons: &'static [(&'static str, &'static str)],
    /// Tensors that every block range reads its ranks' slices of, and why.
    every_range: &'static [(&'static str, &'static str)],
    /// Tensors that are cut in other than equal slices at some number of ranks, and why.
    unequal: &'static [(&'static str, &'static str)],
    /// Tensors that nobody reads, and why.
    unread: &'static [(&'static str, &'static str)],
}

impl Component {
    const fn new(name: &'static str, parameters: u64, whole: u64, reasons: &'static [(&'static str, &'static str)]) -> Self {
        Self { name, parameters, whole, reasons, every_range: &[], unequal: &[], unread: &[] }
    }
}

const NORM: &str = "a norm is over all channels, of which every rank has all";
const AFTER_THE_SUM: &str = "the bias of a row-parallel layer is added once, after the sum over the ranks";
const EMBEDDER: &str = "every rank begins with all channels of tokens and conditioning: narrow layers, or one of a kind";
const HEAD_NORM: &str = "the norm of a head, the same for all heads";
const OUTPUT: &str = "every rank of the last range has the output, which is narrow";

/// CLIP's text encoder, L or bigG.
const CLIP: &[(&str, &str)] = &[
    ("text_model.embeddings.position_embedding.weight", "77 rows, added to all channels of the tokens"),
    ("text_model.*layer_norm*", NORM),
    ("text_model.encoder.layers.*.self_attn.out_proj.bias", AFTER_THE_SUM),
    ("text_model.encoder.layers.*.mlp.fc2.bias", AFTER_THE_SUM),
];
/// The same with the projection of its pooled output.
const CLIP_WITH_PROJECTION: &[(&str, &str)] =
    &[CLIP[0], CLIP[1], CLIP[2], CLIP[3], ("text_projection.weight", "one row of one token is projected: a sum would cost more")];
const T5: Component = Component {
    every_range: &[(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "the one table of relative positions, for the attention of every block",
    )],
    ..Component::new("text_encoder_3", 4_762_310_656, 1, &[("encoder.*layer_norm.weight", NORM)])
};
const VAE: Component =
    Component::new("vae", 83_819_683, 10_000, &[("*", "its attention has one head, and it is small beside the rest")]);
/// The transformers of Stable Diffusion 3; the norms of q and k are 3.5's alone.
const SD3: &[(&str, &str)] = &[
    ("context_embedder.*", EMBEDDER),
    ("time_text_embed.*", EMBEDDER),
    ("proj_out.*", OUTPUT),
    ("transformer_blocks.*.attn.to_out.0.bias", AFTER_THE_SUM),
    ("transformer_blocks.*.attn.to_add_out.bias", AFTER_THE_SUM),
    ("transformer_blocks.*.net.2.bias", AFTER_THE_SUM),
];
const SD35: &[(&str, &str)] = &[SD3[0], SD3[1], SD3[2], SD3[3], SD3[4], SD3[5], ("*.attn.norm_*.weight", HEAD_NORM)];

/// The U-Nets of Stable Diffusion; the embedding of sizes is XL's alone.
const UNET: &[(&str, &str)] = &[
    ("conv_in.*", EMBEDDER),
    ("time_embedding.*", EMBEDDER),
    ("*.norm1.*", NORM),
    ("*.transformer_blocks.*.norm2.*", NORM),
    ("*.norm3.*", NORM),
    ("*.attentions.*.norm.*", NORM),
    ("*.attn*.to_out.0.bias", AFTER_THE_SUM),
    ("*.ff.net.2.bias", AFTER_THE_SUM),
    ("conv_norm_out.*", NORM),
    ("conv_out.*", OUTPUT),
];
const UNET_XL: &[(&str, &str)] =
    &[UNET[0], UNET[1], UNET[2], UNET[3], UNET[4], UNET[5], UNET[6], UNET[7], UNET[8], UNET[9], ("add_embedding.*", EMBEDDER)];
/// The autoencoder of Stable Diffusion, whose latents have 4 channels.
const SD_VAE: Component = Component { parameters: 83_653_863, ..VAE };

/// BERT.
const BERT: &[(&str, &str)] = &[
    ("embeddings.position_embeddings.weight", "512 rows, added to all channels of the tokens"),
    ("embeddings.token_type_embeddings.weight", "2 rows, added to all channels of the tokens"),
    ("*.LayerNorm.*", NORM),
    ("encoder.layer.*.output.dense.bias", AFTER_THE_SUM),
];
/// DiT's transformer.
const DIT: &[(&str, &str)] = &[
    ("proj_out_2.*", OUTPUT),
    ("*.linear_2.bias", AFTER_THE_SUM),
    ("*.to_out.0.bias", AFTER_THE_SUM),
    ("*.net.2.bias", AFTER_THE_SUM),
];
/// Hunyuan-DiT's transformer.
const HUNYUAN: &[(&str, &str)] = &[
    ("text_embedding_padding", "333 rows in place of all channels of tokens"),
    ("time_extra_emb.timestep_embedder.*", EMBEDDER),
    ("time_extra_emb.style_embedder.weight", EMBEDDER),
    ("time_extra_emb.pooler.positional_embedding", "257 rows, added to all channels of the tokens"),
    ("time_extra_emb.pooler.c_proj.bias", AFTER_THE_SUM),
    ("*.linear_2.bias", AFTER_THE_SUM),
    ("proj_out.*", OUTPUT),
    ("*.norm1.norm.*", NORM),
    ("*.norm2.*", NORM),
    ("*.norm3.*", NORM),
    ("*.skip_norm.*", NORM),
    ("*.attn*.norm_*", HEAD_NORM),
    ("*.to_out.0.bias", AFTER_THE_SUM),
    ("*.net.2.bias", AFTER_THE_SUM),
];
/// PixArt's transformer.
const PIXART: &[(&str, &str)] = &[
    ("adaln_single.emb.*", EMBEDDER),
    ("caption_projection.linear_2.bias", AFTER_THE_SUM),
    ("proj_out.*", OUTPUT),
    ("*scale_shift_table", "scales and shifts of all channels, of which every rank has all"),
    ("transformer_blocks.*.to_out.0.bias", AFTER_THE_SUM),
    ("transformer_blocks.*.net.2.bias", AFTER_THE_SUM),
];

const MODELS: &[Model] = &[
    Model {
        name: "flux1-dev",
        recorded: &["flux_dev_txt2img/pipeline"],
        components: &[
            Component::new("text_encoder", 123_060_480, 10, CLIP),
            Component { name: "text_encoder_2", ..T5 },
            Component::new(
                "transformer",
                11_901_408_320,
                40,
                &[
                    ("x_embedder.*", EMBEDDER),
                    ("context_embedder.*", EMBEDDER),
                    ("time_text_embed.*", EMBEDDER),
                    ("proj_out.*", OUTPUT),
                    ("*.attn.norm_*.weight", HEAD_NORM),
                    ("transformer_blocks.*.attn.to_out.0.bias", AFTER_THE_SUM),
                    ("transformer_blocks.*.attn.to_add_out.bias", AFTER_THE_SUM),
                    ("transformer_blocks.*.net.2.bias", AFTER_THE_SUM),
                    ("single_transformer_blocks.*.proj_out.bias", AFTER_THE_SUM),
                ],
            ),
            VAE,
        ],
    },
    Model {
        name: "sd15",
        recorded: &["sd15_txt2img/pipeline"],
        components: &[
            Component {
                unread: &[("text_model.embeddings.position_ids", "a buffer of 0, 1, 2, ... in older files")],
                ..Component::new("text_encoder", 123_060_557, 10, CLIP)
            },
            Component::new("unet", 859_520_964, 40, UNET),
            SD_VAE,
        ],
    },
    Model {
        name: "sdxl",
        recorded: &["sdxl_txt2img/pipeline"],
        components: &[
            Component::new("text_encoder", 123_060_480, 10, CLIP),
            Component::new("text_encoder_2", 694_659_840, 30, CLIP_WITH_PROJECTION),
            Component::new("unet", 2_567_463_684, 40, UNET_XL),
            SD_VAE,
        ],
    },
    Model {
        name: "dit-xl-2-256",
        recorded: &["dit_pipeline/pipeline"],
        components: &[Component::new("transformer", 749_826_464, 5, DIT), SD_VAE],
    },
    Model {
        name: HUNYUAN_NAME,
        recorded: &["hunyuan_pipeline/pipeline"],
        components: &[
            Component::new("text_encoder", 352_035_840, 25, BERT),
            Component { name: "text_encoder_2", parameters: 1_669_958_656, ..T5 },
            Component::new("transformer", 1_516_534_048, 40, HUNYUAN),
            SD_VAE,
        ],
    },
    Model {
        name: "pixart-xl-1024",
        recorded: &["pixart_pipeline/pipeline"],
        components: &[Component { name: "text_encoder", ..T5 }, Component::new("transformer", 611_349_152, 50, PIXART), SD_VAE],
    },
    Model {
        name: "sd3-medium",
        recorded: &["sd3_txt2img/pipeline"],
        components: &[
            Component::new("text_encoder", 123_650_304, 60, CLIP_WITH_PROJECTION),
            Component::new("text_encoder_2", 694_659_840, 30, CLIP_WITH_PROJECTION),
            T5,
            Component::new("transformer", 2_084_951_104, 80, SD3),
            VAE,
        ],
    },
    Model {
        name: "sd35-large",
        recorded: &["sd35_txt2img/pipeline", "sd3_txt2img/pipeline"],
        components: &[
            Component::new("text_encoder", 123_650_304, 60, CLIP_WITH_PROJECTION),
            Component::new("text_encoder_2", 694_659_840, 30, CLIP_WITH_PROJECTION),
            T5,
            Component::new("transformer", 8_146_280_768, 40, SD35),
            VAE,
        ],
    },
    Model {
        name: "qwen-image",
        recorded: &["qwen_txt2img/pipeline"],
        components: &[
            Component {
                unequal: &[("*.self_attn.*", "28 heads of queries on 8 ranks: a head on the cut is on both")],
                unread: &[
                    ("visual.*", "a prompt without pictures needs no vision tower"),
                    ("lm_head.weight", "embeddings are taken before it"),
                ],
                ..Component::new(
                    "text_encoder",
                    8_292_166_656,
                    10,
                    &[("model.*layernorm.weight", NORM), ("model.norm.weight", NORM)],
                )
            },
            Component::new(
                "transformer",
                20_430_401_088,
                40,
                &[
                    ("img_in.*", EMBEDDER),
                    ("txt_in.*", EMBEDDER),
                    ("txt_norm.weight", EMBEDDER),
                    ("time_text_embed.*", EMBEDDER),
                    ("proj_out.*", OUTPUT),
                    ("*.attn.norm_*.weight", HEAD_NORM),
                    ("transformer_blocks.*.attn.to_out.0.bias", AFTER_THE_SUM),
                    ("transformer_blocks.*.attn.to_add_out.bias", AFTER_THE_SUM),
                    ("transformer_blocks.*.net.2.bias", AFTER_THE_SUM),
                ],
            ),
            Component {
                unequal: &[("*.weight", "of a kernel in time the last frame, the one that a single picture meets")],
                unread: &[("*.time_conv.*", "there is one frame")],
                ..Component::new(
                    "vae",
                    126_892_531,
                    10_000,
                    &[("*", "its attention has one head, and it is small beside the rest")],
                )
            },
        ],
    },
];

/// Tensors of the recorded transformers that this one has not: the second attention of dual blocks is 3.5 medium's.
const NOT_IN_LARGE: &str = "transformer_blocks.*.attn2.*";

const HUNYUAN_NAME: &str = "hunyuan-dit-1.1";
/// Tensors of Hunyuan-DiT that the recorded pipeline's two blocks have not; the transformer that is recorded alone has them.
const NOT_IN_TWO_BLOCKS: &str = "blocks.*.skip_*";

/// The recorded pipelines, as folders.
fn recorded(model: &Model) -> impl DoubleEndedIterator<Item = PathBuf> {
    model.recorded.iter().map(|pipeline| Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(pipeline))
}

fn tokenizers(model: &Model) -> PathBuf {
    recorded(model).next_back().unwrap()
}

/// Whether `name` is what `pattern` says, where `*` is anything.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((before, after)) => name
            .strip_prefix(before)
            .is_some_and(|rest| (0..=rest.len()).any(|i| rest.is_char_boundary(i) && matches(after, &rest[i..]))),
    }
}

/// The first pattern that `name` is of.
fn reason(patterns: &[(&'static str, &str)], name: &str) -> Option<&'static str> {
    patterns.iter().find(|(pattern, _)| matches(pattern, name)).map(|(pattern, _)| *pattern)
}

/// Checks one layout of one component; gives the patterns of the tensors that are read whole or in every range.
fn check(dir: &ModelDir, component: &Component, tensors: &[Published], layout: Layout) -> BTreeSet<&'static str> {
    let at = format!("{} at {layout}", component.name);
    let needs = registry::measure(dir, component.name, layout).unwrap();
    let mut reads: BTreeMap<&str, Vec<(u64, bool)>> = BTreeMap::new();
    for (name, read) in needs.iter().flat_map(|need| &need.tensors) {
        reads.entry(name).or_default().push((read.bytes, read.whole));
    }
    let (tp, mut seen) = (layout.tp as u64, BTreeSet::new());
    let (mut total, mut replicated, mut repeated, mut unequal) = (0, 0, 0, 0);
    for tensor in tensors {
        let (name, bytes) = (tensor.name.as_str(), tensor.bytes());
        let Some(read) = reads.get(name) else {
            seen.insert(reason(component.unread, name).unwrap_or_else(|| panic!("{at}: nobody reads {name}")));
            continue;
        };
        let whole = read[0].1;
        if !read.iter().all(|r| *r == (if whole { bytes } else { bytes / tp }, whole)) {
            seen.insert(reason(component.unequal, name).unwrap_or_else(|| panic!("{at}: {name}: {read:?}")));
            assert_eq!(read.len(), layout.tp, "{at}: {name} is read by one range");
            let sum: u64 = read.iter().map(|read| read.0).sum();
            // What overlaps is a head at most, of at least three.
            assert!(sum * 3 <= bytes * 4 || read.iter().all(|read| *read == (sum / tp, false)), "{at}: {name}: {read:?}");
            unequal += sum;
            continue;
        }
        total += bytes;
        if whole {
            replicated += bytes;
            seen.insert(reason(component.reasons, name).unwrap_or_else(|| panic!("{at}: {name} is whole for no reason")));
        }
        let ranges = read.len() / layout.tp;
        assert_eq!(read.len() % layout.tp, 0, "{at}: {name}");
        if ranges > 1 {
            seen.insert(reason(component.every_range, name).unwrap_or_else(|| panic!("{at}: {name} is read by {ranges} ranges")));
            repeated += bytes * (ranges as u64 - 1);
        }
    }
    let read: u64 = needs.iter().map(|need| need.read_bytes).sum();
    assert_eq!(read, total + (tp - 1) * replicated + repeated + unequal, "{at}");
    assert!(replicated * 10_000 <= (total + unequal) * component.whole, "{at}: {replicated} of {total} bytes are whole");
    let most = needs.iter().map(|need| need.read_bytes).max().unwrap_or_default();
    println!("{at:<32} reads {read:>12}, at most {most:>12} a rank; whole {:.4} %", 100.0 * replicated as f64 / total as f64);
    seen
}

#[test]
fn every_rank_of_a_published_model_reads_its_slice_and_what_is_whole_has_a_reason() {
    for model in MODELS {
        let folder = published::model(model.name, &tokenizers(model)).unwrap();
        let dir = ModelDir::open(folder.path()).unwrap();
        let card = registry::outline(&dir).unwrap();
        let names: Vec<&str> = model.components.iter().map(|component| component.name).collect();
        assert_eq!(card.components.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), names, "{}", model.name);
        for (component, card) in model.components.iter().zip(&card.components) {
            let tensors = published::tensors(model.name, component.name).unwrap();
            assert_eq!(tensors.iter().map(Published::parameters).sum::<u64>(), component.parameters, "{}", component.name);
            let mut seen = BTreeSet::new();
            for tp in card.tp_options.iter().copied() {
                for block_ranges in [1, 2].into_iter().filter(|ranges| *ranges <= card.max_block_ranges) {
                    seen.extend(check(&dir, component, &tensors, Layout::new(tp, block_ranges)));
                }
            }
            let all = component
                .reasons
                .iter()
                .chain(component.every_range)
                .chain(component.unequal)
                .chain(component.unread)
                .map(|(pattern, _)| *pattern);
            assert_eq!(seen, all.collect(), "{}: every reason has its tensors", component.name);
        }
    }
}

#[test]
fn lanes_of_a_published_denoiser_read_it_once_each() {
    let model = &MODELS[0];
    let folder = published::model(model.name, &tokenizers(model)).unwrap();
    let dir = ModelDir::open(folder.path()).unwrap();
    let one = registry::measure(&dir, "transformer", Layout::new(4, 2)).unwrap();
    let two = registry::measure(&dir, "transformer", Layout::new(4, 2).with_cfg_parallel(2)).unwrap();
    assert_eq!(two, [one.clone(), one].concat());
}

/// A name without the numbers in it, and how many dimensions the tensor has.
fn kind(name: &str, dimensions: usize) -> (String, usize) {
    let parts = name.split('.').map(|part| if part.parse::<usize>().is_ok() { "*" } else { part });
    (parts.collect::<Vec<_>>().join("."), dimensions)
}

#[test]
fn published_tensors_have_the_names_that_the_references_classes_wrote() {
    for model in MODELS {
        for component in model.components {
            let folder = recorded(model).map(|pipeline| pipeline.join(component.name)).find(|folder| folder.is_dir()).unwrap();
            let files = parallel::weights::checkpoint_files(&folder).unwrap();
            let recorded = files.iter().flat_map(|file| candle_core::safetensors::load(file, &Device::Cpu).unwrap());
            let is_here = |name: &str| model.name != "sd35-large" || !matches(NOT_IN_LARGE, name);
            let recorded = recorded.filter(|(name, _)| is_here(name));
            let recorded: BTreeSet<_> = recorded.map(|(name, tensor)| kind(&name, tensor.rank())).collect();
            let tensors = published::tensors(model.name, component.name).unwrap();
            let is_recorded = |name: &str| model.name != HUNYUAN_NAME || !matches(NOT_IN_TWO_BLOCKS, name);
            let published = tensors.iter().filter(|tensor| is_recorded(&tensor.name));
            let published: BTreeSet<_> = published.map(|tensor| kind(&tensor.name, tensor.shape.len())).collect();
            assert_eq!(published, recorded, "{}: {}", model.name, component.name);
        }
    }
}
