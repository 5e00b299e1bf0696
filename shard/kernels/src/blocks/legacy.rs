//! Blocks of 32 values with one scale, and perhaps a minimum.

use super::{Format, Numbers, half};

/// Scale, then 32 signed bytes.
pub(super) struct Q8_0;

impl Format for Q8_0 {
    const BYTES: usize = 34;
    const VALUES: usize = 32;
    const PART: usize = 32;

    #[inline(always)]
    fn read(block: &[u8], to: Numbers<'_>) {
        to.scales[0] = half(block, 0);
        for (to, q) in to.values.iter_mut().zip(&block[2..]) {
            *to = *q as i8;
        }
    }
}

/// Scale, then the low and the high half bytes of 16: the first 16 values and the others.
pub(super) struct Q4_0;

impl Format for Q4_0 {
    const BYTES: usize = 18;
    const VALUES: usize = 32;
    const PART: usize = 32;

    #[inline(always)]
    fn read(block: &[u8], to: Numbers<'_>) {
        to.scales[0] = half(block, 0);
        for (i, q) in block[2..].iter().enumerate() {
            to.values[i] = (q & 15) as i8 - 8;
            to.values[i + 16] = (q >> 4) as i8 - 8;
        }
    }
}

/// As [`Q4_0`], with a minimum that is added.
pub(super) struct Q4_1;

impl Format for Q4_1 {
    const BYTES: usize = 20;
    const VALUES: usize = 32;
    const PART: usize = 32;

    #[inline(always)]
    fn read(block: &[u8], to: Numbers<'_>) {
        (to.scales[0], to.minima[0]) = (half(block, 0), -half(block, 2));
        for (i, q) in block[4..].iter().enumerate() {
            to.values[i] = (q & 15) as i8;
            to.values[i + 16] = (q >> 4) as i8;
        }
    }
}

/// As [`Q4_0`], with a fifth bit of each value in a word of its own.
pub(super) struct Q5_0;

impl Format for Q5_0 {
    const BYTES: usize = 22;
    const VALUES: usize = 32;
    const PART: usize = 32;

    #[inline(always)]
    fn read(block: &[u8], to: Numbers<'_>) {
        to.scales[0] = half(block, 0);
        let fifth = fifth(block, 2);
        for (i, q) in block[6..].iter().enumerate() {
            to.values[i] = (q & 15 | fifth(i)) as i8 - 16;
            to.values[i + 16] = (q >> 4 | fifth(i + 16)) as i8 - 16;
        }
    }
}

/// As [`Q5_0`], with a minimum that is added.
pub(super) struct Q5_1;

impl Format for Q5_1 {
    const BYTES: usize = 24;
    const VALUES: usize = 32;
    const PART: usize = 32;

    #[inline(always)]
    fn read(block: &[u8], to: Numbers<'_>) {
        (to.scales[0], to.minima[0]) = (half(block, 0), -half(block, 2));
        let fifth = fifth(block, 4);
        for (i, q) in block[8..].iter().enumerate() {
            to.values[i] = (q & 15 | fifth(i)) as i8;
            to.values[i + 16] = (q >> 4 | fifth(i + 16)) as i8;
        }
    }
}

/// The fifth bits that lie at `at`: of value `i`, in its place.
#[inline(always)]
fn fifth(block: &[u8], at: usize) -> impl Fn(usize) -> u8 {
    let bits = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    move |i| ((bits >> i) << 4 & 16) as u8
}
