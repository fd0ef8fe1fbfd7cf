"""The file of a ControlNet: weights under the original's names, and a description of what it was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

KEY = "stable_cascade_controlnet"
DESCRIPTION = "controlnet.json"
"""Name of the same description in a folder in diffusers layout."""


def save_controlnet(path: str | PathLike[str], weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes one file.

    Args:
        weights: under the original's names.
        description: `config` (the network's), `filter` and `filter_params`, `model_version`.
    """
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(tensors, path, metadata={"format": "pt", KEY: json.dumps(dict(description))})


def read_description(path: str | PathLike[str]) -> dict[str, Any]:
    """What a ControlNet's file or folder says about itself; empty where it says nothing, as the original's files.

    Raises:
        ValueError: the file is no safetensors file.
    """
    place = Path(path)
    if place.is_dir():
        file = place / DESCRIPTION
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if place.suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(place), "pt") as opened:
            return json.loads((opened.metadata() or {}).get(KEY, "{}"))
    except SafetensorError as error:
        raise ValueError(f"ControlNet file '{place}' is damaged ({error}); copy or download it again") from None


def read_shapes(path: str | PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a .safetensors file, from its header alone."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
