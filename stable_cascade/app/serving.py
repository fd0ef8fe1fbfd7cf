"""The page on a socket: the address is taken first, the model loaded second, and everything is left clean."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from stable_cascade.wording import brief

from .settings import PageSettings

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


def serve(settings: PageSettings, *, told: Callable[[str], None], ready: Callable[[Any], None] | None = None) -> None:
    """Serves the page until Ctrl+C.

    Args:
        told: gets the lines for whoever started it.
        ready: gets the server once the address is known; its `should_exit` ends it.

    Raises:
        ValueError: Gradio is missing, the port is in use, or the model cannot be loaded.
    """
    check_gradio()
    listening = bound(settings.host, settings.port)
    with listening, tempfile.TemporaryDirectory(prefix="stable-cascade-page-") as folder:
        if not settings.only_this_machine:
            told(OPEN_TO_OTHERS.format(host=settings.host))
        application = make_application(settings, Path(folder))
        server = make_server(application)
        told(f"the page is at {address(settings.host, listening)} (Ctrl+C ends it)")
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

    from .guard import Guard
    from .page import make_page
    from .panels import CSS, theme
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
