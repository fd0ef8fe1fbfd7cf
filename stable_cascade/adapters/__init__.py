"""What is trained beside a frozen network: LoRA layers and token rows."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "LearnedTokens": "tokens",
    "QuantizedLinear": "quantized",
    "StableCascadeLoraLoaderMixin": "loaders",
    "add_learned_tokens": "tokens",
    "add_lora": "lora",
    "add_token_rows": "tokens",
    "convert_lora": "conversion",
    "layer_shapes": "layers",
    "load_lora": "loading",
    "lora_path": "loading",
    "lora_ranks": "layers",
    "lora_state_dict": "lora",
    "quantize": "quantized",
    "quantized_bytes": "quantized",
    "read_learned_embeds": "tokens",
    "read_lora": "loading",
    "remove_lora": "lora",
    "save_learned_embeds": "tokens",
    "save_lora": "lora",
    "tokens_of": "tokens",
}

__all__ = [
    "LearnedTokens",
    "QuantizedLinear",
    "StableCascadeLoraLoaderMixin",
    "add_learned_tokens",
    "add_lora",
    "add_token_rows",
    "convert_lora",
    "layer_shapes",
    "load_lora",
    "lora_path",
    "lora_ranks",
    "lora_state_dict",
    "quantize",
    "quantized_bytes",
    "read_learned_embeds",
    "read_lora",
    "remove_lora",
    "save_learned_embeds",
    "save_lora",
    "tokens_of",
]

if TYPE_CHECKING:
    from .conversion import convert_lora
    from .layers import layer_shapes, lora_ranks
    from .loaders import StableCascadeLoraLoaderMixin
    from .loading import load_lora, lora_path, read_lora
    from .lora import add_lora, lora_state_dict, remove_lora, save_lora
    from .quantized import QuantizedLinear, quantize, quantized_bytes
    from .tokens import (
        LearnedTokens,
        add_learned_tokens,
        add_token_rows,
        read_learned_embeds,
        save_learned_embeds,
        tokens_of,
    )


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
