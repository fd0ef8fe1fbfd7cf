"""`stable-cascade app`: the page in a browser."""

from __future__ import annotations

import argparse
from typing import Any

from stable_cascade.disk import local_path


def add_app(commands: Any) -> None:
    """Adds `app`."""
    from stable_cascade.app.settings import DEFAULT_PORT, LARGEST_UPLOAD

    parser = commands.add_parser(
        "app",
        help="draw on a page in the browser",
        description="Serves a page with every way of drawing, on this machine and without a network.",
    )
    # What is served, and where.
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a Hub name (default %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 is any free one (default %(default)s)")
    # LoRAs, ControlNets and how the model runs.
    parser.add_argument(
        "--lora-dir", type=local_path, metavar="FOLDER", help="LoRAs to choose from: its .safetensors files"
    )
    parser.add_argument(
        "--controlnet",
        type=local_path,
        action="append",
        default=[],
        metavar="PATH",
        help="a ControlNet; may be repeated",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: CUDA where there is one)")
    parser.add_argument("--offload", action="store_true", help="keep only the network at work on the device")
    parser.add_argument(
        "--max-upload-megapixels", type=float, default=LARGEST_UPLOAD, metavar="N",
        help="largest image that is taken (default %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=_app)


def _app(arguments: argparse.Namespace) -> None:
    import signal
    import sys

    from stable_cascade.app.serving import serve
    from stable_cascade.app.settings import PageSettings

    settings = PageSettings(
        model=arguments.model,
        host=arguments.host,
        port=arguments.port,
        lora_dir=arguments.lora_dir,
        controlnets=tuple(arguments.controlnet),
        dtype=arguments.dtype,
        device=arguments.device,
        offload=arguments.offload,
        max_upload_megapixels=arguments.max_upload_megapixels,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the way out that removes the images' folder
    serve(settings, announce=lambda line: print(line, flush=True))
