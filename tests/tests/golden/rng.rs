//! torch's generators. Cases: `rng_cpu`, `rng_cuda_philox`.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use parallel::rng::{TorchCpu, TorchCuda};
use tests::golden::{Case, Outcome};

pub(crate) fn run(case: &mut Case) -> Outcome {
    let names: Vec<String> = case.below("").map(|(name, _)| name.to_owned()).collect();
    let (philox, mut sequences) = (case.name.contains("philox"), BTreeMap::<u64, BTreeMap<u32, String>>::new());
    for name in names {
        let parts: Vec<&str> = name.split('.').collect();
        let seed = parts.iter().find_map(|part| part.strip_prefix("seed")?.parse().ok()).ok_or(format!("{name}: no seed"))?;
        if parts[0] == "sequence" {
            let call = parts[3].trim_start_matches("call").parse().map_err(|_| format!("{name}: no call"))?;
            sequences.entry(seed).or_default().insert(call, name);
        } else if philox {
            check_philox(case, &name, &parts, seed)?;
        } else {
            check_cpu(case, &name, &parts, &mut TorchCpu::new(seed))?;
        }
    }
    // Several calls on one generator, in order.
    for (seed, calls) in sequences {
        let mut generator = TorchCpu::new(seed);
        for name in calls.into_values() {
            check_cpu(case, &name, &["randn", "f32"], &mut generator)?;
        }
    }
    Ok(())
}

/// One call. `parts` begins with the function and the type.
fn check_cpu(case: &mut Case, name: &str, parts: &[&str], generator: &mut TorchCpu) -> Outcome {
    let shape = case.tensor(name)?.dims().to_vec();
    let n = shape.iter().product();
    let (values, dtype): (Vec<f64>, &str) = match (parts[0], parts[1]) {
        ("randn", "f32") => (widen(generator.randn_f32(n)), "f32"),
        ("randn", "f64") => (generator.randn_f64(n), "f64"),
        ("randn", "f16") => (generator.randn_f16(n).into_iter().map(|v| v.to_f64()).collect(), "f16"),
        ("randn", "bf16") => (generator.randn_bf16(n).into_iter().map(|v| v.to_f64()).collect(), "bf16"),
        // Uniform numbers and integers are exact.
        ("rand", "f32") => (widen(generator.rand_f32(n)), ""),
        ("rand", "f64") => (generator.rand_f64(n), ""),
        ("randint", "0_1000") => (generator.randint(1000, n).into_iter().map(|v| v as f64).collect(), ""),
        ("randperm", _) => (generator.randperm(n as u32).into_iter().map(|v| v as f64).collect(), ""),
        _ => return Err(format!("{name}: an unknown call")),
    };
    let tolerance = if dtype.is_empty() { 0.0 } else { tolerance(case, dtype)? };
    case.check_within(name, &tensor(values, &shape)?, tolerance)
}

fn check_philox(case: &mut Case, name: &str, parts: &[&str], seed: u64) -> Outcome {
    let shape = case.tensor(name)?.dims().to_vec();
    let mut generator = TorchCuda::new(seed);
    if parts[0] == "philox_words" {
        let words: Vec<[u32; 4]> = (0..shape[1] as u64).map(|thread| generator.words(thread, 0)).collect();
        let by_word = (0..4).flat_map(|word| words.iter().map(move |of_thread| f64::from(of_thread[word]))).collect();
        return case.check_within(name, &tensor(by_word, &shape)?, 0.0);
    }
    if parts.contains(&"second_call") {
        generator.randn_f32(1);
    }
    let values = widen(generator.randn_f32(shape.iter().product()));
    let tolerance = tolerance(case, "f32")?;
    case.check_within(name, &tensor(values, &shape)?, tolerance)
}

fn tolerance(case: &Case, dtype: &str) -> Result<f64, String> {
    case.json["tolerance"][dtype]["suggested_atol"].as_f64().ok_or_else(|| format!("no tolerance for {dtype}"))
}

fn widen(values: Vec<f32>) -> Vec<f64> {
    values.into_iter().map(f64::from).collect()
}

fn tensor(values: Vec<f64>, shape: &[usize]) -> Result<Tensor, String> {
    Tensor::from_vec(values, shape, &Device::Cpu).and_then(|t| t.to_dtype(DType::F64)).map_err(|e| e.to_string())
}
