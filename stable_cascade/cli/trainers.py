"""Which trainer a config file is for, told by its keys, and the config itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from stable_cascade.config import ControlNetConfig, DecoderConfig, LoraConfig, TextToImageConfig, load_config
from stable_cascade.config.loading import ConfigError, read_yaml, split_arguments
from stable_cascade.config.settings import ControlNetSettings, DecoderObjectiveSettings, LoraSettings

CONFIGS: dict[str, type] = {
    "lora": LoraConfig,
    "text_to_image": TextToImageConfig,
    "controlnet": ControlNetConfig,
    "decoder": DecoderConfig,
}


def add_config_arguments(parser: argparse.ArgumentParser, trainers: Sequence[str]) -> None:
    """Adds CONFIG, `--trainer`, and whatever `--key value` overrides follow."""
    parser.add_argument("config", metavar="CONFIG", help="a trainer's YAML file")
    parser.add_argument("--trainer", choices=trainers, help="whose config it is; absent: told by its keys")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--key value", help="keys to change")


def config_of(arguments: argparse.Namespace, trainers: Sequence[str]) -> tuple[str, Any]:
    """The trainer's name and its checked config.

    Raises:
        ValueError: the keys fit no trainer or do not tell which, or one is wrong.
    """
    trainer = arguments.trainer or trainer_of(arguments.config, arguments.overrides)
    if trainer not in trainers:
        raise ConfigError(f"{arguments.config}: {trainer} configs are not for this; it takes {', '.join(trainers)}")
    return trainer, load_config(CONFIGS[trainer], [arguments.config, *arguments.overrides])


def trainer_of(path: str, overrides: Sequence[str] = ()) -> str:
    """The trainer whose keys a config has.

    A config without a key of LoRA, ControlNet or Stage B alone is a text-to-image one if its `model_version` is a
    prior's.

    Raises:
        ValueError: the keys do not tell.
    """
    given = read_yaml(path)
    given |= split_arguments(LoraConfig, overrides)[1]
    version = given.get("model_version")
    if given.keys() & _keys(ControlNetSettings):
        return "controlnet"
    if given.keys() & _keys(LoraSettings):
        return "lora"
    if given.keys() & _keys(DecoderObjectiveSettings) - _keys(TextToImageConfig) or version in ("3B", "700M"):
        return "decoder"
    if version in ("3.6B", "1B") or given.keys() & _keys(TextToImageConfig) - _keys(DecoderConfig):
        return "text_to_image"
    raise ConfigError(f"{path}: its keys do not tell whose config it is; add --trainer {'|'.join(CONFIGS)}")


def _keys(cls: Any) -> set[str]:
    return {field.name for field in fields(cls)}
