"""Streams of shards, measured: how soon they start, what they read, whether they are exact, how fast they are.

    python -m benchmarks.streams

The last line printed is JSON. `start_10000_s` and `start_100_s`: from `accelerate launch` of a training of the
embedded cascade to the line of its first step, with that many shards behind an S3 server on the loopback interface,
whose listing is real and whose bodies are all the same few images. `bytes_share`: what 1, 2 and 4 processes together
fetch over HTTP in one epoch, over the set's size. `orders_equal`: whether workers 0, 1, 4 and processes 1, 2, 4 show
the same keys at the same positions. `resumed_equal`: of 20 processes killed (SIGKILL) at random and resumed, how many
ended with the same pixels as one that was not. `reread_shards_per_lane`: shards opened to resume, over the lanes.
`images_ratio_index` and `images_ratio_webdataset`: our stream's images per second over those of our index, and of
webdataset with Pillow, in turns on one thread. null: not measured, since there is nothing yet to measure.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import numpy as np
import torch
from PIL import Image

from stable_cascade.data import Plan, index_samples, shard_lanes, training_batches
from stable_cascade.data.stream import StreamState

from .data import ASPECTS, IMAGES, SIDE, peer_images, take, write_shard
from .measure import in_turns

ROOT = Path(__file__).resolve().parents[1]
KILLS, STEPS = 20, 40
SIZES = ((64, 64), (96, 48), (48, 96))
BUCKETS: dict[str, Any] = {"image_size": 64, "batch_size": 8, "bucket_factor": 16, "seed": 3}


def small_shard(number: int, samples: int = 6, sizes: tuple[tuple[int, int], ...] = SIZES) -> bytes:
    """A tar of JPEGs of noise with captions."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for place in range(samples):
            width, height = sizes[(number + place) % len(sizes)]
            pixels = np.random.default_rng(100 * number + place).integers(0, 255, (height, width, 3), np.uint8)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "JPEG")
            for ending, data in (("jpg", image.getvalue()), ("txt", f"an image of {number}".encode())):
                info = tarfile.TarInfo(f"{place:04}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


class _S3Handler(http.server.BaseHTTPRequestHandler):
    """The requests of S3 that reading needs: ListObjectsV2, HeadObject and GetObject with ranges."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        address = urlparse(self.path)
        query = parse_qs(address.query)
        if "list-type" in query:
            self._send(200, self._listing(query), {"Content-Type": "application/xml"}, body=True)
        else:
            self._answer(body=True)

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        first = int(query.get("continuation-token", ["0"])[0])
        last = min(first + 1000, self.server.count)  # type: ignore[attr-defined]
        size = len(self.server.content)  # type: ignore[attr-defined]
        entries = "".join(
            f'<Contents><Key>set/{number:05}.tar</Key><Size>{size}</Size><ETag>"e"</ETag>'
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for number in range(first, last)
        )
        more = last < self.server.count  # type: ignore[attr-defined]
        token = f"<NextContinuationToken>{last}</NextContinuationToken>" if more else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>bucket</Name><Prefix>set/</Prefix><KeyCount>{last - first}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{entries}</ListBucketResult>"
        ).encode()

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        if not path.endswith(".tar"):
            self._send(404, b"", {}, body=False)
            return
        content: bytes = self.server.content  # type: ignore[attr-defined]
        headers = {"ETag": '"e"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match:
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            part = content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            content = part
        if body:
            self.server.sent.append(len(content))  # type: ignore[attr-defined]
        self._send(206 if match else 200, content, headers, body=body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def s3_server(count: int, content: bytes) -> Iterator[Any]:
    """A server with `count` shards of this content in `s3://bucket/set/`, its address in `address`."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _S3Handler)
    server.daemon_threads, server.count, server.content, server.sent = True, count, content, []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def start(shards: int) -> float:
    """Seconds from the launch of a training to its first step."""
    body = small_shard(0, 16, ((512, 512),))
    with s3_server(shards, body) as server, tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "AWS_ENDPOINT_URL": server.address, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "examples/train_text_to_image.py",
            "--config", "examples/configs/text_to_image_embedded.yaml", "--webdataset_path", "s3://bucket/set/",
            "--streaming", "True", "--updates", "1000", "--log_every", "1", "--cache", "False",
            "--checkpoint_path", folder, "--output_path", folder,
        ]  # fmt: skip
        begun = time.monotonic()
        with open(Path(folder) / "output.txt", "w+") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
            try:
                while not any(path.stat().st_size for path in Path(folder).rglob("log.jsonl")):
                    if process.poll() is not None:
                        raise RuntimeError((Path(folder) / "output.txt").read_text()[-2000:])
                    time.sleep(0.02)
                return time.monotonic() - begun
            finally:
                subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)
                process.kill()
                process.wait()


def bytes_share() -> dict[str, float]:
    """What processes together fetch in an epoch, over the size of the set."""
    samples, shards = 48, 16
    body = small_shard(0, samples, ((256, 256),))
    shares = {}
    with s3_server(shards, body) as server:
        places = f"{server.address}/bucket/set/{{00000..{shards - 1:05}}}.tar"
        stream = index_samples(places, streaming=True, shuffle_buffer=16)
        for processes in (1, 2, 4):
            server.sent.clear()
            for process in range(processes):
                plan = Plan(**BUCKETS, num_processes=processes, process_index=process)
                # The last step's samples are those that the buffers hold.
                for _ in islice(training_batches(stream, plan, decode=False), samples * shards // 8 - 2):
                    pass
            shares[str(processes)] = round(sum(server.sent) / (shards * len(body)), 4)
    return shares


def orders_equal(folder: Path) -> bool:
    """Whether the keys at every position are the same for all numbers of workers and processes."""
    stream = index_samples(str(folder), streaming=True, shuffle_buffer=32)

    def order(processes: int, workers: int) -> list[tuple[int, str]]:
        pairs: list[tuple[int, str]] = []
        for process in range(processes):
            plan = Plan(**BUCKETS, num_processes=processes, process_index=process)
            for batch in islice(training_batches(stream, plan, num_workers=workers), STEPS):
                pairs += zip(batch.positions.tolist(), batch.keys, strict=True)
        return sorted(pairs)

    expected = order(1, 0)
    return all(order(processes, workers) == expected for processes in (1, 2, 4) for workers in (0, 1, 4))


def child(folder: Path) -> None:
    """Reads steps and notes each with a hash of its pixels; goes on from the last one noted."""
    stream = index_samples(str(folder / "set"), streaming=True, shuffle_buffer=32)
    plan = Plan(**BUCKETS, multi_aspect_ratio=["1/1", "1/2"])
    noted: dict[str, Any] = {"steps": [], "state": None}
    if (folder / "state").exists():
        noted = torch.load(folder / "state", weights_only=True)
    after = StreamState.of(noted["state"]) if noted["state"] else None
    for batch in training_batches(stream, plan, start_step=len(noted["steps"]), after=after, num_workers=1):
        assert batch.pixels is not None
        assert batch.after is not None
        noted["steps"].append((batch.keys, hashlib.sha256(batch.pixels.numpy().tobytes()).hexdigest()))
        noted["state"] = batch.after.plain()
        torch.save(noted, folder / "part")
        os.replace(folder / "part", folder / "state")
        if len(noted["steps"]) == STEPS:
            (folder / "done").touch()
            return
        time.sleep(0.01)


def _steps(folder: Path) -> list[Any]:
    """What a child has noted."""
    return torch.load(folder / "state", weights_only=True)["steps"]


def resumed_equal(folder: Path) -> tuple[int, int]:
    """Kills that ended equal to a run without one, of how many."""
    rng, equal = random.Random(0), 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(place: Path, kill_at: int | None) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.streams", "--child", str(place)], cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            if kill_at is not None and (place / "state").exists():
                if len(_steps(place)) >= kill_at:
                    os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.002)

    def place(name: str) -> Path:
        (folder / name).mkdir()
        (folder / name / "set").symlink_to(folder / "set")
        return folder / name

    whole = place("whole")
    run(whole, None)
    expected = _steps(whole)
    for number in range(KILLS):
        killed = place(f"killed-{number}")
        run(killed, rng.randrange(1, STEPS))
        run(killed, None)
        equal += _steps(killed) == expected
    return equal, KILLS


def reread_shards_per_lane(folder: Path) -> float:
    """Shards opened for the first step after resuming, over the lanes."""
    stream = index_samples(str(folder), streaming=True, shuffle_buffer=32)
    plan = Plan(**BUCKETS)
    batches = training_batches(stream, plan, decode=False)
    after = [next(batches) for _ in range(STEPS)][-1].after
    opened: list[str] = []
    real = shard_lanes.open_shard

    def counted(location: str) -> Any:
        opened.append(location)
        return real(location)

    shard_lanes.open_shard = counted
    try:
        next(training_batches(stream, plan, start_step=STEPS, after=after, decode=False))
    finally:
        shard_lanes.open_shard = real
    return round(len(opened) / stream.lanes, 3)  # type: ignore[union-attr]


def images_ratios() -> tuple[float, float]:
    """Images per second of our stream, over those of our index and of webdataset with Pillow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            shard = write_shard(Path(folder) / "images.tar")
            plan = Plan(image_size=SIDE, batch_size=4, multi_aspect_ratio=ASPECTS)
            ratios = []
            for peer in ("index", "webdataset"):
                ours = _counts(index_samples(str(shard), streaming=True), plan)
                index = index_samples(str(shard), cache_dir=folder)
                other = _counts(index, plan) if peer == "index" else peer_images(shard)
                row = in_turns(
                    f"stream against {peer}", functools.partial(take, ours, IMAGES),
                    functools.partial(take, other, IMAGES), peer_name=peer, rounds=5, amount=IMAGES,
                    unit="images/s",
                )  # fmt: skip
                ratios.append(round(float(row.entry()["ratio"]), 3))
            return ratios[0], ratios[1]
    finally:
        torch.set_num_threads(threads)


def _counts(samples: Any, plan: Plan) -> Iterator[int]:
    return (len(batch.keys) for batch in training_batches(samples, plan, as_stored=True))


def main() -> None:
    """Prints the line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "set").mkdir()
        for number in range(16):
            (folder / "set" / f"{number:03}.tar").write_bytes(small_shard(number))
        index_ratio, webdataset_ratio = images_ratios()
        figures = {
            "start_10000_s": round(start(10_000), 2),
            "start_100_s": round(start(100), 2),
            "bytes_share": bytes_share(),
            "orders_equal": orders_equal(folder / "set"),
            "resumed_equal": list(resumed_equal(folder)),
            "reread_shards_per_lane": reread_shards_per_lane(folder / "set"),
            "images_ratio_index": index_ratio,
            "images_ratio_webdataset": webdataset_ratio,
            "images_ratio_mosaicml": None,
            "cached_ratio": None,
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
    else:
        main()
