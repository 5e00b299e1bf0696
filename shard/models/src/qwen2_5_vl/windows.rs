//! The order in which the vision tower works on patches: window by window.

use super::config::Qwen25VlVisionConfig;
use super::positions::{Grid, Pictures, Rope, frequencies};
use crate::Result;

/// Base of the tower's rotary frequencies.
const THETA: f64 = 10_000.0;

/// The patches of some pictures, window by window.
#[derive(Debug)]
pub(super) struct Windows {
    /// Squares of patches (each becomes one token) in the order they are worked on.
    pub(super) order: Vec<u32>,
    /// Patches of each window, in that order.
    pub(super) windows: Vec<usize>,
    /// Patches of each picture.
    pub(super) pictures: Vec<usize>,
    /// Height and width of each patch, in that order.
    places: Vec<[u32; 2]>,
}

impl Windows {
    /// `get_vision_window_index` and `get_vision_position_ids`. Windows at the right and below may be smaller.
    pub(super) fn of(pictures: &Pictures, config: &Qwen25VlVisionConfig) -> Self {
        let (side, merge, unit) = (config.window_tokens(), config.spatial_merge_size, config.merge_unit());
        let mut all = Self { order: Vec::new(), windows: Vec::new(), pictures: Vec::new(), places: Vec::new() };
        let mut first = 0;
        for Grid { height, width } in pictures.grids().iter().copied() {
            let (rows, columns) = (height / merge, width / merge);
            for (top, left) in (0..rows).step_by(side).flat_map(|top| (0..columns).step_by(side).map(move |left| (top, left))) {
                let before = all.order.len();
                for (y, x) in (top..rows.min(top + side)).flat_map(|y| (left..columns.min(left + side)).map(move |x| (y, x))) {
                    all.order.push((first + y * columns + x) as u32);
                    all.places.extend((0..unit).map(|i| [(y * merge + i / merge) as u32, (x * merge + i % merge) as u32]));
                }
                all.windows.push((all.order.len() - before) * unit);
            }
            all.pictures.push(height * width);
            first += rows * columns;
        }
        all
    }

    /// Patches in the order they are worked on.
    pub(super) fn patches(&self, unit: usize) -> Vec<u32> {
        self.order.iter().flat_map(|square| (0..unit as u32).map(move |i| square * unit as u32 + i)).collect()
    }

    /// Where in that order each square is.
    pub(super) fn reverse(&self) -> Vec<u32> {
        let mut reverse = vec![0; self.order.len()];
        self.order.iter().enumerate().for_each(|(i, square)| reverse[*square as usize] = i as u32);
        reverse
    }

    /// `Qwen2_5_VLVisionRotaryEmbedding`: half of a head's pairs turn by height, half by width.
    pub(super) fn rope(&self, head_dim: usize) -> Result<Rope> {
        let frequencies = frequencies(THETA, head_dim / 2);
        let angles: Vec<f32> = self.places.iter().flatten().flat_map(|at| frequencies.iter().map(|f| *at as f32 * f)).collect();
        Rope::of_angles(&angles, [1, self.places.len(), 2 * frequencies.len()])
    }
}

#[cfg(test)]
mod tests {
    use parallel::{Device, Tensor, Tensors};

    use super::*;

    #[test]
    fn windows_at_the_edge_are_smaller_and_pictures_do_not_share_one() {
        let config = Qwen25VlVisionConfig { window_size: 56, ..Qwen25VlVisionConfig::default() }; // two tokens a side
        let grids = Tensor::new(&[[1i64, 6, 8], [1, 2, 2]], &Device::Cpu).unwrap();
        let pictures = Pictures::of(&Tensors::new().with("image_grid_thw", grids), &config).unwrap();
        let windows = Windows::of(&pictures, &config);
        assert_eq!(windows.order, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!(windows.windows, [16, 16, 8, 8, 4]);
        assert_eq!(windows.pictures, [48, 4]);
        assert_eq!(windows.places[..6], [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]);
        assert_eq!(windows.patches(4)[8..12], [16, 17, 18, 19]);
        assert_eq!(windows.reverse()[..6], [0, 1, 4, 5, 2, 3]);
    }
}
