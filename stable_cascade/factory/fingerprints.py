"""What tells one frozen network's outputs from another's: a hash of its files, cheap enough for every start."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stable_cascade.files.json_files import read_json
from stable_cascade.hub import hub_file

from .clip import clip_source
from .networks import SCRATCH, preset, source

_FORMAT = 2  # since 2 an ICC profile is applied
"""Raise it when the same network and image give other tensors than before."""

_SOURCES = "sources.json"
_WHOLE, _PIECES, _PIECE = 256 * 2**20, 256, 65536
_READ = ("*.json", "*.txt", "*.safetensors", "*.bin", "*.pt")
PARTS = {
    "latents": ("semantic_encoder",),
    "images": ("image_encoder",),
    "texts": ("tokenizer", "text_encoder"),
}
"""The networks that make each kind of tensor."""


def cache_folder(config: Any) -> Path:
    """Where the config's cache is."""
    return Path(config.cache_dir) if config.cache_dir else Path(config.checkpoint_path) / "cache"


def fingerprint(config: Any, kind: str) -> str:
    """A hash of the networks that make one kind of tensor, and of the number format in which they do.

    A local file or folder is known by its contents, of files above 256 MB by their size and 256 pieces of 64 KB spread
    over them; a Hub name by its commit. Where a local network's weights are gone, what the cache remembers of that
    path counts: no other network can be meant.

    Raises:
        ValueError: a network is not there, and was not before.
    """
    parts = [_part(config, part) for part in PARTS[kind]]
    dtype = config.dtype if kind == "texts" else "float32"
    return _hash(json.dumps([_FORMAT, kind, dtype, parts]).encode())


def remembered(config: Any, part: str) -> bool:
    """Whether a cache was filled from this network, so that a training needs its weights no longer."""
    if part not in {part for parts in PARTS.values() for part in parts} or not getattr(config, "cache", False):
        return False
    return str(_place(config, part)) in _memory(cache_folder(config))


def remember(config: Any, kinds: Iterable[str]) -> None:
    """Write down the hashes of the networks that fill the cache."""
    folder = cache_folder(config)
    known = _memory(folder)
    for part in (part for kind in kinds for part in PARTS[kind]):
        known[str(_place(config, part))] = _part(config, part)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tmp-{os.getpid()}-{_SOURCES}"
    temporary.write_text(json.dumps(known, indent=1))
    os.replace(temporary, folder / _SOURCES)


def _memory(folder: Path) -> dict[str, str]:
    """Path of a network -> its hash, of the networks that filled the cache."""
    try:
        return read_json(folder / _SOURCES)
    except (OSError, ValueError):
        return {}


def _place(config: Any, part: str) -> Path | str:
    """Path of a network, or what stands for it: a Hub name, the word `scratch`."""
    if part == "semantic_encoder":
        where = source(config, part)
        return Path(where).absolute() if Path(where).exists() else where
    name, folder = clip_source(config, part)
    return (Path(name) / folder).absolute() if Path(name).exists() else f"{name}:{folder}"


def _part(config: Any, part: str) -> str:
    """The hash of one network."""
    place = _place(config, part)
    if isinstance(place, str):
        if place == SCRATCH:
            return _hash(json.dumps([config.seed, preset(config, part)], sort_keys=True).encode())
        return _commit(place if ":" in place else f"{place}:{part}")
    files = [place] if place.is_file() else sorted({file for pattern in _READ for file in place.glob(pattern)})
    weights = [file for file in files if file.suffix in (".safetensors", ".bin", ".pt")]
    if part != "tokenizer" and not weights:
        known = _memory(cache_folder(config))
        if str(place) not in known:
            raise ValueError(f"'{place}' holds no weights of the {part}, and the cache was not filled from it before")
        return known[str(place)]
    return _hash(*(piece for file in files for piece in (file.name.encode(), *_pieces(file))))


def _commit(place: str) -> str:
    """Hub name and commit of a network, from its small config file."""
    name, _, folder = place.partition(":")
    file = "tokenizer_config.json" if folder == "tokenizer" else "config.json"
    parts = hub_file(name, file, subfolder=folder or None).parts
    return f"{place}@{parts[parts.index('snapshots') + 1]}"


def _pieces(file: Path) -> Iterable[bytes]:
    """The file's contents, or pieces of a large one."""
    size = file.stat().st_size
    yield size.to_bytes(8, "little")
    with file.open("rb") as opened:
        if size <= _WHOLE:
            while block := opened.read(2**22):
                yield block
            return
        for number in range(_PIECES):
            opened.seek(number * (size - _PIECE) // (_PIECES - 1))
            yield opened.read(_PIECE)


def _hash(*pieces: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
