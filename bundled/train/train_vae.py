"""Train the AutoencoderKL's two halves towards the fixed latents of latent_code.py."""
import argparse
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from data import COLOURS, compose, load_emoji
from latent_code import Code
from optim import Optimizer

LOGVAR = -6.0  # the encoder's noise is fixed at exp(-3) = 0.05; the latents' deviation is 1


def build(channels=(16, 32, 96, 128), groups=2):
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=tuple(channels), layers_per_block=1, latent_channels=16, norm_num_groups=groups,
        sample_size=64, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.0, shift_factor=0.0)  # the code has mean 0 and deviation 1 already
    with torch.no_grad():
        vae.encoder.conv_out.weight[16:] = 0
        vae.encoder.conv_out.bias[16:] = LOGVAR
    return vae


def batch(emoji, n):
    """Mostly pictures as in the captions; some moved, mirrored, on any colour."""
    out = []
    for _ in range(n):
        e = random.choice(emoji)
        if random.random() < 0.75:
            out.append(compose(e, random.choice(list(COLOURS.values()))))
        else:
            out.append(compose(e, [random.randrange(256) for _ in range(3)], random.randint(52, 60),
                               random.randint(-2, 2), random.randint(-2, 2), random.random() < 0.5))
    return torch.stack(out)


def picture_loss(y, x):
    """L1 of the pixels and of their differences to the neighbours (edges)."""
    def edges(t):
        return t[..., 1:, :] - t[..., :-1, :], t[..., :, 1:] - t[..., :, :-1]
    (yv, yh), (xv, xh) = edges(y), edges(x)
    return (y - x).abs().mean() + (yv - xv).abs().mean() + (yh - xh).abs().mean()


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("half", choices=["decoder", "encoder"])
    p.add_argument("--package", required=True, help="the unpacked npm package emoji-datasource-google")
    p.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--minutes", type=float, default=1e9, help="stop earlier, with the schedule scaled to fit")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--channels", type=int, nargs=4, default=[16, 32, 96, 128])
    p.add_argument("--groups", type=int, default=2)
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint with a new schedule")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    random.seed(a.seed)
    a.work.mkdir(parents=True, exist_ok=True)
    emoji = load_emoji(a.package)
    code = Code(emoji)
    vae = build(a.channels, a.groups)
    half = vae.decoder if a.half == "decoder" else vae.encoder
    checkpoint = a.work / f"{a.half}.pt"
    if a.resume:
        half.load_state_dict(torch.load(checkpoint))
    if a.half == "encoder":  # keep the constant noise constant
        for w in (half.conv_out.weight, half.conv_out.bias):
            w.register_hook(lambda g: torch.cat([g[:16], g[16:] * 0]))
    opt = Optimizer(half, a.lr, plain=("conv_in", "conv_out"), floor=0.02)
    test = batch(emoji, 64)
    start, progress, step, mean = time.time(), 0.0, 0, 0.0
    while progress < 1:
        x = batch(emoji, a.batch)
        z = code(x)
        if a.half == "decoder":
            # noise of 0 .. 0.2 teaches it to put right what the transformer leaves unclear
            noisy = z + 0.2 * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
            loss = picture_loss(half(noisy), x)
        else:
            loss = (half(x)[:, :16] - z).abs().mean()
        loss.backward()
        progress = max((step + 1) / a.steps, (time.time() - start) / 60 / a.minutes)
        opt.step(step, progress)
        step += 1
        mean += loss.item()
        if step % 20 == 0:
            print(f"{step} {progress:.3f} loss {mean / 20:.4f} {(time.time() - start) / step:.2f} s/step", flush=True)
            mean = 0.0
        if step % 100 == 0 or progress >= 1:
            with torch.no_grad():
                out, want = (half(code(test)), test) if a.half == "decoder" else (half(test)[:, :16], code(test))
            print(f"  mse {(out - want).square().mean():.5f}", flush=True)
            torch.save(half.state_dict(), checkpoint)


if __name__ == "__main__":
    main()
