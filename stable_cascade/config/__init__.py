"""Every setting of every trainer: flat keys as the training guide writes them, checked before any weight is read."""

from stable_cascade.config.fields import documentation, help_text, keys_where, reference
from stable_cascade.config.settings import (
    TRAINERS,
    CLIPConfig,
    ControlNetConfig,
    DecoderConfig,
    LoraConfig,
    OptimizerSettings,
    RunSettings,
    SemanticEncoderConfig,
    TextToImageConfig,
    TrainingSettings,
    VQGANConfig,
)
from stable_cascade.config.sources import ConfigError, load_config, make_config, run_main

__all__ = [
    "TRAINERS",
    "CLIPConfig",
    "ConfigError",
    "ControlNetConfig",
    "DecoderConfig",
    "LoraConfig",
    "OptimizerSettings",
    "RunSettings",
    "SemanticEncoderConfig",
    "TextToImageConfig",
    "TrainingSettings",
    "VQGANConfig",
    "documentation",
    "help_text",
    "keys_where",
    "load_config",
    "make_config",
    "reference",
    "run_main",
]
