"""Stability's two repositories at tiny size: their folders, class names and file names, and what lies beside them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from stable_cascade.models import PRESETS, StableCascadePreviewer, StableCascadeSemanticEncoder
from tests.tiny_cascade import MULTIPLE, seeded, tiny_decoder, tiny_parts, tiny_prior


def released_folders(target: Path) -> tuple[Path, Path, dict[str, Any]]:
    """`stable-cascade` and `stable-cascade-prior` in `target`, and the parts that are in them.

    All weights are there plain and as bf16, but those of the VQGAN and CLIP's image encoder, which are plain alone.
    The lite networks have two more blocks, so that they can be told apart.
    """
    parts = tiny_parts()
    # Single files without a config: of sizes that their shapes tell.
    for name, preset, cls in (
        ("semantic_encoder", "semantic_encoder", StableCascadeSemanticEncoder),
        ("previewer", "previewer", StableCascadePreviewer),
    ):
        parts[name] = seeded(lambda cls=cls, preset=preset: cls(**PRESETS[preset]["embedded"]))
    parts["prior_lite"] = tiny_prior(down_num_layers_per_block=[1, 2])
    parts["decoder_lite"] = tiny_decoder(down_num_layers_per_block=[2, 1])
    first, second = target / "stable-cascade", target / "stable-cascade-prior"
    shared = ("text_encoder", "tokenizer")
    _write(first, ("decoder", "decoder_lite", "vqgan", *shared), parts, "StableCascadeDecoderPipeline")
    _write(second, ("prior", "prior_lite", "image_encoder", *shared), parts, "StableCascadePriorPipeline")
    save_file(parts["semantic_encoder"].to_original(), first / "effnet_encoder.safetensors")
    save_file(parts["previewer"].to_original(), first / "previewer.safetensors")
    (first / "controlnet").mkdir()
    (first / "controlnet" / "canny.safetensors").write_bytes(b"the original's file, no folder of ours")
    return first, second, parts


def _write(folder: Path, names: tuple[str, ...], parts: dict[str, Any], pipeline: str) -> None:
    from diffusers import DDPMWuerstchenScheduler

    classes = {"prior": "StableCascadeUNet", "decoder": "StableCascadeUNet", "vqgan": "PaellaVQModel"}
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.27.0.dev0"}
    for name in names:
        parts[name].save_pretrained(folder / name)
        if name not in ("tokenizer", "vqgan", "image_encoder"):
            copy.deepcopy(parts[name]).bfloat16().save_pretrained(folder / name, variant="bf16")
        known = classes.get(name.removesuffix("_lite"))
        if known:
            config = json.loads((folder / name / "config.json").read_text())
            (folder / name / "config.json").write_text(json.dumps(config | {"_class_name": known}))
        if not name.endswith("_lite"):
            index[name] = ["diffusers", known or type(parts[name]).__name__]
    DDPMWuerstchenScheduler().save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "DDPMWuerstchenScheduler"]
    index["latent_dim_scale" if "decoder" in names else "resolution_multiple"] = (
        MULTIPLE / 4 if "decoder" in names else MULTIPLE
    )
    (folder / "model_index.json").write_text(json.dumps(index))


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def without(folder: Path, *names: str) -> Path:
    """A copy of a folder that lacks some of its folders or files."""
    target = folder.with_name(f"{folder.name}-without-{'-'.join(names)}")
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*names))
    return target
