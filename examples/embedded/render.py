"""Reads the emoji packages and draws one emoji on one background, the same bytes on every run."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from concepts import SKIPPED_ENDINGS, SKIPPED_LABELS, WIDE_GROUPS, WIDE_SYMBOL_SUBGROUPS
from PIL import Image, ImageOps

STYLES = {
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "ink": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT"),
}
LABELS = ("emojibase-data", "17.0.0", "MIT")


@dataclass(frozen=True)
class Concept:
    """One emoji: its emojibase label, keyword tags and group, and the SVG text per style."""

    label: str
    tags: tuple[str, ...]
    group: int
    drawings: dict[str, str]


def fetch_packages(folder: Path) -> None:
    """Packs and unpacks the pinned npm packages into `folder`, one sub-folder per package; present ones are kept.

    Raises:
        ValueError: `npm` is not installed, or it failed.

    """
    for name, version, _ in (*STYLES.values(), LABELS):
        target = package_folder(folder, name)
        if (target / "package.json").is_file():
            continue
        if shutil.which("npm") is None:
            raise ValueError(f"npm not found, needed to fetch '{name}'; install it or pass --packages FOLDER")
        target.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=target, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"npm pack {name}@{version} failed: {done.stderr.strip().splitlines()[-1]}")
        unpack(target / done.stdout.strip().splitlines()[-1], target)


def unpack(archive: Path, target: Path) -> None:
    """Unpacks an npm archive without its leading `package/` folder."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            member.name = member.name.partition("/")[2]
            if member.isfile() and member.name:
                tar.extract(member, target, filter="data")
    archive.unlink()


def package_folder(folder: Path, name: str) -> Path:
    """Where a package lies under `folder`: its name, '@' dropped and '/' written as '-'."""
    return folder / name.replace("@", "").replace("/", "-")


def read_json(path: Path):
    """The parsed file."""
    return json.loads(path.read_text(encoding="utf-8"))


def load_concepts(folder: Path) -> dict[str, Concept]:
    """All usable concepts by label, in Unicode order: no people, flags, skin tones, clock faces or lettering.

    Raises:
        ValueError: a package is missing under `folder` or has another version.

    """
    for name, version, _ in (*STYLES.values(), LABELS):
        manifest = package_folder(folder, name) / "package.json"
        found = read_json(manifest)["version"] if manifest.is_file() else "nothing"
        if found != version:
            raise ValueError(
                f"package '{name}': {manifest.parent} holds {found}, needed {version}; run npm pack {name}"
            )
    drawings = {style: load_drawings(package_folder(folder, name)) for style, (name, _, _) in STYLES.items()}
    data = package_folder(folder, LABELS[0])
    subgroups = read_json(data / "meta" / "groups.json")["subgroups"]
    concepts = {}
    for entry in sorted(read_json(data / "en" / "data.json"), key=lambda entry: entry.get("order", 0)):
        if not is_usable(entry, subgroups):
            continue
        code = entry["hexcode"].lower()
        keys = (code, code.replace("-fe0f", ""))
        found = {style: svgs[key] for style, svgs in drawings.items() for key in keys if key in svgs}
        if "noto" in found and "flat" in found:
            concepts[entry["label"]] = Concept(entry["label"], tuple(entry.get("tags", ())), entry["group"], found)
    return concepts


def is_usable(entry: dict, subgroups: dict[str, str]) -> bool:
    """Whether an emojibase entry is an image of a thing, an animal, a face or a shape."""
    label, group = entry["label"], entry.get("group")
    if label in SKIPPED_LABELS or label.endswith(SKIPPED_ENDINGS) or group is None:
        return False
    return group in WIDE_GROUPS or subgroups[str(entry["subgroup"])] in WIDE_SYMBOL_SUBGROUPS


def load_drawings(package: Path) -> dict[str, str]:
    """SVG text by lower-case code point, for one iconify package."""
    icons = read_json(package / "icons.json")
    width, height = icons["width"], icons["height"]
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{} {} {} {}">'
    drawings = {}
    for code, name in read_json(package / "chars.json").items():
        icon = icons["icons"].get(name) or icons["icons"].get(icons["aliases"].get(name, {}).get("parent"))
        if icon is None:
            continue
        w, h = icon.get("width", width), icon.get("height", height)
        # A square view box around the drawing, so that a wide one is padded and not squeezed.
        side, left, top = max(w, h), icon.get("left", 0), icon.get("top", 0)
        box = (left - (side - w) / 2, top - (side - h) / 2, side, side)
        drawings[code] = head.format(*box) + icon["body"] + "</svg>"
    return drawings


def rng_for(*words: object) -> np.random.Generator:
    """A generator that depends on the words only."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def draw(svg: str, side: int, background: tuple[int, int, int], *, pose=(1.0, 0, 0), hue: float = 0.0) -> Image.Image:
    """The emoji on a plain background: `side` px square, RGB.

    `pose` is the drawing's scale and its shift from the middle in px, right and down; `hue` turns its hues, 1 being
    the whole way round.
    """
    scale, right, down = pose
    inner = round(side * scale)
    drawing = rasterised(svg, inner)
    if hue:
        alpha = drawing.getchannel("A")
        h, s, v = drawing.convert("RGB").convert("HSV").split()
        h = Image.fromarray(np.asarray(h) + np.uint8(round(hue * 256) % 256))
        drawing = Image.merge("HSV", (h, s, v)).convert("RGB")
        drawing.putalpha(alpha)
    canvas = Image.new("RGBA", (side, side), (*background, 255))
    margin = side - inner
    canvas.alpha_composite(drawing, (clip(margin // 2 + right, margin), clip(margin // 2 + down, margin)))
    return canvas.convert("RGB")


def draw_freely(svg: str, side: int, background: tuple[int, int, int], rng: np.random.Generator) -> Image.Image:
    """The emoji anywhere on a plain background: 55 to 95 % of its size, turned up to 30 degrees, half mirrored."""
    scale, angle, mirrored = float(rng.uniform(0.55, 0.95)), float(rng.uniform(-30, 30)), rng.random() < 0.5
    drawing = rasterised(svg, round(side * scale))
    drawing = (ImageOps.mirror(drawing) if mirrored else drawing).rotate(angle, Image.Resampling.BICUBIC)
    canvas = Image.new("RGBA", (side, side), (*background, 255))
    margin = side - drawing.width
    canvas.alpha_composite(drawing, (int(rng.integers(0, margin + 1)), int(rng.integers(0, margin + 1))))
    return canvas.convert("RGB")


def rasterised(svg: str, side: int) -> Image.Image:
    """The drawing in pixels, with its transparency."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def clip(offset: int, margin: int) -> int:
    """An offset that keeps the drawing inside the image."""
    return min(max(offset, 0), margin)


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG, smallest."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
