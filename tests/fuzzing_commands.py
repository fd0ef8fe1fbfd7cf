"""Damaged configs and hostile command lines."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path

from tests.fuzzing import Surface
from tests.fuzzing_image_surfaces import make_image, write
from tests.fuzzing_weights import make_anything, warm

CONFIGS = Path(__file__).parents[1] / "examples/configs"
YAML_TEXTS = (
    "", "[]", "3", "a", "a: &a [b]\nc: *a", "a: b: c", "\t", "- a", "{", "!!python/object/apply:os.system ['true']",
    "a: ${oc.env:HOME}", "lr: ${lr}",
    "x: ${", "a: 1\na: 2", "? [a]\n: 3", "%YAML 9.9", "---\na: 1\n---\nb: 2", "a: " + "[" * 1500, "{" * 3000,
    "a: " + "9" * 5000, "lr: .nan",
    "lr: .inf", "b: !!binary x", "2: 3", "null: 4", "a: 2001-13-41", "lr: 0x" + "f" * 5000, "a: 1:2:3:4:5", "\x00",
    "a: \"\\ud800\"", "lr: !!float abc",
    "a: &x [1,1,1,1,1,1,1,1,1,1]\nb: &y [*x,*x,*x,*x,*x,*x,*x,*x,*x,*x]\nc: &z [*y,*y,*y,*y,*y,*y,*y,*y,*y]\n"
    "d: &w [*z,*z,*z,*z,*z,*z,*z,*z,*z]\ne: &v [*w,*w,*w,*w,*w,*w,*w,*w]\nf: &u [*v,*v,*v,*v,*v,*v,*v]\n"
    "g: [*u,*u,*u,*u,*u,*u,*u,*u,*u,*u]",
)  # fmt: skip
YAML_VALUES = ("", "null", "-1", "0", "1e400", ".nan", "[]", "{}", "yes", "'x'", "[[['a']]]", "9" * 400,
               "2001-01-01", "'${batch_size}'", "'lambda s: s' ", "!!str 3",
               "{a: {b: 1}}", "[1, two, 3.0, null]", "'" + "y" * 100_000 + "'", "\"\\e[2J\"", "~",
               "../../etc/passwd", "1_000", "!!set {a}")  # fmt: skip
HOSTILE = ("", " ", "-1", "0", "7", "1e9", "nan", "inf", "a\nb", "x" * 5000, "\0", "--json", "../..", "/dev/null",
           "/proc/self/mem", "/", "[]", "1,2", ",,,",
           "1,2,3,4", "100000,0,0,0", "9" * 5000, "a:b:c:d", ":", ":1", "x:nan", "x:inf", "embedded", "no/such",
           "http://127.0.0.1:9/x", "\x1b[2J", "日本", "%s{}")  # fmt: skip
OPTIONS = {
    "generate": ("--seed", "--height", "--width", "--steps", "--guidance", "--shift", "--negative",
                 "--decoder-steps", "--rescale", "--sampler", "--count",
                 "--batch-size", "--from-image", "--lora", "--model", "--dtype", "--device", "--variant",
                 "--prompts-file", "--sheet", "--live", "--unknown"),
    "img2img": ("--image", "--strength", "--reference", "--controlnet", "--control-image", "--filter", "--width",
                "--from-image"),
    "inpaint": ("--image", "--mask", "--outpaint", "--strength"),
    "control": ("--image", "--controlnet", "--filter", "--show-control"),
    "variation": ("--image", "--controlnet"),
    "reconstruct": ("--prompt", "--steps", "--image"),
    "convert": ("--to", "--component", "--dtype", "--config", "--base", "--module-filters", "--token"),
    "inspect": ("--json", "--unknown"),
    "prepare": ("--shard-size", "--max-broken-share"),
    "nonsense": ("--json",),
}  # fmt: skip


def _make_config(rng: random.Random, folder: Path) -> tuple[str, Path]:
    sound = (CONFIGS / rng.choice(["lora_embedded.yaml", "decoder_embedded.yaml"])).read_text()
    lines = sound.splitlines()
    kind = rng.choice(["text", "value", "value", "value", "line", "bits", "cut"])
    if kind == "text":
        sound = rng.choice(YAML_TEXTS)
    elif kind == "value":
        for _ in range(rng.choice([1, 1, 3])):
            place = rng.choice([place for place, line in enumerate(lines) if ":" in line and not line.startswith("#")])
            lines[place] = f"{lines[place].split(':')[0]}: {rng.choice(YAML_VALUES)}"
        sound = "\n".join(lines)
    elif kind == "line":
        lines.insert(
            rng.randrange(len(lines)),
            rng.choice(["x: 1", "  - a", "lr: 3", "- b", "\tlr: 3", ": :", "&a", "*b", "lr lr", "'"]),
        )
        sound = "\n".join(lines)
    data = bytearray(sound.encode("utf-8", "surrogatepass"))
    if kind == "bits" and data:
        for _ in range(rng.choice([1, 5])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return kind, write(folder, "config.yaml", bytes(data[: rng.randrange(len(data)) if kind == "cut" else None]))


def _use_config(path: Path) -> None:
    from stable_cascade.config import DecoderConfig, LoraConfig, load_config

    load_config(LoraConfig if b"module_filters" in path.read_bytes() else DecoderConfig, [str(path)])


def _make_command(rng: random.Random, folder: Path) -> tuple[str, Path]:
    """A command line with damaged files and hostile values; the file holds it as JSON."""
    images, files = folder / "images", folder / "files"
    images.mkdir(), files.mkdir()
    own = [str(make_image(rng, images)[1]) for _ in range(2)] + [str(make_anything(rng, files)[1])]
    command = rng.choice([*OPTIONS, "inspect", "convert", "img2img"])
    words = [command]
    if command in ("inspect", "reconstruct"):
        words += rng.choices([*own, *own, *HOSTILE], k=rng.choice([1, 1, 2])) + ["--height", "12"] * (
            command == "reconstruct"
        )
    elif command == "convert":
        words += [
            own[2],
            str(folder / "out.safetensors"),
            "--to",
            rng.choice(["diffusers", "original", "comfyui", "peft", "kohya", "onetrainer", "openclip", "x"]),
        ]
    elif command == "prepare":
        places = [str(images), *(word for word in HOSTILE if word not in ("/", "../.."))]  # not this whole machine
        words += [rng.choice(places), str(folder / "shards"), "--allow-missing-captions"]
    else:  # a size that nobody draws, so that no case runs the networks
        words += [rng.choice(["a fox", *HOSTILE]), "--height", "12", "--output", str(folder / "out")]
    for _ in range(rng.choice([0, 1, 1, 2])):
        words += [rng.choice(OPTIONS[command]), rng.choice([*own, *HOSTILE])]
    if command in ("img2img", "inpaint", "variation", "control") and rng.random() < 0.5:
        words += ["--image", rng.choice(own)]
        words = [word for word in words if word not in ("--height", "12")]
        words += (
            ["--controlnet", own[2]]
            if rng.random() < 0.5
            else ["--lora", own[2]]
            if rng.random() < 0.5
            else ["--strength", "2"]
        )
    return " ".join(words)[:200], write(folder, "command.json", json.dumps(words).encode())


def _load_commands() -> None:
    import stable_cascade.cli.main
    import stable_cascade.drawing.session
    import stable_cascade.pipelines.text_to_image  # noqa: F401

    warm()


def _use_command(path: Path) -> None:
    """Runs it in this process: status 0, or 2 with one line that says why, in JSON too where that was asked for."""
    from stable_cascade.cli.main import main

    words, out, err = json.loads(path.read_bytes()), io.StringIO(), io.StringIO()
    words = [word.replace("\0", "") if word == "\0" else word for word in words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(words)
    except SystemExit as stopped:  # argparse
        status = stopped.code
    lines = err.getvalue().splitlines()
    assert status in (0, 2), status
    assert "Traceback" not in err.getvalue()
    if status == 2:
        told = [line for line in lines if ": error: " in line]
        assert len(told) == 1, lines
        assert told[0] == lines[-1], lines
        if "--json" in words:
            assert json.loads(out.getvalue())["error"]
        raise ValueError(told[0])


SURFACES = (
    Surface("config file", _make_config, _use_config, subjects=("Config",)),
    Surface("command", _make_command, _use_command, _load_commands, names_file=False, address_space=12 * 2**30),
)
