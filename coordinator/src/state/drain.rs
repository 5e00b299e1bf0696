//! Workers that want to go, and urgent jobs that need a place: both take running jobs off their groups at a step boundary.

use std::{cmp::Reverse, collections::BTreeSet};

use super::{State, group::Group, groups::takes_tasks, requeue::Why};

impl State {
    pub(super) fn worker_draining(&mut self, worker_id: &str) -> Option<()> {
        self.workers.contains_key(worker_id).then(|| {
            self.draining.insert(worker_id.to_owned());
            self.groups.members_changed(worker_id);
        })
    }

    pub(super) fn takes_tasks(&self, group: &Group) -> bool {
        takes_tasks(group, &self.draining)
    }

    fn is_draining(&self, group: &Group) -> bool {
        !self.draining.is_empty() && group.members.iter().any(|member| self.draining.contains(member))
    }

    /// Groups of a worker that wants to go hand their jobs over, and end when they have none.
    pub(super) fn drain_groups(&mut self) {
        if self.draining.is_empty() {
            return;
        }
        let draining: Vec<String> =
            self.groups.iter().filter(|(_, group)| self.is_draining(group)).map(|(id, _)| id.clone()).collect();
        for id in draining {
            let jobs: BTreeSet<u64> = self.groups[id.as_str()].tasks.iter().map(|(number, _)| *number).collect();
            for number in jobs {
                self.park(number, Why::Drained);
            }
            if self.groups[id.as_str()].tasks.is_empty() {
                self.end_epoch(&id, "a member is draining".into(), true);
            }
        }
    }

    /// A job that waits may take the place of a less urgent one that runs: one at a time for each group.
    pub(super) fn make_room(&mut self, number: u64) {
        let Some(job) = self.jobs.get(number) else {
            return;
        };
        let model = &job.spec.model;
        // Usually all are equally urgent, and there is nothing to look for.
        if self.jobs.least_urgent_running(model).is_none_or(|least| least >= job.priority) {
            return;
        }
        let mut victim = None;
        for component in job.remaining().stages.iter().map(|stage| stage.component.as_str()) {
            if self.groups.with_room(model, component).next().is_some() {
                continue;
            }
            let able =
                self.groups.iter().map(|(_, group)| group).filter(|group| {
                    group.wanted.model == *model && group.wanted.component == component && self.takes_tasks(group)
                });
            let holders: Vec<_> = able.flat_map(|group| &group.tasks).filter_map(|(number, _)| self.jobs.get(*number)).collect();
            if holders.iter().any(|holder| holder.parking.is_some() || holder.cancelling) {
                return; // Somebody is on the way out already.
            }
            let less_urgent = holders.iter().filter(|holder| holder.priority < job.priority);
            match less_urgent.min_by_key(|holder| (holder.priority, Reverse(holder.number))) {
                Some(holder) => victim = Some(holder.number),
                None => return, // Without room here, room elsewhere is of no use.
            }
        }
        if let Some(victim) = victim {
            self.park(victim, Why::Preempted);
        }
    }
}
