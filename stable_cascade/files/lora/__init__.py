"""LoRA files of every tool: which format a file has, what it means on our networks, and writing it in another format.

Inside the package a LoRA is always PEFT's state dict, `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.
"""

from __future__ import annotations

from .conversion import EMBEDS_NAME, convert, tokens_folder, with_deltas, with_tokens, write
from .keys import ALIASES, COMPONENTS, FORMATS, READ_ONLY, clip_layers, detect, format_name
from .metadata import (
    ADAPTER_NAMES,
    CONFIG_NAME,
    METADATA_KEY,
    WEIGHT_NAME,
    join_components,
    read_metadata,
    split_components,
    write_metadata,
)
from .original import (
    exact_filters,
    filter_words,
    from_original_lora,
    matching_modules,
    original_tokens,
    original_weight,
    positional_order,
    positional_targets,
)
from .parts import Part, Report, is_depthwise
from .reading import LoraFile, read

__all__ = [
    "ADAPTER_NAMES",
    "ALIASES",
    "COMPONENTS",
    "CONFIG_NAME",
    "EMBEDS_NAME",
    "FORMATS",
    "METADATA_KEY",
    "READ_ONLY",
    "WEIGHT_NAME",
    "LoraFile",
    "Part",
    "Report",
    "clip_layers",
    "convert",
    "detect",
    "exact_filters",
    "filter_words",
    "format_name",
    "from_original_lora",
    "is_depthwise",
    "join_components",
    "matching_modules",
    "original_tokens",
    "original_weight",
    "positional_order",
    "positional_targets",
    "read",
    "read_metadata",
    "split_components",
    "tokens_folder",
    "with_deltas",
    "with_tokens",
    "write",
    "write_metadata",
]
