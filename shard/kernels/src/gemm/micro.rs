//! The innermost products. One file for each instruction set; whatever is not a [`MicroKernel`] is the same for all.
#![allow(unsafe_code)] // pointers into packed panels, and code for more than the baseline CPU

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
use std::fmt;
#[cfg(target_arch = "x86_64")]
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::{self, NonNull};
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use crate::cpu::{self, Path, vectorised};
use crate::gemm::bytes::{BLOCK, Bytes, Scales};
use crate::gemm::plane::bias_of;
use crate::gemm::{Plane, Rows};
#[cfg(target_arch = "x86_64")]
use crate::limit;
use crate::rows;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_int8;
#[cfg(target_arch = "x86_64")]
mod avx2_pairs;
#[cfg(target_arch = "x86_64")]
mod avx2_tiles;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
#[cfg(target_arch = "x86_64")]
mod avx512_int8;
#[cfg(target_arch = "x86_64")]
mod avx512_pairs;
mod plain;
mod plain_bf16;
mod plain_int8;
mod plain_tiles;
#[cfg(target_arch = "x86_64")]
mod vector;
#[cfg(target_arch = "x86_64")]
mod vector_int8;
#[cfg(target_arch = "x86_64")]
mod vector_pairs;

/// Largest tile of any kernel, for results at the edge.
pub(crate) const MAX_TILE: usize = 1024;
/// Pairs of K that a tile of bf16 covers.
pub(crate) const TILE_PAIRS: usize = 16;
/// Levels of the tree of chunks, and floats of a tile's results that wait in it or are on their way.
const LEVELS: usize = 3;
pub(crate) const WAITING: usize = (LEVELS + 1) * MAX_TILE;
/// How much of K is multiplied between two looks ahead.
const BETWEEN_FETCHES: usize = 16;
/// Bytes of the caches that are fetched together.
const LINE: usize = 64;

/// What panels are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Takes {
    /// Floats.
    Floats,
    /// Two of bf16, neighbours in K, in the bits of a float: the earlier one in the lower half.
    Pairs,
    /// The same of weights; inputs are both of each pair as floats, `[k][2][mr]`, the later one first.
    PairsByFloats,
    /// Pairs of weights; inputs are `[k / TILE_PAIRS][mr][TILE_PAIRS]`. Of whole tiles, filled up with zeros.
    Tiles,
    /// Blocks of K in 8 bits.
    Blocks(Bytes),
}

/// In which order products of bf16 are added, in f32. Each has bits of its own, the same on every CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// That of the instruction of AVX-512 BF16: by pairs, the later one first.
    Pairs,
    /// That of AMX: the earlier and the later ones of sixteen pairs are a chain each, and both together are added.
    Tiles,
}

impl Order {
    /// Both.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 2] = [Self::Pairs, Self::Tiles];
}

/// Multiplies a few rows by one panel of columns.
pub struct MicroKernel {
    name: &'static str,
    /// Rows of a tile.
    pub(crate) mr: usize,
    /// Columns of a tile, and of a packed panel.
    pub(crate) nr: usize,
    pub(crate) takes: Takes,
    tile: unsafe fn(Tile),
    /// Whether a call passes several chunks, and adds what results get besides.
    chunks: bool,
    /// Of tiles, the same of inputs that are read from where they lie, if there is a way.
    lines: Option<unsafe fn(Lines)>,
    /// Whether rows of `b` may lie anywhere.
    places: bool,
    /// As many rounds of multiply-adds as it is told, in registers alone: what the CPU can do at most.
    spin: unsafe fn(usize) -> f32,
    /// Multiplications and additions of a round.
    flops: usize,
}

/// Packed operands of one tile, and where its results are.
#[derive(Clone, Copy)]
struct Tile {
    /// 1 to `mr`.
    rows: usize,
    /// How many such tiles of `mr` rows there are, one below the other. One, if the kernel is not for several chunks.
    down: usize,
    /// Floats, pairs or blocks, of all chunks together.
    k: usize,
    /// Of each chunk. One, if the kernel is not for several.
    depths: *const usize,
    chunks: usize,
    /// `[levels of the chunks' tree][mr][nr]`: results that wait for their neighbours.
    waiting: *mut f32,
    /// `[k][mr]`; of tiles, what [`Takes`] says; of blocks, what [`Bytes`] says, here and in `b`.
    a: *const f32,
    /// `[k][nr]`.
    b: *const f32,
    /// Where in `b` each of its rows begins, if they do not lie one after the other.
    places: Option<NonNull<usize>>,
    /// `[rows][nr]`, rows `stride` apart.
    c: *mut f32,
    stride: usize,
    /// Whether the sums start from zero, not from what is in `c`. So do those of several chunks.
    fresh: bool,
    /// What is added to the results: a number for each row, and then rows like those of `c` and how far they are apart. None, if the kernel is
    /// not for several chunks.
    bias: Option<NonNull<f32>>,
    more: Option<(NonNull<f32>, usize)>,
    /// What is read soon, for the second-level cache.
    ahead: Ahead,
}

impl Tile {
    /// A row of results.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn results(&self, row: usize) -> Ahead {
        Ahead { from: self.c.wrapping_add(row * self.stride).cast(), of_each: 0 }
    }

    /// Has all rows fetched that are written in the end.
    fn fetch_results(&self, columns: usize) {
        #[cfg(target_arch = "x86_64")]
        for row in 0..self.rows {
            let lines = (size_of::<f32>() * columns).div_ceil(LINE);
            self.results(row).fetch::<_MM_HINT_ET0>(lines);
            self.added(row).fetch::<_MM_HINT_T0>(lines);
        }
    }

    /// A row of what is added to them; of results, if there is none.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn added(&self, row: usize) -> Ahead {
        self.more.map_or(self.results(row), |(more, stride)| Ahead {
            from: more.as_ptr().wrapping_add(row * stride).cast(),
            of_each: 0,
        })
    }
}

/// What is added to results on their way out.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct More<'a> {
    /// A number for each row.
    pub(crate) bias: Option<&'a [f32]>,
    /// Then rows.
    pub(crate) rows: Option<Rows<'a>>,
}

impl<'a> More<'a> {
    /// What is for some rows, of so many columns.
    fn part(&self, rows: Range<usize>, columns: usize) -> Self {
        let of_rows = |of: Rows<'a>| {
            assert!(of.data.len() >= (rows.end - 1) * of.stride + columns, "{rows:?} of {columns}");
            Rows::new(&of.data[rows.start * of.stride..], rows.len(), of.stride)
        };
        Self { bias: self.bias.map(|bias| &bias[rows.clone()]), rows: self.rows.map(of_rows) }
    }
}

vectorised! {
    /// Puts results where they belong, and adds what [`More`] says.
    fn put(from: Rows<'_>, bias: &[f32], more: Option<Rows<'_>>, to: &mut Plane<'_>) {
        let columns = (0, to.columns());
        for row in 0..to.rows() {
            let (bias, sums) = (bias_of(bias, row), to.unread_row(row).iter_mut().zip(from.part(row, columns)));
            match more {
                Some(more) => {
                    let more = more.part(row, columns);
                    sums.zip(more).for_each(|((to, from), more)| *to = MaybeUninit::new(from + bias + more));
                }
                None => sums.for_each(|(to, from)| *to = MaybeUninit::new(from + bias)),
            }
        }
    }
}

/// A packed panel, or one whose rows lie anywhere.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a> {
    floats: &'a [f32],
    /// Where each row begins, each behind the one before it.
    places: Option<&'a [usize]>,
}

impl<'a> From<&'a [f32]> for Panel<'a> {
    fn from(floats: &'a [f32]) -> Self {
        Self { floats, places: None }
    }
}

impl<'a> Panel<'a> {
    /// Rows that begin at places of `floats`, for a kernel that [reads such](MicroKernel::reads_places).
    pub(crate) fn at(floats: &'a [f32], places: &'a Places) -> Self {
        Self { floats, places: Some(&places.0) }
    }

    /// Floats that `kernel` reads of it for `k`.
    fn reach(&self, kernel: &MicroKernel, k: usize) -> usize {
        match self.places {
            None => kernel.panel_len(k),
            Some(places) => {
                assert!(kernel.places, "a kernel that reads places");
                places[..k].last().map_or(0, |last| last + kernel.nr)
            }
        }
    }

    fn places(&self) -> Option<NonNull<usize>> {
        self.places.map(|places| NonNull::from(places).cast())
    }

    /// What is left of it behind `k`.
    fn behind(self, kernel: &MicroKernel, k: usize) -> Self {
        match self.places {
            None => Self { floats: &self.floats[kernel.panel_len(k)..], ..self },
            Some(places) => Self { places: Some(&places[k..]), ..self },
        }
    }
}

/// Where the rows of a panel begin that do not lie one after the other: each behind the one before it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places(Vec<usize>);

impl Places {
    pub(crate) fn new(places: Vec<usize>) -> Self {
        assert!(places.is_sorted(), "rows one behind the other");
        Self(places)
    }
}

/// Memory to fetch, so many bytes for each of `k`: what is asked for in one go waits for itself, so it is fetched bit by bit, by kernels that
/// fetch. It may be anywhere: nothing is read.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const u8,
    of_each: usize,
}

impl Ahead {
    fn of(bytes: &[u8], k: usize) -> Self {
        Self { from: bytes.as_ptr(), of_each: bytes.len().div_ceil(k.max(1)) }
    }

    /// What is left of it behind `k`.
    fn behind(self, k: usize) -> Self {
        Self { from: self.from.wrapping_add(self.of_each * k), ..self }
    }

    /// Lines to fetch for `k` of them.
    fn lines(self, k: usize) -> usize {
        (self.of_each * k).div_ceil(LINE)
    }

    /// Fetches some lines into the caches that `HINT` says, and goes on behind them.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn fetch<const HINT: i32>(&mut self, lines: usize) {
        for _ in 0..lines {
            // SAFETY: the instruction only hints, whatever is there.
            unsafe { _mm_prefetch::<HINT>(self.from.cast()) };
            self.from = self.from.wrapping_add(LINE);
        }
    }
}

/// Operands of a tile whose inputs lie in lines of [`TILE_PAIRS`], and where its results are.
struct Lines {
    /// 1 to `mr`; there are lines for `mr`.
    rows: usize,
    /// The first row's.
    a: *const f32,
    /// Floats from a row to the next.
    apart: usize,
    /// Of each step, the floats from `a` to its first line.
    steps: *const usize,
    count: usize,
    /// `[count][TILE_PAIRS][nr]`.
    b: *const f32,
    /// `[rows][nr]`, rows `stride` apart.
    c: *mut f32,
    stride: usize,
}

impl MicroKernel {
    /// Rows of a panel that `k` products make.
    pub(crate) fn depth(&self, k: usize) -> usize {
        match self.takes {
            Takes::Floats => k,
            Takes::Pairs | Takes::PairsByFloats => k.div_ceil(2),
            Takes::Tiles => self.whole(k.div_ceil(2)),
            Takes::Blocks(_) => k.div_ceil(BLOCK),
        }
    }

    /// The next `depth` that it can pass.
    pub(crate) fn whole(&self, depth: usize) -> usize {
        if self.takes == Takes::Tiles { depth.next_multiple_of(TILE_PAIRS) } else { depth }
    }

    /// How it wants blocks of 8 bits, if it multiplies them.
    pub(crate) fn blocks(&self) -> Option<Bytes> {
        if let Takes::Blocks(bytes) = self.takes { Some(bytes) } else { None }
    }

    /// Whether it multiplies pairs of bf16.
    pub(crate) fn pairs(&self) -> bool {
        matches!(self.takes, Takes::Pairs | Takes::PairsByFloats | Takes::Tiles)
    }

    /// Floats of one row of inputs, `depth` deep.
    pub(crate) fn input_len(&self, depth: usize) -> usize {
        match self.takes {
            Takes::Floats | Takes::Pairs | Takes::Tiles => depth,
            Takes::PairsByFloats => 2 * depth,
            Takes::Blocks(bytes) => depth * bytes.input_words(),
        }
    }

    /// Floats of a panel of weights, `depth` deep.
    pub(crate) fn panel_len(&self, depth: usize) -> usize {
        match self.takes {
            Takes::Floats | Takes::Pairs | Takes::PairsByFloats | Takes::Tiles => depth * self.nr,
            Takes::Blocks(bytes) => depth * bytes.weight_bytes(self.nr) / size_of::<f32>(),
        }
    }

    /// Of a panel that is read next, the bytes to fetch beside each tile of `rows` that are multiplied with the one before it.
    pub(crate) fn share_of_panel(&self, depth: usize, rows: usize) -> usize {
        (size_of::<f32>() * self.panel_len(depth)).div_ceil(rows.div_ceil(self.mr).max(1)).max(1)
    }

    /// The fastest one that this CPU runs.
    pub fn best() -> &'static Self {
        Self::of(cpu::path())
    }

    /// Every one that this CPU runs, the slowest first.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<&'static Self> {
        let paths: &[Path] = match cpu::path() {
            Path::Plain => &[Path::Plain],
            Path::Avx2 => &[Path::Plain, Path::Avx2],
            Path::Avx512 => &[Path::Plain, Path::Avx2, Path::Avx512],
        };
        paths.iter().map(|path| Self::of(*path)).collect()
    }

    /// The one of a path that this CPU has.
    pub(crate) fn of(path: Path) -> &'static Self {
        match path {
            Path::Plain => &plain::KERNEL,
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => &avx2::KERNEL,
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => &avx512::KERNEL,
            #[cfg(not(target_arch = "x86_64"))]
            Path::Avx2 | Path::Avx512 => &plain::KERNEL,
        }
    }

    /// The fastest one for products of bf16 that this CPU runs. All of an order give the same bits: those of the instruction, which rounds
    /// after each addition and takes what is too small to be normal for zero.
    pub fn bf16(order: Order) -> &'static Self {
        #[cfg(target_arch = "x86_64")]
        if cpu::path() != Path::Plain {
            return match order {
                Order::Pairs if has_fast_pairs() => &avx512_bf16::KERNEL,
                Order::Pairs if cpu::path() == Path::Avx512 => &avx512_pairs::KERNEL,
                Order::Pairs => &avx2_pairs::KERNEL,
                Order::Tiles if cpu::has_amx() => &amx::KERNEL,
                Order::Tiles => &avx2_tiles::KERNEL,
            };
        }
        match order {
            Order::Pairs => &plain_bf16::KERNEL,
            Order::Tiles => &plain_tiles::KERNEL,
        }
    }

    /// Every one for bf16 that this CPU runs.
    #[cfg(test)]
    pub(crate) fn all_bf16() -> Vec<&'static Self> {
        Order::ALL.map(Self::all_in).concat()
    }

    /// Those of one order.
    #[cfg(test)]
    pub(crate) fn all_in(order: Order) -> Vec<&'static Self> {
        let mut all = vec![if order == Order::Pairs { &plain_bf16::KERNEL } else { &plain_tiles::KERNEL }];
        #[cfg(target_arch = "x86_64")]
        if cpu::path() != Path::Plain {
            all.push(if order == Order::Pairs { &avx2_pairs::KERNEL } else { &avx2_tiles::KERNEL });
            match order {
                Order::Pairs => {
                    all.extend((cpu::path() == Path::Avx512).then_some(&avx512_pairs::KERNEL));
                    all.extend(cpu::has_bf16().then_some(&avx512_bf16::KERNEL));
                }
                Order::Tiles => all.extend(cpu::has_amx().then_some(&amx::KERNEL)),
            }
        }
        all
    }

    /// The fastest one in 8 bits that this CPU runs. All give the same bits.
    pub(crate) fn int8(scales: Scales) -> &'static Self {
        #[cfg(target_arch = "x86_64")]
        if cpu::path() != Path::Plain && cpu::has_halves() {
            return &if cpu::has_int8() { &avx512_int8::KERNELS } else { &avx2_int8::KERNELS }[scales as usize];
        }
        &plain_int8::KERNELS[scales as usize]
    }

    /// Every one in 8 bits that this CPU runs.
    #[cfg(test)]
    pub(crate) fn all_int8(scales: Scales) -> Vec<&'static Self> {
        let mut all = vec![&plain_int8::KERNELS[scales as usize]];
        #[cfg(target_arch = "x86_64")]
        if cpu::path() != Path::Plain && cpu::has_halves() {
            all.push(&avx2_int8::KERNELS[scales as usize]);
        }
        if cpu::has_int8() {
            all.push(Self::int8(scales));
        }
        all
    }

    /// Spends `rounds` rounds of [`Self::flops_per_round`] in registers.
    pub(crate) fn spin(&self, rounds: usize) -> f32 {
        // SAFETY: `best` chose what the CPU runs.
        unsafe { (self.spin)(rounds) }
    }

    pub(crate) fn flops_per_round(&self) -> usize {
        self.flops
    }

    /// `c += a b` over `k` (or `c = a b` if `fresh`), each result one chain in the order of `k`. `a: [k][mr]`, `b: [k][nr]`, or what
    /// [`Takes`] says; `c` has at most `mr` rows and `nr` columns, and what `a` and `b` hold for more is not looked at or left over. While it
    /// works, `ahead` is fetched.
    pub(crate) fn run(&self, k: usize, a: &[f32], b: &[f32], mut c: Plane<'_>, fresh: bool, ahead: &[u8]) {
        let (rows, columns) = (c.rows(), c.columns());
        let operands = self.operands(&k, 1, (a, b.into()), &mut c);
        let tile = Tile { fresh, ahead: Ahead::of(ahead, k), ..operands };
        if columns == self.nr {
            // SAFETY: the panels hold `k` columns and rows, `c` is a whole tile, and `best` chose what the CPU runs.
            return unsafe { (self.tile)(tile) };
        }
        let mut whole = [0.0; MAX_TILE];
        if !fresh {
            (0..rows).for_each(|row| whole[row * self.nr..][..columns].copy_from_slice(c.row(row)));
        }
        // SAFETY: as above; `whole` takes `mr` by `nr` results (`every_kernel_fits_the_edge` shows it).
        unsafe { (self.tile)(Tile { c: whole.as_mut_ptr(), stride: self.nr, ..tile }) };
        (0..rows).for_each(|row| c.row_mut(row).copy_from_slice(&whole[row * self.nr..][..columns]));
    }

    /// As [`Self::run`], of any number of rows, whose inputs lie tile by tile.
    pub(crate) fn run_down(&self, k: usize, a: &[f32], b: &[f32], c: &mut Plane<'_>, fresh: bool) {
        let (rows, columns, of_row) = (c.rows(), c.columns(), self.input_len(k));
        let down = if self.chunks && columns == self.nr { rows / self.mr } else { 0 };
        if down > 0 {
            let mut c = c.part(0..down * self.mr, 0..columns);
            let operands = self.operands(&k, down, (a, b.into()), &mut c);
            // SAFETY: the panels hold `k` columns and rows, `c` is of so many whole tiles, and `best` chose what the CPU runs.
            unsafe { (self.tile)(Tile { fresh, ..operands }) };
        }
        for row in (down * self.mr..rows).step_by(self.mr) {
            self.run(k, &a[row * of_row..], b, c.part(row..rows.min(row + self.mr), 0..columns), fresh, &[]);
        }
    }

    /// One chunk of `a` and `b`, from zero, where nothing is fetched: `down` tiles of as many rows.
    fn operands(&self, k: &usize, down: usize, (a, b): (&[f32], Panel<'_>), c: &mut Plane<'_>) -> Tile {
        let (rows, columns) = (c.rows() / down, c.columns());
        assert!((1..=self.mr).contains(&rows) && (1..=self.nr).contains(&columns), "a tile of {rows} by {columns}");
        assert!(c.rows() == down * rows, "{down} tiles of {rows} rows");
        assert!(a.len() >= down * self.mr * self.input_len(*k) && b.floats.len() >= b.reach(self, *k), "panels of {k}");
        Tile {
            rows,
            down,
            k: *k,
            depths: k,
            chunks: 1,
            waiting: ptr::null_mut(),
            a: a.as_ptr(),
            b: b.floats.as_ptr(),
            places: b.places(),
            c: c.as_mut_ptr(),
            stride: c.stride(),
            fresh: true,
            bias: None,
            more: None,
            ahead: Ahead::of(&[], *k),
        }
    }

    /// `c = a b + more`, where K is in chunks of the given depths (1, 2, 4 or 8 of them) whose results are added as a balanced binary tree;
    /// those that wait for others do so in `waiting`, [`WAITING`] floats. The inputs of `c`'s rows lie in tiles of `height` of them, `mr` at
    /// most; `c` need not have been written. While it works, `ahead` is fetched.
    pub(crate) fn run_chunks(
        &self,
        (depths, height): (&[usize], usize),
        (a, b): (&[f32], Panel<'_>),
        waiting: &mut [f32],
        c: &mut Plane<'_>,
        more: More<'_>,
        ahead: &[u8],
    ) {
        let (rows, columns, k) = (c.rows(), c.columns(), depths.iter().sum());
        assert!(depths.len().is_power_of_two() && depths.len() <= 1 << LEVELS, "{} chunks", depths.len());
        assert!(waiting.len() >= WAITING, "memory for what waits");
        let in_one_go = self.chunks && columns == self.nr;
        let (tiles, at_once) = (rows.div_ceil(height), if in_one_go { (rows / height).max(1) } else { 1 });
        let (of_tile, ahead) = (self.mr * self.input_len(k), Ahead::of(ahead, k * tiles));
        for first in (0..tiles).step_by(at_once) {
            let (down, a) = (at_once.min(tiles - first), &a[first * of_tile..]);
            let part = first * height..rows.min((first + down) * height);
            let (more, mut c) = (more.part(part.clone(), columns), c.part(part, 0..columns));
            if !in_one_go {
                self.chunk_by_chunk(depths, (a, b), waiting, &mut c, more, ahead.behind(k * first));
                continue;
            }
            let tile = Tile {
                depths: depths.as_ptr(),
                chunks: depths.len(),
                waiting: waiting.as_mut_ptr(),
                bias: more.bias.map(|bias| NonNull::from(bias).cast()),
                more: more.rows.map(|rows| (NonNull::from(rows.data).cast(), rows.stride)),
                ahead: ahead.behind(k * first),
                ..self.operands(&k, down, (a, b), &mut c)
            };
            // SAFETY: the panels hold the chunks' columns and rows, `waiting` their tree's levels, `c` is of whole tiles, there is enough of what is
            // added, and `best` chose what the CPU runs.
            unsafe { (self.tile)(tile) };
        }
    }

    /// As [`Self::run_chunks`], of one tile, by a kernel that makes one chunk at a time, or of fewer columns.
    fn chunk_by_chunk(
        &self,
        depths: &[usize],
        (a, b): (&[f32], Panel<'_>),
        waiting: &mut [f32],
        c: &mut Plane<'_>,
        more: More<'_>,
        ahead: Ahead,
    ) {
        let (rows, k) = (c.rows(), depths.iter().sum());
        let operands = self.operands(&k, 1, (a, b), c);
        let added = more.rows.map(|rows| (NonNull::from(rows.data).cast(), rows.stride));
        Tile { more: added, ..operands }.fetch_results(c.columns());
        if let ([depth], true, More { bias: None, rows: None }) = (depths, c.columns() == self.nr, more) {
            // SAFETY: the panels hold the chunk's columns and rows, `c` is a whole tile, and `best` chose what the CPU runs.
            return unsafe { (self.tile)(Tile { k: *depth, ahead, ..operands }) };
        }
        let (waiting, passing) = waiting.split_at_mut(LEVELS * MAX_TILE);
        let (mut done, len) = (0, rows * self.nr);
        for (chunk, depth) in depths.iter().enumerate() {
            let (level, merges) = (chunk.count_ones() as usize, chunk.trailing_ones() as usize);
            let (a, b, last) = (&a[self.mr * self.input_len(done)..], b.behind(self, done), chunk + 1 == depths.len());
            let waits = |level: usize| level * MAX_TILE..level * MAX_TILE + len;
            let to = if last || merges > 0 { &mut *passing } else { &mut waiting[level * MAX_TILE..] };
            let tile = Tile {
                k: *depth,
                depths: depth,
                a: a.as_ptr(),
                b: b.floats.as_ptr(),
                places: b.places(),
                c: to.as_mut_ptr(),
                stride: self.nr,
                ahead: ahead.behind(done),
                ..operands
            };
            // SAFETY: as above, of one chunk; `to` takes `mr` by `nr` results (`every_kernel_fits_the_edge` shows it).
            unsafe { (self.tile)(tile) };
            done += depth;
            // Earlier chunks on the left: what waits the shortest first.
            for level in (level - merges..level).rev() {
                rows::shift(&mut passing[..len], &waiting[waits(level)]);
            }
            if merges > 0 && !last {
                waiting[waits(level - merges)].copy_from_slice(&passing[..len]);
            }
        }
        put(Rows::new(passing, rows, self.nr), more.bias.unwrap_or_default(), more.rows, c);
    }
}

impl MicroKernel {
    /// Whether rows of a panel may lie anywhere.
    pub(crate) fn reads_places(&self) -> bool {
        self.places
    }
}

/// Whether this CPU has an instruction for pairs of bf16 (AVX-512 BF16) that does more in a time than those for floats, which is tried once:
/// some have one that is half as fast, and multiply pairs as floats. It makes no other bits.
pub fn has_fast_pairs() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static FAST: OnceLock<bool> = OnceLock::new();
        *FAST.get_or_init(|| {
            const ROUNDS: usize = 500;
            let of_each = |kernel: &MicroKernel| {
                let shortest = limit::best_of(9, || {
                    black_box(kernel.spin(black_box(ROUNDS)));
                });
                shortest.as_secs_f64() / kernel.flops as f64
            };
            cpu::has_bf16() && of_each(&avx512_bf16::KERNEL) < of_each(&avx512::KERNEL)
        })
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

impl MicroKernel {
    /// Floats that [`Self::run_lines`] needs for as many steps.
    pub(crate) fn gathered(&self, steps: usize) -> usize {
        if self.lines.is_some() { 0 } else { steps * TILE_PAIRS * self.mr }
    }

    /// `c = a b`, where each step's inputs are `mr` lines of `a`, `apart` from each other from its place in `steps` on. `b: [k][nr]`, of a
    /// kernel of tiles.
    pub(crate) fn run_lines(&self, a: &[f32], steps: &[usize], apart: usize, b: &[f32], mut c: Plane<'_>, gathered: &mut [f32]) {
        let (rows, columns, k) = (c.rows(), c.columns(), steps.len() * TILE_PAIRS);
        assert!(
            self.takes == Takes::Tiles && (1..=self.mr).contains(&rows) && columns == self.nr,
            "a tile of {rows} by {columns}"
        );
        let most = steps.iter().max().map_or(0, |most| most + (self.mr - 1) * apart + TILE_PAIRS);
        assert!(a.len() >= most && b.len() >= self.panel_len(k), "{k} pairs of {most} floats");
        if let (Some(lines), false) = (self.lines, steps.is_empty()) {
            let (a, steps, count) = (a.as_ptr(), steps.as_ptr(), steps.len());
            let stride = c.stride();
            // SAFETY: every step has its lines and its weights, `c` is a whole tile, and `best` chose what the CPU runs.
            return unsafe { lines(Lines { rows, a, apart, steps, count, b: b.as_ptr(), c: c.as_mut_ptr(), stride }) };
        }
        let tiles = gathered.chunks_exact_mut(self.mr * TILE_PAIRS);
        for (step, tile) in steps.iter().zip(tiles) {
            for (row, line) in tile.chunks_exact_mut(TILE_PAIRS).enumerate() {
                line.copy_from_slice(&a[step + row * apart..][..TILE_PAIRS]);
            }
        }
        self.run(k, gathered, b, c, true, &[]);
    }
}

impl fmt::Debug for MicroKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}x{}", self.name, self.mr, self.nr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_fits_the_edge() {
        let int8 = Scales::ALL.map(MicroKernel::all_int8).concat();
        for kernel in [MicroKernel::all(), MicroKernel::all_bf16(), int8].concat() {
            assert!(kernel.mr * kernel.nr <= MAX_TILE, "{kernel:?}");
        }
    }
}
