//! `torch.Generator("cpu")`: MT19937 and torch's ways of making numbers from it.

use half::{bf16, f16};

/// Words of the Mersenne Twister's state.
const N: usize = 624;
const M: usize = 397;
/// torch fills whole blocks of this many values at once, and falls back to one by one below it.
const BLOCK: usize = 16;

/// `torch.Generator("cpu")`, seeded with the low 32 bits of the seed.
#[derive(Clone, Debug)]
pub struct TorchCpu {
    state: Box<[u32; N]>,
    next: usize,
    /// The second value of the last pair drawn one by one. Only calls for fewer than sixteen values make or use it.
    cached: Option<f64>,
}

impl TorchCpu {
    /// `manual_seed(seed)`.
    pub fn new(seed: u64) -> Self {
        let mut state = Box::new([0u32; N]);
        state[0] = seed as u32;
        for i in 1..N {
            let last = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        Self { state, next: N, cached: None }
    }

    /// `torch.randn(n)`.
    pub fn randn_f32(&mut self, n: usize) -> Vec<f32> {
        if n < BLOCK {
            return (0..n).map(|_| self.normal() as f32).collect();
        }
        let mut x: Vec<f32> = (0..n).map(|_| self.uniform_f32()).collect();
        x.chunks_exact_mut(BLOCK).for_each(box_muller_f32);
        self.redraw_tail_f32(&mut x);
        x
    }

    /// `torch.randn(n, dtype=torch.float64)`.
    pub fn randn_f64(&mut self, n: usize) -> Vec<f64> {
        if n < BLOCK {
            return (0..n).map(|_| self.normal()).collect();
        }
        let mut x: Vec<f64> = (0..n).map(|_| self.uniform_f64()).collect();
        x.chunks_exact_mut(BLOCK).for_each(box_muller_f64);
        if !n.is_multiple_of(BLOCK) {
            let tail = &mut x[n - BLOCK..];
            tail.fill_with(|| self.uniform_f64());
            box_muller_f64(tail);
        }
        x
    }

    /// `torch.randn(n, dtype=torch.bfloat16)`.
    pub fn randn_bf16(&mut self, n: usize) -> Vec<bf16> {
        self.randn_half(n).into_iter().map(bf16::from_f32).collect()
    }

    /// `torch.randn(n, dtype=torch.float16)`.
    pub fn randn_f16(&mut self, n: usize) -> Vec<f16> {
        self.randn_half(n).into_iter().map(f16::from_f32).collect()
    }

    /// `torch.rand(n)`: uniform in 0..1.
    pub fn rand_f32(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.uniform_f32()).collect()
    }

    /// `torch.rand(n, dtype=torch.float64)`: uniform in 0..1.
    pub fn rand_f64(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.uniform_f64()).collect()
    }

    /// `torch.randint(high, (n,))`, for 0 < `high` < 2^28: from there on torch's versions differ.
    pub fn randint(&mut self, high: u32, n: usize) -> Vec<i64> {
        (0..n).map(|_| i64::from(self.word() % high.max(1))).collect()
    }

    /// `torch.randperm(n)`.
    pub fn randperm(&mut self, n: u32) -> Vec<i64> {
        let mut order: Vec<i64> = (0..i64::from(n)).collect();
        for i in 0..n.saturating_sub(1) {
            let other = i + self.word() % (n - i);
            order.swap(i as usize, other as usize);
        }
        order
    }

    /// Passes over `words` 32-bit words, as if they had been drawn: an f32 of a call for sixteen or more takes one.
    pub fn skip(&mut self, words: u64) {
        for _ in 0..words {
            self.word();
        }
    }

    /// One word of MT19937.
    fn word(&mut self) -> u32 {
        if self.next == N {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let odd = if y & 1 == 0 { 0 } else { 0x9908_b0df };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }

    fn uniform_f32(&mut self) -> f32 {
        (self.word() & 0xff_ffff) as f32 / (1u32 << 24) as f32
    }

    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.word());
        let word = (high << 32) | u64::from(self.word());
        (word & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }

    /// One value, made in pairs of which the second waits for the next call.
    fn normal(&mut self) -> f64 {
        if let Some(value) = self.cached.take() {
            return value;
        }
        let (u1, u2) = (self.uniform_f64(), self.uniform_f64());
        let r = libm::sqrt(-2.0 * libm::log1p(-u2));
        let theta = 2.0 * std::f64::consts::PI * u1;
        self.cached = Some(r * libm::sin(theta));
        r * libm::cos(theta)
    }

    /// The values of a half-precision call before they are rounded. Unlike the f32 call it draws whole blocks only, so a call
    /// whose length is not a multiple of sixteen leaves the generator elsewhere.
    fn randn_half(&mut self, n: usize) -> Vec<f32> {
        if n < BLOCK {
            return (0..n).map(|_| self.normal() as f32).collect();
        }
        let mut x = vec![0.0; n];
        for block in x.chunks_exact_mut(BLOCK) {
            block.fill_with(|| self.uniform_f32());
            box_muller_f32(block);
        }
        self.redraw_tail_f32(&mut x);
        x
    }

    /// Where the length is not a multiple of sixteen the *last sixteen* values are drawn again.
    fn redraw_tail_f32(&mut self, x: &mut [f32]) {
        if !x.len().is_multiple_of(BLOCK) {
            let start = x.len() - BLOCK;
            let tail = &mut x[start..];
            tail.fill_with(|| self.uniform_f32());
            box_muller_f32(tail);
        }
    }
}

/// Sixteen uniform values to sixteen normal ones: pairs are eight apart.
fn box_muller_f32(x: &mut [f32]) {
    let (first, second) = x.split_at_mut(BLOCK / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let r = libm::sqrtf(-2.0 * libm::logf(1.0 - *a));
        let theta = 2.0 * std::f32::consts::PI * *b;
        (*a, *b) = (r * libm::cosf(theta), r * libm::sinf(theta));
    }
}

/// As [`box_muller_f32`].
fn box_muller_f64(x: &mut [f64]) {
    let (first, second) = x.split_at_mut(BLOCK / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let r = libm::sqrt(-2.0 * libm::log(1.0 - *a));
        let theta = 2.0 * std::f64::consts::PI * *b;
        (*a, *b) = (r * libm::cos(theta), r * libm::sin(theta));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_mt19937s() {
        // The reference implementation's 10,000th word under its default seed (std::mt19937 must give the same).
        let mut generator = TorchCpu::new(5489);
        generator.skip(9_999);
        assert_eq!(generator.word(), 4_123_659_995);
    }

    #[test]
    fn only_the_low_half_of_the_seed_counts() {
        assert_eq!(TorchCpu::new(5).randn_f32(20), TorchCpu::new(5 + (1 << 32)).randn_f32(20));
    }

    #[test]
    fn skipping_equals_drawing() {
        let (mut a, mut b) = (TorchCpu::new(3), TorchCpu::new(3));
        a.randn_f32(32);
        b.skip(32);
        assert_eq!(a.rand_f32(4), b.rand_f32(4));
    }
}
