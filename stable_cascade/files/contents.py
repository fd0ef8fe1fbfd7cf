"""The networks in a file or folder, whoever wrote it, under our names and with what is known about them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stable_cascade.components import OTHER_WORDS, WITH_WEIGHTS
from stable_cascade.disk import local_path
from stable_cascade.wording import brief, quoted

from . import controlnet
from .json_files import KEY, read_config, read_configs
from .loading import read_file
from .places import INDEX, weight_files
from .signatures import what_else
from .tensor_files import read_tensors
from .weight_names import split_checkpoint, to_ours


@dataclass(frozen=True)
class Network:
    """Weights under our names; `config` is None where nothing says it; `description` is a ControlNet's.

    `left` is what lay with it and has no place in another format.
    """

    component: str
    weights: dict[str, Tensor]
    config: dict[str, Any] | None = None
    description: dict[str, Any] = field(default_factory=dict)
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contents:
    """Networks by component, the rest of the header, what belongs to none of them, and folders without weights."""

    networks: dict[str, Network]
    metadata: dict[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    plain: tuple[Path, ...] = ()


def component_name(name: str) -> str:
    """A component's own name, from it or another word for it.

    Raises:
        ValueError: there is no such component.
    """
    known = OTHER_WORDS.get(name, name)
    if known not in WITH_WEIGHTS:
        raise ValueError(f"component {quoted(name, 60)} is none of {', '.join([*WITH_WEIGHTS, *OTHER_WORDS])}")
    return known


def read_networks(source: str | Path) -> Contents:
    """The networks of a weights file, of a network's folder, of a whole pipeline's, or of files beside each other.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    place = local_path(source)
    if not place.is_dir():
        return _of_file(place)
    if (place / INDEX).is_file():
        return _of_pipeline(place)
    found = _of_folder(place) or _side_by_side(place)
    if not found.networks:
        raise ValueError(f"{quoted(place)} holds no network: no {INDEX}, no weights, no folders with weights")
    return found


def _of_file(place: Path) -> Contents:
    tensors, metadata = read_file(place)
    split = split_checkpoint(tensors)
    if not split.parts:
        raise ValueError(f"{quoted(place)} is {what_else(tensors)}, no network of Stable Cascade")
    configs = read_configs(metadata)
    networks = {}
    for component, part in split.parts.items():
        ours = to_ours(part, component)
        description = controlnet.read_description(place) if component == "controlnet" else {}
        config = configs.get(component, description.get("config"))
        constants = tuple(f"{component} {name}" for name in ours.constants)
        networks[component] = Network(component, ours.weights, config, description, constants)
    kept = {key: value for key, value in metadata.items() if key not in ("format", KEY, controlnet.KEY)}
    return Contents(networks, kept, tuple(split.left))


def _of_folder(place: Path) -> Contents | None:
    """The network in a folder in diffusers' layout."""
    files = weight_files(place)
    if not files:
        return None
    # Read all shards of the network's weights.
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        read, header = read_tensors(file)
        tensors |= read
        metadata |= header
    # Find out which network it is.
    parts = split_checkpoint(tensors).parts
    if len(parts) != 1:
        raise ValueError(f"{quoted(place)} is {what_else(tensors)}, no network of Stable Cascade")
    component = next(iter(parts))
    # What describes it, and the names of the files that stay behind.
    config = read_config(place / "config.json") if (place / "config.json").is_file() else None
    description = controlnet.read_description(place) if component == "controlnet" else {}
    known = {file.name for file in files} | {"config.json", controlnet.DESCRIPTION}
    names = sorted(path.name for path in place.iterdir())
    left = tuple(name for name in names if name not in known and not name.endswith(".index.json"))
    weights = to_ours(parts[component], component).weights
    network = Network(component, weights, _arguments(config), description, left)
    kept = {key: value for key, value in metadata.items() if key not in ("format", KEY)}
    return Contents({component: network}, kept)


def _of_pipeline(place: Path) -> Contents:
    networks: dict[str, Network] = {}
    metadata: dict[str, str] = {}
    left, plain = [], []
    for folder in sorted(path for path in place.iterdir() if path.is_dir()):
        found = _of_folder(folder)
        if found is None:
            plain.append(folder)
            continue
        ((component, network),) = found.networks.items()
        if component in networks:  # prior and prior_lite, for example: the one under the component's own name stays
            left.append(folder.name)
            continue
        inner = tuple(f"{folder.name}/{name}" for name in network.left)
        networks[component] = replace(network, left=inner)
        metadata |= found.metadata
    if not networks:
        raise ValueError(f"{quoted(place)} is a pipeline's folder without any weights; download them")
    return Contents(networks, metadata, tuple(left), tuple(plain))


def _side_by_side(place: Path) -> Contents:
    """The networks in a folder's folders and files, as the original release has them, or a checkpoint taken apart.

    Raises:
        ValueError: there are two of one kind.
    """
    networks: dict[str, Network] = {}
    metadata: dict[str, str] = {}
    left: list[str] = []
    origins: dict[str, str] = {}
    # One network per folder or file; two of one kind leave open which is meant.
    for path in sorted(place.iterdir()):
        found = _of_folder(path) if path.is_dir() else _of_file(path) if path.suffix == ".safetensors" else None
        if found is None:
            left.append(path.name)
            continue
        for component, network in found.networks.items():
            if component in networks:
                both = f"{origins[component]} and {path.name}"
                raise ValueError(f"{quoted(place)} has the {component} twice, in {both}; convert one of them")
            networks[component], origins[component] = network, path.name
        metadata |= found.metadata
        left += found.left
    return Contents(networks, metadata, tuple(left))


def _arguments(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A config without what diffusers notes beside the arguments."""
    return None if config is None else {key: value for key, value in config.items() if not key.startswith("_")}


def same_values(config: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether a config says what a known one does, lists and tuples being the same."""
    return all(json.dumps(config.get(key), default=brief) == json.dumps(value) for key, value in known.items())
