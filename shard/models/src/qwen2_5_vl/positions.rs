//! Where tokens are, and the rotations that come of it.

use parallel::{DType, Device, Tensor, Tensors, ops};

use super::config::{Qwen25VlConfig, Qwen25VlVisionConfig};
use crate::{Error, Result};

/// Most patches of one picture; at 14 pixels a side, 3584 x 3584 pixels.
const MAX_PATCHES: usize = 1 << 16;

/// Time, height and width of a token.
type Position = [u32; 3];

/// The pictures that the text speaks of, in the order of their tokens.
#[derive(Clone, Debug, Default)]
pub(super) struct Pictures(Vec<Grid>);

/// A picture's patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    pub(super) height: usize,
    pub(super) width: usize,
}

impl Pictures {
    /// From `image_grid_thw: [pictures, 3]`, which must be there if there are `pixel_values`.
    pub(super) fn of(inputs: &Tensors, vision: &Qwen25VlVisionConfig) -> Result<Self> {
        if inputs.find("pixel_values").is_none() && inputs.find("image_grid_thw").is_none() {
            return Ok(Self::default());
        }
        let grids = inputs.get("image_grid_thw")?;
        let side = |n: i64| {
            usize::try_from(n).ok().filter(|n| (1..=MAX_PATCHES).contains(n) && n.is_multiple_of(vision.spatial_merge_size))
        };
        let grid = |thw: Vec<i64>| match *thw.as_slice() {
            [1, h, w] if side(h).zip(side(w)).is_some_and(|(h, w)| h * w <= MAX_PATCHES) => {
                Ok(Grid { height: h as usize, width: w as usize })
            }
            _ => Err(Error::Invalid {
                field: "image_grid_thw",
                reason: format!(
                    "{thw:?} is not one frame of at most {MAX_PATCHES} patches in squares of {}",
                    vision.spatial_merge_size
                ),
            }),
        };
        let rows = grids.to_dtype(DType::I64)?.to_vec2::<i64>()?;
        Ok(Self(rows.into_iter().map(grid).collect::<Result<_>>()?))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn grids(&self) -> &[Grid] {
        &self.0
    }

    /// Of all of them.
    pub(super) fn patches(&self) -> usize {
        self.0.iter().map(|grid| grid.height * grid.width).sum()
    }
}

/// `get_rope_index`: by item and token. Text goes on by one on all axes. A picture's tokens share one time and lie on a grid from
/// there on; text goes on behind its longer side. Padding does not count, and lies at zero. Without pictures the reference counts
/// from the first token, padding or not.
pub(super) fn of(inputs: &Tensors, pictures: &Pictures, config: &Qwen25VlConfig) -> Result<Vec<Vec<Position>>> {
    let ids = inputs.get("input_ids")?.to_dtype(DType::I64)?.to_vec2::<i64>()?;
    if pictures.is_empty() {
        return Ok(ids.iter().map(|ids| (0..ids.len() as u32).map(|i| [i; 3]).collect()).collect());
    }
    let mask = inputs.find("attention_mask").map(|mask| mask.to_dtype(DType::I64)?.to_vec2::<i64>()).transpose()?;
    let mut grids = pictures.grids().iter();
    let mut items = Vec::with_capacity(ids.len());
    for (item, ids) in ids.iter().enumerate() {
        let real = |i: &usize| mask.as_ref().and_then(|mask| mask.get(item)?.get(*i)).is_none_or(|real| *real != 0);
        let tokens: Vec<usize> = (0..ids.len()).filter(real).collect();
        let mut positions = vec![[0; 3]; ids.len()];
        let mut next = 0;
        for run in tokens.chunk_by(|a, b| (ids[*a] == config.image_token_id) == (ids[*b] == config.image_token_id)) {
            if ids[run[0]] == config.image_token_id {
                let (places, end) = grid_positions(grids.next(), run.len(), next, config.vision.spatial_merge_size)?;
                run.iter().zip(places).for_each(|(token, place)| positions[*token] = place);
                next = end;
            } else {
                for token in run {
                    positions[*token] = [next; 3];
                    next += 1;
                }
            }
        }
        items.push(positions);
    }
    match grids.len() {
        0 => Ok(items),
        left => Err(Error::Invalid { field: "input_ids", reason: format!("{left} pictures have no tokens") }),
    }
}

/// The places of a picture's tokens from `start` on, and where the text goes on.
fn grid_positions(grid: Option<&Grid>, tokens: usize, start: u32, merge: usize) -> Result<(Vec<Position>, u32)> {
    let (height, width) = grid.map_or((0, 0), |grid| (grid.height / merge, grid.width / merge));
    if height * width != tokens {
        let reason = format!("{tokens} tokens for a picture of {height} x {width}");
        return Err(Error::Invalid { field: "input_ids", reason });
    }
    let place = |i: usize| [start, start + (i / width) as u32, start + (i % width) as u32];
    Ok(((0..tokens).map(place).collect(), start + height.max(width) as u32))
}

/// `[3, B, L]`
pub(super) fn tensor(positions: &[Vec<Position>]) -> Result<Tensor> {
    let length = positions.first().map_or(0, Vec::len);
    let axis = |axis: usize| positions.iter().flatten().map(move |position| i64::from(position[axis]));
    let values: Vec<i64> = (0..3).flat_map(axis).collect();
    Ok(Tensor::from_vec(values, (3, positions.len(), length), &Device::Cpu)?)
}

/// Rotations by position, of pairs half a head apart.
#[derive(Clone, Debug)]
pub(super) struct Rope {
    /// `[B, L, Dh/2]`
    pub(super) cos: Tensor,
    /// `[B, L, Dh/2]`
    pub(super) sin: Tensor,
}

impl Rope {
    /// From angles, item by item and token by token, `width` each.
    pub(super) fn of_angles(angles: &[f32], [items, tokens, width]: [usize; 3]) -> Result<Self> {
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|angle| f(f64::from(*angle)) as f32).collect();
            Tensor::from_vec(values, (items, tokens, width), &Device::Cpu)
        };
        Ok(Self { cos: table(libm::cos)?, sin: table(libm::sin)? })
    }

    /// `x: [B, N, L, Dh]`
    pub(super) fn turn(&self, x: &Tensor) -> Result<Tensor> {
        let table = |t: &Tensor| t.to_device(x.device())?.to_dtype(x.dtype());
        Ok(ops::rope_halves(x, &table(&self.cos)?, &table(&self.sin)?)?)
    }
}

/// `1 / theta^(2 i / width)` for each pair of `width` numbers, as f32: the reference multiplies positions with these rounded.
pub(super) fn frequencies(theta: f64, width: usize) -> Vec<f32> {
    (0..width / 2).map(|i| 1.0 / libm::pow(theta, f64::from((2 * i) as f32 / width as f32)) as f32).collect()
}

/// `Qwen2_5_VLRotaryEmbedding`: each frequency turns by one axis.
#[derive(Debug)]
pub(super) struct MultimodalRope {
    /// With its axis.
    frequencies: Vec<(f32, usize)>,
}

impl MultimodalRope {
    pub(super) fn new(config: &Qwen25VlConfig) -> Self {
        let sections = config.mrope_section.iter().enumerate();
        let axes = sections.flat_map(|(i, count)| std::iter::repeat_n(i % 3, *count));
        Self { frequencies: frequencies(config.rope_theta, config.head_dim()).into_iter().zip(axes).collect() }
    }

    pub(super) fn tables(&self, positions: &[Vec<Position>]) -> Result<Rope> {
        let angles = |position: &Position| {
            let position = *position;
            self.frequencies.iter().map(move |(frequency, axis)| position[*axis] as f32 * frequency)
        };
        let tokens = positions.first().map_or(0, Vec::len);
        let angles: Vec<f32> = positions.iter().flatten().flat_map(angles).collect();
        Rope::of_angles(&angles, [positions.len(), tokens, self.frequencies.len()])
    }
}
