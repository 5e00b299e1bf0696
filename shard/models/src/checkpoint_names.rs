//! Checkpoints that do not have diffusers' names: quantised ones mostly, which keep the names of a model's first code or have
//! llama.cpp's.

use parallel::checkpoint::Part;

use crate::flux;

mod flux_original;
mod llama;

/// What ComfyUI's exports put before every name of a network.
const PREFIX: &str = "model.diffusion_model.";

/// What the component calls a stored tensor: see [`parallel::checkpoint::Names`].
pub(crate) fn names(pipeline_class: &str, name: &str, shape: &[usize]) -> Option<Vec<Part>> {
    let bare = name.strip_prefix(PREFIX).unwrap_or(name);
    let flux = || flux::CLASSES.contains(&pipeline_class).then(|| flux_original::parts(bare, shape))?;
    let whole = |name: String| vec![Part::whole(name, shape)];
    flux().or_else(|| llama::t5(bare).map(whole)).or_else(|| (bare != name).then(|| whole(bare.to_owned())))
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // lists of ranges are meant
mod tests {
    use super::*;

    fn found(class: &str, name: &str, shape: &[usize]) -> Vec<(String, Vec<std::ops::Range<usize>>)> {
        let parts = names(class, name, shape).unwrap_or_default();
        parts.into_iter().map(|part| (part.name, part.rows)).collect()
    }

    #[test]
    fn names_that_are_diffusers_own_stay() {
        for name in ["transformer_blocks.0.attn.to_q.weight", "proj_out.weight", "norm_out.linear.bias", "x_embedder.weight"] {
            assert_eq!(names("FluxPipeline", name, &[8, 8]), None, "{name}");
        }
        assert_eq!(names("QwenImagePipeline", "double_blocks.0.img_mlp.0.weight", &[8, 8]), None, "FLUX's names are FLUX's");
    }

    #[test]
    fn a_prefix_of_the_whole_network_is_dropped() {
        let got = found("QwenImagePipeline", "model.diffusion_model.img_in.weight", &[4, 8]);
        assert_eq!(got, [("img_in.weight".to_owned(), vec![0..4])]);
        let got = found("FluxPipeline", "model.diffusion_model.img_in.weight", &[4, 8]);
        assert_eq!(got, [("x_embedder.weight".to_owned(), vec![0..4])]);
    }
}
