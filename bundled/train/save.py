"""Write the diffusers directory: bf16 weights, the scheduler and model_index.json.

The tokenizers lie in the directory already (make_tokenizers.py) and stay as they are.
Run alone it puts a newer VAE (train_vae.py --stage decoder) into the directory.
"""
import argparse
import json
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

INDEX = {
    "_class_name": "FluxPipeline", "_diffusers_version": diffusers.__version__,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save(out, vae=None, clip=None, t5=None, flux=None):
    parts = {"vae": vae, "text_encoder": clip, "text_encoder_2": t5, "transformer": flux}
    for name, part in parts.items():
        if part is not None:
            part.to(torch.bfloat16).save_pretrained(out / name)
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(out / "scheduler")  # as FLUX.1-schnell
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "emoji")
    a = parser.parse_args()
    save(a.out, vae=AutoencoderKL.from_pretrained(a.work / "vae"))
