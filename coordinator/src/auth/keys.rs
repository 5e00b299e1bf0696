//! The file of API keys: whose each is, as a hash, and what each tenant may use.
//!
//! ```toml
//! [[key]]
//! tenant = "studio"
//! sha256 = "64 hexadecimal digits"
//!
//! [[tenant]]
//! name = "studio"
//! weight = 2                            # against others' 1, in the queue
//! pixel_steps_per_second = 50000000     # width x height x steps x pictures
//! burst_pixel_steps = 500000000         # a minute of the above, if not given
//! max_running = 4
//! max_queued = 100
//!
//! [[tenant]]
//! name = "operations"
//! operator = true                       # its keys see and cancel everybody's jobs, without their prompts and pictures
//! ```
//!
//! A key is 256 random bits, so its plain sha256 tells nothing of it: what slow hashes are for are words that people choose.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::Arc,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::rand::{SecureRandom, SystemRandom};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::{
    error::{Error, Result},
    state::{DEFAULT_BURST_SECONDS, MAX_WEIGHT, Quota, TenantLimits},
};

/// What every key begins with, so that one is known where it should not be.
const PREFIX: &str = "atl_";
/// The longest name of a tenant.
const MAX_NAME_CHARS: usize = 64;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    key: Vec<KeyEntry>,
    #[serde(default)]
    tenant: Vec<TenantEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyEntry {
    tenant: String,
    sha256: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TenantEntry {
    name: String,
    weight: Option<u32>,
    pixel_steps_per_second: Option<u64>,
    burst_pixel_steps: Option<u64>,
    max_running: Option<usize>,
    max_queued: Option<usize>,
    #[serde(default)]
    operator: bool,
}

/// Whose each key is.
#[derive(Debug)]
pub(super) struct Keys {
    by_hash: Vec<([u8; 32], Arc<str>)>,
    /// By tenant.
    pub(super) limits: BTreeMap<String, TenantLimits>,
    /// Tenants whose keys are an operator's.
    operators: BTreeSet<String>,
}

impl Keys {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let wrong = |problem: String| Error::KeysFile { path: path.to_owned(), problem };
        let text = fs::read_to_string(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
        Self::parse(&text).map_err(wrong)
    }

    fn parse(text: &str) -> Result<Self, String> {
        // The message alone: the rest of toml's would quote the line, and with it perhaps a key.
        let file: File = toml::from_str(text).map_err(|error| error.message().to_owned())?;
        let mut by_hash = Vec::new();
        for (at, key) in file.key.iter().enumerate() {
            check_name(&key.tenant).map_err(|problem| format!("key {}: tenant: {problem}", at + 1))?;
            let hash = from_hex(&key.sha256).ok_or_else(|| format!("key {}: sha256: must be 64 hexadecimal digits", at + 1))?;
            by_hash.push((hash, Arc::from(key.tenant.as_str())));
        }
        let mut limits: BTreeMap<String, TenantLimits> = BTreeMap::new();
        let mut operators = BTreeSet::new();
        for tenant in file.tenant {
            check_name(&tenant.name).map_err(|problem| format!("tenant.name: {problem}"))?;
            let of = |problem: String| format!("tenant {:?}: {problem}", tenant.name);
            let known = tenant.limits().map_err(of)?;
            if limits.insert(tenant.name.clone(), known).is_some() {
                return Err(of("is there twice".into()));
            }
            if tenant.operator {
                operators.insert(tenant.name);
            }
        }
        Ok(Self { by_hash, limits, operators })
    }

    /// Whether the tenant's keys are an operator's.
    pub(super) fn is_operator(&self, tenant: &str) -> bool {
        self.operators.contains(tenant)
    }

    /// Whose key this is. Every hash is looked at, and in whole, so that the time tells nothing.
    pub(super) fn tenant(&self, key: &str) -> Option<Arc<str>> {
        let hash: [u8; 32] = Sha256::digest(key).into();
        let matches = |known: &[u8; 32]| bool::from(known.ct_eq(&hash));
        self.by_hash.iter().fold(None, |found, (known, tenant)| if matches(known) { Some(tenant.clone()) } else { found })
    }
}

impl TenantEntry {
    fn limits(&self) -> Result<TenantLimits, String> {
        let weight = self.weight.unwrap_or(1);
        if !(1..=MAX_WEIGHT).contains(&weight) {
            return Err(format!("weight: must be from 1 to {MAX_WEIGHT}"));
        }
        let at_least_one = [
            ("pixel_steps_per_second", self.pixel_steps_per_second),
            ("burst_pixel_steps", self.burst_pixel_steps),
            ("max_running", self.max_running.map(|most| most as u64)),
        ];
        if let Some((field, _)) = at_least_one.iter().find(|(_, value)| *value == Some(0)) {
            return Err(format!("{field}: must be at least 1"));
        }
        if self.burst_pixel_steps.is_some() && self.pixel_steps_per_second.is_none() {
            return Err("burst_pixel_steps: goes with pixel_steps_per_second".into());
        }
        let quota = self.pixel_steps_per_second.map(|per_second| Quota {
            per_second,
            burst: self.burst_pixel_steps.unwrap_or(per_second.saturating_mul(DEFAULT_BURST_SECONDS)),
        });
        Ok(TenantLimits { weight, quota, max_running: self.max_running, max_queued: self.max_queued })
    }
}

/// Whether a tenant may be called so.
pub(super) fn check_name(name: &str) -> Result<(), &'static str> {
    let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if plain && name.len() <= MAX_NAME_CHARS { Ok(()) } else { Err("must be 1 to 64 letters, digits, `-`, `_` or `.`") }
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u8> = text.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
    if digits.len() == 64 { <[u8; 32]>::try_from(bytes).ok() } else { None }
}

/// A new key of `tenant`: what the tenant is given, once, and what goes into the file.
///
/// # Errors
/// When the tenant cannot be called so, or the system gives no randomness.
pub fn new_key(tenant: &str) -> Result<(String, String)> {
    let wrong = |problem: &str| Error::Setting { setting: "TENANT", problem: problem.to_owned() };
    check_name(tenant).map_err(wrong)?;
    let mut random = [0; 32];
    SystemRandom::new().fill(&mut random).map_err(|_| wrong("the system gives no randomness"))?;
    let key = format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(random));
    let hash: String = Sha256::digest(&key).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((key, format!("[[key]]\ntenant = \"{tenant}\"\nsha256 = \"{hash}\"\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_key_is_its_tenants_and_nobody_elses() {
        let ((key, entry), (other, _)) = (new_key("studio").unwrap(), new_key("studio").unwrap());
        let keys = Keys::parse(&entry).unwrap();
        assert_eq!(keys.tenant(&key).as_deref(), Some("studio"));
        assert_eq!((keys.tenant(&other), keys.tenant("")), (None, None));
        assert!(!entry.contains(&key) && key.len() == 47, "{entry}");
        assert!(new_key("a b").is_err());
    }

    #[test]
    fn limits_have_defaults_and_a_wrong_one_is_named() {
        let file =
            "[[tenant]]\nname = \"a\"\npixel_steps_per_second = 10\n[[tenant]]\nname = \"b\"\nweight = 3\nmax_queued = 0\n";
        let keys = Keys::parse(file).unwrap();
        assert_eq!(keys.limits["a"].quota, Some(Quota { per_second: 10, burst: 600 }));
        assert_eq!((keys.is_operator("a"), keys.is_operator("nobody")), (false, false));
        assert!(Keys::parse("[[tenant]]\nname = \"a\"\noperator = true\n").unwrap().is_operator("a"));
        assert_eq!((keys.limits["a"].weight, keys.limits["b"].weight, keys.limits["b"].max_queued), (1, 3, Some(0)));
        let wrong = |text: &str, part: &str| {
            let problem = Keys::parse(text).unwrap_err();
            assert!(problem.contains(part), "{problem}");
        };
        wrong("[[tenant]]\nname = \"a\"\nweight = 0\n", "tenant \"a\": weight");
        wrong("[[tenant]]\nname = \"a\"\nburst_pixel_steps = 5\n", "goes with pixel_steps_per_second");
        wrong("[[key]]\ntenant = \"a\"\nsha256 = \"12\"\n", "key 1: sha256");
        wrong("[[key]]\ntenant = \"a\"\nkey = \"atl_x\"\n", "unknown field `key`");
        wrong("[[tenant]]\nname = \"a\"\n[[tenant]]\nname = \"a\"\n", "twice");
    }
}
