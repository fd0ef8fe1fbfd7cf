"""Shards behind http:// and s3://, from servers on the loopback interface."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest

from stable_cascade.data import index_samples, training_batches
from tests.making_shards import picture, write_shard


class RangeHandler(http.server.BaseHTTPRequestHandler):
    """Files below `server.folder`, with ranges; the bytes sent are counted."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        query = parse_qs(urlparse(self.path).query)
        if "list-type" in query:
            self.list(query.get("prefix", [""])[0])
        else:
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

    def list(self, prefix: str) -> None:
        """S3's ListObjectsV2, as far as it is asked for here."""
        bucket = urlparse(self.path).path.strip("/")
        folder = self.server.folder / bucket
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        entries = "".join(
            f"<Contents><Key>{name}</Key><Size>{(folder / name).stat().st_size}</Size><ETag>&quot;x&quot;</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for name in names
            if name.startswith(prefix)
        )
        body = f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

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
    batches = training_batches(samples, **SETTINGS, **options)
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
    assert samples.read(17) == (picture(100, 90, seed=17), "caption 17")
    assert sum(server.sent) == len(picture(100, 90, seed=17)) + len("caption 17\n")


def test_http_missing_or_no_tar(server, tmp_path):
    cache = str(tmp_path / "cache")
    for name, words in (("none.tar", "cannot be opened"), ("text.tar", "is not a tar")):
        (server.folder / "text.tar").write_text("x" * 2000)
        with pytest.raises(ValueError, match=words) as error:
            index_samples(f"{address(server)}/{name}", cache_dir=cache)
        assert "\n" not in str(error.value)
        assert f"{address(server)}/{name}" in str(error.value)


def test_s3_prefix(server, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    for name, value in {
        "AWS_ENDPOINT_URL": address(server),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    write_shard(server.folder / "bucket" / "set" / "0.tar", 4)
    write_shard(server.folder / "bucket" / "set" / "1.tar", 4, start=4)
    write_shard(server.folder / "bucket" / "other" / "2.tar", 4)
    (server.folder / "bucket" / "set" / "readme.txt").write_text("x")
    cache = str(tmp_path / "cache")
    samples = index_samples("s3://bucket/set/", cache_dir=cache)
    assert [samples.key(i) for i in (0, 7)] == ["0.tar/0000", "1.tar/0007"]
    assert samples.read(5) == (picture(36, 36, seed=5), "caption 5")
    assert len(index_samples("s3://bucket/set/1.tar", cache_dir=cache)) == 4
    local = index_samples(str(Path(server.folder / "bucket" / "set")), cache_dir=cache)
    assert keys_of(samples, num_workers=1) == keys_of(local)
    with pytest.raises(ValueError, match="the prefix holds no"):
        index_samples("s3://bucket/nothing/", cache_dir=cache)
