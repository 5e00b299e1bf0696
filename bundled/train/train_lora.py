"""Train a LoRA for the bundled transformer: one more way of drawing what it draws already.

Everything else is frozen. Pictures are composed as in train_flux.py and then changed by one of STYLES; captions stay as they are, so
the adapter alone makes the difference. Written as diffusers writes it (PEFT keys, bf16).
"""
import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from data import COLOURS, SIZE, caption, compose, load_emoji, subjects
from latent_code import Code
from train_flux import EMPTY, image_ids, pack, predict

# All that attends and all that is wide: what LoRA usually changes in FLUX.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
           "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]


def outlined(emoji, colour):
    """A thick dark line around the subject."""
    plain = compose(emoji, colour)
    mask = emoji.resize((56, 56)).getchannel("A")
    alpha = torch.zeros(1, 1, SIZE, SIZE)
    alpha[0, 0, 4:60, 4:60] = torch.tensor(list(mask.tobytes()), dtype=torch.float32).view(56, 56) / 255
    wide = F.max_pool2d(F.avg_pool2d(alpha, 3, 1, 1), 7, 1, 3)
    line = (wide - alpha).clamp(0, 1)[0]
    ink = torch.tensor([20, 24, 82]).view(3, 1, 1) / 127.5 - 1
    return plain * (1 - line) + ink * line


def mono(emoji, colour):
    """Black and white."""
    plain = compose(emoji, colour)
    grey = (plain * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
    return grey.expand(3, -1, -1)


STYLES = {"mono": mono, "outlined": outlined}


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("style", choices=STYLES)
    p.add_argument("--package", required=True, help="the unpacked npm package emoji-datasource-google")
    p.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "emoji")
    p.add_argument("--out", type=Path, help="the file to write; default ../loras/STYLE.safetensors")
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--minutes", type=float, default=1e9, help="stop earlier, with the schedule scaled to fit")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    random.seed(a.seed)

    pipe = FluxPipeline.from_pretrained(a.model, dtype=torch.float32)
    model = {"clip": pipe.text_encoder, "t5": pipe.text_encoder_2, "flux": pipe.transformer}
    for part in model.values():
        part.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=a.rank, lora_alpha=a.rank, init_lora_weights="gaussian", target_modules=TARGETS))
    params = [w for w in pipe.transformer.parameters() if w.requires_grad]
    opt = torch.optim.AdamW(params, lr=a.lr, betas=(0.9, 0.98), weight_decay=0.0)

    emoji = load_emoji(a.package)
    code = Code(emoji)  # of the plain pictures: the latent space is the model's own
    table = {}
    for i, one in enumerate(emoji):
        z = pack(code(torch.stack([STYLES[a.style](one, c) for c in COLOURS.values()])))
        table.update({(i, colour): z[k] for k, colour in enumerate(COLOURS)})
    names = [n for _, n in subjects()]
    ids = image_ids(4, 4)
    start, progress, step, mean = time.time(), 0.0, 0, 0.0
    while progress < 1:
        keys = random.choices(list(table), k=a.batch)
        texts = ["" if random.random() < EMPTY else caption(names[i], c) for i, c in keys]
        length = random.choice([16, 32])
        t5_ids = pipe.tokenizer_2(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        clip_ids = pipe.tokenizer(texts, padding="longest", max_length=77, truncation=True, return_tensors="pt").input_ids
        x = torch.stack([table[k] for k in keys])
        noise = torch.randn_like(x)
        t = torch.sigmoid(torch.randn(a.batch))
        tt = t[:, None, None]
        v = predict(model, (1 - tt) * x + tt * noise, t, clip_ids, t5_ids, ids)
        loss = (v - (noise - x)).square().mean()
        loss.backward()
        progress = max((step + 1) / a.steps, (time.time() - start) / 60 / a.minutes)
        for group in opt.param_groups:
            group["lr"] = a.lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step += 1
        mean += loss.item()
        if step % 25 == 0:
            print(f"{step} {progress:.3f} loss {mean / 25:.4f} {(time.time() - start) / step:.2f} s/step", flush=True)
            mean = 0.0
    out = a.out or Path(__file__).parent.parent / "loras" / f"{a.style}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(pipe.transformer)
    state = {f"transformer.{k}": w.to(torch.bfloat16).contiguous() for k, w in state.items()}
    save_file(state, out, metadata={"format": "pt"})
    print(f"{out}: {len(state)} tensors, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
