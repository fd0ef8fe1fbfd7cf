"""The folder that the documentation's blocks run in, and a stand-in for what they would download.

`make_folder(target)` writes what the pages take for granted: `photo.png`, `mask.png`, `edges.png` (64 x 64),
`images/` with captions, `shards/`, `my_lora/`, `my_lora.yaml`, `my_controlnet/`, and under `outputs/` what the
examples' trainings leave behind. `make_hub(target)` fills a download cache with small networks in the layout of the
released repositories.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from tests.docs_blocks import ROOT
from tests.tiny_cascade import RESIDUAL, TIMESTEP, VQGAN, seeded, tiny_decoder, tiny_prior

PROMPTS = ("red apple, flat style", "panda, flat style", "sun, flat style", "unicorn, flat style")
HUB = "stabilityai/stable-cascade"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_folder(target: Path) -> None:
    """Writes the files that blocks may use; `copy_folder` gives each page its own."""
    from stable_cascade import StableCascadePipeline
    from stable_cascade.data import prepare_shards
    from stable_cascade.embedded import embedded_path

    pipeline = StableCascadePipeline.from_pretrained(embedded_path())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(list(PROMPTS), generator=[torch.Generator().manual_seed(seed) for seed in range(4)]).images
    (target / "images").mkdir(parents=True)
    for number, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        for size in ((64, 64), (96, 72)):
            name = target / "images" / f"{number}-{size[0]}"
            image.resize(size).save(name.with_suffix(".png"))
            name.with_suffix(".txt").write_text(prompt)
    prepare_shards(target / "images", target / "shards")
    images[0].save(target / "photo.png")
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((16, 24, 47, 63), fill=255)
    mask.save(target / "mask.png")
    _write_controlnet(target)
    _write_lora(target, pipeline)
    _write_log(target, images)


def copy_folder(source: Path, target: Path) -> None:
    """A page's own copy, with the repository's examples and launch configs beside it."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    for name in ("examples", "accelerate_configs", "constraints.txt"):
        (target / name).symlink_to(ROOT / name)


def _write_lora(target: Path, pipeline: Any) -> None:
    """A LoRA for the embedded prior with random factors, as a training exports it, and a config that trains one."""
    from stable_cascade.adapters import add_lora, save_lora

    add_lora(pipeline.prior, module_filters=[".attn"], rank=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in pipeline.prior.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    save_lora(target / "my_lora", prior=pipeline.prior)
    keys = (ROOT / "examples" / "configs" / "lora_embedded.yaml").read_text(encoding="utf-8")
    keys = keys.replace("examples/data/ink_emoji.tar", "shards").replace("lora_embedded", "my_lora")
    (target / "my_lora.yaml").write_text(keys, encoding="utf-8")
    shutil.copytree(target / "my_lora", target / "outputs" / "checkpoints" / "lora_embedded" / "final")


def _write_controlnet(target: Path) -> None:
    """A canny ControlNet for the embedded prior with random projections, exported as a training does."""
    import numpy

    from stable_cascade import factory
    from stable_cascade.config import ControlNetConfig, load_config
    from stable_cascade.controls import make_filter

    config = load_config(ControlNetConfig, [str(ROOT / "examples" / "configs" / "controlnet_embedded.yaml")])
    prior = factory.network_on_meta(config, "prior")
    controlnet = factory.controlnet(config, prior, factory.control_filter(config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for projection in controlnet.projections:
            for parameter in projection.parameters():
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    final = target / "outputs" / "checkpoints" / "controlnet_embedded" / "final"
    factory.export_controlnet(config, final, controlnet)
    shutil.copytree(final, target / "my_controlnet")
    photo = torch.from_numpy(numpy.array(Image.open(target / "photo.png").convert("RGB")))
    edges = make_filter("CannyFilter", {"resize": 64})(photo.permute(2, 0, 1)[None] / 255)
    Image.fromarray((edges[0, 0] * 255).byte().numpy()).save(target / "edges.png")


def _write_log(target: Path, images: list[Image.Image]) -> None:
    """A preview sheet and one line of the log, as the example's training leaves them."""
    import numpy

    from stable_cascade.training.sheets import preview_sheet

    folder = target / "outputs" / "previews" / "lora_embedded"
    shown = torch.stack([torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255 for image in images])
    preview_sheet([("samples", shown)], folder / "step-00000800.png", captions=PROMPTS)
    line = {"step": 800, "samples_seen": 12800, "loss": 0.05, "lr": 1e-5, "samples_per_second": 60.0, "broken": 0}
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")


def make_hub(target: Path) -> None:
    """A download cache with both released repositories at tiny size: their folders, classes and file names."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    from stable_cascade import StableCascadeVQGAN
    from stable_cascade.embedded import embedded_path
    from stable_cascade.files.conversion import convert_networks

    embedded = Path(embedded_path())
    text = {
        "text_encoder": CLIPTextModelWithProjection.from_pretrained(embedded / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(embedded / "tokenizer"),
    }
    widths = {"clip_text_pooled_in_channels": 128}
    prior = tiny_prior(**widths, clip_text_in_channels=128, clip_image_in_channels=128)
    # Attention over the latents of 1024 pixels would take most of the time.
    plain = {"num_attention_heads": [0, 0], "block_types_per_layer": [[RESIDUAL, TIMESTEP]] * 2}
    decoder, vqgan = tiny_decoder(**widths, **plain), seeded(lambda: StableCascadeVQGAN(**VQGAN))
    first = _repository(target, HUB, {"decoder": decoder, "vqgan": vqgan, **text}, latent_dim_scale=10.67)
    second = _repository(target, f"{HUB}-prior", {"prior": prior, **text}, resolution_multiple=42.67)
    for name in ("image_encoder", "feature_extractor"):
        shutil.copytree(embedded / name, second / name)
    weights = second / "image_encoder" / "model.safetensors"
    shutil.copyfile(weights, weights.with_suffix(".bf16.safetensors"))
    for name, file in (("semantic_encoder", "effnet_encoder"), ("previewer", "previewer")):
        convert_networks(embedded / name, first / f"{file}.safetensors", "original")
    for folder, name in ((first, "decoder"), (second, "prior")):
        shutil.copytree(folder / name, folder / f"{name}_lite")


def _repository(target: Path, name: str, parts: dict[str, Any], **settings: float) -> Path:
    """One repository in the cache's layout, with diffusers' class names as the released ones have."""
    from diffusers import DDPMWuerstchenScheduler

    repository = target / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    classes = {"prior": "StableCascadeUNet", "decoder": "StableCascadeUNet", "vqgan": "PaellaVQModel"}
    index: dict[str, Any] = {
        "_class_name": "StableCascade" + ("Prior" if "prior" in parts else "Decoder") + "Pipeline"
    }
    for part, value in (parts | {"scheduler": DDPMWuerstchenScheduler()}).items():
        value.save_pretrained(folder / part)
        if part not in ("tokenizer", "scheduler"):
            value.save_pretrained(folder / part, variant="bf16")
        if part in classes:
            config = folder / part / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": classes[part]}))
        library = "transformers" if part in ("text_encoder", "tokenizer") else "diffusers"
        index[part] = [library, classes.get(part, type(value).__name__)]
    for part in ("image_encoder", "feature_extractor") if "prior" in parts else ():
        index[part] = [
            "transformers",
            {"image_encoder": "CLIPVisionModelWithProjection"}.get(part, "CLIPImageProcessor"),
        ]
    (folder / "model_index.json").write_text(json.dumps(index | settings))
    return folder
