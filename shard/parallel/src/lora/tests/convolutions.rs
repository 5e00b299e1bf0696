//! Adapters on convolutions of every kind.

use super::*;
use crate::convolution::{GroupNorm, Placement};
use crate::ops::{Activation, Products};
use crate::{ColumnParallelConv2d, Conv2d};

const C: usize = 16;
const GROUPS: usize = 4;
/// Name, input channels, output channels and the kernel's side.
const LAYERS: [(&str, usize, usize, usize); 5] =
    [("first", 8, C, 3), ("normed", C, C, 3), ("shortcut", C, C, 1), ("down", C, C, 3), ("up", C, C, 3)];

fn checkpoint() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tensors = LAYERS.iter().flat_map(|(name, c_in, c_out, size)| {
        let weight = (random(&[*c_out, *c_in, *size, *size]) * 0.2).unwrap();
        [(format!("{name}.weight"), weight), (format!("{name}.bias"), random(&[*c_out]))]
    });
    candle_core::safetensors::save(&tensors.collect::<HashMap<_, _>>(), dir.path().join("model.safetensors")).unwrap();
    dir
}

fn factors(rank: usize) -> Vec<Factors> {
    let of = |(site, c_in, c_out, size): (&str, usize, usize, usize)| {
        let a = (random(&[rank, c_in * size * size]) * 0.2).unwrap();
        Factors { site: site.into(), a, b: random(&[c_out, rank]), factor: 0.5 }
    };
    LAYERS.map(of).to_vec()
}

struct Layers {
    adapters: Arc<Adapters>,
    first: Conv2d,
    normed: ColumnParallelConv2d,
    shortcut: ColumnParallelConv2d,
    down: ColumnParallelConv2d,
    up: ColumnParallelConv2d,
    affine: [Tensor; 2],
}

impl Layers {
    fn load(dir: &tempfile::TempDir, group: Arc<dyn Collective>) -> Self {
        let w = Weights::open(dir.path(), group, DType::F32, &Device::Cpu).unwrap();
        let affine = [1f32, 0.1].map(|value| Tensor::full(value, C, &Device::Cpu).unwrap());
        Self {
            adapters: w.adapters().clone(),
            first: Conv2d::load(&w.pp("first"), [8, C], 3).unwrap(),
            normed: ColumnParallelConv2d::load(&w.pp("normed"), [C, C], 3).unwrap(),
            shortcut: ColumnParallelConv2d::load(&w.pp("shortcut"), [C, C], 1).unwrap(),
            down: ColumnParallelConv2d::load(&w.pp("down"), [C, C], 3).unwrap(),
            up: ColumnParallelConv2d::load_doubling(&w.pp("up"), [C, C], 3).unwrap(),
            affine,
        }
    }

    fn held(&self, factors: &[Factors]) -> Arc<Adapter> {
        Arc::new(self.adapters.adapter(factors.iter().cloned().map(Ok::<_, Error>)).unwrap())
    }

    /// `x: [B, 8, H, W]` gives `[B, 16, H, W]`, as a residual block between two changes of resolution.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let same = Placement::same(3);
        let x = self.first.forward(x, same)?;
        let x = self.down.forward_gathered(&x, Placement { stride: 2, before: 1, after: 1 })?;
        let [weight, bias] = &self.affine;
        let norm = GroupNorm { groups: GROUPS, affine: [weight, bias], eps: 1e-5, activation: Some(Activation::Silu) };
        let residual = self.shortcut.forward(&x, Placement::same(1))?;
        let x = self.normed.gather(&self.normed.forward_normed(&x, norm, same, Some(&residual))?)?;
        self.up.forward_gathered(&x, same)
    }
}

#[test]
fn every_tp_gives_the_same_bits_and_an_item_is_what_it_is_alone() {
    let (dir, first, second) = (checkpoint(), factors(4), factors(3));
    let x = random(&[4, 8, 6, 10]);
    // Item 0 has one adapter, items 1 and 2 another and both, item 3 none.
    let run = |group: Arc<dyn Collective>, item: Option<usize>| {
        let layers = Layers::load(&dir, group);
        let (a, b) = (layers.held(&first), layers.held(&second));
        let uses = [vec![(a.clone(), 0.8)], vec![(b.clone(), 1.0)], vec![(a, -0.25), (b, 1.5)], vec![]];
        let (x, uses) = match item {
            Some(i) => (x.narrow(0, i, 1).unwrap(), uses[i..=i].to_vec()),
            None => (x.clone(), uses.to_vec()),
        };
        let _active = layers.adapters.activate(uses.into_iter().map(|uses| (1, uses)).collect());
        layers.forward(&x).unwrap()
    };
    let check = |products: Products| {
        let expected = run(Arc::new(Solo), None);
        assert_eq!(expected.dims(), [4, C, 6, 10]);
        let plain = Layers::load(&dir, Arc::new(Solo)).forward(&x).unwrap();
        let item = |x: &Tensor, i| bits(&x.narrow(0, i, 1).unwrap());
        for i in 0..4 {
            assert_eq!(bits(&run(Arc::new(Solo), Some(i))), item(&expected, i), "item {i} alone");
            assert_eq!(item(&plain, i) == item(&expected, i), i == 3, "item {i} and the layers without adapters");
        }
        for tp in [2, 4, 8] {
            let links: Vec<Arc<InProcess>> = InProcess::group(tp).into_iter().map(Arc::new).collect();
            thread::scope(|scope| {
                let one = |link: Arc<InProcess>| products.scope(|| run(Arc::new(Mesh::whole(link)), None));
                let ranks: Vec<_> = links.iter().map(|link| scope.spawn(move || one(link.clone()))).collect();
                for rank in ranks {
                    assert_eq!(bits(&rank.join().unwrap()), bits(&expected), "{products}, tp {tp}");
                }
            });
        }
    };
    // In bf16 what is normed goes into its convolution rounded, where no adapter has to see it.
    let ways = [Products::F32, Products::Bf16].into_iter().filter(|products| products.check(&Device::Cpu).is_ok());
    ways.for_each(|products| products.scope(|| check(products)));
}

#[test]
fn an_unmerged_adapter_is_a_merged_one() {
    let (dir, factors) = (checkpoint(), factors(4));
    let layers = Layers::load(&dir, Arc::new(Solo));
    let x = random(&[2, 8, 6, 10]);
    let unmerged = {
        let _active = layers.adapters.activate(vec![(2, vec![(layers.held(&factors), 0.7)])]);
        layers.forward(&x).unwrap()
    };
    let file = dir.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    for Factors { site, a, b, factor } in &factors {
        let name = format!("{site}.weight");
        let change = (b.matmul(a).unwrap() * (0.7 * factor)).unwrap().reshape(tensors[&name].dims()).unwrap();
        tensors.insert(name.clone(), (&tensors[&name] + change).unwrap());
    }
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let merged = Layers::load(&dir, Arc::new(Solo)).forward(&x).unwrap();
    let largest = |x: Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let (scale, error) = (largest(merged.clone()), largest((merged - unmerged).unwrap()));
    assert!(error < 1e-5 * scale, "{error} of {scale}");
}

#[test]
fn factors_that_do_not_fit_their_site_are_named() {
    let layers = Layers::load(&checkpoint(), Arc::new(Solo));
    let sites = layers.adapters.sites();
    assert_eq!(sites[0], Site { name: "first".into(), d_in: 8, d_out: C, kernel: Some(3), cut: Cut::Whole });
    assert_eq!((&sites[1].cut, sites[1].width()), (&Cut::Outputs(vec![C]), 9 * C));
    let one = |site: &str, a: [usize; 2], b: [usize; 2]| {
        let factors = Factors { site: site.into(), a: random(&a), b: random(&b), factor: 1.0 };
        layers.adapters.adapter([Ok::<_, Error>(factors)])
    };
    assert!(matches!(one("down", [4, C], [C, 4]), Err(Error::Shape { name, .. }) if name == "down.lora_A"));
    assert!(matches!(one("down", [4, 9 * C], [C, 3]), Err(Error::Shape { name, .. }) if name == "down.lora_B"));
}
