"""The file of a ControlNet: weights under the original's names, and a description of what it was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from stable_cascade.disk import local_path
from stable_cascade.wording import brief, quoted

from .json_files import check_sizes, parse_json, read_json
from .tensor_files import checked_header

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
    place = local_path(path)
    if place.is_dir():
        file = place / DESCRIPTION
        return _checked(read_json(file), f"'{file}'") if file.is_file() else {}
    if place.suffix != ".safetensors":
        return {}
    named = f"ControlNet file {quoted(place)}"
    try:
        text = checked_header(place).metadata.get(KEY, "{}")
    except ValueError as error:
        raise ValueError(f"ControlNet file {error}") from None
    return _checked(parse_json(text, f"{named}: its description"), named)


def _checked(description: dict[str, Any], named: str) -> dict[str, Any]:
    """The description, if its entries are of the kinds that `save_controlnet` writes.

    Raises:
        ValueError: one is not.
    """
    for key, kind, meant in (
        ("config", dict, "an object"),
        ("filter", str, "a text"),
        ("filter_params", dict, "an object"),
        ("model_version", str, "a text"),
    ):
        value = description.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{named}: its {key} is {brief(value, 60)}, and {meant} is needed; export it again")
    check_sizes(description, named)
    return description


def read_shapes(path: str | PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a .safetensors file, from its header alone.

    Raises:
        ValueError: it is no safetensors file.
    """
    return {name: info.shape for name, info in checked_header(path).tensors.items()}
