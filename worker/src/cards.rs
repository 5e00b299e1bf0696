//! The cards of models, each read once: a card holds the sha256 of every file of the model.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use models::card::Card;
use models::control::card::{ControlCard, RegisteredControl};
use models::lora::card::{AdapterCard, Registered};
use models::model_dir::Location;
use proto::v1::model_described::Outcome;
use proto::v1::{DescribeModel, ModelCard, ModelDescribed};

use crate::backend::Backend;
use crate::{adapter_wire, card_wire, control_wire};

/// Most files of a model that are looked at. FLUX.1 has 25.
const MAX_FILES: usize = 10_000;
/// How deep folders are looked into; diffusers' layout has one level.
const MAX_DEPTH: usize = 4;
/// Longest scheduler configuration.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Reads cards, and keeps them for as long as the files stay as they are.
pub(crate) struct Cards {
    backend: Arc<dyn Backend>,
    /// As many as models.toml names.
    known: Mutex<HashMap<Location, (Files, Card)>>,
    /// Of control networks: gigabytes each, and a new coordinator asks for all of them before it takes groups over.
    controls: Mutex<HashMap<(Location, RegisteredControl), (Files, ControlCard)>>,
}

/// Path, size and time of every file.
type Files = Vec<(PathBuf, u64, Option<SystemTime>)>;

impl Cards {
    pub(crate) fn new(backend: Arc<dyn Backend>) -> Arc<Self> {
        Arc::new(Self { backend, known: Mutex::default(), controls: Mutex::default() })
    }

    /// Reads for long.
    pub(crate) fn describe(&self, ask: &DescribeModel) -> ModelDescribed {
        let outcome = match self.whole(ask) {
            Ok(card) => Outcome::Card(card),
            Err(reason) => Outcome::Error(reason),
        };
        ModelDescribed { model: ask.model.clone(), outcome: Some(outcome) }
    }

    fn whole(&self, ask: &DescribeModel) -> Result<ModelCard, String> {
        let location = location(&ask.path, &ask.refiner_path);
        let card = self.card(&location)?;
        let (adapters, controls) = (self.adapters(ask, &location, &card)?, self.controls(ask, &location)?);
        Ok(card_wire::to_wire(&ask.model, &card, adapters, controls))
    }

    fn controls(&self, ask: &DescribeModel, location: &Location) -> Result<Vec<ControlCard>, String> {
        ask.controls.iter().map(|folder| self.control(location, control_wire::registered(folder))).collect()
    }

    fn control(&self, location: &Location, registered: RegisteredControl) -> Result<ControlCard, String> {
        // What it has to fit is in the model's folder. One that cannot be listed says so in its card.
        let mut files = Files::new();
        let listed = listed(location, &mut files).is_ok() && list(&registered.path, 0, &mut files).is_ok();
        files.sort();
        let key = (location.clone(), registered);
        let known = self.controls.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        if let Some((_, card)) = known.filter(|(then, _)| listed && *then == files) {
            return Ok(card);
        }
        let described = self.backend.describe_controls(location, std::slice::from_ref(&key.1));
        let card = described.map_err(|error| error.to_string())?.pop().ok_or("no card of the control network")?;
        self.controls.lock().unwrap_or_else(PoisonError::into_inner).insert(key, (files, card.clone()));
        Ok(card)
    }

    /// Read each time: few ask, and an adapter is small beside its model.
    fn adapters(&self, ask: &DescribeModel, location: &Location, card: &Card) -> Result<Vec<AdapterCard>, String> {
        let registered: Vec<Registered> = ask.adapters.iter().map(adapter_wire::registered).collect();
        let described = self.backend.describe_adapters(location, card, &registered);
        described.map_err(|error| error.to_string())
    }

    fn card(&self, location: &Location) -> Result<Card, String> {
        let mut files = Files::new();
        listed(location, &mut files)?;
        files.sort();
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(location).cloned();
        if let Some((_, card)) = known.filter(|(then, _)| *then == files) {
            return Ok(card);
        }
        let card = self.backend.describe(location).map_err(|error| error.to_string())?;
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(location.clone(), (files, card.clone()));
        Ok(card)
    }
}

/// Where a model is, as the coordinator says it.
pub(crate) fn location(path: &str, refiner_path: &str) -> Location {
    Location { refiner: (!refiner_path.is_empty()).then(|| refiner_path.into()), ..Location::of(path) }
}

/// The noise scheduler's class, as the model in `path` names it. Reads a small file.
pub(crate) fn scheduler_class(path: &Path) -> Option<String> {
    let file = path.join("scheduler").join("scheduler_config.json");
    if fs::metadata(&file).ok()?.len() > MAX_CONFIG_BYTES {
        return None;
    }
    let config: serde_json::Value = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    Some(config.get("_class_name")?.as_str()?.to_owned())
}

/// Adds the files of a model.
fn listed(location: &Location, files: &mut Files) -> Result<(), String> {
    let mut folders = [Some(&location.path), location.refiner.as_ref()].into_iter().flatten();
    folders.try_for_each(|path| list(path, 0, files).map_err(|error| format!("could not read `{}`: {error}", path.display())))
}

fn list(folder: &Path, depth: usize, files: &mut Files) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        // Of the file a link leads to: hubs keep checkpoints as links.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.is_file() {
            files.push((path, metadata.len(), metadata.modified().ok()));
        } else if metadata.is_dir() && depth < MAX_DEPTH {
            list(&path, depth + 1, files)?;
        }
        if files.len() > MAX_FILES {
            return Err(io::Error::other(format!("it has more than {MAX_FILES} files")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proto::v1::ControlFolder;

    use models::registry::{LoadProgress, Rank};

    use super::*;
    use crate::backend::RankSpec;

    struct Counting(AtomicUsize);

    impl Backend for Counting {
        fn device(&self) -> parallel::Device {
            parallel::Device::Cpu
        }

        fn describe(&self, _: &Location) -> models::Result<Card> {
            let n = self.0.fetch_add(1, Ordering::SeqCst);
            let digest = n.to_string();
            Ok(Card {
                family: "fake".into(),
                pipeline_class: "Fake".into(),
                scheduler: "Fake".into(),
                digest,
                components: vec![],
                stages: vec![],
                parameters: vec![],
                max_pixels: 1,
                pixels_per_image: 0,
                without_prompt: false,
            })
        }

        fn describe_adapters(&self, _: &Location, _: &Card, _: &[Registered]) -> models::Result<Vec<AdapterCard>> {
            Ok(vec![])
        }

        fn describe_controls(&self, _: &Location, controls: &[RegisteredControl]) -> models::Result<Vec<ControlCard>> {
            let digest = self.0.fetch_add(1, Ordering::SeqCst).to_string();
            Ok(controls
                .iter()
                .map(|c| ControlCard { name: c.name.clone(), digest: digest.clone(), ..Default::default() })
                .collect())
        }

        fn load(&self, _: RankSpec<'_>, _: &mut dyn FnMut(LoadProgress)) -> models::Result<Rank> {
            Err(models::Error::Cancelled)
        }
    }

    fn digest(cards: &Cards, path: &Path) -> Result<String, String> {
        let ask = DescribeModel { model: "m".into(), path: path.to_string_lossy().into_owned(), ..Default::default() };
        match cards.describe(&ask).outcome.unwrap() {
            Outcome::Card(card) => Ok(card.digest),
            Outcome::Error(reason) => Err(reason),
        }
    }

    #[test]
    fn a_model_is_read_again_only_when_a_file_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("vae")).unwrap();
        fs::write(dir.path().join("vae/config.json"), "{}").unwrap();
        let cards = Cards::new(Arc::new(Counting(AtomicUsize::new(0))));
        assert_eq!(digest(&cards, dir.path()), Ok("0".into()));
        assert_eq!(digest(&cards, dir.path()), Ok("0".into()));
        fs::write(dir.path().join("vae/config.json"), "{ }").unwrap();
        assert_eq!(digest(&cards, dir.path()), Ok("1".into()));
        assert!(digest(&cards, &dir.path().join("none")).unwrap_err().contains("could not read"));
    }

    #[test]
    fn a_control_network_is_read_again_only_when_a_file_of_it_or_of_its_model_has_changed() {
        let [dir, network] = [0; 2].map(|_| tempfile::tempdir().unwrap());
        let path = |dir: &tempfile::TempDir| dir.path().to_string_lossy().into_owned();
        let cards = Cards::new(Arc::new(Counting(AtomicUsize::new(0))));
        let folder = |name: &str| ControlFolder { name: name.into(), path: path(&network), ..Default::default() };
        let ask = DescribeModel { path: path(&dir), controls: vec![folder("canny"), folder("depth")], ..Default::default() };
        let digests =
            || cards.controls(&ask, &Location::of(dir.path())).unwrap().into_iter().map(|c| c.digest).collect::<Vec<_>>();
        assert_eq!((digests(), digests()), (vec!["0".into(), "1".into()], vec!["0".into(), "1".into()]));
        fs::write(network.path().join("config.json"), "{}").unwrap();
        assert_eq!(digests(), ["2", "3"]);
        fs::write(dir.path().join("model_index.json"), "{}").unwrap();
        assert_eq!((digests(), digests()), (vec!["4".into(), "5".into()], vec!["4".into(), "5".into()]));
    }

    #[test]
    fn the_scheduler_is_what_the_model_names() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(scheduler_class(dir.path()), None);
        fs::create_dir(dir.path().join("scheduler")).unwrap();
        let config = dir.path().join("scheduler/scheduler_config.json");
        fs::write(config, r#"{"_class_name": "FlowMatchEulerDiscreteScheduler"}"#).unwrap();
        assert_eq!(scheduler_class(dir.path()).unwrap(), "FlowMatchEulerDiscreteScheduler");
    }
}
