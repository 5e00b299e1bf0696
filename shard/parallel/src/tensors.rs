//! Tensors by name: what a network takes and gives, and what travels between ranks and stages.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use crate::{Error, Result};

/// Tensors by name, in the order of their names. The names are the reference's: `hidden_states`, `prompt_embeds`, ...
#[derive(Clone, Debug, Default)]
pub struct Tensors(BTreeMap<String, Tensor>);

impl Tensors {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// These and `tensor` under `name`.
    pub fn with(mut self, name: impl Into<String>, tensor: Tensor) -> Self {
        self.insert(name, tensor);
        self
    }

    /// Puts `tensor` under `name`, in place of what was there.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.0.insert(name.into(), tensor);
    }

    /// Takes in all of `other`.
    pub fn extend(&mut self, other: Tensors) {
        self.0.extend(other.0);
    }

    /// The tensor of that name, which must be there.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.0.get(name).ok_or_else(|| Error::MissingInput { name: name.to_owned() })
    }

    /// The tensor of that name, if it is there.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// Removes and returns the tensor of that name, which must be there.
    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        self.0.remove(name).ok_or_else(|| Error::MissingInput { name: name.to_owned() })
    }

    /// `name.0`, `name.1`, ... for as long as they go on.
    pub fn list(&self, name: &str) -> Vec<Tensor> {
        (0..).map_while(|i| self.0.get(&format!("{name}.{i}")).cloned()).collect()
    }

    /// Names and tensors, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.0.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The same on `device`; what is there already is not copied.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.0.iter().map(|(name, tensor)| Ok((name.clone(), tensor.to_device(device)?))).collect()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of all of them.
    pub fn byte_size(&self) -> usize {
        self.0.values().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }
}

impl IntoIterator for Tensors {
    type Item = (String, Tensor);
    type IntoIter = std::collections::btree_map::IntoIter<String, Tensor>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl FromIterator<(String, Tensor)> for Tensors {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}
