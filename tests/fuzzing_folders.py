"""Damaged pipeline folders: one JSON file or one weights file of a sound folder is changed, the rest is linked."""

from __future__ import annotations

import atexit
import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzzing_headers import mutated_file

JSON_FILES = (
    "model_index.json", "prior/config.json", "decoder/config.json", "vqgan/config.json", "previewer/config.json",
    "semantic_encoder/config.json", "scheduler/scheduler_config.json", "prior_scheduler/scheduler_config.json",
    "text_encoder/config.json", "image_encoder/config.json", "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
    "feature_extractor/preprocessor_config.json",
)  # fmt: skip
WEIGHTS = (
    "previewer/diffusion_pytorch_model.safetensors",
    "vqgan/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**20, 10**9, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "x", "16", "a\nb\x1b[2J",
    "y" * 300_000, "../../../etc/passwd", "os:system", [], [[]], [None], [10**9], [1, 2, 3, 4, 5, 6, 7], ["x"], {},
    {"a": 1}, [0], [-3], [1.5],
)  # fmt: skip
TEXTS = (
    b"", b"{", b"[]", b"null", b"3", b"{}", b"[" * 300_000, b'{"a":' * 300_000, b"\xff\xfe{}", b"\xef\xbb\xbf{}",
    b"{'a': 1}", b'{"a": 1,}',
    b'{"a": NaN}', b"\0" * 200, b"<html>", b'{"a": "' + b"x" * 20_000_000 + b'"}', b'{"\\ud800": "\\ud800"}',
    b"{}" * 2,
)  # fmt: skip
EXTRA = ("quantization_config", "_class_name", "_diffusers_version", "auto_map", "model_type", "architectures",
         "torch_dtype", "dtype",
         "__class__", "self", "unknown", "trust_remote_code", "_name_or_path")  # fmt: skip


@cache
def parts() -> dict[str, Any]:
    from tests.tiny_cascade import tiny_parts

    return tiny_parts()


@cache
def sound_folder() -> Path:
    """A tiny cascade as `save_pretrained` writes it; deleted when the process ends."""
    from stable_cascade import StableCascadePipeline
    from tests.tiny_cascade import MULTIPLE

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    StableCascadePipeline(**parts(), resolution_multiple=MULTIPLE).save_pretrained(folder)
    (folder / "feature_extractor").mkdir(exist_ok=True)
    (folder / "feature_extractor/preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 32}, "crop_size": 32}'
    )
    return folder


def mutated_folder(rng: random.Random, folder: Path) -> tuple[str, Path]:
    """What was done, and the damaged file; its pipeline's folder is `folder / "cascade"`."""
    sound, place = sound_folder(), folder / "cascade"
    name = (
        rng.choice(WEIGHTS)
        if rng.random() < 0.15
        else rng.choice([name for name in JSON_FILES if (sound / name).exists()])
    )
    place.mkdir()
    for entry in sound.iterdir():
        if entry.name != name.split("/")[0]:
            (place / entry.name).symlink_to(entry)
    if "/" in name:
        (place / name).parent.mkdir()
        for entry in (sound / name).parent.iterdir():
            if entry.name != Path(name).name:
                (place / name).with_name(entry.name).symlink_to(entry)
    kind, data = _mutated_weights(rng, sound / name) if name in WEIGHTS else _mutated_json(rng, sound / name)
    if data is not None:
        (place / name).write_bytes(data)
    return f"{name}: {kind}", place / name


def _mutated_weights(rng: random.Random, path: Path) -> tuple[str, bytes]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        sizes = {key: (file.get_slice(key).get_dtype(), list(file.get_slice(key).get_shape())) for key in file.keys()}
    return mutated_file(rng, sizes, {"format": "pt"}, ())


def _mutated_json(rng: random.Random, path: Path) -> tuple[str, bytes | None]:
    return ("no file", None) if rng.random() < 0.1 else mutated_json(rng, path.read_bytes())


def mutated_json(rng: random.Random, whole: bytes) -> tuple[str, bytes]:
    """What was done, and the damaged text."""
    kind = rng.choice(
        ["text", "value", "value", "value", "value", "deep value", "deep value", "dropped", "added", "cut", "bits"]
    )
    if kind == "text":
        return kind, rng.choice(TEXTS)
    if kind == "cut":
        return kind, whole[: rng.randrange(len(whole))]
    if kind == "bits":
        changed = bytearray(whole)
        for _ in range(rng.choice([1, 3, 20])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return kind, bytes(changed)
    content = json.loads(whole)
    for _ in range(rng.choice([1, 1, 2, 4])):
        _change(rng, content, kind)
    return kind, json.dumps(content).encode()


def _change(rng: random.Random, content: Any, kind: str) -> None:
    if not content:
        return
    key = rng.choice(list(content)) if isinstance(content, dict) else rng.randrange(len(content))
    value = content[key]
    if kind == "dropped":
        del content[key]
    elif kind == "added" and isinstance(content, dict):
        content[rng.choice(EXTRA)] = rng.choice(VALUES)
    elif kind == "deep value" and isinstance(value, dict | list) and value:
        _change(rng, value, rng.choice(["value", "deep value", "dropped"]))
    elif isinstance(value, list) and value and rng.random() < 0.5:
        content[key] = rng.choice([value * 2, value[:-1], [rng.choice(VALUES)] * len(value), value * 50])
    else:
        content[key] = rng.choice(VALUES)
