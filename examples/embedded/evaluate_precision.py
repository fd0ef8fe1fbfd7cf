"""What half precision and weights in few bits cost on the embedded cascade, or any cascade folder made like it.

    python examples/embedded/evaluate_precision.py                       # the table of docs/precision.md
    python examples/embedded/evaluate_precision.py --forms float32 int8 --images 20 --captions 10

A form is a number format of all networks (float32, bfloat16, float16) or of the linear layers of prior and decoder
(int8, int4, nf4), the rest then in float32. Each is measured with the same seeds in two ways:

rebuilt   images that the cascade never saw, through image encoder, Stage B and Stage A: PSNR to the image
drawn     training captions: PSNR to the image that belongs to the caption, at 32 x 32 px, how often this one is the
          nearest of all, and PSNR to what float32 draws

The loss is float32's PSNR minus the form's: what rounding costs, in dB. One JSON line a form, then the table.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from measures import distances, ranks, read_mosaic, shrink
from torch import Tensor

HERE = Path(__file__).resolve().parent
HALVES = ("float32", "bfloat16", "float16")
FEW_BITS = ("int8", "int4", "nf4")
COLUMNS = ("rebuilt", "rebuilt_loss", "drawn", "drawn_loss", "nearest", "to_float32", "not_finite")


def load(form: str, model: str | Path | None = None, device: str = "cpu"):
    """A whole cascade in this form, and the pipeline that rebuilds images, of the same networks."""
    from stable_cascade import StableCascadePipeline, StableCascadeReconstructionPipeline
    from stable_cascade.adapters import quantize
    from stable_cascade.embedded import embedded_path

    dtype = getattr(torch, form) if form in HALVES else torch.float32
    drawing = StableCascadePipeline.from_pretrained(model or embedded_path(), torch_dtype=dtype)
    if form in FEW_BITS:
        for network in (drawing.prior, drawing.decoder):
            quantize(network, form)
    names = ("decoder", "tokenizer", "text_encoder", "scheduler", "vqgan", "semantic_encoder")
    parts = {name: getattr(drawing, name) for name in names}
    rebuilding = StableCascadeReconstructionPipeline(
        **parts, resolution_multiple=drawing.config["resolution_multiple"]
    )
    for pipeline in (drawing, rebuilding):
        pipeline.set_progress_bar_config(disable=True)
        if device != "cpu":
            pipeline.to(device)
    return drawing, rebuilding


def seeds(first: int, count: int) -> list[torch.Generator]:
    """One generator for each of so many images."""
    return [torch.Generator().manual_seed(seed) for seed in range(first, first + count)]


def rebuilt(pipeline, images: Tensor, batch_size: int = 20) -> Tensor:
    """The images as the cascade gives them back.

    Shapes: (B, 3, H, W) -> (B, 3, H, W).
    """
    batches = [
        pipeline(batch, generator=seeds(place * batch_size, len(batch)), output_type="pt").images
        for place, batch in enumerate(images.split(batch_size))
    ]
    return torch.cat(batches).float().cpu()


def drawn(pipeline, captions: list[str], batch_size: int = 20) -> Tensor:
    """One image for each caption.

    Shapes: -> (B, 3, H, W).
    """
    batches = [
        pipeline(
            captions[start : start + batch_size],
            generator=seeds(start, len(captions[start : start + batch_size])),
            output_type="pt",
        ).images
        for start in range(0, len(captions), batch_size)
    ]
    return torch.cat(batches).float().cpu()


def measure(form: str, data: dict, exact: dict | None, model: str | Path | None = None, device: str = "cpu") -> dict:
    """The columns of one form; `exact` is what this returned for float32, None for float32 itself."""
    from stable_cascade.objectives.vqgan import psnr

    drawing, rebuilding = load(form, model, device)
    back, images = rebuilt(rebuilding, data["held_out"]), drawn(drawing, data["captions"])
    target = data["targets"]
    row = {
        "rebuilt": psnr(back, data["held_out"]).mean().item(),
        "drawn": psnr(shrink(images, target.shape[-1]), target).mean().item(),
        "nearest": (ranks(distances(shrink(images), shrink(target)), torch.arange(len(target))) < 1)
        .float()
        .mean()
        .item(),
        "not_finite": int((~back.isfinite()).sum() + (~images.isfinite()).sum()),
        "images": images,
    }
    base = exact or row
    row["rebuilt_loss"], row["drawn_loss"] = base["rebuilt"] - row["rebuilt"], base["drawn"] - row["drawn"]
    row["to_float32"] = psnr(images, base["images"]).mean().item() if exact else math.inf
    return row


def read_data(images: int, captions: int) -> dict:
    """The first held-out images, and the first training captions with their images."""
    _, _, held_out = read_mosaic(HERE / "held_out_200.webp", side=64)
    _, texts, targets = read_mosaic(HERE / "captions_100.webp", side=32)
    return {"held_out": held_out[:images], "captions": texts[:captions], "targets": targets[:captions]}


def table(rows: dict[str, dict]) -> str:
    """The rows as Markdown."""
    head = (
        "| form | rebuilt, dB | loss | drawn, dB | loss | nearest | to float32, dB |",
        "|---|---|---|---|---|---|---|",
    )
    lines = [
        f"| {form} | {row['rebuilt']:.2f} | {row['rebuilt_loss']:+.2f} | {row['drawn']:.2f} | "
        f"{row['drawn_loss']:+.2f} | {row['nearest']:.0%} | {row['to_float32']:.1f} |"
        for form, row in rows.items()
    ]
    return "\n".join([*head, *lines])


def main() -> None:
    """Measures the forms one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=HALVES + FEW_BITS, default=[*HALVES, "int8", "int4"])
    parser.add_argument("--model", type=Path, help="folder of a cascade; default: the embedded one")
    parser.add_argument("--images", type=int, default=200, help="held-out images to rebuild, 200 at most")
    parser.add_argument("--captions", type=int, default=100, help="training captions to draw, 100 at most")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    data = read_data(arguments.images, arguments.captions)
    rows: dict[str, dict] = {}
    for form in ["float32", *(form for form in arguments.forms if form != "float32")]:
        rows[form] = measure(form, data, rows.get("float32"), arguments.model, arguments.device)
        print(json.dumps({"form": form} | {name: rows[form][name] for name in COLUMNS}))
    print(table(rows))


if __name__ == "__main__":
    main()
