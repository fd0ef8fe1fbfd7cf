"""Loads a network from one file: of the original release, of ours or ComfyUI's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade import hub
from stable_cascade.components import COMPONENTS
from stable_cascade.disk import local_path
from stable_cascade.redaction import bare_address
from stable_cascade.wording import brief, quoted

from . import tensor_files
from .detection import describe_tensors, infos_of, is_lora
from .json_files import read_config, read_configs, read_json
from .presets import CLIP_CONFIGS, PRESETS, clip_preset, preset
from .signatures import component_of, size_of, what_else
from .tensor_files import check_kinds, check_names, checked_header
from .weight_names import from_original, split_checkpoint, to_ours

Source = str | PathLike[str] | Mapping[str, Tensor]


def load_single_file(
    cls: type[Any],
    component: str,
    source: Source,
    config: Mapping[str, Any] | str | None = None,
    torch_dtype: torch.dtype | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    subfolder: str | None = None,
) -> Any:
    """A network of `cls` with the weights of `source`, in evaluation mode.

    The weights are read into place: the network is built on the meta device and holds the file's own tensors, so that
    memory never has two copies.

    Args:
        cls: the model class.
        component: its name in `formats`: prior, decoder, vqgan, semantic_encoder, previewer or controlnet.
        source: a .safetensors file (others are read as pickled weights, with a warning), a file's address on the Hub,
            or a state dict; the names are the original's, ours or ComfyUI's, whose checkpoints may hold other networks
            as well.
        config: the constructor's arguments, a preset's name, or a folder or file with a config.json. None takes what
            the file says of itself, else the preset whose shapes the weights have.
        torch_dtype: type of the floating-point weights; None keeps the file's.
        device: where the weights go; None leaves them on the CPU.
        dtype: `torch_dtype` under the name that newer code gives it.
        subfolder: where below the folder `config` the config.json is.

    Raises:
        ValueError: the file is missing or damaged, holds something else, the config is not known, or names or shapes
            do not fit it.
    """
    # Check the arguments.
    torch_dtype = torch_dtype if dtype is None else dtype
    if torch_dtype is not None and not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"torch_dtype {quoted(torch_dtype)} is no type of torch; give one, such as torch.bfloat16")
    if subfolder is not None:
        if config is None or isinstance(config, Mapping):
            raise ValueError(
                f"subfolder {quoted(subfolder)} is one of the folder that config names; give config=FOLDER"
            )
        config = str(local_path(config) / subfolder)
    # Find the network in the file, build it without memory, and check that both fit.
    named = "state dict" if isinstance(source, Mapping) else f"weights file {quoted(source)}"
    content, metadata = (source, {}) if isinstance(source, Mapping) else read_file(source)
    check_names(content, named)
    try:
        weights = weights_of(content, component)
        config = read_configs(metadata).get(component) if config is None else config
        settings = resolve_config(cls, component, config, weights)
        model = built_on_meta(cls, settings, component)
        check_fit(model, weights, component)
        _check_types(weights, torch_dtype)
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from error
    # Convert one tensor at a time, so that memory never has two copies.
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
    return read_file(path)[0]


def read_file(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict and the metadata of a file, or of an address on the Hub, which is downloaded.

    Raises:
        ValueError: there is no such file, or it holds no state dict.
    """
    file = hub_file(str(path)) if str(path).startswith(("http:", "https:")) else local_path(path)
    return tensor_files.read_weights(file)


def weights_of(state_dict: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """One component's weights under our names, from its own file or from a checkpoint that holds it among others.

    Raises:
        ValueError: this is something else; the error says what.
    """
    parts = split_checkpoint(state_dict).parts
    if component in parts:
        return to_ours(parts[component], component).weights
    if parts or is_lora(state_dict):
        found = describe_tensors(infos_of(state_dict), "it")
        remedy = "give it to load_lora_weights" if found.kind == "lora" else f"give a file of the {component}"
        raise ValueError(f"this is {found.short()}, not the {COMPONENTS[component].title}; {remedy}")
    return from_original(state_dict, component)


def built_on_meta(cls: type[Any], settings: Mapping[str, Any], component: str) -> Any:
    """`on_meta`, where the settings may come from a file.

    Raises:
        ValueError: the class cannot be built with them.
    """
    try:
        return on_meta(cls, settings)
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {brief(error)}"
        raise ValueError(f"no {component} can be built from this config ({reason}); check config") from error


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
    # Given: as it is, by a preset's name, or from a file.
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, str) and config in presets:
        return preset(component, config)
    if config is not None:
        return _read_config(config, component)
    # Not given: the preset whose shapes these are.
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    size = size_of(shapes, component)
    if size in presets:
        return preset(component, str(size))
    if component_of(shapes) is None:
        raise ValueError(
            f"this is {what_else(shapes)}, not the {COMPONENTS[component].title}; pass config= for one of your own"
        )
    raise ValueError(
        f"the weights have the shapes of no {component} preset ({', '.join(presets)}); pass config= for their size"
    )


def single_file_config(cls: type[Any], component: str, path: str | PathLike[str]) -> dict[str, Any]:
    """The constructor's arguments of the preset that a .safetensors file holds, from its header alone.

    Raises:
        ValueError: its shapes are those of no preset.
    """
    header = checked_header(path)
    try:
        with torch.device("meta"):
            weights = {name: torch.empty(info.shape) for name, info in header.tensors.items()}
        weights = weights_of(weights, component)
        settings = resolve_config(cls, component, read_configs(header.metadata).get(component), weights)
        check_shapes(_shapes(on_meta(cls, settings)), weights, component)
        return settings
    except ValueError as error:
        raise ValueError(f"weights file {quoted(path)}: {error}") from error


def _read_config(config: str | PathLike[str], component: str) -> dict[str, Any]:
    path = local_path(config)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        names = ", ".join(PRESETS[component])
        nearest = difflib.get_close_matches(str(config), PRESETS[component], n=1, cutoff=0.0)
        raise ValueError(f"config {str(config)!r} is neither a preset ({names}; nearest: {nearest[0]!r}) nor a file")
    return read_config(file)


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], component: str) -> None:
    """Passes when names and shapes of the weights are the model's.

    Raises:
        ValueError: naming the first weight that is missing, unknown or of another shape.
    """
    check_shapes(_shapes(model), weights, component)
    check_kinds(weights, model.state_dict(), component)


def check_shapes(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], component: str) -> None:
    """Passes when names and shapes of the weights are the expected ones.

    Raises:
        ValueError: naming the first weight that is missing, unknown or of another shape.
    """
    found = {name: tuple(value.shape) for name, value in weights.items()}
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


def _check_types(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Passes when layers can compute with the weights as they will be.

    Raises:
        ValueError: they are float8, and no other type is asked for.
    """
    stored = next((value.dtype for value in weights.values() if str(value.dtype).startswith("torch.float8")), None)
    if stored is not None and dtype is None:
        raise ValueError(f"the weights are {str(stored).removeprefix('torch.')}; pass torch_dtype=torch.bfloat16")


def _placed(value: Tensor, dtype: torch.dtype | None, device: str | torch.device | None) -> Tensor:
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


_ADDRESS = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/(?:resolve|blob|raw)/([^/?#]+)/([^?#]+)"
)


def hub_file(address: str) -> Path:
    """The local copy of a file on the Hub, downloaded if it is not in the cache.

    Raises:
        ValueError: the address is of another place, or the Hub does not give the file.
    """
    found = _ADDRESS.match(address)
    named = quoted(bare_address(address))
    if not found:
        raise ValueError(f"{named} is no file on huggingface.co; download it and give its path")
    repository, revision, name = found.groups()
    try:
        return hub.hub_file(repository, name, revision=revision)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None


def load_clip_file(
    component: str,
    source: str | PathLike[str] | Mapping[str, Tensor],
    config: Mapping[str, Any] | str | PathLike[str] | None = None,
    torch_dtype: torch.dtype | None = None,
) -> Any:
    """CLIP's text or image encoder with the weights of a file, of a checkpoint that holds it, or of a state dict.

    Args:
        component: `text_encoder` or `image_encoder`.
        config: transformers' config, or the folder with it; None takes what the file says, else the released one of
            these shapes.

    Raises:
        ValueError: this is something else, or the config is not known or does not fit.
    """
    named = "state dict" if isinstance(source, Mapping) else f"weights file {quoted(source)}"
    content, metadata = (source, {}) if isinstance(source, Mapping) else read_file(source)
    try:
        weights = weights_of(content, component)
        settings = clip_config(component, weights, read_configs(metadata).get(component) if config is None else config)
        model = clip_on_meta(component, settings)
        check_fit(model, weights, component)
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from error
    typed = {name: value.to(torch_dtype or value.dtype) for name, value in weights.items()}
    model.load_state_dict(typed, strict=True, assign=True)
    return model.eval()


def clip_config(
    component: str, weights: Mapping[str, Tensor], config: Mapping[str, Any] | str | PathLike[str] | None
) -> dict[str, Any]:
    """The values of transformers' config that `config` means, or that weights of a known size have.

    Raises:
        ValueError: the size is not known, or there is no such file.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if config is not None:
        place = local_path(config)
        return read_json(place / "config.json" if place.is_dir() else place)
    size = size_of({name: tuple(value.shape) for name, value in weights.items()}, component)
    if size is None:
        known = ", ".join(CLIP_CONFIGS[component])
        raise ValueError(f"the weights are of no known {COMPONENTS[component].title} ({known}); pass its config")
    return clip_preset(component, size)


def clip_on_meta(component: str, settings: Mapping[str, Any]) -> Any:
    """The encoder without weights: its parameters are on the meta device, its buffers are real."""
    import transformers
    from accelerate import init_empty_weights

    config = getattr(transformers, COMPONENTS[component].clip_config)
    with init_empty_weights():
        return COMPONENTS[component].load_class()(config.from_dict(dict(settings)))
