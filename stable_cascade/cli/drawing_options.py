"""The options of the drawing commands, and the drawing that they mean."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stable_cascade.diffusion.samplers import SAMPLERS
from stable_cascade.disk import local_path, read_text
from stable_cascade.drawing.request import (
    DTYPES,
    STRENGTHS,
    ControlChoice,
    Drawing,
    InputFile,
    LoraChoice,
)
from stable_cascade.pipelines.call import KNOBS
from stable_cascade.wording import brief, quoted

LONGEST_LIST = 2**20
# Option -> setting, for those that are one value. Absent options stay absent, so that --from-image keeps the rest.
SIMPLE = {
    "model": "model", "lite": "lite", "variant": "variant", "dtype": "dtype", "negative": "negative_prompt",
    "weighted": "weighted", "seed": "seed", "height": "height", "width": "width", "steps": "prior_num_inference_steps",
    "guidance": "prior_guidance_scale", "decoder_steps": "num_inference_steps",
    "decoder_guidance": "decoder_guidance_scale", "sampler": "sampler", "shift": "shift", "strength": "strength",
    "preview": "preview", "guide_prior": "guide_prior",
    **{knob.flag.replace("-", "_"): name for name, knob in KNOBS.items()},
}  # fmt: skip


class Parser:
    """Adds options that are absent from the result where they are not given."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser
        self.target: Any = parser

    def group(self, title: str) -> None:
        """What follows stands under this title in the help."""
        self.target = self.parser.add_argument_group(title)

    def add(self, *names: str, **settings: Any) -> None:
        """One option."""
        self.target.add_argument(*names, **{"default": argparse.SUPPRESS, **settings})

    def switch(self, name: str, help: str) -> None:
        """An option that is on, or off with `no-` before it."""
        self.add(name, action=argparse.BooleanOptionalAction, help=help)


def add_model_options(options: Parser) -> None:
    """Which cascade draws, and where."""
    options.group("model")
    options.add("--model", metavar="NAME", help="the word embedded (default), a folder, a Hub name, or single files: "
                "stage_c.safetensors,stage_b.safetensors,tokenizer=FOLDER,…")  # fmt: skip
    options.switch("--lite", "the small Stages C and B of the model")
    options.add("--variant", help="part of the weights' file names, as bf16")
    options.add("--dtype", choices=DTYPES, help="of the networks (default float32)")
    options.add("--device", default=None, help="cpu, cuda or cuda:1; default: CUDA where there is one")
    options.add("--offload", action="store_true", default=False, help="keep only the network at work on the GPU")
    options.add("--tiling", action=argparse.BooleanOptionalAction, default=None,
                help="Stage A works in tiles: less memory (default: from 2048 x 2048 pixels on)")  # fmt: skip
    options.add("--compile", action="store_true", default=False,
                help="compile Stages C and B with torch.compile: the first image waits for it")  # fmt: skip
    options.add("--lora", action="append", metavar="PATH[:WEIGHT]", help="a LoRA in any known format; repeatable")
    options.add("--no-lora", dest="lora", action="store_const", const=[], help="with --from-image: leave them away")


def add_sampling_options(options: Parser, *, prior: bool = True) -> None:
    """How it draws; without `prior` only Stage B does."""
    options.group("sampling")
    # Seed and size.
    options.add("--seed", type=int, help="image number i is drawn with seed + i (default 0)")
    options.add("--height", type=int, help="multiple of 8; default: the model's own, or the image's")
    options.add("--width", type=int, help="the same")
    # Stage C.
    if prior:
        options.add("--steps", type=int, help="of Stage C (default 20)")
        options.add("--guidance", type=float, help="of Stage C (default 4)")
        options.add("--shift", type=float, help="of Stage C's schedule; default: the model's, 2 as released")
        options.add("--guide-prior", metavar="PLACE",
                    help="file or folder of a worse prior: guide Stage C away from it (autoguidance)")  # fmt: skip
        options.add("--negative", metavar="TEXT", help="negative prompt")
        options.switch("--weighted", "read (words:1.3) in prompts")
    # Stage B, and the choices that both have.
    options.add("--decoder-steps", type=int, help="of Stage B (default 10)")
    options.add("--decoder-guidance", type=float, help="of Stage B (default 1.1)")
    options.add("--sampler", choices=tuple(SAMPLERS), help="of both stages; default: the model's. "
                + "; ".join(f"{name}: {sampler.about}" for name, sampler in SAMPLERS.items()))  # fmt: skip
    for knob in KNOBS.values():
        options.add(f"--{knob.flag}", help=knob.help, **knob.option)
    options.switch("--preview", "rough and fast: the previewer draws, Stages B and A do not")


def add_control_options(options: Parser, *, own_image: bool) -> None:
    """ControlNets, and with `own_image` the images they look at."""
    options.group("ControlNets")
    options.add("--controlnet", action="append", metavar="PATH[:SCALE[:START[:END]]]",
                help="folder, file or Hub name, and when it acts (default 1:0:1); repeatable")  # fmt: skip
    if own_image:
        options.add("--control-image", action="append", metavar="FILE", dest="control_image",
                    help="what a ControlNet looks at, in the same order; default: --image")  # fmt: skip
    options.switch("--filtered", "the images are control images already")
    options.add("--filter", metavar="NAME", help="the filter of a ControlNet that does not name its own")
    options.add("--show-control", type=local_path, default=None, metavar="FILE", help="also write the control image")


def add_output_options(options: Parser) -> None:
    """What becomes of the images."""
    options.group("output")
    # How many, and where to.
    options.add("--count", type=int, default=1, help="images per prompt (default %(default)s)")
    options.add("--batch-size", type=int, default=1,
                help="images at a time (default %(default)s); above 1 their last bit may depend on it")  # fmt: skip
    options.add(
        "--output",
        type=local_path,
        default=Path("outputs"),
        metavar="PLACE",
        help="a folder, or the image's .png file (default: %(default)s)",
    )
    options.add("--sheet", type=local_path, default=None, metavar="FILE", help="also write all images side by side")
    options.add(
        "--live", type=local_path, default=None, metavar="FILE", help="rewrite this image while Stage C samples"
    )
    # For programs, and for drawing an image again.
    options.add("--json", action="store_true", default=False, help="print one JSON object and nothing else")
    options.add("--from-image", type=local_path, default=None, metavar="PNG",
                help="draw this image again; options beside it change what they name")  # fmt: skip
    options.add("--allow-changed-files", action="store_true", default=False,
                help="with --from-image: also from files that are not the same any more")  # fmt: skip


def changed_drawing(base: Drawing, given: Mapping[str, Any]) -> Drawing:
    """`base` with what the options say.

    Raises:
        ValueError: an option that means nothing, or does not fit the others.
    """
    # Options that are fields of a drawing.
    changes: dict[str, Any] = {field: given[name] for name, field in SIMPLE.items() if name in given}
    changes |= {name: knob.check(name, changes[name]) for name, knob in KNOBS.items() if name in changes}
    if "lora" in given:
        changes["loras"] = tuple(
            LoraChoice(path, **_named(numbers, "weight")) for path, numbers in _parsed(given["lora"], "--lora", 1)
        )
    # Inputs; a mask and margins exclude each other.
    if "outpaint" in given:
        changes |= {"outpaint": _outpaint(given["outpaint"]), "mask_image": None}
    if "mask" in given:
        changes |= {"mask_image": InputFile(given["mask"]), "outpaint": None}
        if "outpaint" in given:
            raise ValueError("--mask and --outpaint are both given; --outpaint makes its own mask, give one of them")
    changes |= _references(given, "image" if base.task == "variation" else "reference")
    if base.task in (*STRENGTHS, "reconstruct") and "image" in given:
        changes["image"] = InputFile(given["image"])
    changes |= _controls(base, given)
    return replace(base, **changes)


def prompts_of(given: Mapping[str, Any]) -> list[str] | None:
    """The prompts of the command line or of `--prompts-file`; None where neither is given.

    Raises:
        ValueError: both are given, or the file cannot be read or has no prompt.
    """
    typed, file = given.get("prompt") or None, given.get("prompts_file")
    if typed and file:
        raise ValueError("PROMPT and --prompts-file are both given; give one of them")
    if file is None:
        return typed
    lines = read_text(file, at_most=LONGEST_LIST, what="--prompts-file").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file {quoted(file)} has no prompt; write one per line")
    return prompts


def _references(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    if name not in given or isinstance(given[name], str):
        return {}
    found = _parsed(given[name], f"--{name}", 1)
    weights = tuple(numbers[0] if numbers else 1.0 for _, numbers in found)
    weighted = any(numbers for _, numbers in found)
    files = tuple(InputFile(path) for path, _ in found)
    return {"images": files, "image_weights": weights if weighted else None}


def _controls(base: Drawing, given: Mapping[str, Any]) -> dict[str, Any]:
    """The ControlNets: new ones keep the images of the old ones in their place, and the other way round."""
    # New networks.
    choices = list(base.controlnets)
    if "controlnet" in given:
        found = _parsed(given["controlnet"], "--controlnet", 3)
        old = [choice.image for choice in choices] + [None] * len(found)
        choices = [
            ControlChoice(path, image, **_named(numbers, "scale", "start", "end"))
            for (path, numbers), image in zip(found, old, strict=False)
        ]
    # New images.
    images = given.get("image") if base.task == "control" else given.get("control_image")
    if images is not None:
        if not choices:
            raise ValueError("an image for a ControlNet is given and no ControlNet; add --controlnet")
        if len(images) not in (1, len(choices)):
            raise ValueError(f"{len(images)} control images for {len(choices)} ControlNets; give one each, or one")
        files = [InputFile(path) for path in images] * (len(choices) if len(images) == 1 else 1)
        choices = [replace(choice, image=file) for choice, file in zip(choices, files, strict=True)]
    # New filters.
    for name in ("filtered", "filter"):
        if name in given:
            choices = [replace(choice, **{name: given[name]}) for choice in choices]
            if not choices:
                raise ValueError(f"--{name} is about a ControlNet, and none is given; add --controlnet")
    return {"controlnets": tuple(choices)} if tuple(choices) != base.controlnets else {}


def _named(numbers: list[float], *names: str) -> dict[str, Any]:
    return dict(zip(names, numbers, strict=False))


def _parsed(texts: list[str], option: str, most: int) -> list[tuple[str, list[float]]]:
    return [parse_choice(text, option, most) for text in texts]


def parse_choice(text: str, option: str, most: int) -> tuple[str, list[float]]:
    """A path and the numbers behind it: `my_lora:0.8` gives `my_lora` and [0.8]; a path that exists has none.

    Raises:
        ValueError: there is no path.
    """
    path, numbers = text, list[float]()
    while len(numbers) < most and not Path(path).exists():
        head, colon, tail = path.rpartition(":")
        try:
            number = float(tail)
        except ValueError:
            break
        if not colon:
            break
        path, numbers = head, [number, *numbers]
    if not path:
        raise ValueError(f"{option} {quoted(text)} has no path before the colon")
    return path, numbers


def _outpaint(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    try:
        pixels = tuple(int(part) for part in parts)
    except ValueError:
        pixels = ()
    if len(pixels) != 4:
        raise ValueError(f"--outpaint {brief(text, 40)} is not LEFT,TOP,RIGHT,BOTTOM in pixels, as 64,0,64,0")
    return pixels
