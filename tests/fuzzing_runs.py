"""Damaged structure: tars whose headers lie, and run folders of which a file was changed or cut."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import random
import shutil
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import torch

from tests.fuzzing import Surface
from tests.fuzzing_folders import TEXTS, mutated_json
from tests.making_shards import image

BLOCK = 512
NUMBERS = (b"-1000", b"77777777777", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + bytes(7) + b"\1\0\0\0", b"",
           b" ", b"9", b"1_0", b"+7", b"0" * 11, b"00000001000", b"\0" * 12)  # fmt: skip
RECORDS = (b"", b"0 a=b\n", b"9 a=b\n", b"-5 path=x\n", b"13 size=-100\n", b"12 size=1e9\n", b"11 path=/x\n",
           b"8 path=\n", b"99999999999999999999 path=x\n", b"5 a=\n" * 20_000, b"\xff" * 500,
           b"30 size=" + b"9" * 21 + b"\n",
           b"5000 size=" + b"9" * 4989 + b"\n", b"21 path=../../../etc\n", b"17 path=\x1b[2J\ny.png\n")  # fmt: skip
NAMES = ("a.png", "a.txt", "x/../../a.png", "/a.png", ".png", ".", "", "a", "a.", "a.b.c.png", "\x1b[2J.png",
         "日本.png", "._a.png", ".a.png", "x" * 99, "a.mask.png", "a.PNG", "a.json", "\udcff.png")  # fmt: skip
CONTENTS = (*TEXTS[:15], b"caption", b"\xff\xfe", "ein grüner Apfel".encode("utf-16"), b"a\nb", b"x" * 70_000)


@cache
def _sound_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            long = "y" * 120 if number == 3 else ""  # a name that needs an extended header
            members = {"png": image(seed=number), "txt": b"an apple", "json": b'{"score": 5}'}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number}{long}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _headers(data: bytes) -> list[int]:
    """Where the headers of a sound tar are."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return sorted({info.offset for info in tar} | {info.offset_data - BLOCK for info in tar})


def header(name: str, size: bytes, kind: bytes) -> bytes:
    """A tar header with a right checksum, whatever it claims."""
    block = bytearray(BLOCK)
    block[0:100] = name.encode("utf-8", "surrogateescape")[:100].ljust(100, b"\0")
    block[124:136] = size[:12].ljust(12, b"\0")
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    return bytes(_summed(block))


def _summed(block: bytearray) -> bytearray:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return block


def _member(name: str, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, b"%011o" % len(data), kind) + data + bytes(-len(data) % BLOCK)


def _make_tar(rng: random.Random, folder: Path) -> tuple[str, Path]:
    data = bytearray(_sound_tar())
    place = rng.choice(_headers(bytes(data)))
    kind = rng.choice(["size", "kind", "checksum", "cut", "record", "name", "content", "blocks", "bits", "start"])
    block = data[place : place + BLOCK]
    if kind == "size":
        block[124:136] = rng.choice(NUMBERS).ljust(12, b"\0")[:12]
        data[place : place + BLOCK] = _summed(block)
    elif kind == "kind":
        block[156:157] = bytes([rng.choice(b"0123456789xgLKSVMND\0z\xff")])
        data[place : place + BLOCK] = _summed(block)
    elif kind == "checksum":
        data[place + rng.randrange(BLOCK)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "record":
        data[place:place] = _member("record", rng.choice(RECORDS), rng.choice([b"x", b"g", b"L", b"K"]))
    elif kind == "name":
        made = b"".join(_member(rng.choice(NAMES), image(seed=9)) for _ in range(rng.choice([1, 2, 5])))
        data[place:place] = made
    elif kind == "content":
        name = rng.choice(["9.png", "9.txt", "9.json", "0.txt", "0.json"])
        data[place:place] = _member(name, rng.choice(CONTENTS)) + _member("9.jpg", image(seed=8, kind="JPEG"))
    elif kind == "blocks":
        other = rng.randrange(0, len(data), BLOCK)
        data[place : place + BLOCK] = data[other : other + BLOCK]
    elif kind == "bits":
        for _ in range(rng.choice([1, 10, 1000])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        data[0:0] = rng.choice([b"\x1f\x8b", b"BZh", b"x" * 100, bytes(BLOCK), bytes(3), b"PK\3\4", *RECORDS[:3]])
    path = folder / "shard.tar"
    path.write_bytes(bytes(data))
    return kind, path


def _use_tar(path: Path) -> None:
    """What a training does at its start: the index, a filter over JSON, captions and the record of the content."""
    from stable_cascade.data import index_samples

    options = {"max_broken_share": 1, "allow_missing_captions": True, "dataset_filters": [["score", "lambda s: True"]]}
    samples = index_samples(str(path), cache_dir=str(path.parent / "cache"), **options)
    assert samples.content["samples"] == len(samples) > 0
    for number in range(len(samples)):
        with contextlib.suppress(ValueError):  # an image that is damaged is left out later, and told then
            samples.read(number)


STEPS = (2, 4)
LINES = (b'{"step": 1}\n{"st', b"\xff" * 50, b"{}\n", b'{"step": 1e400}\n', b"[1]\n", b"", b"[" * 100_000)
FOREIGN = {"step-00000004-good": "mine", "step-best": "mine", "notes.txt": "mine", ".tmp-mine": "mine"}


@cache
def _sound_run() -> Path:
    """A run folder with two checkpoints, a backup and things of others; deleted when the process ends."""
    from stable_cascade.training import checkpoints
    from stable_cascade.training.run_folders import run_folder, step_folder

    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    config = _config(root)
    for step in STEPS:
        tensors = {"outer.weight": torch.full((3, 3), float(step))}
        contents = checkpoints.RunContents(step, 8 * step, tensors, {"optimizer": {}, "scaler": None}, {"ema": {}})
        checkpoints.write_checkpoint(step_folder(run_folder(config), step), contents, config)
    for name, text in FOREIGN.items():
        (run_folder(config) / name).write_text(text)
    return root


def _config(root: Path):
    from tests.toy_run import toy_config

    return toy_config(root, resume="latest_intact")


def _make_run(rng: random.Random, folder: Path) -> tuple[str, Path]:
    shutil.copytree(_sound_run(), folder / "root", symlinks=True)
    (run,) = [path.parent for path in (folder / "root").rglob(f"step-{STEPS[0]:08d}")]
    steps = [run / f"step-{step:08d}" for step in STEPS]
    damaged = steps if rng.random() < 0.5 else steps[1:]
    kind = rng.choice(["record", "record text", "cut", "bits", "gone", "link", "folder", "other", "moved"])
    name = rng.choice(["weights.safetensors", "optimizer.pt", "stateful.pt", "run.json"])
    for step in damaged:
        path = step / name
        if kind == "record":
            (step / "run.json").write_bytes(mutated_json(rng, (step / "run.json").read_bytes())[1])
        elif kind == "record text":
            (step / "run.json").write_bytes(rng.choice(TEXTS))
        elif kind == "cut":
            os.truncate(path, rng.randrange(path.stat().st_size))
        elif kind == "bits":
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        elif kind in ("gone", "link", "folder"):
            path.unlink()
            if kind == "link":
                path.symlink_to(rng.choice(["/dev/zero", "/nowhere", str(path), str(run / "notes.txt")]))
            elif kind == "folder":
                path.mkdir()
        elif kind == "other":
            shutil.copy(run / steps[0].name / "config.yaml", path)
        else:
            step.rename(run / rng.choice(["step-00000009", "step-99999999999999999999", "backup-00000001", "step-x"]))
            break
    (run / "log.jsonl").write_bytes(
        rng.choice([b'{"step": 1}\n{"st', b"\xff" * 50, b"{}\n", b'{"step": 1e400}\n', b"[1]\n"])
    )
    return f"{kind}, {name}", run


def _use_run(run: Path) -> None:
    """What a resumed training does: clears up, takes the newest whole checkpoint, goes on with the log, rotates."""
    from stable_cascade.training import checkpoints, run_folders
    from stable_cascade.training.tracking import LogFile

    config = _config(run.parents[1])
    with run_folders.held(run):
        run_folders.sweep(run)
        found = checkpoints.find_checkpoints(config)
        for folder in found:
            try:
                contents = checkpoints.read_checkpoint(folder, config)
                break
            except checkpoints.DamagedError:
                if folder == found[-1]:
                    raise
        if found:
            assert contents.weights is not None
            assert contents.weights["outer.weight"].eq(contents.step).all(), "weights of another step"
            LogFile(run, contents.step)
            run_folders.rotate(run, 1, folder)
            assert folder.is_dir()
    assert {name: (run / name).read_text() for name in FOREIGN} == FOREIGN


SURFACES = (
    Surface("shard structure", _make_tar, _use_tar, _sound_tar, subjects=("dataset_filters",)),
    Surface("run folder", _make_run, _use_run, _sound_run),
)
