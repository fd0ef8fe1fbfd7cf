"""Reads the golden data and fills networks by its recipe, so that no weight file is needed."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "golden"


def manifest() -> dict:
    return json.loads((FOLDER / "manifest.json").read_text())


def entry(name: str) -> dict:
    """The manifest's entry of one file, e.g. `io_stage_c_plain`."""
    return next(file for file in manifest()["files"] if file["file"].split(".")[0] == name)


def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def uniform(key: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1) that depend on `key` and their index alone (float64)."""
    with np.errstate(over="ignore"):
        index = np.arange(1, count + 1, dtype=np.uint64)
        z = index * np.uint64(0x9E3779B97F4A7C15) + np.uint64(zlib.crc32(key.encode())) * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


def _gain(gain, key: str) -> float:
    if not isinstance(gain, list):
        return float(gain)
    return float(next(value for pattern, value in gain if re.match(pattern, key)))


def fill_value(key: str, shape: tuple[int, ...], recipe: dict) -> torch.Tensor:
    """The value that the recipe `{salt, gain}` gives to the entry `key` (an ORIGINAL key name) of this shape."""
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    v = uniform(f"{recipe['salt']}/{key}", int(np.prod(shape)) if shape else 1).reshape(shape)
    if leaf == "running_mean":
        v = 0.1 * v
    elif leaf == "running_var":
        v = 1 + 0.5 * v
    elif leaf in ("gamma", "beta", "gammas"):
        v = 0.3 * v
    elif key.endswith("codebook.weight"):
        v = 1.5 * v
    elif len(shape) >= 2:
        v = _gain(recipe["gain"], key) * np.sqrt(3.0 / np.prod(shape[1:])) * v
    elif leaf == "weight":
        v = 1 + 0.2 * v
    else:
        v = 0.1 * v
    return torch.from_numpy(v).to(torch.float32)


def fill(shapes: dict[str, tuple[int, ...]], recipe: dict) -> dict[str, torch.Tensor]:
    """A state dict in ORIGINAL key names for `{original key: shape}`."""
    return {key: fill_value(key, tuple(shape), recipe) for key, shape in shapes.items()}


def assert_matches(name: str, key: str, actual: torch.Tensor) -> None:
    """Passes when `actual` is within the manifest's tolerance of tensor `key` in file `name`."""
    expected = tensors(name)[key]
    tolerance = entry(name)["tolerance"][key]
    bound = tolerance["atol"] + tolerance["rtol"] * expected.abs().double()
    gap = (actual.detach().double() - expected.double()).abs()
    worst = (gap / bound).max().item()
    assert worst <= 1, f"{name}:{key} is {worst:.3g} times its tolerance off"
