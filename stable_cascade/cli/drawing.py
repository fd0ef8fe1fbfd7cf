"""`stable-cascade generate | variation | img2img | inpaint | control | reconstruct`: settings to PNG files."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

if TYPE_CHECKING:
    from PIL import Image

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
        watching: dict[str, Any] = {"on_step": progress.on_step, "previews": given["live"] is not None}
        images = itertools.chain.from_iterable(session.each(drawing, **options, **watching) for drawing in drawings)
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
    from stable_cascade.drawing.png import read_record

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
    from stable_cascade.drawing.png import describe

    settings = describe(drawn.drawing, {})["drawing"]
    entry = {"path": str(path), "seed": drawn.drawing.seed, "seconds": round(drawn.seconds, 3), "settings": settings}
    if drawn.drawing.task == "reconstruct":
        entry["psnr"] = round(_psnr(session, drawn), 3)
    return entry


def _psnr(session: Session, drawn: Drawn) -> float:
    """How near a reconstruction is to its original, in dB."""
    from stable_cascade.drawing.files import decibels

    original = session.original(drawn.drawing)
    assert original is not None
    return decibels(drawn.image, original)


ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


class Progress:
    """A bar on stderr for every image, and the rough image of `--live`; no bar where stderr is no terminal."""

    def __init__(self, images: int, live: Path | None) -> None:
        from tqdm import tqdm

        shown = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
        self.bar = tqdm(total=images, bar_format=shown, disable=None, file=sys.stderr)
        self.images, self.done, self.live = images, 0, live

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def on_step(self, stage: str, step: int, total: int, preview: Image.Image | None) -> None:
        """Shows one step; an image is half done when Stage C is."""
        part = step / total / 2 + (0.5 if stage == "decoder" else 0)
        self.bar.update(max(0, self.done + min(part, 0.99) - self.bar.n))
        self.bar.set_postfix_str(f"image {self.done + 1} of {self.images}, {stage} {step}/{total}")
        if self.live is not None and preview is not None:
            replace_image(preview, self.live)

    def watch(self, images: Iterable[Drawn]) -> Iterator[Drawn]:
        """The same images, counted."""
        for drawn in images:
            self.done += 1
            self.bar.update(self.done - self.bar.n)
            yield drawn

    def say(self, line: str) -> None:
        """Prints a line on stdout, above the bar."""
        self.bar.write(line, file=sys.stdout)


def check_targets(given: Mapping[str, Any]) -> None:
    """Makes the output folder and looks at the names of further files, before anything is drawn.

    Raises:
        ValueError: a file cannot be written there.
    """
    folder = given["output"]
    if _is_image(folder):
        if folder.suffix.lower() != ".png":
            raise ValueError(f"--output {quoted(folder)}: images are PNG files, which keep their settings; name it so")
        folder = folder.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise ValueError(f"--output {quoted(folder)} cannot be a folder: {reason}; name another") from None
    for name in ("sheet", "live", "show_control"):
        target = given.get(name)
        if target is not None:
            check_image_name(target, f"--{name.replace('_', '-')}")


def _is_image(output: Path) -> bool:
    """Whether `--output` names an image's file, and not a folder that is there."""
    return output.suffix.lower() in ENDINGS and not output.is_dir()


def check_image_name(target: Path, option: str) -> None:
    """Raises ValueError unless an image can be written there."""
    if target.suffix.lower() not in ENDINGS:
        raise ValueError(f"{option} {quoted(target)} ends in no {', '.join(ENDINGS)}; name it as an image")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {quoted(target)} cannot be written: {error.strerror}; name another") from None


def new_path(output: Path, drawn: Drawn, number: int | None) -> Path:
    """Writes the image and its settings; a file that is there is never overwritten.

    Args:
        output: a folder, for a name of the image's seed and words of its prompt or its input image's name; or the
            image's own file.
        number: which of several images it is, None for the only one; part of the name where `output` is a file.
    """
    from stable_cascade.drawing.png import save_image, slug

    if _is_image(output):
        wanted = output if number is None else output.with_stem(f"{output.stem}-{number}")
        return save_image(drawn, next(path for path in _numbered(wanted) if not path.exists()))
    folder = output
    drawing = drawn.drawing
    source = Path(drawing.image.path).stem if drawing.image is not None else ""
    words = [source, drawing.prompt] if drawing.task == "reconstruct" else [drawing.prompt, source]
    stem = f"{drawing.seed:05d}-{next(filter(None, map(slug, words)), drawing.task)}"
    for path in _numbered(folder / f"{stem}.png"):
        if not path.exists():
            return save_image(drawn, path)
    raise AssertionError("numbers never end")


def write_sheet(images: Sequence[Image.Image], target: Path, columns: int) -> Path:
    """Images side by side, `columns` in a row."""
    from PIL import Image

    width, height = (max(side) for side in zip(*(image.size for image in images), strict=True))
    rows = -(-len(images) // columns)
    paper = Image.new("RGB", (columns * width, rows * height), "white")
    for number, image in enumerate(images):
        paper.paste(image, (number % columns * width, number // columns * height))
    return save_new(paper, target)


def save_new(image: Image.Image, target: Path) -> Path:
    """Writes an image, under a numbered name where the file exists."""
    path = next(path for path in _numbered(target) if not path.exists())
    image.save(path)
    return path


def replace_image(image: Image.Image, target: Path) -> None:
    """Puts an image in a file's place in one go, so that whoever looks never sees half of it."""
    part = target.with_name(f".{target.stem}.part{target.suffix}")
    image.save(part)
    os.replace(part, target)


def write_json(
    command: str, images: list[dict[str, Any]], *, sheet: Path | None, controls: Sequence[Path],
    made_with: Mapping[str, Any],
) -> None:  # fmt: skip
    """Prints the one JSON object of `--json`."""
    result = {
        "command": command,
        "images": images,
        "sheet": None if sheet is None else str(sheet),
        "control_images": [str(path) for path in controls],
        "made_with": dict(made_with),
    }
    print(json.dumps(result, indent=2))


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_stem(f"{path.stem}-{number}")
