//! Reads golden cases (recorded inputs and outputs of the reference libraries) and compares with them.
//!
//! A case is a folder with `case.json`, `tensors.safetensors` and possibly weights; tests/golden/README.md has the layout.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use models::model_dir::read_json;
use serde_json::Value;

/// One case folder.
#[derive(Debug)]
pub struct Case {
    /// The folder's name.
    pub name: String,
    /// The folder.
    pub dir: PathBuf,
    /// All of `case.json`.
    pub json: Value,
    tensors: HashMap<String, Tensor>,
    /// The worst comparison so far: error over tolerance, and its text.
    worst: Option<(f64, Comparison)>,
}

/// One tensor against its recording.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The tensor.
    pub name: String,
    /// Largest absolute difference.
    pub error: f64,
    /// What the case allows.
    pub tolerance: f64,
}

/// What a case came to.
pub type Outcome = Result<(), String>;

impl Case {
    /// Reads a folder.
    pub fn open(dir: &Path) -> Result<Self, String> {
        let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let json: Value = read_json(&dir.join("case.json")).map_err(|e| e.to_string())?;
        let mut tensors = HashMap::new();
        for file in json["tensors"].as_object().into_iter().flatten().map(|(file, _)| file) {
            tensors.extend(candle_core::safetensors::load(dir.join(file), &Device::Cpu).map_err(|e| format!("{file}: {e}"))?);
        }
        Ok(Self { name, dir: dir.to_owned(), json, tensors, worst: None })
    }

    /// "component", "pipeline", "scheduler", "rng" or "tokenizer".
    pub fn kind(&self) -> &str {
        self.json["kind"].as_str().unwrap_or_default()
    }

    /// The weights' folder (a key of case.json that names one, such as "weights"), beside the case's own folder.
    pub fn folder(&self, key: &str) -> Result<PathBuf, String> {
        let path = self.json[key].as_str().ok_or_else(|| format!("case.json names no `{key}`"))?;
        // Recorded relative to the folder of all cases in some, to the case's own in others.
        let places = [self.dir.join(path), self.dir.parent().unwrap_or(&self.dir).join(path)];
        places.into_iter().find(|p| p.exists()).ok_or_else(|| format!("`{key}`: there is no {path}"))
    }

    /// A parameter of the call.
    pub fn param(&self, name: &str) -> &Value {
        &self.json["params"][name]
    }

    /// A recorded tensor, as stored.
    pub fn tensor(&self, name: &str) -> Result<&Tensor, String> {
        self.tensors.get(name).ok_or_else(|| format!("there is no recorded tensor `{name}`"))
    }

    /// Takes in a tensor that case.json holds among its parameters, as if it had been recorded as `name`.
    pub fn put(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.to_owned(), tensor);
    }

    /// Whether a tensor was recorded.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The recorded tensors whose names begin with `prefix`, by the rest of their names.
    pub fn below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Tensor)> + 'a {
        self.tensors.iter().filter_map(move |(name, t)| Some((name.strip_prefix(prefix)?, t)))
    }

    /// The absolute tolerance of a recorded tensor. Step tensors without an entry of their own use the last one's.
    pub fn tolerance(&self, name: &str) -> Result<f64, String> {
        let table = self.json["tolerance"].as_object().ok_or("case.json has no tolerances")?;
        let atol = |name: &str| table.get(name).and_then(|t| t["suggested_atol"].as_f64());
        let kin = || {
            let (_, suffix) = name.split_once('.').filter(|(step, _)| step.starts_with("step"))?;
            let mut same: Vec<&String> = table.keys().filter(|k| k.starts_with("step") && k.ends_with(suffix)).collect();
            same.sort();
            atol(same.last()?)
        };
        atol(name).or_else(kin).ok_or_else(|| format!("case.json has no tolerance for `{name}`"))
    }

    /// How far the reference's own run in bf16 was from the recorded tensor.
    pub fn bf16_error(&self, name: &str) -> Result<f64, String> {
        let error = self.json["tolerance"][name]["bf16_vs_f64"]["max_abs"].as_f64();
        error.ok_or_else(|| format!("case.json has no error of bf16 for `{name}`"))
    }

    /// Compares `got` with the recorded tensor `name` at the case's own tolerance.
    pub fn check(&mut self, name: &str, got: &Tensor) -> Outcome {
        let tolerance = self.tolerance(name)?;
        self.check_within(name, got, tolerance)
    }

    /// Compares `got` with the recorded tensor `name`; for integers, which must be equal, `tolerance` is 0.
    pub fn check_within(&mut self, name: &str, got: &Tensor, tolerance: f64) -> Outcome {
        let expected = self.tensor(name)?.clone();
        let error = max_difference(got, &expected).map_err(|e| format!("{name}: {e}"))?;
        let comparison = Comparison { name: name.to_owned(), error, tolerance };
        let ratio = if error == 0.0 { 0.0 } else { error / tolerance };
        if self.worst.as_ref().is_none_or(|(worst, _)| ratio > *worst || ratio.is_nan()) {
            self.worst = Some((ratio, comparison));
        }
        if error <= tolerance { Ok(()) } else { Err(format!("{name}: error {error:.3e} > {tolerance:.3e}")) }
    }

    /// The comparison that came nearest to failing, or failed worst.
    pub fn worst(&self) -> Option<&Comparison> {
        self.worst.as_ref().map(|(_, c)| c)
    }
}

fn max_difference(got: &Tensor, expected: &Tensor) -> Result<f64, String> {
    if got.dims() != expected.dims() {
        return Err(format!("shape {:?}, expected {:?}", got.dims(), expected.dims()));
    }
    let flat = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (got, expected) = (flat(got).map_err(|e| e.to_string())?, flat(expected).map_err(|e| e.to_string())?);
    // NaN must not slip through a `max`; equal infinities are equal.
    let differences = got.iter().zip(&expected).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() });
    Ok(differences.fold(0.0, |worst: f64, d| if d.is_nan() || d > worst { d } else { worst }))
}
