"""Draw prompts with diffusers, in f32, with the settings the model card names."""
import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline


def draw(pipe, prompt, seed=0, scale=3.0, steps=20, size=64, length=32):
    return pipe(prompt, negative_prompt="", true_cfg_scale=scale, width=size, height=size,
                num_inference_steps=steps, max_sequence_length=length,
                generator=torch.Generator("cpu").manual_seed(seed)).images[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "emoji")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    pipe = FluxPipeline.from_pretrained(a.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    a.out.mkdir(parents=True, exist_ok=True)
    for prompt in a.prompts:
        draw(pipe, prompt, a.seed).save(a.out / (prompt.replace(" ", "_") + ".png"))
