"""What both benchmarks share: running Atelier, timing PyTorch, and writing the table."""

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


# Before PyTorch takes any memory: what imports it imports this first.
KEPT = keep_freed_pages()


def parser(description):
    """The options that both have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--rounds", type=positive, default=3, help="how often each side has its turn; the best counts")
    options.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of each side")
    options.add_argument("--atelier", type=Path, default=ROOT / "target/release/atelier", help="the program")
    options.add_argument("--json", action="store_true", help="one JSON object a line")
    return options


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

    def __init__(self, options, columns):
        """`columns`: (key in a row, width, format) of each."""
        import torch

        self.json, self.columns = options.json, columns
        about = {
            "torch": torch.__version__,
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
