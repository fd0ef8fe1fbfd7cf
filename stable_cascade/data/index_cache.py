"""Scanned shards remembered on disk, so that a second start reads no shard."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .shards import ShardTable, StringColumn

_FORMAT = 4
"""Raise it when the meaning of a column changes: older files are then scanned again."""


def table_path(cache_dir: str | None, identity: Any) -> Path:
    """Where the table of a shard with this identity (location, size, version, fields, captions) is kept."""
    if cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        cache_dir = os.path.join(base, "stable_cascade", "index")
    name = hashlib.blake2b(json.dumps([_FORMAT, identity]).encode(), digest_size=16).hexdigest()
    return Path(cache_dir) / f"{name}.npz"


def load_table(path: Path) -> ShardTable | None:
    """The remembered table; None when there is none, or it is unreadable."""
    try:
        with np.load(path, allow_pickle=False) as columns:
            return ShardTable(
                keys=StringColumn(columns["keys"], columns["key_ends"]),
                spans=columns["spans"],
                sizes=columns["sizes"],
                hashes=columns["hashes"],
                captioned=columns["captioned"],
                fields=StringColumn(columns["fields"], columns["field_ends"]),
                faults=StringColumn(columns["faults"], columns["fault_ends"]),
            )
    except Exception:  # zipfile, zlib and numpy each have their own errors for a damaged file; all mean: scan again
        return None


def save_table(path: Path, table: ShardTable) -> None:
    """Remembers the table, atomically; in a folder that cannot be written it does nothing."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = file.name
            np.savez(
                file,
                keys=table.keys.data,
                key_ends=table.keys.ends,
                spans=table.spans,
                sizes=table.sizes,
                hashes=table.hashes,
                captioned=table.captioned,
                fields=table.fields.data,
                field_ends=table.fields.ends,
                faults=table.faults.data,
                fault_ends=table.faults.ends,
            )
        os.replace(temporary, path)
    except OSError:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
