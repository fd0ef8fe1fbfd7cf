"""The row of loading a released-size prior from one file: seconds and peak memory, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from stable_cascade.files.presets import PRESETS

from .measure import Row
from .scale import Scale

ROOT = Path(__file__).resolve().parents[1]

CHILD = """
import json, sys, time
import torch
from benchmarks.measure import memory
from diffusers.models import StableCascadeUNet
from stable_cascade import StableCascadePrior
from stable_cascade.files.presets import PRESETS
path, who = sys.argv[1:]
before = memory()
start = time.perf_counter()
if who == "ours":
    network = StableCascadePrior.from_single_file(path, config="1B")
else:
    from safetensors.torch import load_file
    from stable_cascade.files import from_original
    config = PRESETS["prior"]["1B"]
    network = StableCascadeUNet(**config).to(torch.bfloat16)
    network.load_state_dict(from_original(load_file(path), "prior"))
# One number of every page: weights that are mapped from the file are only read when they are used.
checked = sum(float(parameter.detach().flatten()[::2048].float().sum()) for parameter in network.parameters())
elapsed = time.perf_counter() - start
print(json.dumps({"seconds": elapsed, "gigabytes": memory() - before, "first_weights": checked}))
"""


def rows(scale: Scale) -> Iterator[Row]:
    """Time and memory of a 1B prior in bfloat16, in the original's layout."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stage_c_lite_bf16.safetensors"
        write_prior(file)
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for number in range(max(2, scale.rounds // 2)):
            for who in ("ours", "peer") if number % 2 else ("peer", "ours"):
                found[who].append(loaded(file, who))
    name = "diffusers UNet built, then load_state_dict"
    for key, unit, row in (("seconds", "s", "load a 1B prior"), ("gigabytes", "GiB", "load a 1B prior, memory")):
        own, theirs = ([one[key] for one in found[who]] for who in ("ours", "peer"))
        ratios = sorted(b / a for a, b in zip(own, theirs, strict=True))
        yield Row(row, median(own), median(theirs), unit, median(ratios), (ratios[0], ratios[-1]), name)


def write_prior(file: Path) -> None:
    """A file of the released 1B prior's names and shapes, in the original's layout and bfloat16."""
    from safetensors.torch import save_file

    from stable_cascade import StableCascadePrior
    from stable_cascade.files import to_original
    from stable_cascade.files.loading import on_meta

    network = on_meta(StableCascadePrior, PRESETS["prior"]["1B"])
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    weights = {name: torch.full(tuple(shape), 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(to_original(weights, "prior"), file)


def loaded(file: Path, who: str) -> dict[str, Any]:
    """What one process measured."""
    command = [sys.executable, "-c", CHILD, str(file), who]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
