"""Trains Stage A, the autoencoder: `stable-cascade train vqgan FILE`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from stable_cascade import factory
from stable_cascade.config import VQGANConfig, load_config, run_main
from stable_cascade.models.vqgan import PatchDiscriminator
from stable_cascade.objectives.denoising import chosen
from stable_cascade.objectives.vqgan import AdversarialAutoencoder, latent_scale, prepare_new, vqgan_loss
from stable_cascade.trainers.check import plan_training
from stable_cascade.trainers.previews import vqgan_previews
from stable_cascade.trainers.start import start
from stable_cascade.training.codebook import CodebookRevival, numbered
from stable_cascade.training.ema import averaged
from stable_cascade.training.loop import train

MEASURED = 64
"""Images that the statistics of a new Stage A are measured on, and its `scale_factor`."""


def main(argv: list[str] | None = None) -> None:
    """Reads the config, trains, writes `vqgan/` (the moving average where there is one) in diffusers layout."""
    # Check everything that can be checked before weights are read.
    config = load_config(VQGANConfig, argv)
    plan = plan_training(config, trains="vqgan", needs=["vqgan"])
    if config.check:
        return plan.report()

    # Find the images, start the processes.
    index = factory.samples(config)
    # Before adversarial_start the discriminator takes no part in a step, which several processes have to expect.
    accelerator = start(config, plan.text, index, may_idle=bool(config.adversarial_start))
    device = accelerator.device

    # Load Stage A, or make it, its statistics measured on the first images; add discriminator and codebook revival.
    vqgan, new = factory.network(config, "vqgan").to(device), config.stage_a_checkpoint_path == factory.SCRATCH
    batches = factory.batches(config, index, accelerator, factor=vqgan.stride)
    first = first_images(config, index, vqgan.stride).to(device)
    if new:
        prepare_new(vqgan, first, seed=config.seed)
    factory.checkpoint_gradients(config, vqgan)
    model = AdversarialAutoencoder(vqgan, make_discriminator(config), quantize=config.quantize_share > 0)
    revival = None
    if model.quantize and config.revive_every:
        revival = CodebookRevival(vqgan.vquantizer.embedding, accelerator, every=config.revive_every,
                                  batch_size=config.batch_size, seed=config.seed)  # fmt: skip

    # What a step computes, and what is exported.
    def loss_fn(model, numbered_batch):
        batch, step = numbered_batch.batch, numbered_batch.step
        if revival is not None:
            revival.before(step)
        pixels = factory.shown(batch, device)
        as_codes = chosen(batch.seeds, "quantize", config.quantize_share)
        rebuilt = model(pixels, as_codes, adversarial=step >= config.adversarial_start)
        if revival is not None:
            revival.record(rebuilt.indices, rebuilt.latents, batch.positions)
        return vqgan_loss(
            rebuilt,
            pixels,
            codebook_weight=config.codebook_weight,
            commitment_weight=config.commitment_weight,
            adversarial_weight=config.adversarial_weight,
        )

    def save_fn(directory: Path, model: Any, ema: Any) -> None:
        with averaged(model, ema):
            if new:  # a finetuned Stage A keeps the scale that Stage B was trained with
                model.vqgan.register_to_config(scale_factor=latent_scale(model.vqgan, first))
            model.vqgan.save_pretrained(directory / "vqgan")

    def learning_rate(name: str) -> float:
        own = config.discriminator_lr if name.startswith("discriminator.") else None
        return config.lr if own is None else own

    train(
        config,
        accelerator,
        model=model,
        batches=numbered(batches, config.grad_accum_steps),
        loss_fn=loss_fn,
        save_fn=save_fn,
        preview_fn=vqgan_previews(config, first),
        stateful={} if revival is None else {"codebook": revival},
        learning_rate=learning_rate,
        data=factory.content(index),
    )


def first_images(config: VQGANConfig, index, stride: int) -> torch.Tensor:
    """The first images of the training, the same on every process and for every split of a batch.

    Shapes: -> (up to 64, 3, H, W) in [0, 1].
    """
    alone = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    whole = replace(config, grad_accum_steps=1, num_workers=0)
    batch: Any = next(factory.batches(whole, index, alone, factor=stride)(0))
    return batch.pixels[:MEASURED]


def make_discriminator(config: VQGANConfig) -> PatchDiscriminator | None:
    """A new discriminator from the config's seed, if it has a say."""
    if not config.adversarial_weight:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return PatchDiscriminator(config.discriminator_channels)


if __name__ == "__main__":
    run_main(main)
