"""A denoising step of FLUX.1, a decoding of its autoencoder and T5-XXL's encoder at their published widths: `atelier bench model` beside
stable-diffusion.cpp, by turns. Weights are random on both sides."""

import importlib.metadata
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import cpp_weights
import sides

# What stable-diffusion.cpp takes FLUX.1's text to be, whatever it is.
TEXT_TOKENS = 256
# Its types for weights of Atelier's: all are tried, and the fastest counts.
TYPES = {"f32": ["f32"], "bf16": ["bf16", "f16"], "q8_0": ["q8_0"], "q4_k": ["q4_k"]}
# The same for its settings.
ATTENTION = {"attention": {}, "flash attention": {"diffusion_flash_attn": True}}
CONVOLUTION = {"im2col": {}, "direct": {"vae_conv_direct": True}}


class Work(NamedTuple):
    """A network, for some rows: one for each type of weights and each way Atelier multiplies them."""

    name: str
    family: str
    side: int
    arguments: list
    weights: list
    settings: dict


def works(options):
    """What was asked for."""
    text = ["--text-tokens", TEXT_TOKENS]
    if "flux" in options.family:
        blocks = ["--blocks", options.blocks, "--single-blocks", options.single_blocks]
        for side in options.side:
            name = f"FLUX.1, {options.blocks} + {options.single_blocks} blocks, {side} px"
            arguments = ["--family", "flux", *blocks, "--side", side, *text]
            yield Work(name, "flux", side, arguments, options.weights, ATTENTION)
    if "vae" in options.family:
        for side in options.side:
            name = f"FLUX.1's autoencoder, decoding {side} px"
            yield Work(name, "vae", side, ["--family", "vae", "--side", side], ["bf16"], CONVOLUTION)
    if "t5" in options.family:
        name = f"T5-XXL, {TEXT_TOKENS} tokens"
        yield Work(name, "t5", 256, ["--family", "t5", *text], options.weights, {"attention": {}})


def ways(weights):
    """What Atelier can multiply in, with weights of a type."""
    narrow = sides.fastest_bf16() if weights != "f32" else None
    in_bytes = weights in ("q8_0", "q4_k") and sides.multiplies_narrow()
    return ["f32", *([narrow] if narrow else []), *(["int8"] if in_bytes else [])]


def written(options, family, kind, folder):
    """Writes what stable-diffusion.cpp needs to come as far as a family's network, and gives it as its settings."""
    blocks = (options.blocks, options.single_blocks) if family == "flux" else (1, 1)
    text, of_text = ("t5xxl", cpp_weights.t5()) if family == "t5" else ("clip_l", cpp_weights.clip())
    files = {
        "diffusion_model_path": (cpp_weights.flux(*blocks), kind if family == "flux" else "q8_0"),
        "vae_path": (cpp_weights.vae(), "f16"),
        f"{text}_path": (of_text, kind if family == "t5" else "f16"),
    }
    paths = {setting: str(Path(folder) / f"{setting}-{kind}.gguf") for setting in files}
    for setting, (shapes, wanted) in files.items():
        cpp_weights.write(paths[setting], shapes, wanted)
    return paths


def turn(options, work, settings):
    """The best forward of stable-diffusion.cpp in one turn, in seconds. Ends the benchmark where it fails."""
    asked = {"family": work.family, "side": work.side, "forwards": options.steps, "threads": options.threads, "settings": settings}
    command = [sys.executable, "-B", str(Path(__file__).with_name("cpp_turn.py")), json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-20:])
        sys.exit(f"stable-diffusion.cpp failed ({done.returncode}) at {work.name}; its last lines:\n{last}")
    return min(json.loads(done.stdout.splitlines()[-1]))


def measure(options, work, weights):
    """Rounds of Atelier, each way it multiplies, and of stable-diffusion.cpp with each setting; the best forward of each, in seconds."""
    atelier, peers = dict.fromkeys(ways(weights), float("inf")), {}
    kinds = ["f16"] if work.family == "vae" else TYPES[weights]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        files = {kind: written(options, work.family, kind, folder) for kind in kinds}
        for _ in range(options.rounds):
            for products in atelier:
                atelier[products] = min(atelier[products], sides.forward(options, work.arguments, weights, products))
            for kind, (setting, chosen) in itertools.product(kinds, work.settings.items()):
                forward = turn(options, work, {**files[kind], **chosen})
                peers[kind, setting] = min(peers.get((kind, setting), float("inf")), forward)
    best = min(peers, key=peers.get)
    for products, forward in atelier.items():
        row = {"network": work.name, "weights": weights, "products": products, "sd.cpp's best": ", ".join(best)}
        yield {**row, "atelier s": forward, "sd.cpp s": peers[best], "sd.cpp / atelier": peers[best] / forward}


def main():
    """See README.md."""
    about = "Atelier's networks beside stable-diffusion.cpp's, by turns. Seconds; a ratio over 1 says that Atelier is faster."
    options = sides.network_parser(about, TYPES, family=["flux", "vae"]).parse_args()
    columns = [("network", 40, ""), ("weights", 9, ""), ("products", 10, ""), ("sd.cpp's best", 22, "")]
    columns += [("atelier s", 11, ".3f"), ("sd.cpp s", 11, ".3f"), ("sd.cpp / atelier", 18, ".2f")]
    name = "stable-diffusion-cpp-python"
    report = sides.Report(options, columns, **{name: importlib.metadata.version(name)})
    for work in works(options):
        for weights in work.weights:
            for row in measure(options, work, weights):
                report.row(row)
    report.end()


if __name__ == "__main__":
    main()
