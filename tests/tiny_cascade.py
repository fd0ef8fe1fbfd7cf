"""A whole cascade of real classes at a size that samples in milliseconds, with random weights."""

from __future__ import annotations

import torch

from stable_cascade import (
    StableCascadeDecoder,
    StableCascadePreviewer,
    StableCascadePrior,
    StableCascadeScheduler,
    StableCascadeSemanticEncoder,
    StableCascadeVQGAN,
)

WORDS = ["dog", "snail", "snails", "red", "a", "of", "photo"]
MULTIPLE = 10.67
RESIDUAL, TIMESTEP, ATTENTION = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"

PRIOR = {
    "conditioning_dim": 16, "block_out_channels": [16, 16], "num_attention_heads": [4, 4],
    "down_num_layers_per_block": [1, 1], "up_num_layers_per_block": [1, 1], "clip_text_in_channels": 32,
    "clip_text_pooled_in_channels": 32, "clip_image_in_channels": 24,
}  # fmt: skip
DECODER = {
    "conditioning_dim": 16, "block_out_channels": [8, 16], "num_attention_heads": [0, 4],
    "down_num_layers_per_block": [1, 1], "up_num_layers_per_block": [1, 1], "down_blocks_repeat_mappers": [1, 1],
    "up_blocks_repeat_mappers": [1, 1], "clip_text_pooled_in_channels": 32, "dropout": [0.0, 0.1],
    "block_types_per_layer": [[RESIDUAL, TIMESTEP], [RESIDUAL, TIMESTEP, ATTENTION]],
}  # fmt: skip
VQGAN = {"bottleneck_blocks": 1, "embed_dim": 16, "num_vq_embeddings": 16, "scale_factor": 0.43}
ENCODER = {
    "stem_width": 8, "block_types": ["fused", "fused", "mbconv"], "widths": [8, 8, 16], "depths": [1, 1, 1],
    "strides": [1, 2, 2], "expansions": [1, 2, 2], "head_width": 16, "stochastic_depth": 0.0,
}  # fmt: skip


def tiny_tokenizer():
    """CLIP's own tokenizer class over a vocabulary of letters and a few words."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {piece: i for i, piece in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            pieces = ["".join(pair), *pieces[2:]]
            vocabulary.setdefault(pieces[0], len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=12)


def seeded(build, seed=0):
    """`build()` with random weights that depend on the seed alone, none of them zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build().eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return module


def tiny_text_encoder(**changes):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "projection_dim": 32, "max_position_embeddings": 12, "vocab_size": len(tokenizer),
             "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    return seeded(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**sizes | changes)))


def tiny_vision_encoder():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
             "projection_dim": 24, "image_size": 32, "patch_size": 16}  # fmt: skip
    return seeded(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)))


def tiny_prior(**changes):
    return seeded(lambda: StableCascadePrior(**PRIOR | changes))


def tiny_decoder(**changes):
    return seeded(lambda: StableCascadeDecoder(**DECODER | changes))


def tiny_parts() -> dict:
    """Every component of `StableCascadePipeline`."""
    return {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_text_encoder(),
        "prior": tiny_prior(),
        "prior_scheduler": StableCascadeScheduler(shift=2.0),
        "decoder": tiny_decoder(),
        "scheduler": StableCascadeScheduler(),
        "vqgan": seeded(lambda: StableCascadeVQGAN(**VQGAN)),
        "image_encoder": tiny_vision_encoder(),
        "semantic_encoder": seeded(lambda: StableCascadeSemanticEncoder(**ENCODER)),
        "previewer": seeded(lambda: StableCascadePreviewer(hidden_channels=8)),
    }
