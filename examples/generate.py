"""Draws pictures: `python examples/generate.py --prompt "red apple, flat style"`; with a LoRA: add `--lora FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="the word embedded, a folder, or a Hub name")
    parser.add_argument("--prompt", nargs="+", default=["red apple, flat style"], help="one picture row per prompt")
    parser.add_argument("--negative_prompt", default=None)
    parser.add_argument("--lora", nargs="*", default=[], help="LoRA files or folders, in any known format")
    parser.add_argument("--lora_weight", type=float, default=1.0)
    parser.add_argument("--num_images_per_prompt", type=int, default=4)
    parser.add_argument("--height", type=int, default=None, help="multiple of 8; by default the model's own size")
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--prior_num_inference_steps", type=int, default=20)
    parser.add_argument("--prior_guidance_scale", type=float, default=4.0)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--decoder_guidance_scale", type=float, default=1.1)
    parser.add_argument("--preview", action="store_true", help="rough and fast: no Stages B and A")
    parser.add_argument("--seed", type=int, default=0, help="picture number i is drawn with seed + i")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--offload", action="store_true", help="keep only the network at work on the GPU")
    parser.add_argument("--output", type=Path, default=Path("outputs/generated.png"))
    return parser.parse_args(argv)


def load(arguments: argparse.Namespace):
    """The pipeline on its device, LoRAs included."""
    from stable_cascade import StableCascadePipeline
    from stable_cascade.embedded import embedded_path

    folder = embedded_path() if arguments.model == "embedded" else arguments.model
    pipeline = StableCascadePipeline.from_pretrained(folder, torch_dtype=getattr(torch, arguments.dtype))
    names = [f"lora_{number}" for number in range(len(arguments.lora))]
    for name, source in zip(names, arguments.lora, strict=True):
        pipeline.load_lora_weights(source, adapter_name=name)
    if names:
        pipeline.set_adapters(names, [arguments.lora_weight] * len(names))
    if arguments.offload:
        pipeline.enable_model_cpu_offload()
        return pipeline
    return pipeline.to(arguments.device)


def sheet(images: list[Image.Image], columns: int) -> Image.Image:
    """Pictures side by side, `columns` in a row."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    paper = Image.new("RGB", (columns * width, rows * height), "white")
    for number, image in enumerate(images):
        paper.paste(image, (number % columns * width, number // columns * height))
    return paper


def main(argv: list[str] | None = None) -> None:
    """Writes one sheet, a row per prompt."""
    arguments = parse_arguments(argv)
    pipeline = load(arguments)
    count = len(arguments.prompt) * arguments.num_images_per_prompt
    images = pipeline(
        arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        height=arguments.height,
        width=arguments.width,
        prior_num_inference_steps=arguments.prior_num_inference_steps,
        prior_guidance_scale=arguments.prior_guidance_scale,
        num_inference_steps=arguments.num_inference_steps,
        decoder_guidance_scale=arguments.decoder_guidance_scale,
        num_images_per_prompt=arguments.num_images_per_prompt,
        generator=[torch.Generator().manual_seed(arguments.seed + number) for number in range(count)],
        preview=arguments.preview,
    ).images
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(images, arguments.num_images_per_prompt).save(arguments.output)
    print(f"{count} pictures in {arguments.output}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as problem:
        sys.exit(str(problem))
