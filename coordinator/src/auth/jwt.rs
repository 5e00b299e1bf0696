//! Tokens (JWT) whose signers' keys are in a file (JWKS): RS256, ES256 and EdDSA.
//!
//! How a token is verified is said by the key, never by the token. Expiry, issuer and audience are always checked.

use std::{
    fs,
    path::PathBuf,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::signature::{ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey};
use serde::Deserialize;
use serde_json::Value;

use super::{keys::check_name, unauthenticated};
use crate::error::{Error, Result};

/// How far clocks may differ, in seconds.
const LEEWAY: u64 = 60;
/// The longest token that is looked at.
const MAX_BYTES: usize = 16 << 10;

/// Whose tokens are believed, and what they say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtConfig {
    /// The keys of the signers (JWKS).
    pub jwks: PathBuf,
    /// What `iss` must be.
    pub issuer: String,
    /// What `aud` must be or hold.
    pub audience: String,
    /// The claim that names the tenant.
    pub tenant_claim: String,
}

/// The keys of the signers.
pub(super) struct Jwks {
    config: JwtConfig,
    keys: Vec<Key>,
}

struct Key {
    id: Option<String>,
    /// The only algorithm that it is for.
    algorithm: &'static str,
    public: Public,
}

enum Public {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    P256(Vec<u8>),
    Ed25519(Vec<u8>),
}

#[derive(Deserialize)]
struct JwksFile {
    keys: Vec<JwkEntry>,
}

#[derive(Deserialize)]
struct JwkEntry {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    crv: Option<String>,
    #[serde(default)]
    n: String,
    #[serde(default)]
    e: String,
    #[serde(default)]
    x: String,
    #[serde(default)]
    y: String,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
}

impl Jwks {
    pub(super) fn read(config: JwtConfig) -> Result<Self> {
        let wrong = |problem: String| Error::KeysFile { path: config.jwks.clone(), problem };
        let text = fs::read_to_string(&config.jwks).map_err(|error| wrong(format!("cannot be read: {error}")))?;
        let file: JwksFile = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        // A set may hold keys for other ends and of other kinds.
        let for_signatures = file.keys.iter().filter(|key| key.usage.as_deref().is_none_or(|usage| usage == "sig"));
        let keys: Vec<Key> = for_signatures.filter_map(JwkEntry::key).collect();
        if keys.is_empty() {
            return Err(wrong("keys: holds none for RS256, ES256 (P-256) or EdDSA (Ed25519)".into()));
        }
        Ok(Self { config, keys })
    }

    /// The tenant that a token names.
    pub(super) fn tenant(&self, token: &str) -> Result<Arc<str>> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(u64::MAX, |since| since.as_secs());
        self.tenant_at(token, now)
    }

    fn tenant_at(&self, token: &str, now: u64) -> Result<Arc<str>> {
        let invalid = |problem| unauthenticated("TOKEN_INVALID", problem);
        let no_token = || invalid("this is no signed token");
        if token.len() > MAX_BYTES {
            return Err(no_token());
        }
        let (signed, signature) = token.rsplit_once('.').ok_or_else(no_token)?;
        let (header, claims) = signed.split_once('.').ok_or_else(no_token)?;
        let decode = |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|_| no_token());
        let (header, claims, signature) = (decode(header)?, decode(claims)?, decode(signature)?);
        let header: Header = serde_json::from_slice(&header).map_err(|_| no_token())?;
        let fits = |key: &&Key| key.algorithm == header.alg && (header.kid.is_none() || key.id == header.kid);
        let is_signed = self.keys.iter().filter(fits).any(|key| key.public.verify(signed.as_bytes(), &signature));
        if !is_signed {
            return Err(invalid("no key that is known has signed this token"));
        }
        let claims: Value = serde_json::from_slice(&claims).map_err(|_| no_token())?;
        let time = |claim: &str| claims[claim].as_f64().map(|seconds| seconds.max(0.0) as u64);
        match time("exp") {
            Some(until) if now < until.saturating_add(LEEWAY) => {}
            Some(_) => return Err(unauthenticated("TOKEN_EXPIRED", "this token is no longer good")),
            None => return Err(invalid("this token has no exp")),
        }
        if !claims["nbf"].is_null() && time("nbf").is_none_or(|from| now.saturating_add(LEEWAY) < from) {
            return Err(invalid("this token is not good yet"));
        }
        if claims["iss"].as_str() != Some(&self.config.issuer) {
            return Err(invalid("this token is of another issuer"));
        }
        let names_us = |audience: &Value| audience.as_str() == Some(&self.config.audience);
        if !names_us(&claims["aud"]) && !claims["aud"].as_array().is_some_and(|all| all.iter().any(names_us)) {
            return Err(invalid("this token is for another audience"));
        }
        let tenant = claims[&self.config.tenant_claim].as_str().filter(|name| check_name(name).is_ok());
        tenant.map(Arc::from).ok_or_else(|| invalid("this token names no tenant"))
    }
}

impl JwkEntry {
    /// The key, if it is of a kind that is known.
    fn key(&self) -> Option<Key> {
        let bytes = |text: &str| BASE64_URL_SAFE_NO_PAD.decode(text).ok().filter(|bytes| !bytes.is_empty());
        let (algorithm, public) = match (self.kty.as_str(), self.crv.as_deref()) {
            ("RSA", _) => ("RS256", Public::Rsa { n: bytes(&self.n)?, e: bytes(&self.e)? }),
            ("EC", Some("P-256")) => ("ES256", Public::P256([vec![4], bytes(&self.x)?, bytes(&self.y)?].concat())),
            ("OKP", Some("Ed25519")) => ("EdDSA", Public::Ed25519(bytes(&self.x)?)),
            _ => return None,
        };
        let fits = self.alg.as_deref().is_none_or(|named| named == algorithm);
        fits.then(|| Key { id: self.kid.clone(), algorithm, public })
    }
}

impl Public {
    fn verify(&self, signed: &[u8], signature: &[u8]) -> bool {
        let verified = match self {
            Self::Rsa { n, e } => RsaPublicKeyComponents { n, e }.verify(&RSA_PKCS1_2048_8192_SHA256, signed, signature),
            Self::P256(point) => UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(signed, signature),
            Self::Ed25519(key) => UnparsedPublicKey::new(&ED25519, key).verify(signed, signature),
        };
        verified.is_ok()
    }
}

impl std::fmt::Debug for Jwks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Jwks({} keys)", self.keys.len())
    }
}

#[cfg(test)]
mod tests {
    use ring::{
        rand::SystemRandom,
        signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair},
    };
    use serde_json::json;

    use super::*;

    const NOW: u64 = 1_000_000;

    fn encode(bytes: impl AsRef<[u8]>) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(bytes)
    }

    fn token(header: &Value, claims: &Value, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
        let signed = format!("{}.{}", encode(header.to_string()), encode(claims.to_string()));
        let signature = encode(sign(signed.as_bytes()));
        format!("{signed}.{signature}")
    }

    fn claims() -> Value {
        json!({ "iss": "https://login", "aud": ["other", "atelier"], "exp": NOW + 10, "tenant": "studio" })
    }

    fn jwks(keys: &Value) -> Result<Jwks> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("jwks.json");
        fs::write(&path, json!({ "keys": keys }).to_string()).unwrap();
        let tenant_claim = "tenant".into();
        Jwks::read(JwtConfig { jwks: path, issuer: "https://login".into(), audience: "atelier".into(), tenant_claim })
    }

    fn ed25519() -> (Ed25519KeyPair, Jwks) {
        let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let key = Ed25519KeyPair::from_pkcs8(key.as_ref()).unwrap();
        let public = json!({ "kty": "OKP", "crv": "Ed25519", "kid": "1", "x": encode(key.public_key()) });
        (key, jwks(&json!([public])).unwrap())
    }

    fn reason(result: Result<Arc<str>>) -> &'static str {
        result.unwrap_err().reason()
    }

    #[test]
    fn a_token_names_its_tenant_for_as_long_as_it_is_good() {
        let (key, jwks) = ed25519();
        let sign = |bytes: &[u8]| key.sign(bytes).as_ref().to_vec();
        let good = token(&json!({ "alg": "EdDSA", "kid": "1" }), &claims(), sign);
        assert_eq!(&*jwks.tenant_at(&good, NOW).unwrap(), "studio");
        assert_eq!(reason(jwks.tenant_at(&good, NOW + 10 + LEEWAY)), "TOKEN_EXPIRED");
        let changed = good.replacen('.', "x.", 1);
        assert_eq!(reason(jwks.tenant_at(&changed, NOW)), "TOKEN_INVALID");
        for (claim, value) in [
            ("iss", json!("https://other")),
            ("aud", json!("other")),
            ("exp", Value::Null),
            ("nbf", json!(NOW + 1000)),
            ("nbf", json!("tomorrow")),
            ("tenant", json!("../x")),
            ("tenant", Value::Null),
        ] {
            let mut wrong = claims();
            wrong[claim] = value;
            let wrong = token(&json!({ "alg": "EdDSA" }), &wrong, sign);
            assert_eq!(reason(jwks.tenant_at(&wrong, NOW)), "TOKEN_INVALID", "{claim}");
        }
    }

    #[test]
    fn a_token_cannot_choose_how_it_is_verified() {
        let (key, jwks) = ed25519();
        let sign = |bytes: &[u8]| key.sign(bytes).as_ref().to_vec();
        for header in [json!({ "alg": "none" }), json!({ "alg": "HS256" }), json!({ "alg": "EdDSA", "kid": "2" })] {
            assert_eq!(reason(jwks.tenant_at(&token(&header, &claims(), sign), NOW)), "TOKEN_INVALID", "{header}");
        }
        let unsigned = token(&json!({ "alg": "EdDSA" }), &claims(), |_| Vec::new());
        assert_eq!(reason(jwks.tenant_at(&unsigned, NOW)), "TOKEN_INVALID");
        let (other, _) = ed25519();
        let forged = token(&json!({ "alg": "EdDSA" }), &claims(), |bytes| other.sign(bytes).as_ref().to_vec());
        assert_eq!(reason(jwks.tenant_at(&forged, NOW)), "TOKEN_INVALID");
    }

    #[test]
    fn es256_is_taken_and_a_set_without_a_key_of_a_known_kind_is_not() {
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.as_ref(), &random).unwrap();
        let point = key.public_key().as_ref();
        let public = json!({ "kty": "EC", "crv": "P-256", "x": encode(&point[1..33]), "y": encode(&point[33..]) });
        let jwks_of = jwks(&json!([public])).unwrap();
        let good = token(&json!({ "alg": "ES256" }), &claims(), |bytes| key.sign(&random, bytes).unwrap().as_ref().to_vec());
        assert_eq!(&*jwks_of.tenant_at(&good, NOW).unwrap(), "studio");
        let problem = jwks(&json!([{ "kty": "oct", "k": "AAAA" }])).unwrap_err().to_string();
        assert!(problem.contains("holds none for RS256"), "{problem}");
    }
}
