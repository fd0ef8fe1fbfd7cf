"""The images of `make quickstart`: the same prompts from the same noise, before the LoRA and after it.

    python examples/quickstart.py before --config examples/configs/lora_embedded.yaml --output outputs/quickstart
    python examples/quickstart.py after  --config examples/configs/lora_embedded.yaml --output outputs/quickstart

Other keys of the config can be overridden, as for train_lora.py. `after` expects what that wrote, measures how much
nearer to the style the LoRA draws, and writes before_after.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from stable_cascade import StableCascadePipeline, factory
from stable_cascade.config import LoraConfig, load_config, run_main

TILE, GAP, LEFT, TOP, CAPTION = 144, 10, 76, 58, 44
INK, GREY, PAPER = (24, 24, 27), (96, 96, 104), (250, 250, 248)


def cascade(config: LoraConfig) -> str:
    """The folder of the whole cascade that the LoRA is trained on."""
    folder = factory.cascade_folder(config)
    if folder is None:
        raise ValueError("pretrained_model_name_or_path is not set; name the cascade to draw with, or 'embedded'")
    return folder


def draw_images(config: LoraConfig, prompts: list[str], lora: Path | None) -> list[Image.Image]:
    """One image per prompt; image i starts from noise of the seed `config.seed` + i, with or without a LoRA."""
    pipeline = StableCascadePipeline.from_pretrained(cascade(config), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    return pipeline(
        prompt=prompts,
        prior_num_inference_steps=config.preview_steps,
        prior_guidance_scale=config.preview_guidance_scale,
        num_inference_steps=config.preview_decoder_steps,
        generator=[torch.Generator().manual_seed(config.seed + place) for place in range(len(prompts))],
    ).images


def style_distances(model: str, lora: Path, output: Path, prompts: int) -> dict:
    """What `evaluate.py lora` measures: mean nearest distance to the style's images, before and after."""
    script = Path(__file__).resolve().parent / "embedded" / "evaluate.py"
    options = {"model": model, "lora": lora, "out": output, "prompts": prompts, "threads": torch.get_num_threads()}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    printed = subprocess.run([sys.executable, script, "lora", *flags], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(printed.stdout.splitlines()[0])


def wrapped(text: str, font, width: int) -> str:
    """The text with line breaks, so that no line is wider than `width` pixels where words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def sheet(rows: dict[str, list[Image.Image]], prompts: list[str], title: str) -> Image.Image:
    """Rows of images with their names at the left, the prompts below, a title above."""
    width = LEFT + len(prompts) * (TILE + GAP)
    paper = Image.new("RGB", (width, TOP + len(rows) * (TILE + GAP) + CAPTION), PAPER)
    pen, small, large = ImageDraw.Draw(paper), ImageFont.load_default(13), ImageFont.load_default(17)
    pen.multiline_text((GAP, GAP), wrapped(title, large, width - 2 * GAP), fill=INK, font=large, spacing=3)
    for row, (name, images) in enumerate(rows.items()):
        top = TOP + row * (TILE + GAP)
        pen.text((GAP, top + TILE // 2), name, fill=INK, font=large, anchor="lm")
        for column, image in enumerate(images):
            tile = image.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
            paper.paste(tile, (LEFT + column * (TILE + GAP), top))
    for column, prompt in enumerate(prompts):
        centre = (LEFT + column * (TILE + GAP) + TILE // 2, TOP + len(rows) * (TILE + GAP))
        text = wrapped(prompt, small, TILE)
        pen.multiline_text(centre, text, fill=GREY, font=small, anchor="ma", align="center", spacing=2)
    return paper


def before(config: LoraConfig, output: Path) -> None:
    """Draws and keeps the images that the cascade draws by itself."""
    started = time.perf_counter()
    images = draw_images(config, config.validation_prompts or [], lora=None)
    (output / "before").mkdir(parents=True, exist_ok=True)
    for place, image in enumerate(images):
        image.save(output / "before" / f"{place:02d}.png")
    print(f"before: {len(images)} images in {time.perf_counter() - started:.1f} s, in {output / 'before'}")


def after(config: LoraConfig, output: Path, measured: int) -> None:
    """Draws with the trained LoRA, measures it, and writes the sheet."""
    lora = Path(config.checkpoint_path) / config.experiment_id / "final"
    if not lora.is_dir():
        raise ValueError(f"'{lora}' does not exist: train_lora.py has not finished; run `make quickstart` again")
    prompts = config.validation_prompts or []
    earlier = [output / "before" / f"{place:02d}.png" for place in range(len(prompts))]
    missing = [str(path) for path in earlier if not path.is_file()]
    if missing:
        raise ValueError(
            f"'{missing[0]}' does not exist; run examples/quickstart.py before with the same --output first"
        )
    started = time.perf_counter()
    rows: dict[str, list[Image.Image]] = {"before": [Image.open(path) for path in earlier]}
    rows["after"] = draw_images(config, prompts, lora)
    print(f"after: {len(prompts)} images in {time.perf_counter() - started:.1f} s")
    far = style_distances(cascade(config), lora, output, measured)
    was, now = far["before"]["all"], far["after"]["all"]
    nearer = far["closer_all"]
    change = f"{abs(nearer):.0%} {'nearer to' if nearer >= 0 else 'farther from'} its style"
    title = f"A LoRA trained for {config.updates} steps draws {change}"
    target = output / "before_after.png"
    sheet(rows, prompts, title).save(target)
    print(
        f"mean distance to the nearest image of the style: {was:.3f} before, {now:.3f} after, "
        f"{nearer:.1%} nearer ({far['closer_unseen']:.1%} for things the LoRA has not seen)\n"
        f"LoRA: {lora}\nbefore and after: {target}"
    )


def main() -> None:
    """Runs one of the two halves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("when", choices=("before", "after"))
    parser.add_argument("--config", required=True, help="the LoRA's config")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="default: %(default)s")
    parser.add_argument("--measured", type=int, default=20, help="prompts per group that `after` measures with")
    arguments, overrides = parser.parse_known_args()
    config = load_config(LoraConfig, ["--config", arguments.config, *overrides])
    if not config.validation_prompts:
        raise ValueError(f"validation_prompts is not set in {arguments.config}; name the prompts to draw")
    if arguments.when == "before":
        before(config, arguments.output)
    else:
        after(config, arguments.output, arguments.measured)


if __name__ == "__main__":
    run_main(main)
