"""`stable-cascade COMMAND …`: one function per command that adds its own parser."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import stable_cascade
from stable_cascade.cli.app import add_app
from stable_cascade.cli.drawing import DRAWING_COMMANDS
from stable_cascade.cli.files import add_convert, add_inspect, add_publish
from stable_cascade.cli.train import add_cache, add_estimate, add_train
from stable_cascade.redaction import redacted
from stable_cascade.wording import brief

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
