//! Time and randomness, in one place: from the system, or from a seed so that a run can be repeated.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::time::Instant;
use uuid::Uuid;

use crate::state::Millis;

/// Seeds are drawn below 2^53, so that they survive every JSON reader.
const SEED_BITS: u32 = 53;

/// What a coordinator takes from outside itself besides messages.
#[derive(Debug)]
pub struct Context {
    at_start: Duration,
    start: Instant,
    /// State of the generator; none: the operating system's.
    random: Option<Mutex<u64>>,
}

impl Context {
    /// The system's clock and generator. Call it in a tokio runtime.
    pub fn system() -> Self {
        let at_start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { at_start, start: Instant::now(), random: None }
    }

    /// Everything from `seed`; the clock is tokio's, which a test may hold, and begins at `at_start` since 1970.
    pub fn seeded(seed: u64, at_start: Duration) -> Self {
        Self { at_start, start: Instant::now(), random: Some(Mutex::new(seed)) }
    }

    /// Milliseconds since 1970, on a clock that never goes back.
    pub fn now(&self) -> Millis {
        u64::try_from((self.at_start + self.start.elapsed()).as_millis()).unwrap_or(u64::MAX)
    }

    /// A fresh UUID.
    pub fn uuid(&self) -> Uuid {
        match &self.random {
            None => Uuid::new_v4(),
            Some(state) => {
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                let bytes = [split_mix(&mut state), split_mix(&mut state)].map(u64::to_le_bytes).concat();
                uuid::Builder::from_random_bytes(<[u8; 16]>::try_from(bytes).unwrap_or_default()).into_uuid()
            }
        }
    }

    /// A seed for a job whose client named none.
    pub fn noise_seed(&self) -> u64 {
        // The low bits of a version 4 UUID are random; the topmost two are not.
        self.uuid().as_u64_pair().1 & ((1 << SEED_BITS) - 1)
    }

    /// Bytes for a key.
    pub fn key(&self) -> [u8; 32] {
        let mut key = [0; 32];
        // Two UUIDs hold 244 random bits.
        key[..16].copy_from_slice(self.uuid().as_bytes());
        key[16..].copy_from_slice(self.uuid().as_bytes());
        key
    }
}

/// Steele, Lea and Flood's SplitMix64 (<https://doi.org/10.1145/2714064.2660195>).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_seed_gives_the_same_again() {
        let [a, b] = [1, 1].map(|seed| Context::seeded(seed, Duration::from_secs(5)));
        assert_eq!((a.uuid(), a.noise_seed(), a.key()), (b.uuid(), b.noise_seed(), b.key()));
        assert_ne!(a.uuid(), a.uuid());
        assert_eq!(a.uuid().get_version_num(), 4);
    }

    #[tokio::test]
    async fn drawn_seeds_fit_a_double() {
        let context = Context::system();
        assert!((0..100).all(|_| context.noise_seed() < 1 << SEED_BITS));
        assert_ne!(context.noise_seed(), context.noise_seed());
    }
}
