//! Jobs that wait, by model: higher priorities first, then in the order they were accepted.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

/// A job's place in its model's row.
type Place = (Reverse<i32>, u64);

/// Every job that is not placed.
#[derive(Debug, Default)]
pub(super) struct Queue {
    by_model: BTreeMap<String, BTreeSet<Place>>,
    jobs: usize,
}

impl Queue {
    pub(super) fn add(&mut self, model: &str, priority: i32, number: u64) {
        if self.by_model.entry(model.to_owned()).or_default().insert((Reverse(priority), number)) {
            self.jobs += 1;
        }
    }

    pub(super) fn remove(&mut self, model: &str, priority: i32, number: u64) {
        if let Some(row) = self.by_model.get_mut(model)
            && row.remove(&(Reverse(priority), number))
        {
            self.jobs -= 1;
            if row.is_empty() {
                self.by_model.remove(model);
            }
        }
    }

    /// The models for which a job waits.
    pub(super) fn models(&self) -> Vec<String> {
        self.by_model.keys().cloned().collect()
    }

    /// The job of `model` whose turn it is.
    pub(super) fn first(&self, model: &str) -> Option<u64> {
        self.by_model.get(model)?.first().map(|(_, number)| *number)
    }

    /// How many jobs of `model` would go before one of `priority` that came now.
    pub(super) fn ahead(&self, model: &str, priority: i32) -> usize {
        let row = self.by_model.get(model);
        row.map_or(0, |row| row.range(..=(Reverse(priority), u64::MAX)).count())
    }

    /// The jobs of `model` that wait.
    pub(super) fn of<'a>(&'a self, model: &str) -> impl Iterator<Item = u64> + use<'a> {
        self.by_model.get(model).into_iter().flatten().map(|(_, number)| *number)
    }

    /// Jobs that wait, of all models.
    pub(super) fn len(&self) -> usize {
        self.jobs
    }

    #[cfg(test)]
    pub(super) fn contains(&self, number: u64) -> bool {
        self.by_model.values().flatten().any(|(_, other)| *other == number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_urgent_go_first_and_equals_in_order() {
        let mut queue = Queue::default();
        for (priority, number) in [(0, 1), (0, 2), (5, 3), (-5, 4)] {
            queue.add("m", priority, number);
        }
        assert_eq!((queue.ahead("m", 0), queue.ahead("m", 5), queue.ahead("m", 9), queue.ahead("other", 0)), (3, 1, 0, 0));
        let mut order = vec![];
        while let Some(number) = queue.first("m") {
            order.push(number);
            queue.remove("m", [0, 0, 0, 5, -5][number as usize], number);
        }
        assert_eq!(order, [3, 1, 2, 4]);
        assert_eq!((queue.len(), queue.models().len()), (0, 0));
    }
}
