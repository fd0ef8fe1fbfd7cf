"""Stage A in parts: tiles that reach over their own edges, equal to the image computed whole.

No layer of Stage A looks at the whole image: norms act at one position, convolutions see a known distance. A tile
with a margin of that distance has inside it exactly what the whole image has there, so nothing is blended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

TILE_SIDE = 768
"""Pixels along a side of a tile, its margin included, where nothing else is said."""
WHOLE_BELOW = 2048 * 2048
"""Pixels of a batch from which on Stage A works in tiles by itself."""


@dataclass(frozen=True)
class Span:
    """What a tile reads along one side, [start, stop), and what of it is its own, [first, last); in latents."""

    start: int
    stop: int
    first: int
    last: int


def decode_margin(levels: int, bottleneck_blocks: int) -> int:
    """Latents beyond its edge that a decoded tile depends on, 13 as released.

    From the pixels back: a mixing block sees one position further, a transposed 4x4 convolution of stride 2 needs half
    of that distance and one more.
    """
    distance = 0
    for _ in range(levels - 1):
        distance = (distance + 1) // 2 + 1
    return distance + bottleneck_blocks


def encode_margin(levels: int) -> int:
    """Latents' worth of pixels beyond its edge that an encoded tile depends on, 2 as released."""
    distance = 1
    for _ in range(levels - 1):
        distance = 2 * distance + 2  # the 4x4 convolution of stride 2, and the mixing block before it
    return -(-distance // 2 ** (levels - 1))


def spans(length: int, tile: int, margin: int) -> list[Span]:
    """The fewest tiles that cover `length`, all of about one size; `tile` is above `2 * margin`."""
    if length <= tile:
        return [Span(0, length, 0, length)]
    own = tile - 2 * margin
    assert own > 0
    count = -(-(length - 2 * margin) // own)
    own = -(-(length - 2 * margin) // count)
    found = []
    for start in range(0, count * own, own):
        first, last = start and start + margin, start + own + margin
        stop = min(start + own + 2 * margin, length)
        found.append(Span(start, stop, first, length if stop == length else last))
    return found


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, *, tile: tuple[int, int], margin: int, cell: tuple[int, int]
) -> Tensor:
    """`function(x)`, one tile of one image at a time.

    Args:
        tile: height and width of a tile in latents, margins included.
        margin: latents beyond an edge that the result depends on.
        cell: side of a latent in `x`, and in the result.

    Shapes: (B, C, h * cell[0], w * cell[0]) -> (B, C', h * cell[1], w * cell[1]).
    """
    before, after = cell
    height, width = (side // before for side in x.shape[-2:])
    grid = [(row, col) for row in spans(height, tile[0], margin) for col in spans(width, tile[1], margin)]
    result: Tensor | None = None
    for index in range(len(x)):
        for row, col in grid:
            part = function(x[index : index + 1, :, _read(row, before), _read(col, before)])
            if result is None:
                result = part.new_empty(len(x), part.shape[1], height * after, width * after)
            result[index, :, _own(row, after), _own(col, after)] = part[0, :, _kept(row, after), _kept(col, after)]
    assert result is not None
    return result


def default_tile_side(stride: int, margin: int) -> int:
    """`TILE_SIDE`, or as much as leaves half of a tile beside its margins, in whole latents."""
    return max(-(-TILE_SIDE // stride), 4 * margin + 1) * stride


def tile_side(side: int | None, before: int, name: str, *, stride: int, margin: int) -> int:
    """Pixels along a side of a tile: `side`, or what held before where that is None.

    Raises:
        ValueError: it is no multiple of the stride, or its margins leave nothing of it.
    """
    if side is None:
        return before
    least = (2 * margin + 1) * stride
    if isinstance(side, bool) or not isinstance(side, int) or side % stride or side < least:
        raise ValueError(f"{name} is {side!r}; must be a multiple of {stride} from {least} up: "
                         f"{margin * stride} pixels at each edge are margin")  # fmt: skip
    return side


def _read(span: Span, cell: int) -> slice:
    return slice(span.start * cell, span.stop * cell)


def _own(span: Span, cell: int) -> slice:
    return slice(span.first * cell, span.last * cell)


def _kept(span: Span, cell: int) -> slice:
    return slice((span.first - span.start) * cell, (span.last - span.start) * cell)
