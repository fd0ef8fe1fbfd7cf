"""A single file that is named by its address on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from stable_cascade import hub
from stable_cascade.redaction import bare_address
from stable_cascade.wording import quoted

_ADDRESS = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/(?:resolve|blob|raw)/([^/?#]+)/([^?#]+)"
)


def hub_file(address: str) -> Path:
    """The local copy of a file on the Hub, downloaded if it is not in the cache.

    Raises:
        ValueError: the address is of another place, or the Hub does not give the file.
    """
    found = _ADDRESS.match(address)
    named = quoted(bare_address(address))
    if not found:
        raise ValueError(f"{named} is no file on huggingface.co; download it and give its path")
    repository, revision, name = found.groups()
    try:
        return hub.hub_file(repository, name, revision=revision)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
