//! The K formats: blocks of 256 values, whose parts of 16 or 32 have scales (and minima) that share a scale of the block's.

use super::half;

/// Sixteen bytes of scale (low half) and minimum (high half), 64 of two bits, the block's scale and minimum.
#[inline(always)]
pub(super) fn q2(block: &[u8; 84], y: &mut [f32; 256]) {
    let (scales, rest) = block.split_at(16);
    let (d, min) = (half(block, 80), half(block, 82));
    for (part, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (d, min) = (d * f32::from(scales[part] & 15), min * f32::from(scales[part] >> 4));
        let shift = part % 8 / 2 * 2;
        let q = &rest[part / 8 * 32 + part % 2 * 16..][..16];
        for (y, q) in y.iter_mut().zip(q) {
            *y = d * f32::from(q >> shift & 3) - min;
        }
    }
}

/// 32 bytes of third bits, 64 of two bits, sixteen scales of 6 bits, the block's scale.
#[inline(always)]
pub(super) fn q3(block: &[u8; 110], y: &mut [f32; 256]) {
    let (third, rest) = block.split_at(32);
    let (q, scales) = rest.split_at(64);
    let d = half(block, 108);
    for (part, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = if part < 8 { scales[part] & 15 } else { scales[part - 8] >> 4 };
        let high = scales[8 + part % 4] >> (part / 4 * 2) & 3;
        let d = d * (f32::from(low | high << 4) - 32.0);
        let (shift, bit) = (part % 8 / 2 * 2, 1u8 << (part / 2));
        let (q, third) = (&q[part / 8 * 32 + part % 2 * 16..][..16], &third[part % 2 * 16..][..16]);
        for ((y, q), third) in y.iter_mut().zip(q).zip(third) {
            *y = d * (f32::from(q >> shift & 3) - if third & bit == 0 { 4.0 } else { 0.0 });
        }
    }
}

/// The block's scale and minimum, eight scales and minima of 6 bits, 128 bytes of four bits.
#[inline(always)]
pub(super) fn q4(block: &[u8; 144], y: &mut [f32; 256]) {
    let scales: &[u8] = &block[4..16];
    let (d, min) = (half(block, 0), half(block, 2));
    for (part, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, minimum) = scale_and_minimum(scales, part);
        let (d, min) = (d * scale, min * minimum);
        let q = &block[16 + part / 2 * 32..][..32];
        let shift = part % 2 * 4;
        for (y, q) in y.iter_mut().zip(q) {
            *y = d * f32::from(q >> shift & 15) - min;
        }
    }
}

/// As [`q4`], with 32 bytes of fifth bits before the four.
#[inline(always)]
pub(super) fn q5(block: &[u8; 176], y: &mut [f32; 256]) {
    let scales: &[u8] = &block[4..16];
    let (d, min) = (half(block, 0), half(block, 2));
    for (part, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, minimum) = scale_and_minimum(scales, part);
        let (d, min) = (d * scale, min * minimum);
        let (q, fifth) = (&block[48 + part / 2 * 32..][..32], &block[16..48]);
        let shift = part % 2 * 4;
        for ((y, q), fifth) in y.iter_mut().zip(q).zip(fifth) {
            *y = d * f32::from(q >> shift & 15 | (fifth >> part & 1) << 4) - min;
        }
    }
}

/// 128 bytes of four bits, 64 of two more, sixteen signed scales, the block's scale.
#[inline(always)]
pub(super) fn q6(block: &[u8; 210], y: &mut [f32; 256]) {
    let (low, rest) = block.split_at(128);
    let (high, scales) = rest.split_at(64);
    let d = half(block, 208);
    for (part, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let d = d * f32::from(scales[part] as i8);
        // Eight parts of 16 share 64 bytes of four bits and 32 of two.
        let (group, within) = (part / 8, part % 8);
        let low = &low[group * 64 + within % 4 * 16..][..16];
        let high = &high[group * 32 + within % 2 * 16..][..16];
        let (low_shift, high_shift) = (within / 4 * 4, within / 2 * 2);
        for ((y, low), high) in y.iter_mut().zip(low).zip(high) {
            *y = d * (f32::from(low >> low_shift & 15 | (high >> high_shift & 3) << 4) - 32.0);
        }
    }
}

/// The scale and the minimum of one of eight parts, of 6 bits each.
#[inline(always)]
fn scale_and_minimum(scales: &[u8], part: usize) -> (f32, f32) {
    let (scale, minimum) = if part < 4 {
        (scales[part] & 63, scales[part + 4] & 63)
    } else {
        (scales[part + 4] & 15 | scales[part - 4] >> 6 << 4, scales[part + 4] >> 4 | scales[part] >> 6 << 4)
    };
    (f32::from(scale), f32::from(minimum))
}
