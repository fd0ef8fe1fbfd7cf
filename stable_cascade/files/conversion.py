"""Networks from any format into any other: names change, values only where another type is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_cascade.components import CLIP, COMPONENTS
from stable_cascade.disk import local_path
from stable_cascade.wording import brief, quoted

from . import clip, controlnet
from .contents import Contents, Network, component_name, read_networks, same_values
from .json_files import write_configs
from .loading import check_fit, clip_config, clip_on_meta, on_meta, resolve_config
from .places import INDEX
from .presets import CLIP_CONFIGS, PRESETS
from .signatures import size_of
from .tensor_files import check_target, whole, write_tensors
from .weight_names import KEY_MAPS, NETWORK, STAGES, merge_checkpoint, to_bare

FORMATS = ("original", "diffusers", "comfyui", "openclip")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Report:
    """What was converted: components, the format and place, tensors rounded to the type, what was not carried over."""

    components: tuple[str, ...]
    format: str
    target: str
    rounded: int = 0
    left: tuple[str, ...] = field(default=())

    @property
    def bitwise(self) -> bool:
        """Whether every value is what it was."""
        return self.rounded == 0

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return vars(self) | {"bitwise": self.bitwise}

    def __str__(self) -> str:
        values = "every value as it was" if self.bitwise else f"{self.rounded} tensors rounded"
        text = f"{', '.join(self.components)} -> {self.target} ({self.format}), {values}"
        return f"{text}\nnot carried over: {brief(', '.join(self.left), 400)}" if self.left else text


def convert_networks(
    source: str | Path,
    target: str | Path,
    format: str,
    *,
    component: str | None = None,
    dtype: str | None = None,
    config: str | Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Writes the networks of a file or folder in another format.

    Args:
        target: a .safetensors file, or a folder where the format is one or several networks are written.
        format: `original`, `diffusers` (a folder with config.json each), `comfyui` (prefixed; several networks of a
            stage in one file), or `openclip` for CLIP's encoders.
        component: write this one alone; for `comfyui`, from a folder with both, the network whose checkpoint is meant.
        dtype: type of the floating-point values; None keeps each as it is.
        config: file or folder with the config of a network of one's own size.

    Raises:
        ValueError: the source holds no network, the format cannot hold these, or the target exists.
    """
    # Check every word and place before anything is read.
    if format not in FORMATS:
        raise ValueError(f"format {quoted(format, 60)} is none of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {quoted(dtype, 60)} is none of {', '.join(DTYPES)}")
    place, out = local_path(source), local_path(target)
    check_target(out, place, overwrite=overwrite)
    # Choose the networks and check that the target's name suits them.
    contents = read_networks(place)
    try:
        contents = _chosen(contents, format, component)
        contents = contents if config is None else _with_config(contents, config)
    except ValueError as error:
        raise ValueError(f"{quoted(place)}: {error}") from None
    _check_name(out, contents, format)
    # Change the type, and write beside the target until it is whole.
    networks, rounded = _typed(contents.networks, dtype)
    contents = replace(contents, networks=networks)
    with whole(out) as temporary:
        _WRITERS[format](temporary, contents, place)
    own = [name for network in networks.values() for name in network.left]
    return Report(tuple(networks), format, str(out), rounded, (*own, *contents.left))


def network_config(network: Network) -> dict[str, Any]:
    """The constructor's arguments of a network: its own, or those of the preset that its weights have.

    Raises:
        ValueError: neither is known.
    """
    try:
        if network.component in CLIP:
            return clip_config(network.component, network.weights, network.config)
        cls = COMPONENTS[network.component].load_class()
        return resolve_config(cls, network.component, network.config, network.weights)
    except ValueError as error:
        raise ValueError(f"{network.component}: {error}; --config names a file or folder with it") from None


def _chosen(contents: Contents, format: str, component: str | None) -> Contents:
    """The networks that are to be written.

    Raises:
        ValueError: the component is not there, or the format needs one to be named.
    """
    networks, wanted, left = contents.networks, list(contents.networks), list(contents.left)
    if component is not None:
        name = component_name(component)
        if name not in networks:
            raise ValueError(f"there is no {name} in it; it has {', '.join(networks)}")
        several = format == "comfyui" and name in STAGES and len(networks) > 1
        wanted = [part for part in STAGES[name] if part in networks] if several else [name]
    elif format == "comfyui" and len(networks) > 1:
        stages = [name for name in STAGES if name in networks]
        if len(stages) > 1:
            raise ValueError("this has the prior and the decoder, which ComfyUI keeps in two files; add --component "
                             "prior or --component decoder")  # fmt: skip
        wanted = [part for part in STAGES[stages[0]] if part in networks] if stages else wanted
    chosen = {name: networks[name] for name in wanted}
    if component is not None:  # what was not asked for is not lost
        return Contents(chosen, contents.metadata)
    left += [name for name in networks if name not in wanted]
    if format == "diffusers":
        return Contents(chosen, contents.metadata, tuple(left), contents.plain)
    return Contents(chosen, contents.metadata, (*left, *(folder.name for folder in contents.plain)))


def _with_config(contents: Contents, config: str | Path) -> Contents:
    if len(contents.networks) != 1:
        raise ValueError("--config is for one network; name it with --component")
    ((name, network),) = contents.networks.items()
    if name in CLIP:
        settings = clip_config(name, network.weights, config)
    else:
        settings = resolve_config(COMPONENTS[name].load_class(), name, str(config), network.weights)
    return replace(contents, networks={name: replace(network, config=settings)})


def _check_name(out: Path, contents: Contents, format: str) -> None:
    """Passes when the target's name and the networks suit the format.

    Raises:
        ValueError: they do not.
    """
    names = list(contents.networks)
    only_clip = all(name in CLIP for name in names)
    if format == "openclip" and not (only_clip and len(names) == 1):
        raise ValueError(f"openclip is for one of CLIP's encoders, and this is {', '.join(names)}; add --component")
    if format == "original" and only_clip:
        raise ValueError(f"the original keeps the {names[0]} in transformers' format; write --to diffusers")
    folder = format == "diffusers" or (format == "original" and len(names) > 1)
    if folder and out.suffix == ".safetensors":
        raise ValueError(f"{quoted(out)}: {format} of {', '.join(names)} is a folder; name it without .safetensors")
    if not folder and out.suffix != ".safetensors":
        raise ValueError(f"{quoted(out)}: {format} of {', '.join(names)} is one file; give a name with .safetensors")


def _typed(networks: Mapping[str, Network], dtype: str | None) -> tuple[dict[str, Network], int]:
    """The networks in another type, and how many tensors that rounds."""
    if dtype is None:
        return dict(networks), 0
    wanted, rounded, typed = DTYPES[dtype], 0, {}
    for name, network in networks.items():
        weights = {}
        for key, value in network.weights.items():
            weights[key] = _cast(value, wanted, f"{name} {key}") if value.is_floating_point() else value
            rounded += value.is_floating_point() and torch.promote_types(value.dtype, wanted) != wanted
        typed[name] = replace(network, weights=weights)
    return typed, rounded


def _cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = value.to(dtype)
    if dtype == torch.float16 and value.dtype != dtype and bool((cast.isinf() & value.isfinite()).any()):
        raise ValueError(f"{name} has values beyond float16's 65504; use --dtype bfloat16")
    return cast


def _write_original(out: Path, contents: Contents, source: Path) -> None:
    if len(contents.networks) == 1:
        ((name, network),) = contents.networks.items()
        write_tensors(out, to_bare(network.weights, name), _header(contents))
        return
    out.mkdir()
    for name, network in contents.networks.items():
        if name in CLIP:
            _write_folder(out / name, network, {})
            continue
        alone = replace(contents, networks={name: network})
        write_tensors(out / f"{COMPONENTS[name].file}.safetensors", to_bare(network.weights, name), _header(alone))


def _write_comfyui(out: Path, contents: Contents, source: Path) -> None:
    networks = contents.networks
    if len(networks) == 1 and not networks.keys() & STAGES.keys():
        ((name, network),) = networks.items()
        weights = to_bare(network.weights, name)
    elif len(networks) == 1:
        ((name, network),) = networks.items()
        weights = {NETWORK + key: value for key, value in to_bare(network.weights, name).items()}
    else:
        weights = merge_checkpoint({name: network.weights for name, network in networks.items()})
    write_tensors(out, weights, _header(contents))


def _write_openclip(out: Path, contents: Contents, source: Path) -> None:
    ((name, network),) = contents.networks.items()
    write_tensors(out, clip.to_openclip(network.weights, name), _header(contents))


def _write_diffusers(out: Path, contents: Contents, source: Path) -> None:
    out.mkdir()
    if len(contents.networks) == 1 and not contents.plain:
        ((name, network),) = contents.networks.items()
        _write_folder(out, network, contents.metadata)
        return
    for name, network in contents.networks.items():
        (out / name).mkdir()
        _write_folder(out / name, network, contents.metadata)
    for folder in contents.plain:
        shutil.copytree(folder, out / folder.name)
    if (source / INDEX).is_file():
        shutil.copyfile(source / INDEX, out / INDEX)


_WRITERS = {
    "original": _write_original,
    "diffusers": _write_diffusers,
    "comfyui": _write_comfyui,
    "openclip": _write_openclip,
}


def _write_folder(out: Path, network: Network, metadata: Mapping[str, str]) -> None:
    """One network in diffusers' layout."""
    out.mkdir(exist_ok=True)
    settings = network_config(network)
    if network.component in CLIP:
        model = clip_on_meta(network.component, settings)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(out)
        file = "model.safetensors"
    else:
        model = on_meta(COMPONENTS[network.component].load_class(), settings)
        model.save_config(out)
        file = "diffusion_pytorch_model.safetensors"
    check_fit(model, network.weights, network.component)
    write_tensors(out / file, network.weights, metadata)
    if network.description:
        (out / controlnet.DESCRIPTION).write_text(json.dumps(network.description, indent=1), encoding="utf-8")


def _header(contents: Contents) -> dict[str, str]:
    """The metadata of one file: what there was, a ControlNet's description, configs of sizes that are no preset."""
    header = dict(contents.metadata)
    configs = {}
    for name, network in contents.networks.items():
        if network.description:
            header[controlnet.KEY] = json.dumps(network.description)
        elif network.config is not None and not _known(network):
            configs[name] = network.config
    return header | write_configs(configs)


def _known(network: Network) -> bool:
    """Whether a network's config follows from its shapes alone."""
    assert network.config is not None
    size = size_of({name: tuple(value.shape) for name, value in network.weights.items()}, network.component)
    table = PRESETS.get(network.component) if network.component in KEY_MAPS else CLIP_CONFIGS[network.component]
    if size == "embedded" and network.component in CLIP:
        return True
    return size is not None and table is not None and same_values(network.config, table[size])
