//! The K formats: blocks of 256 values, whose parts of 16 or 32 have scales (and minima) that share a scale of the block's.

use super::{Format, MAX_BLOCK, Numbers, half};

/// Sixteen bytes of scale (low half) and minimum (high half), 64 of two bits, the block's scale and minimum.
pub(super) struct Q2;

impl Format for Q2 {
    const BYTES: usize = 84;
    const VALUES: usize = MAX_BLOCK;
    const PART: usize = 16;

    #[inline(always)]
    fn read(block: &[u8], to: Numbers<'_>) {
        let (scales, rest) = block.split_at(16);
        let (d, min) = (half(block, 80), half(block, 82));
        for part in 0..Self::VALUES / Self::PART {
            let values = &mut to.values[part * Self::PART..][..Self::PART];
            (to.scales[part], to.minima[part]) = (d * f32::from(scales[part] & 15), min * f32::from(scales[part] >> 4));
            let q = shifted::<16>(&rest[part / 8 * 32 + part % 2 * 16..], part % 8 / 2 * 2);
            values.iter_mut().zip(q).for_each(|(to, q)| *to = (q & 3) as i8);
        }
    }
}

/// 32 bytes of third bits, 64 of two bits, sixteen scales of 6 bits, the block's scale.
pub(super) struct Q3;

impl Format for Q3 {
    const BYTES: usize = 110;
    const VALUES: usize = MAX_BLOCK;
    const PART: usize = 16;

    #[inline(always)]
    fn read(block: &[u8], to: Numbers<'_>) {
        let (third, rest) = block.split_at(32);
        let (q, scales) = rest.split_at(64);
        let d = half(block, 108);
        for part in 0..Self::VALUES / Self::PART {
            let values = &mut to.values[part * Self::PART..][..Self::PART];
            let low = if part < 8 { scales[part] & 15 } else { scales[part - 8] >> 4 };
            let high = scales[8 + part % 4] >> (part / 4 * 2) & 3;
            to.scales[part] = d * (f32::from(low | high << 4) - 32.0);
            let q = shifted::<16>(&q[part / 8 * 32 + part % 2 * 16..], part % 8 / 2 * 2);
            let (third, bit) = (&third[part % 2 * 16..][..16], 1u8 << (part / 2));
            for ((to, q), third) in values.iter_mut().zip(q).zip(third) {
                *to = (q & 3) as i8 - if third & bit == 0 { 4 } else { 0 };
            }
        }
    }
}

/// The block's scale and minimum, eight scales and minima of 6 bits, 128 bytes of four bits.
pub(super) struct Q4;

impl Format for Q4 {
    const BYTES: usize = 144;
    const VALUES: usize = MAX_BLOCK;
    const PART: usize = 32;

    #[inline(always)]
    fn read(block: &[u8], to: Numbers<'_>) {
        let scales: &[u8] = &block[4..16];
        let (d, min) = (half(block, 0), half(block, 2));
        for part in 0..Self::VALUES / Self::PART {
            let values = &mut to.values[part * Self::PART..][..Self::PART];
            let (scale, minimum) = scale_and_minimum(scales, part);
            (to.scales[part], to.minima[part]) = (d * scale, min * minimum);
            let q = shifted::<32>(&block[16 + part / 2 * 32..], part % 2 * 4);
            values.iter_mut().zip(q).for_each(|(to, q)| *to = (q & 15) as i8);
        }
    }
}

/// As [`Q4`], with 32 bytes of fifth bits before the four.
pub(super) struct Q5;

impl Format for Q5 {
    const BYTES: usize = 176;
    const VALUES: usize = MAX_BLOCK;
    const PART: usize = 32;

    #[inline(always)]
    fn read(block: &[u8], to: Numbers<'_>) {
        let scales: &[u8] = &block[4..16];
        let (d, min) = (half(block, 0), half(block, 2));
        for part in 0..Self::VALUES / Self::PART {
            let values = &mut to.values[part * Self::PART..][..Self::PART];
            let (scale, minimum) = scale_and_minimum(scales, part);
            (to.scales[part], to.minima[part]) = (d * scale, min * minimum);
            let q = shifted::<32>(&block[48 + part / 2 * 32..], part % 2 * 4);
            let (fifth, bit) = (&block[16..48], 1u8 << part);
            for ((to, q), fifth) in values.iter_mut().zip(q).zip(fifth) {
                *to = (q & 15 | if fifth & bit == 0 { 0 } else { 16 }) as i8;
            }
        }
    }
}

/// 128 bytes of four bits, 64 of two more, sixteen signed scales, the block's scale.
pub(super) struct Q6;

impl Format for Q6 {
    const BYTES: usize = 210;
    const VALUES: usize = MAX_BLOCK;
    const PART: usize = 16;

    #[inline(always)]
    fn read(block: &[u8], to: Numbers<'_>) {
        let (low, rest) = block.split_at(128);
        let (high, scales) = rest.split_at(64);
        let d = half(block, 208);
        for (part, scale) in scales[..16].iter().enumerate() {
            let values = &mut to.values[part * Self::PART..][..Self::PART];
            to.scales[part] = d * f32::from(*scale as i8);
            // Eight parts of 16 share 64 bytes of four bits and 32 of two.
            let (group, within) = (part / 8, part % 8);
            let low = shifted::<16>(&low[group * 64 + within % 4 * 16..], within / 4 * 4);
            let high = shifted::<16>(&high[group * 32 + within % 2 * 16..], within / 2 * 2);
            for ((to, low), high) in values.iter_mut().zip(low).zip(high) {
                *to = (low & 15 | (high & 3) << 4) as i8 - 32;
            }
        }
    }
}

/// The first bytes, shifted by 0, 2, 4 or 6: vectors have no shift of bytes by a number that is not known.
#[inline(always)]
fn shifted<const N: usize>(q: &[u8], shift: usize) -> [u8; N] {
    let (q, mut to) = (&q[..N], [0; N]);
    match shift {
        0 => to.copy_from_slice(q),
        2 => to.iter_mut().zip(q).for_each(|(to, q)| *to = q >> 2),
        4 => to.iter_mut().zip(q).for_each(|(to, q)| *to = q >> 4),
        _ => to.iter_mut().zip(q).for_each(|(to, q)| *to = q >> 6),
    }
    to
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
