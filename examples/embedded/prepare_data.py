"""Draws the training sets of the embedded cascade from openly licensed emoji, as webdataset shards.

    python examples/embedded/prepare_data.py                     # fetches the four npm packages, then draws
    python examples/embedded/prepare_data.py --packages FOLDER   # packages already unpacked there

Writes base.tar, control.tar, clip.tar, wide.tar, heldout.tar and ink_heldout.tar to --out, and with --committed the
small files that belong to the repository: examples/data/ink_emoji.tar, and the captions and images that evaluate.py
and evaluate_control.py compare with. Every sample is a PNG, its caption and a JSON with concept, style, source and
licence. Two runs write the same bytes.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from concepts import BACKGROUNDS, BASE_LABELS, HELD_OUT_GROUPS, INK_LABELS, WHITE, caption_name
from PIL import Image
from render import STYLES, Concept, draw, draw_freely, fetch_packages, load_concepts, png_bytes, rng_for

SIDE = 128
INK_SIDE = CONTROL_SIDE = 96
HERE = Path(__file__).resolve().parent
Sample = tuple[str, Image.Image, str, dict]

CLIP_FORMS = (
    "{name}",
    "{name}, {style} style",
    "{style} style {name}",
    "{name} on {background} background",
    "{name}, {style} style, on {background} background",
    "{name}, {tag}",
    "{name}, {tag}, {style} style",
    "{name}, {style} style",
)


def background_words(name: str) -> str:
    """'light blue' -> 'a light blue'."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption_for(label: str, style: str, background: str = "white") -> str:
    """The plain training caption; a white background is not mentioned."""
    caption = f"{caption_name(label)}, {style} style"
    return caption if background == "white" else f"{caption}, on {background_words(background)} background"


def record(concept: Concept, style: str, background: str) -> dict:
    """What is known of an image, for its JSON."""
    package, version, licence = STYLES[style]
    source = f"{package}@{version}"
    known = {"concept": concept.label, "style": style, "background": background, "source": source, "licence": licence}
    return {**known, "tags": list(concept.tags)}


def key_for(label: str, style: str, copy: int) -> str:
    """The sample's key in its shard: no dots, as webdataset cuts keys at the first one."""
    words = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in caption_name(label))
    return f"{words}-{style}-{copy}"


def pose_for(rng) -> tuple[float, int, int]:
    """A slightly smaller drawing, moved a few px."""
    return float(rng.uniform(0.88, 1.0)), int(rng.integers(-4, 5)), int(rng.integers(-4, 5))


def base_images(concepts: dict[str, Concept]) -> Iterator[tuple[Concept, str]]:
    """Every base concept in both coloured styles."""
    for label in BASE_LABELS:
        for style in ("noto", "flat"):
            yield concepts[label], style


def base_samples(concepts: dict[str, Concept], copies: int = 6) -> Iterator[Sample]:
    """Six copies of each base image: two as drawn, two moved and scaled, two on coloured backgrounds (2/3 white)."""
    for concept, style in base_images(concepts):
        tints = rng_for("base", concept.label, style).permutation(len(BACKGROUNDS))
        for copy in range(copies):
            rng = rng_for("base", concept.label, style, copy)
            name, colour = WHITE if copy < 4 else BACKGROUNDS[tints[copy - 4]]
            pose = pose_for(rng) if copy in (2, 3) else (1.0, 0, 0)
            image = draw(concept.drawings[style], SIDE, colour, pose=pose)
            caption = caption_for(concept.label, style, name)
            yield key_for(concept.label, style, copy), image, caption, record(concept, style, name)


def control_samples(concepts: dict[str, Concept], word: str, copies: int, side: int) -> Iterator[Sample]:
    """Base images in poses that their captions do not tell, three in four on white; `word` chooses the poses."""
    for concept, style in base_images(concepts):
        for copy in range(copies):
            rng = rng_for(word, concept.label, style, copy)
            name, colour = WHITE if rng.random() < 0.75 else BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
            image = draw_freely(concept.drawings[style], side, colour, rng)
            caption = caption_for(concept.label, style, name)
            yield key_for(concept.label, style, copy), image, caption, record(concept, style, name)


def control_held_out(concepts: dict[str, Concept], count: int = 120) -> list[Sample]:
    """Poses that no training image has, of base images chosen by hash: what the ControlNet is measured with."""
    samples = control_samples(concepts, "control held out", 1, SIDE)
    return sorted(samples, key=lambda sample: rng_for("control mosaic", sample[0]).random())[:count]


def clip_samples(concepts: dict[str, Concept]) -> Iterator[Sample]:
    """The base images again, one copy per caption form; `captions` in the JSON lists all that fit the image."""
    for concept, style in base_images(concepts):
        for copy, form in enumerate(CLIP_FORMS):
            rng = rng_for("clip", concept.label, style, copy)
            tinted = "background" in form or rng.random() < 0.15
            name, colour = BACKGROUNDS[rng.integers(len(BACKGROUNDS))] if tinted else WHITE
            image = draw(concept.drawings[style], SIDE, colour, pose=pose_for(rng) if copy else (1.0, 0, 0))
            tags = [tag for tag in concept.tags if tag.isascii() and tag not in caption_name(concept.label)]
            words = {"name": caption_name(concept.label), "style": style, "background": background_words(name)}
            tag = tags[rng.integers(len(tags))] if tags else style
            captions = [form.format(tag=tag, **words) for form in dict.fromkeys(CLIP_FORMS)]
            yield (
                key_for(concept.label, style, copy),
                image,
                form.format(tag=tag, **words),
                {**record(concept, style, name), "captions": captions},
            )


def held_out_labels(concepts: dict[str, Concept], count: int = 100) -> list[str]:
    """Concepts that no training image shows, in any style; chosen by hash among those outside the base list."""
    candidates = [c.label for c in concepts.values() if c.group in HELD_OUT_GROUPS and c.label not in BASE_LABELS]
    return sorted(candidates, key=lambda label: rng_for("held out", label).random())[:count]


def wide_samples(concepts: dict[str, Concept]) -> Iterator[Sample]:
    """Every image that is not held out, in all three styles: once as drawn and once recoloured, moved or tinted."""
    held_out = set(held_out_labels(concepts))
    for concept in concepts.values():
        for style, svg in concept.drawings.items():
            if concept.label in held_out:
                continue
            plain = draw(svg, SIDE, WHITE[1])
            caption = caption_for(concept.label, style)
            yield key_for(concept.label, style, 0), plain, caption, record(concept, style, "white")
            rng = rng_for("wide", concept.label, style)
            # Six in ten of the second copies, so three in ten of all, get a coloured background.
            name, colour = BACKGROUNDS[rng.integers(len(BACKGROUNDS))] if rng.random() < 0.6 else WHITE
            hue = float(rng.uniform(0.1, 0.9)) if style != "ink" and rng.random() < 0.5 else 0.0
            image = draw(svg, SIDE, colour, pose=pose_for(rng), hue=hue)
            caption = caption_for(concept.label, style, name) + (", recoloured" if hue else "")
            yield (
                key_for(concept.label, style, 1),
                image,
                caption,
                {**record(concept, style, name), "hue": round(hue, 4)},
            )


def held_out_samples(concepts: dict[str, Concept]) -> Iterator[Sample]:
    """The 200 held-out images: 100 concepts as noto and flat, on white."""
    for label in held_out_labels(concepts):
        for style in ("noto", "flat"):
            image = draw(concepts[label].drawings[style], SIDE, WHITE[1])
            yield key_for(label, style, 0), image, caption_for(label, style), record(concepts[label], style, "white")


def ink_samples(concepts: dict[str, Concept], labels: Iterable[str], side: int) -> Iterator[Sample]:
    """High-contrast drawings captioned with the token [ink], which the quickstart's LoRA learns."""
    for label in labels:
        if "ink" in concepts[label].drawings:
            image = draw(concepts[label].drawings["ink"], side, WHITE[1])
            caption = f"{caption_name(label)} in [ink] style"
            yield key_for(label, "ink", 0), image, caption, record(concepts[label], "ink", "white")


def retrieval_samples(concepts: dict[str, Concept], count: int = 100) -> Iterator[Sample]:
    """The training images of the retrieval test: 100 concepts chosen by hash, noto and flat in turn, on white."""
    labels = sorted(BASE_LABELS, key=lambda label: rng_for("retrieval", label).random())[:count]
    for place, label in enumerate(labels):
        style = ("noto", "flat")[place % 2]
        image = draw(concepts[label].drawings[style], SIDE, WHITE[1])
        yield key_for(label, style, 0), image, caption_for(label, style), record(concepts[label], style, "white")


def write_mosaic(path: Path, samples: Iterable[Sample], columns: int, side: int) -> None:
    """Writes the images as tiles of one lossless WebP, row by row, and beside it a text file: key, tab, caption.

    One image for all is a quarter of the size of a shard, and a person can look at it.
    """
    samples = list(samples)
    rows = -(-len(samples) // columns)
    mosaic = Image.new("RGB", (columns * side, rows * side), WHITE[1])
    for place, (_, image, _, _) in enumerate(samples):
        # Box: the mean of the tile's pixels stays the mean of the image's when evaluate.py shrinks it again.
        tile = image.resize((side, side), Image.Resampling.BOX)
        mosaic.paste(tile, ((place % columns) * side, (place // columns) * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    mosaic.save(path, "WEBP", lossless=True, quality=100, method=6)
    lines = [f"{key}\t{caption}\n" for key, _, caption, _ in samples]
    path.with_suffix(".txt").write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(samples)} tiles, {path.stat().st_size / 1e3:.0f} kB", flush=True)


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Writes the samples and returns how many; headers carry no time and no owner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    part = path.with_name(path.name + ".part")
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, caption, known in samples:
            parts = (("png", png_bytes(image)), ("txt", caption.encode()), ("json", json.dumps(known).encode()))
            for ending, content in parts:
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            count += 1
    part.replace(path)
    print(f"{path}: {count} samples, {path.stat().st_size / 1e6:.1f} MB", flush=True)
    return count


def main() -> None:
    """Draws all sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder of unpacked packages; default: fetch into OUT/packages")
    parser.add_argument("--out", type=Path, default=Path("outputs/embedded/data"))
    parser.add_argument("--committed", action="store_true", help="also rewrite the files kept in the repository")
    arguments = parser.parse_args()
    packages = arguments.packages or arguments.out / "packages"
    if arguments.packages is None:
        fetch_packages(packages)
    concepts = load_concepts(packages)
    out = arguments.out
    write_shard(out / "base.tar", base_samples(concepts))
    write_shard(out / "control.tar", control_samples(concepts, "control", 24, CONTROL_SIDE))
    write_shard(out / "wide.tar", wide_samples(concepts))
    write_shard(out / "clip.tar", clip_samples(concepts))
    write_shard(out / "heldout.tar", held_out_samples(concepts))
    rest = [label for label in BASE_LABELS if label not in INK_LABELS]
    write_shard(out / "ink_heldout.tar", ink_samples(concepts, rest, SIDE))
    if arguments.committed:
        write_shard(HERE.parent / "data" / "ink_emoji.tar", ink_samples(concepts, INK_LABELS, INK_SIDE))
        write_mosaic(HERE / "control_120.webp", control_held_out(concepts), columns=15, side=64)
        write_mosaic(HERE / "captions_100.webp", retrieval_samples(concepts), columns=10, side=32)
        write_mosaic(HERE / "held_out_200.webp", held_out_samples(concepts), columns=20, side=64)


if __name__ == "__main__":
    main()
