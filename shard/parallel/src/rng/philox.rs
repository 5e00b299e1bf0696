//! `torch.Generator("cuda")`: Philox4x32-10, and how torch's kernel hands its words out.
//!
//! The core passes the published known answers (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The
//! mapping from words to elements was read in torch's source but not compared with a GPU.

/// Threads of a block in torch's kernel.
const BLOCK: usize = 256;
/// Threads that an A100 runs at once (108 multiprocessors x 2048). Only calls for more values than that depend on it.
const A100_THREADS: usize = 108 * 2048;

/// `torch.Generator("cuda")`.
#[derive(Clone, Debug)]
pub struct TorchCuda {
    seed: u64,
    /// Counted as torch does: four per word block.
    offset: u64,
    threads: usize,
}

impl TorchCuda {
    /// `manual_seed(seed)`, as seen on an A100.
    pub fn new(seed: u64) -> Self {
        Self { seed, offset: 0, threads: A100_THREADS }
    }

    /// The same on a GPU that runs `threads` threads at once (multiprocessors x threads per multiprocessor): beyond as many
    /// values in one call torch's numbers depend on the device.
    pub fn on_device_of(self, threads: usize) -> Self {
        Self { threads: threads.max(BLOCK), ..self }
    }

    /// `torch.randn(n, device="cuda")`.
    pub fn randn_f32(&mut self, n: usize) -> Vec<f32> {
        let mut values = vec![0.0; n];
        let stride = BLOCK * n.div_ceil(BLOCK).min(self.threads / BLOCK);
        // A thread makes four values a round and writes them one stride apart.
        let rounds = n.div_ceil((4 * stride).max(1));
        for round in 0..rounds {
            let start = round * 4 * stride;
            for thread in 0..stride.min(n - start) {
                let normals = normal4(self.words(thread as u64, round as u64));
                for (i, normal) in normals.into_iter().enumerate() {
                    if let Some(value) = values.get_mut(start + i * stride + thread) {
                        *value = normal;
                    }
                }
            }
        }
        self.offset += 4 * rounds as u64;
        values
    }

    /// The four words a thread draws in a round of the next call.
    pub fn words(&self, thread: u64, round: u64) -> [u32; 4] {
        let counter = self.offset / 4 + round;
        let counter = [counter as u32, (counter >> 32) as u32, thread as u32, (thread >> 32) as u32];
        philox(counter, [self.seed as u32, (self.seed >> 32) as u32])
    }
}

/// curand's `curand_normal4`: two Box-Muller pairs, the sine first.
fn normal4(words: [u32; 4]) -> [f32; 4] {
    let [a, b] = box_muller(words[0], words[1]);
    let [c, d] = box_muller(words[2], words[3]);
    [a, b, c, d]
}

fn box_muller(x: u32, y: u32) -> [f32; 2] {
    const UNIT: f32 = 1.0 / 4_294_967_296.0;
    const TURN: f32 = UNIT * 2.0 * std::f32::consts::PI;
    let u = libm::fmaf(x as f32, UNIT, UNIT / 2.0);
    let v = libm::fmaf(y as f32, TURN, TURN / 2.0);
    let s = libm::sqrtf(-2.0 * libm::logf(u));
    [s * libm::sinf(v), s * libm::cosf(v)]
}

/// Ten rounds of Philox4x32.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xd251_1f53;
        let b = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_core_gives_the_published_answers() {
        // Random123's kat_vectors, philox4x32 with 10 rounds.
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn a_call_beyond_the_devices_threads_fills_every_value() {
        let values = TorchCuda::new(1).on_device_of(512).randn_f32(5_000);
        assert!(values.iter().all(|v| *v != 0.0));
        // The first stride is what a device with room for all would give.
        assert_eq!(values[..512], TorchCuda::new(1).randn_f32(512)[..]);
    }
}
