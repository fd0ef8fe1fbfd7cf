"""Preview sheets of the trainers: what the network in training draws, beside what it should draw.

Previews draw from generators of their own, so that looking never changes what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stable_cascade import build
from stable_cascade.data import Batch
from stable_cascade.diffusion.noise import gaussian_noise, sample_generators
from stable_cascade.diffusion.process import add_noise, to_clean
from stable_cascade.diffusion.schedule import cosine_log_snr, cosine_t
from stable_cascade.models.text import encode_prompts
from stable_cascade.pipelines.sampling import Settings, Text, decode_vq, sample_semantic, sample_vq
from stable_cascade.schedulers import StableCascadeScheduler
from stable_cascade.training.ema import averaged
from stable_cascade.training.sheets import preview_sheet

Batches = Callable[[int], Iterator[Batch]]
Preview = Callable[[Path, Any, int, Any], list[Path]]
_quiet = partial(tqdm, disable=True)


def embedded_text(text_encoder: Any, tokenizer: Any, prompts: Sequence[str], device: torch.device) -> Text:
    """The prompts and as many empty ones, ready for guidance."""
    count = len(prompts)
    hidden, pooled, _ = encode_prompts(text_encoder, tokenizer, [*prompts, *[""] * count], device)
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


def prior_previews(config: Any, device: torch.device, batches: Batches, encoder: Any) -> Preview:
    """Sheets of Stage C through the previewer: pictures, their latents, one step of denoising, samples (EMA too)."""
    if not config.num_preview_images:
        return no_previews
    previewer = build.frozen(config, "previewer", device)
    batch, count = next(batches(0)), config.num_preview_images
    prompts = list(config.validation_prompts or batch.captions[:count])
    shown, captions = batch.pixels[:count].to(device), batch.captions[:count]
    clean = encoder(shown).float()
    settings = Settings(config.preview_steps, config.preview_guidance_scale)
    scheduler = StableCascadeScheduler(shift=2.0, prediction_type=config.prediction_type)

    def draw(model: Any) -> Tensor:
        generators = sample_generators(range(config.seed, config.seed + len(prompts)), "preview sample")
        noise = gaussian_noise(clean.shape[1:], generators).to(device)
        text = embedded_text(model.text_encoder, model.tokenizer, prompts, device)
        latents = sample_semantic(
            model.prior, scheduler, noise, text, None, settings, generator=generators, progress=_quiet
        )
        return previewer(latents)

    def preview(directory: Path, model: Any, step: int, ema: Any) -> list[Path]:
        guess = one_step(lambda x, r: model(x, r, captions, None), clean, config.prediction_type, 0.5)
        rows = [("pictures", shown), ("latents", previewer(clean)), ("one step", previewer(guess))]
        rows.append(("samples", draw(model)))
        if ema is not None:
            with averaged(model, ema):
                rows.append(("EMA samples", draw(model)))
        return [preview_sheet(rows, directory / f"step-{step:08d}.png", captions=prompts)]

    return preview


def decoder_previews(
    config: Any, batches: Batches, encoder: Any, vqgan: Any, tokenizer: Any, text_encoder: Any
) -> Preview:
    """Sheets of Stage B: pictures, Stage A alone, Stage B sampled from their semantic latents."""
    device = text_encoder.device
    if not config.num_preview_images:
        return no_previews
    batch, count = next(batches(0)), config.num_preview_images
    shown, captions = batch.pixels[:count].to(device), batch.captions[:count]
    text = embedded_text(text_encoder, tokenizer, captions, device)
    height, width = shown.shape[-2:]
    semantic = encoder(shown).float()
    clean = vqgan.encode(shown).latents.float() / vqgan.config.scale_factor
    settings = Settings(config.preview_decoder_steps, 1.1)
    scheduler = StableCascadeScheduler(prediction_type=config.prediction_type)

    def draw(decoder: Any) -> Tensor:
        generators = sample_generators(range(config.seed, config.seed + len(shown)), "preview sample")
        noise = gaussian_noise(clean.shape[1:], generators).to(device)
        run = {"generator": generators, "progress": _quiet}
        latents = sample_vq(decoder, scheduler, noise, text, semantic, settings, **run)
        return decode_vq(vqgan, latents, height, width)

    def preview(directory: Path, model: Any, step: int, ema: Any) -> list[Path]:
        rows = [("pictures", shown), ("Stage A", decode_vq(vqgan, clean, height, width)), ("rebuilt", draw(model))]
        if ema is not None:
            with averaged(model, ema):
                rows.append(("EMA rebuilt", draw(model)))
        return [preview_sheet(rows, directory / f"step-{step:08d}.png", captions=captions)]

    return preview
