//! Where objects are kept: a folder, or a bucket of S3 or of anything that speaks it.

use std::{
    fmt, fs, io,
    path::{Path as FilePath, PathBuf},
    sync::Arc,
    time::Duration,
};

use object_store::{
    ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    local::LocalFileSystem,
    memory::InMemory,
    prefix::PrefixStore,
};

use crate::error::{Error, Result};

/// How often a request to S3 is repeated, and for how long at most: a worker waits for it, and goes on without.
const S3_RETRIES: usize = 3;
const S3_RETRY_TIMEOUT: Duration = Duration::from_secs(15);

/// Where objects are kept.
#[derive(Clone)]
pub enum Place {
    /// A folder of this machine, made if need be.
    Folder(PathBuf),
    /// A bucket; every key begins with the prefix.
    S3 {
        /// How it is reached.
        client: Box<AmazonS3Builder>,
        /// The bucket.
        bucket: String,
        /// No slash at its ends; may be empty.
        prefix: String,
    },
    /// This process's memory, shared by all that are given the same one: for simulations, which have no threads.
    Memory(Arc<InMemory>),
}

/// Without the credentials.
impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => write!(f, "file://{}", folder.display()),
            Self::S3 { bucket, prefix, .. } => write!(f, "s3://{bucket}/{prefix}"),
            Self::Memory(_) => f.write_str("memory"),
        }
    }
}

impl Place {
    /// Reads `file:///folder` or `s3://bucket/prefix`. The rest of what S3 needs comes from `client`, which for a
    /// coordinator is [`AmazonS3Builder::from_env`]: the usual `AWS_*` variables, `AWS_ENDPOINT_URL` among them.
    ///
    /// # Errors
    /// What is wrong with the URL, for people.
    pub fn parse(url: &str, client: impl FnOnce() -> AmazonS3Builder) -> Result<Self, String> {
        if let Some(folder) = url.strip_prefix("file://") {
            return if folder.starts_with('/') { Ok(Self::Folder(folder.into())) } else { Err("must be file:///folder".into()) };
        }
        let Some(rest) = url.strip_prefix("s3://") else {
            return Err("must be s3://bucket/prefix or file:///folder".into());
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err("names no bucket".into());
        }
        let prefix = prefix.trim_matches('/').to_owned();
        Ok(Self::S3 { client: Box::new(client()), bucket: bucket.to_owned(), prefix })
    }

    /// A client for it.
    ///
    /// # Errors
    /// A folder that cannot be made, or settings that S3's client does not take.
    pub(crate) fn open(&self) -> Result<Arc<dyn ObjectStore>> {
        let failed = |error: object_store::Error| Error::io(format!("open {self:?}"))(error.into());
        match self {
            Self::Folder(folder) => {
                fs::create_dir_all(folder).map_err(Error::io(format!("make the folder {}", folder.display())))?;
                clear_unfinished(folder).map_err(Error::io(format!("clear {}", folder.display())))?;
                let local = LocalFileSystem::new_with_prefix(folder).map_err(failed)?;
                Ok(Arc::new(local.with_fsync(true).with_automatic_cleanup(true)))
            }
            Self::S3 { client, bucket, prefix } => {
                // An error says that one is installed already.
                drop(rustls::crypto::ring::default_provider().install_default());
                let retry = RetryConfig { max_retries: S3_RETRIES, retry_timeout: S3_RETRY_TIMEOUT, ..RetryConfig::default() };
                let client = client.as_ref().clone().with_bucket_name(bucket).with_retry(retry);
                let plain = client.get_config_value(&AmazonS3ConfigKey::Endpoint).is_some_and(|url| url.starts_with("http://"));
                // Whoever names an endpoint without TLS means it.
                let client = if plain { client.with_allow_http(true) } else { client };
                let client = client.build().map_err(failed)?;
                if prefix.is_empty() { Ok(Arc::new(client)) } else { Ok(Arc::new(PrefixStore::new(client, prefix.as_str()))) }
            }
            Self::Memory(objects) => Ok(objects.clone()),
        }
    }
}

/// Removes what a crash left half-written; `object_store` gives it names with a `#` and then does not list it.
fn clear_unfinished(folder: &FilePath) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            clear_unfinished(&entry.path())?;
        } else if kind.is_file() && entry.file_name().to_string_lossy().contains('#') {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_folder_or_a_bucket() {
        let parse = |url: &str| Place::parse(url, AmazonS3Builder::new).map(|place| format!("{place:?}"));
        assert_eq!(parse("file:///data/objects").unwrap(), "file:///data/objects");
        assert_eq!(parse("s3://pictures/atelier/one/").unwrap(), "s3://pictures/atelier/one");
        assert_eq!(parse("s3://pictures").unwrap(), "s3://pictures/");
        for wrong in ["", "pictures", "gs://pictures", "s3:///prefix", "file://relative"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn halves_that_a_crash_left_are_cleared() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("a/b")).unwrap();
        fs::write(folder.path().join("a/b/4#1"), b"half").unwrap();
        fs::write(folder.path().join("a/b/4"), b"whole").unwrap();
        Place::Folder(folder.path().to_owned()).open().unwrap();
        assert!(folder.path().join("a/b/4").exists() && !folder.path().join("a/b/4#1").exists());
    }
}
