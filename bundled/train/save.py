"""Write the diffusers directory: bf16 weights, the scheduler and model_index.json.

The tokenizers lie in the directory already (make_tokenizers.py) and stay as they are.
Run alone it puts the VAE of train_vae.py into the directory; train_flux.py calls
save() for the rest.
"""
import argparse
import copy
import json
from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from train_vae import build

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
            copy.deepcopy(part).to(torch.bfloat16).save_pretrained(out / name)
    if clip is not None:  # FLUX' own files, and older transformers, have this prefix
        file = out / "text_encoder" / "model.safetensors"
        weights = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(out / "scheduler")  # as FLUX.1-schnell
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder with encoder.pt and decoder.pt")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "emoji")
    a = parser.parse_args()
    vae = build()
    for name in ("encoder", "decoder"):
        if (a.work / f"{name}.pt").exists():
            getattr(vae, name).load_state_dict(torch.load(a.work / f"{name}.pt"))
        else:
            print(f"no {name}.pt in {a.work}: the {name} is untrained")
    save(a.out, vae=vae)
