use std::collections::HashMap;
use std::path::Path;

use candle_core::Device;

use super::*;
use crate::mesh::Mesh;
use crate::ops::Products;
use crate::{InProcess, Solo};

const D: usize = 64;
/// Eighths of these are whole panels of every kernel.
const PARTS: [usize; 2] = [256, 512];

fn random(dims: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap()
}

fn bits(y: &Tensor) -> Vec<u32> {
    y.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn save(dir: &Path, dtype: DType) {
    let weights = [("q", [D, D]), ("k", [D, D]), ("mlp", [PARTS[1], D]), ("out", [D, PARTS.iter().sum()])];
    let mut tensors = HashMap::new();
    for (name, [d_out, d_in]) in weights {
        tensors.insert(format!("{name}.weight"), random(&[d_out, d_in]).to_dtype(dtype).unwrap());
        tensors.insert(format!("{name}.bias"), random(&[d_out]).to_dtype(dtype).unwrap());
    }
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
}

/// What a rank makes of `x: [B, L, D]` and its share of `attended: [B, L, PARTS[0]]`: joined in between, and handed on; and q and k, one by
/// one and together.
fn rank(dir: &Path, group: Arc<dyn Collective>, x: &Tensor, attended: &Tensor) -> ([Tensor; 2], [[Tensor; 2]; 2]) {
    let tp = group.size();
    let attended = attended.narrow(2, group.rank() * PARTS[0] / tp, PARTS[0] / tp).unwrap().contiguous().unwrap();
    let w = Weights::open(dir, group, DType::F32, &Device::Cpu).unwrap();
    let [q, k] = ["q", "k"].map(|name| ColumnParallelLinear::load(&w.pp(name), D, &[D]).unwrap());
    let mlp = ColumnParallelLinear::load(&w.pp("mlp"), D, &[PARTS[1]]).unwrap();
    let out = RowParallelLinear::load(&w.pp("out"), &PARTS, D).unwrap();
    let activation = Activation::GeluTanh;
    let parts = [Part::Tensor(&attended), Part::Activated { layer: &mlp, x, activation }];
    assert!(!ops::has_kernels(&Device::Cpu) || out.lay_out(&parts).unwrap().is_some(), "handed on");
    let joined = ops::join(&attended, &mlp.forward_activated(x, activation).unwrap()).unwrap();
    let together = ColumnParallelLinear::forward_all([&q, &k], x).unwrap();
    let sums = [out.forward(&joined).unwrap(), out.forward_parts(&parts).unwrap()];
    (sums, [[q.forward(x).unwrap(), k.forward(x).unwrap()], together])
}

#[test]
fn what_a_layer_hands_on_gives_the_bits_of_what_it_would_write() {
    for (products, dtype) in [(Products::F32, DType::F32), (Products::F32, DType::BF16), (Products::Bf16, DType::BF16)] {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), dtype);
        let (x, attended) = (random(&[2, 9, D]), random(&[2, 9, PARTS[0]]));
        let (whole, all) = products.scope(|| rank(dir.path(), Arc::new(Solo), &x, &attended));
        assert_eq!(bits(&whole[0]), bits(&whole[1]), "{products}");
        let [one_by_one, together] = all.map(|of| of.map(|y| bits(&y)));
        assert_eq!(one_by_one, together, "{products}");
        std::thread::scope(|scope| {
            for link in InProcess::group(4) {
                let (dir, x, attended, whole) = (dir.path(), &x, &attended, &whole);
                scope.spawn(move || {
                    let (sums, _) = products.scope(|| rank(dir, Arc::new(Mesh::whole(Arc::new(link))), x, attended));
                    assert!(sums.iter().all(|sum| bits(sum) == bits(&whole[0])), "{products} on four ranks");
                });
            }
        });
    }
}
