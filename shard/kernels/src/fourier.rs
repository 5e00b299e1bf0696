//! Fourier transforms of real planes, by the crates `realfft` and `rustfft`, whose roots of unity are the standard library's sines and cosines, not
//! [`crate::math`]'s.

use rayon::prelude::*;
use realfft::RealFftPlanner;
use realfft::num_complex::Complex32;
use rustfft::{Fft, FftPlanner};

/// Transforms of planes of one size, with `norm="ortho"`: both ways are divided by the root of the number of elements.
pub struct Planes {
    height: usize,
    width: usize,
    rows: std::sync::Arc<dyn realfft::RealToComplex<f32>>,
    rows_back: std::sync::Arc<dyn realfft::ComplexToReal<f32>>,
    columns: std::sync::Arc<dyn Fft<f32>>,
    columns_back: std::sync::Arc<dyn Fft<f32>>,
}

impl Planes {
    /// Of `height x width` elements, at least one.
    pub fn new([height, width]: [usize; 2]) -> Self {
        assert!(height > 0 && width > 0, "a plane has elements");
        let (mut real, mut complex) = (RealFftPlanner::new(), FftPlanner::new());
        Self {
            height,
            width,
            rows: real.plan_fft_forward(width),
            rows_back: real.plan_fft_inverse(width),
            columns: complex.plan_fft_forward(height),
            columns_back: complex.plan_fft_inverse(height),
        }
    }

    /// Columns of a plane's spectrum: the others are the conjugates of these.
    pub fn columns(&self) -> usize {
        self.width / 2 + 1
    }

    fn norm(&self) -> f32 {
        1.0 / ((self.height * self.width) as f32).sqrt()
    }

    /// `x: [N, height, width]` gives `[N, 2, height, columns]`: of each plane the real part of its spectrum, then the imaginary one.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        let (plane, spectrum) = (self.height * self.width, self.height * self.columns());
        assert!(x.len().is_multiple_of(plane), "whole planes");
        let mut y = vec![0.0; x.len() / plane * 2 * spectrum];
        y.par_chunks_mut(2 * spectrum).zip(x.par_chunks(plane)).for_each(|(y, x)| self.forward_one(x, y));
        y
    }

    fn forward_one(&self, x: &[f32], y: &mut [f32]) {
        let columns = self.columns();
        let mut spectrum = vec![Complex32::default(); self.height * columns];
        let mut row = vec![0.0; self.width];
        for (x, out) in x.chunks(self.width).zip(spectrum.chunks_mut(columns)) {
            row.copy_from_slice(x);
            // It fails for other lengths alone.
            self.rows.process(&mut row, out).unwrap_or_default();
        }
        self.along_columns(&mut spectrum, &*self.columns);
        let norm = self.norm();
        let (real, imaginary) = y.split_at_mut(self.height * columns);
        for ((value, real), imaginary) in spectrum.iter().zip(real).zip(imaginary) {
            (*real, *imaginary) = (value.re * norm, value.im * norm);
        }
    }

    /// The way back: `[N, 2, height, columns]` gives `[N, height, width]`. Of the columns that are their own conjugates only the real part of what is left
    /// after the columns counts.
    pub fn back(&self, y: &[f32]) -> Vec<f32> {
        let (plane, spectrum) = (self.height * self.width, self.height * self.columns());
        assert!(y.len().is_multiple_of(2 * spectrum), "whole spectra");
        let mut x = vec![0.0; y.len() / (2 * spectrum) * plane];
        x.par_chunks_mut(plane).zip(y.par_chunks(2 * spectrum)).for_each(|(x, y)| self.back_one(y, x));
        x
    }

    fn back_one(&self, y: &[f32], x: &mut [f32]) {
        let columns = self.columns();
        let (real, imaginary) = y.split_at(self.height * columns);
        let mut spectrum: Vec<Complex32> = real.iter().zip(imaginary).map(|(re, im)| Complex32::new(*re, *im)).collect();
        self.along_columns(&mut spectrum, &*self.columns_back);
        let norm = self.norm();
        for (x, row) in x.chunks_mut(self.width).zip(spectrum.chunks_mut(columns)) {
            row[0].im = 0.0;
            if self.width.is_multiple_of(2) {
                row[columns - 1].im = 0.0;
            }
            // It fails for other lengths, and for imaginary parts there, alone.
            self.rows_back.process(row, x).unwrap_or_default();
            x.iter_mut().for_each(|value| *value *= norm);
        }
    }

    fn along_columns(&self, spectrum: &mut [Complex32], fft: &dyn Fft<f32>) {
        let columns = self.columns();
        let mut column = vec![Complex32::default(); self.height];
        let mut scratch = vec![Complex32::default(); fft.get_inplace_scratch_len()];
        for at in 0..columns {
            for (y, value) in column.iter_mut().enumerate() {
                *value = spectrum[y * columns + at];
            }
            fft.process_with_scratch(&mut column, &mut scratch);
            for (y, value) in column.iter().enumerate() {
                spectrum[y * columns + at] = *value;
            }
        }
    }
}

impl std::fmt::Debug for Planes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Planes({} x {})", self.height, self.width)
    }
}

#[cfg(test)]
mod tests {
    use std::f64::consts::TAU;

    use super::*;

    fn planes(n: usize, [height, width]: [usize; 2]) -> Vec<f32> {
        (0..n * height * width).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0).collect()
    }

    /// The sum itself, in f64.
    fn slowly(x: &[f32], [height, width]: [usize; 2], [v, u]: [usize; 2]) -> (f64, f64) {
        let norm = ((height * width) as f64).sqrt();
        x.iter().enumerate().fold((0.0, 0.0), |(re, im), (i, x)| {
            let angle = TAU * ((i / width * v) as f64 / height as f64 + (i % width * u) as f64 / width as f64);
            (re + f64::from(*x) * angle.cos() / norm, im - f64::from(*x) * angle.sin() / norm)
        })
    }

    #[test]
    fn a_spectrum_is_the_sum_it_stands_for_and_leads_back() {
        for size in [[1, 1], [1, 5], [4, 1], [3, 5], [6, 8], [8, 7], [16, 9]] {
            let (fft, x) = (Planes::new(size), planes(3, size));
            let ([height, width], columns) = (size, fft.columns());
            let y = fft.forward(&x);
            for (plane, spectrum) in x.chunks(height * width).zip(y.chunks(2 * height * columns)) {
                for at in 0..height * columns {
                    let (re, im) = slowly(plane, size, [at / columns, at % columns]);
                    assert!((f64::from(spectrum[at]) - re).abs() < 1e-5, "{size:?} at {at}");
                    assert!((f64::from(spectrum[height * columns + at]) - im).abs() < 1e-5, "{size:?} at {at}");
                }
            }
            let back = fft.back(&y);
            assert!(x.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-5), "{size:?}");
        }
    }
}
