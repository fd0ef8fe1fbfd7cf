"""How large a thing from outside may be: the limits on files, images and texts, each once.

A limit is checked before memory is asked for. Imports nothing of the package, so that every layer may use it.
"""

from __future__ import annotations

MIB = 2**20

IMAGE_PIXELS = 64_000_000
"""Pixels of an image that are decoded, after a JPEG was shrunk while decoding; a photograph has 12 to 60 million."""
IMAGE_FILE = 256 * MIB
"""Bytes of an image file."""
STORED_UPLOADS = 4096 * MIB
"""Bytes of everything that a page's visitors have uploaded and drawn since it was started."""
LONGEST_SHAPE = 20
"""How many times longer than the other one side of an image may be: to cover a square, it grows that many times."""
DRAWN_SIDE, STEPS, COPIES = 16_384, 10_000, 10_000
"""Pixels of a side, steps and images per prompt that a pipeline draws."""
JSON_FILE = 8 * MIB
"""Bytes of a JSON file or of a header's entry; those of the released models have some thousand."""
TENSORS = 20_000
"""Tensors of one file; the largest of the released networks has some thousand."""
PICKLE_ENTRIES = 10_000
"""Entries of a pickle's archive, one for each tensor and some more."""
RUN_RECORD = 64 * MIB
"""Bytes of a checkpoint's run.json; a sharded run lists each file of each process."""
CAPTION_FILE = 64 * 2**10
"""Bytes of a caption; a text encoder reads some hundred."""
METADATA_FILE = 256 * MIB
"""Bytes of a metadata.csv or metadata.jsonl, which has a line for each image of a folder."""
TAR_HEADER = MIB
"""Bytes of a long name or of a pax header in a tar."""
MEMBER_END = 2**62
"""Where a tar's member may end; beyond it no file system has bytes."""


def check_shape(width: int, height: int) -> None:
    """Passes when an image of this size can be resized to cover another without growing beyond reason.

    Raises:
        ValueError: one side is more than `LONGEST_SHAPE` times the other.
    """
    if max(width, height) > LONGEST_SHAPE * min(width, height):
        raise ValueError(
            f"its size is {width:,} x {height:,}; one side may be at most {LONGEST_SHAPE} times the other: crop it"
        )
