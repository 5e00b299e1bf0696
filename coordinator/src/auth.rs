//! Who calls: from the certificate, or the key or token that comes with a call, to a tenant.
//!
//! | connection | keys or tokens are asked for | a caller is |
//! |---|---|---|
//! | plain | no | the one tenant without a name |
//! | TLS | no | with a client's certificate: the one tenant without a name |
//! | TLS | yes | the tenant of its key or token |
//!
//! With a worker's certificate and no key it is a worker, which has no jobs of its own. With a key of a tenant that the file of keys
//! calls an operator it sees everybody's jobs, though not their prompts and pictures. A token is never an operator's: who gives
//! out tokens need not be who keeps that file.
//!
//! Keys over plain connections are refused at the start.

mod jwt;
mod keys;

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use identity::{Peer, Role};
use tokio_util::sync::CancellationToken;
use tonic::{Extensions, Request, Status, metadata::MetadataMap, service::Interceptor};
use tracing::{info, warn};

use crate::{
    api::status,
    config::AuthConfig,
    error::{Error, Result},
    runtime::Handle,
    state::TenantLimits,
};

use self::{jwt::Jwks, keys::Keys};
pub use self::{jwt::JwtConfig, keys::new_key};

/// How often the files are looked at.
const POLL: std::time::Duration = std::time::Duration::from_secs(2);

/// Who made a call. It is among the extensions of every request that was let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// Whose jobs it may see; none: it shows a certificate alone where keys are asked for.
    tenant: Option<Arc<str>>,
    /// It is a worker, which brings and fetches what belongs to jobs.
    pub(crate) is_worker: bool,
    /// It sees and cancels the jobs of all tenants.
    pub(crate) is_operator: bool,
}

/// Whose jobs a key or a token shows.
#[derive(Debug, Clone, Default)]
struct Shown {
    tenant: Option<Arc<str>>,
    is_operator: bool,
}

impl Caller {
    /// Who made this call.
    pub(crate) fn of(extensions: &Extensions) -> Self {
        // Where nobody looked, it is nobody.
        extensions.get().cloned().unwrap_or(Self { tenant: None, is_worker: false, is_operator: false })
    }

    /// Whose jobs it may see.
    ///
    /// # Errors
    /// When it is nobody's.
    pub(crate) fn tenant(&self) -> Result<Arc<str>> {
        let nobody = || unauthenticated("NO_CREDENTIALS", "this call needs an API key or a token: authorization: Bearer ...");
        self.tenant.clone().ok_or_else(nobody)
    }
}

fn unauthenticated(reason: &'static str, problem: &'static str) -> Error {
    Error::Unauthenticated { reason, problem }
}

/// Tells callers apart. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Authenticator(Arc<RwLock<Known>>);

#[derive(Debug, Default)]
struct Known {
    keys: Option<Keys>,
    tokens: Option<Jwks>,
}

impl Authenticator {
    /// With what the files hold now.
    ///
    /// # Errors
    /// When a file cannot be read, or says something that cannot be right.
    pub(crate) fn open(config: &AuthConfig) -> Result<Self> {
        Ok(Self(Arc::new(RwLock::new(Known::read(config)?))))
    }

    /// What tenants may use.
    pub(crate) fn limits(&self) -> BTreeMap<String, TenantLimits> {
        self.known(|known| known.keys.as_ref().map(|keys| keys.limits.clone()).unwrap_or_default())
    }

    /// Follows the files until `stop`; what tenants may use then is told to the state.
    pub(crate) async fn follow(self, config: AuthConfig, handle: Handle, stop: CancellationToken) {
        let Ok(mut seen) = config.contents() else { return };
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(POLL) => {}
            }
            let read = config.contents().unwrap_or_default();
            if read == seen {
                continue;
            }
            seen = read;
            match Known::read(&config) {
                Ok(known) => {
                    *self.0.write().unwrap_or_else(PoisonError::into_inner) = known;
                    info!("new keys are in use");
                    if handle.tenants(self.limits()).await.is_err() {
                        return;
                    }
                }
                Err(error) => warn!(%error, "new keys cannot be used, the old ones stay"),
            }
        }
    }

    fn known<T>(&self, look: impl FnOnce(&Known) -> T) -> T {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn caller(&self, extensions: &Extensions, metadata: &MetadataMap) -> Result<Caller> {
        let peer = extensions.get::<Peer>().copied().filter(|peer| peer.secure);
        let Some(peer) = peer else {
            return Ok(Caller { tenant: Some("".into()), is_worker: false, is_operator: false });
        };
        let is_worker = peer.role == Some(Role::Worker);
        let bearer = metadata.get("authorization").map(|value| value.to_str().unwrap_or_default());
        let Shown { tenant, is_operator } = self.known(|known| match bearer {
            _ if known.keys.is_none() && known.tokens.is_none() => {
                let tenant = peer.role.filter(|role| *role == Role::Client).map(|_| "".into());
                Ok(Shown { tenant, is_operator: false })
            }
            Some(bearer) => known.shown(bearer),
            None => Ok(Shown::default()),
        })?;
        if tenant.is_none() && peer.role.is_none() {
            return Err(unauthenticated("NO_CREDENTIALS", "this call needs a certificate, an API key or a token"));
        }
        Ok(Caller { tenant, is_worker, is_operator })
    }
}

impl Known {
    fn read(config: &AuthConfig) -> Result<Self> {
        let keys = config.api_keys.as_deref().map(Keys::read).transpose()?;
        let tokens = config.jwt.clone().map(Jwks::read).transpose()?;
        Ok(Self { keys, tokens })
    }

    fn shown(&self, bearer: &str) -> Result<Shown> {
        let unknown = || unauthenticated("UNKNOWN_KEY", "nobody has this API key");
        let shown = bearer.strip_prefix("Bearer ").ok_or_else(unknown)?.trim();
        match &self.tokens {
            Some(tokens) if shown.split('.').count() == 3 => {
                tokens.tenant(shown).map(|tenant| Shown { tenant: Some(tenant), is_operator: false })
            }
            _ => {
                let keys = self.keys.as_ref().ok_or_else(unknown)?;
                let tenant = keys.tenant(shown).ok_or_else(unknown)?;
                Ok(Shown { is_operator: keys.is_operator(&tenant), tenant: Some(tenant) })
            }
        }
    }
}

impl Interceptor for Authenticator {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let caller = self.caller(request.extensions(), request.metadata()).map_err(|error| status(&error))?;
        request.extensions_mut().insert(caller);
        Ok(request)
    }
}
