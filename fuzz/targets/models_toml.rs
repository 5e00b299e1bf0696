//! models.toml: what is taken is within its limits; what is not names the file.
#![no_main]

use std::path::Path;

use coordinator::models_file::{self, MAX_ADAPTERS, MAX_CONTROLS, MAX_GROUP_RANKS, TP_DEGREES};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match models_file::parse(text, Path::new("models.toml"), Path::new("/models")) {
        Err(error) => assert!(error.to_string().contains("models.toml"), "{error}"),
        Ok(models) => {
            for model in models {
                assert!(model.adapters.len() <= MAX_ADAPTERS);
                assert!(model.adapters.iter().all(|adapter| !adapter.name.contains(['/', '\\']) && adapter.name != ".."));
                assert!(model.controls.len() <= MAX_CONTROLS);
                assert!(model.controls.iter().all(|control| !control.name.contains(['/', '\\']) && control.name != ".."));
                for component in model.components.values() {
                    assert!(TP_DEGREES.contains(&component.tp) && component.replicas > 0);
                    let ranks = u64::from(component.tp) * u64::from(component.block_ranges) * u64::from(component.cfg_parallel);
                    assert!((1..=MAX_GROUP_RANKS).contains(&ranks), "{ranks} ranks");
                }
            }
        }
    }
});
