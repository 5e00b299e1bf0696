//! Fields of a `scheduler_config.json`, read one by one. What a field says that is not known here is refused by its name; fields of other
//! schedulers, which configurations carry along, are not looked at.

use serde_json::Value;

use crate::{Error, Result};

/// The file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'a>(pub(super) &'a Value);

impl<'a> Fields<'a> {
    /// What a field says; nothing, if it says null.
    fn get(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// Whether a field says this word.
    pub(super) fn says(self, name: &str, word: &str) -> bool {
        self.get(name).is_some_and(|value| value == word)
    }

    /// A finite number.
    pub(super) fn number(self, name: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_f64().filter(|n| n.is_finite()).ok_or_else(|| refused(name, value))
    }

    /// A whole number between two others.
    pub(super) fn count(self, name: &str, default: usize, [least, most]: [usize; 2]) -> Result<usize> {
        let Some(value) = self.get(name) else { return Ok(default) };
        let count = value.as_u64().and_then(|n| usize::try_from(n).ok());
        count.filter(|n| (least..=most).contains(n)).ok_or_else(|| refused(name, value))
    }

    pub(super) fn flag(self, name: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_bool().ok_or_else(|| refused(name, value))
    }

    /// One of some words.
    pub(super) fn choice<T: Copy>(self, name: &str, default: T, all: &[(&str, T)]) -> Result<T> {
        let Some(value) = self.get(name) else { return Ok(default) };
        all.iter().find(|(word, _)| value == word).map(|(_, meant)| *meant).ok_or_else(|| refused(name, value))
    }

    /// Numbers, if there are any.
    pub(super) fn numbers(self, name: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let numbers = value.as_array().and_then(|all| all.iter().map(Value::as_f64).collect());
        numbers.map(Some).ok_or_else(|| refused(name, value))
    }

    /// Refuses a field that says anything but this.
    pub(super) fn only(self, name: &str, known: &Value) -> Result<()> {
        match self.get(name) {
            Some(value) if value != known => Err(refused(name, value)),
            _ => Ok(()),
        }
    }
}

/// The error of a field that says what is not known here.
pub(super) fn refused(name: &str, value: &Value) -> Error {
    Error::Unsupported { field: format!("scheduler: {name}"), value: value.to_string() }
}
