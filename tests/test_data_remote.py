"""Shards behind http:// and s3://, from servers on the loopback interface."""

from __future__ import annotations

import collections
import http.client
import http.server
import logging
import re
import socket
import threading
from collections.abc import Iterator
from itertools import islice
from urllib.parse import unquote, urlparse

import pytest

from stable_cascade.data import index_samples, locations
from tests.making_shards import batches_of, image, write_shard


class RangeHandler(http.server.BaseHTTPRequestHandler):
    """Files below `server.folder`, with ranges; the bytes sent are counted."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.server.folder / unquote(urlparse(self.path).path).lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        whole = len(content)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        self.send_response(206 if match else 200)
        if match:
            first = int(match[1])
            content = content[first : int(match[2]) + 1 if match[2] else None]
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{whole}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{whole}"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.server.sent.append(len(content))
            self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(tmp_path) -> Iterator[http.server.ThreadingHTTPServer]:
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler)
    served.daemon_threads = True
    served.folder, served.sent = tmp_path / "served", []
    served.folder.mkdir()
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def address(server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


SETTINGS = {"image_size": 32, "batch_size": 4, "bucket_factor": 8}


def keys_of(samples, **options) -> list[list[str]]:
    batches = batches_of(samples, **SETTINGS, **options)
    return [next(batches).keys for _ in range(3)]


def test_http(server, tmp_path):
    write_shard(server.folder / "a-0.tar", 6)
    write_shard(server.folder / "a-1.tar", 6, start=6)
    cache = str(tmp_path / "cache")
    samples = index_samples(f"{address(server)}/a-{{0..1}}.tar", cache_dir=cache)
    assert len(samples) == 12
    assert samples.key(7) == "a-1.tar/0007"
    local = index_samples(str(server.folder), cache_dir=cache)
    assert samples.fingerprint == local.fingerprint
    assert keys_of(samples) == keys_of(local)
    assert keys_of(samples, num_workers=1) == keys_of(local)


def test_http_reads_only_what_it_needs(server, tmp_path):
    write_shard(server.folder / "a.tar", 30, sizes=((100, 90),))
    cache = str(tmp_path / "cache")
    index_samples(f"{address(server)}/a.tar", cache_dir=cache)
    scanned = sum(server.sent)
    assert scanned <= 1.5 * (server.folder / "a.tar").stat().st_size
    server.sent.clear()
    samples = index_samples(f"{address(server)}/a.tar", cache_dir=cache)
    assert sum(server.sent) == 0, "the second index comes from the cache"
    assert samples.read(17) == (image(100, 90, seed=17), "caption 17")
    assert sum(server.sent) == len(image(100, 90, seed=17)) + len("caption 17\n")


def test_http_missing_or_no_tar(server, tmp_path):
    cache = str(tmp_path / "cache")
    for name, words in (("none.tar", "cannot be opened"), ("text.tar", "is not a tar")):
        (server.folder / "text.tar").write_text("x" * 2000)
        with pytest.raises(ValueError, match=words) as error:
            index_samples(f"{address(server)}/{name}", cache_dir=cache)
        assert "\n" not in str(error.value)
        assert f"{address(server)}/{name}" in str(error.value)


class FaultyProxy(http.server.BaseHTTPRequestHandler):
    """Hands everything on to `server.target` (host, port), except what `server.faults` spoils.

    A fault is a function of a request's path and Range: "" for none, "busy" for a 503, "drop" for half of the body.
    """

    protocol_version = "HTTP/1.1"

    def handle_request(self):
        fault = self.server.fault(self.path, self.headers.get("Range", ""), self.command)
        if fault:
            self.server.spoiled.append((fault, self.path))
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "busy":
            return self.reply(503, {}, b"<Error><Code>SlowDown</Code><Message>Please reduce it</Message></Error>")
        upstream = http.client.HTTPConnection(*self.server.target)
        upstream.request(self.command, self.path, body=content or None, headers=dict(self.headers))
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP}
        return self.reply(answer.status, headers, body, cut=fault == "drop")

    do_GET = do_HEAD = do_PUT = do_POST = handle_request

    def reply(self, status, headers, body, *, cut=False):
        self.send_response(status)
        headers = {name: value for name, value in headers.items() if name.lower() != "content-length"} | {
            "Content-Length": headers.get("Content-Length", str(len(body)))
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments) -> None:
        pass


HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive", "server", "date")


def never(path, span, method) -> str:
    return ""


def now_and_then(path: str, count: int, of: int, what: str):
    """Spoils `count` reads in a row of every `of` reads of each file whose path contains `path`."""
    seen: collections.Counter[str] = collections.Counter()

    def fault(requested, span, method) -> str:
        if path not in requested or method != "GET" or not span:
            return ""
        seen[requested] += 1
        return what if seen[requested] % of < count else ""

    return fault


@pytest.fixture
def proxy() -> Iterator[http.server.ThreadingHTTPServer]:
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FaultyProxy)
    served.daemon_threads = True
    served.fault, served.spoiled = never, []
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(locations, "WAITS", (0.01, 0.02, 0.03, 0.04, 0.05))


@pytest.fixture(scope="module")
def moto():
    """A real S3 server, in this process."""
    pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def bucket(moto, proxy, tmp_path, monkeypatch):
    """`bucket/set/0.tar` … `9.tar` of four samples each, behind the proxy; the same lies in the folder returned."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": address(proxy),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.target = moto
    files = s3fs.S3FileSystem()
    files.makedirs("bucket", exist_ok=True)
    if files.exists("bucket/set"):
        files.rm("bucket/set", recursive=True)
    for i in range(10):
        path = write_shard(tmp_path / "set" / f"{i}.tar", 4, start=4 * i)
        files.pipe_file(f"bucket/set/{i}.tar", path.read_bytes())
    files.pipe_file("bucket/set/deep/readme.txt", b"x")
    files.pipe_file("bucket/other/2.tar", path.read_bytes())
    yield tmp_path / "set"
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3_prefix(bucket, tmp_path):
    cache = str(tmp_path / "cache")
    samples = index_samples("s3://bucket/set/", cache_dir=cache)
    assert [samples.key(i) for i in (0, 39)] == ["0.tar/0000", "9.tar/0039"]
    assert samples.read(5) == (image(36, 36, seed=5), "caption 5")
    assert len(index_samples("s3://bucket/set/1.tar", cache_dir=cache)) == 4
    assert len(index_samples("s3://bucket/set/*.tar", cache_dir=cache)) == 40
    local = index_samples(str(bucket), cache_dir=cache)
    assert keys_of(samples, num_workers=1) == keys_of(local)
    with pytest.raises(ValueError, match="the prefix holds no"):
        index_samples("s3://bucket/nothing/", cache_dir=cache)
    with pytest.raises(ValueError, match=r"shard 's3://bucket/set/77\.tar' cannot be opened: FileNotFoundError"):
        index_samples("s3://bucket/set/77.tar", cache_dir=cache)


@pytest.mark.parametrize("what", ["drop", "busy"])
@pytest.mark.parametrize("workers", [0, 2])
def test_s3_that_drops_and_refuses(bucket, proxy, tmp_path, what, workers):
    """Two of every five reads fail, while indexing and in workers: nothing is lost, nothing differs."""
    proxy.fault = now_and_then(".tar", 2, 5, what)
    samples = index_samples("s3://bucket/set/", cache_dir=str(tmp_path / "cache"))
    local = index_samples(str(bucket), cache_dir=str(tmp_path / "cache"))
    assert samples.fingerprint == local.fingerprint
    assert samples.report.skipped_shards == ()
    batches = list(islice(batches_of(samples, num_workers=workers, **SETTINGS), 8))
    assert [b.keys for b in batches] == [b.keys for b in islice(batches_of(local, **SETTINGS), 8)]
    assert sum(batch.broken for batch in batches) == 0
    assert len(proxy.spoiled) >= 8


def test_a_shard_that_keeps_failing_is_skipped_once(bucket, proxy, tmp_path, caplog):
    """One shard of ten: named, counted, its samples replaced by others; the next start tries it again."""
    cache = str(tmp_path / "cache")
    proxy.fault = lambda path, span, method: "busy" if "/3.tar" in path and span else ""
    samples = index_samples("s3://bucket/set/", cache_dir=cache)
    assert len(samples) == 36
    assert len(samples.report.skipped_shards) == 1
    assert "1 shards skipped: shard 's3://bucket/set/3.tar' cannot be read" in str(samples.report)
    assert "skipped in this run: shard 's3://bucket/set/3.tar'" in caplog.text
    with pytest.raises(ValueError, match=r"^1 of 10 shards fail, more than max_broken_share 0\.05; shard ") as error:
        index_samples("s3://bucket/set/", cache_dir=cache, max_broken_share=0.05)
    assert "\n" not in str(error.value)
    proxy.fault = never
    assert len(index_samples("s3://bucket/set/", cache_dir=cache)) == 40


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_fails_during_training(bucket, proxy, tmp_path, caplog, monkeypatch, workers):
    samples = index_samples("s3://bucket/set/", cache_dir=str(tmp_path / "cache"), max_broken_share=0.5)
    batches = batches_of(samples, num_workers=workers, **SETTINGS)
    whole = [next(batches)]
    proxy.fault = lambda path, span, method: "drop" if "/3.tar" in path else ""
    whole += islice(batches, 20)
    broken = sum(batch.broken for batch in whole)
    assert 4 <= broken <= 12
    assert sum("3.tar" in key for batch in whole[4:] for key in batch.keys) == 0
    assert "broken sample replaced: 3.tar/0012" in caplog.text
    asked = sum("3.tar" in path for _, path in proxy.spoiled)
    assert asked <= 6 * 2, "set aside, not asked again and again"
    if not workers:  # a worker's log goes to its own stderr
        reports = [record for record in caplog.records if "it is tried again in 60 s" in record.getMessage()]
        assert len(reports) == 1
        proxy.fault = never
        aside = samples.source.reader._aside
        assert list(aside) == ["s3://bucket/set/3.tar"]
        aside["s3://bucket/set/3.tar"] = 0.0  # the minute is over
        assert any("3.tar" in key for batch in islice(batches, 12) for key in batch.keys)
        assert "shard 's3://bucket/set/3.tar' can be read again" in caplog.text


def test_s3_that_is_down_for_good(bucket, proxy, tmp_path):
    proxy.fault = lambda path, span, method: "busy" if ".tar" in path else ""
    with pytest.raises(ValueError, match="10 of 10 shards fail, more than max_broken_share") as error:
        index_samples("s3://bucket/set/", cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["drop", "busy"])
def test_http_that_drops_and_refuses(server, proxy, tmp_path, what):
    write_shard(server.folder / "a.tar", 12)
    proxy.target = server.server_address
    proxy.fault = now_and_then(".tar", 2, 5, what)
    cache = str(tmp_path / "cache")
    samples = index_samples(f"{address(proxy)}/a.tar", cache_dir=cache)
    assert keys_of(samples, num_workers=1) == keys_of(index_samples(str(server.folder), cache_dir=cache))
    assert proxy.spoiled


def test_what_is_tried_again():
    assert locations.may_pass(ConnectionResetError())
    assert locations.may_pass(TimeoutError())
    assert not locations.may_pass(FileNotFoundError())
    assert not locations.may_pass(PermissionError())
    calls = []

    def fails() -> None:
        calls.append(1)
        raise ConnectionError("down")

    with pytest.raises(ConnectionError):
        locations.with_retries("x", fails)
    assert len(calls) == 6


def streamed_keys(samples, steps: int = 10, **options) -> list[list[str]]:
    batches = batches_of(samples, **SETTINGS, **options)
    return [batch.keys for batch in islice(batches, steps)]


@pytest.mark.parametrize("what", ["drop", "busy"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_from_s3_that_drops_and_refuses_is_the_local_one(bucket, proxy, what, workers):
    proxy.fault = now_and_then(".tar", 2, 5, what)
    remote = index_samples("s3://bucket/set/", streaming=True, shuffle_buffer=16)
    local = index_samples(str(bucket), streaming=True, shuffle_buffer=16)
    assert streamed_keys(remote, num_workers=workers) == streamed_keys(local)
    assert len(proxy.spoiled) >= 8


def test_a_stream_fetches_every_byte_once(server):
    for number in range(8):
        write_shard(server.folder / f"{number}.tar", 40, start=40 * number, sizes=((100, 90),))
    size = sum(path.stat().st_size for path in server.folder.iterdir())
    stream = index_samples(f"{address(server)}/{{0..7}}.tar", streaming=True, shuffle_buffer=8)
    for processes in (1, 2, 4):
        server.sent.clear()
        keys = []
        for process in range(processes):
            batches = batches_of(stream, **SETTINGS, num_processes=processes, process_index=process)
            for _ in range(78):
                keys += next(batches).keys
        assert len(set(keys)) >= 300
        assert 0.95 * size <= sum(server.sent) <= 1.05 * size


def test_a_shard_that_fails_in_a_stream_is_named_and_passed(bucket, proxy, caplog):
    proxy.fault = lambda path, span, method: "busy" if "/3.tar" in path and span else ""
    stream = index_samples("s3://bucket/set/", streaming=True, shuffle_buffer=16)
    keys = {key for keys in streamed_keys(stream) for key in keys}
    assert not {key for key in keys if key.startswith("3.tar")}
    assert "broken shards: shard 's3://bucket/set/3.tar' cannot be read" in caplog.text
    proxy.fault = never
    assert any(key.startswith("3.tar") for keys in streamed_keys(stream, 30) for key in keys)
