"""JSON of files from anywhere: bounded in size, and every fault one ValueError of one line that names the file."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from os import PathLike
from typing import Any

from stable_cascade import bounds
from stable_cascade.disk import local_path
from stable_cascade.wording import brief, quoted

MAX_BYTES = bounds.JSON_FILE
MAX_SIZE = 2**20
"""The largest whole number in a config: a width, or the size of a vocabulary."""
MAX_COUNT = 512
"""The largest number of layers, of one kind and level."""
COUNTS = ("num_layers", "num_hidden_layers", "depths", "blocks")
"""What the names of numbers of layers contain."""
MAX_ENTRIES, MAX_DEPTH = 1000, 20


def read_json(path: str | PathLike[str], *, remedy: str = "copy or download it again") -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it is larger than `MAX_BYTES`, no JSON, or no object.
        OSError: there is no such file.
    """
    file, name = local_path(path), f"'{brief(path)}'"
    status = file.stat()
    if status.st_size > MAX_BYTES:
        raise ValueError(f"{name} has {status.st_size:,} bytes, and at most {MAX_BYTES:,} are read; {remedy}")
    if stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):
        raise ValueError(f"{name} is a pipe or a device; only regular files are read")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is no UTF-8 text; {remedy}") from None
    return parse_json(text, name, remedy=remedy)


def read_config(path: str | PathLike[str]) -> dict[str, Any]:
    """The object that a network's or a scheduler's JSON file holds, none of its sizes beyond reason.

    Raises:
        ValueError: as `read_json` and `check_sizes`.
        OSError: there is no such file.
    """
    config = read_json(path)
    check_sizes(config, f"'{brief(path)}'")
    return config


def check_sizes(config: Any, named: str) -> None:
    """Passes when no number in a config asks for a network that nobody could build; building it would never end.

    Raises:
        ValueError: a whole number is beyond `MAX_SIZE`, or one of `COUNTS` beyond `MAX_COUNT`.
    """
    # Without recursion: a nested config must not overflow the stack.
    pending = [("", config, 0)]
    while pending:
        key, value, depth = pending.pop()
        if isinstance(value, dict | list) and (len(value) > MAX_ENTRIES or depth > MAX_DEPTH):
            raise ValueError(
                f"{named}: {quoted(key, 60)} holds {len(value):,} entries, nested {depth} deep; is it a config?"
            )
        if isinstance(value, dict):
            pending += [(str(name), inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            pending += [(key, inner, depth + 1) for inner in value]
        elif isinstance(value, int):
            limit = MAX_COUNT if any(word in key for word in COUNTS) else MAX_SIZE
            if abs(value) > limit:
                shown = value if abs(value) < 2**63 else f"a number of {value.bit_length():,} bits"
                raise ValueError(f"{named}: {quoted(key, 60)} is {shown}; at most {limit:,} can be built")


def parse_json(text: str, what: str, *, remedy: str = "copy or download it again") -> dict[str, Any]:
    """The object that a text holds; `what` names it in the error.

    Raises:
        ValueError: it is longer than `MAX_BYTES`, no JSON, or no object.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{what} has {len(text):,} characters, and at most {MAX_BYTES:,} are read; {remedy}")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{what} nests its brackets too deeply to be read; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{what} is no JSON ({brief(error)}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a JSON {type(value).__name__}, an object in braces is needed; {remedy}")
    return value


KEY = "stable_cascade_configs"


def write_configs(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A header's entry with the constructor's arguments of each component; nothing for none."""
    plain = {name: dict(config) for name, config in configs.items()}
    return {KEY: json.dumps(plain, sort_keys=True)} if plain else {}


def read_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The configs by component that a header has.

    Raises:
        ValueError: the entry is damaged, or has sizes that nobody could build.
    """
    configs = parse_json(metadata.get(KEY, "{}"), f"the header's {KEY}")
    for component, config in configs.items():
        if not isinstance(config, dict):
            raise ValueError(f"the header's {KEY} has no object for {quoted(component, 60)}; pass config=")
        check_sizes(config, f"the header's {KEY}")
    return configs
