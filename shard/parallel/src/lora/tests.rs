use std::collections::HashMap;
use std::thread;

use candle_core::Device;

use super::*;
use crate::linear::share;
use crate::mesh::Mesh;
use crate::{ColumnParallelLinear, InProcess, Linear, RowParallelLinear, Solo, Weights};

mod convolutions;

const D: usize = 32;
const PARTS: [usize; 2] = [16, 48];

fn random(dims: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap()
}

/// `whole: [32, 32]`, `column: [64, 32]` and `row: [32, 64]`, the latter two of two packed parts.
fn checkpoint() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let shapes = [("whole", [D, D]), ("column", [64, D]), ("row", [D, 64])];
    let tensors = shapes
        .iter()
        .flat_map(|(name, shape)| [(format!("{name}.weight"), random(shape)), (format!("{name}.bias"), random(&shape[..1]))]);
    candle_core::safetensors::save(&tensors.collect::<HashMap<_, _>>(), dir.path().join("model.safetensors")).unwrap();
    dir
}

fn factors(rank: usize) -> Vec<Factors> {
    let of =
        |site: &str, d_in, d_out| Factors { site: site.into(), a: random(&[rank, d_in]), b: random(&[d_out, rank]), factor: 0.5 };
    vec![of("whole", D, D), of("column", D, 64), of("row", 64, D)]
}

struct Layers {
    adapters: Arc<Adapters>,
    whole: Linear,
    column: ColumnParallelLinear,
    row: RowParallelLinear,
}

impl Layers {
    fn load(dir: &tempfile::TempDir, group: Arc<dyn Collective>) -> Self {
        let w = Weights::open(dir.path(), group, DType::F32, &Device::Cpu).unwrap();
        Self {
            adapters: w.adapters().clone(),
            whole: Linear::load(&w.pp("whole"), D, D).unwrap(),
            column: ColumnParallelLinear::load(&w.pp("column"), D, &PARTS).unwrap(),
            row: RowParallelLinear::load(&w.pp("row"), &PARTS, D).unwrap(),
        }
    }

    fn held(&self, factors: &[Factors]) -> Arc<Adapter> {
        Arc::new(self.adapters.adapter(factors.iter().cloned().map(Ok::<_, Error>)).unwrap())
    }

    /// `x: [B, L, 32]`
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.row.forward(&self.column.forward(&self.whole.forward(x)?)?)
    }
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn every_tp_gives_the_same_bits_and_an_item_is_what_it_is_alone() {
    let (dir, first, second) = (checkpoint(), factors(4), factors(3));
    let x = random(&[4, 5, D]);
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
    let expected = run(Arc::new(Solo), None);
    let plain = Layers::load(&dir, Arc::new(Solo)).forward(&x).unwrap();
    let item = |x: &Tensor, i| bits(&x.narrow(0, i, 1).unwrap());
    for i in 0..4 {
        assert_eq!(bits(&run(Arc::new(Solo), Some(i))), item(&expected, i), "item {i} alone");
        assert_eq!(item(&plain, i) == item(&expected, i), i == 3, "item {i} and the layers without adapters");
    }
    for tp in [2, 4, 8] {
        let links: Vec<Arc<InProcess>> = InProcess::group(tp).into_iter().map(Arc::new).collect();
        thread::scope(|scope| {
            let ranks: Vec<_> = links.iter().map(|link| scope.spawn(|| run(Arc::new(Mesh::whole(link.clone())), None))).collect();
            for rank in ranks {
                assert_eq!(bits(&rank.join().unwrap()), bits(&expected), "tp {tp}");
            }
        });
    }
}

#[test]
fn an_unmerged_adapter_is_a_merged_one() {
    let (dir, factors) = (checkpoint(), factors(4));
    let layers = Layers::load(&dir, Arc::new(Solo));
    let x = random(&[2, 5, D]);
    let unmerged = {
        let _active = layers.adapters.activate(vec![(2, vec![(layers.held(&factors), 0.7)])]);
        layers.forward(&x).unwrap()
    };
    let file = dir.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    for Factors { site, a, b, factor } in &factors {
        let name = format!("{site}.weight");
        let merged = (&tensors[&name] + (b.matmul(a).unwrap() * (0.7 * factor)).unwrap()).unwrap();
        tensors.insert(name, merged);
    }
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let merged = Layers::load(&dir, Arc::new(Solo)).forward(&x).unwrap();
    let largest = |x: Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let (scale, error) = (largest(merged.clone()), largest((merged - unmerged).unwrap()));
    assert!(error < 1e-5 * scale, "{error} of {scale}");
}

#[test]
fn the_guard_ends_it_and_another_number_of_items_is_a_typed_error() {
    let (dir, factors) = (checkpoint(), factors(2));
    let layers = Layers::load(&dir, Arc::new(Solo));
    let x = random(&[3, 5, D]);
    let plain = bits(&layers.forward(&x).unwrap());
    let active = layers.adapters.activate(vec![(2, vec![(layers.held(&factors), 1.0)])]);
    assert!(matches!(layers.forward(&x), Err(Error::Adapted { items: 2, .. })));
    drop(active);
    assert_eq!(bits(&layers.forward(&x).unwrap()), plain);
}

#[test]
fn items_that_come_twice_have_their_adapters_both_times() {
    let (dir, factors) = (checkpoint(), factors(2));
    let layers = Layers::load(&dir, Arc::new(Solo));
    let (first, second) = (random(&[3, 5, D]), random(&[3, 5, D]));
    let adapter = layers.held(&factors);
    let _active = layers.adapters.activate(vec![(1, vec![(adapter.clone(), 1.0)]), (1, vec![]), (1, vec![(adapter, -0.5)])]);
    let twice = layers.forward(&Tensor::cat(&[&first, &second], 0).unwrap()).unwrap();
    for (time, x) in [&first, &second].into_iter().enumerate() {
        assert_eq!(bits(&twice.narrow(0, 3 * time, 3).unwrap()), bits(&layers.forward(x).unwrap()), "time {time}");
    }
}

#[test]
fn factors_that_do_not_fit_their_site_are_named_and_those_of_no_site_are_anothers() {
    let layers = Layers::load(&checkpoint(), Arc::new(Solo));
    let sites = layers.adapters.sites();
    assert_eq!(sites[1], Site { name: "column".into(), d_in: D, d_out: 64, kernel: None, cut: Cut::Outputs(PARTS.to_vec()) });
    let one = |site: &str, a: [usize; 2], b: [usize; 2]| {
        let factors = Factors { site: site.into(), a: random(&a), b: random(&b), factor: 1.0 };
        layers.adapters.adapter([Ok::<_, Error>(factors)])
    };
    assert!(matches!(one("row", [4, 63], [D, 4]), Err(Error::Shape { name, .. }) if name == "row.lora_A"));
    assert!(matches!(one("row", [4, 64], [D, 3]), Err(Error::Shape { name, .. }) if name == "row.lora_B"));
    assert_eq!(one("elsewhere", [4, 7], [9, 4]).unwrap().pairs.len(), 0);
}

#[test]
fn layers_of_some_rows_and_such_that_are_cut_unevenly_give_the_same_bits_at_every_tp() {
    const INNER: usize = 44; // which eight does not divide
    let dir = tempfile::tempdir().unwrap();
    let tensors = HashMap::from([("up.weight", random(&[INNER, D])), ("down.weight", random(&[D, INNER]))]);
    candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
    let factors = [("up", D, INNER), ("down", INNER, D)].map(|(site, d_in, d_out)| Factors {
        site: site.into(),
        a: random(&[3, d_in]),
        b: random(&[d_out, 3]),
        factor: 1.0,
    });
    let x = random(&[2, 5, D]);
    let run = |group: Arc<dyn Collective>, scale: f64| {
        let w = Weights::open(dir.path(), group.clone(), DType::F32, &Device::Cpu).unwrap();
        let up = Linear::load_rows(&w.pp("up"), [D, INNER], &[share(INNER, &*group)]).unwrap();
        let down = RowParallelLinear::load_uneven(&w.pp("down"), INNER, D).unwrap();
        let adapter = Arc::new(w.adapters().adapter(factors.iter().cloned().map(Ok::<_, Error>)).unwrap());
        let _active = w.adapters().activate(vec![(1, vec![(adapter, scale)]), (1, vec![])]);
        bits(&down.forward(&up.forward(&x).unwrap()).unwrap())
    };
    let expected = run(Arc::new(Solo), 1.0);
    assert_ne!(expected, run(Arc::new(Solo), 0.5));
    for tp in [2, 4, 8] {
        let links: Vec<Arc<InProcess>> = InProcess::group(tp).into_iter().map(Arc::new).collect();
        thread::scope(|scope| {
            let ranks: Vec<_> = links.iter().map(|link| scope.spawn(|| run(Arc::new(Mesh::whole(link.clone())), 1.0))).collect();
            for rank in ranks {
                assert_eq!(rank.join().unwrap(), expected, "tp {tp}");
            }
        });
    }
}
