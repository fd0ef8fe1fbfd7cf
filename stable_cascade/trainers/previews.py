"""Preview sheets of the trainers: what the network in training draws, beside what it should draw.

Previews draw from generators of their own, so that looking never changes what is trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stable_cascade import factory
from stable_cascade.data import Batch
from stable_cascade.diffusion.noise import gaussian_noise, sample_generators
from stable_cascade.diffusion.process import add_noise, to_clean
from stable_cascade.diffusion.schedule import cosine_log_snr, cosine_t
from stable_cascade.objectives.denoising import EmbedText
from stable_cascade.objectives.vqgan import perplexity, psnr
from stable_cascade.pipelines.sampling import (
    Control,
    Settings,
    Text,
    decode_vq,
    sample_semantic,
    sample_vq,
    vq_noise_shape,
)
from stable_cascade.schedulers import StableCascadeScheduler
from stable_cascade.training.optimizers import averaged
from stable_cascade.training.sheets import preview_sheet

Batches = Callable[[int], Iterator[Batch]]
Preview = Callable[[Path, Any, int, Any], list[Path]]
_quiet = partial(tqdm, disable=True)


def embedded_text(embed: EmbedText, prompts: Sequence[str]) -> Text:
    """The prompts and as many empty ones, ready for guidance."""
    count = len(prompts)
    hidden, pooled = embed([*prompts, *[""] * count])
    return Text(hidden[:count], pooled[:count], hidden[count:], pooled[count:])


def one_step(predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, prediction_type: str, t: float) -> Tensor:
    """The clean latents that the network sees in latents noised to time `t`.

    Shapes: (B, C, h, w) -> (B, C, h, w).
    """
    log_snr = cosine_log_snr(torch.full((len(clean),), t)).to(clean.device)
    noise = gaussian_noise(clean.shape[1:], sample_generators(range(len(clean)), "preview")).to(clean.device)
    noised = add_noise(clean, noise, log_snr)
    return to_clean(prediction_type, predict(noised, cosine_t(log_snr)).float(), noised, log_snr)


def no_previews(directory: Path, model: Any, step: int, ema: Any) -> list[Path]:
    """The preview of `num_preview_images: 0`."""
    return []


def prior_previews(
    config: Any, device: torch.device, inputs: factory.Inputs, control: Callable[[Batch], Tensor] | None = None
) -> Preview:
    """Sheets of Stage C: images, their latents, one step of denoising, samples (EMA too), control images.

    Args:
        control: batch -> control images (B, c, H, W) of its images, as the training makes them.
    """
    if not config.num_preview_images:
        return no_previews
    # What every sheet shows again: the first images, their latents and control images.
    batch = first_images(inputs.images, config.num_preview_images)
    images = factory.shown(batch, device)
    show = latents_shown(config, device, inputs.text, preview_size(images))
    prompts = list(config.validation_prompts or batch.captions)
    clean, captions = inputs.encode(batch), batch.captions
    image = control(batch) if control is not None else None
    settings = Settings(config.preview_steps, config.preview_guidance_scale)
    scheduler = StableCascadeScheduler(shift=2.0, prediction_type=config.prediction_type)

    # Samples for the prompts, always from the same noise.
    def draw(model: Any) -> Tensor:
        generators = sample_generators(range(config.seed, config.seed + len(prompts)), "preview sample")
        noise = gaussian_noise(clean.shape[1:], generators).to(device)
        text = embedded_text(model.text, prompts)
        run: dict[str, Any] = {"generator": generators, "progress": _quiet}
        if image is not None:
            run["control"] = [Control(model.controlnet(cycled(image, len(prompts))))]
        return show(sample_semantic(model.prior, scheduler, noise, text, None, settings, **run), prompts)

    # A sheet: one row of each.
    def preview(directory: Path, model: Any, step: int, ema: Any) -> list[Path]:
        guess = one_step(lambda x, r: model(x, r, captions, None, image), clean, config.prediction_type, 0.5)
        rows = [
            ("images", images),
            ("latents", show(clean, captions)),
            ("one step", show(guess, captions)),
        ]
        if image is not None:
            from stable_cascade.controls import view_control

            rows.append(("control", view_control(image)))
        rows.append(("samples", draw(model)))
        if ema is not None:
            with averaged(model, ema):
                rows.append(("EMA samples", draw(model)))
        return [preview_sheet(rows, directory / f"step-{step:08d}.png", captions=prompts)]

    return preview


def first_images(batches: Batches, count: int) -> Batch:
    """The first `count` samples of the training."""
    batch = next(batches(0))
    few: dict[str, Any] = {
        name: value[:count] for name, value in vars(batch).items() if isinstance(value, (list, Tensor))
    }
    return replace(batch, **few)


def cycled(rows: Tensor, count: int) -> Tensor:
    """`count` rows, starting again from the first when they are used up."""
    return rows[torch.arange(count, device=rows.device) % len(rows)]


def latents_shown(
    config: Any, device: torch.device, embed_text: EmbedText, size: tuple[int, int]
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """(semantic latents, captions) -> images: through Stages B and A where the config names Stage B, else rough.

    Args:
        size: height and width of the whole images.
    """
    # Rough images: the previewer alone.
    if not config.stage_b_checkpoint_path:
        previewer = factory.frozen(config, "previewer", device)
        return lambda latents, captions: previewer(latents)
    # Whole images: Stages B and A.
    dtype = getattr(torch, config.dtype)
    decoder = factory.frozen(config, "decoder", device, dtype=dtype)
    vqgan = factory.frozen(config, "vqgan", device)
    settings, scheduler = Settings(config.preview_decoder_steps, 1.1), StableCascadeScheduler()
    height, width = size

    def show(latents: Tensor, captions: Sequence[str]) -> Tensor:
        generators = sample_generators(range(config.seed, config.seed + len(latents)), "preview decoder")
        noise = gaussian_noise(vq_noise_shape(decoder, vqgan, height, width), generators).to(device)
        text = embedded_text(embed_text, captions)
        run = {"generator": generators, "progress": _quiet}
        return decode_vq(vqgan, sample_vq(decoder, scheduler, noise, text, latents, settings, **run), height, width)

    return show


def preview_size(images: Tensor) -> tuple[int, int]:
    """Height and width of the preview images: a third more than the training's, as Stage B draws them.

    Stage C's latents stand for 32 pixels a side in training and for 42.67 at inference (8 and 10.67 in the embedded
    cascade): Stage B was trained to draw from latents of a smaller image.
    """
    return int(images.shape[-2] * 4 / 3), int(images.shape[-1] * 4 / 3)


def decoder_previews(
    config: Any, device: torch.device, batches: Batches, encoder: Any, vqgan: Any, embed_text: EmbedText
) -> Preview:
    """Sheets of Stage B: images, Stage A alone, Stage B sampled from their semantic latents."""
    if not config.num_preview_images:
        return no_previews
    # What every sheet shows again: the first images and their latents.
    batch = first_images(batches, config.num_preview_images)
    shown, captions = factory.shown(batch, device), batch.captions
    text = embedded_text(embed_text, captions)
    height, width = shown.shape[-2:]
    semantic = encoder(shown).float()
    clean = vqgan.encode(shown).latents.float() / vqgan.config.scale_factor
    settings = Settings(config.preview_decoder_steps, 1.1)
    scheduler = StableCascadeScheduler(prediction_type=config.prediction_type)

    # The images rebuilt from their semantic latents, always from the same noise.
    def draw(decoder: Any) -> Tensor:
        generators = sample_generators(range(config.seed, config.seed + len(shown)), "preview sample")
        noise = gaussian_noise(clean.shape[1:], generators).to(device)
        run = {"generator": generators, "progress": _quiet}
        latents = sample_vq(decoder, scheduler, noise, text, semantic, settings, **run)
        return decode_vq(vqgan, latents, height, width)

    def preview(directory: Path, model: Any, step: int, ema: Any) -> list[Path]:
        rows = [("images", shown), ("Stage A", decode_vq(vqgan, clean, height, width)), ("rebuilt", draw(model))]
        if ema is not None:
            with averaged(model, ema):
                rows.append(("EMA rebuilt", draw(model)))
        return [preview_sheet(rows, directory / f"step-{step:08d}.png", captions=captions)]

    return preview


def vqgan_previews(config: Any, images: Tensor) -> Preview:
    """Sheets of Stage A: images, rebuilt as they are and through codes (EMA too); beside each, its figures as JSON.

    The figures: mean `psnr` and `psnr_codes` in dB over all of `images`, `codes` used for them, their `perplexity`.
    """
    count = config.num_preview_images
    if not count:
        return no_previews

    # Rebuild all images, plain and through codes, and measure both.
    def rebuild(vqgan: Any, prefix: str) -> tuple[list[tuple[str, Tensor]], dict[str, float]]:
        plain, coded, used = [], [], torch.zeros(vqgan.config.num_vq_embeddings, device=images.device)
        for part in images.split(count):
            latents = vqgan.encode(part).latents
            found = vqgan.decode(latents, force_not_quantize=False)
            plain.append(vqgan.decode(latents).sample.float().clamp(0, 1))
            coded.append(found.sample.float().clamp(0, 1))
            used += torch.bincount(found.quantized.indices.flatten(), minlength=len(used))
        figures = {
            "psnr": psnr(torch.cat(plain), images).mean().item(),
            "psnr_codes": psnr(torch.cat(coded), images).mean().item(),
            "codes": int((used > 0).sum()),
            "perplexity": perplexity(used),
        }
        rows = [(f"{prefix}rebuilt", plain[0])]
        return rows + ([(f"{prefix}codes", coded[0])] if config.quantize_share else []), figures

    # A sheet of the first ones, and the figures beside it.
    def preview(directory: Path, model: Any, step: int, ema: Any) -> list[Path]:
        rows, figures = rebuild(model.vqgan, "")
        if ema is not None:
            with averaged(model, ema):
                more, figures = rebuild(model.vqgan, "EMA ")
            rows += more
        target = directory / f"step-{step:08d}.png"
        target.with_suffix(".json").write_text(json.dumps({"step": step, **figures}) + "\n")
        return [preview_sheet([("images", images[:count]), *rows], target)]

    return preview
