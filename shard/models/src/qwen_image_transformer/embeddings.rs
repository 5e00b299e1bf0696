//! Where tokens are (MSRoPE), and which text tokens are padding.

use parallel::{DType, Device, Tensor};

use crate::mmdit::attention::Rope;
use crate::{Error, Result};

/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;
/// Positions that the reference's tables have, on either side of 0.
const MAX_POSITION: usize = 4096;

/// The sizes in tokens of the pictures of an item, the target first.
pub(super) struct PictureShapes(Vec<[usize; 2]>);

impl PictureShapes {
    /// From `img_shapes: [P, 3]`: frames (1), rows, columns; `tokens` in all.
    ///
    /// # Errors
    /// [`Error::Invalid`] when they are not so.
    pub(super) fn of(img_shapes: &Tensor, tokens: usize) -> Result<Self> {
        let invalid = |reason: String| Error::Invalid { field: "img_shapes", reason };
        let rows = img_shapes.to_dtype(DType::U32)?.to_vec2::<u32>()?;
        let side = |n: u32| Some(n as usize).filter(|n| (1..=2 * MAX_POSITION).contains(n));
        let shape = |row: Vec<u32>| match row.as_slice() {
            [1, height, width] => side(*height).zip(side(*width)).map(|(height, width)| [height, width]),
            _ => None,
        };
        let shapes: Option<Vec<_>> = rows.iter().cloned().map(shape).collect();
        let shapes = shapes.ok_or_else(|| {
            invalid(format!("{rows:?}; pictures have one frame and 1 to {} rows and columns", 2 * MAX_POSITION))
        })?;
        let given = Self(shapes);
        match given.0.iter().map(|[height, width]| height * width).sum::<usize>() {
            sum if sum == tokens && !given.0.is_empty() => Ok(given),
            sum => Err(invalid(format!("{rows:?} have {sum} tokens, there are {tokens}"))),
        }
    }

    /// Tokens of the first picture.
    pub(super) fn target_tokens(&self) -> usize {
        self.0.first().map_or(0, |[height, width]| height * width)
    }
}

/// `QwenEmbedRope` with `scale_rope`: rotations by (picture, row, column), rows and columns counted from the middle; text
/// goes on along the diagonal from where the pictures end. In f32, as the reference.
#[derive(Debug)]
pub(super) struct QwenEmbedRope {
    /// Per axis.
    freqs: Vec<Vec<f32>>,
}

impl QwenEmbedRope {
    pub(super) fn new(axes_dim: &[usize]) -> Self {
        // The exponent, the power and its inverse are rounded one after the other.
        let freq = |i: usize, dim: usize| 1.0 / libm::pow(THETA, f64::from((2 * i) as f32 / dim as f32)) as f32;
        Self { freqs: axes_dim.iter().map(|dim| (0..dim / 2).map(|i| freq(i, *dim)).collect()).collect() }
    }

    /// Tables of `[L_txt + L_img, Dh/2]`, f32.
    pub(super) fn forward(&self, shapes: &PictureShapes, text_tokens: usize, device: &Device) -> Result<Rope> {
        let first = shapes.0.iter().map(|[height, width]| (height / 2).max(width / 2)).max().unwrap_or(0);
        if first + text_tokens > MAX_POSITION {
            return Err(Error::Invalid {
                field: "prompt",
                reason: format!("{text_tokens} tokens; beside a picture of this size there is room for {}", MAX_POSITION - first),
            });
        }
        let text = (first..first + text_tokens).map(|position| [position as f32; 3]);
        let image = shapes.0.iter().enumerate().flat_map(|(picture, [height, width])| {
            centred(*height).flat_map(move |y| centred(*width).map(move |x| [picture as f32, y, x]))
        });
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in text.chain(image) {
            for (position, freqs) in position.into_iter().zip(&self.freqs) {
                cos.extend(freqs.iter().map(|freq| libm::cos(f64::from(position * freq)) as f32));
                sin.extend(freqs.iter().map(|freq| libm::sin(f64::from(position * freq)) as f32));
            }
        }
        let width: usize = self.freqs.iter().map(Vec::len).sum(); // Dh/2
        let table = |values: Vec<f32>| {
            let l = values.len() / width;
            Tensor::from_vec(values, (l, width), device)
        };
        Ok(Rope { cos: table(cos)?, sin: table(sin)? })
    }
}

/// `n` positions round 0: `-(n - n / 2)` to `n / 2 - 1`.
fn centred(n: usize) -> impl Iterator<Item = f32> {
    let before = (n - n / 2) as f32;
    (0..n).map(move |i| i as f32 - before)
}

/// What hides padded text from attention: `mask: [B, L_txt]` gives `[B, 1, 1, L_txt + L_img]`, 0 or `-inf`; `None` when
/// nothing is padded.
pub(super) fn padding_bias(mask: &Tensor, text: [usize; 2], image_tokens: usize) -> Result<Option<Tensor>> {
    if mask.dims() != text {
        let reason = format!("{:?}, expected {text:?}", mask.dims());
        return Err(Error::Invalid { field: "encoder_hidden_states_mask", reason });
    }
    let rows = mask.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    if rows.iter().flatten().all(|keep| *keep != 0.0) {
        return Ok(None);
    }
    let bias = |row: Vec<f32>| {
        let text = row.into_iter().map(|keep| if keep == 0.0 { f32::NEG_INFINITY } else { 0.0 });
        text.chain(std::iter::repeat_n(0.0, image_tokens)).collect::<Vec<_>>()
    };
    let values: Vec<f32> = rows.into_iter().flat_map(bias).collect();
    Ok(Some(Tensor::from_vec(values, (text[0], 1, 1, text[1] + image_tokens), mask.device())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes(shapes: &[[u32; 3]], tokens: usize) -> Result<PictureShapes> {
        PictureShapes::of(&Tensor::new(shapes.iter().map(|s| s.to_vec()).collect::<Vec<_>>(), &Device::Cpu).unwrap(), tokens)
    }

    #[test]
    fn rows_and_columns_are_counted_from_the_middle() {
        assert_eq!(centred(4).collect::<Vec<_>>(), [-2.0, -1.0, 0.0, 1.0]);
        assert_eq!(centred(5).collect::<Vec<_>>(), [-3.0, -2.0, -1.0, 0.0, 1.0]);
    }

    #[test]
    fn pictures_that_are_not_what_the_tokens_say_are_a_typed_error() {
        assert_eq!(shapes(&[[1, 4, 6], [1, 5, 3]], 39).unwrap().target_tokens(), 24);
        for (given, tokens) in [
            (&[[1, 4, 6]][..], 25),
            (&[[2, 4, 6]], 48),
            (&[[1, 0, 6]], 0),
            (&[[1, u32::MAX, u32::MAX]], 1),
            (&[[1, 8193, 1]], 8193),
        ] {
            assert!(matches!(shapes(given, tokens), Err(Error::Invalid { field: "img_shapes", .. })), "{given:?}");
        }
        let flat = Tensor::new(&[1u32, 4, 6], &Device::Cpu).unwrap();
        assert!(PictureShapes::of(&flat, 24).is_err());
    }

    #[test]
    fn a_text_past_the_last_position_is_refused_with_what_there_is_room_for() {
        let rope = QwenEmbedRope::new(&[2, 2, 4]);
        let picture = shapes(&[[1, 1, 8]], 8).unwrap();
        assert_eq!(rope.forward(&picture, MAX_POSITION - 4, &Device::Cpu).unwrap().cos.dims(), [MAX_POSITION + 4, 4]);
        let error = rope.forward(&picture, MAX_POSITION - 3, &Device::Cpu).err().unwrap();
        assert!(matches!(&error, Error::Invalid { field: "prompt", reason } if reason.ends_with("4092")), "{error}");
    }

    #[test]
    fn a_mask_of_ones_hides_nothing() {
        let mask = |rows: &[[u32; 3]]| Tensor::new(rows.iter().map(|r| r.to_vec()).collect::<Vec<_>>(), &Device::Cpu).unwrap();
        assert!(padding_bias(&mask(&[[1, 1, 1]]), [1, 3], 2).unwrap().is_none());
        let bias = padding_bias(&mask(&[[1, 1, 0], [1, 1, 1]]), [2, 3], 2).unwrap().unwrap();
        assert_eq!(bias.dims(), [2, 1, 1, 5]);
        let values = bias.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let hidden: Vec<usize> = (0..10).filter(|i| values[*i] == f32::NEG_INFINITY).collect();
        assert_eq!((hidden, values[4]), (vec![2], 0.0));
        assert!(padding_bias(&mask(&[[1, 1, 0]]), [1, 4], 2).is_err());
    }
}
