"""LoRA files of every tool: which format a file has, what it means on our networks, and writing it in another format.

Inside the package a LoRA is always PEFT's state dict, `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.
"""

from __future__ import annotations

from .conversion import EMBEDS_NAME, convert, tokens_folder, with_deltas, with_tokens, write
from .file import LoraFile
from .keys import ALIASES, COMPONENTS, FORMATS, READ_ONLY, detect, format_name
from .metadata import METADATA_KEY, WEIGHT_NAME, join_components, read_metadata, split_components, write_metadata
from .names import clip_layers
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
from .part import Part, is_depthwise
from .peft_config import ADAPTER_NAMES, CONFIG_NAME
from .reading import read
from .report import Report

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
