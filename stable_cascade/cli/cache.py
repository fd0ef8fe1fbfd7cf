"""`stable-cascade cache CONFIG`: fills the cache of a training ahead of it."""

from __future__ import annotations

import argparse
from typing import Any

from stable_cascade.cli.train import add_config_arguments, config_of

TRAINERS = ("lora", "text_to_image", "controlnet")


def add_cache(commands: Any) -> None:
    """Adds `cache CONFIG`."""
    parser = commands.add_parser(
        "cache",
        help="compute the latents and embeddings of a training ahead of it",
        description="Computes what a training with cache: true reads instead of running its encoders. What is there "
        "already is not computed again. --trainer comes before CONFIG, changed keys (--key value) after it.",
    )
    add_config_arguments(parser, TRAINERS)
    parser.set_defaults(run=_cache)


def _cache(arguments: argparse.Namespace) -> None:
    from stable_cascade import factory
    from stable_cascade.training.tracking import make_accelerator

    arguments.overrides = [*arguments.overrides, "--cache", "true"]
    _, config = config_of(arguments, TRAINERS)
    trains = getattr(config, "train_tokens", None) or getattr(config, "train_text_encoder", False)
    index = factory.samples(config)
    factory.fill_cache(config, make_accelerator(config), index, texts=not trains)
