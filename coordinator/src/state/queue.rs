//! Jobs that wait, by model: higher priorities first, then fairly among tenants by weight, each tenant's in the order they were
//! accepted.
//!
//! Fair is start-time fair queueing (Goyal, Vin and Cheng 1996), in pixel-steps: a job's tag is where its tenant's share would
//! begin to serve it, and the smallest tag goes first. A tenant that sends much waits behind itself alone; one that was idle has
//! saved nothing up. Tags are whole numbers, so that the order is the same wherever it is computed.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::tenants::MAX_WEIGHT;

/// How many times its limit the queue takes if every tenant sends its share.
const RESERVE: usize = 2;

/// A job's place in a row: priority, tag, number.
type Place = (Reverse<i32>, u64, u64);

/// Every job that is not placed.
#[derive(Debug, Default)]
pub(super) struct Queue {
    by_model: BTreeMap<String, Row>,
    /// Where each job is.
    places: HashMap<u64, (Arc<str>, Place)>,
    /// Those that have no turn for now, with their models.
    resting: BTreeMap<u64, String>,
    /// Jobs that wait, by tenant.
    waiting: BTreeMap<Arc<str>, usize>,
    /// Tenants that may not start more for now.
    held: BTreeSet<Arc<str>>,
}

/// The jobs of one model.
#[derive(Debug, Default)]
struct Row {
    lanes: BTreeMap<Arc<str>, Lane>,
    /// The first job of each tenant that may start one.
    heads: BTreeSet<Place>,
    /// By priority: the tag of the job that began last.
    clocks: BTreeMap<i32, u64>,
}

/// The jobs of one tenant.
#[derive(Debug, Default)]
struct Lane {
    jobs: BTreeSet<Place>,
    /// By priority: where the share of all jobs that came so far ends.
    ends: BTreeMap<i32, u64>,
}

impl Queue {
    /// A new job of so many pixel-steps, by a tenant of `weight`.
    pub(super) fn add(&mut self, model: &str, priority: i32, number: u64, tenant: &Arc<str>, work: u64, weight: u32) {
        let row = self.by_model.entry(model.to_owned()).or_default();
        let clock = row.clocks.get(&priority).copied().unwrap_or_default();
        let lane = row.lanes.entry(tenant.clone()).or_default();
        let end = lane.ends.entry(priority).or_default();
        let tag = clock.max(*end);
        *end = tag.saturating_add(share(work, weight));
        self.insert(model, tenant, (Reverse(priority), tag, number));
    }

    /// A job that had its turn and waits again: it goes before all that did not.
    pub(super) fn add_again(&mut self, model: &str, priority: i32, number: u64, tenant: &Arc<str>) {
        self.insert(model, tenant, (Reverse(priority), 0, number));
    }

    /// As [`Self::add_again`], for a job that is to have no turn until it is woken.
    pub(super) fn rest(&mut self, model: &str, priority: i32, number: u64, tenant: &Arc<str>) {
        self.note(tenant, (Reverse(priority), 0, number));
        self.resting.insert(number, model.to_owned());
    }

    /// The job may have its turn again, if it still waits.
    pub(super) fn wake(&mut self, number: u64) {
        if let Some(model) = self.resting.remove(&number)
            && let Some((tenant, place)) = self.places.get(&number).cloned()
        {
            self.insert(&model, &tenant, place);
        }
    }

    /// The job's turn has come: its tenant has had this much.
    pub(super) fn take(&mut self, model: &str, number: u64) {
        if let Some((_, (Reverse(priority), tag, _))) = self.places.get(&number)
            && let Some(row) = self.by_model.get_mut(model)
        {
            let clock = row.clocks.entry(*priority).or_default();
            *clock = (*clock).max(*tag);
        }
        self.remove(model, number);
    }

    /// The job waits no more.
    pub(super) fn remove(&mut self, model: &str, number: u64) {
        let Some((tenant, place)) = self.places.remove(&number) else {
            return;
        };
        if let Some(waiting) = self.waiting.get_mut(&tenant) {
            *waiting -= 1;
            if *waiting == 0 {
                self.waiting.remove(&tenant);
            }
        }
        if self.resting.remove(&number).is_some() {
            return;
        }
        let may_start = !self.held.contains(&tenant);
        if let Some(row) = self.by_model.get_mut(model) {
            row.change(&tenant, may_start, |jobs| _ = jobs.remove(&place));
            // Nobody waits: there is nothing to be fair about.
            if row.lanes.values().all(|lane| lane.jobs.is_empty()) {
                self.by_model.remove(model);
            }
        }
    }

    /// Says whether the tenant may start jobs.
    pub(super) fn hold(&mut self, tenant: &Arc<str>, held: bool) {
        let changed = if held { self.held.insert(tenant.clone()) } else { self.held.remove(tenant) };
        if changed {
            self.by_model.values_mut().for_each(|row| row.change(tenant, !held, |_| ()));
        }
    }

    /// The models for which a job waits.
    pub(super) fn models(&self) -> Vec<String> {
        self.by_model.keys().cloned().collect()
    }

    /// The job of `model` whose turn it is.
    pub(super) fn first(&self, model: &str) -> Option<u64> {
        self.by_model.get(model)?.heads.first().map(|(_, _, number)| *number)
    }

    /// How many jobs of `model` would go before one of `priority` that a tenant sent now: the more urgent ones, and of others those
    /// whose share begins no later.
    pub(super) fn ahead(&self, model: &str, priority: i32, tenant: &str) -> usize {
        let Some(row) = self.by_model.get(model) else {
            return 0;
        };
        let end = row.lanes.get(tenant).and_then(|lane| lane.ends.get(&priority)).copied().unwrap_or_default();
        let tag = row.clocks.get(&priority).copied().unwrap_or_default().max(end);
        row.lanes.values().map(|lane| lane.jobs.range(..=(Reverse(priority), tag, u64::MAX)).count()).sum()
    }

    /// Whether one more job of the tenant may wait. Beyond the limit there is as much room again for tenants that have less waiting
    /// than an equal share of the limit: one who sends much is refused, and nobody for it.
    pub(super) fn has_room(&self, tenant: &str, limit: usize) -> bool {
        if self.len() < limit {
            return true;
        }
        let waiting = self.waiting(tenant);
        let tenants = self.waiting.len() + usize::from(waiting == 0);
        waiting < limit / tenants.max(1) && self.len() < limit.saturating_mul(RESERVE)
    }

    /// The jobs of `model` that wait.
    pub(super) fn of<'a>(&'a self, model: &'a str) -> impl Iterator<Item = u64> + use<'a> {
        let lanes = self.by_model.get(model).into_iter().flat_map(|row| row.lanes.values());
        let resting = self.resting.iter().filter(move |(_, of)| *of == model).map(|(number, _)| *number);
        lanes.flat_map(|lane| &lane.jobs).map(|(_, _, number)| *number).chain(resting)
    }

    /// Jobs that wait, of all models.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Jobs of one tenant that wait.
    pub(super) fn waiting(&self, tenant: &str) -> usize {
        self.waiting.get(tenant).copied().unwrap_or_default()
    }

    #[cfg(test)]
    pub(super) fn contains(&self, number: u64) -> bool {
        self.places.contains_key(&number)
    }

    fn note(&mut self, tenant: &Arc<str>, place: Place) {
        if self.places.insert(place.2, (tenant.clone(), place)).is_none() {
            *self.waiting.entry(tenant.clone()).or_default() += 1;
        }
    }

    fn insert(&mut self, model: &str, tenant: &Arc<str>, place: Place) {
        self.note(tenant, place);
        let may_start = !self.held.contains(tenant);
        let row = self.by_model.entry(model.to_owned()).or_default();
        row.change(tenant, may_start, |jobs| _ = jobs.insert(place));
    }
}

/// How far a job of so many pixel-steps takes its tenant's share: in thousandths of 1,024 pixel-steps at a weight of one. A machine
/// that makes 10^9 pixel-steps a second is busy for 500 years before the numbers end.
fn share(work: u64, weight: u32) -> u64 {
    work.div_ceil(1024).max(1).saturating_mul(u64::from(MAX_WEIGHT)) / u64::from(weight.clamp(1, MAX_WEIGHT))
}

impl Row {
    /// Changes a tenant's jobs, and its head with them.
    fn change(&mut self, tenant: &Arc<str>, may_start: bool, change: impl FnOnce(&mut BTreeSet<Place>)) {
        let lane = match self.lanes.get_mut(tenant) {
            Some(lane) => lane,
            None => self.lanes.entry(tenant.clone()).or_default(),
        };
        if let Some(head) = lane.jobs.first() {
            self.heads.remove(head);
        }
        change(&mut lane.jobs);
        if let Some(head) = lane.jobs.first().filter(|_| may_start) {
            self.heads.insert(*head);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> Arc<str> {
        name.into()
    }

    fn drain(queue: &mut Queue) -> Vec<u64> {
        let mut order = vec![];
        while let Some(number) = queue.first("m") {
            order.push(number);
            queue.take("m", number);
        }
        order
    }

    #[test]
    fn the_urgent_go_first_and_equals_in_order() {
        let mut queue = Queue::default();
        for (priority, number) in [(0, 1), (0, 2), (5, 3), (-5, 4)] {
            queue.add("m", priority, number, &tenant(""), 7, 1);
        }
        let ahead = |model: &str, priority: i32| queue.ahead(model, priority, "");
        assert_eq!((ahead("m", 0), ahead("m", 5), ahead("m", 9), ahead("other", 0)), (3, 1, 0, 0));
        assert_eq!(drain(&mut queue), [3, 1, 2, 4]);
        assert_eq!((queue.len(), queue.models().len(), queue.waiting("")), (0, 0, 0));
    }

    #[test]
    fn tenants_take_turns_by_weight_however_many_jobs_each_has() {
        let mut queue = Queue::default();
        let (heavy, light) = (tenant("heavy"), tenant("light"));
        for number in 0..300 {
            queue.add("m", 0, number, &light, 10, 1);
        }
        for number in 300..600 {
            queue.add("m", 0, number, &heavy, 10, 3);
        }
        let first = &drain(&mut queue)[..200];
        let of_heavy = first.iter().filter(|number| **number >= 300).count();
        assert!((148..=152).contains(&of_heavy), "{of_heavy} of 200 for a weight of 3 in 4");
    }

    #[test]
    fn only_what_would_go_first_is_ahead_of_a_job() {
        let mut queue = Queue::default();
        for number in 0..100 {
            queue.add("m", 0, number, &tenant("much"), 10 << 10, 1);
        }
        queue.add("m", 5, 100, &tenant("urgent"), 10 << 10, 1);
        assert_eq!((queue.ahead("m", 0, "much"), queue.ahead("m", 0, "little")), (101, 2), "the urgent one, and one of equals");
        queue.add("m", 0, 101, &tenant("little"), 10 << 10, 1);
        assert_eq!(queue.ahead("m", 0, "little"), 4, "its own, and those that share with it");
        let order = drain(&mut queue);
        assert_eq!(order.iter().position(|number| *number == 101), Some(2));
    }

    #[test]
    fn a_full_queue_refuses_whoever_filled_it_and_is_bounded_all_the_same() {
        let mut queue = Queue::default();
        let mut number = 0;
        let mut send = |queue: &mut Queue, name: &str| {
            let taken = queue.has_room(name, 100);
            if taken {
                number += 1;
                queue.add("m", 0, number, &tenant(name), 10, 1);
            }
            taken
        };
        let sent = |queue: &mut Queue, send: &mut dyn FnMut(&mut Queue, &str) -> bool, name: &str| {
            (0..1000).filter(|_| send(queue, name)).count()
        };
        assert_eq!(sent(&mut queue, &mut send, "flood"), 100);
        assert_eq!(sent(&mut queue, &mut send, "b"), 50);
        assert_eq!(sent(&mut queue, &mut send, "c"), 33);
        assert_eq!(sent(&mut queue, &mut send, "flood"), 0);
        let others: usize = (0..100).map(|name| sent(&mut queue, &mut send, &format!("t{name}"))).sum();
        assert_eq!((others, queue.len()), (17, 200));
    }

    #[test]
    fn one_who_comes_late_goes_next_and_one_who_waits_again_first() {
        let mut queue = Queue::default();
        for number in 0..100 {
            queue.add("m", 0, number, &tenant("much"), 10, 1);
        }
        for number in 0..50 {
            assert_eq!(queue.first("m"), Some(number));
            queue.take("m", number);
        }
        queue.add("m", 0, 100, &tenant("little"), 10, 1);
        queue.add_again("m", 0, 7, &tenant("much"));
        let order = drain(&mut queue);
        assert_eq!(order[..2], [7, 100], "it did not wait for the fifty others");
    }

    #[test]
    fn one_that_rests_waits_without_a_turn_and_then_goes_first() {
        let mut queue = Queue::default();
        queue.add("m", 0, 1, &tenant("a"), 10, 1);
        queue.take("m", 1);
        queue.add("m", 0, 4, &tenant("a"), 10, 1);
        queue.rest("m", 0, 2, &tenant("a"));
        queue.rest("m", 0, 3, &tenant("a"));
        assert_eq!((queue.first("m"), queue.len(), queue.waiting("a"), queue.of("m").count()), (Some(4), 3, 3, 3));
        queue.remove("m", 3);
        queue.wake(2);
        queue.wake(3);
        assert_eq!(drain(&mut queue), [2, 4]);
        assert_eq!((queue.len(), queue.waiting("a"), queue.of("m").count()), (0, 0, 0));
    }

    #[test]
    fn a_tenant_that_is_held_back_holds_up_nobody() {
        let mut queue = Queue::default();
        queue.add("m", 0, 1, &tenant("a"), 10, 1);
        queue.add("m", 0, 2, &tenant("b"), 99, 1);
        queue.hold(&tenant("a"), true);
        assert_eq!(queue.first("m"), Some(2));
        queue.take("m", 2);
        queue.add("m", 0, 3, &tenant("a"), 10, 1);
        assert_eq!((queue.first("m"), queue.len()), (None, 2));
        queue.hold(&tenant("a"), false);
        assert_eq!(drain(&mut queue), [1, 3]);
    }
}
