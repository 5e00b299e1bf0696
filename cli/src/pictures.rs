//! A job's pictures, from the coordinator into files.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use proto::v1::{ImageResult, Job};
use tonic::Code;

use crate::client::Client;
use crate::error::Error;
use crate::patience::Patience;

/// Fetches the pictures of a job that succeeded and writes them; says what it wrote.
pub(crate) async fn fetch(client: &mut Client, job: &Job, out: &Path) -> Result<(), Error> {
    for (i, image) in job.images.iter().enumerate() {
        let bytes = download(client, job, image).await?;
        let path = numbered(out, i, job.images.len());
        tokio::fs::write(&path, bytes).await.map_err(|source| Error::File { path: path.display().to_string(), source })?;
        println!("{}  {}x{}  sha256 {}", path.display(), image.width, image.height, image.sha256);
    }
    Ok(())
}

/// One picture, across restarts of the coordinator.
async fn download(client: &mut Client, job: &Job, image: &ImageResult) -> Result<Vec<u8>, Error> {
    let patience = Patience::default();
    loop {
        match client.download(&image.blob_id).await {
            Ok(bytes) if bytes.len() as u64 == image.byte_size => return Ok(bytes),
            Ok(_) => return Err(Error::Protocol("a picture of another size than the job says")),
            Err(Error::Status(status)) if status.code() == Code::NotFound => return Err(Error::PictureGone(job.id.clone())),
            Err(Error::Status(status)) => patience.wait(*status).await?,
            Err(error) => return Err(error),
        }
    }
}

/// Pictures can be written there, so that a job is not drawn for nothing. `several`: their names get numbers.
pub(crate) fn check_writable(out: &Path, several: bool) -> Result<(), Error> {
    let path = if several { numbered(out, 0, 2) } else { out.to_owned() };
    let failed = |source| Error::File { path: format!("--out {}", path.display()), source };
    if out.extension().is_some_and(|extension| !extension.eq_ignore_ascii_case("png")) || out == Path::new("-") {
        let reason = format!("`{}`: pictures are written to files as PNG", out.display());
        return Err(Error::Flag { flag: "--out", reason });
    }
    if path.exists() {
        // A folder cannot be opened so. What is in a file stays.
        return OpenOptions::new().append(true).open(&path).map(drop).map_err(failed);
    }
    OpenOptions::new().write(true).create_new(true).open(&path).map_err(failed)?;
    std::fs::remove_file(&path).map_err(failed)
}

fn numbered(out: &Path, index: usize, count: usize) -> PathBuf {
    if count == 1 {
        return out.to_owned();
    }
    let stem = out.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let extension = out.extension().map_or_else(|| "png".into(), |e| e.to_string_lossy().into_owned());
    out.with_file_name(format!("{stem}-{}.{extension}", index + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_pictures_get_numbers() {
        assert_eq!(numbered(Path::new("a/b.png"), 0, 1), Path::new("a/b.png"));
        assert_eq!(numbered(Path::new("a/b.png"), 1, 3), Path::new("a/b-2.png"));
    }

    #[test]
    fn where_nothing_can_be_written_is_known_before_and_what_is_there_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (new, old) = (folder.path().join("new.png"), folder.path().join("old.png"));
        std::fs::write(&old, "old").unwrap();
        for several in [false, true] {
            check_writable(&new, several).unwrap();
            check_writable(&old, several).unwrap();
        }
        assert_eq!((std::fs::read(&old).unwrap(), std::fs::read_dir(folder.path()).unwrap().count()), (b"old".to_vec(), 1));
        for wrong in [folder.path().join("none/a.png"), folder.path().to_owned()] {
            let error = check_writable(&wrong, false).unwrap_err();
            assert!(error.to_string().starts_with("--out "), "{error}");
        }
    }
}
