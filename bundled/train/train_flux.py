"""Train the FluxTransformer2DModel with its T5 and CLIP encoders on the latents of
latent_code.py, then write them into the diffusers directory (see save.py)."""
import argparse
import copy
import random
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from data import COLOURS, caption, compose, load_emoji, subjects
from latent_code import Code
from optim import Optimizer
from save import save

EMPTY = 0.08  # share of empty captions: what a negative prompt of "" means
# Padding takes part in FLUX' attention. Most batches are short (cheap), some as long as
# in use (32), a few longer, so that the amount of padding does not matter much.
LENGTHS = [(16, 0.78), (32, 0.2), (96, 0.02)]


def build(clip_size, t5_size):
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=clip_size, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, max_position_embeddings=77, projection_dim=64, hidden_act="quick_gelu",
        bos_token_id=0, eos_token_id=2, pad_token_id=1))  # these three as in FLUX
    t5 = T5EncoderModel(T5Config(
        vocab_size=t5_size, d_model=128, d_kv=16, d_ff=256, num_layers=2, num_heads=8,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False))
    flux = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=3, num_single_layers=6, num_attention_heads=8,
        attention_head_dim=20, axes_dims_rope=(4, 8, 8), joint_attention_dim=128,
        pooled_projection_dim=64, guidance_embeds=False)
    for name, module in flux.named_modules():  # start as the identity, as DiT does
        if name.endswith("norm.linear") or name.endswith("norm1.linear") or name.endswith("norm1_context.linear") \
                or name in ("norm_out.linear", "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return torch.nn.ModuleDict({"clip": clip, "t5": t5, "flux": flux})


def pack(z):
    """2 x 2 latent pixels become one token, as FluxPipeline packs them."""
    b, c, h, w = z.shape
    z = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(b, (h // 2) * (w // 2), c * 4)


def image_ids(h, w):
    ids = torch.zeros(h, w, 3)
    ids[..., 1] += torch.arange(h)[:, None]
    ids[..., 2] += torch.arange(w)[None, :]
    return ids.reshape(h * w, 3)


def latents(emoji, count):
    """Packed latents of the first `count` subjects on every colour."""
    code, out = Code(emoji), {}
    for i, e in enumerate(emoji[:count]):
        z = pack(code(torch.stack([compose(e, c) for c in COLOURS.values()])))
        out.update({(i, colour): z[k] for k, colour in enumerate(COLOURS)})
    return out


def predict(model, x, t, clip_ids, t5_ids, ids):
    pooled = model["clip"](clip_ids).pooler_output
    text = model["t5"](t5_ids).last_hidden_state
    return model["flux"](hidden_states=x, timestep=t, pooled_projections=pooled, encoder_hidden_states=text,
                         txt_ids=torch.zeros(t5_ids.shape[1], 3), img_ids=ids, return_dict=False)[0]


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--package", required=True, help="the unpacked npm package emoji-datasource-google")
    p.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    p.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "emoji")
    p.add_argument("--steps", type=int, default=700)
    p.add_argument("--minutes", type=float, default=1e9, help="stop earlier, with the schedule scaled to fit")
    p.add_argument("--subjects", type=int, default=64, help="how many of subjects.txt to learn")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--muon", type=float, default=5.0, help="Muon's learning rate in units of --lr")
    p.add_argument("--adamw", action="store_true", help="AdamW for everything")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint with a new schedule")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    random.seed(a.seed)

    a.work.mkdir(parents=True, exist_ok=True)
    data = latents(load_emoji(a.package), a.subjects)
    names = [n for _, n in subjects()]
    clip_tok = CLIPTokenizer.from_pretrained(a.out / "tokenizer")
    t5_tok = T5TokenizerFast.from_pretrained(a.out / "tokenizer_2")
    model = build(len(clip_tok), len(t5_tok))
    checkpoint = a.work / "flux.pt"
    if a.resume:
        model.load_state_dict(torch.load(checkpoint))
    ema = copy.deepcopy(model).requires_grad_(False)
    # Muon is for hidden matrices: tables, first and last layers and modulations stay with AdamW
    plain = ("embed", "shared", "relative_attention_bias", "norm", "flux.proj_out")
    opt = Optimizer(model, a.lr, plain=plain, muon=not a.adamw, muon_lr=a.muon)
    ids = image_ids(4, 4)
    start, progress, step, mean = time.time(), 0.0, 0, 0.0
    saved = start
    while progress < 1:
        keys = random.choices(list(data), k=a.batch)
        texts = ["" if random.random() < EMPTY else caption(names[i], c) for i, c in keys]
        length = random.choices([n for n, _ in LENGTHS], [w for _, w in LENGTHS])[0]
        t5_ids = t5_tok(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        # CLIP is causal and read at its end token: padding behind it changes nothing
        clip_ids = clip_tok(texts, padding="longest", max_length=77, truncation=True, return_tensors="pt").input_ids
        x = torch.stack([data[k] for k in keys])
        noise = torch.randn_like(x)
        t = torch.sigmoid(torch.randn(a.batch))
        tt = t[:, None, None]
        v = predict(model, (1 - tt) * x + tt * noise, t, clip_ids, t5_ids, ids)
        loss = (v - (noise - x)).square().mean()
        loss.backward()
        progress = max((step + 1) / a.steps, (time.time() - start) / 60 / a.minutes)
        opt.step(step, progress)
        step += 1
        decay = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            for e, w in zip(ema.parameters(), model.parameters()):
                e.lerp_(w, 1 - decay)
        mean += loss.item()
        if step % 25 == 0:
            print(f"{step} {progress:.3f} loss {mean / 25:.4f} {(time.time() - start) / step:.2f} s/step", flush=True)
            mean = 0.0
        if time.time() - saved > 240 or progress >= 1:
            saved = time.time()
            torch.save(ema.state_dict(), checkpoint)
            save(a.out, clip=ema["clip"], t5=ema["t5"], flux=ema["flux"])


if __name__ == "__main__":
    main()
