//! A certificate authority for development and tests, on this machine's disk. A cluster that matters has one of its own.

use std::{
    fs,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};

use crate::{Error, Files, Result, Role};

/// How long its certificates are good for.
pub const VALIDITY: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// How long the authority is.
const AUTHORITY_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// Clocks of machines differ: a certificate is good from a little before it was made.
const SKEW: Duration = Duration::from_secs(5 * 60);
/// The authority's certificate.
const CA_CERT: &str = "ca.crt";
/// The authority's key: whoever has it can be anybody.
const CA_KEY: &str = "ca.key";

/// Can make certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// The authority's own certificate (PEM): what others must believe.
    pub certificate: String,
}

/// A certificate and its key, in PEM.
pub struct Leaf {
    /// The certificate.
    pub certificate: String,
    /// The key.
    pub key: String,
}

/// What [`fn@write`] does with what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Nothing is replaced: it is an error if anything is there.
    Refuse,
    /// The authority stays, and makes new certificates.
    Renew,
    /// All is made anew.
    Replace,
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// When this machine gives no randomness.
    pub fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let params = params(&key)?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// The one in `dir`.
    ///
    /// # Errors
    /// When it is not there.
    pub fn open(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).map_err(|source| Error::Read { path, source })
        };
        let key = KeyPair::from_pem(&read(CA_KEY)?)?;
        Ok(Self { issuer: Issuer::new(params(&key)?, key), certificate: read(CA_CERT)? })
    }

    /// A certificate of `role` that is good at these hosts for [`VALIDITY`].
    ///
    /// # Errors
    /// When a host cannot be in a certificate.
    pub fn certificate(&self, role: Role, hosts: &[String]) -> Result<Leaf> {
        let now = SystemTime::now();
        self.certificate_for(role, hosts, now, now + VALIDITY)
    }

    /// A certificate that is good between these times.
    ///
    /// # Errors
    /// As [`Self::certificate`].
    pub fn certificate_for(&self, role: Role, hosts: &[String], from: SystemTime, until: SystemTime) -> Result<Leaf> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(hosts)?;
        params.subject_alt_names.push(SanType::URI(role.uri().try_into()?));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("atelier {role}"));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        params.not_before = epoch + since_epoch(from).saturating_sub(SKEW);
        params.not_after = epoch + since_epoch(until);
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Leaf { certificate, key: key.serialize_pem() })
    }
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// What the authority of a key says of itself: its name is the same each time, and no other's.
fn params(key: &KeyPair) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    let mark: String = key.public_key_raw().iter().rev().take(8).map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name.push(DnType::CommonName, format!("atelier development authority {mark}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let now = rcgen::date_time_ymd(1970, 1, 1) + since_epoch(SystemTime::now());
    params.not_before = now - SKEW;
    params.not_after = now + AUTHORITY_VALIDITY;
    Ok(params)
}

/// The files of a role in `dir`.
pub fn files(dir: &Path, role: Role) -> Files {
    Files { own: Some((dir.join(format!("{role}.crt")), dir.join(format!("{role}.key")))), ca: dir.join(CA_CERT) }
}

/// Writes an authority and a certificate for each role into `dir`, readable by this user alone, and says which files.
///
/// # Errors
/// When something is there and may not be replaced, or cannot be written.
pub fn write(dir: &Path, hosts: &[String], existing: Existing) -> Result<Vec<PathBuf>> {
    let mut written = Vec::new();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(cannot_write(dir))?;
    let authority = match existing {
        Existing::Renew => Authority::open(dir)?,
        Existing::Refuse | Existing::Replace => Authority::new()?,
    };
    let mut contents = Vec::new();
    if existing != Existing::Renew {
        contents.push((dir.join(CA_CERT), authority.certificate.clone()));
        // PKCS #8, as the leaves'.
        contents.push((dir.join(CA_KEY), authority.issuer.key().serialize_pem()));
    }
    for role in Role::ALL {
        let leaf = authority.certificate(role, hosts)?;
        let Some((cert, key)) = files(dir, role).own else { continue };
        contents.extend([(cert, leaf.certificate), (key, leaf.key)]);
    }
    if existing == Existing::Refuse
        && let Some((path, _)) = contents.iter().find(|(path, _)| path.exists())
    {
        return Err(Error::Exists { path: path.clone() });
    }
    for (path, text) in contents {
        replace(&path, &text)?;
        written.push(path);
    }
    Ok(written)
}

/// Puts a whole file in the place of another one, or of none.
fn replace(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    let result = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        fs::rename(&new, path)
    });
    result.map_err(cannot_write(path))
}

fn cannot_write(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Write { path, source }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

impl std::fmt::Debug for Leaf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Leaf")
    }
}
