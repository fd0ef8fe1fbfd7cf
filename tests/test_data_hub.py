"""Hugging Face datasets: local folders, with random access and as streams."""

from __future__ import annotations

import json
from itertools import islice

import datasets
import pytest
import torch

from stable_cascade.data import SampleStream, index_samples, with_regularization
from stable_cascade.data.stream import StreamState
from tests.making_shards import batches_of, crops_of, image, undecodable

SIZES = ((40, 30), (30, 40), (36, 36))
SETTINGS = {"image_size": 32, "batch_size": 4, "bucket_factor": 8, "multi_aspect_ratio": ["1/1", "3/4"], "seed": 3}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def saved(tmp_path, *, bad: int | None = None, rows: int = 18) -> str:
    """A folder written by save_to_disk."""
    content = [image(*SIZES[i % 3], seed=i) if i != bad else undecodable() for i in range(rows)]
    columns = {"image": content, "text": [f"caption {i}" for i in range(rows)], "score": list(range(rows))}
    columns["image"] = [{"bytes": data, "path": None} for data in columns["image"]]
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "score": datasets.Value("int64")}
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def take(samples, count, **changes):
    return list(islice(batches_of(samples, **{**SETTINGS, **changes}), count))


def test_saved_dataset(tmp_path):
    samples = index_samples(dataset_name=saved(tmp_path))
    assert len(samples) == 18
    assert samples.key(4) == "saved/4"
    assert samples.read(4) == (image(30, 40, seed=4), "caption 4")
    assert samples.widths.tolist()[:3] == [40, 30, 36]
    first, second = take(samples, 5), take(samples, 5, num_workers=1)
    assert [b.keys for b in first] == [b.keys for b in second]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, second, strict=True))


def test_filters_over_columns(tmp_path):
    name = saved(tmp_path)
    samples = index_samples(dataset_name=name, dataset_filters=[["score", "lambda s: s > 14"]])
    assert [samples.key(i) for i in range(len(samples))] == ["saved/15", "saved/16", "saved/17"]
    assert samples.read(0)[1] == "caption 15"
    wide = index_samples(dataset_name=name, dataset_filters=[["width", "lambda w: w == 40"]])
    assert len(wide) == 6


def test_image_folder(tmp_path):
    for i in range(3):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{i}.png").write_bytes(image(seed=i))
    rows = [{"file_name": f"{i}.png", "text": [f"caption {i}", "other"]} for i in range(3)]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    samples = index_samples(dataset_name=str(tmp_path / "set"))
    assert [samples.read(i)[1] for i in range(3)] == ["caption 0", "caption 1", "caption 2"]


def test_stream_shows_every_row_and_resumes(tmp_path):
    samples = index_samples(dataset_name=saved(tmp_path), streaming=True)
    assert isinstance(samples, SampleStream)
    whole = take(samples, 12)
    assert {key for batch in whole for key in batch.keys} == {f"saved/{i}" for i in range(18)}
    for batch in whole:
        assert batch.captions == [f"caption {key.removeprefix('saved/')}" for key in batch.keys]
    assert_same(whole, take(samples, 12, num_workers=1))
    assert_same(take(samples, 4, start_step=8), whole[8:])
    for step in (1, 7):
        saved_state = StreamState.of(whole[step - 1].after.plain())
        assert_same(take(samples, 12 - step, start_step=step, after=saved_state), whole[step:])
    with pytest.raises(ValueError, match=r"2 processes cannot stream 1 shards.*streaming: false"):
        take(samples, 1, num_processes=2)


def test_each_process_streams_its_own_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("stable_cascade.data.hf_datasets._ROWS_OF_A_LANE", 4)
    samples = index_samples(dataset_name=saved(tmp_path), streaming=True, shuffle_buffer=8)
    assert (samples.shards, samples.lanes) == (4, 4)
    whole = take(samples, 12, multi_aspect_ratio=None)
    assert {key for batch in whole for key in batch.keys} == {f"saved/{i}" for i in range(18)}
    halves = [take(samples, 12, multi_aspect_ratio=None, num_processes=2, process_index=i) for i in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        rows = [row for part in parts for row in zip(part.positions.tolist(), part.keys, strict=True)]
        assert sorted(rows) == list(zip(batch.positions.tolist(), batch.keys, strict=True))
    shown = [{key for batch in half for key in batch.keys} for half in halves]
    assert not shown[0] & shown[1]
    after = StreamState.merged(StreamState.of(half[4].after.plain()) for half in halves)
    assert_same(take(samples, 7, multi_aspect_ratio=None, start_step=5, after=after), whole[5:])


def assert_same(first, second):
    assert [b.keys for b in first] == [b.keys for b in second]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.seeds, b.seeds)
        assert torch.equal(a.positions, b.positions)


def test_stream_filters_and_replaces(tmp_path, caplog):
    name = saved(tmp_path, bad=16)
    samples = index_samples(dataset_name=name, streaming=True, dataset_filters=[["score", "lambda s: s > 13"]])
    (batch,) = take(samples, 1, multi_aspect_ratio=None)
    assert set(batch.keys) <= {"saved/14", "saved/15", "saved/17"}
    assert batch.broken == 1
    assert "saved/16" in caplog.text
    nothing = index_samples(dataset_name=name, streaming=True, dataset_filters=[["score", "lambda s: s > 99"]])
    with pytest.raises(ValueError, match="rejects all of the first 18 samples"):
        take(nothing, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "img"}, r"image_column 'img' is no column .*nearest: 'image'"),
        ({"caption_column": "caption"}, r"caption_column 'caption' is no column"),
        ({"dataset_filters": [["score", "lambda s: s < 0"]]}, r"rejects all of the first 18"),
        ({"webdataset_path": "x.tar"}, "both of them is set"),
    ],
)
def test_refusals(tmp_path, options, words):
    with pytest.raises(ValueError, match=words) as error:
        index_samples(dataset_name=saved(tmp_path), **options)
    assert "\n" not in str(error.value)


def test_missing_dataset(tmp_path):
    with pytest.raises(ValueError, match=r"dataset_name '.*nothing' cannot be loaded") as error:
        index_samples(dataset_name=str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)


def test_broken_rows_are_left_out_or_replaced(tmp_path):
    samples = index_samples(dataset_name=saved(tmp_path, bad=5))
    batches = take(samples, 12)
    assert sum(batch.broken for batch in batches) >= 1
    assert "saved/5" not in {key for batch in batches for key in batch.keys}


def masked(tmp_path) -> str:
    rows = 12
    columns = {
        "image": [{"bytes": image(*SIZES[i % 3], seed=i), "path": None} for i in range(rows)],
        "mask": [{"bytes": image(*SIZES[i % 3], seed=50), "path": None} if i % 2 else None for i in range(rows)],
        "text": [f"caption {i}" if i else None for i in range(rows)],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "text": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.mark.parametrize("streaming", [False, True])
def test_masks_identities_and_missing_captions(tmp_path, streaming):
    options = {"dataset_name": masked(tmp_path), "streaming": streaming, "allow_missing_captions": True}
    samples = index_samples(masks=True, **options)
    batches = take(samples, 9, crop="center")
    named = take(samples, 9, crop="center", decode=False)
    for batch, other in zip(batches, named, strict=True):
        assert other.pixels is None
        assert (other.keys, other.captions, other.identities) == (batch.keys, batch.captions, batch.identities)
        assert batch.weights.tolist() == other.weights.tolist() == [1] * 4
        for key, caption, mask in zip(batch.keys, batch.captions, batch.masks, strict=True):
            row = int(key.split("/")[1])
            assert (mask == 1).all() == (row % 2 == 0)
            assert caption == (f"caption {row}" if row else "")
    assert take(index_samples(**options), 1)[0].masks is None
    with pytest.raises(ValueError, match=r"mask_column 'maske' is no column .*nearest: 'mask'"):
        index_samples(masks=True, mask_column="maske", **options)


def test_stream_and_index_name_the_same(tmp_path):
    name = saved(tmp_path)
    named = [
        {row for batch in take(samples, 12, crop="center") for row in batch.identities}
        for samples in (index_samples(dataset_name=name, streaming=streaming) for streaming in (False, True))
    ]
    assert named[0] & named[1]
    stream = index_samples(dataset_name=name, streaming=True)
    with pytest.raises(ValueError, match="streaming: true has no plan"):
        crops_of(stream, 1, **SETTINGS)
    with pytest.raises(ValueError, match="needs random access"):
        with_regularization(stream, stream, 0.5, 1.0)
