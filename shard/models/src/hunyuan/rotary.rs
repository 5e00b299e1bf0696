//! Where tokens are: `get_2d_rotary_pos_embed` of the part of a square that a picture's shape covers.

use parallel::{Device, Tensor};

use crate::Result;

/// Pixels of the square's side.
const BASE_SIZE: usize = 512;
/// Longest period.
const THETA: f64 = 10_000.0;

/// Cosines and sines of `rows x columns` tokens of `patch_size` latents for heads of `width`, a multiple of 4: `[L, width]` each, first of the column,
/// then of the row, every number twice.
pub(super) fn rotary_pos_embed(width: usize, [rows, columns]: [usize; 2], patch_size: usize) -> Result<[Tensor; 2]> {
    let [(top, bottom), (left, right)] = region([rows, columns], BASE_SIZE / super::SCALE_FACTOR / patch_size);
    let (by_row, by_column) = (angles(width, &places(top, bottom, rows)), angles(width, &places(left, right, columns)));
    let table = |of: fn(f64) -> f64| -> Result<Tensor> {
        let twice = |angles: &[f32]| angles.iter().flat_map(|angle| [of(f64::from(*angle)) as f32; 2]).collect::<Vec<_>>();
        let (by_row, by_column) =
            (by_row.iter().map(|a| twice(a)).collect::<Vec<_>>(), by_column.iter().map(|a| twice(a)).collect::<Vec<_>>());
        let mut table = Vec::with_capacity(rows * columns * width);
        for row in &by_row {
            for column in &by_column {
                table.extend_from_slice(column);
                table.extend_from_slice(row);
            }
        }
        Ok(Tensor::from_vec(table, (rows * columns, width), &Device::Cpu)?)
    };
    Ok([table(libm::cos)?, table(libm::sin)?])
}

/// `get_resize_crop_region_for_grid`: from where to where a picture reaches, down and across, that fits a square of `side` and is in its middle.
fn region([rows, columns]: [usize; 2], side: usize) -> [(i64, i64); 2] {
    let (h, w, side) = (rows as f64, columns as f64, side as f64);
    // As Python rounds.
    let whole = |x: f64| x.round_ties_even();
    let (height, width) = if h / w > 1.0 { (side, whole(side / h * w)) } else { (whole(side / w * h), side) };
    let (top, left) = (whole((side - height) / 2.0), whole((side - width) / 2.0));
    [(top as i64, (top + height) as i64), (left as i64, (left + width) as i64)]
}

/// `count` places from `start` on, as far apart that the next one would be `stop`: torch's `linspace` in f32, which goes from both ends to the middle.
fn places(start: i64, stop: i64, count: usize) -> Vec<f32> {
    let (first, last) = (start as f32, (stop as f64 * (count as f64 - 1.0) / count as f64) as f32);
    let step = if count > 1 { (last - first) / (count - 1) as f32 } else { 0.0 };
    let place = |i: usize| if i < count / 2 { first + step * i as f32 } else { last - step * (count - 1 - i) as f32 };
    if count == 1 { vec![first] } else { (0..count).map(place).collect() }
}

/// Of each place `width / 4` angles.
fn angles(width: usize, places: &[f32]) -> Vec<Vec<f32>> {
    let half = width / 2;
    let frequency = |i: usize| 1.0 / libm::pow(THETA, f64::from((2 * i) as f32 / half as f32)) as f32;
    let frequencies: Vec<f32> = (0..half / 2).map(frequency).collect();
    places.iter().map(|place| frequencies.iter().map(|frequency| place * frequency).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_covers_the_middle_of_the_square() {
        assert_eq!(region([32, 32], 32), [(0, 32), (0, 32)]);
        // 21 rows of 32: what is above is rounded to an even number.
        assert_eq!(region([4, 6], 32), [(6, 27), (0, 32)]);
        assert_eq!(region([6, 4], 32), [(0, 32), (6, 27)]);
    }

    #[test]
    fn one_token_is_where_the_picture_begins() {
        assert_eq!(places(6, 27, 1), [6.0]);
        assert_eq!(places(0, 32, 4), [0.0, 8.0, 16.0, 24.0]);
    }
}
