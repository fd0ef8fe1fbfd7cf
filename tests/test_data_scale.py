"""100,000 samples: start, resume and memory. `-m slow -s` prints the numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from itertools import islice
from pathlib import Path

import pytest

from stable_cascade.data import index_samples
from tests.making_shards import batches_of, crops_of, image

SAMPLES, SHARDS = 100_000, 10
SETTINGS = {"image_size": 16, "bucket_factor": 4, "batch_size": 16, "multi_aspect_ratio": ["1/1", "3/4"], "seed": 1}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three images, 100,000 captions."""
    place = tmp_path_factory.mktemp("big")
    images = [image(width, height, seed=width) for width, height in ((16, 16), (20, 15), (15, 20))]
    for shard in range(SHARDS):
        with (place / f"{shard:03}.tar").open("wb") as file:
            for i in range(shard * SAMPLES // SHARDS, (shard + 1) * SAMPLES // SHARDS):
                for extension, data in (("png", images[i % 3]), ("txt", f"caption {i}".encode())):
                    info = tarfile.TarInfo(f"{i:07}.{extension}")
                    info.size = len(data)
                    file.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
            file.write(bytes(1024))
    return place


class Clock:
    """Seconds of this process's work, and of the wall's clock. Only the first is judged: other programs slow the
    second down."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        self.wall, self.work = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error):
        self.wall, self.work = time.perf_counter() - self.wall, time.process_time() - self.work
        print(f"{self.name:<44} {self.work:6.2f} s of work, {self.wall:6.2f} s on the clock")


def test_start_resume_and_naming(folder, tmp_path):
    cache = str(tmp_path / "cache")
    for name in ("first start, every shard scanned", "later start, shards remembered"):
        with Clock(f"{name}: to the first batch") as clock:
            samples = index_samples(str(folder), cache_dir=cache)
            next(batches_of(samples, **SETTINGS))
        assert clock.work <= 5
    assert len(samples) == SAMPLES
    at_90_percent = int(0.9 * SAMPLES) // SETTINGS["batch_size"]
    with Clock("resume at 90 % of an epoch") as clock:
        samples = index_samples(str(folder), cache_dir=cache)
        next(batches_of(samples, start_step=at_90_percent, **SETTINGS))
    assert clock.work <= 30
    with Clock("resume at 90 % of 100 epochs") as clock:
        next(batches_of(samples, start_step=100 * at_90_percent, **SETTINGS))
    assert clock.work <= 30
    steps = SAMPLES // SETTINGS["batch_size"]
    with Clock("100,000 samples named, not decoded") as clock:
        named = list(islice(batches_of(samples, decode=False, crops_per_image=4, **SETTINGS), steps))
    assert clock.work <= 10
    with Clock("their crops planned") as clock:
        planned = crops_of(samples, steps, crops_per_image=4, **SETTINGS)
    assert clock.work <= 10
    assert {crop.identity for crop in planned} == {name for batch in named for name in batch.identities}


MEMORY = """
import sys
from stable_cascade.data import Plan, index_samples, training_batches
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
samples = index_samples(sys.argv[1], cache_dir=sys.argv[2])
plan = Plan(image_size=16, bucket_factor=4, batch_size=16, seed=1, multi_aspect_ratio=("1/1", "3/4"))
batches = training_batches(samples, plan, num_workers=int(sys.argv[3]))
sizes = []
for number, batch in enumerate(batches, 1):
    if number in (200, 2000):
        sizes.append(resident())
    if number == 2000:
        break
print(*sizes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_flat(folder, tmp_path, workers):
    command = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "cache"), str(workers)]
    root = Path(__file__).resolve().parents[1]
    printed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    early, late = map(float, printed.split())
    print(f"{workers} workers: {early:.0f} MB after 200 batches, {late:.0f} MB after 2,000")
    assert late <= early + 16
