//! What networks are made of, as it is counted.

/// A network's tensors, and how many operations they are multiplied in.
#[derive(Default)]
pub(super) struct Layers {
    pub(super) shapes: Vec<(String, Vec<usize>)>,
    pub(super) flops: f64,
}

impl Layers {
    /// A norm.
    pub(super) fn affine(&mut self, name: &str, channels: usize) {
        self.shapes.extend(["weight", "bias"].map(|part| (format!("{name}.{part}"), vec![channels])));
    }

    /// A convolution of `size` by `size` at `pixels` places.
    pub(super) fn conv(&mut self, name: &str, [c_in, c_out]: [usize; 2], size: usize, pixels: usize) {
        self.flops += (2 * c_in * c_out * size * size * pixels) as f64;
        self.tensors_of_conv(name, [c_in, c_out], size);
    }

    /// One of 3 x 3 that makes `pixels` of a quarter of them: 2 x 2 are different where it looks.
    pub(super) fn doubling_conv(&mut self, name: &str, channels: usize, pixels: usize) {
        self.flops += (2 * channels * channels * 2 * 2 * pixels) as f64;
        self.tensors_of_conv(name, [channels; 2], 3);
    }

    fn tensors_of_conv(&mut self, name: &str, [c_in, c_out]: [usize; 2], size: usize) {
        self.shapes.push((format!("{name}.weight"), vec![c_out, c_in, size, size]));
        self.shapes.push((format!("{name}.bias"), vec![c_out]));
    }

    /// A linear layer of `tokens`.
    pub(super) fn linear(&mut self, name: &str, [d_in, d_out]: [usize; 2], tokens: usize) {
        self.projection(name, [d_in, d_out], tokens);
        self.shapes.push((format!("{name}.bias"), vec![d_out]));
    }

    /// The same without a bias.
    pub(super) fn projection(&mut self, name: &str, [d_in, d_out]: [usize; 2], tokens: usize) {
        self.flops += (2 * d_in * d_out * tokens) as f64;
        self.shapes.push((format!("{name}.weight"), vec![d_out, d_in]));
    }

    /// Attention of so many queries to so many keys, `width` wide over all heads.
    pub(super) fn attention(&mut self, width: usize, queries: usize, keys: usize) {
        self.flops += (4 * width * queries * keys) as f64;
    }
}
