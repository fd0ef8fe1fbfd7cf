"""`python -m benchmarks.run`: every row, as a table, as Markdown and as JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import re
import time
import warnings
from pathlib import Path

import torch

from .measure import Row
from .scale import CPU, GPU, QUICK, Scale

HERE = Path(__file__).resolve().parent
PARTS = ("data", "loading", "networks", "training", "drawing")
SCALES = {"cpu": CPU, "gpu": GPU, "quick": QUICK}
PACKAGES = ("torch", "diffusers", "peft", "transformers", "webdataset", "pillow")


def main(argv: list[str] | None = None) -> None:
    """Measures, prints each row as it comes, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts to run; absent: all")
    parser.add_argument("--results", action="store_true", help="also write benchmarks/results/<date>-<hardware>.md")
    arguments = parser.parse_args(argv)
    scale = SCALES[arguments.scale]
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--scale gpu needs a CUDA device, and torch sees none; use --scale cpu")
    warnings.filterwarnings("ignore")
    _quiet()
    start, rows = time.perf_counter(), []
    for part in arguments.only:
        if part == "loading" and scale is QUICK:
            continue
        for row in importlib.import_module(f".{part}", __package__).rows(scale):
            rows.append(row)
            print(line(row), flush=True)
        write_json(rows)
        if arguments.results:
            path = write_results(rows, scale)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes on {hardware()}")
    if arguments.results:
        print(f"wrote {path}")


def write_json(rows: list[Row]) -> None:
    """All rows so far, for programs."""
    out = HERE / "out" / "bench.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps([row.entry() for row in rows], indent=1) + "\n", encoding="utf-8")


def line(row: Row) -> str:
    """A row of the Markdown table."""
    ratio = "" if row.ratio is None else f"**{row.ratio:.2f}**"
    spread = "" if row.spread is None else f"{row.spread[0]:.2f} … {row.spread[1]:.2f}"
    peer = "" if row.peer is None else f"{row.peer:.3g}"
    named = "; ".join(filter(None, (row.peer_name, row.note)))
    cpu = "" if row.cpu is None else f"{row.cpu:.2f}"
    return f"| {row.row} | {row.ours:.3g} | {peer} | {row.unit} | {ratio} | {spread} | {cpu} | {named} |"


def write_results(rows: list[Row], scale: Scale) -> Path:
    """The Markdown page of this run."""
    day = datetime.date.today().isoformat()
    path = HERE / "results" / f"{day}-{_slug(hardware())}.md"
    path.parent.mkdir(exist_ok=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    head = [
        f"# {day}, {hardware()}", "",
        f"Networks: {scale.name}; type {str(scale.dtype).removeprefix('torch.')}; {torch.get_num_threads()} threads.",
        f"Python {platform.python_version()}, {versions}.",
        "Ours and the peer alternate in one process; the ratio is the median of the pairs and above 1 where ours is",
        "better, the spread its lowest and highest pair; CPU is the median ratio of the processor's times.", "",
        "| row | ours | peer | unit | ratio | spread | CPU | peer |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    path.write_text("\n".join([*head, *map(line, rows)]) + "\n", encoding="utf-8")
    return path


def hardware() -> str:
    """The GPU's name, or the CPU's kind and cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores, capability = len(os.sched_getaffinity(0)), torch.backends.cpu.get_cpu_capability()
    return f"{cores} cores {_processor()} {capability}"


def _processor() -> str:
    """The processor's name as Linux tells it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return re.sub(r"\((R|TM)\)|\bProcessor\b|\bCPU\b", "", names[0]).strip() if names else platform.machine()


def _slug(text: str) -> str:
    return "-".join("".join(one if one.isalnum() else " " for one in text.lower()).split())


def _quiet() -> None:
    """No progress bars, no advice."""
    import diffusers
    import transformers

    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
