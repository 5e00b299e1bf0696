//! All groups, and what is asked of them at every event: which have room, which are ready, which wait to be formed.
//!
//! A fleet may have thousands of groups and an event changes one or two: whoever takes a group mutably leaves its id here,
//! and [`Groups::refresh`] looks again at those only.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Index,
};

use proto::v1::GroupState;

use super::group::Group;

/// Model and component.
type Place = (String, String);

/// Every group that models.toml asks for.
#[derive(Debug, Default)]
pub(super) struct Groups {
    by_id: BTreeMap<String, Group>,
    changed: BTreeSet<String>,
    /// Those with room for a task, the least busy first.
    room: BTreeMap<Place, BTreeSet<(usize, String)>>,
    /// How many take tasks.
    ready: BTreeMap<Place, usize>,
    /// In the order they were asked for.
    waiting: BTreeSet<(usize, String)>,
    noted: BTreeMap<String, Noted>,
}

/// How a group is noted in the sets above.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Noted {
    room: Option<usize>,
    ready: bool,
    waiting: Option<usize>,
}

impl Groups {
    pub(super) fn add(&mut self, group: Group) {
        let id = group.wanted.id.clone();
        self.changed.insert(id.clone());
        self.by_id.insert(id, group);
    }

    /// The group is asked for no more. It has no members.
    pub(super) fn remove(&mut self, id: &str) -> Option<Group> {
        let group = self.by_id.remove(id)?;
        if let Some(before) = self.noted.remove(id) {
            let place = (group.wanted.model.clone(), group.wanted.component.clone());
            self.note(id, place, before, Noted::default());
        }
        Some(group)
    }

    pub(super) fn get(&self, id: &str) -> Option<&Group> {
        self.by_id.get(id)
    }

    /// The group, which will be looked at again.
    pub(super) fn get_mut(&mut self, id: &str) -> Option<&mut Group> {
        let group = self.by_id.get_mut(id)?;
        if !self.changed.contains(id) {
            self.changed.insert(id.to_owned());
        }
        Some(group)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &Group)> {
        self.by_id.iter()
    }

    #[cfg(test)]
    pub(super) fn values(&self) -> impl Iterator<Item = &Group> {
        self.by_id.values()
    }

    /// A member of these groups began to drain, or came or went, for good or for a moment.
    pub(super) fn members_changed(&mut self, worker_id: &str) {
        let held = self.by_id.iter().filter(|(_, group)| group.members.iter().any(|member| member == worker_id));
        self.changed.extend(held.map(|(id, _)| id.clone()));
    }

    /// Looks again at the groups that changed.
    pub(super) fn refresh(&mut self, draining: &BTreeSet<String>, away: &BTreeSet<String>) {
        for id in std::mem::take(&mut self.changed) {
            let Some(group) = self.by_id.get(&id) else {
                continue;
            };
            let ready = takes_tasks(group, draining);
            let here = away.is_empty() || !group.members.iter().any(|member| away.contains(member));
            let has_room = ready && here && !group.alone && group.tasks.len() < group.limit;
            let now = Noted {
                room: has_room.then_some(group.tasks.len()),
                ready,
                waiting: (group.phase == GroupState::Waiting).then_some(group.order),
            };
            let before = self.noted.get(&id).copied().unwrap_or_default();
            if now == before {
                continue;
            }
            let place = (group.wanted.model.clone(), group.wanted.component.clone());
            self.note(&id, place, before, now);
            self.noted.insert(id, now);
        }
    }

    fn note(&mut self, id: &str, place: Place, before: Noted, now: Noted) {
        if before.waiting != now.waiting {
            before.waiting.map(|order| self.waiting.remove(&(order, id.to_owned())));
            self.waiting.extend(now.waiting.map(|order| (order, id.to_owned())));
        }
        if before.ready != now.ready {
            let ready = self.ready.entry(place.clone()).or_default();
            *ready = if now.ready { *ready + 1 } else { ready.saturating_sub(1) };
        }
        if before.room != now.room {
            let room = self.room.entry(place).or_default();
            before.room.map(|tasks| room.remove(&(tasks, id.to_owned())));
            room.extend(now.room.map(|tasks| (tasks, id.to_owned())));
        }
    }

    /// The groups of a component with room for a task, the least busy first.
    pub(super) fn with_room(&self, model: &str, component: &str) -> impl Iterator<Item = &Group> {
        let place = (model.to_owned(), component.to_owned());
        self.room.get(&place).into_iter().flatten().filter_map(|(_, id)| self.by_id.get(id))
    }

    /// A group of the component takes tasks.
    pub(super) fn is_ready(&self, model: &str, component: &str) -> bool {
        self.ready.get(&(model.to_owned(), component.to_owned())).is_some_and(|ready| *ready > 0)
    }

    /// The groups that wait to be formed, in the order they were asked for.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &Group> {
        self.waiting.iter().filter_map(|(_, id)| self.by_id.get(id))
    }
}

/// The group is ready, and no member of it wants to go.
pub(super) fn takes_tasks(group: &Group, draining: &BTreeSet<String>) -> bool {
    group.is_ready() && (draining.is_empty() || !group.members.iter().any(|member| draining.contains(member)))
}

impl Index<&str> for Groups {
    type Output = Group;

    fn index(&self, id: &str) -> &Group {
        &self.by_id[id]
    }
}
