//! What golden cases of transformers share, whatever the family: whole and cut, and block by block.

use std::path::Path;
use std::sync::Arc;

use models::Result;
use models::blocks::{BlockModel, Layout, RangeOf};
use parallel::{DType, Device, Solo, Tensors, Weights};
use tests::golden::{Case, Outcome};
use tests::ranks::run_block_model;

/// The layouts every transformer case is run at, besides one rank; those that its heads cannot be divided by are left out.
const LAYOUTS: [Layout; 5] = [Layout::new(2, 1), Layout::new(1, 2), Layout::new(2, 2), Layout::new(4, 1), Layout::new(1, 3)];

/// The recorded inputs, by their names.
pub(crate) fn inputs(case: &Case) -> Tensors {
    case.below("in.").map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect()
}

/// The output at every layout, of every rank that has it.
pub(crate) fn at_every_layout<M: BlockModel>(
    case: &mut Case,
    dir: &Path,
    heads: usize,
    load: impl Fn(&Weights, RangeOf) -> Result<M> + Sync,
) -> Outcome {
    let inputs = inputs(case);
    for layout in std::iter::once(Layout::SOLO).chain(LAYOUTS).filter(|layout| heads.is_multiple_of(layout.tp)) {
        let at_layout = |e: String| format!("at tp {} x {} ranges: {e}", layout.tp, layout.block_ranges);
        let ran = run_block_model(dir, layout, &inputs, &load).map_err(|e| at_layout(e.to_string()))?;
        for output in &ran.outputs {
            case.check("out.sample", output.get("sample").map_err(|e| at_layout(e.to_string()))?).map_err(at_layout)?;
        }
    }
    Ok(())
}

/// Every block as a range of its own, one after the other, so that each one's output can be looked at: `check_embedded` sees
/// what comes before the first, `check_block` what comes after each.
pub(crate) fn block_by_block<M: BlockModel>(
    case: &mut Case,
    dir: &Path,
    blocks: usize,
    load: impl Fn(&Weights, RangeOf) -> Result<M>,
    check_embedded: impl FnOnce(&mut Case, &Tensors) -> Outcome,
    mut check_block: impl FnMut(&mut Case, &Tensors, usize) -> Outcome,
) -> Outcome {
    let text = |e: models::Error| e.to_string();
    let load = |index: usize| {
        let w = Weights::open(dir, Arc::new(Solo), DType::F32, &Device::Cpu)?;
        load(&w, RangeOf { index, count: blocks })
    };
    let mut hidden = load(0).and_then(|first| first.embed(&inputs(case))).map_err(text)?;
    check_embedded(case, &hidden)?;
    for block in 0..blocks {
        let model = load(block).map_err(text)?;
        hidden = model.blocks(hidden).map_err(text)?;
        check_block(case, &hidden, block)?;
        if block + 1 == blocks {
            let output = model.output(std::mem::take(&mut hidden)).map_err(text)?;
            case.check("out.sample", output.get("sample").map_err(|e| e.to_string())?)?;
        }
    }
    Ok(())
}
