//! The packed inputs of a block of rows, kept by each thread from one job to the next: jobs beside each other have the same rows, and
//! packing them for each is up to a tenth of a product. Of tiles alone: what others multiply is laid out before (`gemm/packed.rs`).

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::scratch::Buffer;

/// Names a product, among all of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Product(u64);

impl Product {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

#[derive(Default)]
struct Kept {
    /// What is packed: the rows of `product` from the given one on.
    what: Option<(Product, usize)>,
    packed: Buffer,
}

/// Lends memory of `len` for the inputs of `product` from `row` on; `f` is told whether they are packed there, and packs them if not.
/// It must not call this again.
pub(super) fn with<R>(product: Product, row: usize, len: usize, f: impl FnOnce(&mut [f32], bool) -> R) -> R {
    thread_local! {
        static KEPT: RefCell<Kept> = RefCell::default();
    }
    KEPT.with_borrow_mut(|kept| {
        if kept.packed.len() < len {
            *kept = Kept { what: None, packed: Buffer::zeros(len) };
        }
        // Taken, so that what was left half done by a panic is not believed.
        let packed = kept.what.take() == Some((product, row));
        let result = f(&mut kept.packed.as_mut_slice()[..len], packed);
        kept.what = Some((product, row));
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_rows_of_the_same_product_are_known() {
        let (one, other) = (Product::new(), Product::new());
        let known = |product, row, len| with(product, row, len, |memory, known| (memory.len(), known));
        assert_eq!(known(one, 0, 8), (8, false));
        assert_eq!(known(one, 0, 8), (8, true));
        assert_eq!(known(one, 14, 8), (8, false));
        assert_eq!(known(one, 14, 8), (8, true));
        assert_eq!(known(other, 14, 8), (8, false));
        assert_eq!(known(other, 14, 800), (800, false), "the memory is another");
        let panicked = std::panic::catch_unwind(|| with(other, 0, 8, |_, _| panic!("on the way")));
        assert!(panicked.is_err());
        assert_eq!(known(other, 0, 8), (8, false));
    }
}
