"""From shards to an index: what is found, remembered, and refused."""

from __future__ import annotations

import logging
import os
import tarfile

import pytest

from stable_cascade.data import SampleIndex, index_samples
from stable_cascade.data.locations import shard_locations
from tests.making_shards import image, undecodable, write_shard, write_tar


def indexed(path, tmp_path, **options) -> SampleIndex:
    samples = index_samples(str(path), cache_dir=str(tmp_path / "cache"), **options)
    assert isinstance(samples, SampleIndex)
    return samples


def refused(path, tmp_path, **options) -> str:
    """The one-line message of the error."""
    with pytest.raises(ValueError) as error:
        indexed(path, tmp_path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_index(tmp_path):
    samples = indexed(write_shard(tmp_path / "a.tar", 5), tmp_path)
    assert len(samples) == 5
    assert samples.widths.tolist() == [40, 30, 36, 40, 30]
    assert samples.heights.tolist() == [30, 40, 36, 30, 40]
    assert samples.key(1) == "a.tar/0001"
    assert samples.read(3) == (image(40, 30, seed=3), "caption 3")
    assert str(samples.report) == "5 samples in 1 shards"


def test_forms_of_webdataset_path(tmp_path):
    paths = [str(write_shard(tmp_path / f"s-{i:03}.tar", 1)) for i in range(3)]
    (tmp_path / "notes.txt").write_text("x")
    folder = str(tmp_path)
    assert shard_locations(paths[0]) == paths[:1]
    assert shard_locations(f"file:{paths[0]}") == paths[:1]
    assert shard_locations(f"file://{paths[0]}") == paths[:1]
    assert shard_locations(folder) == paths
    assert shard_locations(f"file:{folder}/s-{{000..002}}.tar") == paths
    assert shard_locations(f"{folder}/s-{{002,000}}.tar") == [paths[2], paths[0]]
    assert shard_locations(f"{folder}/s-*.tar") == paths
    assert shard_locations([paths[1], folder]) == [paths[1], paths[0], paths[2]]
    assert shard_locations("https://host/x-{0..1}.tar") == ["https://host/x-0.tar", "https://host/x-1.tar"]
    assert shard_locations("s3://bucket/x.tar") == ["s3://bucket/x.tar"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("missing.tar", "does not exist; nearest: '{folder}/mising.tar'"),
        ("nofolder/x.tar", "does not exist either"),
        ("empty", "the folder holds no .tar"),
        ("y-*.tar", "the pattern holds no .tar"),
        ("x-{000..", "unbalanced braces"),
    ],
)
def test_nothing_there(tmp_path, entry, words):
    write_shard(tmp_path / "mising.tar", 1)
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / entry, tmp_path)
    assert message.startswith(f"webdataset_path '{tmp_path}")
    assert words.format(folder=tmp_path) in message


def test_commands_and_unknown_schemes_are_refused(tmp_path):
    for place, words in (("pipe:cat x.tar", "commands are not run"), ("ftpx://host/x.tar", "ftpx")):
        with pytest.raises(ValueError, match=words):
            index_samples(place, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="webdataset_path is empty"):
        index_samples([])
    with pytest.raises(ValueError, match="either webdataset_path or dataset_name; neither"):
        index_samples()


def test_not_a_tar(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(image(200, 200))
    assert f"shard '{path}' is not a tar" in refused(path, tmp_path)
    path.write_bytes(b"")
    assert "is not a tar: empty file" in refused(path, tmp_path)
    path.write_bytes(b"\x1f\x8b" + bytes(600))
    assert "compressed with gzip" in refused(path, tmp_path)


@pytest.mark.parametrize("where", ["in a member", "between members", "in a header", "without end"])
def test_truncated_tar(tmp_path, where):
    path = write_shard(tmp_path / "a.tar", 4)
    with tarfile.open(path) as tar:
        member, last = tar.getmembers()[6], tar.getmembers()[-1]
    end = {
        "in a member": member.offset_data + 10,
        "between members": member.offset,
        "in a header": member.offset + 100,
        "without end": last.offset_data + 512,
    }[where]
    with path.open("r+b") as file:
        file.truncate(end)
    assert f"shard '{path}' is truncated" in refused(path, tmp_path)


def test_damaged_header(tmp_path):
    path = write_shard(tmp_path / "a.tar", 4)
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[6].offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"damage")
    assert f"the header at byte {offset} is invalid" in refused(path, tmp_path)


def test_tar_without_images(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.txt": "x", "0.npy": b"x"})
    assert "holds no images (members: npy, txt)" in refused(path, tmp_path)


def test_members_and_keys(tmp_path):
    """A tarred folder, upper case, shadows of macOS, a mask beside the image, members in any order."""
    members = {
        "set/b.txt": "b",
        "set/a.JPG": image(8, 9, kind="JPEG"),
        "set/._a.jpg": b"shadow",
        "set/b.mask.png": image(1, 1),
        "set/b.png": image(10, 11),
        "set/a.txt": "a",
    }
    samples = indexed(write_tar(tmp_path / "a.tar", members), tmp_path)
    found = {samples.key(i): (int(samples.widths[i]), samples.read(i)[1]) for i in range(len(samples))}
    assert found == {"a.tar/set/a": (8, "a"), "a.tar/set/b": (10, "b")}
    twice = write_tar(tmp_path / "b.tar", {"a.1.png": image(), "a.2.png": image()})
    assert "two images share the sample key 'a'" in refused(twice, tmp_path)


def test_shards_of_the_same_name(tmp_path):
    for name in ("x", "y"):
        write_shard(tmp_path / name / "0.tar", 1)
    samples = index_samples([str(tmp_path / "x"), str(tmp_path / "y")], cache_dir=str(tmp_path / "c"))
    assert [samples.key(i) for i in range(2)] == ["x/0.tar/0000", "y/0.tar/0000"]


def test_captions_from_json(tmp_path):
    path = write_shard(tmp_path / "a.tar", 2)
    assert indexed(path, tmp_path, captions_getter="caption").read(1)[1] == "json 1"
    getter = ["json", "lambda j: j['caption'] + '!'"]
    assert indexed(path, tmp_path, captions_getter=getter).read(1)[1] == "json 1!"
    message = refused(path, tmp_path, captions_getter="captoin")
    assert "2 of 2 samples have no caption" in message
    assert "a.tar/0000" in message


def test_missing_captions(tmp_path):
    members = {"0.png": image(), "0.txt": "x", "1.png": image(), "2.png": image()}
    path = write_tar(tmp_path / "a.tar", members)
    assert "2 of 3 samples have no caption under captions_getter 'txt:identity'" in refused(path, tmp_path)
    samples = indexed(path, tmp_path, allow_missing_captions=True)
    assert [samples.read(i)[1] for i in range(3)] == ["x", "", ""]
    assert samples.report.uncaptioned == 2


def test_filters(tmp_path):
    path = write_shard(tmp_path / "a.tar", 9)
    filters = [["score", "lambda s: s > 2"], ["width", "lambda w: w >= 36"]]
    samples = indexed(path, tmp_path, dataset_filters=filters)
    assert [samples.key(i) for i in range(len(samples))] == [f"a.tar/{i:04}" for i in (3, 5, 6, 8)]
    assert samples.read(1)[1] == "caption 5"
    assert samples.report.rejected == {"score: lambda s: s > 2": 3, "width: lambda w: w >= 36": 3}
    message = refused(path, tmp_path, dataset_filters=[["score", "lambda s: s > 99"]])
    assert "dataset_filters ['score', 'lambda s: s > 99'] rejects all" in message
    assert "score = 0" in message
    nothing = [["score", "lambda s: s > 4"], ["score", "lambda s: s < 4"]]
    assert "dataset_filters leave none of 9 samples" in refused(path, tmp_path, dataset_filters=nothing)


@pytest.mark.parametrize("text", ["lambda s: print(s)", "lambda s: s.real > 1"])
def test_filter_with_call_or_attribute_is_refused_before_any_shard_is_read(tmp_path, text):
    with pytest.raises(ValueError, match=r"dataset_filters 'score': .* is refused: the (call|attribute)"):
        index_samples("/nowhere.tar", dataset_filters=[["score", text]], cache_dir=str(tmp_path))


def test_unreadable_headers_are_left_out_and_reported(tmp_path, caplog):
    members = {f"{i}.png": image(seed=i) if i else b"no image" for i in range(10)}
    members |= {f"{i}.txt": "x" for i in range(10)}
    path = write_tar(tmp_path / "a.tar", members)
    with caplog.at_level(logging.WARNING):
        samples = indexed(path, tmp_path)
    assert len(samples) == 9
    assert "1 left out (for example a.tar/0: no readable image: its bytes are of no kind" in caplog.text
    message = refused(path, tmp_path, max_broken_share=0.05)
    assert "1 of 10 samples cannot be used, more than max_broken_share 0.05 (for example a.tar/0: no read" in message
    whole = write_tar(tmp_path / "b.tar", {"0.png": undecodable(), "0.txt": "x"})
    assert len(indexed(whole, tmp_path)) == 1, "the index reads headers only"


def test_damaged_json_counts_as_unreadable(tmp_path):
    members = {"0.png": image(), "0.json": "{", "1.png": image(), "1.json": {"score": 1}}
    path = write_tar(tmp_path / "a.tar", members)
    options = {"dataset_filters": [["score", "identity"]], "max_broken_share": 0.5, "allow_missing_captions": True}
    samples = indexed(path, tmp_path, **options)
    assert [samples.key(i) for i in range(len(samples))] == ["a.tar/1"]
    assert samples.report.unreadable == 1


def test_cache(tmp_path):
    """A second index reads no shard; a changed shard is read again; a damaged cache file is no harm."""
    path = write_shard(tmp_path / "a.tar", 3)
    first = indexed(path, tmp_path)
    files = list((tmp_path / "cache").iterdir())
    assert [file.suffix for file in files] == [".npz"]
    stat = path.stat()
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert indexed(path, tmp_path).fingerprint == first.fingerprint
    write_shard(path, 4)
    assert len(indexed(path, tmp_path)) == 4
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert len(indexed(path, tmp_path)) == 4


def test_cache_that_cannot_be_written(tmp_path):
    path = write_shard(tmp_path / "a.tar", 3)
    (tmp_path / "file").write_text("in the way")
    samples = index_samples(str(path), cache_dir=str(tmp_path / "file" / "cache"))
    assert isinstance(samples, SampleIndex)
    assert len(samples) == 3


def test_shard_that_shrinks_later(tmp_path):
    path = write_shard(tmp_path / "a.tar", 3)
    samples = indexed(path, tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match="ends early"):
        samples.read(2)
