"""Draws the images of the pages into docs/images/ with the embedded cascade: `make docs-images`.

Images of 64 pixels are shown three times as large, pixel by pixel, so that nothing is hidden. Input images are
held-out ones of examples/embedded/held_out_200.webp, which no network was trained on, or drawn by the cascade.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from stable_cascade import StableCascadePipeline, StableCascadeReconstructionPipeline
from stable_cascade.embedded import embedded_path
from stable_cascade.pipelines import outpaint

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
HELD_OUT = ROOT / "examples" / "embedded" / "held_out_200.webp"
SIDE, ZOOM, GAP, LABEL = 64, 3, 6, 18

EMBEDS = ("prompt_embeds", "prompt_embeds_pooled", "negative_prompt_embeds", "negative_prompt_embeds_pooled")

Cell = tuple[str, Image.Image]


def sheet(name: str, rows: Sequence[Sequence[Cell]]) -> None:
    """Writes rows of labelled images, each enlarged, as one PNG of few colours."""
    cells = [(label, image.convert("RGB")) for row in rows for label, image in row]
    labelled = any(label for label, _ in cells)
    font = ImageFont.load_default(13)
    widths = [sum(image.width * ZOOM + GAP for _, image in row) - GAP for row in rows]
    heights = [max(image.height for _, image in row) * ZOOM + (LABEL if labelled else 0) + GAP for row in rows]
    paper = Image.new("RGB", (max(widths), sum(heights) - GAP), "white")
    pen, top = ImageDraw.Draw(paper), 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for label, image in row:
            large = image.convert("RGB").resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST)
            paper.paste(large, (left, top))
            pen.rectangle((left, top, left + large.width - 1, top + large.height - 1), outline=(214, 214, 220))
            middle = (left + large.width // 2, top + height - GAP - LABEL // 2)
            pen.text(middle, label, fill=(60, 60, 66), font=font, anchor="mm")
            left += large.width + GAP
        top += height
    few = paper.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(IMAGES / f"{name}.png", optimize=True)


def held_out(key: str) -> Image.Image:
    """One image that no network was trained on."""
    keys = [line.split("\t")[0] for line in HELD_OUT.with_suffix(".txt").read_text(encoding="utf-8").splitlines()]
    place = keys.index(key)
    with Image.open(HELD_OUT) as mosaic:
        left, top = place % (mosaic.width // SIDE) * SIDE, place // (mosaic.width // SIDE) * SIDE
        return mosaic.convert("RGB").crop((left, top, left + SIDE, top + SIDE))


def seeds(*numbers: int) -> list[torch.Generator]:
    """A generator per image."""
    return [torch.Generator().manual_seed(number) for number in numbers]


def text_to_image(pipeline: Any) -> None:
    """Eight prompts."""
    names = ("red apple, flat style", "panda, flat style", "rocket, flat style", "sunflower, flat style",
             "snail, noto style", "castle, noto style", "owl, noto style", "fire, noto style")  # fmt: skip
    images = pipeline(list(names), generator=seeds(*range(8))).images
    cells = list(zip(names, images, strict=True))
    sheet("text_to_image", [cells[:4], cells[4:]])


def variation(pipeline: Any) -> None:
    """Reference images, and what is drawn from them alone."""
    rows = []
    for prompt in ("strawberry, flat style", "cat face, flat style"):
        reference = pipeline(prompt, generator=seeds(0)).images[0]
        drawn = pipeline("", images=reference, num_images_per_prompt=4, generator=seeds(0, 1, 2, 3)).images
        rows.append([("reference", reference), *((f"seed {seed}", image) for seed, image in enumerate(drawn))])
    sheet("variation", rows)


def img2img(pipeline: Any) -> None:
    """Two images at growing strength."""
    rows = []
    for key, prompt in (("hot_pepper-flat-0", "carrot, flat style"), ("running_shoe-flat-0", "top hat, flat style")):
        photo = held_out(key)
        rows.append([("image", photo)])
        for strength in (0, 0.05, 0.1, 0.2, 0.3, 1):
            drawn = pipeline(prompt, image=photo, strength=float(strength), generator=seeds(5)).images[0]
            rows[-1].append((f"{prompt.split(',')[0]}, {strength:g}", drawn))
    sheet("img2img", rows)


def inpaint(pipeline: Any) -> None:
    """An image, a mask, and the repainted image with two prompts."""
    photo = pipeline("dog face, flat style", generator=seeds(0)).images[0]
    mask = Image.new("L", photo.size, 0)
    ImageDraw.Draw(mask).rectangle((0, 32, 63, 63), fill=255)
    cells = [("image", photo), ("mask", mask)]
    for prompt in ("lion, flat style", "red apple, flat style"):
        drawn = pipeline(prompt, image=photo, mask_image=mask, generator=seeds(1)).images[0]
        cells.append((prompt, drawn))
    sheet("inpaint", [cells])


def outpainting(pipeline: Any) -> None:
    """A part of an image, and the image around it."""
    photo = pipeline("rainbow, flat style", generator=seeds(0)).images[0].crop((0, 0, 40, 64))
    canvas, mask = outpaint(photo, left=0, top=0, right=24, bottom=0)
    drawn = pipeline("rainbow, flat style", image=canvas, mask_image=mask, generator=seeds(3)).images[0]
    sheet("outpaint", [[("image", photo), ("canvas", canvas), ("mask", mask), ("painted around", drawn)]])


def prompts(pipeline: Any) -> None:
    """The weight of some words, and embeddings of two prompts mixed."""

    def drawn(encoded: Sequence[torch.Tensor], seed: int) -> Image.Image:
        return pipeline(**dict(zip(EMBEDS, encoded, strict=True)), generator=seeds(seed)).images[0]

    rows: list[list[Cell]] = [[], []]
    for weight in (0, 0.2, 0.4, 0.6, 1, 2):
        text = f"panda, flat style, (on pink background:{weight})"
        rows[0].append((f"weight {weight}", drawn(pipeline.encode_prompt(prompt=text, weighted=True), 2)))
    one, two = (pipeline.encode_prompt(prompt=text) for text in ("tulip, flat style", "lollipop, flat style"))
    for share in (0, 0.2, 0.4, 0.5, 0.6, 1):
        mixed = [torch.lerp(first, second, share) for first, second in zip(one, two, strict=True)]
        rows[1].append((f"{share:g} of the other", drawn(mixed, 3)))
    sheet("prompts", rows)


def reconstruction(pipeline: Any) -> None:
    """Held-out images beside what comes back, and one at several compressions."""
    keys = ("hot_pepper-flat-0", "open_mailbox_with_raised_flag-flat-0", "bubble_tea-noto-0")
    images = [held_out(key) for key in keys]
    rebuilt = pipeline(images, generator=seeds(0, 1, 2)).images
    pairs = [
        cell for pair in zip(images, rebuilt, strict=True) for cell in zip(("image", "rebuilt"), pair, strict=True)
    ]
    sheet("reconstruction", [pairs])
    cells = [("image", images[2])]
    for latents in (7, 6, 5, 4, 2):
        drawn = pipeline(images[2], compression=SIDE / latents, generator=seeds(0)).images[0]
        cells.append((f"{latents} x {latents} latents", drawn))
    sheet("compression", [cells])


def main() -> None:
    """All of them."""
    pipeline = StableCascadePipeline.from_pretrained(embedded_path())
    rebuilding = StableCascadeReconstructionPipeline.from_pretrained(embedded_path())
    for each in (pipeline, rebuilding):
        each.set_progress_bar_config(disable=True)
    tasks: tuple[Callable[[Any], None], ...] = (text_to_image, variation, img2img, inpaint, outpainting, prompts)
    for task in tasks:
        task(pipeline)
    reconstruction(rebuilding)


if __name__ == "__main__":
    main()
