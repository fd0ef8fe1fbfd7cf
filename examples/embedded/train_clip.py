"""Trains the small CLIP of the embedded cascade: a text and an image encoder that agree about emoji."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from stable_cascade import factory
from stable_cascade.config import CLIPConfig, load_config, run_main
from stable_cascade.models.clip import clip_pixels
from stable_cascade.objectives.contrast import TwoTowers, contrastive_loss
from stable_cascade.training.loop import train
from stable_cascade.training.optimizers import averaged
from stable_cascade.training.tracking import make_accelerator

WIDTH, LAYERS = 128, 3


def small_clip(config: CLIPConfig, tokenizer: CLIPTokenizer) -> TwoTowers:
    """Two transformers of width 128 and 3 layers, freshly initialised."""
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
        "hidden_act": "gelu",
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    vision = CLIPVisionConfig(image_size=config.image_size, patch_size=16, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return TwoTowers(CLIPTextModelWithProjection(text), CLIPVisionModelWithProjection(vision), tokenizer)


def main(argv: list[str] | None = None) -> None:
    """Reads the config, trains, writes text_encoder, image_encoder, tokenizer and feature_extractor folders."""
    config = load_config(CLIPConfig, argv)
    tokenizer = CLIPTokenizer.from_pretrained(config.clip_text_model_name)
    size = config.image_size
    model = small_clip(config, tokenizer)
    if config.check:
        print(f"trains two towers of {sum(p.numel() for p in model.parameters()):,} parameters")
        return
    index = factory.samples(config)
    accelerator = make_accelerator(config)
    batches = factory.batches(config, index, accelerator, factor=8)

    def loss_fn(model: nn.Module, batch):
        return contrastive_loss(model, clip_pixels(factory.shown(batch, accelerator.device), size), batch.captions)

    def save_fn(directory: Path, model: TwoTowers, ema) -> None:
        with averaged(model, ema):
            model.text_encoder.save_pretrained(directory / "text_encoder")
            model.image_encoder.save_pretrained(directory / "image_encoder")
        tokenizer.save_pretrained(directory / "tokenizer")
        processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        processor.save_pretrained(directory / "feature_extractor")

    train(
        config, accelerator, model=model, batches=batches, loss_fn=loss_fn, save_fn=save_fn, preview_fn=lambda *_: []
    )


if __name__ == "__main__":
    run_main(main)
