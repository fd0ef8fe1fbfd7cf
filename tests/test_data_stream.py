"""Streams: lanes of shards read while training, the same for any processes and workers, resumable anywhere."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from stable_cascade.data import Plan, SampleStream, index_samples, shard_lanes, training_batches
from stable_cascade.data.lanes import check_lanes, lane_count, shard_of
from stable_cascade.data.stream import StreamState
from tests.making_shards import undecodable

SIZES = ((64, 64), (96, 48), (48, 96))


def jpeg(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def shards(folder, count=8, samples=6, bad=(), sizes=SIZES):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        with tarfile.open(folder / f"{number:03}.tar", "w") as tar:
            for i in range(samples):
                name, seed = f"{number:03}{i:03}", number * 100 + i
                data = b"\xff\xd8\xff no image" if (number, i) in bad else jpeg(*sizes[seed % len(sizes)], seed)
                add(tar, f"{name}.jpg", data)
                add(tar, f"{name}.txt", f"caption {name}".encode())
                add(tar, f"{name}.json", json.dumps({"score": i}).encode())
    return str(folder)


def streamed(path, **options):
    options = {"streaming": True, "shuffle_buffer": 16, **options}
    return index_samples(path, **options)


SETTINGS = {
    "image_size": 64, "batch_size": 8, "grad_accum_steps": 1, "multi_aspect_ratio": ["1/1", "1/2"],
    "bucket_factor": 16, "seed": 3,
}  # fmt: skip


def steps_of(stream, steps, processes=1, settings=(), **options):
    """Steps as lists of micro-batches in their order, whatever processes made them, and all states after the last."""
    settings = {**SETTINGS, **dict(settings)}
    parts, after = [], []
    for process in range(processes):
        plan = Plan(**settings, num_processes=processes, process_index=process)
        batches = training_batches(stream, plan, **options)
        parts.append([[next(batches) for _ in range(plan.grad_accum_steps)] for _ in range(steps)])
        after.append(parts[-1][-1][-1].after)
    micros = range(len(parts[0][0]))
    return [[parts[q][step][m] for m in micros for q in range(processes)] for step in range(steps)], after


def shown(steps):
    return [[(batch.keys, batch.captions, batch.seeds.tolist(), batch.identities) for batch in step] for step in steps]


def keys_by_position(steps):
    return [
        sorted((p, k) for batch in step for p, k in zip(batch.positions.tolist(), batch.keys, strict=True))
        for step in steps
    ]


def test_lanes_share_out_every_shard_once_an_epoch():
    assert [lane_count(64, shards) for shards in (1, 3, 63, 64, 1000)] == [1, 2, 32, 64, 64]
    assert lane_count(48, 40) == 24
    for shards, lanes in ((8, 4), (10, 4), (7, 2)):
        turns = [shard_of(5, shards, lanes, g % lanes, g // lanes) for g in range(3 * shards)]
        epochs = [turns[e * shards : (e + 1) * shards] for e in range(3)]
        assert all(sorted(epoch) == list(range(shards)) for epoch in epochs)
        assert epochs[0] != epochs[1]
    check_lanes(64, 64, 100, 32)
    with pytest.raises(ValueError, match=r"3 processes cannot share 64 lanes .* nearest: 66"):
        check_lanes(64, 64, 100, 3)
    with pytest.raises(ValueError, match=r"4 processes cannot stream 3 shards.*streaming: false"):
        check_lanes(2, 64, 3, 4)


def test_one_bucket_is_the_same_for_all_processes_and_workers(tmp_path):
    stream = streamed(shards(tmp_path / "set"))
    assert isinstance(stream, SampleStream)
    assert stream.lanes == 8
    square = {"multi_aspect_ratio": None}
    whole, _ = steps_of(stream, 14, settings=square)
    order = keys_by_position(whole)
    assert [position for step in order for position, _ in step] == list(range(14 * 8))
    for processes in (2, 4, 8):
        assert keys_by_position(steps_of(stream, 14, processes, square)[0]) == order
    parts = {**square, "grad_accum_steps": 4}
    assert keys_by_position(steps_of(stream, 14, 2, {**square, "grad_accum_steps": 2})[0]) == order
    assert keys_by_position(steps_of(stream, 14, 1, parts)[0]) == order
    for workers in (1, 3):
        again, _ = steps_of(stream, 6, settings=square, num_workers=workers)
        assert shown(again) == shown(whole[:6])
        pairs = zip(again, whole[:6], strict=True)
        assert all(torch.equal(a.pixels, b.pixels) for x, y in pairs for a, b in zip(x, y, strict=True))


def test_buckets_are_the_same_where_a_step_has_as_many_micro_batches(tmp_path):
    stream = streamed(shards(tmp_path / "set"))
    whole, _ = steps_of(stream, 15, 1, {"grad_accum_steps": 4})
    sizes = {tuple(batch.pixels.shape[2:]) for step in whole for batch in step}
    assert len(sizes) == 3
    for processes in (2, 4):
        other, _ = steps_of(stream, 15, processes, {"grad_accum_steps": 4 // processes})
        assert shown(other) == shown(whole)
    assert shown(steps_of(stream, 15, 1, {"grad_accum_steps": 4}, decode=False)[0]) == shown(whole)
    # Every sample once an epoch, as nearly as a shuffle buffer allows.
    counts = Counter(key for step in whole for batch in step for key in batch.keys)
    assert max(counts.values()) <= 4
    assert len(counts) == 48


def test_a_stream_resumes_at_any_step_bitwise(tmp_path):
    stream = streamed(shards(tmp_path / "set", bad={(2, 3)}), max_broken_share=0.5)
    for processes, parts in ((1, 1), (1, 2), (2, 2), (4, 1)):
        settings = {"grad_accum_steps": parts, "batch_size": 8}
        whole, _ = steps_of(stream, 14, processes, settings)
        for step in (1, 5, 9):
            _, after = steps_of(stream, step, processes, settings)
            saved = StreamState.merged([StreamState.of(part.plain()) for part in after])
            rest, _ = steps_of(stream, 14 - step, processes, settings, start_step=step, after=saved)
            assert shown(rest) == shown(whole[step:])
            for a, b in zip(rest, whole[step:], strict=True):
                assert all(torch.equal(x.pixels, y.pixels) for x, y in zip(a, b, strict=True))
    # Without a state it is read again from its beginning.
    assert shown(steps_of(stream, 4, start_step=10)[0]) == shown(steps_of(stream, 14)[0][10:])


def test_workers_run_ahead_of_the_state(tmp_path):
    stream = streamed(shards(tmp_path / "set"))
    whole, _ = steps_of(stream, 12)
    _, (after,) = steps_of(stream, 5, num_workers=3)
    rest, _ = steps_of(stream, 7, start_step=5, after=after, num_workers=2)
    assert shown(rest) == shown(whole[5:])


def test_a_run_goes_on_with_other_processes(tmp_path):
    stream = streamed(shards(tmp_path / "set"))
    settings = {"multi_aspect_ratio": None}
    whole, _ = steps_of(stream, 12, 1, settings)
    _, after = steps_of(stream, 5, 4, settings)
    rest, _ = steps_of(stream, 7, 2, settings, start_step=5, after=StreamState.merged(after))
    assert keys_by_position(rest) == keys_by_position(whole[5:])
    # With buckets the micro-batches are others, but no sample is lost or shown twice.
    first, after = steps_of(stream, 5, 4)
    rest, _ = steps_of(stream, 5, 1, start_step=5, after=StreamState.merged(after))
    positions = [p for step in (*first, *rest) for batch in step for p in batch.positions.tolist()]
    assert len(set(positions)) == len(positions) == 80
    assert max(positions) < 80 + 8 * 3 * 8


def test_other_shards_do_not_go_on(tmp_path):
    path = shards(tmp_path / "set")
    _, (after,) = steps_of(streamed(path), 2)
    (tmp_path / "set" / "007.tar").unlink()
    with pytest.raises(ValueError, match=r"had 8 shards in 8 lanes, and now has 7 in 4; give the same shards"):
        steps_of(streamed(path), 1, start_step=2, after=after)


def test_each_process_opens_its_own_shards(tmp_path, monkeypatch):
    stream = streamed(shards(tmp_path / "set", count=16), stream_lanes=8)
    opened = []
    real = shard_lanes.open_shard
    monkeypatch.setattr(shard_lanes, "open_shard", lambda location: opened.append(location) or real(location))
    settings = {"multi_aspect_ratio": None}
    by_process = []
    for process in range(4):
        opened.clear()
        batches = training_batches(stream, Plan(**SETTINGS | settings, num_processes=4, process_index=process))
        for _ in range(11):  # the shuffle buffer reads ahead by less than a step
            next(batches)
        by_process.append(set(opened))
    assert sum(map(len, by_process)) == len(set().union(*by_process)) == 16
    # Resuming opens one shard per lane.
    _, after = steps_of(stream, 3, 1, settings)
    opened.clear()
    next(training_batches(stream, Plan(**SETTINGS | settings), start_step=3, after=after[0]))
    assert len(opened) == len(set(opened)) <= 8


def test_filters_captions_and_faults(tmp_path, caplog):
    path = shards(tmp_path / "set", bad={(1, 2), (4, 4)})
    getter = ["json", "lambda j: str(j['score'])"]
    stream = streamed(path, dataset_filters=[["score", "lambda s: s > 1"]], captions_getter=getter)
    steps, _ = steps_of(stream, 30)
    rows = [(k, c) for step in steps for batch in step for k, c in zip(batch.keys, batch.captions, strict=True)]
    assert {key[-1] for key, _ in rows} == {caption for _, caption in rows} == {"2", "3", "4", "5"}
    assert not {"001.tar/001002", "004.tar/004004"} & {key for key, _ in rows}
    assert "001.tar/001002" in caplog.text
    with pytest.raises(ValueError, match="has no caption under captions_getter"):
        streamed(path, captions_getter=["json", "lambda j: j['text']"])
    with pytest.raises(ValueError, match="rejects all of the first"):
        steps_of(streamed(path, dataset_filters=[["score", "lambda s: s > 99"]]), 1)


def test_shards_that_vanish_or_end_early_are_named_and_passed(tmp_path, caplog):
    path = shards(tmp_path / "set")
    stream = streamed(path, max_broken_share=0.3)
    (tmp_path / "set" / "003.tar").unlink()
    cut = tmp_path / "set" / "005.tar"
    cut.write_bytes(cut.read_bytes()[:5000])
    steps, _ = steps_of(stream, 12)
    keys = {key for step in steps for batch in step for key in batch.keys}
    assert not {key for key in keys if key.startswith("003.tar")}
    assert 36 <= len(keys) <= 42
    assert "003.tar" in caplog.text
    assert "005.tar" in caplog.text
    assert "truncated" in caplog.text
    for file in (tmp_path / "set").glob("*.tar"):
        file.unlink()
    with pytest.raises(ValueError, match=r"webdataset_path: \d shards in a row cannot be used"):
        steps_of(stream, 200)


def test_a_broken_image_is_replaced_the_same_way_everywhere(tmp_path):
    path = shards(tmp_path / "set")
    # A header that is fine, and no image behind it.
    for number in (2, 6):
        with tarfile.open(tmp_path / "set" / f"{number:03}.tar", "a") as tar:
            add(tar, f"{number:03}900.jpg", undecodable())
            add(tar, f"{number:03}900.txt", b"cut off")
    stream = streamed(path, max_broken_share=0.5)
    for size in (4, 8):  # of a micro-batch of one, only what its lane holds can stand in
        settings = {"batch_size": size, "grad_accum_steps": 4}
        whole, _ = steps_of(stream, 28, 1, settings)
        assert sum(batch.broken for step in whole for batch in step) > 0
        for processes in (2, 4):
            other, _ = steps_of(stream, 28, processes, {**settings, "grad_accum_steps": 4 // processes})
            assert shown(other) == shown(whole)


def test_auto_takes_the_index_for_few_shards_and_a_stream_for_many(tmp_path, monkeypatch):
    path = shards(tmp_path / "set", count=3)
    assert not isinstance(index_samples(path, streaming="auto"), SampleStream)
    monkeypatch.setattr("stable_cascade.data.index._MANY", 2)
    found = index_samples(path, streaming="auto")
    assert isinstance(found, SampleStream)
    assert str(found) == (
        "a stream of 3 shards in 2 lanes (auto: 3 shards; streaming: false would look at all of them first)"
    )


def test_a_stream_and_an_index_name_the_same(tmp_path):
    path = shards(tmp_path / "set")
    plan = Plan(**SETTINGS, crop="center", random_bucket_share=0)
    named = [
        {row for _, batch in zip(range(40), training_batches(samples, plan, decode=False), strict=False)
         for row in batch.identities}
        for samples in (streamed(path), index_samples(path))
    ]  # fmt: skip
    assert named[0] == named[1]
