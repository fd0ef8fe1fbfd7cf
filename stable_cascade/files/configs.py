"""Networks' configs inside a weights file, for sizes that are none of the released ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stable_cascade.wording import quoted

from .json_files import check_sizes, parse_json

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
