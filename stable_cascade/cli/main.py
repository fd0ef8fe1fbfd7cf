"""`stable-cascade COMMAND …`: one function per command that adds its own parser."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import stable_cascade
from stable_cascade.disk import local_path
from stable_cascade.redaction import redacted
from stable_cascade.wording import brief

from .drawing import DRAWING_COMMANDS
from .train import add_cache, add_estimate, add_train
from .weights import add_convert, add_inspect, add_publish

LONGEST_ERROR = 460
"""Characters of an error's one line; what callers pass may be longer."""


def add_prepare(commands: Any) -> None:
    """Adds `prepare FOLDER OUT`."""
    parser = commands.add_parser(
        "prepare",
        help="make shards from a folder of images and captions",
        description="Makes shards for webdataset_path from a folder of images. A caption is the .txt of the same "
        "name, a row of metadata.jsonl, metadata.csv or captions.csv (file_name, text), or a key text or caption of "
        "the .json of the same name.",
    )
    # Places, then limits.
    parser.add_argument("folder", metavar="FOLDER", help="images and captions, searched with its subfolders")
    parser.add_argument("out", metavar="OUT", help="folder for the shards")
    parser.add_argument("--shard-size", type=int, default=1000, help="samples in one shard (default %(default)s)")
    parser.add_argument(
        "--max-broken-share",
        type=float,
        default=0.1,
        help="stop when more than this share of the images cannot be decoded (default %(default)s)",
    )
    parser.add_argument(
        "--allow-missing-captions", action="store_true", help="write '' for an image without a caption"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are in OUT")
    parser.set_defaults(run=_prepare)


def _prepare(arguments: argparse.Namespace) -> None:
    from stable_cascade.data import prepare_shards

    report = prepare_shards(
        arguments.folder,
        arguments.out,
        shard_size=arguments.shard_size,
        max_broken_share=arguments.max_broken_share,
        allow_missing_captions=arguments.allow_missing_captions,
        overwrite=arguments.overwrite,
    )
    print(report)
    print(f"train with webdataset_path: {arguments.out}")


def add_app(commands: Any) -> None:
    """Adds `app`."""
    from stable_cascade.app.options import DEFAULT_PORT, LARGEST_UPLOAD

    parser = commands.add_parser(
        "app",
        help="draw on a page in the browser",
        description="Serves a page with every way of drawing, on this machine and without a network.",
    )
    # What is served, and where.
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a Hub name (default %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 is any free one (default %(default)s)")
    # LoRAs, ControlNets and how the model runs.
    parser.add_argument(
        "--lora-dir", type=local_path, metavar="FOLDER", help="LoRAs to choose from: its .safetensors files"
    )
    parser.add_argument(
        "--controlnet",
        type=local_path,
        action="append",
        default=[],
        metavar="PATH",
        help="a ControlNet; may be repeated",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: CUDA where there is one)")
    parser.add_argument("--offload", action="store_true", help="keep only the network at work on the device")
    parser.add_argument(
        "--max-upload-megapixels", type=float, default=LARGEST_UPLOAD, metavar="N",
        help="largest image that is taken (default %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=_app)


def _app(arguments: argparse.Namespace) -> None:
    import signal
    import sys

    from stable_cascade.app.options import PageSettings
    from stable_cascade.app.serving import serve

    settings = PageSettings(
        model=arguments.model,
        host=arguments.host,
        port=arguments.port,
        lora_dir=arguments.lora_dir,
        controlnets=tuple(arguments.controlnet),
        dtype=arguments.dtype,
        device=arguments.device,
        offload=arguments.offload,
        max_upload_megapixels=arguments.max_upload_megapixels,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the way out that removes the images' folder
    serve(settings, announce=lambda line: print(line, flush=True))


COMMANDS: tuple[Callable[[Any], None], ...] = (
    add_prepare,
    add_train,
    add_publish,
    add_cache,
    add_estimate,
    add_inspect,
    add_convert,
    *DRAWING_COMMANDS,
    add_app,
)
"""Each adds one subcommand and sets `run`, a function of the parsed arguments. Heavy imports belong into `run`."""


class Misuse(SystemExit):
    """A command line that means nothing: exit status 2, and what is wrong with it."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


class CommandParser(argparse.ArgumentParser):
    """argparse, whose exit tells the reason; its subcommands' parsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        """Usage and message on stderr, and the end.

        Raises:
            Misuse: always.
        """
        self.print_usage(sys.stderr)
        message = brief(message, LONGEST_ERROR)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise Misuse(message)


def make_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = CommandParser(prog="stable-cascade", description="Trains and runs Stable Cascade.")
    parser.add_argument("--version", action="version", version=f"stable-cascade {stable_cascade.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for add in COMMANDS:
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status is 0, or 2 after an error of one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    argv = sys.argv[1:] if argv is None else argv
    # A misuse is an object too, where JSON was asked for.
    try:
        arguments = make_parser().parse_args(argv)
    except Misuse as misuse:
        if "--json" in argv:
            print(json.dumps({"error": misuse.message}))
        raise
    try:
        # Run; an error is one line without credentials.
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        message = brief(redacted(str(error)), LONGEST_ERROR)
        print(f"stable-cascade {arguments.command}: error: {message}", file=sys.stderr)
        if getattr(arguments, "json", False):
            print(json.dumps({"error": message}))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
