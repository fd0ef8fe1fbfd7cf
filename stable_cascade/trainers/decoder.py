"""Trains Stage B, image reconstruction: `stable-cascade train decoder FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stable_cascade import factory
from stable_cascade.config import DecoderConfig, load_config, run_main
from stable_cascade.data import Batch
from stable_cascade.objectives.denoising import decoder_loss
from stable_cascade.trainers.check import plan_training
from stable_cascade.trainers.previews import decoder_previews
from stable_cascade.trainers.start import start
from stable_cascade.training.loop import train
from stable_cascade.training.optimizers import averaged


def main(argv: list[str] | None = None) -> None:
    """Reads the config, trains, writes `decoder/` (the moving average where there is one) in diffusers layout."""
    # Check everything that can be checked before weights are read.
    config: Any = load_config(DecoderConfig, argv)
    plan = plan_training(config, trains="decoder", needs=["decoder", "vqgan", "semantic_encoder"])
    if config.check:
        return plan.report()

    # Find the images, start the processes.
    index = factory.samples(config)
    accelerator = start(config, plan.text, index)
    device = accelerator.device

    # Load the frozen networks and the decoder.
    encoder = factory.frozen(config, "semantic_encoder", device)
    vqgan = factory.frozen(config, "vqgan", device)
    embed_text = factory.frozen_text(config, device)
    decoder = factory.network(config, "decoder")
    factory.checkpoint_gradients(config, decoder)
    weighting = factory.loss_weight(config)
    batches = factory.batches(config, index, accelerator, factor=encoder.stride)

    # What a step computes, and what is exported.
    def loss_fn(model: Any, batch: Batch) -> Any:
        # Networks that serve it, then the choices of the config.
        return decoder_loss(
            model,
            factory.shown(batch, device),
            batch.captions,
            batch.seeds,
            batch.step_seed,
            encode_vq=lambda pixels: vqgan.encode(pixels).latents / vqgan.config.scale_factor,
            encode_semantic=encoder,
            embed_text=lambda captions: embed_text(captions)[1],
            weight=weighting.weight,
            stride=encoder.stride,
            prediction_type=config.prediction_type,
            pyramid=config.pyramid_noise,
            shift=config.shift,
            caption_dropout=config.caption_dropout,
            effnet_dropout=config.effnet_dropout,
            effnet_min_scale=config.effnet_min_scale,
            effnet_interpolation=config.effnet_interpolation,
            effnet_noise=config.effnet_noise,
        )

    def save_fn(directory: Path, model: Any, ema: Any) -> None:
        with averaged(model, ema):
            model.save_pretrained(directory / "decoder")

    train(
        config,
        accelerator,
        model=decoder,
        batches=batches,
        loss_fn=loss_fn,
        save_fn=save_fn,
        preview_fn=decoder_previews(config, device, batches, encoder, vqgan, embed_text),
        stateful=weighting.stateful,
        after_step=weighting.after_step,
        data=factory.content(index),
    )


if __name__ == "__main__":
    run_main(main)
