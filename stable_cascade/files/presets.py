"""Constructor arguments of every released network, and of the embedded cascade's.

`PRESETS[component][version]` is the whole config: `StableCascadePrior(**PRESETS["prior"]["3.6B"])`.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

from stable_cascade.embedded import embedded_path

from .json_files import read_json

RESIDUAL, TIMESTEP, ATTENTION = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"


def _prior(width: int, heads: int, layers: list[int], **changed: Any) -> dict[str, Any]:
    # Both levels are alike but for their depth.
    return {
        "in_channels": 16,
        "out_channels": 16,
        "timestep_ratio_embedding_dim": 64,
        "patch_size": 1,
        "conditioning_dim": width,
        "block_out_channels": [width, width],
        "num_attention_heads": [heads, heads],
        "down_num_layers_per_block": layers,
        "up_num_layers_per_block": layers[::-1],
        "down_blocks_repeat_mappers": [1, 1],
        "up_blocks_repeat_mappers": [1, 1],
        "block_types_per_layer": [[RESIDUAL, TIMESTEP, ATTENTION], [RESIDUAL, TIMESTEP, ATTENTION]],
        "clip_text_in_channels": 1280,
        "clip_text_pooled_in_channels": 1280,
        "clip_image_in_channels": 768,
        "clip_seq": 4,
        "kernel_size": 3,
        "dropout": [0.1, 0.1],
        "self_attn": True,
        "timestep_conditioning_type": ["sca", "crp"],
        "switch_level": [False],
    } | changed


def _decoder(widths: list[int], heads: list[int], layers: list[int], **changed: Any) -> dict[str, Any]:
    plain, attended = [RESIDUAL, TIMESTEP], [RESIDUAL, TIMESTEP, ATTENTION]
    # Attention on the deeper levels only.
    return {
        "in_channels": 4,
        "out_channels": 4,
        "timestep_ratio_embedding_dim": 64,
        "patch_size": 2,
        "conditioning_dim": 1280,
        "block_out_channels": widths,
        "num_attention_heads": heads,
        "down_num_layers_per_block": layers,
        "up_num_layers_per_block": layers[::-1],
        "down_blocks_repeat_mappers": [1, 1, 1, 1],
        "up_blocks_repeat_mappers": [2, 2, 2, 2],
        "block_types_per_layer": [plain, plain, attended, attended],
        "clip_text_pooled_in_channels": 1280,
        "clip_seq": 4,
        "effnet_in_channels": 16,
        "pixel_mapper_in_channels": 3,
        "kernel_size": 3,
        "dropout": [0.0, 0.0, 0.1, 0.1],
        "self_attn": True,
        "timestep_conditioning_type": ["sca"],
        "switch_level": None,
    } | changed


EMBEDDED_FEATURES: dict[str, Any] = {
    "stem_width": 24,
    "stem_stride": 2,
    "block_types": ["fused", "fused", "fused", "mbconv"],
    "widths": [24, 48, 96, 128],
    "depths": [1, 2, 2, 2],
    "strides": [1, 2, 2, 1],
    "expansions": [1, 4, 4, 4],
    "head_width": 192,
    "stochastic_depth": 0.0,
}
RELEASED_FEATURES: dict[str, Any] = {
    "stem_width": 24,
    "stem_stride": 2,
    "block_types": ["fused", "fused", "fused", "mbconv", "mbconv", "mbconv"],
    "widths": [24, 48, 64, 128, 160, 256],
    "depths": [2, 4, 4, 6, 9, 15],
    "strides": [1, 2, 2, 2, 1, 2],
    "expansions": [1, 4, 4, 4, 6, 6],
    "head_width": 1280,
    "stochastic_depth": 0.2,
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def _vqgan(**changed: Any) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "up_down_scale_factor": 2,
        "levels": 2,
        "bottleneck_blocks": 12,
        "embed_dim": 384,
        "latent_channels": 4,
        "num_vq_embeddings": 8192,
        "scale_factor": 0.43,
    } | changed


def _controlnet(channels: int, bottleneck: str, blocks: list[int], **changed: Any) -> dict[str, Any]:
    return {
        "in_channels": channels,
        "projection_channels": 2048,
        "blocks": blocks,
        "bottleneck": bottleneck,
        "backbone_config": None,
    } | changed


CHOSEN_BLOCKS = [0, 4, 8, 12, 51, 55, 59, 63]  # of the 64 residual blocks of the 3.6B prior

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "prior": {
        "3.6B": _prior(2048, 32, [8, 24]),
        "1B": _prior(1536, 24, [4, 12]),
        "embedded": _prior(
            128,
            4,
            [2, 4],
            clip_text_in_channels=128,
            clip_text_pooled_in_channels=128,
            clip_image_in_channels=128,
            dropout=[0.0, 0.0],
        ),
    },
    "decoder": {
        "3B": _decoder([320, 640, 1280, 1280], [0, 0, 20, 20], [2, 6, 28, 6], up_blocks_repeat_mappers=[3, 3, 2, 2]),
        "700M": _decoder([320, 576, 1152, 1152], [0, 9, 18, 18], [2, 4, 14, 4]),
        "embedded": _decoder(
            [96, 160],
            [0, 4],
            [2, 4],
            conditioning_dim=128,
            down_blocks_repeat_mappers=[1, 1],
            up_blocks_repeat_mappers=[1, 1],
            block_types_per_layer=[[RESIDUAL, TIMESTEP], [RESIDUAL, TIMESTEP, ATTENTION]],
            clip_text_pooled_in_channels=128,
            dropout=[0.0, 0.0],
        ),
    },
    "vqgan": {
        "released": _vqgan(),
        "embedded": _vqgan(embed_dim=96, bottleneck_blocks=4, num_vq_embeddings=1024, scale_factor=1.0),
    },
    "semantic_encoder": {
        "released": {"in_channels": 3, "latent_channels": 16, **RELEASED_FEATURES, **IMAGENET},
        "embedded": {"in_channels": 3, "latent_channels": 16, **EMBEDDED_FEATURES, **IMAGENET},
    },
    "previewer": {
        "released": {"in_channels": 16, "hidden_channels": 512, "out_channels": 3},
        "embedded": {"in_channels": 16, "hidden_channels": 128, "out_channels": 3},
    },
    "controlnet": {
        "canny": _controlnet(1, "effnet", CHOSEN_BLOCKS),
        "inpainting": _controlnet(4, "effnet", CHOSEN_BLOCKS),
        "super_resolution": _controlnet(16, "large", CHOSEN_BLOCKS),
        "identity": _controlnet(512, "simple", list(range(64))),
        "embedded": _controlnet(
            1, "effnet", [0, 2, 6, 10], projection_channels=128, backbone_config=EMBEDDED_FEATURES
        ),
    },
}


_CLIP_TEXT = {
    "vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407,
    "pad_token_id": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
CLIP_CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "text_encoder": {
        "ViT-bigG/14": _CLIP_TEXT | {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
            "projection_dim": 1280, "hidden_act": "gelu",
        },
        "ViT-L/14": _CLIP_TEXT | {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "projection_dim": 768, "hidden_act": "quick_gelu",
        },
    },
    "image_encoder": {
        "ViT-L/14": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "projection_dim": 768, "hidden_act": "quick_gelu", "image_size": 224, "patch_size": 14,
            "layer_norm_eps": 1e-5,
        },
    },
}  # fmt: skip
"""What the shapes of a released encoder do not say. The cascade was trained with the first of each."""


def clip_preset(component: str, version: str) -> dict[str, Any]:
    """Transformers' config of a CLIP encoder, where its shapes do not say it all; a copy.

    `version` is one of `CLIP_CONFIGS[component]`, or "embedded".
    """
    if version == "embedded":
        return read_json(embedded_path() / component / "config.json")
    return dict(CLIP_CONFIGS[component][version])


def preset(component: str, version: str) -> dict[str, Any]:
    """A copy of one preset, free to change.

    Raises:
        ValueError: there is no such component or version.
    """
    if component not in PRESETS:
        raise ValueError(f"component {component!r} has no presets{_nearest(component, PRESETS)}")
    if version not in PRESETS[component]:
        raise ValueError(f"{component} has no preset {version!r}{_nearest(version, PRESETS[component])}")
    return copy.deepcopy(PRESETS[component][version])


def _nearest(name: str, allowed: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f"; allowed: {', '.join(allowed)}" + (f"; nearest: {close[0]}" if close else "")
