//! The rules of the house that a compiler cannot see: which crate imports which, where hardware and `unsafe` may appear, and
//! that the documents name files that exist.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Longest source file; over this, split it.
const MAX_LINES: usize = 800;

/// Folders that hold no source of ours.
const NOT_OURS: [&str; 5] = ["target", ".git", "shared", "node_modules", "venv"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the repository").to_owned()
}

/// Every file of the repository, as (path from the root, absolute path).
fn files() -> Vec<(String, PathBuf)> {
    let (root, mut found) = (root(), Vec::new());
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && !path.is_symlink() && !NOT_OURS.contains(&name.as_str()) {
                folders.push(path);
            } else if path.is_file() {
                found.push((path.strip_prefix(&root).unwrap().to_string_lossy().into_owned(), path));
            }
        }
    }
    found.sort();
    found
}

/// Our Rust sources, with their text. This file is left out: it has to name what it looks for.
fn sources() -> Vec<(String, String)> {
    let rust = files().into_iter().filter(|(name, _)| name.ends_with(".rs") && !name.ends_with("tests/tidy.rs"));
    rust.map(|(name, path)| (name, std::fs::read_to_string(path).unwrap())).collect()
}

/// Code, without comments.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let stripped = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    stripped.enumerate().map(|(i, line)| (i + 1, line))
}

/// The direct dependencies of each of our crates, those of their tests left out.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let metadata = Command::new(cargo)
        .args(["metadata", "--offline", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo can be run");
    assert!(metadata.status.success(), "{}", String::from_utf8_lossy(&metadata.stderr));
    let metadata: Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let of = |package: &Value| {
        let linked = list(&package["dependencies"]).into_iter().filter(|d| d["kind"] != "dev");
        (text(&package["name"]), linked.map(|d| text(&d["name"])).collect())
    };
    list(&metadata["packages"]).iter().map(of).collect()
}

#[test]
fn imports_run_one_way() {
    // Of our crates, which may import which. `tests` may import all.
    let ours: [(&str, &[&str]); 9] = [
        ("proto", &[]),
        ("telemetry", &[]),
        ("identity", &[]),
        ("kernels", &[]),
        ("parallel", &["kernels"]),
        ("models", &["parallel"]),
        ("worker", &["models", "parallel", "proto", "telemetry", "identity", "kernels"]), // kernels::memory alone; see below
        ("coordinator", &["proto", "telemetry", "identity"]),
        ("cli", &["coordinator", "worker", "models", "parallel", "proto", "telemetry", "identity", "kernels"]),
    ];
    let dependencies = dependencies();
    for (name, may) in ours {
        let of = dependencies.get(name).unwrap_or_else(|| panic!("there is no crate `{name}`"));
        for other in of.iter().filter(|d| dependencies.contains_key(*d)) {
            assert!(may.contains(&other.as_str()), "`{name}` must not depend on `{other}` (DESIGN, section 2)");
        }
    }
}

#[test]
fn a_crate_links_only_what_it_may_know() {
    let dependencies = dependencies();
    let candle = ["candle-core", "candle-nn", "candle-transformers", "cudarc"];
    let network = ["tokio", "tonic", "etcd-client"];
    let forbidden: [(&str, &[&[&str]]); 4] = [
        ("coordinator", &[&candle, &["safetensors"]]),
        ("kernels", &[&candle, &network]),
        ("parallel", &[&network]),
        ("models", &[&network, &["cudarc"]]),
    ];
    for (name, lists) in forbidden {
        for no in lists.iter().copied().flatten() {
            assert!(!dependencies[name].contains(*no), "`{name}` must not depend on `{no}`");
        }
    }
    for (name, of) in &dependencies {
        assert!(name == "parallel" || !of.contains("cudarc"), "only `parallel` may depend on `cudarc`, not `{name}`");
        assert!(
            name == "tests" || !of.contains("candle-transformers"),
            "`candle-transformers` is an oracle for tests, not for `{name}`"
        );
    }
}

#[test]
fn kernels_are_called_through_parallel() {
    for (name, text) in
        sources().iter().filter(|(name, _)| !name.starts_with("shard/kernels/") && !name.starts_with("shard/parallel/"))
    {
        for (line, code) in code(text).filter(|(_, code)| code.contains("kernels::")) {
            let allowed = code.contains("kernels::memory") || code.contains("ops::kernels::") || name.starts_with("tests/");
            assert!(allowed, "{name}:{line} calls a kernel; models call `parallel::ops`");
        }
    }
}

#[test]
fn hardware_is_named_in_parallel_alone() {
    for (name, text) in sources().iter().filter(|(name, _)| !name.starts_with("shard/parallel/")) {
        for (line, code) in code(text) {
            let gpu = ["cuda", "nccl", "metal"].iter().any(|f| code.contains(&format!("feature = \"{f}\"")));
            assert!(!gpu && !code.contains("cudarc::"), "{name}:{line} knows the hardware; only shard/parallel may");
        }
    }
}

#[test]
fn unsafe_code_is_in_shard_alone() {
    // And in what stands in for libraries of C.
    let may = |name: &str| name.starts_with("shard/") || name.starts_with("tests/fake-nccl/");
    for (name, text) in sources().iter().filter(|(name, _)| !may(name)) {
        for (line, code) in code(text) {
            let words: Vec<&str> = code.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
            assert!(!words.contains(&"unsafe") && !code.contains("allow(unsafe_code)"), "{name}:{line} is unsafe");
        }
    }
}

#[test]
fn files_are_short() {
    for (name, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= MAX_LINES, "{name} has {lines} lines, over {MAX_LINES}: split it");
    }
}

#[test]
fn no_file_names_the_machine_it_was_written_on() {
    let kinds = ["rs", "toml", "md", "proto", "yaml", "yml", "json", "sh", "py", "Dockerfile", "justfile"];
    let places = ["/work/", "/root/"];
    for (name, path) in files() {
        let kind = name.rsplit(['.', '/']).next().unwrap_or_default();
        if !kinds.contains(&kind) || name.ends_with("tests/tidy.rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        for (i, line) in text.lines().enumerate() {
            // Not a part of a longer path or an address, such as example.org/work/.
            let absolute = |place: &str| {
                line.match_indices(place)
                    .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-}$".contains(c)))
            };
            assert!(!places.iter().any(|place| absolute(place)), "{name}:{} names a path of one machine: {line}", i + 1);
        }
    }
}

#[test]
fn documents_name_files_that_exist() {
    let root = root();
    let names: BTreeSet<String> = files().into_iter().filter_map(|(path, _)| Some(path.rsplit('/').next()?.to_owned())).collect();
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let Ok(text) = std::fs::read_to_string(root.join(document)) else { continue };
        for path in named_paths(&text) {
            // A bare file name may be any file's.
            assert!(root.join(&path).exists() || names.contains(&path), "{document} names `{path}`, which does not exist");
        }
    }
}

/// What a document names, in backticks or as a link, that looks like a path of this repository.
fn named_paths(text: &str) -> BTreeSet<String> {
    let mut named: Vec<&str> = Vec::new();
    let mut in_block = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        } else if !in_block {
            named.extend(line.split('`').skip(1).step_by(2));
            named.extend(line.split("](").skip(1).filter_map(|rest| rest.split(')').next()));
        }
    }
    named.into_iter().filter_map(repository_path).collect()
}

/// `name` as a path of this repository, if it looks like one.
fn repository_path(name: &str) -> Option<String> {
    let name = name.split('#').next()?.trim_start_matches("./").trim_end_matches('/');
    let plain = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "._-/".contains(c));
    let first = name.split('/').next()?;
    // With a slash it is ours if it starts in one of our folders: `image/png` and `owner/model` are not files.
    let ours = name.contains('/') && root().join(first).is_dir();
    let file = !name.contains('/') && [".md", ".toml", ".rs"].iter().any(|end| name.len() > end.len() && name.ends_with(end));
    (plain && !name.starts_with('/') && (ours || file)).then(|| name.to_owned())
}

#[test]
fn paths_are_told_from_other_names() {
    let text = "See `tests/golden/README.md`, [the layers](shard/parallel/src/linear.rs#L10), `README.md`, `deny.toml`, `image/png`,\n\
                `black-forest-labs/FLUX.1-dev`, <https://example.org/tests/x>, `Cargo.toml` and\n```\n`shard/nowhere.rs`\n```\n";
    let expected = ["Cargo.toml", "README.md", "deny.toml", "shard/parallel/src/linear.rs", "tests/golden/README.md"];
    assert_eq!(named_paths(text).into_iter().collect::<Vec<_>>(), expected);
}
