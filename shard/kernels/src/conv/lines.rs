//! Convolutions in tiles of bf16: a pixel's 32 channels are a line, which tiles are read from where it lies, so that nothing is copied for
//! windows. Pixels are the rows of a product and channels its columns; a result is turned on its way out.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::conv::laid::Laid;
use crate::conv::{Conv2d, add_rows, doubling};
use crate::gemm::micro::{MAX_TILE, MicroKernel, TILE_PAIRS};
use crate::gemm::{Plane, Rows, SharedPlane, bf16, narrow_rows, turn};
use crate::scratch::{Buffer, Lent};
use crate::{scratch, threads};

/// Channels of a line.
const CHANNELS: usize = 2 * TILE_PAIRS;
/// Tiles of pixels that share the weights a job reads.
const TILES: usize = 16;
/// Most pixels of a line that are turned at once.
const RUN: usize = 128;

/// Filters `[c_out, c_in, size, size]` as panels of columns: `[C_out / nr][C_in / 32][size, size][16 pairs][nr]`.
pub(super) fn pack(kernel: &MicroKernel, weight: &[f32], [c_out, c_in, size]: [usize; 3]) -> Buffer {
    let (nr, taps, steps) = (kernel.nr, size * size, c_in.div_ceil(CHANNELS) * size * size);
    let mut packed = Buffer::zeros(c_out.next_multiple_of(nr) * steps * TILE_PAIRS);
    let panels = packed.as_mut_slice().chunks_exact_mut((steps * TILE_PAIRS * nr).max(1));
    for (panel, packed) in panels.enumerate() {
        for (column, filter) in (panel * nr..c_out.min((panel + 1) * nr)).enumerate() {
            let filter = &weight[filter * c_in * taps..][..c_in * taps];
            for pair in 0..c_in.div_ceil(2) {
                let (group, row) = (pair / TILE_PAIRS, pair % TILE_PAIRS);
                for tap in 0..taps {
                    let at = |channel: usize| filter.get(channel * taps + tap).map_or(bf16::ZERO, |w| bf16::from_f32(*w));
                    let bits = [at(2 * pair), at(2 * pair + 1)].map(|w| u32::from(w.to_bits()));
                    packed[((group * taps + tap) * TILE_PAIRS + row) * nr + column] = f32::from_bits(bits[0] | bits[1] << 16);
                }
            }
        }
    }
    packed
}

/// A picture in lines, with the zeros around it: `[C / 32][height][width][16 pairs]`.
struct Lined {
    groups: usize,
    height: usize,
    width: usize,
}

impl Lined {
    fn of(laid: &Laid, c_in: usize) -> Self {
        let [height, width] = [0, 1].map(|side| laid.before[side] + laid.input[side] + laid.after);
        Self { groups: c_in.div_ceil(CHANNELS), height, width }
    }

    /// Floats of a row of the picture.
    fn row(&self) -> usize {
        self.width * TILE_PAIRS
    }

    /// Of the whole picture.
    fn len(&self) -> usize {
        self.groups * self.height * self.row()
    }
}

/// `x: [B, C_in, H, W]` gives `y: [B, C_out, H', W']`.
pub(super) fn convolve(conv: &Conv2d, x: &[f32], laid: Laid, residual: Option<&[f32]>, y: &mut [MaybeUninit<f32>]) {
    let ([c_out, c_in, _], kernel, [out_height, out_width]) = (conv.dims(), conv.kernel, laid.output);
    let (lined, picture) = (Lined::of(&laid, c_in), c_in * laid.input.iter().product::<usize>());
    let pixels = laid.pixels() * conv.phases.len();
    let batch = y.len() / (c_out * pixels);
    // The last tile may look at as many lines as it has no pixels for.
    let beyond = kernel.mr * laid.stride * TILE_PAIRS;
    let mut lines = Lent::of(batch * lined.len() + beyond);
    let (pictures, beyond) = lines.as_mut_slice().split_at_mut(batch * lined.len());
    beyond.fill(0.0);
    threads::over_rows(pictures, lined.row(), |first, rows| {
        scratch::with([TILE_PAIRS * RUN], |[pairs]| {
            for (at, row) in (first..).zip(rows.chunks_exact_mut(lined.row())) {
                let (item, group) = (at / (lined.groups * lined.height), at / lined.height % lined.groups);
                fill(row, &x[item * picture..][..picture], &laid, [group, at % lined.height], pairs);
            }
        });
    });
    let steps = Steps::of(&lined, laid.size);
    let (across, small) = (out_width.div_ceil(kernel.mr), conv.is_small(y.len()));
    let tiles = out_height * across;
    let per_job = (batch * tiles).div_ceil(2 * rayon::current_num_threads()).clamp(1, TILES);
    let jobs = tiles.div_ceil(per_job);
    let y = SharedPlane::of(y, pixels);
    threads::over_jobs(batch * jobs, small, |job| {
        let (item, tiles) = (job / jobs, job % jobs * per_job..tiles.min((job % jobs + 1) * per_job));
        let job =
            Job { conv, laid, lined: &lined, steps: &steps, across, residual: residual.map(|of| &of[item * c_out * pixels..]) };
        job.run(&lines.as_slice()[item * lined.len()..], tiles, |channels, pixels| {
            #[allow(unsafe_code)] // threads write rectangles, which are not slices
            // SAFETY: every job has its own pixels of its own picture, one tile of them at a time.
            unsafe {
                y.part(item * c_out + channels.start..item * c_out + channels.end, pixels)
            }
        });
    });
}

/// Where the lines of each step begin, from those of the first: of each group of channels, for each place of the filter.
struct Steps(Vec<usize>);

impl Steps {
    fn of(lined: &Lined, size: usize) -> Self {
        let places = (0..lined.groups).flat_map(|group| (0..size).flat_map(move |ky| (0..size).map(move |kx| [group, ky, kx])));
        Self(places.map(|[group, ky, kx]| ((group * lined.height + ky) * lined.width + kx) * TILE_PAIRS).collect())
    }
}

/// Some tiles of pixels of one picture.
struct Job<'a> {
    conv: &'a Conv2d,
    laid: Laid,
    lined: &'a Lined,
    steps: &'a Steps,
    /// Tiles of a row of the output.
    across: usize,
    /// Of this picture.
    residual: Option<&'a [f32]>,
}

impl Job<'_> {
    /// `y` lends the given channels of the given pixels.
    fn run<'y>(&self, lines: &[f32], tiles: Range<usize>, y: impl Fn(Range<usize>, Range<usize>) -> Plane<'y>) {
        let (conv, kernel, [_, width]) = (self.conv, self.conv.kernel, self.laid.output);
        let panel_len = self.steps.0.len() * TILE_PAIRS * kernel.nr;
        let gathered = kernel.gathered(self.steps.0.len());
        scratch::with([gathered, MAX_TILE, MAX_TILE, MAX_TILE], |[gathered, tile, turned, beside]| {
            for panel in (0..conv.c_out).step_by(kernel.nr) {
                let channels = panel..conv.c_out.min(panel + kernel.nr);
                let bias = conv.bias.as_ref().map_or(&[][..], |bias| &bias[channels.clone()]);
                let weight = |phase: usize| &conv.phases[phase].as_slice()[panel / kernel.nr * panel_len..][..panel_len];
                for at in tiles.clone() {
                    let (row, column) = (at / self.across, at % self.across * kernel.mr);
                    let run = row * width + column..row * width + width.min(column + kernel.mr);
                    let mut product = |phase: usize, turned: &mut [f32]| {
                        let c = Plane::of(&mut tile[..run.len() * kernel.nr], kernel.nr);
                        let lines = &lines[self.first_line(phase, [row, column])..];
                        kernel.run_lines(lines, &self.steps.0, self.laid.stride * TILE_PAIRS, weight(phase), c, gathered);
                        turn(turned, Rows::new(tile, run.len(), kernel.nr), 0..run.len(), (0, channels.len()), kernel.mr);
                    };
                    if !conv.doubles() {
                        product(0, turned);
                        let mut y = y(channels.clone(), run.clone());
                        y.copy_rows_plus(
                            &Plane::of(&mut turned[..channels.len() * kernel.mr], kernel.mr).narrow(run.len()),
                            bias,
                        );
                        self.add_residual(&mut y, panel, &run);
                        continue;
                    }
                    for odd in 0..2 {
                        product(2 * odd, turned);
                        product(2 * odd + 1, beside);
                        let pixels = doubling::pixels_of(&run, width, odd);
                        let mut y = y(channels.clone(), pixels.clone());
                        let by_turns = [&*turned, &*beside].map(|turned| Rows::new(turned, channels.len(), kernel.mr));
                        y.interleave_rows_plus(by_turns, 0, bias);
                        self.add_residual(&mut y, panel, &pixels);
                    }
                }
            }
        });
    }

    /// Where the lines of a kernel's first window of a tile begin.
    fn first_line(&self, phase: usize, at: [usize; 2]) -> usize {
        let [down, right] = self.laid.shift(phase);
        ((at[0] * self.laid.stride + down) * self.lined.width + at[1] * self.laid.stride + right) * TILE_PAIRS
    }

    /// To channels from `panel` on.
    fn add_residual(&self, y: &mut Plane<'_>, panel: usize, pixels: &Range<usize>) {
        let all = self.laid.pixels() * self.conv.phases.len();
        add_rows(y, |channel| self.residual.map(|of| &of[(panel + channel) * all..][pixels.clone()]));
    }
}

/// One row of a picture in lines: 32 channels of each of its pixels, those that are not there as zeros.
fn fill(row: &mut [f32], x: &[f32], laid: &Laid, [group, line]: [usize; 2], pairs: &mut [f32]) {
    let Laid { input: [height, width], before: [above, before], .. } = *laid;
    let (zeros, rest) = row.split_at_mut(before * TILE_PAIRS);
    let (inside, more) = rest.split_at_mut(width * TILE_PAIRS);
    zeros.fill(0.0);
    more.fill(0.0);
    let Some(line) = line.checked_sub(above).filter(|line| *line < height) else {
        return inside.fill(0.0);
    };
    let channels = x.chunks_exact((height * width).max(1)).skip(group * CHANNELS).take(CHANNELS);
    let (mut lines, mut count) = ([&x[..0]; CHANNELS], 0usize);
    for (to, channel) in lines.iter_mut().zip(channels) {
        (*to, count) = (&channel[line * width..][..width], count + 1);
    }
    pairs[count.div_ceil(2) * RUN..TILE_PAIRS * RUN].fill(0.0);
    for first in (0..width).step_by(RUN) {
        let run = first..width.min(first + RUN);
        for (two, pairs) in lines[..count].chunks(2).zip(pairs.chunks_exact_mut(RUN)) {
            narrow_rows(&two[0][run.clone()], two.get(1).map(|second| &second[run.clone()]), &mut pairs[..run.len()]);
        }
        let to = &mut inside[first * TILE_PAIRS..run.end * TILE_PAIRS];
        turn(to, Rows::new(pairs, TILE_PAIRS, RUN), 0..TILE_PAIRS, (0, run.len()), TILE_PAIRS);
    }
}
