"""The ControlNet of a config, its filter, and the control images of a batch."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_cascade.data import Batch
from stable_cascade.diffusion.noise import sample_generators
from stable_cascade.files.controlnet import DESCRIPTION, read_description, read_shapes, save_controlnet
from stable_cascade.files.json_files import read_config
from stable_cascade.models.controlnet import StableCascadeControlNet
from stable_cascade.wording import brief

from .data import shown
from .networks import frozen, network, network_on_meta

RELEASED_WIDTH = 1536
"""The narrowest released prior; a `large` bottleneck keeps its published size from there on."""

FEATURES = ("stem_width", "stem_stride", "block_types", "widths", "depths", "strides", "expansions", "head_width",
            "stochastic_depth")  # fmt: skip
"""The keys of an image encoder's config that say what its backbone looks like."""


def control_filter(config: Any, device: torch.device | None = None) -> Any:
    """The config's filter: pixels to control images. A filter that encodes gets the cascade's image encoder.

    Args:
        device: where that encoder works; None for a plan, which only looks at `channels`.

    Raises:
        ValueError: there is no such filter, it does not take these parameters, or (with `device`) a trial call fails.
    """
    from stable_cascade.controls import check_filter, make_filter

    @functools.cache
    def encoder() -> Any:
        assert device is not None
        return frozen(config, "semantic_encoder", device)

    control = make_filter(
        config.controlnet_filter, config.controlnet_filter_params or {}, encode=lambda pixels: encoder()(pixels)
    )
    if device is not None:
        check_filter(control, size=config.image_size, device=device)
    return control


def control_images(control: Callable[..., Tensor], device: torch.device) -> Callable[[Batch], Tensor]:
    """Batch -> control images (B, c, H, W), each drawn from its sample's own generator."""

    def images(batch: Batch) -> Tensor:
        with torch.no_grad():
            return control(shown(batch, device), sample_generators(batch.seeds, "control"))

    return images


def controlnet_on_meta(config: Any, prior: Any, control: Any) -> StableCascadeControlNet:
    """The ControlNet without memory for its weights, after checking all keys that concern it.

    Args:
        prior: the prior or its shape on the meta device.
        control: the filter, of which `channels` is read.

    Raises:
        ValueError: a block is not one of the prior's, or `controlnet_checkpoint_path` is missing or does not fit.
    """
    settings = controlnet_settings(config, prior, control.channels)
    with torch.device("meta"):
        model = StableCascadeControlNet(**settings)
    if config.controlnet_checkpoint_path:
        _check_checkpoint(config.controlnet_checkpoint_path, model)
    return model


def controlnet(config: Any, prior: Any, control: Any) -> StableCascadeControlNet:
    """The ControlNet in float32, from `controlnet_checkpoint_path` or new, then with the image encoder's features.

    Raises:
        ValueError: as `controlnet_on_meta`.
    """
    controlnet_on_meta(config, prior, control)
    settings, where = controlnet_settings(config, prior, control.channels), config.controlnet_checkpoint_path
    if where and Path(where).is_file():
        return StableCascadeControlNet.from_single_file(where, config=settings, torch_dtype=torch.float32)
    if where:
        return StableCascadeControlNet.from_pretrained(_folder(where), torch_dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = StableCascadeControlNet(**settings)
    if settings["bottleneck"] == "effnet":
        model.load_backbone(network(config, "semantic_encoder").backbone)
    return model


def controlnet_settings(config: Any, prior: Any, channels: int) -> dict[str, Any]:
    """The constructor's arguments that config, prior and filter mean.

    Raises:
        ValueError: a block is not one of the prior's, or the chosen blocks differ in width.
    """
    # The blocks have to be the prior's, and of one width.
    widths = residual_widths(prior.config)
    blocks = list(config.controlnet_blocks)
    over = [block for block in blocks if block >= len(widths)]
    if over:
        raise ValueError(
            f"controlnet_blocks: {over[0]} is over the prior's range 0 to {len(widths) - 1} ({len(widths)} residual "
            f"blocks, the first {sum(_counts(prior.config, 'down'))} down); leave it away"
        )
    chosen = sorted({widths[block] for block in blocks})
    if len(chosen) > 1:
        raise ValueError(f"controlnet_blocks have the widths {chosen}; choose blocks of one width")
    # The backbone is sized by the semantic encoder or by that width.
    backbones = {"effnet": _effnet_config, "large": lambda _: _large_config(chosen[0]), "simple": lambda _: None}
    return {
        "in_channels": channels,
        "projection_channels": chosen[0],
        "blocks": blocks,
        "bottleneck": config.controlnet_bottleneck_mode,
        "backbone_config": backbones[config.controlnet_bottleneck_mode](config),
    }


def residual_widths(config: Any) -> list[int]:
    """Channels of every residual block of a prior, in order of execution: what `controlnet_blocks` counts."""
    channels = list(config.block_out_channels)
    pairs = [
        *zip(_counts(config, "down"), channels, strict=True),
        *zip(_counts(config, "up"), channels[::-1], strict=True),
    ]
    return [width for count, width in pairs for _ in range(count)]


def _counts(config: Any, side: str) -> list[int]:
    """Residual blocks per level, in order of execution, repeats included."""
    types = list(config.block_types_per_layer)
    types = types if side == "down" else types[::-1]
    layers = getattr(config, f"{side}_num_layers_per_block")
    repeats = getattr(config, f"{side}_blocks_repeat_mappers") or [1] * len(layers)
    return [
        number * repeat * list(names).count("SDCascadeResBlock")
        for number, repeat, names in zip(layers, repeats, types, strict=True)
    ]


def _effnet_config(config: Any) -> dict[str, Any] | None:
    """The image encoder's backbone; None where it is the released one, so that the exported config is too."""
    encoder: Any = network_on_meta(config, "semantic_encoder").config
    features = {key: encoder[key] for key in FEATURES}
    released = {key: _listed(value) for key, value in _released_features().items()}
    return None if {key: _listed(value) for key, value in features.items()} == released else features


@functools.cache
def _released_features() -> dict[str, Any]:
    import inspect

    from stable_cascade.models.semantic_encoder import EfficientNetFeatures

    parameters = inspect.signature(EfficientNetFeatures.__init__).parameters
    return {key: parameters[key].default for key in FEATURES}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _large_config(width: int) -> dict[str, int] | None:
    """The published `large` bottleneck in the proportions of a small prior."""
    if width >= RELEASED_WIDTH:
        return None
    return {"hidden": 8 * width, "width": width // 2, "out_channels": 5 * width // 8}


def _folder(where: str) -> Path:
    """The folder with the config of a ControlNet: the one named, or `controlnet` in it.

    Raises:
        ValueError: there is none.
    """
    for folder in (Path(where), Path(where) / "controlnet"):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"controlnet_checkpoint_path '{where}' is neither a file nor a folder of a ControlNet")


def _check_checkpoint(where: str, model: StableCascadeControlNet) -> None:
    """Passes when the checkpoint is of the network that the config means.

    Raises:
        ValueError: it is missing or of another network.
    """
    # What the checkpoint says about itself.
    place = Path(where)
    found: Any
    if place.is_file():
        found = read_description(place).get("config")
    else:
        found = read_config(_folder(where) / "config.json")
    names = {
        "in_channels": "channels of controlnet_filter", "blocks": "controlnet_blocks",
        "bottleneck": "controlnet_bottleneck_mode", "projection_channels": "width of the prior",
    }  # fmt: skip
    for key, name in names.items() if found else ():
        had = found.get(key, "not noted")
        if _listed(had) != _listed(model.config[key]):
            raise ValueError(
                f"controlnet_checkpoint_path '{where}' was trained with {name} {brief(had, 80)}, this config has "
                f"{model.config[key]}; set what it was trained with"
            )
    # The shapes of its tensors.
    if place.is_file() and place.suffix == ".safetensors":
        shapes, own = read_shapes(place), {name: tuple(value.shape) for name, value in model.state_dict().items()}
        odd = sorted(name for name in shapes.keys() | own.keys() if shapes.get(name) != own.get(name))
        if odd:
            raise ValueError(
                f"controlnet_checkpoint_path '{where}' does not fit controlnet_filter, controlnet_blocks and "
                f"controlnet_bottleneck_mode: '{odd[0]}' is {shapes.get(odd[0], 'absent')} in the file, "
                f"{own.get(odd[0], 'absent')} here"
            )


def export_controlnet(config: Any, folder: Path, model: StableCascadeControlNet) -> None:
    """Writes `controlnet/` in diffusers layout and `controlnet.safetensors` with the original's names."""
    known = {
        "config": {key: _listed(model.config[key]) for key in
                   ("in_channels", "projection_channels", "blocks", "bottleneck", "backbone_config")},
        "filter": config.controlnet_filter,
        "filter_params": dict(config.controlnet_filter_params or {}),
        "model_version": config.model_version,
    }  # fmt: skip
    model.save_pretrained(folder / "controlnet")
    (folder / "controlnet" / DESCRIPTION).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    save_controlnet(folder / "controlnet.safetensors", model.to_original(), known)
