"""Commands about files of weights: inspect, convert, convert-lora, publish."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

NETWORK_OPTIONS = ("component", "dtype", "config")
LORA_OPTIONS = ("base", "module_filters", "train_token")


def add_convert(commands: Any) -> None:
    """Adds `convert IN OUT --to FORMAT`."""
    parser = commands.add_parser(
        "convert",
        help="write a network, a LoRA or learned tokens in another tool's format",
        description="IN is recognised by its keys and shapes. Networks: original, diffusers (a folder), comfyui "
        "(prefixed; from a whole pipeline's folder one checkpoint of a stage with all its parts), openclip (CLIP's "
        "encoders). LoRA: peft, original, kohya, onetrainer, onetrainer_diffusers, comfyui. Tokens: diffusers, "
        "comfyui. Values stay as they are, bit for bit, unless --dtype or the format asks for others; what is not "
        "carried over is named.",
    )
    # For every kind of file.
    parser.add_argument("source", metavar="IN", help="file or folder")
    parser.add_argument("target", metavar="OUT", help="file, or folder where the format is one")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="the format to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    # For networks, and for adapters and tokens.
    networks = parser.add_argument_group("networks")
    networks.add_argument("--component", metavar="NAME", help="write this one alone: prior, decoder, vqgan, …")
    networks.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="type of the values; else kept")
    networks.add_argument("--config", metavar="PLACE", help="config.json of a network of your own size, or its folder")
    adapters = parser.add_argument_group("LoRA and learned tokens")
    adapters.add_argument(
        "--base",
        metavar="PLACE",
        help="embedded, or the pipeline's folder: what a LoRA of no released size is for",
    )
    adapters.add_argument(
        "--module-filters", nargs="+", metavar="FILTER", help="of the training: the original's files"
    )
    adapters.add_argument(
        "--train-token", nargs=2, action="append", metavar=("NAME", "REGEX"), help="of the training, likewise"
    )
    adapters.add_argument("--token", metavar="NAME", help="name of a token that its file does not name")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    import json

    from stable_cascade.files import describe

    found = describe(arguments.source)
    convert = {"lora": _lora, "tokens": _tokens}.get(found.kind, _networks)
    if found.kind in ("training", "shard"):
        raise ValueError(f"'{arguments.source}' is {found.short()}; convert final/ or an export/ of a training")
    report = convert(arguments)
    if arguments.json:
        values = report.as_dict() if hasattr(report, "as_dict") else vars(report)
        print(json.dumps({"read": found.as_dict(), "written": values}, indent=1, default=list))
        return
    print(f"{arguments.source}: {found.short()}")
    print(report)


def _networks(arguments: argparse.Namespace) -> Any:
    from stable_cascade.files.conversion import convert_networks

    _refuse(arguments, (*LORA_OPTIONS, "token"), "networks")
    options = {name: getattr(arguments, name) for name in (*NETWORK_OPTIONS, "overwrite")}
    return convert_networks(arguments.source, arguments.target, arguments.to, **options)


def _lora(arguments: argparse.Namespace) -> Any:
    from stable_cascade.adapters.conversion import convert_lora
    from stable_cascade.embedded import embedded_path
    from stable_cascade.files.tensor_files import check_target

    _refuse(arguments, (*NETWORK_OPTIONS, "token"), "a LoRA, which keeps its own type")
    check_target(Path(arguments.target), Path(arguments.source), overwrite=arguments.overwrite)
    return convert_lora(
        arguments.source,
        arguments.target,
        arguments.to,
        base=embedded_path() if arguments.base == "embedded" else arguments.base,
        module_filters=arguments.module_filters,
        train_tokens=arguments.train_token,
    )


def _tokens(arguments: argparse.Namespace) -> Any:
    from stable_cascade.files.token_files import convert_tokens

    _refuse(arguments, (*NETWORK_OPTIONS, *LORA_OPTIONS), "learned tokens")
    options = {"token": arguments.token, "overwrite": arguments.overwrite}
    return convert_tokens(arguments.source, arguments.target, arguments.to, **options)


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], what: str) -> None:
    """Passes when none of these options was given.

    Raises:
        ValueError: one was.
    """
    given = next((name for name in names if getattr(arguments, name) is not None), None)
    if given is not None:
        raise ValueError(f"--{given.replace('_', '-')} is not for {what}; leave it out")


def add_inspect(commands: Any) -> None:
    """Adds `inspect FILE…`."""
    parser = commands.add_parser(
        "inspect",
        help="say what a weights file or folder is",
        description="Says what a file or folder is: component, size, format, types, LoRA rank and targets, metadata, "
        "the training's config. Reads headers only, never tensors, and runs nothing.",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="weights file, LoRA, pipeline or training folder")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, or a list of them for several FILEs"
    )
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    import json

    from stable_cascade.files import describe
    from stable_cascade.redaction import redacted

    found = [describe(file) for file in arguments.files]
    if arguments.json:
        shown = [one.as_dict() for one in found]
        print(json.dumps(redacted(shown[0] if len(shown) == 1 else shown), indent=1))
        return
    for one in found:
        print(redacted(str(one)))


def add_publish(commands: Any) -> None:
    """Adds `publish FOLDER --repo NAME`."""
    parser = commands.add_parser(
        "publish",
        help="upload a trained model to the Hugging Face hub",
        description="Writes a model card into an exported model and uploads both. A README.md that is already there "
        "is kept, so it can be written with --card-only, edited and uploaded.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="final/ of a training, or export/ of one of its checkpoints")
    parser.add_argument("--repo", required=True, metavar="NAME", help="repository, as owner/name or name")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--card-only", action="store_true", help="write the card and upload nothing")
    parser.set_defaults(run=_publish)


def _publish(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from stable_cascade.training.model_card import CARD, recorded_settings, write_model_card
    from stable_cascade.training.publishing import check_token, push_to_hub

    folder = Path(arguments.folder)
    repo = arguments.repo if arguments.card_only else check_token(arguments.repo)
    if (folder / CARD).exists():
        print(f"keeping {folder / CARD}")
    else:
        print(f"model card: {write_model_card(folder, recorded_settings(folder), repo)}")
    if not arguments.card_only:
        print(f"uploaded {folder} to {push_to_hub(folder, repo, private=arguments.private)}")
