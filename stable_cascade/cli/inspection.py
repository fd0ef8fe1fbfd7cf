"""`stable-cascade inspect FILE`: what a file or folder is, from its header alone."""

from __future__ import annotations

import argparse
from typing import Any


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
