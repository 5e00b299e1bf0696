//! Products in bf16, in the order of AVX-512 BF16.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use parallel::ops::Products;

mod narrow_products;

const PRODUCTS: Products = Products::Bf16;
