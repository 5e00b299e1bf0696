//! Norms and softmax over rows. Sums run in sixteen fixed lanes that are added as a tree, whatever the machine.

const LANES: usize = 16;

/// Sum of `f(x)` in sixteen lanes, the lanes added as a balanced tree.
fn lane_sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f(*v);
        }
    }
    for (lane, v) in lanes.iter_mut().zip(tail) {
        *lane += f(*v);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Mean and 1 / sqrt(variance + eps) of `x`, in two passes (one pass loses digits when the mean is large).
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = lane_sum(x, |v| v) / n;
    let variance = lane_sum(x, |v| (v - mean) * (v - mean)) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// `(x - mean) / sqrt(var + eps)` for each row of `width`.
pub fn layer_norm(x: &mut [f32], width: usize, eps: f32) {
    for row in x.chunks_exact_mut(width.max(1)) {
        let (mean, scale) = moments(row, eps);
        for v in row {
            *v = (*v - mean) * scale;
        }
    }
}

/// `x / sqrt(mean(x^2) + eps) * weight` for each row of `weight.len()`.
pub fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    for row in x.chunks_exact_mut(weight.len().max(1)) {
        let scale = 1.0 / (lane_sum(row, |v| v * v) / row.len() as f32 + eps).sqrt();
        for (v, w) in row.iter_mut().zip(weight) {
            *v = *v * scale * w;
        }
    }
}

/// Group norm of `x: [B, C, S]` with `weight, bias: [C]`; statistics over `C / groups` channels of one item.
pub fn group_norm(x: &mut [f32], weight: &[f32], bias: &[f32], groups: usize, spatial: usize, eps: f32) {
    let channels = weight.len();
    let per_group = channels / groups.max(1);
    for (index, group) in x.chunks_exact_mut((per_group * spatial).max(1)).enumerate() {
        let (mean, scale) = moments(group, eps);
        let first = index % groups * per_group;
        for (c, plane) in group.chunks_exact_mut(spatial).enumerate() {
            let (w, b) = (weight[first + c], bias[first + c]);
            for v in plane {
                *v = (*v - mean) * scale * w + b;
            }
        }
    }
}

/// Softmax of each row of `width`. A row whose entries are all `-inf` becomes zeros.
pub fn softmax(x: &mut [f32], width: usize) {
    for row in x.chunks_exact_mut(width.max(1)) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if max == f32::NEG_INFINITY {
            row.fill(0.0);
            continue;
        }
        for v in row.iter_mut() {
            *v = libm::expf(*v - max);
        }
        let scale = 1.0 / lane_sum(row, |v| v);
        for v in row {
            *v *= scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919) % 101) as f32 / 50.0 - 1.0).collect()
    }

    #[test]
    fn layer_norm_gives_mean_zero_and_variance_one() {
        for n in [2, 15, 16, 17, 100] {
            let mut x = row(n);
            layer_norm(&mut x, n, 0.0);
            let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / n as f64;
            let var = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n as f64;
            assert!(mean.abs() < 1e-6 && (var - 1.0).abs() < 1e-5, "{n}: mean {mean} var {var}");
        }
    }

    #[test]
    fn softmax_sums_to_one_and_survives_a_masked_row() {
        let mut x = row(37);
        softmax(&mut x, 37);
        assert!((x.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        let mut masked = [f32::NEG_INFINITY; 5];
        softmax(&mut masked, 5);
        assert_eq!(masked, [0.0; 5]);
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        let (a, b) = (row(33), row(66));
        let mut both = [a.clone(), b[33..].to_vec()].concat();
        let mut alone = a;
        rms_norm(&mut both, &[0.5; 33], 1e-6);
        rms_norm(&mut alone, &[0.5; 33], 1e-6);
        assert_eq!(both[..33], alone[..]);
    }

    #[test]
    fn group_norm_uses_its_own_channels_weight() {
        let mut x = row(2 * 4 * 6);
        group_norm(&mut x, &[1.0, 1.0, 0.0, 0.0], &[0.0, 0.0, 5.0, 7.0], 2, 6, 1e-6);
        assert_eq!(x[12..18], [5.0; 6]);
        assert_eq!(x[42..48], [7.0; 6]);
    }
}
