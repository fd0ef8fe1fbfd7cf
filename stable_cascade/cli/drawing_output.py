"""What the drawing commands write: images, sheets, progress and JSON."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_cascade.wording import quoted

if TYPE_CHECKING:
    from PIL import Image

    from stable_cascade.drawing import Drawn

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
    from stable_cascade.drawing.metadata import save_image, slug

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
