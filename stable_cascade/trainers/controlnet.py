"""Trains a ControlNet on Stage C: `stable-cascade train controlnet FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stable_cascade import factory
from stable_cascade.config import ControlNetConfig, load_config, run_main
from stable_cascade.objectives.denoising import ConditionedPrior
from stable_cascade.trainers.check import plan_training
from stable_cascade.trainers.previews import prior_previews
from stable_cascade.trainers.start import start
from stable_cascade.training.loop import train
from stable_cascade.training.optimizers import averaged


def main(argv: list[str] | None = None) -> None:
    """Reads the config, trains, writes `controlnet/` in diffusers layout and `controlnet.safetensors`."""
    # Check everything that can be checked before weights are read.
    config = load_config(ControlNetConfig, argv)
    needs = ["prior", "semantic_encoder", *factory.preview_networks(config)]
    plan = plan_training(config, trains="ControlNet of the prior", needs=needs)
    if config.check:
        return plan.report()

    # Find the images, start the processes.
    index = factory.samples(config)
    accelerator = start(config, plan.text, index)
    device, dtype = accelerator.device, getattr(torch, config.dtype)

    # Load the frozen networks; make the ControlNet and the filter of its control images.
    control_filter = factory.control_filter(config, device)
    inputs = factory.prior_inputs(config, accelerator, index)
    prior = factory.network(config, "prior", dtype=dtype).requires_grad_(False).to(device)
    control = factory.control_images(control_filter, device)
    controlnet = factory.controlnet(config, prior, control_filter).to(device)
    factory.checkpoint_gradients(config, prior, controlnet)
    model = ConditionedPrior(prior, inputs.text, controlnet)
    weighting = factory.loss_weight(config)

    # What is exported.
    def save_fn(directory: Path, model: Any, ema: Any) -> None:
        with averaged(model, ema):
            factory.export_controlnet(config, directory, model.controlnet)

    train(
        config,
        accelerator,
        model=model,
        batches=inputs.batches,
        loss_fn=factory.prior_loss_fn(config, inputs, weighting.weight, control=control),
        save_fn=save_fn,
        preview_fn=prior_previews(config, device, inputs, control=control),
        stateful=weighting.stateful,
        after_step=weighting.after_step,
        data=factory.content(index),
    )


if __name__ == "__main__":
    run_main(main)
