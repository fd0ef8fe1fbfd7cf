"""What is trained beside a frozen network: LoRA layers and token rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

if TYPE_CHECKING:
    from .conversion import convert_lora
    from .injection import layer_shapes, lora_ranks
    from .load import load_lora, lora_path, read_lora
    from .loaders import StableCascadeLoraLoaderMixin
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

__getattr__, __dir__ = lazy_exports(globals())
