"""Loads a network from one file of the original release, or of ours, without any network access."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.formats.networks import from_original

from .presets import PRESETS, preset

Source = str | PathLike[str] | Mapping[str, Tensor]


def load_single_file(
    cls: type[Any],
    component: str,
    source: Source,
    config: Mapping[str, Any] | str | None = None,
    torch_dtype: torch.dtype | None = None,
    *,
    device: str | torch.device | None = None,
) -> Any:
    """A network of `cls` with the weights of `source`, in evaluation mode.

    The weights are read into place: the network is built on the meta device and holds the file's own tensors, so that
    memory never has two copies.

    Args:
        cls: the model class.
        component: its name in `formats`: prior, decoder, vqgan, image_encoder, previewer or controlnet.
        source: a .safetensors file (others are read as pickled weights, with a warning) or a state dict; the names are
            the original's or ours.
        config: the constructor's arguments, a preset's name, or a folder or file with a config.json. None takes the
            preset whose shapes the weights have.
        torch_dtype: type of the floating-point weights; None keeps the file's.
        device: where the weights go; None leaves them on the CPU.

    Raises:
        ValueError: the file is missing or damaged, the config is not known, or names or shapes do not fit it.
    """
    weights = from_original(source if isinstance(source, Mapping) else read_weights(source), component)
    settings = resolve_config(cls, component, config, weights)
    model = on_meta(cls, settings)
    check_fit(model, weights, component)
    for name in list(weights):
        weights[name] = _placed(weights[name], torch_dtype, device)
    model.load_state_dict(weights, strict=True, assign=True)
    if device is not None:
        model.to(device)
    return model.eval()


def read_weights(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a file, on the CPU.

    Raises:
        ValueError: there is no such file, or it holds no state dict.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"weights file {str(path)!r} does not exist; give the path of a local .safetensors file")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"weights file {str(path)!r} is damaged ({error}); download it again") from error
    warnings.warn(f"{file.name} is a pickle file; only its tensors are read. Prefer .safetensors", stacklevel=3)
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"weights file {str(path)!r} holds no state dict; give a file of one network's weights")
    return content


def on_meta(cls: type[Any], settings: Mapping[str, Any]) -> Any:
    """A network without weights: its parameters are on the meta device, its buffers are real."""
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import no_init_weights

    with no_init_weights(), init_empty_weights():
        return cls.from_config(dict(settings))


def resolve_config(
    cls: type[Any], component: str, config: Mapping[str, Any] | str | None, weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The constructor's arguments that `config` means; see `load_single_file`."""
    presets = PRESETS[component]
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, str) and config in presets:
        return preset(component, config)
    if config is not None:
        return _read_config(config, component)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    for settings in presets.values():
        if _shapes(on_meta(cls, settings)) == shapes:
            return dict(settings)
    raise ValueError(
        f"the weights have the shapes of no {component} preset ({', '.join(presets)}); pass config= for their size"
    )


def single_file_config(cls: type[Any], component: str, path: str | PathLike[str]) -> dict[str, Any]:
    """The constructor's arguments of the preset that a .safetensors file holds, from its header alone.

    Raises:
        ValueError: its shapes are those of no preset.
    """
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file, torch.device("meta"):
        weights = {name: torch.empty(file.get_slice(name).get_shape()) for name in file.keys()}
    return resolve_config(cls, component, None, from_original(weights, component))


def _read_config(config: str | PathLike[str], component: str) -> dict[str, Any]:
    path = Path(config)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        names = ", ".join(PRESETS[component])
        nearest = difflib.get_close_matches(str(config), PRESETS[component], n=1, cutoff=0.0)
        raise ValueError(f"config {str(config)!r} is neither a preset ({names}; nearest: {nearest[0]!r}) nor a file")
    return json.loads(file.read_text(encoding="utf-8"))


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], component: str) -> None:
    """Passes when names and shapes of the weights are the model's.

    Raises:
        ValueError: naming the first weight that is missing, unknown or of another shape.
    """
    expected, found = _shapes(model), {name: tuple(value.shape) for name, value in weights.items()}
    for name in expected:
        if name not in found:
            raise ValueError(
                f"{component} weight {name} is missing from the file; check config, and that it is a {component}"
            )
    for name in found:
        if name not in expected:
            raise ValueError(f"the file has {name}, which the {component} of this config lacks; check config")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{component} weight {name} is {found[name]} in the file, {shape} by the config; check config"
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _placed(value: Tensor, dtype: torch.dtype | None, device: str | torch.device | None) -> Tensor:
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
