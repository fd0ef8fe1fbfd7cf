"""`stable-cascade prepare`: a folder of images and captions becomes shards that train."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from stable_cascade.cli.main import main
from stable_cascade.data import index_samples, prepare_shards
from tests.making_shards import image, undecodable


def folder_of(path: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


HIDDEN = "left out: 1 files and folders are hidden, their names begin with a dot, for example .hidden"


@pytest.fixture
def folder(tmp_path) -> Path:
    files: dict[str, bytes | str] = {
        "a.png": image(20, 10, seed=1),
        "a.txt": "from txt\n",
        "a.json": json.dumps({"score": 5, "text": "not this"}),
        "b.png": image(seed=2),
        "b.json": json.dumps({"caption": "from json", "score": 7}),
        "sub/c.one.JPG": image(seed=3, kind="JPEG"),
        "sub/d.webp": image(seed=4, kind="WEBP"),
        "e.png": image(seed=5),
        "metadata.csv": "file_name,text,score\nsub/c.one.JPG,from csv,1.5\n",
        "sub/metadata.jsonl": json.dumps({"file_name": "d.webp", "text": "from jsonl", "tags": ["x"]}),
        "captions.csv": "file_name,text\ne.png,from captions\n",
        "notes.md": "x",
        ".hidden/z.png": image(),
    }
    return folder_of(tmp_path / "in", files)


def test_captions_and_metadata(folder, tmp_path):
    report = prepare_shards(folder, tmp_path / "out")
    assert str(report) == f"wrote 5 samples in 1 shards\n{HIDDEN}"
    samples = index_samples(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    found = {samples.key(i): samples.read(i)[1] for i in range(len(samples))}
    assert found == {
        "00000.tar/a": "from txt",
        "00000.tar/b": "from json",
        "00000.tar/e": "from captions",
        "00000.tar/sub/c_one": "from csv",
        "00000.tar/sub/d": "from jsonl",
    }
    assert samples.read(0)[0] == (folder / "a.png").read_bytes()
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        extra = {m.name: json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")}
    assert extra == {
        "a.json": {"score": 5, "text": "not this"},
        "b.json": {"score": 7},
        "sub/c_one.json": {"score": 1.5},
        "sub/d.json": {"tags": ["x"]},
    }
    filters = [["score", "lambda s: s > 4"]]
    assert len(index_samples(str(tmp_path / "out"), dataset_filters=filters, cache_dir=str(tmp_path / "cache"))) == 2


def test_same_folder_same_bytes(folder, tmp_path):
    first = prepare_shards(folder, tmp_path / "x", shard_size=2).shards
    for path in folder.rglob("*.*"):
        path.touch()
    second = prepare_shards(folder, folder / "out", shard_size=2).shards
    assert len(first) == 3
    assert [Path(p).name for p in first] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [Path(p).read_bytes() for p in first] == [Path(p).read_bytes() for p in second]
    with tarfile.open(first[0]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}


def test_overwriting(folder, tmp_path):
    out = tmp_path / "out"
    prepare_shards(folder, out, shard_size=1)
    with pytest.raises(ValueError, match="holds shards already"):
        prepare_shards(folder, out)
    prepare_shards(folder, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["00000.tar"]


def test_images_of_the_same_stem(tmp_path):
    files = {"a.jpg": image(kind="JPEG"), "a.png": image(), "a.txt": "both"}
    prepare_shards(folder_of(tmp_path / "in", files), tmp_path / "out")
    samples = index_samples(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert [samples.key(i) for i in range(2)] == ["00000.tar/a", "00000.tar/a-2"]


def test_broken_images_are_left_out_and_reported(folder, tmp_path, capsys):
    folder_of(folder, {"bad.png": undecodable(), "bad.txt": "x"})
    status = main(["prepare", str(folder), str(tmp_path / "out"), "--max-broken-share", "0.2"])
    assert status == 0
    printed = capsys.readouterr().out
    assert "wrote 5 samples in 1 shards" in printed
    assert f"left out 1 broken images:\n  {folder}/bad.png: cannot decode" in printed
    assert f"webdataset_path: {tmp_path}/out" in printed
    status = main(["prepare", str(folder), str(tmp_path / "other")])
    assert status == 2
    assert "1 of 6 images are broken, more than max_broken_share 0.1" in capsys.readouterr().err
    assert not list((tmp_path / "other").iterdir()), "a failed run leaves nothing"


def test_missing_captions(tmp_path, capsys):
    source = folder_of(tmp_path / "in", {"a.png": image(), "a.txt": "x", "b.png": image()})
    assert main(["prepare", str(source), str(tmp_path / "out")]) == 2
    assert f"1 of 2 images have no caption, for example {source}/b.png" in capsys.readouterr().err
    assert main(["prepare", str(source), str(tmp_path / "out"), "--allow-missing-captions"]) == 0
    assert "1 of them have no caption" in capsys.readouterr().out
    samples = index_samples(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert [samples.read(i)[1] for i in range(2)] == ["x", ""]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "is no folder"),
        ({"a.txt": "x"}, "holds no images"),
        ({"a.png": b"x", "metadata.csv": "name,text\na.png,x\n"}, "row 1 has no file_name (name, text)"),
        ({"a.png": b"x", "metadata.csv": "file_name,text\nb.png,x\n"}, "names 1 images that do not exist"),
        ({"a.png": b"x", "metadata.jsonl": "{\n"}, "line 1 is no JSON object"),
        ({"a.png": b"x", "a.json": "[1]"}, "holds no JSON object"),
        ({"a.png": b"x", "a.txt": "x"}, "1 of 1 images are broken"),
    ],
)
def test_refusals(tmp_path, files, words, capsys):
    assert main(["prepare", str(folder_of(tmp_path / "in", files)), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.startswith("stable-cascade prepare: error: ")
    assert printed.count("\n") == 1


def test_command_line(folder, tmp_path):
    command = [sys.executable, "-m", "stable_cascade.cli.main"]
    shown = subprocess.run([*command, "prepare", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--shard-size" in shown
    wrong = subprocess.run([*command, "prepar"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "prepare" in wrong.stderr


def test_masks(folder, tmp_path):
    mask = image(20, 10, seed=9)
    folder_of(folder, {"a.mask.png": mask, "sub/d.mask.webp": image(seed=8, kind="WEBP")})
    report = prepare_shards(folder, tmp_path / "out")
    assert str(report) == f"wrote 5 samples in 1 shards\n2 of them have a mask\n{HIDDEN}"
    samples = index_samples(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), masks=True)
    assert len(samples) == 5
    assert samples.report.masked == 2
    assert samples.mask(0) == mask
    assert [samples.mask(i) is None for i in range(5)] == [False, True, True, True, False]
    (folder / "a.mask.png").write_bytes(undecodable())
    report = prepare_shards(folder, tmp_path / "again", max_broken_share=0.5)
    assert "a.png: its mask: cannot decode" in report.broken[0]
    (folder / "lone.mask.png").write_bytes(mask)
    with pytest.raises(ValueError, match=r"1 masks have no image beside them, for example .*lone\.mask\.png"):
        prepare_shards(folder, tmp_path / "never")
