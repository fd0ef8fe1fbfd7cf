"""Trains a LoRA, and tokens if asked, on Stage C: `accelerate launch examples/train_lora.py --config FILE`."""

from __future__ import annotations

from pathlib import Path

from stable_cascade import factory
from stable_cascade.adapters import save_lora
from stable_cascade.config import LoraConfig, load_config, run_main
from stable_cascade.models.checkpointing import chosen_checkpoint
from stable_cascade.objectives.prior import ConditionedPrior
from stable_cascade.plan import plan_training
from stable_cascade.previews import prior_previews
from stable_cascade.training.ema import averaged
from stable_cascade.training.loop import train


def main(argv: list[str] | None = None) -> None:
    """Reads the config, trains, writes `pytorch_lora_weights.safetensors` and `learned_embeds.safetensors`."""
    config = load_config(LoraConfig, argv)
    plan = plan_training(
        config, trains="LoRA of the prior", needs=["prior", "semantic_encoder", *factory.preview_networks(config)]
    )
    if config.check:
        print(plan.text, flush=True)
        return plan.refuse_missing()
    index = factory.samples(config)
    accelerator = factory.launch(config, plan.text, index)
    device = accelerator.device

    text = factory.trainable_text(config)
    inputs = factory.prior_inputs(config, accelerator, index, text and text.to(device))
    prior = factory.frozen_base(config, device)
    factory.add_config_lora(config, prior)
    if config.gradient_checkpointing:
        prior.enable_gradient_checkpointing(chosen_checkpoint(config.gradient_checkpointing))
    model = ConditionedPrior(prior, inputs.text)
    weighting = factory.loss_weight(config)

    def save_fn(directory: Path, model: ConditionedPrior, ema) -> None:
        with averaged(model, ema):
            save_lora(directory, prior=model.prior, text_encoder=getattr(model.text, "text_encoder", None))

    train(
        config,
        accelerator,
        model=model,
        batches=inputs.batches,
        loss_fn=factory.prior_loss_fn(config, inputs, weighting.weight),
        save_fn=save_fn,
        preview_fn=prior_previews(config, device, inputs),
        stateful=weighting.stateful,
        after_step=weighting.after_step,
        learning_rate=factory.learning_rate(config),
        data=factory.content(index),
    )


if __name__ == "__main__":
    run_main(main)
