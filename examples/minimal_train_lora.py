"""LoRA and token training of Stage C in one file, to be read from top to bottom.

    python examples/minimal_train_lora.py --config examples/configs/lora_embedded.yaml

It takes train_lora.py's config and ends with the same files, bit for bit; a test keeps the two equal. What it leaves
out is what a long run needs: checkpoints and resuming, previews, trackers, several processes, the moving average.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from stable_cascade import StableCascadePrior, StableCascadeSemanticEncoder
from stable_cascade.adapters import add_learned_tokens, add_lora, save_lora
from stable_cascade.config import LoraConfig, load_config, run_main
from stable_cascade.data import Plan, index_samples, training_batches
from stable_cascade.diffusion.noise import gaussian_noise, sample_generators, training_times
from stable_cascade.diffusion.process import add_noise
from stable_cascade.diffusion.schedule import cosine_log_snr, cosine_t
from stable_cascade.diffusion.weighting import p2_weight
from stable_cascade.embedded import embedded_path
from stable_cascade.models.checkpointing import chosen_checkpoint
from stable_cascade.models.clip import clip_pixels, encode_prompts
from stable_cascade.training import seeded
from stable_cascade.training.optimizers import learning_rate_share

LEFT_OUT = (
    "lora_checkpoint_path", "module_excludes", "rank_pattern", "token_lr", "train_text_encoder", "regularization_path",
    "masked_loss", "cache", "allow_missing_captions", "crops_per_image", "compile", "float8",
)  # fmt: skip
"""Options that change what is trained, or how, and that this file does without."""


def happens(seeds: torch.Tensor, what: str, share: float) -> torch.Tensor:
    """Which samples something of probability `share` happens to. Every draw is a function of (sample's seed, name)."""
    return torch.stack([torch.rand((), generator=each) for each in sample_generators(seeds, what)]) < share


def main(argv: list[str] | None = None) -> None:
    """Trains, then writes `pytorch_lora_weights.safetensors` and `learned_embeds.safetensors`."""
    config = load_config(LoraConfig, argv)
    if config.prediction_type != "epsilon" or config.loss_weight != "p2" or config.ema_beta is not None:
        raise ValueError("minimal_train_lora.py knows epsilon, p2 and no moving average; use train_lora.py for others")
    unknown = [key for key in LEFT_OUT if getattr(config, key)] + ["quantization"] * (config.quantization != "none")
    if unknown:
        raise ValueError(f"{unknown[0]} is not known to minimal_train_lora.py; use train_lora.py")
    torch.set_flush_denormal(True)  # denormal numbers cost tens of times the time of ordinary ones

    # The images: an index of every sample, then batches of one size each. `step` counts optimizer updates, and one
    # update sees `batch_size` images, handed over in `grad_accum_steps` parts.
    index = index_samples(
        config.webdataset_path, dataset_name=config.dataset_name, image_column=config.image_column,
        caption_column=config.caption_column, streaming=config.streaming, dataset_filters=config.dataset_filters,
        captions_getter=config.captions_getter, max_broken_share=config.max_broken_share, cache_dir=config.cache_dir,
    )  # fmt: skip

    # The networks. Only two are part of the step: the image encoder makes the latents that Stage C learns to draw,
    # the text encoder makes what it draws them from. Both stay as they are.
    name = config.pretrained_model_name_or_path
    folder = Path(embedded_path() if name == "embedded" else name or "")
    encoder = StableCascadeSemanticEncoder.from_pretrained(folder / "semantic_encoder").requires_grad_(False).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    dtype = getattr(torch, config.dtype)
    text_encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=dtype)
    text_encoder.requires_grad_(False)
    vision = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").requires_grad_(False).eval()
    prior = StableCascadePrior.from_pretrained(folder / "prior", torch_dtype=dtype)

    # What trains: pairs of thin matrices beside the chosen layers, and the rows of a few words in the text encoder.
    tokens = add_learned_tokens(tokenizer, text_encoder, config.train_tokens)
    add_lora(
        prior, module_filters=config.module_filters, rank=config.rank, lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout, use_dora=config.use_dora, seed=config.seed,
    )  # fmt: skip
    if config.gradient_checkpointing:
        prior.enable_gradient_checkpointing(chosen_checkpoint(config.gradient_checkpointing))
    prior.train()
    text_encoder.train()
    parameters = [value for part in (prior, text_encoder) for value in part.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.adam_betas, eps=config.adam_epsilon, weight_decay=config.weight_decay,
        fused=True,
    )  # fmt: skip
    plan = Plan(
        image_size=config.image_size, batch_size=config.batch_size, grad_accum_steps=config.grad_accum_steps,
        seed=config.seed, multi_aspect_ratio=config.multi_aspect_ratio, bucket_factor=encoder.stride,
        random_bucket_share=config.bucketeer_random_ratio, crop=config.crop,
    )  # fmt: skip
    stream = training_batches(index, plan, num_workers=config.num_workers)

    for step in tqdm(range(config.updates)):
        share = learning_rate_share(
            config.lr_scheduler, step, warmup=config.warmup_updates, updates=config.updates,
            final=config.lr_final_share,
        )  # fmt: skip
        optimizer.param_groups[0]["lr"] = config.lr * share
        for part in range(config.grad_accum_steps):
            batch = next(stream)
            # Clean latents, and CLIP's view of the image itself for a few samples, so that the network stays able
            # to vary a given image.
            with torch.no_grad():
                clean = encoder(batch.pixels).float()
                image = torch.zeros(len(clean), 1, vision.config.projection_dim)
                shown = happens(batch.seeds, "image embedding", config.image_embedding_share)
                if shown.any():
                    small = clip_pixels(batch.pixels[shown], vision.config.image_size)
                    image[shown] = vision(pixel_values=small).image_embeds[:, None]
            # A time and noise for every sample; noised = a * clean + b * noise, with a and b from the time's log SNR.
            generators = sample_generators(batch.seeds, "noise")
            noise = gaussian_noise(clean.shape[1:], generators, offset=config.offset_noise)
            log_snr = cosine_log_snr(training_times(sample_generators(batch.seeds, "time")), shift=config.shift)
            noised = add_noise(clean, noise, log_snr)
            # Some captions are left out: guidance subtracts what the network draws without one.
            silent = happens(batch.seeds, "caption", config.caption_dropout)
            captions = ["" if drop else caption for caption, drop in zip(batch.captions, silent, strict=True)]
            with seeded(clean.device, config.seed, step, part, 0):  # dropout has no generator of its own
                text, pooled, _ = encode_prompts(text_encoder, tokenizer, captions)
                predicted = prior(noised, cosine_t(log_snr), pooled, text, image)
            error = (predicted.sample.float() - noise).square().flatten(1).mean(1)
            loss = (error * p2_weight(log_snr)).mean()
            (loss / config.grad_accum_steps).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    final = save_lora(Path(config.checkpoint_path) / config.experiment_id / "final", prior=prior, tokens=tokens)
    print(f"{final}: the last loss was {loss.item():.4f}")


if __name__ == "__main__":
    run_main(main)
