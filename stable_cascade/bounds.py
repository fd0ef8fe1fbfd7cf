"""How large a thing from outside may be: the limits on files, images and texts, each once.

A limit is checked before memory is asked for. Imports nothing of the package, so that every layer may use it.
"""

from __future__ import annotations

MIB = 2**20

IMAGE_PIXELS = 64_000_000
"""Pixels of an image that are decoded, after a JPEG was shrunk while decoding; a photograph has 12 to 60 million."""
IMAGE_FILE = 256 * MIB
"""Bytes of an image file."""
JSON_FILE = 8 * MIB
"""Bytes of a JSON file or of a header's entry; those of the released models have some thousand."""
RUN_RECORD = 64 * MIB
"""Bytes of a checkpoint's run.json; a sharded run lists each file of each process."""
