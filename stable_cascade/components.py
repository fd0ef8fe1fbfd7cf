"""The parts of a cascade: one row each. Whoever asks what a part is called somewhere reads this table."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Component:
    """One part of a cascade, under the name that is its folder in diffusers' layout and its argument of a pipeline."""

    module: str
    """Where its class is."""
    cls: str
    title: str = ""
    """What people call it in a sentence; empty for parts without weights."""
    file: str = ""
    """The name of its file in the original release, without the ending."""
    key: str = ""
    """The guide's config key that says where its weights are."""
    word: str = ""
    """Another word for it in commands."""
    clip_config: str = ""
    """The class of its config where it is one of CLIP's encoders."""
    single: bool = False
    """Whether Stability's repository has it as a single file only."""

    def load_class(self) -> Any:
        """The class, imported now."""
        return getattr(importlib.import_module(self.module), self.cls)


_OURS, _THEIRS = "stable_cascade.models", "transformers"
COMPONENTS = {
    "prior": Component(
        _OURS, "StableCascadePrior", "prior (Stage C)", "stage_c", "generator_checkpoint_path", "stage_c"
    ),
    "decoder": Component(
        _OURS, "StableCascadeDecoder", "decoder (Stage B)", "stage_b", "generator_checkpoint_path", "stage_b"
    ),
    "vqgan": Component(
        _OURS, "StableCascadeVQGAN", "VQGAN (Stage A)", "stage_a", "stage_a_checkpoint_path", "stage_a"
    ),
    "semantic_encoder": Component(
        _OURS, "StableCascadeSemanticEncoder", "semantic encoder (EfficientNet)", "effnet_encoder",
        "effnet_checkpoint_path", "effnet", single=True,
    ),
    "previewer": Component(
        _OURS, "StableCascadePreviewer", "previewer", "previewer", "previewer_checkpoint_path", single=True
    ),
    "controlnet": Component(_OURS, "StableCascadeControlNet", "ControlNet", "controlnet"),
    "text_encoder": Component(
        _THEIRS, "CLIPTextModelWithProjection", "CLIP text encoder", clip_config="CLIPTextConfig"
    ),
    "image_encoder": Component(
        _THEIRS, "CLIPVisionModelWithProjection", "CLIP image encoder", clip_config="CLIPVisionConfig"
    ),
    "tokenizer": Component(_THEIRS, "CLIPTokenizer"),
    "feature_extractor": Component(_THEIRS, "CLIPImageProcessorPil"),
    "scheduler": Component("stable_cascade.schedulers", "StableCascadeScheduler"),
    "prior_scheduler": Component("stable_cascade.schedulers", "StableCascadeScheduler"),
}  # fmt: skip
WITH_WEIGHTS = {name: part for name, part in COMPONENTS.items() if part.title}
NETWORKS = {name: part for name, part in COMPONENTS.items() if part.file}
"""The networks of the cascade itself."""
CLIP = {name: part for name, part in COMPONENTS.items() if part.clip_config}
OTHER_WORDS = {part.word: name for name, part in COMPONENTS.items() if part.word}
