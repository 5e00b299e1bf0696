"""The training pictures and their captions: Noto emoji on plain backgrounds."""
import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parent
SIZE = 64
COLOURS = {
    "white": (255, 255, 255), "black": (0, 0, 0), "red": (214, 48, 49),
    "orange": (243, 146, 38), "yellow": (250, 220, 70), "green": (64, 168, 88),
    "blue": (52, 108, 214), "purple": (132, 70, 176), "pink": (248, 170, 200),
    "grey": (128, 128, 128),
}
PLURAL = {"grapes", "cherries", "pancakes", "french fries", "fries"}
NO_ARTICLE = {"corn", "broccoli", "bread", "cheese", "popcorn", "coffee", "fire", "lightning"}


def subjects():
    """[(emoji short name, [caption name, other names...])] in file order."""
    rows = []
    for line in (HERE / "subjects.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            short, names = line.split(":")
            rows.append((short, [n.strip() for n in names.split("|")]))
    return rows


def load_emoji(package):
    """RGBA pictures (64 x 64, premultiplied when composed) from the unpacked npm package."""
    package = Path(package)
    table = {}
    for entry in json.loads((package / "emoji.json").read_text()):
        for short in entry["short_names"]:
            table[short] = entry["image"]
    out = []
    for short, _ in subjects():
        out.append(Image.open(package / "img/google/64" / table[short]).convert("RGBA"))
    return out


def compose(emoji, colour, size=56, dx=0, dy=0, flip=False):
    """One emoji, `size` pixels wide, near the middle of a 64 x 64 square; floats in -1..1, CHW."""
    if flip:
        emoji = emoji.transpose(Image.FLIP_LEFT_RIGHT)
    emoji = emoji.resize((size, size), Image.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), tuple(colour) + (255,))
    at = (SIZE - size) // 2
    canvas.alpha_composite(emoji, (at + dx, at + dy))
    rgb = np.asarray(canvas.convert("RGB"), dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(rgb).permute(2, 0, 1)


def article(name):
    if name in PLURAL or name in NO_ARTICLE:
        return name
    return ("an " if name[0] in "aeiou" and not name.startswith("u") else "a ") + name


def caption(names, colour, rng=random):
    """One of several wordings; a caption without a colour means a white background."""
    name = names[0] if rng.random() < 0.7 else rng.choice(names)
    name = article(name) if rng.random() < 0.5 else name
    if colour == "white" and rng.random() < 0.8:
        return name
    if colour == "grey" and rng.random() < 0.3:
        colour = "gray"
    a = "an" if colour == "orange" else "a"
    return rng.choice([f"{name} on {a} {colour} background"] * 4
                      + [f"{name}, {colour} background", f"{name} on {colour}"])


def all_captions():
    """Every caption `caption` can draw (used to choose the words of the tokenizers)."""
    out = set()
    for _, names in subjects():
        for name in names:
            for n in (name, article(name)):
                out.add(n)
                for colour in [*COLOURS, "gray"]:
                    a = "an" if colour == "orange" else "a"
                    out.update({f"{n} on {a} {colour} background", f"{n}, {colour} background",
                                f"{n} on {colour}"})
    return sorted(out)
