"""What the benchmarks share: options, running Atelier, timing the other side, and writing the table."""

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def keep_freed_pages():
    """Has glibc keep what is freed, with the settings of shard/kernels/src/memory.rs. Says whether it could."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    m_trim_threshold, m_top_pad, m_mmap_threshold, m_arena_max, most = -1, -2, -3, -8, 2**31 - 1
    settings = [(m_mmap_threshold, most), (m_trim_threshold, most), (m_top_pad, 64 << 20), (m_arena_max, 1)]
    return all([mallopt(name, value) == 1 for name, value in settings])


# Before the other side takes any memory: what imports PyTorch or stable-diffusion.cpp imports this first.
KEPT = keep_freed_pages()
# PyTorch asks for large pages too, as shard/kernels/src/memory.rs does.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def parser(description):
    """The options that all have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--rounds", type=positive, default=3, help="how often each side has its turn; the best counts")
    options.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of each side")
    options.add_argument("--atelier", type=Path, default=ROOT / "target/release/atelier", help="the program")
    options.add_argument("--json", action="store_true", help="one JSON object a line")
    return options


def network_parser(description, weights, others=(), **defaults):
    """The options of those that run whole networks with weights of these types. All but `others` run where `defaults` do not choose."""
    families = ["flux", "vae", "t5"]
    options = parser(description)
    options.add_argument("--family", nargs="+", choices=[*families, *others], default=families)
    options.add_argument("--weights", nargs="+", choices=weights, default=list(weights))
    options.add_argument("--side", nargs="+", type=positive, default=[256, 512], help="of the picture, in pixels")
    options.add_argument("--blocks", type=positive, default=1, help="of FLUX.1, with two streams")
    options.add_argument("--single-blocks", type=positive, default=2, help="of FLUX.1, with one stream")
    options.add_argument("--steps", type=positive, default=2, help="forwards in each turn")
    options.add_argument("--folder", type=directory, help="where weights are written for the time of a turn")
    options.set_defaults(**defaults)
    return options


def directory(text):
    """A folder that is there."""
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return text


def positive(text):
    """A number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def atelier(options, *arguments):
    """Runs `atelier bench ...` and gives its rows, parsed. Ends the benchmark where it fails."""
    command = [str(options.atelier), "bench", *map(str, arguments), "--threads", str(options.threads), "--json"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        sys.exit(f"--atelier: {error}; build it with `cargo build --release --locked --workspace --bins`")
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def forward(options, arguments, weights, products):
    """The best forward of `atelier bench model` in one turn, in seconds."""
    held = ["--weights", weights, "--products", products, "--steps", options.steps]
    folder = ["--folder", options.folder] if options.folder else []
    rows = atelier(options, "model", *arguments, *held, *folder)
    return next(row["figure"] for row in rows if row["unit"] == "s")


def seconds(call, prepare=lambda: None):
    """How long one call takes, what `prepare` does left out."""
    prepare()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def page_faults():
    """Pages this process has asked the system for so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Report:
    """Rows, written as they come: a run that is stopped has told what it measured."""

    def __init__(self, options, columns, **peer):
        """`columns`: (key in a row, width, format) of each. `peer`: the other side's name and version."""
        self.json, self.columns = options.json, columns
        about = {
            **peer,
            "threads": options.threads,
            "rounds": options.rounds,
            "processor": processor(),
            "freed pages kept": KEPT,
            "load_before": round(os.getloadavg()[0], 2),
        }
        self.write_about(about)
        if not self.json:
            print("".join(f"{key:<{width}}" if form == "" else f"{key:>{width}}" for key, width, form in columns), flush=True)

    def row(self, row):
        """Writes one."""
        if self.json:
            print(json.dumps(row), flush=True)
            return
        cells = (cell(row.get(key), width, form) for key, width, form in self.columns)
        print("".join(cells), flush=True)

    def end(self):
        """Says how busy the machine was at the end."""
        self.write_about({"load_after": round(os.getloadavg()[0], 2)})

    def write_about(self, about):
        """Writes what holds for all rows."""
        print(json.dumps(about) if self.json else ", ".join(f"{key} {value}" for key, value in about.items()), flush=True)


def cell(value, width, form):
    """One cell: text to the left, numbers to the right, a dash for none."""
    if value is None:
        return f"{'-':>{width}}"
    return f"{value:<{width}}" if form == "" else f"{format(value, form):>{width}}"


def processor():
    """Its name and the instructions for products it has, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    wanted = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if flag in flags]
    return " ".join([fields.get("model name", "unknown"), *wanted])


def fastest_bf16():
    """Which of Atelier's products of bf16 are faster than those in f32 here, if any."""
    if has_tiles():
        return "amx"
    return "bf16" if "avx512_bf16" in processor().split() else None


def multiplies_narrow():
    """Whether Atelier's products can be in bf16 and in 8 bits here."""
    return "avx2" in processor().split()


def has_tiles():
    """Whether bf16 is multiplied in tiles here."""
    return "amx_bf16" in processor().split()
