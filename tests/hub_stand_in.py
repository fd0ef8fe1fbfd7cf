"""A stand-in for the Hugging Face hub on the loopback interface: who am I, repositories, uploads, downloads."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_goodgoodgoodgoodgood"
COMMIT = "0123456789" * 4
LARGE = (".safetensors", ".png")


class Hub(http.server.ThreadingHTTPServer):
    """What it was asked and given: `repos` name -> private, `files` repository -> path -> bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.role = "write"
        self.broken = ""
        """A part of the paths that are answered with 507."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.answer("GET", b"")

    def do_HEAD(self) -> None:
        self.answer("HEAD", b"")

    def do_POST(self) -> None:
        self.answer("POST", self.body())

    def do_PUT(self) -> None:
        self.answer("PUT", self.body())

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, method: str, body: bytes) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.asked.append(f"{method} {path}")
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.server.broken and self.server.broken in path:
            return self.send(507, {"error": "insufficient storage"})
        if method == "PUT" and path.startswith("/lfs/"):
            self.server.blobs[path.removeprefix("/lfs/")] = body
            return self.send(200, {})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.resolve(method, *found.groups())
        if not known:
            return self.send(401, {"error": "Invalid username or password."})
        for pattern, handle in (
            (r"/api/whoami-v2", self.whoami),
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", lambda body: {"errors": [], "warnings": []}),
            (r"/api/(models|datasets)/([^/]+/[^/]+)", self.info),
            (r"/api/models/([^/]+/[^/]+)/preupload/main", self.preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/api/models/([^/]+/[^/]+)/commit/main", self.commit),
            (r"/api/models/([^/]+/[^/]+)/revision/main", lambda body, name: {"id": name, "sha": COMMIT}),
            (r"/api/models/([^/]+/[^/]+)/tree/[^/]+", self.tree),
        ):
            if found := re.fullmatch(pattern, path):
                answer = handle(body, *found.groups())
                return (
                    self.send(200, answer)
                    if answer
                    else self.send(404, {"error": "x"}, {"X-Error-Code": "RepoNotFound"})
                )
        return self.send(404, {"error": f"no {path}"})

    def whoami(self, body: bytes) -> dict[str, Any]:
        role = {"accessToken": {"displayName": "test", "role": self.server.role}}
        return {"type": "user", "name": "someone", "orgs": [{"name": "lab"}], "auth": role}

    def info(self, body: bytes, kind: str, name: str) -> dict[str, Any] | None:
        known = name in self.server.repos or name in self.server.files
        return {"id": name, "sha": COMMIT, "private": False} if known else None

    def create(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        self.server.repos[name] = asked.get("visibility") == "private" or asked.get("private") is True
        return {"url": f"{self.server.address}/{name}", "name": name, "id": name}

    def preupload(self, body: bytes, name: str) -> dict[str, Any]:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        return {"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]}

    def batch(self, body: bytes, name: str) -> dict[str, Any]:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.address}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def commit(self, body: bytes, name: str) -> dict[str, Any]:
        files = self.server.files.setdefault(name, {})
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        return {"success": True, "commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT}

    def tree(self, body: bytes, name: str) -> list[dict[str, Any]]:
        files = self.server.files.get(name, {})
        return [{"type": "file", "path": path, "size": len(data), "oid": COMMIT} for path, data in files.items()]

    def resolve(self, method: str, name: str, path: str) -> None:
        content = self.server.files.get(name, {}).get(path)
        if content is None:
            self.send(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.send(200, content, {"X-Repo-Commit": COMMIT, "ETag": etag, "Accept-Ranges": "bytes"})

    def send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/octet-stream" if answer is body else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """A hub that runs while the `with` block does."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
