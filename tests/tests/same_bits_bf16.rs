//! As `same_bits.rs`, for products of fewer bits. A program of its own with one test, since what a process multiplies in is the process's.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::{BTreeSet, HashMap};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread;

use candle_core::quantized::GgmlDType;
use models::blocks::Layout;
use parallel::ops::{Products, has_kernels};
use parallel::{DType, Device};
use tests::gguf;
use tests::same_bits::{Model, check_every_layout, draw, emoji};

/// The model with its transformer's matrices in `Q8_0`, where their rows are whole blocks.
fn in_eight_bits(dir: &Path) -> tempfile::TempDir {
    let (dir, copy) = (dir.canonicalize().unwrap(), tempfile::tempdir().unwrap());
    for entry in std::fs::read_dir(&dir).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != "transformer" {
            symlink(entry.path(), copy.path().join(entry.file_name())).unwrap();
        }
    }
    let [from, to] = [&*dir, copy.path()].map(|dir| dir.join("transformer"));
    std::fs::create_dir(&to).unwrap();
    std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let tensors = candle_core::safetensors::load(from.join("diffusion_pytorch_model.safetensors"), &Device::Cpu).unwrap();
    let wide = |(name, tensor): (String, candle_core::Tensor)| (name, tensor.to_dtype(DType::F32).unwrap());
    let tensors: HashMap<_, _> = tensors.into_iter().map(wide).collect();
    let (blocks, _) = gguf::quantised(&tensors, GgmlDType::Q8_0).unwrap();
    gguf::write(&to.join("transformer.gguf"), &blocks).unwrap();
    copy
}

#[test]
fn latents_and_pictures_have_the_same_bits_on_every_layout_in_bf16_amx_and_int8() {
    if !has_kernels(&Device::Cpu) {
        return; // candle's operations for the CPU multiply in f32 alone, which a worker says
    }
    let eight = in_eight_bits(emoji().dir);
    let eight = Model { dir: eight.path(), ..emoji() };
    let of = |products: Products, model: &Model<'_>, draw: fn(&Model<'_>) -> Vec<String>| products.scope(|| draw(model));
    let alone = |model: &Model<'_>| draw(model, Layout::SOLO, 1)[0].clone();
    let [wide, of_blocks] = [of(Products::F32, &emoji(), alone), of(Products::Bf16, &eight, alone)];
    let [narrow, tiles] = [Products::Bf16, Products::Amx].map(|products| of(products, &emoji(), check_every_layout));
    let bytes = of(Products::Int8, &eight, check_every_layout);
    // Each is another arithmetic, or it would show nothing.
    let all: BTreeSet<_> = [&wide, &narrow, &tiles, &of_blocks, &bytes].into_iter().map(|drawn| drawn.last()).collect();
    assert_eq!(all.len(), 5);
}

#[test]
fn ranks_of_one_process_each_multiply_in_their_own_way() {
    if !has_kernels(&Device::Cpu) {
        return;
    }
    let drawn = |way: Products| way.scope(|| draw(&emoji(), Layout::new(2, 1), 1));
    let one_by_one = Products::ALL.map(drawn);
    let at_once =
        thread::scope(|scope| Products::ALL.map(|way| scope.spawn(move || drawn(way))).map(|drawn| drawn.join().unwrap()));
    assert_eq!(at_once, one_by_one);
    // Nothing of the model is in 8 bits: then int8 is bf16.
    assert_eq!(one_by_one.iter().collect::<BTreeSet<_>>().len(), 3);
}
