"""The page on a socket: the address is taken first, the model loaded second, and everything is left clean."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import socket
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stable_cascade import bounds
from stable_cascade.wording import brief

from .options import PageSettings, is_loopback

logger = logging.getLogger(__name__)

GRADIO = "pip install 'stable-cascade[app]'"
# Gradio reads these; each of them is a request to somewhere, or opens more than the page.
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_SHARE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_VIBE_MODE": "",
    "GRADIO_WATCH_DIRS": "",
    "GRADIO_ROOT_PATH": "",
}
OPEN_TO_OTHERS = (
    "warning: --host {host} opens the page to every machine that can reach this one; there is no password, "
    "and whoever opens it can draw and upload"
)


def check_gradio() -> None:
    """Raises ValueError where Gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(f"the page needs gradio, which is not installed; {GRADIO}")


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at the address.

    Raises:
        ValueError: the port is in use, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        number = error.errno or 0  # below 0 it is a name that could not be resolved
        reason = os.strerror(number) if number > 0 else brief(error.strerror or error)
        raise ValueError(f"--host {host} --port {port}: {reason}; choose another, --port 0 is any free") from None


def serve(
    settings: PageSettings, *, announce: Callable[[str], None], ready: Callable[[Any], None] | None = None
) -> None:
    """Serves the page until Ctrl+C.

    Args:
        announce: gets the lines for whoever started it.
        ready: gets the server once the address is known; its `should_exit` ends it.

    Raises:
        ValueError: Gradio is missing, the port is in use, or the model cannot be loaded.
    """
    check_gradio()
    listening = bound(settings.host, settings.port)
    with listening, tempfile.TemporaryDirectory(prefix="stable-cascade-page-") as folder:
        if not settings.only_this_machine:
            announce(OPEN_TO_OTHERS.format(host=settings.host))
        application = make_application(settings, Path(folder))
        server = make_server(application)
        announce(f"the page is at {address(settings.host, listening)} (Ctrl+C ends it)")
        if ready is not None:
            ready(server)
        with contextlib.suppress(KeyboardInterrupt):  # which the server raises again once it has ended
            server.run(sockets=[listening])


def address(host: str, listening: socket.socket) -> str:
    """Where a browser finds the page."""
    name = f"[{host.strip('[]')}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}/"


def make_application(settings: PageSettings, folder: Path) -> Any:
    """The page as an ASGI application, its model loaded; everything it writes goes into `folder`.

    Raises:
        ValueError: the model cannot be loaded.
    """
    os.environ.update(QUIET, GRADIO_TEMP_DIR=str(folder))  # before Gradio is imported and asked for a widget
    import gradio
    from fastapi import FastAPI

    from stable_cascade.drawing import Session

    from .page import CSS, make_page, theme
    from .studio import Studio

    session = Session(settings.model, dtype=settings.dtype, device=settings.device, offload=settings.offload)
    session.pipeline  # noqa: B018 - now, so that what is wrong with it is said before the page opens
    page = make_page(Studio(session, settings, folder))
    application = gradio.mount_gradio_app(
        FastAPI(openapi_url=None), page, path="/", server_name=settings.host, footer_links=[], run_history=False,
        allowed_paths=[], root_path="", show_error=False, max_file_size=settings.max_upload_bytes, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, theme=theme(), css=CSS,
    )  # fmt: skip
    # Slack for the form around a file.
    most = settings.max_upload_bytes + 2**20
    stored = partial(bytes_in, folder)
    return Guard(application, most_bytes=most, only_this_machine=settings.only_this_machine, stored=stored)


def bytes_in(folder: Path) -> int:
    """How much lies in a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def make_server(application: Any) -> Any:
    """The server; the browser's open connections do not keep it from ending."""
    import uvicorn

    config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=2, ws="none")
    return uvicorn.Server(config)


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

READING = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?|/(assets|static|svelte)/.+"
    r"|/gradio_api/(info|app_id|theme\.css|queue/data|upload_progress|heartbeat/[\w-]+)/?"
    r"|/gradio_api/file=(?!(?i:https?:)).+"
)
WRITING = re.compile(r"/gradio_api/(queue/join|upload|cancel|reset)/?")

# The browser may ask nobody else: whatever a later Gradio links to stays unasked.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = ((b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"))

_ELSEWHERE = re.compile(rb"access-control-", re.IGNORECASE)


class Guard:
    """An ASGI application around another one.

    Args:
        application: what it guards.
        most_bytes: of one request's body.
        only_this_machine: refuses requests that name another host, as a web page elsewhere would have a browser send.
        stored: bytes of what was uploaded and drawn so far; no upload may take them beyond `bounds.STORED_UPLOADS`.
    """

    def __init__(
        self,
        application: Application,
        *,
        most_bytes: int,
        only_this_machine: bool,
        stored: Callable[[], int] = lambda: 0,
    ) -> None:
        self.application = application
        self.most_bytes = most_bytes
        self.only_this_machine = only_this_machine
        self.stored = stored

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers a refused request itself and passes the others on."""
        if scope["type"] == "lifespan":
            return await self.application(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        refusal = self.refusal(scope)
        if refusal is not None:
            return await _answer(send, *refusal)
        gone: list[Message] = []
        try:
            await self.application(scope, self._counted(receive, gone), _with_headers(send))
        except Exception as error:
            if not gone:
                raise
            # Whoever sent it is no longer there to be answered, and a trace would tell nobody anything.
            logger.warning("a request to %s broke off (%s)", scope["path"], type(error).__name__)

    def _counted(self, receive: Receive, gone: list[Message]) -> Receive:
        """Passes a body on as long as it is within its bound, whatever its headers say; then the sender is gone."""
        total = 0

        async def receiving() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.most_bytes:
                message = {"type": "http.disconnect"}
            if message["type"] == "http.disconnect":
                gone.append(message)
            return message

        return receiving

    def refusal(self, scope: Message) -> tuple[int, str] | None:
        """Status and text of a request that is not let through."""
        headers = dict(scope["headers"])
        if self.only_this_machine and not is_loopback(_host(headers.get(b"host", b""))):
            return 403, "this page answers to localhost only; start it with --host to open it to others"
        allowed = {"GET": READING, "HEAD": READING, "POST": WRITING}.get(scope["method"])
        if allowed is None or not allowed.fullmatch(scope["path"]):
            return 404, "there is nothing here"
        if scope["method"] != "POST":
            return None
        # A page of another origin can have a browser post here; only what this page sends is taken.
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site", b"same-origin")
        if site not in (b"same-origin", b"none") or (origin is not None and not _same(origin, headers)):
            return 403, "only this page itself may send something here"
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411, "say how long the upload is"
        if b"transfer-encoding" in headers:
            return 400, "a length and a transfer encoding contradict each other"
        if int(length) > self.most_bytes:
            return 413, "the upload is too large"
        if scope["path"].rstrip("/").endswith("/upload") and self.stored() + int(length) > bounds.STORED_UPLOADS:
            return 507, "the page holds as many images as it may; save yours, and start it again"
        return None


def _same(origin: bytes, headers: dict[bytes, bytes]) -> bool:
    """Whether a request's origin is the host that it is sent to."""
    try:
        return urlsplit(origin.decode("latin-1")).netloc.lower() == headers.get(b"host", b"").decode("latin-1").lower()
    except ValueError:
        return False


def _host(header: bytes) -> str:
    try:
        return urlsplit(f"//{header.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""


def _with_headers(send: Send) -> Send:
    """Adds our headers, and takes out those that would let a page of another origin read the answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name, value) for name, value in message.get("headers", []) if not _ELSEWHERE.match(name)]
            message = {**message, "headers": [*own, *HEADERS]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
