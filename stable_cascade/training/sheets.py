"""Preview sheets: rows of images with labels, as one PNG that records which image is where."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stable_cascade.files.json_files import parse_json


def preview_sheet(
    rows: Sequence[tuple[str, Tensor]],
    path: str | Path,
    *,
    captions: Sequence[str] = (),
    cell: int | None = None,
    margin: int = 4,
) -> Path:
    """Write one row of images per entry, its label at the left and captions under the columns; returns the path.

    Shapes: each row (N, 3, H, W) in [0, 1], sizes and N may differ.

    Args:
        cell: side of the square each image is fitted into, in pixels; absent: the largest image's, at least 96.

    Raises:
        ValueError: there are no images.
    """
    from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

    # Sizes: cells are squares, labels lie at the left, captions below.
    rows = [(label, images) for label, images in rows if len(images)]
    if not rows:
        raise ValueError("a preview sheet needs at least one row with images")
    cell = cell or max(96, max(side for _, images in rows for side in images.shape[-2:]))
    font = ImageFont.load_default()
    left = margin * 2 + max(int(font.getlength(label)) for label, _ in rows)
    columns = max(len(images) for _, images in rows)
    bottom = 2 * margin + 12 if captions else 0
    size = (left + columns * (cell + margin), margin + len(rows) * (cell + margin) + bottom)

    # Draw rows and captions.
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (label, images) in enumerate(rows):
        top = margin + number * (cell + margin)
        draw.text((margin, top + cell // 2 - 6), label, "black", font)
        for column, image in enumerate(images):
            sheet.paste(_fitted(image, cell), (left + column * (cell + margin), top))
    for column, caption in enumerate(captions[:columns]):
        shown = _shortened(caption, cell, font.getlength)
        draw.text((left + column * (cell + margin), size[1] - bottom + margin), shown, "black", font)

    # Write the PNG with its layout.
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = {
        "cell": cell, "margin": margin, "left": left, "captions": list(captions),
        "rows": [[label, len(images)] for label, images in rows],
    }  # fmt: skip
    note = PngImagePlugin.PngInfo()
    note.add_itxt(_LAYOUT, json.dumps(layout, ensure_ascii=False))
    sheet.save(path, pnginfo=note)
    return path


@dataclass(frozen=True)
class SheetImage:
    """One image of a sheet: the label of its row, the caption under its column, and a PIL image."""

    row: str
    caption: str
    image: Any


def sheet_images(path: str | Path) -> list[SheetImage]:
    """The images of a sheet that `preview_sheet` wrote, row by row; none of any other image.

    Raises:
        ValueError: the layout in the file is not one that `preview_sheet` writes.
    """
    from PIL import Image

    with Image.open(path) as opened:
        text = getattr(opened, "text", {}).get(_LAYOUT)
        if text is None:
            return []
        sheet = opened.convert("RGB")

    # Where each row and column lies; the boxes have to lie within the sheet, so that no number in the file is trusted.
    layout = parse_json(text, f"the layout in '{Path(path).name}'")
    try:
        cell, margin, left = (int(layout[key]) for key in ("cell", "margin", "left"))
        captions, rows = (
            [str(caption) for caption in layout["captions"]],
            [(str(r), int(n)) for r, n in layout["rows"]],
        )
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"'{Path(path).name}' has a damaged layout; draw the preview sheet again") from None
    width, height = max((count for _, count in rows), default=0) * (cell + margin), len(rows) * (cell + margin)
    if min(cell, left, margin) < 0 or not cell or left + width > sheet.width or height > sheet.height:
        raise ValueError(f"'{Path(path).name}' is smaller than its layout; draw the preview sheet again")

    # Cut the images out.
    found = []
    for number, (label, count) in enumerate(rows):
        top = margin + number * (cell + margin)
        for column in range(count):
            x = left + column * (cell + margin)
            caption = captions[column] if column < len(captions) else ""
            found.append(SheetImage(label, caption, sheet.crop((x, top, x + cell, top + cell))))
    return found


_LAYOUT = "stable-cascade-sheet"
"""The PNG text that holds a sheet's layout."""


def to_image(pixels: Tensor):
    """A PIL image of one tensor.

    Shapes: (3, H, W) in [0, 1].
    """
    from PIL import Image

    levels = (pixels.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def _fitted(pixels: Tensor, cell: int):
    """The image on a white square of side `cell`, enlarged in whole steps or shrunk smoothly."""
    from PIL import Image

    image = to_image(pixels)
    scale = cell / max(image.size)
    scale = float(int(scale)) if scale >= 1 else scale
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resized = image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
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
