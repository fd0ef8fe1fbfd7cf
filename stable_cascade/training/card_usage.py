"""The code block of a model card."""

from __future__ import annotations

from collections.abc import Sequence

_CLASSES = {
    "prior": "StableCascadePrior",
    "decoder": "StableCascadeDecoder",
    "vqgan": "StableCascadeVQGAN",
    "controlnet": "StableCascadeControlNet",
    "semantic_encoder": "StableCascadeImageEncoder",
    "previewer": "StableCascadePreviewer",
}


def usage(kinds: Sequence[str], repo: str, cascade: str | None, embedded: bool, prompt: str) -> str:
    """Python that draws a picture with the model, in a fence.

    Args:
        cascade: hub name of the cascade that it belongs to; absent: a word to fill in.
        embedded: the cascade is the one in the package.
    """
    parts = [kind for kind in kinds if kind in _CLASSES]
    names = ", ".join(["StableCascadePipeline", *(_CLASSES[part] for part in parts)])
    dtype = "" if embedded else ", torch_dtype=torch.bfloat16"
    lines = ["import torch", f"from stable_cascade import {names}"]
    if embedded:
        lines.append("from stable_cascade.embedded import embedded_path")
    lines.append("")
    for part in parts:
        lines.append(f'{part} = {_CLASSES[part]}.from_pretrained("{repo}", subfolder="{part}"{dtype})')
    if parts and not set(parts) <= {"prior", "decoder", "vqgan"}:
        return _fenced(lines) + _more(parts)
    place = "embedded_path()" if embedded else f'"{cascade or "PATH OR HUB NAME OF THE CASCADE"}"'
    given = "".join(f", {part}={part}" for part in parts)
    lines.append(f"pipeline = StableCascadePipeline.from_pretrained({place}{given}{dtype})")
    if not embedded:
        lines.append('pipeline.to("cuda")')
    if "lora" in kinds:
        lines.append(f'pipeline.load_lora_weights("{repo}")')
    elif "tokens" in kinds:
        lines.append(f'pipeline.load_textual_inversion("{repo}")')
    shown = prompt.replace("\\", "\\\\").replace('"', '\\"')
    lines.append(f'image = pipeline("{shown}", generator=torch.Generator().manual_seed(0)).images[0]')
    lines.append('image.save("picture.png")')
    return _fenced(lines)


def _fenced(lines: Sequence[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _more(parts: Sequence[str]) -> str:
    """What to do with a network that no line of a text-to-image pipeline takes."""
    if "controlnet" in parts:
        return "\n\nThe package's page on ControlNets shows how to draw with it."
    return ""
