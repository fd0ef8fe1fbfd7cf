"""What stands before Gradio: only the routes that the page needs, bounded bodies, and nothing from other hosts.

Gradio's server can do more than show a page: it fetches addresses for its callers, runs ffmpeg on uploads, and edits
the program in its development modes. None of that is reachable here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from stable_cascade import bounds

from .settings import is_loopback

log = logging.getLogger(__name__)

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

# The browser itself is told to ask nobody else: whatever a later Gradio links to stays unasked.
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
            log.warning("a request to %s broke off (%s)", scope["path"], type(error).__name__)

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
