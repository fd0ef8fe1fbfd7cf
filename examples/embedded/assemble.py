"""Puts trained parts together: the folder that Stages B and C train on, and at the end the embedded cascade.

python examples/embedded/assemble.py parts                 # -> outputs/embedded/cascade, what decoder and prior need
python examples/embedded/assemble.py cascade [--out DIR]   # -> stable_cascade/embedded, the whole, in float16
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from stable_cascade import models
from stable_cascade.pipelines import StableCascadePipeline
from stable_cascade.schedulers import StableCascadeScheduler

PARTS = {
    "clip": ("tokenizer", "text_encoder", "image_encoder", "feature_extractor"),
    "vqgan": ("vqgan",),
    "image_encoder": ("semantic_encoder", "previewer"),
    "decoder_anneal": ("decoder",),
    "prior_anneal": ("prior",),
}
CLASSES = {
    "prior": models.StableCascadePrior,
    "decoder": models.StableCascadeDecoder,
    "vqgan": models.StableCascadeVQGAN,
    "semantic_encoder": models.StableCascadeSemanticEncoder,
    "previewer": models.StableCascadePreviewer,
    "text_encoder": CLIPTextModelWithProjection,
    "image_encoder": CLIPVisionModelWithProjection,
}
PIXELS_PER_SEMANTIC_LATENT = 64 / 6


def gather(runs: Path, out: Path) -> None:
    """Copies the final export of every run that exists into one folder."""
    for run, folders in PARTS.items():
        for folder in folders:
            exported = runs / run / "final" / folder
            if exported.exists():
                # Removed first: a running training may have the old file mapped, and writing into it would kill it.
                shutil.rmtree(out / folder, ignore_errors=True)
                shutil.copytree(exported, out / folder)
                print(f"{folder:<18} from {exported}")


def assemble(parts: Path, out: Path) -> None:
    """Writes the whole cascade as one pipeline folder in float16."""
    networks = {name: cls.from_pretrained(parts / name, torch_dtype=torch.float16) for name, cls in CLASSES.items()}
    pipeline = StableCascadePipeline(
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        feature_extractor=CLIPImageProcessor.from_pretrained(parts / "feature_extractor"),
        scheduler=StableCascadeScheduler(),
        prior_scheduler=StableCascadeScheduler(shift=2.0),
        resolution_multiple=PIXELS_PER_SEMANTIC_LATENT,
        **networks,
    )
    pipeline.save_pretrained(out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


def main() -> None:
    """Runs one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["parts", "cascade"])
    parser.add_argument("--runs", type=Path, default=Path("outputs/embedded/runs"))
    parser.add_argument("--parts", type=Path, default=Path("outputs/embedded/cascade"))
    parser.add_argument("--out", type=Path, default=Path("stable_cascade/embedded"))
    arguments = parser.parse_args()
    gather(arguments.runs, arguments.parts)
    if arguments.step == "cascade":
        assemble(arguments.parts, arguments.out)


if __name__ == "__main__":
    main()
