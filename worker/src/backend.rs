//! What a rank is made of, so far as the worker needs to know: the models crate, or a stand-in in tests.

use models::blocks::RankGroup;
use models::card::Card;
use models::control::ControlSource;
use models::control::card::{ControlCard, RegisteredControl};
use models::lora::card::{AdapterCard, Registered};
use models::lora::store::Sources;
use models::model_dir::Location;
use models::registry::{self, Limits, LoadProgress, LoadSpec, Rank};
use parallel::Device;

/// Reads models. Every call computes or reads for long: never on tokio's threads.
pub trait Backend: Send + Sync + 'static {
    /// What its ranks compute on.
    fn device(&self) -> Device;

    /// Says what the model at `location` is.
    ///
    /// # Errors
    /// When it cannot be served.
    fn describe(&self, location: &Location) -> models::Result<Card>;

    /// Checks adapters against the model at `location`, which was described as `card`.
    ///
    /// # Errors
    /// When the model's own layers cannot be listed. What is wrong with an adapter is in its card.
    fn describe_adapters(&self, location: &Location, card: &Card, adapters: &[Registered]) -> models::Result<Vec<AdapterCard>>;

    /// Checks control networks against the model at `location`.
    ///
    /// # Errors
    /// When the model cannot be read. What is wrong with a network is in its card.
    fn describe_controls(&self, location: &Location, controls: &[RegisteredControl]) -> models::Result<Vec<ControlCard>>;

    /// Loads a rank, telling `on_open` how to watch.
    ///
    /// # Errors
    /// When the component cannot be held so.
    fn load(&self, spec: RankSpec<'_>, on_open: &mut dyn FnMut(LoadProgress)) -> models::Result<Rank>;
}

/// What a rank holds.
#[derive(Debug)]
pub struct RankSpec<'a> {
    /// Where the model is.
    pub location: &'a Location,
    /// The component.
    pub component: &'a str,
    /// What its card says of its files; empty: it is not asked whether they are the same here.
    pub fingerprint: &'a str,
    /// This rank's place in its group.
    pub group: RankGroup,
    /// Limits of its stage.
    pub limits: Limits,
    /// Adapters that its jobs may name.
    pub adapters: Sources,
    /// Control networks that its jobs may name.
    pub controls: Vec<ControlSource>,
}

/// The models this program has, on one device.
#[derive(Clone, Debug)]
pub struct RegistryBackend {
    /// The device.
    pub device: Device,
}

impl Backend for RegistryBackend {
    fn device(&self) -> Device {
        self.device.clone()
    }

    fn describe(&self, location: &Location) -> models::Result<Card> {
        registry::describe(&location.open()?)
    }

    fn describe_adapters(&self, location: &Location, card: &Card, adapters: &[Registered]) -> models::Result<Vec<AdapterCard>> {
        models::lora::card::describe(&location.open()?, card, adapters)
    }

    fn describe_controls(&self, location: &Location, controls: &[RegisteredControl]) -> models::Result<Vec<ControlCard>> {
        Ok(models::control::card::describe(&location.open()?, controls))
    }

    fn load(&self, spec: RankSpec<'_>, on_open: &mut dyn FnMut(LoadProgress)) -> models::Result<Rank> {
        let dir = spec.location.open()?;
        dir.check_fingerprint(spec.component, spec.fingerprint)?;
        let RankSpec { component, group, limits, adapters, controls, .. } = spec;
        let spec = LoadSpec { dir: &dir, component, group, device: self.device(), limits };
        registry::load_with(spec, adapters, &controls, on_open)
    }
}
