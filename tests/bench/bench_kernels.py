"""Rows of `atelier bench kernels` beside the same operation of PyTorch, by turns."""

import json
import time

import sides  # first: it sets how memory is kept
import torch
import torch.nn.functional as F

# How long a row of PyTorch is repeated in its turn, as Atelier's is.
PER_TURN = 0.7
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LINEARS = ["linear", "linear, eight chunks"]
if sides.multiplies_narrow():
    LINEARS += ["linear bf16", "linear bf16, eight", "linear int8", "linear int8, eight"]
if sides.has_tiles():
    LINEARS += ["linear amx", "linear amx, eight"]


class Row:
    """An operation: `amount` is operations (GFLOP/s) or bytes in f32 (GB/s); `make` gives (call, prepare) for a type."""

    def __init__(self, op, shape, amount, make):
        self.op, self.shape, self.amount, self.make = op, shape, amount, make

    @property
    def name(self):
        """As `--only` takes it."""
        return f"{self.op} {self.shape}"


def plain(call):
    """Nothing is to be prepared."""
    return call, lambda: None


def rows(full):
    """Those of cli/src/bench/speed.rs, by the same names. The sum over two ranks has no peer here."""
    tokens = [64, 512, 1536] + ([4608] if full else [])
    wide = [(3072, 21504), (15360, 3072)] if full else []
    for k, n in [(3072, 3072), (3072, 12288), (12288, 3072), *wide]:
        for m in tokens:
            for op in LINEARS:
                yield Row(op, f"{m} x {k} x {n}", 2 * m * k * n, linear(m, k, n))
    ways = [""] + [" bf16"] * sides.multiplies_narrow() + [" amx"] * sides.has_tiles()
    for l in tokens[1:]:
        for way in ways:
            yield Row(f"attention{way}", f"24 heads, {l} tokens", 4 * 24 * l * l * 128, attention(l))
    for channels, side in [(128, 128), (512, 64)]:
        amount = 2 * channels * channels * 9 * side * side
        for way in ways:
            yield Row(f"conv 3x3{way}", f"{channels} x {side} x {side}", amount, conv(channels, side))
    passes = {
        "layer norm, modulate": layer_norm,
        "rms norm": rms_norm,
        "softmax": softmax,
        "gelu": activation(lambda y: torch.ops.aten.gelu_(y)),
        "gelu tanh": activation(lambda y: torch.ops.aten.gelu_(y, approximate="tanh")),
        "silu": activation(lambda y: F.silu(y, inplace=True)),
    }
    for op, make in passes.items():
        yield Row(op, "4608 x 3072", 8 * 4608 * 3072, make)
    yield Row("group norm, silu", "128 x 128 x 128", 8 * 128**3, group_norm)


def linear(m, k, n):
    """x times a weight of n x k. PyTorch has no other order of the sum: "eight chunks" has the same peer."""

    def make(dtype):
        x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
        return plain(lambda: F.linear(x, weight))

    return make


def attention(l):
    """24 heads of 128 channels."""

    def make(dtype):
        x = torch.randn(1, 24, l, 128, dtype=dtype)
        return plain(lambda: F.scaled_dot_product_attention(x, x, x, scale=0.088))

    return make


def conv(channels, side):
    """3 x 3, in PyTorch's faster layout."""

    def make(dtype):
        last = torch.channels_last
        x = torch.randn(1, channels, side, side, dtype=dtype).to(memory_format=last)
        weight = torch.randn(channels, channels, 3, 3, dtype=dtype).to(memory_format=last)
        return plain(lambda: F.conv2d(x, weight, padding=1))

    return make


def layer_norm(dtype):
    """Scale and shift given as weight and bias: one pass, where diffusers makes three."""
    x, weight = torch.randn(4608, 3072, dtype=dtype), torch.randn(3072, dtype=dtype)
    scale = 1 + weight
    return plain(lambda: F.layer_norm(x, (3072,), scale, weight, 1e-6))


def rms_norm(dtype):
    """Over the width."""
    x, weight = torch.randn(4608, 3072, dtype=dtype), torch.randn(3072, dtype=dtype)
    return plain(lambda: F.rms_norm(x, (3072,), weight, 1e-6))


def softmax(dtype):
    """Over the width, into memory that is there."""
    x = torch.randn(4608, 3072, dtype=dtype)
    y = torch.empty_like(x)
    return plain(lambda: torch.softmax(x, -1, out=y))


def activation(apply):
    """In place, on the same numbers each time, as Atelier's."""

    def make(dtype):
        x = torch.randn(4608, 3072, dtype=dtype)
        y = x.clone()
        return lambda: apply(y), lambda: y.copy_(x)

    return make


def group_norm(dtype):
    """32 groups, then SiLU in place: PyTorch has no such pass in one."""
    x, weight = torch.randn(1, 128, 128, 128, dtype=dtype), torch.randn(128, dtype=dtype)
    return plain(lambda: F.silu(F.group_norm(x, 32, weight, weight, 1e-6), inplace=True))


def turn(timed):
    """PyTorch's best time of as many calls as fit, after one that is not counted."""
    call, prepare = timed
    sides.seconds(call, prepare)
    begin, best = time.perf_counter(), float("inf")
    while True:
        best = min(best, sides.seconds(call, prepare))
        if time.perf_counter() - begin > PER_TURN:
            return best


def measure(options, row):
    """Rounds of Atelier, PyTorch in f32, PyTorch in bf16; the best of each, in G/s."""
    made = {name: row.make(dtype) for name, dtype in TYPES.items()}
    atelier, torches = {}, dict.fromkeys(TYPES, float("inf"))
    full = ["--full"] if options.full else []
    for _ in range(options.rounds):
        found = [r for r in sides.atelier(options, "kernels", "--only", row.name, *full) if r["shape"] == row.shape]
        atelier = max([atelier, *found], key=lambda r: r.get("value", 0))
        for name, timed in made.items():
            torches[name] = min(torches[name], turn(timed))
    speeds = {name: row.amount / time / 1e9 for name, time in torches.items()}
    return {
        "op": row.op,
        "shape": row.shape,
        "unit": atelier["unit"],
        "atelier": atelier["value"],
        "of limit": atelier["ratio"],
        **{f"torch {name}": speed for name, speed in speeds.items()},
        **{f"/ {name}": atelier["value"] / speed for name, speed in speeds.items()},
    }


def main():
    """See README.md."""
    parser = sides.parser("Atelier's kernels beside PyTorch's, by turns. Speeds; a ratio over 1 says that Atelier is faster.")
    parser.add_argument("--only", default="", help="rows whose operation and shape start so, as `atelier bench kernels --only`")
    parser.add_argument("--full", action="store_true", help="also 4608 tokens")
    options = parser.parse_args()
    chosen = [row for row in rows(options.full) if row.name.startswith(options.only)]
    if not chosen:
        parser.error(f"--only: no row starts with {json.dumps(options.only)}")
    torch.set_num_threads(options.threads)
    numbers = ["atelier", "torch f32", "torch bf16"]
    columns = [("op", 22, ""), ("shape", 22, ""), ("unit", 8, ""), *((key, 11, ".1f") for key in numbers)]
    report = sides.Report(options, [*columns, ("/ f32", 8, ".2f"), ("/ bf16", 8, ".2f"), ("of limit", 10, ".2f")], torch=torch.__version__)
    with torch.inference_mode():
        for row in chosen:
            report.row(measure(options, row))
    report.end()


if __name__ == "__main__":
    main()
