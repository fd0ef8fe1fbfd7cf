"""Measures the embedded cascade, or any cascade folder made like it; each command prints one JSON line and a sentence.

    python examples/embedded/evaluate.py retrieval        # 100 training captions x 4 images: is the right one near?
    python examples/embedded/evaluate.py reconstruction   # 200 images it never saw: encoder -> Stage B -> Stage A
    python examples/embedded/evaluate.py samplers         # every sampler at 20+10, 8+4 and 4+2 steps, as a table
    python examples/embedded/evaluate.py speed            # seconds for 4 images on 2 threads
    python examples/embedded/evaluate.py lora --lora FOLDER        # does a LoRA draw nearer to its style?
    python examples/embedded/evaluate.py clip             # does a caption find its image?

All but clip, which needs the base.tar of prepare_data.py, run from a checkout alone. Options of all commands:
--model FOLDER (default: the cascade in the package), --out FOLDER for contact sheets, --seed, --threads.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from concepts import BASE_LABELS, INK_LABELS, caption_name
from measures import distances, mean_nearest_distance, ranks, read_mosaic, read_shard, shrink, write_sheet
from torch import Tensor

HERE = Path(__file__).resolve().parent
INK = HERE.parent / "data" / "ink_emoji.tar"
SIDE = 64
FEW_STEPS = ((20, 10), (8, 4), (4, 2))


def load_pipeline(arguments: argparse.Namespace, name: str = "StableCascadePipeline"):
    """A pipeline of `--model`, in float32, without progress bars."""
    import stable_cascade
    from stable_cascade.embedded import embedded_path

    folder = arguments.model or embedded_path()
    pipeline = getattr(stable_cascade, name).from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(arguments.device)


def generate(pipeline, prompts: list[str], arguments: argparse.Namespace, *, first_seed: int = 0) -> Iterator[Tensor]:
    """Images for the prompts, one batch after the other; image i has the seed `--seed` + first_seed + i.

    Shapes: each (B, 3, 64, 64) in [0, 1].
    """
    for start in range(0, len(prompts), arguments.batch_size):
        batch = prompts[start : start + arguments.batch_size]
        seeds = range(arguments.seed + first_seed + start, arguments.seed + first_seed + start + len(batch))
        images = pipeline(
            prompt=batch,
            height=SIDE,
            width=SIDE,
            prior_num_inference_steps=arguments.prior_steps,
            prior_guidance_scale=arguments.prior_guidance_scale,
            num_inference_steps=arguments.steps,
            guidance_method=arguments.guidance_method,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
        yield images.float().cpu().clamp(0, 1)


def retrieval(arguments: argparse.Namespace) -> dict:
    """Share of generated images whose own training image is among the nearest, at 16 x 16 px, of 100."""
    _, captions, targets = read_mosaic(HERE / "captions_100.webp", side=32)
    pipeline = load_pipeline(arguments)
    count = arguments.images_per_caption
    prompts = [caption for caption in captions for _ in range(count)]
    images = torch.cat(list(generate(pipeline, prompts, arguments)))
    right = torch.arange(len(captions)).repeat_interleave(count)
    place = ranks(distances(shrink(images), shrink(targets)), right)
    large = torch.nn.functional.interpolate(targets, size=(SIDE, SIDE))
    blocks = [[large[i], *images[right == i]] for i in range(len(captions))]
    write_sheet(arguments.out / "retrieval.png", blocks, columns=5)
    worst = sorted(captions, key=lambda caption: place[right == captions.index(caption)].float().mean(), reverse=True)
    found = [(place[right == i] < 5).float().mean().item() for i in range(len(captions))]
    return {
        "top5": (place < 5).float().mean().item(),
        "top1": (place < 1).float().mean().item(),
        "captions_found_half_the_time": sum(share >= 0.5 for share in found),
        "images": len(images),
        "worst": worst[:10],
        "sheet": str(arguments.out / "retrieval.png"),
    }


def reconstruction(arguments: argparse.Namespace) -> dict:
    """Mean PSNR of held-out images after image encoder, sampled Stage B and Stage A."""
    from stable_cascade.objectives.vqgan import psnr

    _, _, images = read_mosaic(HERE / "held_out_200.webp", side=SIDE)
    pipeline = load_pipeline(arguments, "StableCascadeReconstructionPipeline")
    outputs = []
    for start in range(0, len(images), arguments.batch_size):
        batch = images[start : start + arguments.batch_size]
        seeds = range(arguments.seed + start, arguments.seed + start + len(batch))
        rebuilt = pipeline(
            batch.to(arguments.device),
            num_inference_steps=arguments.steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
        outputs.append(rebuilt.float().cpu().clamp(0, 1))
    drawn = torch.cat(outputs)
    values = psnr(drawn, images)
    blocks = [[before, after] for before, after in zip(images, drawn, strict=True)]
    write_sheet(arguments.out / "reconstruction.png", blocks, columns=10)
    return {
        "psnr": values.mean().item(),
        "psnr_median": values.median().item(),
        "psnr_lowest": values.min().item(),
        "images": len(images),
        "sheet": str(arguments.out / "reconstruction.png"),
    }


def samplers(arguments: argparse.Namespace) -> dict:
    """Every sampler at several numbers of steps: PSNR to the caption's own image at 32 px, retrieval, seconds."""
    from stable_cascade import StableCascadeScheduler
    from stable_cascade.diffusion.samplers import SAMPLERS

    _, captions, targets = read_mosaic(HERE / "captions_100.webp", side=32)
    pipeline, rows = load_pipeline(arguments), []
    released = {name: getattr(pipeline, name).config for name in ("prior_scheduler", "scheduler")}
    for sampler in SAMPLERS:
        for name, config in released.items():
            setattr(pipeline, name, StableCascadeScheduler.from_config(config, sampler=sampler))
        for arguments.prior_steps, arguments.steps in FEW_STEPS:
            started = time.process_time()
            images = torch.cat(list(generate(pipeline, captions, arguments)))
            seconds = (time.process_time() - started) / len(captions)
            error = (shrink(images, 32) - shrink(targets, 32)).square().flatten(1).mean(1)
            place = ranks(distances(shrink(images), shrink(targets)), torch.arange(len(captions)))
            steps = f"{arguments.prior_steps}+{arguments.steps}"
            rows.append({"sampler": sampler, "steps": steps, "psnr": (-10 * error.log10()).mean().item(),
                         "top1": (place < 1).float().mean().item(), "cpu_seconds": seconds})  # fmt: skip
            write_sheet(arguments.out / f"{sampler}-{steps}.png", [list(images[:40])], columns=1)
            print(f"| {sampler} | {steps} | {rows[-1]['psnr']:.1f} dB | {rows[-1]['top1']:.2f} | {seconds:.2f} s |")
    return {"rows": rows, "captions": len(captions)}


def speed(arguments: argparse.Namespace) -> dict:
    """Wall seconds of one call that draws 4 images; the first call, and the next, when everything is warm."""
    pipeline = load_pipeline(arguments)
    arguments.batch_size = 4
    prompts = ["red apple, noto style", "panda, flat style", "rocket, noto style", "red heart, flat style"]
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        images = torch.cat(list(generate(pipeline, prompts, arguments)))
        seconds.append(time.perf_counter() - started)
    write_sheet(arguments.out / "speed.png", [list(images)], columns=1)
    return {"seconds": seconds[0], "seconds_warm": seconds[1], "threads": torch.get_num_threads(), "images": 4}


def ink_prompts(count: int) -> dict[str, list[str]]:
    """Prompts with the style token: for concepts that the LoRA trains on, and for base concepts that it does not."""
    unseen = [label for label in BASE_LABELS if label not in INK_LABELS and "heart" not in label]
    groups = {"seen": INK_LABELS, "unseen": unseen}
    return {
        name: [f"{caption_name(label)} in [ink] style" for label in labels[:: max(1, len(labels) // count)][:count]]
        for name, labels in groups.items()
    }


@torch.no_grad()
def lora(arguments: argparse.Namespace) -> dict:
    """How much nearer to the style's images a LoRA draws: same prompts, same seeds, before and after.

    Nearness is the mean distance, in the image encoder's latents, to the nearest of the style's 60 images.
    """
    if arguments.lora is None:
        raise ValueError("lora needs --lora FOLDER, the folder that train_lora.py wrote")
    pipeline = load_pipeline(arguments)
    latents = load_pipeline(arguments, "StableCascadeReconstructionPipeline").encode
    target = latents(torch.stack([image for _, _, image in read_shard(INK, side=SIDE)]))
    prompts = ink_prompts(arguments.prompts)
    drawn = {
        "before": {name: torch.cat(list(generate(pipeline, texts, arguments))) for name, texts in prompts.items()}
    }
    pipeline.load_lora_weights(str(arguments.lora))
    drawn["after"] = {name: torch.cat(list(generate(pipeline, texts, arguments))) for name, texts in prompts.items()}
    result: dict = {}
    for when, groups in drawn.items():
        far = {name: mean_nearest_distance(latents(images), target) for name, images in groups.items()}
        result[when] = {**far, "all": mean_nearest_distance(latents(torch.cat(list(groups.values()))), target)}
    closer = {f"closer_{name}": 1 - result["after"][name] / result["before"][name] for name in result["before"]}
    blocks = [
        [before, after]
        for name in prompts
        for before, after in zip(drawn["before"][name], drawn["after"][name], strict=True)
    ]
    write_sheet(arguments.out / "lora.png", blocks, columns=10)
    return {**closer, **result, "images": len(blocks), "sheet": str(arguments.out / "lora.png")}


@torch.no_grad()
def clip(arguments: argparse.Namespace) -> dict:
    """Share of base images found by their caption among all base images as drawn, by CLIP's similarity."""
    from stable_cascade.models.clip import clip_pixels

    samples = [sample for sample in read_shard(arguments.data / "base.tar", side=SIDE) if sample[0].endswith("-0")]
    pipeline = load_pipeline(arguments)
    tokens = pipeline.tokenizer(
        [caption for _, caption, _ in samples], padding="max_length", truncation=True, return_tensors="pt"
    ).to(arguments.device)
    size = pipeline.image_encoder.config.image_size
    pixels = clip_pixels(torch.stack([image for _, _, image in samples]), size).to(arguments.device)
    texts = pipeline.text_encoder(**tokens).text_embeds
    images = pipeline.image_encoder(pixels).image_embeds
    similarity = torch.nn.functional.normalize(texts, dim=-1) @ torch.nn.functional.normalize(images, dim=-1).T
    place = ranks(-similarity, torch.arange(len(samples), device=similarity.device))
    return {
        "top1": (place < 1).float().mean().item(),
        "top5": (place < 5).float().mean().item(),
        "images": len(samples),
    }


COMMANDS = {
    "retrieval": (
        retrieval,
        "right image in the top 5 for {top5:.1%} of {images} images, nearest for {top1:.1%}",
    ),
    "reconstruction": (reconstruction, "{psnr:.2f} dB mean PSNR over {images} held-out images"),
    "samplers": (samplers, "{captions} captions"),
    "speed": (speed, "{seconds:.2f} s for {images} images on {threads} threads ({seconds_warm:.2f} s when warm)"),
    "lora": (lora, "{closer_all:.1%} nearer to the style (seen {closer_seen:.1%}, unseen {closer_unseen:.1%})"),
    "clip": (clip, "caption finds its image among {images}: top 1 {top1:.1%}, top 5 {top5:.1%}"),
}


def main() -> None:
    """Runs one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--model", type=Path, help="folder of a cascade; default: the embedded one")
    parser.add_argument("--lora", type=Path, help="folder of a LoRA, for the command lora")
    parser.add_argument("--data", type=Path, default=Path("outputs/embedded/data"), help="where prepare_data.py wrote")
    parser.add_argument("--out", type=Path, default=Path("outputs/embedded/evaluation"), help="for contact sheets")
    parser.add_argument("--images_per_caption", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=20, help="lora: how many prompts of each group")
    parser.add_argument("--prior_steps", type=int, default=20)
    parser.add_argument("--prior_guidance_scale", type=float, default=4.0)
    parser.add_argument("--guidance_method", default="cfg")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measure, sentence = COMMANDS[arguments.command]
    try:
        result = measure(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"command": arguments.command, **result}))
    print(f"{arguments.command}: {sentence.format(**result)}")


if __name__ == "__main__":
    main()
