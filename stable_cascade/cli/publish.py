"""`stable-cascade publish`: an export with a model card on the Hugging Face hub."""

from __future__ import annotations

import argparse
from typing import Any


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
