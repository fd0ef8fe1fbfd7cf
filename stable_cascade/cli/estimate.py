"""`stable-cascade estimate CONFIG`: parameters and expected peak memory of a training, without loading weights."""

from __future__ import annotations

import argparse
from typing import Any

from stable_cascade.cli.train import add_config_arguments, config_of

TRAINERS = ("lora", "text_to_image", "controlnet", "decoder")


def add_estimate(commands: Any) -> None:
    """Adds `estimate CONFIG`."""
    parser = commands.add_parser(
        "estimate",
        help="parameters and expected peak memory of a training",
        description="Counts parameters and traces one training step on the meta device; loads no weights and needs "
        "no GPU. Options come before CONFIG, changed keys (--key value) after it.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")
    parser.add_argument("--processes", type=int, default=1, help="processes that share a batch (default %(default)s)")
    parser.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        default="bf16",
        help="mixed_precision of the accelerate config (default %(default)s)",
    )
    add_config_arguments(parser, TRAINERS)
    parser.set_defaults(run=_estimate)


def _estimate(arguments: argparse.Namespace) -> None:
    import json

    from stable_cascade.estimate import estimate
    from stable_cascade.hub import cache_only

    trainer, config = config_of(arguments, TRAINERS)
    with cache_only():
        found = estimate(config, trainer, processes=arguments.processes, mixed_precision=arguments.mixed_precision)
    if arguments.json:
        figures = {"trainer": trainer, "parameters": found.parameters, "trainable": found.trainable,
                   "parts": found.parts, "allocated": found.allocated, "total": found.total}  # fmt: skip
        print(json.dumps(figures, indent=1))
    else:
        print(found)
