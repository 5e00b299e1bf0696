//! Workers come and go; groups form, get ready, and end their epochs.

use std::collections::BTreeMap;

use proto::v1::{
    DescribeModel, GroupLoading, GroupLost, GroupReady, GroupRecord, GroupState, Holding, JoinGroup, LeaveGroup, ModelCard,
    ModelDescribed, Registration, control_request::Command, model_described::Outcome,
};
use sha2::{Digest, Sha256};

use super::{Effect, Key, State, work::shortened};
use crate::{
    models_file::{AdapterConfig, ControlConfig},
    placement::{self, Members},
};

impl State {
    pub(super) fn worker_joined(&mut self, worker: Registration, holding: Holding) {
        let worker_id = worker.worker_id.clone();
        if self.away.contains(&worker_id) && self.settling.is_none() {
            return self.worker_back(worker, holding);
        }
        if self.workers.contains_key(&worker_id) {
            self.worker_left(&worker_id, "it registered again");
        }
        self.workers.insert(worker_id.clone(), worker);
        self.worker_holds(&worker_id, holding);
    }

    pub(super) fn worker_left(&mut self, worker_id: &str, cause: &str) {
        if self.workers.remove(worker_id).is_none() {
            return;
        }
        if self.draining.remove(worker_id) | self.away.remove(worker_id) {
            self.groups.members_changed(worker_id);
        }
        self.forget_holding(worker_id);
        for model in &mut self.models {
            model.worker_left(worker_id);
        }
        let held: Vec<String> = self
            .groups
            .iter()
            .filter(|(_, group)| group.members.iter().any(|member| member == worker_id))
            .map(|(id, _)| id.clone())
            .collect();
        for group_id in held {
            self.end_epoch(&group_id, format!("worker {worker_id} left: {cause}"), false);
        }
    }

    /// Asks one worker for each card that is not known.
    pub(super) fn describe_models(&mut self) {
        let mut questions = Vec::new();
        for model in &mut self.models {
            if let Some(worker) = model.ask(self.now, self.workers.keys()) {
                let [path, refiner_path] = model.config.paths();
                let adapters = model.config.adapters.iter().map(AdapterConfig::file).collect();
                let controls = model.config.controls.iter().map(ControlConfig::folder).collect();
                let question = DescribeModel { model: model.config.name.clone(), path, adapters, controls, refiner_path };
                questions.push((worker.to_owned(), Command::DescribeModel(question)));
            }
        }
        for (worker, question) in questions {
            self.send(&worker, question);
        }
    }

    pub(super) fn model_described(&mut self, worker_id: &str, described: ModelDescribed) -> Option<()> {
        let index = self.models.iter().position(|model| model.config.name == described.model)?;
        if !self.models[index].is_asked(worker_id) {
            return None;
        }
        let model = &mut self.models[index];
        match described.outcome {
            Some(Outcome::Card(card)) => self.take_card(index, card),
            Some(Outcome::Error(problem)) => {
                model.refused(self.now, format!("worker {worker_id}: {}", shortened(&problem)));
            }
            None => model.refused(self.now, format!("worker {worker_id} sent neither a card nor a reason")),
        }
        Some(())
    }

    /// A model's first card, or one in the place of another that nobody could load. Its groups are new ones then.
    fn take_card(&mut self, index: usize, card: ModelCard) {
        let served = self.is_ready(&self.models[index]);
        let old = self.models[index].groups.clone();
        for (id, group) in old.iter().filter_map(|id| self.groups.get(id).map(|group| (id, group))) {
            self.epochs.insert(id.clone(), group.newest_epoch());
        }
        let Some(groups) = self.models[index].described(card, served, &self.epochs, self.settings.first_epoch) else {
            return;
        };
        let mut orders = BTreeMap::new();
        for id in old {
            if self.groups.get(&id).is_some_and(|group| group.phase != GroupState::Waiting) {
                self.end_epoch(&id, "another worker's files are the model from now on".into(), true);
            }
            orders.extend(self.groups.remove(&id).map(|group| (id, group.order)));
        }
        for mut group in groups {
            let next = || self.groups.iter().map(|(_, group)| group.order + 1).max().unwrap_or_default();
            group.order = orders.get(&group.wanted.id).copied().unwrap_or_else(next);
            self.groups.add(group);
        }
        let model = self.models[index].config.name.clone();
        self.fail_jobs_without_components(&model);
    }

    /// Forms every group that waits and for which there are workers.
    pub(super) fn form_groups(&mut self) {
        let due = self.groups.waiting().filter(|group| group.retry_at <= self.now);
        let (waiting, passed_over): (Vec<_>, BTreeMap<_, _>) =
            due.map(|group| (group.wanted.clone(), (group.wanted.id.clone(), group.passed_over().clone()))).unzip();
        if waiting.is_empty() {
            return;
        }
        let standing: BTreeMap<String, Members> = self
            .groups
            .iter()
            .filter(|(_, group)| group.phase != GroupState::Waiting)
            .map(|(id, group)| (id.clone(), group.members.clone()))
            .collect();
        let staying = self.workers.iter().filter(|(id, _)| !self.draining.contains(*id) && !self.away.contains(*id));
        let staying: BTreeMap<String, Registration> = staying.map(|(id, worker)| (id.clone(), worker.clone())).collect();
        for (group_id, members) in placement::form_groups(&waiting, &staying, &standing, &passed_over) {
            self.begin_epoch(&group_id, members);
        }
    }

    fn begin_epoch(&mut self, group_id: &str, members: Members) {
        let Some(group) = self.groups.get_mut(group_id) else {
            return;
        };
        let Some(model) = self.models.iter().find(|model| model.config.name == group.wanted.model) else {
            return;
        };
        let tried_all = group.begin(members.clone());
        let [path, refiner_path] = model.config.paths();
        let address = |id: &String| self.workers.get(id).map(|worker| worker.data_address.clone()).unwrap_or_default();
        let join = JoinGroup {
            group_id: group_id.to_owned(),
            epoch: group.epoch,
            model: group.wanted.model.clone(),
            path,
            refiner_path,
            component: group.wanted.component.clone(),
            fingerprint: model.fingerprint(&group.wanted.component),
            layout: Some(group.wanted.layout),
            rank: 0,
            data_addresses: members.iter().map(address).collect(),
            secret: secret(&self.settings.key, group_id, group.epoch).into(),
            max_batch: model.config.max_batch,
            max_jobs: model.config.max_jobs,
            adapters: model.adapter_files(),
            controls: model.control_folders(&group.wanted.component),
            products: group.wanted.products as i32,
        };
        let record = GroupRecord { group_id: group_id.to_owned(), epoch: join.epoch };
        self.effects.push(Effect::PersistGroup(record));
        for (rank, member) in (0..).zip(&members) {
            self.send(member, Command::JoinGroup(JoinGroup { rank, ..join.clone() }));
        }
        // With another replica ready, the card is right.
        if tried_all
            && !self.groups.is_ready(&join.model, &join.component)
            && let Some(model) = self.models.iter_mut().find(|model| model.config.name == join.model)
        {
            model.doubt(self.now);
        }
    }

    pub(super) fn group_loading(&mut self, worker_id: &str, report: &GroupLoading) -> Option<()> {
        let group = self.groups.get_mut(&report.group_id)?;
        if !group.is_rank(worker_id, report.rank, report.epoch) {
            return None;
        }
        group.rank_loading(report.rank, report.loaded_bytes, report.total_bytes);
        Some(())
    }

    pub(super) fn group_ready(&mut self, worker_id: &str, report: &GroupReady) -> Option<()> {
        let group = self.groups.get_mut(&report.group_id)?;
        if !group.is_rank(worker_id, report.rank, report.epoch) {
            return None;
        }
        group.rank_ready(report.rank);
        Some(())
    }

    pub(super) fn group_lost(&mut self, worker_id: &str, report: &GroupLost) -> Option<()> {
        let group = self.groups.get_mut(&report.group_id)?;
        let (rank, epoch) = (report.rank, report.epoch);
        let (reason, message) = (shortened(&report.reason), shortened(&report.message));
        let cause = format!("rank {rank} on worker {worker_id}: {reason}: {message}");
        let noted = if reason == "LOAD_FAILED" { group.cannot_load(worker_id, rank, epoch, cause.clone()) } else { None };
        if !group.is_rank(worker_id, rank, epoch) {
            return noted;
        }
        let was_ready = group.is_ready();
        group.pause(self.now, was_ready);
        // A worker that was told to stop is not lost.
        let planned = reason == "DRAINING";
        self.end_epoch(&report.group_id, cause, planned);
        Some(())
    }

    /// Whatever the group was doing is over: the members are told, its tasks are lost. Unless it was `planned`, the jobs
    /// that ran on it may have been the cause.
    pub(super) fn end_epoch(&mut self, group_id: &str, cause: String, planned: bool) {
        let Some(group) = self.groups.get(group_id) else {
            return;
        };
        if !planned {
            self.blame(&group.tasks.clone(), &format!("group {group_id} was lost: {cause}"));
        }
        let Some(group) = self.groups.get_mut(group_id) else {
            return;
        };
        let epoch = group.epoch;
        self.tally.epoch_ended(&group.wanted.model, &group.wanted.component, planned);
        let (members, tasks) = group.end(cause.clone());
        for member in members {
            self.send(&member, Command::LeaveGroup(LeaveGroup { group_id: group_id.to_owned(), epoch }));
        }
        for (number, stage) in tasks {
            self.task_lost(number, &stage, &format!("group {group_id} was lost: {cause}"));
        }
        self.effects.push(Effect::GroupLost { group_id: group_id.to_owned(), epoch, cause });
    }

    pub(super) fn announce_models(&mut self) {
        for index in 0..self.models.len() {
            let model = &self.models[index];
            let ready = self.is_ready(model);
            if ready != model.announced {
                self.effects.push(Effect::ModelReady { model: model.config.name.clone(), ready });
                self.models[index].announced = ready;
            }
        }
    }
}

/// Known to the members of this epoch and to nobody who knows the secret of another.
fn secret(key: &Key, group_id: &str, epoch: u64) -> Vec<u8> {
    let purpose = Sha256::new().chain_update(epoch.to_le_bytes()).chain_update(group_id).finalize();
    Sha256::new().chain_update(key.0).chain_update(purpose).finalize().to_vec()
}
