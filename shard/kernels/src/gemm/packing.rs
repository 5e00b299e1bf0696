//! Operands in the order in which a micro-kernel reads them.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::gemm::blocks::BlockRows;
use crate::gemm::bytes::{BLOCK, Scales, whole_blocks};
use crate::gemm::micro::{MicroKernel, Order, TILE_PAIRS, Takes};
use crate::gemm::narrow::{narrow, narrow_lines, widen, widen_pairs};
use crate::gemm::pairs::turn_lines;
use crate::gemm::turn::turn;
use crate::gemm::{K_STEP, Piece, Rows, TILES_STEP};
use crate::memory::prefer_large_pages;
use crate::scratch::Buffer;

/// `W: [N, K]`, packed once as `[N / nr][K][nr]`; the last panel is filled up with zeros.
#[derive(Clone)]
pub struct PackedWeight {
    n: usize,
    k: usize,
    /// Rows of a panel: as many as K, or of pairs as its chunks have together.
    depth: usize,
    panels: Panels,
    kernel: &'static MicroKernel,
}

/// Weights may stay in 16 bits or in blocks of fewer; arithmetic is in f32 all the same.
#[derive(Clone)]
enum Panels {
    F32(Buffer),
    /// Of bf16, in the bits of floats.
    Pairs(Buffer),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    /// Not panels yet: rows.
    Blocks(BlockRows),
    /// The same, for pairs: how many pairs and columns there are before each chunk and after the last.
    PairsOfBlocks(BlockRows, Vec<[usize; 2]>),
    /// Of 8 bits and scales, in the bits of floats.
    Bytes(Buffer),
    /// Rows, whose numbers are to be such panels.
    BytesOfBlocks(BlockRows),
}

/// What a weight may be stored as.
pub trait Element: Copy + Send + Sync {
    /// Packs rows of it.
    #[doc(hidden)]
    fn pack(weight: Rows<'_, Self>, pieces: &[Piece], kernel: &'static MicroKernel) -> PackedWeight;
}

impl Element for f32 {
    fn pack(weight: Rows<'_, Self>, pieces: &[Piece], kernel: &'static MicroKernel) -> PackedWeight {
        let (n, k) = (weight.count(), columns(pieces));
        let mut panels = Buffer::zeros(n.next_multiple_of(kernel.nr) * k);
        pack_panels(panels.as_mut_slice(), weight, pieces, kernel.nr);
        PackedWeight { n, k, depth: k, panels: Panels::F32(panels), kernel }
    }
}

impl Element for bf16 {
    fn pack(weight: Rows<'_, Self>, pieces: &[Piece], kernel: &'static MicroKernel) -> PackedWeight {
        pack_narrow(weight, pieces, kernel, Self::ZERO, Panels::Bf16)
    }
}

impl Element for f16 {
    fn pack(weight: Rows<'_, Self>, pieces: &[Piece], kernel: &'static MicroKernel) -> PackedWeight {
        pack_narrow(weight, pieces, kernel, Self::ZERO, Panels::F16)
    }
}

/// Packs what stays in 16 bits.
fn pack_narrow<T: Element>(
    weight: Rows<'_, T>,
    pieces: &[Piece],
    kernel: &'static MicroKernel,
    zero: T,
    of: fn(Vec<T>) -> Panels,
) -> PackedWeight {
    let (n, k) = (weight.count(), columns(pieces));
    let len = n.next_multiple_of(kernel.nr) * k;
    let mut panels = Vec::with_capacity(len);
    prefer_large_pages(panels.spare_capacity_mut());
    panels.resize(len, zero);
    pack_panels(&mut panels, weight, pieces, kernel.nr);
    PackedWeight { n, k, depth: k, panels: of(panels), kernel }
}

impl From<BlockRows> for PackedWeight {
    fn from(rows: BlockRows) -> Self {
        Self { n: rows.n(), k: rows.k(), depth: rows.k(), panels: Panels::Blocks(rows), kernel: MicroKernel::best() }
    }
}

impl PackedWeight {
    /// Packs `weight: [N, K]`, whose rows may be a part of longer ones.
    pub fn pack<T: Element>(weight: Rows<'_, T>, k: usize) -> Self {
        Self::pack_pieces(weight, &[(0, k)])
    }

    /// Packs the given columns of `weight`, one piece after the other.
    pub fn pack_pieces<T: Element>(weight: Rows<'_, T>, pieces: &[Piece]) -> Self {
        T::pack(weight, pieces, MicroKernel::best())
    }

    /// Packs `weight` for products in bf16: inputs are rounded to it, sums are in f32. `chunks` are those of every product with it: one
    /// that is not of whole pairs, or tiles, is filled up with zeros.
    pub fn pack_pairs(order: Order, weight: Rows<'_, bf16>, chunks: &[impl AsRef<[Piece]>]) -> Self {
        Self::pack_pairs_for(weight, chunks, MicroKernel::bf16(order))
    }

    pub(crate) fn pack_pairs_for(weight: Rows<'_, bf16>, chunks: &[impl AsRef<[Piece]>], kernel: &'static MicroKernel) -> Self {
        let lengths = || chunks.iter().map(|chunk| columns(chunk.as_ref()));
        let (n, k, depth) = (weight.count(), lengths().sum(), lengths().map(|len| kernel.depth(len)).sum());
        let mut panels = Buffer::zeros(n.next_multiple_of(kernel.nr) * depth);
        if n > 0 && depth > 0 {
            let pieces: Vec<&[Piece]> = chunks.iter().map(AsRef::as_ref).collect();
            panels.as_mut_slice().par_chunks_mut(kernel.nr * depth).enumerate().for_each(|(panel, packed)| {
                let rows = panel * kernel.nr..n.min((panel + 1) * kernel.nr);
                let mut from = 0;
                for pieces in &pieces {
                    let pairs = kernel.depth(columns(pieces));
                    let packed = &mut packed[from * kernel.nr..(from + pairs) * kernel.nr];
                    pack_pairs(packed, weight, rows.clone(), pieces, 0..pairs, kernel.nr, |from, to| to.copy_from_slice(from));
                    from += pairs;
                }
            });
        }
        Self { n, k, depth, panels: Panels::Pairs(panels), kernel }
    }

    /// As [`Self::pack_pairs`], of a weight in blocks, whose values are rounded to bf16 for each product.
    pub fn pairs_of_blocks(order: Order, rows: BlockRows, chunks: &[impl AsRef<[Piece]>]) -> Self {
        Self::pairs_of_blocks_for(rows, chunks, MicroKernel::bf16(order))
    }

    pub(crate) fn pairs_of_blocks_for(rows: BlockRows, chunks: &[impl AsRef<[Piece]>], kernel: &'static MicroKernel) -> Self {
        let mut edges = vec![[0, 0]];
        let [mut depth, mut k] = [0, 0];
        for chunk in chunks {
            let len = columns(chunk.as_ref());
            (depth, k) = (depth + kernel.depth(len), k + len);
            edges.push([depth, k]);
        }
        assert_eq!(k, rows.k(), "the chunks' columns");
        Self { n: rows.n(), k, depth, panels: Panels::PairsOfBlocks(rows, edges), kernel }
    }

    /// A weight in blocks for products in 8 bits: inputs are rounded to blocks of 32. `Q8_0` is packed, others stay as they are.
    ///
    /// # Errors
    /// The weight itself if one of `chunks` (those of every product with it) is not of whole blocks of inputs.
    pub fn bytes_of_blocks(rows: BlockRows, chunks: &[impl AsRef<[Piece]>]) -> Result<Self, BlockRows> {
        let kernel = MicroKernel::int8(Scales::of(rows.kind()));
        Self::bytes_of_blocks_for(rows, chunks, kernel)
    }

    pub(crate) fn bytes_of_blocks_for(
        rows: BlockRows,
        chunks: &[impl AsRef<[Piece]>],
        kernel: &'static MicroKernel,
    ) -> Result<Self, BlockRows> {
        let (n, k, depth) = (rows.n(), rows.k(), kernel.depth(rows.k()));
        let panels = match kernel.blocks() {
            Some(bytes) if whole_blocks(&rows, chunks) => match bytes.scales {
                Scales::Stored => {
                    let mut panels = Buffer::zeros(n.div_ceil(kernel.nr) * kernel.panel_len(depth));
                    bytes.pack_weight(&rows, kernel.nr, panels.as_mut_slice());
                    Panels::Bytes(panels)
                }
                Scales::Nibbles | Scales::Whole | Scales::Halves => Panels::BytesOfBlocks(rows),
            },
            _ => return Err(rows),
        };
        Ok(Self { n, k, depth, panels, kernel })
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Rows of a panel.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels) | Panels::Pairs(panels) | Panels::Bytes(panels) => size_of_val(panels.as_slice()),
            Panels::Bf16(panels) => size_of_val(panels.as_slice()),
            Panels::F16(panels) => size_of_val(panels.as_slice()),
            Panels::Blocks(rows) | Panels::PairsOfBlocks(rows, _) | Panels::BytesOfBlocks(rows) => rows.bytes(),
        }
    }

    pub(crate) fn kernel(&self) -> &'static MicroKernel {
        self.kernel
    }

    /// Floats that a panel of so many values, pairs or blocks needs that is made, and others to make it in.
    pub(crate) fn buffer(&self, depth: usize) -> [usize; 2] {
        let (panel, aside) = (self.kernel.panel_len(depth), self.kernel.panel_len(K_STEP));
        match self.panels {
            Panels::F32(_) | Panels::Pairs(_) | Panels::Bytes(_) => [0, 0],
            Panels::Bf16(_) | Panels::F16(_) => [panel, 0],
            Panels::Blocks(_) | Panels::PairsOfBlocks(..) => [panel, aside],
            Panels::BytesOfBlocks(_) => {
                let aside = self.kernel.blocks().map_or(0, |bytes| bytes.aside(K_STEP / BLOCK, self.kernel.nr));
                [panel, aside]
            }
        }
    }

    /// All of one panel, as its chunks, of the given depths, one after the other.
    pub(crate) fn whole_panel<'a>(&'a self, panel: usize, depths: &[usize], [buffer, aside]: [&'a mut [f32]; 2]) -> &'a [f32] {
        if self.buffer(self.depth)[0] == 0 {
            return self.panel(panel, 0..self.depth, [buffer, aside]);
        }
        let mut start = 0;
        for depth in depths {
            let end = start + depth;
            for first in (start..end).step_by(self.step(*depth).max(1)) {
                let to = &mut buffer[self.kernel.panel_len(first)..];
                self.panel(panel, first..end.min(first + self.step(*depth)), [to, aside]);
            }
            start = end;
        }
        buffer
    }

    /// Some of the K of one chunk of one panel, as `[k][nr]`; widened into `buffer` if it has to be.
    pub(crate) fn panel<'a>(&'a self, panel: usize, k: Range<usize>, [buffer, aside]: [&'a mut [f32]; 2]) -> &'a [f32] {
        let nr = self.kernel.nr;
        let range = (panel * self.depth + k.start) * nr..(panel * self.depth + k.end) * nr;
        let rows = panel * nr..self.n.min((panel + 1) * nr);
        let len = range.len();
        match &self.panels {
            Panels::F32(panels) | Panels::Pairs(panels) => &panels.as_slice()[range],
            Panels::Bytes(panels) => {
                let at = |depth| self.kernel.panel_len(panel * self.depth + depth);
                &panels.as_slice()[at(k.start)..at(k.end)]
            }
            Panels::Bf16(panels) => {
                let to = &mut buffer[..len];
                widen(&panels[range], to);
                to
            }
            Panels::F16(panels) => {
                let to = &mut buffer[..len];
                panels[range].convert_to_f32_slice(to);
                to
            }
            Panels::Blocks(blocks) => {
                let to = &mut buffer[..len];
                blocks.widen(rows, k, nr, to, aside);
                to
            }
            Panels::PairsOfBlocks(blocks, edges) => {
                let chunk = edges.partition_point(|[pairs, _]| *pairs <= k.start).saturating_sub(1);
                let ([before, first], end) = (edges[chunk], edges.get(chunk + 1).map_or(self.k, |[_, end]| *end));
                let columns = first + 2 * (k.start - before)..end.min(first + 2 * (k.end - before));
                let to = &mut buffer[..len];
                blocks.pair(rows, columns, nr, to, aside);
                to
            }
            Panels::BytesOfBlocks(blocks) => {
                let to = &mut buffer[..self.kernel.panel_len(k.len())];
                if let Some(bytes) = self.kernel.blocks() {
                    bytes.make_panel(blocks, rows, k, nr, to, aside);
                }
                to
            }
        }
    }

    /// What [`Self::panel`] is going to read; nothing if it is to be made of blocks, or there is no such panel.
    pub(crate) fn ahead(&self, panel: usize, k: Range<usize>) -> &[u8] {
        fn part<T: bytemuck::Pod>(panels: &[T], range: Range<usize>) -> &[u8] {
            bytemuck::cast_slice(panels.get(range).unwrap_or_default())
        }
        let at = |depth| self.kernel.panel_len(panel * self.depth + depth);
        let range = at(k.start)..at(k.end);
        match &self.panels {
            Panels::F32(panels) | Panels::Pairs(panels) | Panels::Bytes(panels) => part(panels.as_slice(), range),
            Panels::Bf16(panels) => part(panels, range),
            Panels::F16(panels) => part(panels, range),
            Panels::Blocks(_) | Panels::PairsOfBlocks(..) | Panels::BytesOfBlocks(_) => &[],
        }
    }

    /// Whether a panel costs more to make than to read.
    pub(crate) fn is_in_blocks(&self) -> bool {
        matches!(self.panels, Panels::Blocks(_) | Panels::PairsOfBlocks(..) | Panels::BytesOfBlocks(_))
    }

    /// In which steps K is best passed: blocks would rather not be widened twice.
    pub(crate) fn step(&self, len: usize) -> usize {
        match self.panels {
            Panels::Blocks(_) | Panels::PairsOfBlocks(..) => K_STEP,
            Panels::BytesOfBlocks(_) => K_STEP / BLOCK,
            _ if self.kernel.takes == Takes::Tiles => self.kernel.whole(even_parts(len, TILES_STEP)),
            _ => even_parts(len, K_STEP),
        }
    }
}

impl fmt::Debug for PackedWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind: &dyn fmt::Debug = match &self.panels {
            Panels::F32(_) => &format_args!("f32"),
            Panels::Pairs(_) => &format_args!("pairs of bf16"),
            Panels::Bytes(_) => &format_args!("8 bits"),
            Panels::Bf16(_) => &format_args!("bf16"),
            Panels::F16(_) => &format_args!("f16"),
            Panels::Blocks(rows) => &rows.kind(),
            Panels::PairsOfBlocks(rows, _) => &format_args!("{:?} in pairs", rows.kind()),
            Panels::BytesOfBlocks(rows) => &format_args!("{:?} in 8 bits", rows.kind()),
        };
        write!(f, "PackedWeight([{}, {}] {kind:?}, {:?})", self.n, self.k, self.kernel)
    }
}

/// How long parts of `len` are that are at most `most` long, and alike.
fn even_parts(len: usize, most: usize) -> usize {
    len.div_ceil(len.div_ceil(most).max(1))
}

pub(super) fn columns(pieces: &[Piece]) -> usize {
    pieces.iter().map(|(_, len)| len).sum()
}

/// What lies in `k`, counted through the pieces: pieces that are not empty.
pub(super) fn parts(pieces: &[Piece], k: Range<usize>) -> impl Iterator<Item = Piece> {
    let mut before = 0;
    pieces.iter().filter_map(move |(start, len)| {
        let [from, until] = [k.start, k.end].map(|k| k.clamp(before, before + len) - before);
        before += len;
        (from < until).then_some((start + from, until - from))
    })
}

/// Fills `panels: [N / nr][K][nr]`, which is zero, from rows of `weight`.
fn pack_panels<T: Element>(panels: &mut [T], weight: Rows<'_, T>, pieces: &[Piece], nr: usize) {
    let k = columns(pieces);
    if k == 0 || weight.count() == 0 {
        return;
    }
    panels.par_chunks_mut(nr * k).take(weight.count().div_ceil(nr)).enumerate().for_each(|(panel, packed)| {
        let rows = panel * nr..weight.count().min((panel + 1) * nr);
        pack_transposed(packed, weight, rows, pieces, 0..k, nr);
    });
}

/// Rows of `x` as the `a` of a kernel's tiles, `apart` floats from one to the next: `[k][mr]`, or what else it takes. `k` counts through the
/// pieces, by twos for a kernel of pairs.
pub(crate) fn pack_rows(
    a: &mut [f32],
    apart: usize,
    x: Rows<'_>,
    rows: Range<usize>,
    pieces: &[Piece],
    k: Range<usize>,
    kernel: &MicroKernel,
) {
    let mr = kernel.mr;
    for (tile, first) in rows.clone().step_by(mr).enumerate() {
        let rows = first..rows.end.min(first + mr);
        let (a, k) = (&mut a[tile * apart..], k.clone());
        match kernel.takes {
            Takes::Floats => pack_floats(a, x, rows, pieces, k, mr),
            Takes::Pairs => narrow_pairs(a, x, rows, pieces, k, mr),
            Takes::PairsByFloats => pack_wide_pairs(a, x, rows, pieces, k, mr),
            Takes::Tiles => narrow_tiles(a, x, rows, pieces, k, mr),
            Takes::Blocks(bytes) => bytes.pack_inputs(a, x, rows, pieces, k, mr),
        }
    }
}

/// Rows of `x`, `len` long, of floats or pairs, as the `a` of a kernel that takes those, in tiles of `height` rows, `mr` at most:
/// `[rows / height][len][mr]`.
pub(crate) fn pack_tiles(packed: &mut [f32], x: Rows<'_>, len: usize, height: usize, kernel: &MicroKernel) {
    let (mr, wide) = (kernel.mr, kernel.takes == Takes::PairsByFloats);
    let mut pairs = vec![0.0; if wide { mr * len } else { 0 }];
    for (tile, first) in (0..x.count()).step_by(height).enumerate() {
        let rows = first..x.count().min(first + height);
        let packed = &mut packed[tile * mr * kernel.input_len(len)..];
        if wide {
            turn(&mut pairs, x, rows, (0, len), mr);
            widen_pairs(&pairs, mr, packed);
        } else {
            turn(packed, x, rows, (0, len), mr);
        }
    }
}

/// Rows of `x`, `len` long, as the columns of a kernel's panels: `[rows / nr][k][nr]`.
pub(crate) fn pack_columns(b: &mut [f32], x: Rows<'_>, len: usize, kernel: &MicroKernel) {
    let (nr, depth) = (kernel.nr, kernel.depth(len));
    for (panel, first) in (0..x.count()).step_by(nr).enumerate() {
        let (b, rows) = (&mut b[panel * nr * depth..], first..x.count().min(first + nr));
        if kernel.pairs() {
            narrow_pairs(b, x, rows, &[(0, len)], 0..depth, nr);
        } else {
            pack_floats(b, x, rows, &[(0, len)], 0..depth, nr);
        }
    }
}

/// As [`pack_transposed`], of floats, which are turned eight at a time.
fn pack_floats(packed: &mut [f32], x: Rows<'_>, rows: Range<usize>, pieces: &[Piece], k: Range<usize>, width: usize) {
    let mut to = 0;
    for part in parts(pieces, k) {
        turn(&mut packed[to * width..], x, rows.clone(), part, width);
        to += part.1;
    }
}

/// Pairs of a row that are narrowed before they are turned.
const PAIRS: usize = 64;
/// Most rows that lie side by side.
const MOST_ROWS: usize = 32;

thread_local! {
    /// Rows that are narrowed before they are turned, and pairs before they are widened.
    static NARROWED: RefCell<[f32; MOST_ROWS * PAIRS]> = const { RefCell::new([0.0; MOST_ROWS * PAIRS]) };
    static PAIRED: RefCell<[f32; MOST_ROWS * PAIRS]> = const { RefCell::new([0.0; MOST_ROWS * PAIRS]) };
}

/// As [`pack_transposed`], of pairs: `k` counts them. A last one without a neighbour gets a zero.
fn pack_pairs<T: Copy>(
    packed: &mut [f32],
    x: Rows<'_, T>,
    rows: Range<usize>,
    pieces: &[Piece],
    k: Range<usize>,
    width: usize,
    narrowed: impl Fn(&[T], &mut [bf16]),
) {
    NARROWED.with_borrow_mut(|memory| {
        for first in k.clone().step_by(PAIRS) {
            let packed = &mut packed[(first - k.start) * width..];
            let k = first..k.end.min(first + PAIRS);
            // Neighbours in memory are a pair: the earlier one is the lower half of a float's bits.
            let values: &mut [bf16] = bytemuck::cast_slice_mut(memory);
            for (values, row) in values.chunks_exact_mut(2 * PAIRS).zip(rows.clone()) {
                let mut filled = 0;
                for part in parts(pieces, 2 * k.start..2 * k.end) {
                    narrowed(x.part(row, part), &mut values[filled..][..part.1]);
                    filled += part.1;
                }
                values[filled..2 * k.len()].fill(bf16::ZERO);
            }
            turn(packed, Rows::new(memory, rows.len(), PAIRS), 0..rows.len(), (0, k.len()), width);
        }
    });
}

/// As [`pack_pairs`], of floats: whole lines in one pass.
fn narrow_pairs(packed: &mut [f32], x: Rows<'_>, rows: Range<usize>, pieces: &[Piece], k: Range<usize>, width: usize) {
    let mut of_k = parts(pieces, 2 * k.start..2 * k.end);
    let done = match (of_k.next(), of_k.next()) {
        (Some(part), None) => turn_lines(packed, x, rows.clone(), part, width) / 2,
        _ => 0,
    };
    pack_pairs(&mut packed[done * width..], x, rows, pieces, k.start + done..k.end, width, narrow);
}

/// As [`pack_pairs`], but both of each pair as floats: `[k][2][width]`.
fn pack_wide_pairs(packed: &mut [f32], x: Rows<'_>, rows: Range<usize>, pieces: &[Piece], k: Range<usize>, width: usize) {
    PAIRED.with_borrow_mut(|memory| {
        for first in k.clone().step_by(PAIRS) {
            let (packed, k) = (&mut packed[2 * (first - k.start) * width..], first..k.end.min(first + PAIRS));
            let pairs = &mut memory[..k.len() * width];
            pack_pairs(pairs, x, rows.clone(), pieces, k, width, narrow);
            widen_pairs(pairs, width, packed);
        }
    });
}

/// As [`pack_pairs`], but `[k / TILE_PAIRS][width][TILE_PAIRS]`.
fn narrow_tiles(packed: &mut [f32], x: Rows<'_>, rows: Range<usize>, pieces: &[Piece], k: Range<usize>, width: usize) {
    let mut of_k = parts(pieces, 2 * k.start..2 * k.end);
    if let (Some(part), None) = (of_k.next(), of_k.next())
        && part.1 == 2 * k.len()
    {
        for (at, row) in rows.enumerate() {
            narrow_lines(x.part(row, part), &mut packed[at * TILE_PAIRS..], width * TILE_PAIRS);
        }
        return;
    }
    let mut memory = [0f32; K_STEP];
    for first in k.clone().step_by(K_STEP) {
        let packed = &mut packed[(first - k.start) * width..];
        let k = first..k.end.min(first + K_STEP);
        let values: &mut [bf16] = bytemuck::cast_slice_mut(&mut memory);
        for (at, row) in rows.clone().enumerate() {
            let mut filled = 0;
            for part in parts(pieces, 2 * k.start..2 * k.end) {
                narrow(x.part(row, part), &mut values[filled..][..part.1]);
                filled += part.1;
            }
            values[filled..2 * k.len()].fill(bf16::ZERO);
            put_row(packed, bytemuck::cast_slice(&values[..2 * k.len()]), at, width);
        }
    }
}

/// A row's pairs to place `at` of each tile of `width` rows. What the last one has more is left as it is.
fn put_row(packed: &mut [f32], row: &[f32], at: usize, width: usize) {
    let mut tiles = packed.chunks_exact_mut(width * TILE_PAIRS).map(|tile| &mut tile[at * TILE_PAIRS..][..TILE_PAIRS]);
    let (whole, rest) = row.as_chunks::<TILE_PAIRS>();
    tiles.by_ref().zip(whole).for_each(|(to, pairs)| to.copy_from_slice(pairs));
    if let Some(to) = tiles.next() {
        to[..rest.len()].copy_from_slice(rest);
    }
}

/// At most `width` rows side by side, as `[k][width]`; what stands in the places of absent rows is left as it is.
fn pack_transposed<T: Copy>(
    packed: &mut [T],
    x: Rows<'_, T>,
    rows: Range<usize>,
    pieces: &[Piece],
    k: Range<usize>,
    width: usize,
) {
    for (at, row) in rows.enumerate() {
        let mut to = at;
        for part in parts(pieces, k.clone()) {
            let run = x.part(row, part);
            let packed = &mut packed[to..to + (run.len() - 1) * width + 1];
            for (i, x) in run.iter().enumerate() {
                packed[i * width] = *x;
            }
            to += run.len() * width;
        }
    }
}
