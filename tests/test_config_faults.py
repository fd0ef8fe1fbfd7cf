"""Configs from strangers: nothing of the environment gets in, nothing grows without bound, numbers have ranges."""

import json
from dataclasses import fields
from typing import get_args

import pytest

from stable_cascade.config import LoraConfig, load_config
from stable_cascade.config.fields import REQUIRED, kinds
from stable_cascade.config.settings import TRAINERS

PLAIN = {
    "experiment_id": "a", "checkpoint_path": "runs", "output_path": "out", "updates": 1, "batch_size": 1,
    "image_size": 64, "model_version": "1B", "webdataset_path": "a.tar", "rank": 2,
}  # fmt: skip


def refused(tmp_path, text, *arguments):
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        load_config(LoraConfig, [str(tmp_path / "c.yaml"), *arguments])
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def plain(**changes):
    return "\n".join(f"{key}: {value}" for key, value in {**PLAIN, **changes}.items())


@pytest.mark.parametrize(
    "form", ["${oc.env:CANARY}", "x${oc.env:CANARY,none}", "${oc.decode:'1'}", "${ oc.env:CANARY}"]
)
def test_variables_of_the_environment_are_refused_by_name(tmp_path, monkeypatch, form):
    monkeypatch.setenv("CANARY", "s3cret-value")
    told = refused(tmp_path, plain(wandb_project=f'"{form}"'))
    assert "asks for something outside of the config" in told
    assert "s3cret" not in told
    told = refused(tmp_path, plain(), f"--wandb_project={form}")
    assert "command line: wandb_project" in told
    assert "s3cret" not in told


def test_references_to_other_keys_stay(tmp_path):
    (tmp_path / "c.yaml").write_text(plain(output_path="${checkpoint_path}/out"))
    assert load_config(LoraConfig, [str(tmp_path / "c.yaml")]).output_path == "runs/out"


def test_bombs_of_references_and_aliases_are_refused(tmp_path):
    lines = ["a: &a0 0123456789"] + [f"x{n}: '{f'${{x{n - 1}}}' * 9}'" for n in range(1, 30)]
    told = refused(tmp_path, plain() + "\nx0: '0123456789'\n" + "\n".join(lines[1:]))
    assert "a text of it means more than 1,048,576 characters" in told
    nested = "\n".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 12))
    assert "entries" in refused(tmp_path, plain() + "\nb0: &b0 [1]\n" + nested)
    assert "not readable as YAML" in refused(tmp_path, plain() + "\na: " + "[" * 5000)
    assert "nested more than" in refused(tmp_path, plain() + "\na: " + "[" * 60 + "]" * 60)
    assert "not readable" in refused(tmp_path, plain() + "\na: '${b}'\nb: '${a}'")


def test_size_and_encoding(tmp_path):
    assert "bytes; at most 1,048,576 are read" in refused(tmp_path, plain() + "\n# " + "x" * 1_100_000)
    (tmp_path / "u.yaml").write_bytes(plain().encode("utf-16"))
    assert load_config(LoraConfig, [str(tmp_path / "u.yaml")]).rank == 2
    assert "neither UTF-8 nor UTF-16" in refused(tmp_path, plain(wandb_project="gr\xfcn").encode("latin-1"))


NUMBERS = sorted(
    {
        (cls, field.name)
        for cls in TRAINERS
        for field in fields(cls)
        if {int, float} & {kinds(cls)[field.name], *get_args(kinds(cls)[field.name])}
    },
    key=lambda pair: (pair[0].__name__, pair[1]),
)


def fitting(kind):
    return 64 if kind is int else "[1]" if "list" in str(kind) else "a"


@pytest.mark.parametrize("value", ["1000000000000", "-1000000000000", "1e400", "nan", ".inf", "9" * 5000])
def test_every_number_has_a_range(value):
    """Each is refused by its own name, not by what is missing beside it."""
    for cls, key in NUMBERS:
        required = [field.name for field in fields(cls) if field.default == REQUIRED and field.name != key]
        arguments = [f"--{name}={fitting(kinds(cls)[name])}" for name in required]
        if key == "seed" and value.lstrip("-").isdigit() and len(value) < 20:
            continue  # any number is a seed
        with pytest.raises(ValueError) as caught:
            load_config(cls, [*arguments, f"--{key}={value}"])
        assert key in str(caught.value), (cls.__name__, key, str(caught.value))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ".", "a\\b", "a\x1b[31m", "a\nb"])
def test_an_experiment_is_the_name_of_one_folder(tmp_path, name):
    told = refused(tmp_path, plain(experiment_id=json.dumps(name)))
    assert "must be the name of one folder" in told
    assert told.isprintable()
