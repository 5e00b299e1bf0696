//! An adapter's keys, in whatever style, to layers: `NAME DIMS...` lines make a file, whose keys are mapped and whose factors are read.
#![no_main]

use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use models::lora::file::AdapterFile;
use models::lora::mapping::{self, Sites};
use parallel::lora::{Cut, Site};

/// Most elements of a tensor: contents are not what this is about.
const MOST: usize = 1 << 12;

fn sites() -> Sites {
    let names = [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.attn.to_v",
        "transformer_blocks.0.ff.net.0.proj",
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.attn.to_k",
        "single_transformer_blocks.0.attn.to_v",
        "norm_out.linear",
        "x_embedder",
        "down_blocks.0.resnets.0.time_emb_proj",
        "down_blocks.1.attentions.0.proj_in",
    ];
    let convolutions = ["down_blocks.0.resnets.0.conv1", "up_blocks.0.upsamplers.0.conv"];
    let site = |name: &str, kernel| Site { name: name.to_owned(), d_in: 4, d_out: 4, kernel, cut: Cut::Whole };
    let linear = names.iter().map(|name| site(name, None));
    Sites::new("transformer", linear.chain(convolutions.iter().map(|name| site(name, Some(3)))))
}

/// A safetensors file of these keys, all zeros.
fn file(text: &str) -> Vec<u8> {
    let (mut header, mut end) = (Vec::new(), 0);
    for line in text.lines().take(64) {
        let mut words = line.split(' ');
        let name: String = words.next().unwrap_or_default().chars().filter(|c| !matches!(c, '"' | '\\') && *c >= ' ').collect();
        let shape: Vec<usize> = words.filter_map(|word| word.parse().ok()).take(4).collect();
        let elements = shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim)).unwrap_or(MOST);
        if elements >= MOST || name == "__metadata__" {
            continue;
        }
        let start = end;
        end += 4 * elements;
        header.push(format!(r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{end}]}}"#));
    }
    let header = format!("{{{}}}", header.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + end, 0);
    bytes
}

fuzz_target!(|text: &str| {
    let Ok(file) = AdapterFile::parse(PathBuf::from("adapter.safetensors"), file(text)) else { return };
    for partial in [false, true] {
        let Ok(changes) = mapping::changes(&file, &[sites()], partial) else { continue };
        for change in changes {
            assert_eq!(change.component, "transformer");
            if let Ok(factors) = change.factors(&file) {
                assert_eq!(factors.a.dims().len(), 2);
                let width = if change.site.contains("conv") { 4 * 3 * 3 } else { 4 };
                assert_eq!(factors.a.dims()[1], width, "as wide as the layer's input");
                assert_eq!(factors.b.dims(), [4, factors.a.dims()[0]], "as tall as its output");
            }
        }
    }
});
