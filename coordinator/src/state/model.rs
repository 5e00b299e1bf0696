//! One model of models.toml: its card once a worker has read it, and the groups it needs.

use std::collections::{BTreeMap, BTreeSet};

use proto::v1::{Adapter, AdapterFile, Control, ControlFolder, ControlNetwork, JobSpec, Lora, ModelCard, StageKind};

use super::{MAX_WAITING_TASKS, Millis, group::Group};
use crate::{
    error::{Error, Result},
    models_file::{AdapterConfig, ControlConfig, ModelConfig},
    placement, plan,
};

/// How long a model that no worker can read is left alone before the workers are asked again.
const DESCRIBE_RETRY: Millis = 30 * 1000;

/// A model to serve.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) config: ModelConfig,
    pub(super) card: Option<ModelCard>,
    /// Ids of its groups, in the order of the card.
    pub(super) groups: Vec<String>,
    /// Why there is no card, or why the card does not fit models.toml.
    pub(super) problem: String,
    /// What was said last about it being ready.
    pub(super) announced: bool,
    /// The worker that was asked to read it.
    asked: Option<String>,
    /// Workers that read what the card says, or nothing that could be in its place.
    described_by: BTreeSet<String>,
    /// Nobody could load what the card says: another worker may read another one. Until then the card stays.
    doubted: bool,
    /// Workers that could not read it.
    refused: BTreeSet<String>,
    /// They are asked again at this time.
    retry_at: Millis,
    /// Asking again cannot help: models.toml and the card do not fit.
    broken: bool,
}

impl Model {
    pub(super) fn new(config: ModelConfig) -> Self {
        Self {
            config,
            card: None,
            groups: Vec::new(),
            problem: String::new(),
            announced: false,
            asked: None,
            described_by: BTreeSet::new(),
            doubted: false,
            refused: BTreeSet::new(),
            retry_at: 0,
            broken: false,
        }
    }

    /// The card, or what to tell a client instead.
    pub(super) fn card(&self) -> Result<&ModelCard> {
        let model = self.config.name.clone();
        match &self.card {
            Some(card) => Ok(card),
            None if self.problem.is_empty() => Err(Error::ModelNotReady(model)),
            None => Err(Error::ModelBroken { model, problem: self.problem.clone() }),
        }
    }

    /// The adapters that ranks may be asked for: those that a worker has read and found well.
    pub(super) fn adapter_files(&self) -> Vec<AdapterFile> {
        let usable = |name: &str| {
            let adapters = self.card.as_ref().map(|card| card.adapters.as_slice()).unwrap_or_default();
            adapters.iter().find(|adapter| adapter.name == name && adapter.problem.is_empty())
        };
        let file = |config: &AdapterConfig| {
            let Adapter { digest, components, .. } = usable(&config.name)?.clone();
            Some(AdapterFile { digest, components, defaults: vec![], ..config.file() })
        };
        self.config.adapters.iter().filter_map(file).collect()
    }

    /// The digests of a job's adapters, in its order.
    pub(super) fn adapter_digests(&self, spec: &JobSpec) -> Vec<String> {
        let adapters = self.card.as_ref().map(|card| card.adapters.as_slice()).unwrap_or_default();
        let digest = |lora: &Lora| {
            let found = adapters.iter().find(|adapter| adapter.name == lora.name);
            found.map(|adapter| adapter.digest.clone()).unwrap_or_default()
        };
        spec.loras.iter().map(digest).collect()
    }

    /// What its card says of a component's files.
    pub(super) fn fingerprint(&self, component: &str) -> String {
        let components = self.card.as_ref().map(|card| card.components.as_slice()).unwrap_or_default();
        components.iter().find(|c| c.name == component).map(|c| c.fingerprint.clone()).unwrap_or_default()
    }

    /// The control networks that ranks of a component hold: beside a denoiser those that a worker has read and found well.
    pub(super) fn control_folders(&self, component: &str) -> Vec<ControlFolder> {
        let Some(card) = self.card.as_ref().filter(|card| denoiser(card) == Some(component)) else { return Vec::new() };
        let folder = |config: &ControlConfig| {
            let network = card.controls.iter().find(|network| network.name == config.name && network.problem.is_empty())?;
            let ControlNetwork { digest, fingerprint, .. } = network.clone();
            Some(ControlFolder { digest, fingerprint, ..config.folder() })
        };
        self.config.controls.iter().filter_map(folder).collect()
    }

    /// Control networks are cut as the denoiser is: one that cannot be is not to be used.
    fn check_controls(&self, card: &mut ModelCard) {
        let tp = denoiser(card).and_then(|name| self.config.components.get(name)).map_or(1, |config| config.tp);
        for network in card.controls.iter_mut().filter(|network| network.problem.is_empty()) {
            if !network.tp_options.contains(&tp) {
                network.problem = format!("the denoiser is cut by tp = {tp}, and it can be cut by {:?}", network.tp_options);
            }
        }
    }

    /// The digests of a job's control networks, in its order.
    pub(super) fn control_digests(&self, spec: &JobSpec) -> Vec<String> {
        let controls = self.card.as_ref().map(|card| card.controls.as_slice()).unwrap_or_default();
        let digest = |control: &Control| {
            let found = controls.iter().find(|network| network.name == control.name);
            found.map(|network| network.digest.clone()).unwrap_or_default()
        };
        spec.controls.iter().map(digest).collect()
    }

    /// The worker to ask for the card now, if one has to be asked.
    pub(super) fn ask<'a>(&mut self, now: Millis, mut workers: impl Iterator<Item = &'a String>) -> Option<&'a str> {
        let is_known = self.card.is_some() && !self.doubted;
        if is_known || self.broken || self.asked.is_some() {
            return None;
        }
        if !self.refused.is_empty() && now >= self.retry_at {
            self.refused.clear();
        }
        let worker = workers.find(|worker| !self.refused.contains(*worker))?;
        self.asked = Some(worker.clone());
        Some(worker)
    }

    /// None of the workers for a group could load what the card says: it may be of the one worker whose files are not the others'. Those
    /// who have not said so yet are asked.
    pub(super) fn doubt(&mut self, now: Millis) {
        if self.card.is_some() && !self.doubted {
            self.doubted = true;
            self.refused.clone_from(&self.described_by);
            self.retry_at = now + DESCRIBE_RETRY;
        }
    }

    /// Its card is known, or will not be known soon.
    pub(super) fn is_settled(&self) -> bool {
        self.card.is_some() || self.broken || !self.refused.is_empty()
    }

    pub(super) fn is_asked(&self, worker_id: &str) -> bool {
        self.asked.as_deref() == Some(worker_id)
    }

    pub(super) fn worker_left(&mut self, worker_id: &str) {
        self.refused.remove(worker_id);
        if self.is_asked(worker_id) {
            self.asked = None;
        }
    }

    /// The worker that was asked cannot read it; another may.
    pub(super) fn refused(&mut self, now: Millis, problem: String) {
        self.refused.extend(self.asked.take());
        self.retry_at = now + DESCRIBE_RETRY;
        if self.card.is_none() {
            self.problem = problem;
        }
    }

    /// Takes the card and gives the groups it needs; `epochs` are the newest of those that were there before. A first card that does not
    /// fit is this model's problem for good. A later one is taken only while nobody is `served`, and if ranks are to load something
    /// else by it.
    pub(super) fn described(
        &mut self,
        mut card: ModelCard,
        served: bool,
        epochs: &BTreeMap<String, u64>,
        first_epoch: u64,
    ) -> Option<Vec<Group>> {
        let by = self.asked.take();
        self.doubted = false;
        card.name.clone_from(&self.config.name);
        self.check_controls(&mut card);
        let wanted = plan::check_stages(&card).and_then(|()| placement::wanted_groups(&self.config, &card));
        if let Some(known) = &self.card
            && (served || loads_alike(known, &card) || wanted.is_err())
        {
            self.described_by.extend(by);
            return None;
        }
        self.described_by = by.into_iter().collect();
        match wanted {
            Ok(wanted) => {
                self.problem.clear();
                self.groups = wanted.iter().map(|group| group.id.clone()).collect();
                let limit = |component: &str| self.task_limit(&card, component);
                let groups = wanted
                    .into_iter()
                    .map(|wanted| {
                        let limit = limit(&wanted.component);
                        let newest = epochs.get(&wanted.id).copied().unwrap_or_default();
                        Group::new(wanted, limit, newest, first_epoch)
                    })
                    .collect();
                self.card = Some(card);
                Some(groups)
            }
            Err(problem) => {
                self.broken = true;
                self.problem = problem;
                None
            }
        }
    }

    fn task_limit(&self, card: &ModelCard, component: &str) -> usize {
        if denoises(card, component) { self.config.max_jobs as usize } else { MAX_WAITING_TASKS }
    }
}

/// Whether ranks are told the same to load by either card.
fn loads_alike(one: &ModelCard, other: &ModelCard) -> bool {
    one.components == other.components
        && one.stages == other.stages
        && one.adapters == other.adapters
        && one.controls == other.controls
}

/// The component that control networks are beside: the one that denoises first.
fn denoiser(card: &ModelCard) -> Option<&str> {
    card.stages.iter().find(|stage| stage.kind() == StageKind::Denoise).map(|stage| stage.component.as_str())
}

/// Whether a component does a stage of denoising.
fn denoises(card: &ModelCard, component: &str) -> bool {
    card.stages.iter().any(|stage| stage.kind() == StageKind::Denoise && stage.component == component)
}
