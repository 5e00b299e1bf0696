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
        let parts = to.scales[..16].iter_mut().zip(&mut to.minima[..16]);
        for ((scale, minimum), of_part) in parts.zip(scales) {
            (*scale, *minimum) = (d * f32::from(of_part & 15), min * f32::from(of_part >> 4));
        }
        for (q, values) in lines(&rest[..64]).zip(to.values.as_chunks_mut::<128>().0) {
            each_quarter(values, |quarter, i| ((q[i] >> (2 * quarter)) & 3) as i8);
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
        for (part, scale) in to.scales[..16].iter_mut().enumerate() {
            let low = if part < 8 { scales[part] & 15 } else { scales[part - 8] >> 4 };
            let high = scales[8 + part % 4] >> (part / 4 * 2) & 3;
            *scale = d * (f32::from(low | high << 4) - 32.0);
        }
        for (at, (q, values)) in lines(q).zip(to.values.as_chunks_mut::<128>().0).enumerate() {
            let missing: [u8; LINE] = std::array::from_fn(|i| !third[i] >> (4 * at));
            each_quarter(values, |quarter, i| (q[i] >> (2 * quarter) & 3) as i8 - (missing[i] >> quarter << 2 & 4) as i8);
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
        scales_and_minima(scales, [d, min], to.scales, to.minima);
        for (q, values) in lines(&block[16..]).zip(to.values.as_chunks_mut::<{ 2 * LINE }>().0) {
            let (low, high) = values.split_at_mut(LINE);
            low.iter_mut().zip(q).for_each(|(to, q)| *to = (q & 15) as i8);
            high.iter_mut().zip(q).for_each(|(to, q)| *to = (q >> 4) as i8);
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
        scales_and_minima(scales, [d, min], to.scales, to.minima);
        let mut fifth: [u8; LINE] = std::array::from_fn(|i| block[16 + i]);
        for (q, values) in lines(&block[48..]).zip(to.values.as_chunks_mut::<{ 2 * LINE }>().0) {
            let (low, high) = values.split_at_mut(LINE);
            low.iter_mut().zip(q).zip(&fifth).for_each(|((to, q), fifth)| *to = (q & 15 | fifth << 4 & 16) as i8);
            high.iter_mut().zip(q).zip(&fifth).for_each(|((to, q), fifth)| *to = (q >> 4 | fifth << 3 & 16) as i8);
            fifth.iter_mut().for_each(|fifth| *fifth >>= 2);
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
        to.scales[..16].iter_mut().zip(scales).for_each(|(to, scale)| *to = d * f32::from(*scale as i8));
        for (at, values) in to.values.as_chunks_mut::<128>().0.iter_mut().enumerate() {
            let (low, high) = (&low[at * 2 * LINE..][..2 * LINE], &high[at * LINE..][..LINE]);
            each_quarter(values, |quarter, i| {
                let low = low[quarter % 2 * LINE + i] >> (quarter / 2 * 4) & 15;
                (low | (high[i] >> (2 * quarter) & 3) << 4) as i8 - 32
            });
        }
    }
}

/// Bytes whose bits belong to values a quarter of 128 apart.
const LINE: usize = 32;

#[inline(always)]
fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8; LINE]> {
    bytes.as_chunks::<LINE>().0.iter()
}

/// Value `i` of each quarter. By quarters that are written out: vectors have no shift of bytes by a number that is not known.
#[inline(always)]
fn each_quarter(values: &mut [i8; 128], value: impl Fn(usize, usize) -> i8) {
    let (first, rest) = values.split_at_mut(LINE);
    let (second, rest) = rest.split_at_mut(LINE);
    let (third, fourth) = rest.split_at_mut(LINE);
    first.iter_mut().enumerate().for_each(|(i, to)| *to = value(0, i));
    second.iter_mut().enumerate().for_each(|(i, to)| *to = value(1, i));
    third.iter_mut().enumerate().for_each(|(i, to)| *to = value(2, i));
    fourth.iter_mut().enumerate().for_each(|(i, to)| *to = value(3, i));
}

/// Eight of each, times those of the block.
#[inline(always)]
fn scales_and_minima(of: &[u8], [d, min]: [f32; 2], scales: &mut [f32], minima: &mut [f32]) {
    for (part, (to, to_minimum)) in scales[..8].iter_mut().zip(&mut minima[..8]).enumerate() {
        let (scale, minimum) = scale_and_minimum(of, part);
        (*to, *to_minimum) = (d * scale, min * minimum);
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
