"""What a run tells: the trackers' own files read back, and that no credential is in any of them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, PngImagePlugin

from stable_cascade.config import SemanticEncoderConfig, load_config, run_main
from stable_cascade.data import index_samples
from stable_cascade.redaction import bare_address, redacted
from stable_cascade.training import preview_sheet
from stable_cascade.training.sheets import sheet_images
from tests.test_data_remote import RangeHandler, server  # noqa: F401
from tests.toy_run import toy_config, toy_train
from tests.trainer_runs import ROOT, write_images


@pytest.fixture
def offline(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")


def draw(folder: Path, model, step: int, ema) -> list[Path]:
    """A sheet of two rows whose second says which step it is."""
    rows = [("images", torch.zeros(2, 3, 32, 32)), ("samples", torch.full((2, 3, 32, 32), step / 255))]
    return [preview_sheet(rows, folder / f"step-{step:08d}.png", captions=["a red cat", "an owl"], cell=96)]


def wandb_records(folder: Path) -> list:
    """Every record of an offline run, once wandb's own process has written the last one."""
    (file,) = folder.rglob("run-*.wandb")
    for _ in range(300):
        records = list(records_of(file))
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    return records


def records_of(file: Path):
    """The whole records of a file: protobuf messages in LevelDB's log format, blocks of 32 KiB after a header."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, []
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts.append(content[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def table_artifacts(folder: Path) -> tuple[dict[int, dict], dict[str, str]]:
    """The tables of an offline run by their step, and where the files lie that they name."""
    tables, files = {}, {}
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact"):
            manifest = record.request.log_artifact.artifact.manifest
        elif record.WhichOneof("record_type") == "artifact":
            manifest = record.artifact.manifest
        else:
            continue
        for entry in manifest.contents:
            files[entry.path] = entry.local_path
            if entry.path.endswith(".table.json"):
                table = json.loads(Path(entry.local_path).read_text())
                tables[table["data"][0][0]] = table
    return tables, files


def key_of(item) -> str:
    return item.key or "/".join(item.nested_key)


def test_wandb_has_figures_sheets_and_a_table_of_images(tmp_path, offline):
    config = toy_config(tmp_path, tracker="wandb", wandb_project="toy", updates=8)
    toy_train(config, preview_fn=draw)
    history = [
        {key_of(item): json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(tmp_path)
        if record.WhichOneof("record_type") == "history"
    ]
    losses = [values["loss"] for values in history if "loss" in values]
    lines = [json.loads(line) for line in (tmp_path / "toy/log.jsonl").read_text().splitlines()]
    assert losses == [line["loss"] for line in lines]
    for values, line in zip([values for values in history if "loss" in values], lines, strict=True):
        for middle, loss in line["loss_by_log_snr"].items():
            assert values[f"loss_by_log_snr/{middle}"] == loss
    tables, images = table_artifacts(tmp_path)
    assert sorted(tables) == [4, 8]
    assert tables[8]["columns"] == ["step", "prompt", "row", "image"]
    assert [row[:3] for row in tables[8]["data"]] == [
        [8, "a red cat", "images"], [8, "an owl", "images"], [8, "a red cat", "samples"], [8, "an owl", "samples"],
    ]  # fmt: skip
    shown = Image.open(images[tables[8]["data"][2][3]["path"]])
    assert shown.size == (96, 96)
    assert shown.convert("RGB").getpixel((48, 48)) == (8, 8, 8)
    media = {key.removesuffix("/_type"): kind for key, kind in history[-1].items() if key.endswith("/_type")}
    assert media == {
        "previews": "images/separated", "previews/table": "table-file", "loss_by_noise": "images/separated",
    }  # fmt: skip


def test_tensorboard_has_figures_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy_train(toy_config(tmp_path, tracker="tensorboard", updates=8), preview_fn=draw)
    folder = max(tmp_path.rglob("events.out.tfevents*"), key=lambda path: path.stat().st_size).parent
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "toy/log.jsonl").read_text().splitlines()]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]
    middle = next(iter(lines[0]["loss_by_log_snr"]))
    assert events.Scalars(f"loss_by_log_snr/{middle}")[0].value == pytest.approx(lines[0]["loss_by_log_snr"][middle])
    sheets = events.Images("previews")
    assert [event.step for event in sheets] == [4, 8]
    seen = Image.open(io.BytesIO(sheets[1].encoded_image_string)).convert("RGB")
    assert np.array_equal(np.asarray(seen), np.asarray(Image.open(tmp_path / "toy/step-00000008.png")))
    assert [event.step for event in events.Images("loss_by_noise")] == [4, 8]


def test_sheet_gives_its_images_back(tmp_path):
    rows = [("images", torch.zeros(2, 3, 16, 16)), ("samples", torch.ones(1, 3, 16, 16))]
    path = preview_sheet(rows, tmp_path / "sheet.png", captions=["ein Bär", "b"], cell=96)
    found = [(entry.row, entry.caption, entry.image.getcolors()) for entry in sheet_images(path)]
    black, white = [(96 * 96, (0, 0, 0))], [(96 * 96, (255, 255, 255))]
    assert found == [("images", "ein Bär", black), ("images", "b", black), ("samples", "ein Bär", white)]
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    assert sheet_images(tmp_path / "other.png") == []


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("[]", "an object in braces is needed"),
        ('{"cell": ' + "[" * 100_000, "nests its brackets too deeply"),
        ('{"cell": 8}', "damaged layout"),
        (
            '{"cell": 8, "margin": 0, "left": 0, "captions": [], "rows": [["a", 1000000000]]}',
            "smaller than its layout",
        ),
        (
            '{"cell": 0, "margin": 0, "left": 0, "captions": [], "rows": [["a", 1000000000]]}',
            "smaller than its layout",
        ),
    ],
)
def test_a_sheet_with_a_false_layout_is_refused(tmp_path, layout, message):
    note = PngImagePlugin.PngInfo()
    note.add_itxt("stable-cascade-sheet", layout)
    Image.new("RGB", (16, 16)).save(tmp_path / "sheet.png", pnginfo=note)
    with pytest.raises(ValueError, match=message):
        sheet_images(tmp_path / "sheet.png")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://me:pw@host.org/a/x.tar", "https://***@host.org/a/x.tar"),
        ("https://me:p@w@host.org/x.tar", "https://***@host.org/x.tar"),
        ("https://host.org/x-{000..003}.tar?X-Amz-Signature=abc&b=c#d", "https://host.org/x-{000..003}.tar?***"),
        ("s3://key:word@bucket/a/,http://u:p@host/b", "s3://***@bucket/a/,http://***@host/b"),
        ("shard 'http://u:p@h/x?y=z' is gone; try again", "shard 'http://***@h/x?***' is gone; try again"),
        ("GET /x.tar?X-Amz-Signature=abc&X-Amz-Date=1", "GET /x.tar?X-Amz-Signature=***&X-Amz-Date=1"),
        ("token hf_abcdefghijklmnopqrst and AKIAABCDEFGHIJKLMNOP", "token *** and ***"),
        ("Authorization: Bearer abcdefghijklmnopqrst", "Authorization: Bearer ***"),
        ("file:/data/x.tar", "file:/data/x.tar"),
        ("/data/what?.tar", "/data/what?.tar"),
        ("a photo of a cat: is it? yes", "a photo of a cat: is it? yes"),
        ("^dog</w>", "^dog</w>"),
        ("lambda s: s > 4.5", "lambda s: s > 4.5"),
    ],
)
def test_redaction_of_text(text, wanted):
    assert redacted(text) == wanted
    assert redacted(wanted) == wanted, "twice is once"


def test_redaction_of_settings():
    values = {
        "train_tokens": [["[ink]", "^x"]], "token_lr": 1e-4, "params": {"api_key": "k", "token": "t", "size": 3},
        "paths": ("http://u:p@h/x", "/a"), "none": None, "password": "",
    }  # fmt: skip
    assert redacted(values) == values | {
        "params": {"api_key": "***", "token": "***", "size": 3}, "paths": ("http://***@h/x", "/a"),
    }  # fmt: skip
    assert bare_address("https://me:pw@host/x.tar?a=b") == "https://host/x.tar"
    assert bare_address("/data/what?.tar") == "/data/what?.tar"


SECRETS = ("hunter2", "0ddba11", "hf_donttellanybody1234")


def files_with_secrets(folder: Path) -> list[str]:
    """Files below a folder that hold a credential, as they are or in a zip or gzip that shows its text."""
    return [
        f"{path}: {secret}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for secret in SECRETS
        if secret.encode() in path.read_bytes()
    ]


def train_from_shards() -> None:
    """What the tests run as a process of its own: indexes real shards, then trains the toy."""
    config = load_config(SemanticEncoderConfig)
    index = index_samples(config.webdataset_path, cache_dir=config.cache_dir)
    print(f"the first of {len(index)} samples is {index.key(0)}")
    toy_train(config, after_step=None)


def arguments_of(folder: Path, place: str, **changes) -> list[str]:
    values = {
        "experiment_id": "run", "checkpoint_path": folder / "runs", "output_path": folder / "out", "image_size": 32,
        "batch_size": 8, "model_version": "embedded", "log_every": 1, "webdataset_path": place, **changes,
    }  # fmt: skip
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


@pytest.mark.slow
def test_no_file_and_no_line_of_a_training_holds_a_credential(tmp_path, server):  # noqa: F811
    """A training as its own process, from a signed address given on the command line; then it is resumed."""
    write_images(server.folder / "images.tar")
    place = f"http://127.0.0.1:{server.server_port}/images.tar"
    written = tmp_path / "written"
    written.mkdir()
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(written), "TMPDIR": str(written),
        "HF_TOKEN": SECRETS[2], "WANDB_MODE": "offline",
    }  # fmt: skip

    def run(signature: str, updates: int) -> str:
        more = {"wandb_project": "p", "tracker": "all", "cache_dir": written / "cache", "updates": updates}
        arguments = arguments_of(written, f"{place}?X-Amz-Signature={signature}", **more)
        program = [sys.executable, __file__, *arguments]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    told = run(SECRETS[1], 2)
    assert "samples is images.tar/000" in told
    told += run(f"{SECRETS[1]}-renewed", 3)
    assert "resuming after step 2" in told
    record = yaml.safe_load((written / "runs/run/step-00000003/config.yaml").read_text())
    assert record["webdataset_path"] == f"{place}?***"
    assert list(written.rglob("*.wandb"))
    assert files_with_secrets(written) == []
    assert not [secret for secret in SECRETS if secret in told]


def test_errors_hold_no_credentials(tmp_path, capsys):
    config = load_config(
        SemanticEncoderConfig,
        arguments_of(tmp_path, "http://me:hunter2@127.0.0.1:9/x.tar?X-Amz-Signature=0ddba11", updates=1),
    )
    with pytest.raises(SystemExit):
        run_main(lambda: index_samples(config.webdataset_path))
    told = capsys.readouterr().err
    assert "http://***@127.0.0.1:9/x.tar?***" in told
    assert not [secret for secret in SECRETS if secret in told]


def test_another_data_address_is_still_another_setting(tmp_path):
    def train(place: str, updates: int) -> None:
        toy_train(load_config(SemanticEncoderConfig, arguments_of(tmp_path, place, updates=updates)), after_step=None)

    train("https://me:hunter2@host/x.tar?sig=0ddba11", 2)
    train("https://other:hunter2@host/x.tar?sig=renewed", 3)
    with pytest.raises(ValueError, match=r"webdataset_path was 'https://\*\*\*@host/x.tar") as caught:
        train("https://me:hunter2@host/y.tar?sig=0ddba11", 4)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]
    assert files_with_secrets(tmp_path / "runs") == []


if __name__ == "__main__":
    run_main(train_from_shards)
