"""The trainings, one module each with a `main`: `stable-cascade train NAME CONFIG`, and `examples/train_NAME.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from stable_cascade.config import ControlNetConfig, DecoderConfig, LoraConfig, TextToImageConfig, VQGANConfig
from stable_cascade.config.settings import ControlNetSettings, DecoderObjectiveSettings, LoraSettings
from stable_cascade.config.sources import ConfigError, read_yaml, split_arguments

CONFIGS: dict[str, type] = {
    "lora": LoraConfig,
    "text_to_image": TextToImageConfig,
    "controlnet": ControlNetConfig,
    "decoder": DecoderConfig,
    "vqgan": VQGANConfig,
}
"""Module of this folder -> the config that its `main` reads."""


def trainer_of(path: str, overrides: Sequence[str] = ()) -> str:
    """The trainer whose keys a config file has.

    A config without a key of one trainer alone is a text-to-image one if its `model_version` is a prior's.

    Raises:
        ConfigError: the keys do not tell.
    """
    given = read_yaml(path)
    given |= split_arguments(LoraConfig, overrides)[1]
    version = given.get("model_version")
    if given.keys() & _keys(ControlNetSettings):
        return "controlnet"
    if given.keys() & _keys(LoraSettings):
        return "lora"
    if given.keys() & _keys(VQGANConfig) - _keys(TextToImageConfig, DecoderConfig):
        return "vqgan"
    if given.keys() & _keys(DecoderObjectiveSettings) - _keys(TextToImageConfig) or version in ("3B", "700M"):
        return "decoder"
    if version in ("3.6B", "1B") or given.keys() & _keys(TextToImageConfig) - _keys(DecoderConfig):
        return "text_to_image"
    raise ConfigError(f"{path}: its keys do not tell whose config it is; add --trainer {'|'.join(CONFIGS)}")


def _keys(*classes: Any) -> set[str]:
    return {field.name for cls in classes for field in fields(cls)}
