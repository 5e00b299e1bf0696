//! What ranks multiply in: as the coordinator says it, and as it is done.

use parallel::Device;
use parallel::ops::Products;
use proto::v1::{self, JoinGroup};

use crate::{Error, Result};

/// All that `device` can multiply in, for the registration.
pub(crate) fn able(device: &Device) -> Vec<i32> {
    let able = Products::ALL.into_iter().filter(|products| products.check(device).is_ok());
    able.map(|products| to_wire(products).into()).collect()
}

/// What a rank is to multiply in on `device`.
///
/// # Errors
/// [`Error::Message`] when this worker does not know it, or cannot: it is named, and what is missing.
pub(crate) fn of_join(join: &JoinGroup, device: &Device) -> Result<Products> {
    let refused = |reason: String| Error::message("products", reason);
    let said = v1::Products::try_from(join.products);
    let products = match said.map_err(|_| refused(format!("{} is none that this worker knows", join.products)))? {
        v1::Products::Unspecified | v1::Products::F32 => Products::F32,
        v1::Products::Bf16 => Products::Bf16,
        v1::Products::Amx => Products::Amx,
        v1::Products::Int8 => Products::Int8,
    };
    products.check(device).map_err(|error| refused(error.to_string()))?;
    Ok(products)
}

/// As it travels.
pub(crate) fn to_wire(products: Products) -> v1::Products {
    match products {
        Products::F32 => v1::Products::F32,
        Products::Bf16 => v1::Products::Bf16,
        Products::Amx => v1::Products::Amx,
        Products::Int8 => v1::Products::Int8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(products: i32) -> Result<Products> {
        of_join(&JoinGroup { products, ..JoinGroup::default() }, &Device::Cpu)
    }

    #[test]
    fn a_way_has_the_same_name_here_and_on_the_wire() {
        assert_eq!(
            Products::ALL.map(|products| to_wire(products).to_string()),
            Products::ALL.map(|products| products.to_string())
        );
        assert_eq!(Products::ALL.map(to_wire), v1::Products::ALL);
    }

    #[test]
    fn a_rank_multiplies_as_it_is_told_or_says_that_it_cannot() {
        assert_eq!(of(0).unwrap(), Products::F32, "a coordinator of before it could say so");
        let able = able(&Device::Cpu);
        for products in Products::ALL {
            let wire = i32::from(to_wire(products));
            match of(wire) {
                Ok(got) => assert!(got == products && able.contains(&wire)),
                Err(error) => {
                    let text = error.to_string();
                    assert!(!able.contains(&wire) && text.starts_with("products: ") && text.contains(&format!("`{products}`")));
                }
            }
        }
        assert_eq!(of(99).unwrap_err().to_string(), "products: 99 is none that this worker knows");
    }
}
