"""The commands that read a trainer's config: `train`, `estimate` and `cache`."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from typing import Any

from stable_cascade.config.sources import ConfigError, load_config
from stable_cascade.trainers import CONFIGS, trainer_of

ESTIMATED = ("lora", "text_to_image", "controlnet", "decoder")
"""The trainers whose memory is estimated."""
CACHED = ("lora", "text_to_image", "controlnet")
"""Those that can train from a cache of latents and embeddings."""


def trainer_name(text: str) -> str:
    """A trainer's name as its module is called: `text-to-image` is `text_to_image`."""
    return text.replace("-", "_")


def add_train(commands: Any) -> None:
    """Adds `train TRAINER CONFIG`."""
    parser = commands.add_parser(
        "train",
        parents=[_launch_options()],
        help="train a LoRA, the prior, a ControlNet, the decoder or Stage A",
        description="Trains as CONFIG says, through `accelerate launch`. `stable-cascade train TRAINER --help` lists "
        "the keys; `--check` prints what the training would do and stops.",
    )
    shown = ",".join(CONFIGS).replace("_", "-")
    parser.add_argument("trainer", type=trainer_name, choices=tuple(CONFIGS), metavar=f"{{{shown}}}")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="CONFIG [--key value ...]")
    parser.set_defaults(run=_train)


def _launch_options() -> argparse.ArgumentParser:
    """The options that are accelerate's business; they may come before the trainer's name or among the keys."""
    options = argparse.ArgumentParser(prog="stable-cascade train", add_help=False, allow_abbrev=False)
    options.add_argument(
        "--launch",
        metavar="NAME|FILE",
        help="accelerate config: cpu, cpu_2proc, single_gpu, ddp, fsdp, fsdp2, or a YAML file; default: that of "
        "`accelerate config` if there is one, else what fits the devices of this machine",
    )
    options.add_argument("--processes", type=int, metavar="N", help="number of processes; default: one per GPU")
    return options


def _train(arguments: argparse.Namespace) -> None:
    # Check everything here, so that a mistake is reported before any process starts. `--help` ends here too.
    from stable_cascade.trainers.launch import launch_arguments, run_launch

    options, keys = _launch_options().parse_known_args(arguments.overrides, arguments)
    config: Any = load_config(CONFIGS[arguments.trainer], keys)
    launch, variables = launch_arguments(
        arguments.trainer, keys, launch=options.launch, processes=options.processes, sharded=config.use_fsdp
    )
    if config.check:
        return importlib.import_module(f"stable_cascade.trainers.{arguments.trainer}").main(keys)

    if status := run_launch(launch, variables):
        raise SystemExit(status)


def add_estimate(commands: Any) -> None:
    """Adds `estimate CONFIG`."""
    parser = commands.add_parser(
        "estimate",
        help="parameters and expected peak memory of a training",
        description="Counts parameters and traces one training step on the meta device; loads no weights and needs "
        "no GPU. Options come before CONFIG, changed keys (--key value) after it.",
    )
    # How the answer looks, and what it is computed for.
    parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")
    parser.add_argument("--processes", type=int, default=1, help="processes that share a batch (default %(default)s)")
    parser.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        default="bf16",
        help="mixed_precision of the accelerate config (default %(default)s)",
    )
    _add_config_arguments(parser, ESTIMATED)
    parser.set_defaults(run=_estimate)


def _estimate(arguments: argparse.Namespace) -> None:
    from stable_cascade.estimate import estimate
    from stable_cascade.hub import cache_only

    trainer, config = _config_of(arguments, ESTIMATED)
    with cache_only():
        found = estimate(config, trainer, processes=arguments.processes, mixed_precision=arguments.mixed_precision)
    if arguments.json:
        figures = {"trainer": trainer, "parameters": found.parameters, "trainable": found.trainable,
                   "parts": found.parts, "allocated": found.allocated, "total": found.total}  # fmt: skip
        print(json.dumps(figures, indent=1))
    else:
        print(found)


def add_cache(commands: Any) -> None:
    """Adds `cache CONFIG`."""
    parser = commands.add_parser(
        "cache",
        help="compute the latents and embeddings of a training ahead of it",
        description="Computes what a training with cache: true reads instead of running its encoders. What is there "
        "already is not computed again. --trainer comes before CONFIG, changed keys (--key value) after it.",
    )
    _add_config_arguments(parser, CACHED)
    parser.set_defaults(run=_cache)


def _cache(arguments: argparse.Namespace) -> None:
    from stable_cascade import factory
    from stable_cascade.training.tracking import make_accelerator

    arguments.overrides = [*arguments.overrides, "--cache", "true"]
    _, config = _config_of(arguments, CACHED)
    trains = getattr(config, "train_tokens", None) or getattr(config, "train_text_encoder", False)
    index = factory.samples(config)
    factory.fill_cache(config, make_accelerator(config), index, texts=not trains)


def _add_config_arguments(parser: argparse.ArgumentParser, trainers: Sequence[str]) -> None:
    """Adds CONFIG, `--trainer`, and whatever `--key value` overrides follow."""
    parser.add_argument("config", metavar="CONFIG", help="a trainer's YAML file")
    parser.add_argument(
        "--trainer", type=trainer_name, choices=trainers, help="whose config it is; default: recognised by its keys"
    )
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--key value", help="keys to change")


def _config_of(arguments: argparse.Namespace, trainers: Sequence[str]) -> tuple[str, Any]:
    """The trainer's name and its checked config.

    Raises:
        ValueError: the keys fit no trainer or do not tell which, or one is wrong.
    """
    trainer = arguments.trainer or trainer_of(arguments.config, arguments.overrides)
    if trainer not in trainers:
        raise ConfigError(f"{arguments.config}: {trainer} configs are not for this; it takes {', '.join(trainers)}")
    return trainer, load_config(CONFIGS[trainer], [arguments.config, *arguments.overrides])
