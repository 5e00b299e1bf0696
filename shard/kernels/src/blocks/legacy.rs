//! Blocks of 32 values with one scale, and perhaps a minimum.

use super::half;

/// Scale, then 32 signed bytes.
#[inline(always)]
pub(super) fn q8_0(block: &[u8; 34], y: &mut [f32; 32]) {
    let d = half(block, 0);
    for (y, q) in y.iter_mut().zip(&block[2..]) {
        *y = f32::from(*q as i8) * d;
    }
}

/// Scale, then the low and the high half bytes of 16: the first 16 values and the others.
#[inline(always)]
pub(super) fn q4_0(block: &[u8; 18], y: &mut [f32; 32]) {
    let d = half(block, 0);
    for (i, q) in block[2..].iter().enumerate() {
        y[i] = (f32::from(q & 15) - 8.0) * d;
        y[i + 16] = (f32::from(q >> 4) - 8.0) * d;
    }
}

/// As [`q4_0`], with a minimum that is added.
#[inline(always)]
pub(super) fn q4_1(block: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (i, q) in block[4..].iter().enumerate() {
        y[i] = f32::from(q & 15) * d + m;
        y[i + 16] = f32::from(q >> 4) * d + m;
    }
}

/// As [`q4_0`], with a fifth bit of each value in a word of its own.
#[inline(always)]
pub(super) fn q5_0(block: &[u8; 22], y: &mut [f32; 32]) {
    let (d, fifth) = (half(block, 0), fifth(block, 2));
    for (i, q) in block[6..].iter().enumerate() {
        y[i] = (f32::from(q & 15 | fifth(i)) - 16.0) * d;
        y[i + 16] = (f32::from(q >> 4 | fifth(i + 16)) - 16.0) * d;
    }
}

/// As [`q5_0`], with a minimum that is added.
#[inline(always)]
pub(super) fn q5_1(block: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m, fifth) = (half(block, 0), half(block, 2), fifth(block, 4));
    for (i, q) in block[8..].iter().enumerate() {
        y[i] = f32::from(q & 15 | fifth(i)) * d + m;
        y[i + 16] = f32::from(q >> 4 | fifth(i + 16)) * d + m;
    }
}

/// The fifth bits that lie at `at`: of value `i`, in its place.
#[inline(always)]
fn fifth(block: &[u8], at: usize) -> impl Fn(usize) -> u8 {
    let bits = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    move |i| ((bits >> i) << 4 & 16) as u8
}
