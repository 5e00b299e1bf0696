//! A file's keys, whatever their style, to the layers of a model.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use parallel::Tensor;
use parallel::lora::{Factors, Site};

use super::file::AdapterFile;
use super::peft::Role;
use super::{Part, bad, flux_original, kohya, listed, peft, processors, sgm};
use crate::Result;

const SECOND: &str = "text_encoder_2";
const THIRD: &str = "text_encoder_3";

/// The layers of one component that adapters can change, over all ranks.
#[derive(Clone, Debug)]
pub struct Sites {
    component: String,
    /// The text encoder that kohya's files take it for.
    kohya: Option<Part>,
    by_name: BTreeMap<String, Site>,
    by_flat: HashMap<String, String>,
}

impl Sites {
    /// Of a component.
    pub fn new(component: &str, sites: impl IntoIterator<Item = Site>) -> Self {
        let by_name: BTreeMap<String, Site> = sites.into_iter().map(|site| (site.name.clone(), site)).collect();
        let flat = |name: &String| peft::spellings(name).map(|spelling| (kohya::flattened(&spelling), name.clone()));
        let by_flat = by_name.keys().flat_map(flat).collect();
        Self { component: component.to_owned(), kohya: Part::of(component), by_name, by_flat }
    }

    /// The same, of a model without a third text encoder: kohya's files call T5 the third wherever it is.
    pub fn without_third_text_encoder(self) -> Self {
        let kohya = match self.kohya {
            Some(Part::TextEncoder(name)) if name == SECOND => Some(Part::TextEncoder(THIRD.to_owned())),
            other => other,
        };
        Self { kohya, ..self }
    }

    /// Whether keys for a part of the model, in kohya's style or in another, are for this component.
    fn is(&self, part: &Part, is_kohyas: bool) -> bool {
        Part::of(&self.component).as_ref() == Some(part) || (is_kohyas && self.kohya.as_ref() == Some(part))
    }

    /// The component.
    pub fn component(&self) -> &str {
        &self.component
    }

    /// The layers a name is for.
    fn targets(&self, name: &str) -> Option<Targets<'_>> {
        let one = |site| Some(Targets { sites: vec![site], halves_swapped: false });
        let named = |name: &str| peft::spellings(name).iter().find_map(|name| self.by_name.get(name));
        if let Some(site) = named(name).or_else(|| named(&processors::current(name)?)) {
            return one(site);
        }
        let flat = kohya::flattened(name);
        if let Some(site) = self.flat(&flat) {
            return one(site);
        }
        if let Some(site) = sgm::diffusers(&flat, self.layers_per_block()).and_then(|flat| self.flat(&flat)) {
            return one(site);
        }
        let original = flux_original::original(&flat)?;
        let sites = original.sites.iter().map(|name| self.by_name.get(name)).collect::<Option<_>>()?;
        Some(Targets { sites, halves_swapped: original.halves_swapped })
    }

    /// The layer of a flattened name.
    fn flat(&self, flat: &str) -> Option<&Site> {
        self.by_flat.get(flat).and_then(|name| self.by_name.get(name))
    }

    /// Residual blocks in each block down of a U-Net.
    fn layers_per_block(&self) -> usize {
        let has = |i: &usize| self.by_name.contains_key(&format!("down_blocks.0.resnets.{i}.time_emb_proj"));
        (0..).take_while(has).count()
    }
}

struct Targets<'a> {
    /// In the order of the rows of `B`.
    sites: Vec<&'a Site>,
    halves_swapped: bool,
}

/// What a file does to one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The layer's component.
    pub component: String,
    /// The layer.
    pub site: String,
    /// The tensor that is `A`.
    pub down: String,
    /// The tensor whose rows are `B`.
    pub up: String,
    /// Which of its rows, in this order.
    pub rows: Vec<Range<usize>>,
    /// alpha / rank
    pub factor: f64,
    /// Elements of both factors.
    pub elements: u64,
}

impl Change {
    /// The factors themselves.
    pub fn factors(&self, file: &AdapterFile) -> Result<Factors> {
        let up = file.tensor(&self.up)?;
        let rows: Vec<Tensor> = self.rows.iter().map(|rows| up.narrow(0, rows.start, rows.len())).collect::<Result<_, _>>()?;
        let (a, b) = (file.tensor(&self.down)?.flatten_from(1)?, Tensor::cat(&rows, 0)?.flatten_from(1)?);
        Ok(Factors { site: self.site.clone(), a, b, factor: self.factor })
    }
}

/// What a file does to the components whose layers are given. Layers of other parts are left out if `partial` says that these are
/// not all of the model's.
///
/// # Errors
/// When a key is for no layer (all such keys are listed), a factor is alone, or a shape does not fit (the tensor is named).
pub fn changes(file: &AdapterFile, all: &[Sites], partial: bool) -> Result<Vec<Change>> {
    let (modules, mut unknown) = modules(file);
    let mut changes: BTreeMap<(String, String), Change> = BTreeMap::new();
    for (module, tensors) in modules {
        let kohyas = kohya::part(&module);
        let is_kohyas = kohyas.is_some();
        let (part, name) = kohyas.unwrap_or_else(|| peft::part(&module));
        let sites = all.iter().find(|sites| sites.is(&part, is_kohyas));
        let Some(sites) = sites else {
            if !partial {
                unknown.extend(tensors.into_values());
            }
            continue;
        };
        let Some(targets) = sites.targets(name) else {
            unknown.extend(tensors.into_values());
            continue;
        };
        for change in of_module(file, sites, &targets, &tensors)? {
            let place = (change.component.clone(), change.site.clone());
            if let Some(other) = changes.insert(place, change.clone()) {
                return Err(bad(file.path(), format!("`{}` and `{}` are both for `{}`", other.down, change.down, change.site)));
            }
        }
    }
    if !unknown.is_empty() {
        unknown.sort();
        let keys = listed(&unknown);
        return Err(bad(file.path(), format!("{} of its keys are for no layer of the model: {keys}", unknown.len())));
    }
    if changes.is_empty() && !partial {
        return Err(bad(file.path(), "it changes no layer"));
    }
    Ok(changes.into_values().collect())
}

/// A layer's tensors, by what each is.
type Tensors = BTreeMap<Role, String>;

/// The file's keys by layer, and those that name no factor.
fn modules(file: &AdapterFile) -> (BTreeMap<String, Tensors>, Vec<String>) {
    let mut modules: BTreeMap<String, Tensors> = BTreeMap::new();
    let mut unknown = Vec::new();
    for key in file.keys() {
        match peft::split(key) {
            Some((module, role)) => {
                // The same factor in two spellings: one of them is for nothing.
                unknown.extend(modules.entry(module.to_owned()).or_default().insert(role, key.to_owned()));
            }
            None => unknown.push(key.to_owned()),
        }
    }
    (modules, unknown)
}

fn of_module(file: &AdapterFile, sites: &Sites, targets: &Targets<'_>, tensors: &Tensors) -> Result<Vec<Change>> {
    let (Some(down), Some(up)) = (tensors.get(&Role::Down), tensors.get(&Role::Up)) else {
        let alone: Vec<String> = tensors.values().cloned().collect();
        return Err(bad(file.path(), format!("a layer has one factor without the other: {}", listed(&alone))));
    };
    let rank = rank(file, [down, up], &targets.sites)?;
    let mut changes = Vec::new();
    let mut start = 0;
    for site in &targets.sites {
        let rows = start..start + site.d_out;
        let middle = start + site.d_out / 2;
        let rows = if targets.halves_swapped { vec![middle..rows.end, start..middle] } else { vec![rows] };
        start += site.d_out;
        let factor = match tensors.get(&Role::Alpha) {
            Some(alpha) => file.number(alpha)? / rank as f64,
            None => peft::configured_factor(file, &sites.component, &site.name, rank)?.unwrap_or(1.0),
        };
        let elements = (rank * (site.width() + site.d_out)) as u64;
        let (component, site) = (sites.component.clone(), site.name.clone());
        changes.push(Change { component, site, down: down.clone(), up: up.clone(), rows, factor, elements });
    }
    Ok(changes)
}

/// The rank of the two factors for layers that share `A`, whose shapes fit them.
fn rank(file: &AdapterFile, [down, up]: [&str; 2], sites: &[&Site]) -> Result<usize> {
    let (d_in, kernel) = sites.first().map_or((0, None), |site| (site.d_in, site.kernel));
    let d_out: usize = sites.iter().map(|site| site.d_out).sum();
    let size = kernel.unwrap_or(1);
    // Of single pixels a file may have matrices or kernels, as the trained layer was: the same numbers.
    let kernels = size > 1 || matches!(file.shape(up), Some([_, _, 1, 1]));
    let side = |size: usize| if kernels { vec![size; 2] } else { vec![] };
    let width = [vec![d_in], side(size)].concat();
    let rank = match file.shape(down) {
        Some([rank, rest @ ..]) if *rank > 0 && *rest == *width => *rank,
        found => return Err(shape(file, down, found, &format!("[rank, {}", format!("{width:?}").trim_start_matches('[')))),
    };
    let expected = [vec![d_out, rank], side(1)].concat();
    match file.shape(up) {
        Some(found) if *found == *expected => Ok(rank),
        found => Err(shape(file, up, found, &format!("{expected:?}"))),
    }
}

fn shape(file: &AdapterFile, key: &str, found: Option<&[usize]>, expected: &str) -> crate::Error {
    bad(file.path(), format!("tensor `{key}` has shape {:?}, expected {expected}", found.unwrap_or_default()))
}

/// Bytes of a component's factors in f32, over all ranks.
pub fn bytes_of(changes: &[Change], component: &str) -> u64 {
    changes.iter().filter(|change| change.component == component).map(|change| change.elements * 4).sum()
}

#[cfg(test)]
mod tests;
