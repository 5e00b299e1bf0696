//! What a model is multiplied in, as it is written: in models.toml, in a picture's provenance, for people.

use std::fmt;

use crate::v1::Products;

impl Products {
    /// Every way there is, the default first.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Amx, Self::Int8];

    /// "f32", "bf16", "amx" or "int8"; "unknown" where nothing was said.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "unknown",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Amx => "amx",
            Self::Int8 => "int8",
        }
    }

    /// The way of this name; `None` if there is none.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|products| products.name() == name)
    }
}

impl fmt::Display for Products {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_but_the_one_that_was_not_said_has_a_name() {
        let all: Vec<Products> = (0..).map_while(|number| Products::try_from(number).ok()).collect();
        assert_eq!(all[1..], Products::ALL);
        assert!(Products::ALL.into_iter().all(|products| Products::of_name(products.name()) == Some(products)));
        assert_eq!([Products::of_name("unknown"), Products::of_name("BF16"), Products::of_name("")], [None; 3]);
    }
}
