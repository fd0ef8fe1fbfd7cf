"""Writes docs/configuration.md from the config dataclasses: `make docs`."""

from pathlib import Path

from stable_cascade import config


def main() -> None:
    """The reference of every key, written beside this file."""
    target = Path(__file__).resolve().parent / "configuration.md"
    target.write_text(config.reference(config.TRAINERS).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
