"""CLIP's encoders from single files, in the names of transformers, ComfyUI or OpenCLIP."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from stable_cascade.components import COMPONENTS
from stable_cascade.disk import local_path
from stable_cascade.embedded import embedded_path
from stable_cascade.files.configs import read_configs
from stable_cascade.files.json_files import read_json
from stable_cascade.files.signatures import size_of
from stable_cascade.wording import quoted

from .loading import check_fit, read_file, weights_of

_TEXT = {
    "vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407,
    "pad_token_id": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "text_encoder": {
        "ViT-bigG/14": _TEXT | {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
            "projection_dim": 1280, "hidden_act": "gelu",
        },
        "ViT-L/14": _TEXT | {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "projection_dim": 768, "hidden_act": "quick_gelu",
        },
    },
    "image_encoder": {
        "ViT-L/14": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "projection_dim": 768, "hidden_act": "quick_gelu", "image_size": 224, "patch_size": 14,
            "layer_norm_eps": 1e-5,
        },
    },
}  # fmt: skip
"""What the shapes of a released encoder do not say. The cascade was trained with the first of each."""


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
    if size == "embedded":
        return read_json(embedded_path() / component / "config.json")
    if size is None:
        known = ", ".join(CONFIGS[component])
        raise ValueError(f"the weights are of no known {COMPONENTS[component].title} ({known}); pass its config")
    return dict(CONFIGS[component][size])


def clip_on_meta(component: str, settings: Mapping[str, Any]) -> Any:
    """The encoder without weights: its parameters are on the meta device, its buffers are real."""
    import transformers
    from accelerate import init_empty_weights

    config = getattr(transformers, COMPONENTS[component].clip_config)
    with init_empty_weights():
        return COMPONENTS[component].load_class()(config.from_dict(dict(settings)))
