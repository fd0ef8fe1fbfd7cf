"""Preview sheets: rows of pictures with labels, as one PNG that says of itself which picture is where."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


def preview_sheet(
    rows: Sequence[tuple[str, Tensor]],
    path: str | Path,
    *,
    captions: Sequence[str] = (),
    cell: int | None = None,
    margin: int = 4,
) -> Path:
    """Write one row of pictures per entry, its label at the left and captions under the columns; returns the path.

    Shapes: each row (N, 3, H, W) in [0, 1], sizes and N may differ.

    Args:
        cell: side of the square each picture is fitted into, in pixels; absent: the largest picture's, at least 96.

    Raises:
        ValueError: there are no pictures.
    """
    from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

    rows = [(label, pictures) for label, pictures in rows if len(pictures)]
    if not rows:
        raise ValueError("a preview sheet needs at least one row with pictures")
    cell = cell or max(96, max(side for _, pictures in rows for side in pictures.shape[-2:]))
    font = ImageFont.load_default()
    left = margin * 2 + max(int(font.getlength(label)) for label, _ in rows)
    columns = max(len(pictures) for _, pictures in rows)
    bottom = 2 * margin + 12 if captions else 0
    size = (left + columns * (cell + margin), margin + len(rows) * (cell + margin) + bottom)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (label, pictures) in enumerate(rows):
        top = margin + number * (cell + margin)
        draw.text((margin, top + cell // 2 - 6), label, "black", font)
        for column, picture in enumerate(pictures):
            sheet.paste(_fitted(picture, cell), (left + column * (cell + margin), top))
    for column, caption in enumerate(captions[:columns]):
        shown = _shortened(caption, cell, font.getlength)
        draw.text((left + column * (cell + margin), size[1] - bottom + margin), shown, "black", font)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = {
        "cell": cell, "margin": margin, "left": left, "captions": list(captions),
        "rows": [[label, len(pictures)] for label, pictures in rows],
    }  # fmt: skip
    note = PngImagePlugin.PngInfo()
    note.add_itxt(_LAYOUT, json.dumps(layout, ensure_ascii=False))
    sheet.save(path, pnginfo=note)
    return path


@dataclass(frozen=True)
class SheetPicture:
    """One picture of a sheet: the label of its row, the caption under its column, and a PIL picture."""

    row: str
    caption: str
    picture: Any


def sheet_pictures(path: str | Path) -> list[SheetPicture]:
    """The pictures of a sheet that `preview_sheet` wrote, row by row; none of any other picture."""
    from PIL import Image

    with Image.open(path) as opened:
        text = getattr(opened, "text", {}).get(_LAYOUT)
        sheet = opened.convert("RGB")
    if text is None:
        return []
    layout = json.loads(text)
    cell, margin, captions = layout["cell"], layout["margin"], layout["captions"]
    found = []
    for number, (label, count) in enumerate(layout["rows"]):
        top = margin + number * (cell + margin)
        for column in range(count):
            left = layout["left"] + column * (cell + margin)
            caption = captions[column] if column < len(captions) else ""
            found.append(SheetPicture(label, caption, sheet.crop((left, top, left + cell, top + cell))))
    return found


_LAYOUT = "stable-cascade-sheet"
"""The PNG text that holds a sheet's layout."""


def to_picture(pixels: Tensor):
    """A PIL picture of one tensor.

    Shapes: (3, H, W) in [0, 1].
    """
    from PIL import Image

    levels = (pixels.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def _fitted(pixels: Tensor, cell: int):
    """The picture on a white square of side `cell`, enlarged in whole steps or shrunk smoothly."""
    from PIL import Image

    picture = to_picture(pixels)
    scale = cell / max(picture.size)
    scale = float(int(scale)) if scale >= 1 else scale
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resized = picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (cell, cell), "white")
    square.paste(resized, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square


def _shortened(text: str, width: int, measure) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if measure(text) <= width:
        return text
    while text and measure(text + "…") > width:
        text = text[:-1]
    return text + "…"
