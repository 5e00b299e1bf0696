//! A process's own certificate and the authorities it believes, as they are now.
//!
//! The files are looked at every [`POLL`]: their contents, since what a Kubernetes secret is mounted as is a link that is
//! turned to another folder. New connections take what is new; those that are open go on. Files that cannot be used are
//! warned of once, and what was there before stays.

use std::{
    fmt,
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock, Weak},
    thread,
    time::Duration,
};

use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor, pem::PemObject},
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

use crate::{
    Error, Files, Port, Result, Role,
    files::Contents,
    verify::{Verifier, role_of},
};

/// How often the files are looked at.
const POLL: Duration = Duration::from_secs(2);

/// Who a process is, and whom it believes. Cheap to clone; follows its files for as long as a clone lives.
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    files: Files,
    /// The role that the own certificate must have.
    role: Role,
    provider: Arc<CryptoProvider>,
    current: RwLock<Arc<Material>>,
    /// What the files held when they were read last, good or bad.
    seen: Mutex<Result<Contents, String>>,
}

/// What the files hold, ready for use.
struct Material {
    own: Option<Arc<SingleCertAndKey>>,
    authorities: Arc<Vec<TrustAnchor<'static>>>,
}

impl Identity {
    /// Reads the files and follows them from now on, on a thread of its own.
    ///
    /// # Errors
    /// When a file cannot be read, does not hold what it should, or the certificate is not of `role`.
    pub fn open(files: Files, role: Role) -> Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let contents = files.read()?;
        let material = Material::parse(&files, &contents, role, &provider)?;
        let current = RwLock::new(Arc::new(material));
        let inner = Arc::new(Inner { files, role, provider, current, seen: Mutex::new(Ok(contents)) });
        let followed = Arc::downgrade(&inner);
        let follow = move || follow(&followed);
        thread::Builder::new().name("certificates".into()).spawn(follow).map_err(Error::Thread)?;
        Ok(Self(inner))
    }

    /// Whether it has a certificate to show.
    pub fn has_certificate(&self) -> bool {
        self.0.current().own.is_some()
    }

    /// What a connection to a server of `role` is made with. With `host`, the certificate must name the host as well.
    pub(crate) fn client(&self, role: Role, host: bool, protocols: &[&[u8]]) -> Result<Arc<ClientConfig>, rustls::Error> {
        let material = self.0.current();
        let verifier = self.0.verifier(&material, vec![role], false, host);
        let builder = ClientConfig::builder_with_provider(self.0.provider.clone()).with_protocol_versions(&[&TLS13])?;
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match &material.own {
            Some(own) => builder.with_client_cert_resolver(own.clone()),
            None => builder.with_no_client_auth(),
        };
        // A resumed connection would not show its certificate again.
        config.resumption = Resumption::disabled();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// What a connection to `port` is accepted with.
    pub(crate) fn server(&self, port: Port, protocols: &[&[u8]]) -> Result<Arc<ServerConfig>, rustls::Error> {
        let material = self.0.current();
        let own = material.own.clone().ok_or_else(|| rustls::Error::General("a server needs a certificate".into()))?;
        let verifier = self.0.verifier(&material, port.roles.to_vec(), port.anonymous, false);
        let mut config = ServerConfig::builder_with_provider(self.0.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(own);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Arc::new(config))
    }
}

impl Inner {
    fn current(&self) -> Arc<Material> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn verifier(&self, material: &Material, roles: Vec<Role>, anonymous: bool, host: bool) -> Verifier {
        Verifier { authorities: material.authorities.clone(), roles, anonymous, host, provider: self.provider.clone() }
    }

    /// Takes what is new in the files, if it can be used.
    fn refresh(&self) {
        let read = self.files.read().map_err(|error| describe(&error));
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if *seen == read {
            return;
        }
        *seen = read;
        let parsed = match &*seen {
            Ok(contents) => Material::parse(&self.files, contents, self.role, &self.provider).map_err(|error| describe(&error)),
            Err(problem) => Err(problem.clone()),
        };
        match parsed {
            Ok(material) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(material);
                tracing::info!(role = %self.role, "new certificates are in use");
            }
            Err(problem) => tracing::warn!(role = %self.role, problem, "new certificates cannot be used, the old ones stay"),
        }
    }
}

fn describe(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn follow(identity: &Weak<Inner>) {
    loop {
        thread::sleep(POLL);
        match identity.upgrade() {
            Some(identity) => identity.refresh(),
            None => return,
        }
    }
}

impl Material {
    fn parse(files: &Files, contents: &Contents, role: Role, provider: &CryptoProvider) -> Result<Self> {
        let authorities = certificates(&files.ca, &contents.ca)?;
        let anchors = authorities.iter().map(|authority| {
            let anchor = webpki::anchor_from_trusted_cert(authority);
            anchor.map(|anchor| anchor.to_owned()).map_err(|error| wrong(&files.ca, error.to_string()))
        });
        let authorities = Arc::new(anchors.collect::<Result<Vec<_>>>()?);
        let (Some((cert_path, key_path)), Some((cert, key))) = (&files.own, &contents.own) else {
            return Ok(Self { own: None, authorities });
        };
        let chain = certificates(cert_path, cert)?;
        if chain.first().and_then(role_of) != Some(role) {
            return Err(Error::Role { path: cert_path.clone(), role });
        }
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| wrong(key_path, "holds no private key in PEM".into()))?;
        let own = CertifiedKey::from_der(chain, key, provider)
            .map_err(|error| wrong(key_path, format!("does not go with {}: {error}", cert_path.display())))?;
        Ok(Self { own: Some(Arc::new(SingleCertAndKey::from(own))), authorities })
    }
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(wrong(path, "holds no certificate in PEM".into())),
    }
}

fn wrong(path: &Path, problem: String) -> Error {
    Error::File { path: path.to_owned(), problem }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.0.role)
    }
}
