"""`stable-cascade generate | variation | img2img | inpaint | control | reconstruct`: settings to PNG files."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_cascade.disk import local_path
from stable_cascade.drawing.request import STRENGTHS, Drawing, InputFile
from stable_cascade.wording import quoted

from .drawing_options import (
    Parser,
    add_control_options,
    add_model_options,
    add_output_options,
    add_sampling_options,
    changed_drawing,
    prompts_of,
)
from .drawing_output import Progress, check_targets, new_path, save_new, write_json, write_sheet

if TYPE_CHECKING:
    from stable_cascade.drawing import Drawn, Session

PROMPT = {"metavar": "PROMPT", "help": "what to draw; several give a row each"}


def add_generate(commands: Any) -> None:
    """Adds `generate PROMPT`."""
    options = _command(commands, "generate", "draw images from text")
    options.add("prompt", nargs="*", **PROMPT)
    _finish(options)


def add_variation(commands: Any) -> None:
    """Adds `variation PROMPT --image FILE`."""
    options = _command(commands, "variation", "draw images like one or several others")
    options.add("prompt", nargs="*", **PROMPT)
    options.add("--image", action="append", metavar="FILE[:WEIGHT]", help="an image to vary; repeatable")
    add_control_options(options, own_image=True)
    _finish(options)


def add_img2img(commands: Any) -> None:
    """Adds `img2img PROMPT --image FILE --strength S`."""
    options = _command(commands, "img2img", "change an image as a text says")
    options.add("prompt", nargs="*", **PROMPT)
    options.add("--image", metavar="FILE", help="the image to start from")
    options.add("--strength", type=float, help="0 keeps the image, 1 ignores it "
                f"(default {STRENGTHS['img2img']:g})")  # fmt: skip
    _add_references(options)
    add_control_options(options, own_image=True)
    _finish(options)


def add_inpaint(commands: Any) -> None:
    """Adds `inpaint PROMPT --image FILE --mask FILE`."""
    options = _command(commands, "inpaint", "repaint a part of an image, or paint around it")
    options.add("prompt", nargs="*", **PROMPT)
    options.add("--image", metavar="FILE", help="the image")
    options.add("--mask", metavar="FILE", help="an image of its size, white where to repaint")
    options.add("--outpaint", metavar="LEFT,TOP,RIGHT,BOTTOM", help="pixels to paint around it, instead of a mask")
    options.add("--strength", type=float, help="how far the repainted part may leave what is there "
                f"(default {STRENGTHS['inpaint']:g})")  # fmt: skip
    _add_references(options)
    add_control_options(options, own_image=True)
    _finish(options)


def add_control(commands: Any) -> None:
    """Adds `control PROMPT --controlnet FOLDER --image FILE`."""
    options = _command(commands, "control", "draw along edges, masks and whatever a ControlNet was trained with")
    options.add("prompt", nargs="*", **PROMPT)
    options.add("--image", action="append", metavar="FILE", help="what a ControlNet looks at, in the same order")
    _add_references(options)
    add_control_options(options, own_image=False)
    _finish(options)


def add_reconstruct(commands: Any) -> None:
    """Adds `reconstruct FILE …`."""
    options = _command(commands, "reconstruct", "show what the cascade's latents keep of images")
    options.add("image", nargs="*", metavar="FILE", help="images to encode and decode")
    options.add("--prompt", nargs=1, metavar="TEXT", help="what they show; helps a little")
    _finish(options, prior=False)


DRAWING_COMMANDS = (add_generate, add_variation, add_img2img, add_inpaint, add_control, add_reconstruct)


def _command(commands: Any, name: str, text: str) -> Parser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=_run)
    return Parser(parser)


def _add_references(options: Parser) -> None:
    options.add("--reference", action="append", metavar="FILE[:WEIGHT]", help="an image to resemble; repeatable")


def _finish(options: Parser, *, prior: bool = True) -> None:
    if prior:
        options.add("--prompts-file", type=local_path, metavar="FILE", help="one prompt per line instead of PROMPT")
    add_model_options(options)
    add_sampling_options(options, prior=prior)
    add_output_options(options)


def _run(arguments: argparse.Namespace) -> None:
    from transformers.utils import logging

    from stable_cascade.drawing import Session

    logging.disable_progress_bar()  # of loading: a line for every part of the model
    given = vars(arguments)
    drawings = drawings_of(given)
    check_targets(given)
    if given["live"] is not None and arguments.command == "reconstruct":
        raise ValueError("--live shows Stage C, which reconstruct does not run; leave it away")
    first = drawings[0]
    session = Session(
        first.model, dtype=first.dtype, device=given["device"], offload=given["offload"], tiling=given["tiling"],
        lite=first.lite, variant=first.variant, compile=given["compile"],
    )  # fmt: skip
    options = {name: given[name] for name in ("count", "batch_size", "allow_changed_files")}
    for drawing in drawings:
        session.check(drawing, **options)
    pipeline = session.pipeline  # loaded before the bar starts to count
    if given["live"] is not None and pipeline.previewer is None:
        raise ValueError(f"--live needs a previewer, and model {quoted(first.model)} has none; leave it away")
    controls = _write_controls(session, first, given)
    written: list[tuple[Drawn, Path]] = []
    several = given["count"] * len(drawings) > 1
    with Progress(given["count"] * len(drawings), given["live"]) as progress:
        told: dict[str, Any] = {"on_step": progress.on_step, "previews": given["live"] is not None}
        images = itertools.chain.from_iterable(session.each(drawing, **options, **told) for drawing in drawings)
        for drawn in progress.watch(images):
            written.append((drawn, new_path(given["output"], drawn, len(written) if several else None)))
            if not given["json"]:
                progress.say(_line(session, *written[-1]))
    sheet = _write_sheet(session, [drawn for drawn, _ in written], len(drawings), given)
    if given["json"]:
        write_json(arguments.command, [_entry(session, drawn, path) for drawn, path in written],
                   sheet=sheet, controls=controls, made_with=written[0][0].made_with)  # fmt: skip
        return
    for path in (*controls, *([sheet] if sheet else [])):
        print(path)


def drawings_of(given: dict[str, Any]) -> list[Drawing]:
    """One drawing per prompt (per image, of reconstruct), before anything is loaded.

    Raises:
        ValueError: an option that means nothing, or nothing to draw.
    """
    base = _base(given)
    if base.task == "reconstruct":
        base = changed_drawing(base, {key: value for key, value in given.items() if key != "image"})
        base = replace(base, prompt=given["prompt"][0]) if given.get("prompt") else base
        files = given.get("image") or []
        if not files and base.image is None:
            raise ValueError("no image is given; name FILE, or --from-image")
        return [replace(base, image=InputFile(file)) for file in files] or [base]
    base = changed_drawing(base, given)
    prompts = prompts_of(given)
    if prompts is None:
        if base.task == "generate" and given["from_image"] is None:
            raise ValueError("no prompt is given; give PROMPT, '' for none, or --prompts-file")
        return [base]
    return [replace(base, prompt=prompt) for prompt in prompts]


def _base(given: dict[str, Any]) -> Drawing:
    """The drawing that the options change: a new one, or that of `--from-image`."""
    if given["from_image"] is None:
        return Drawing(task=given["command"])
    from stable_cascade.drawing.metadata import read_record

    from .drawing_options import SIMPLE

    name, record = quoted(given["from_image"]), read_record(given["from_image"])
    task = record.drawing.task
    if task != given["command"]:
        raise ValueError(f"image {name} was drawn by {task}; run: stable-cascade {task} --from-image …")
    for setting in record.redacted:
        options = [option for option, field in SIMPLE.items() if field == setting] or [setting]
        if not set(options) & given.keys():
            raise ValueError(f"image {name} does not hold its {setting}, which had a credential in it; give it again")
    return record.drawing


def _write_controls(session: Session, drawing: Drawing, given: dict[str, Any]) -> list[Path]:
    target = given.get("show_control")
    if target is None:
        return []
    if not drawing.controlnets:
        raise ValueError("--show-control shows what a ControlNet sees, and none is given; add --controlnet")
    return [save_new(image, target) for image in session.control_images(drawing)]


def _write_sheet(session: Session, images: Sequence[Drawn], rows: int, given: dict[str, Any]) -> Path | None:
    if given["sheet"] is None:
        return None
    shown = []
    for drawn in images:
        original = session.original(drawn.drawing) if drawn.drawing.task == "reconstruct" else None
        shown += [drawn.image] if original is None else [original, drawn.image]
    return write_sheet(shown, given["sheet"], columns=len(shown) // rows)


def _line(session: Session, drawn: Drawn, path: Path) -> str:
    if drawn.drawing.task != "reconstruct":
        return str(path)
    return f"{path}  PSNR {_psnr(session, drawn):.1f} dB"


def _entry(session: Session, drawn: Drawn, path: Path) -> dict[str, Any]:
    """What `--json` says about an image."""
    from stable_cascade.drawing.metadata import describe

    settings = describe(drawn.drawing, {})["drawing"]
    entry = {"path": str(path), "seed": drawn.drawing.seed, "seconds": round(drawn.seconds, 3), "settings": settings}
    if drawn.drawing.task == "reconstruct":
        entry["psnr"] = round(_psnr(session, drawn), 3)
    return entry


def _psnr(session: Session, drawn: Drawn) -> float:
    """How near a reconstruction is to its original, in dB."""
    from stable_cascade.drawing.images import decibels

    original = session.original(drawn.drawing)
    assert original is not None
    return decibels(drawn.image, original)
