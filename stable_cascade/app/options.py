"""What the page is started with."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path

from stable_cascade.wording import quoted

DEFAULT_PORT = 7860
LARGEST_UPLOAD = 32.0
"""Megapixels of an uploaded image."""
_SMALLEST_FILE = 4 * 2**20


@dataclass(frozen=True)
class PageSettings:
    """The model, the folders to choose from, the address, and how large an upload may be.

    Raises:
        ValueError: a folder that does not exist, a port or a number of megapixels that means nothing.
    """

    model: str = "embedded"
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    lora_dir: Path | None = None
    controlnets: tuple[Path, ...] = ()
    dtype: str = "float32"
    device: str | None = None
    offload: bool = False
    max_upload_megapixels: float = LARGEST_UPLOAD

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port {self.port} is not a port; give 1 to 65535, or 0 for any free one")
        pixels = self.max_upload_megapixels
        if not math.isfinite(pixels) or not 0 < pixels <= 1000:
            raise ValueError(f"--max-upload-megapixels {pixels:g} is not a number above 0 and up to 1000")
        if self.lora_dir is not None and not self.lora_dir.is_dir():
            raise ValueError(f"--lora-dir {quoted(self.lora_dir)} is no folder; give one with .safetensors files")
        for path in self.controlnets:
            if not path.exists():
                raise ValueError(f"--controlnet {quoted(path)} does not exist; give a ControlNet's folder or file")

    @property
    def max_upload_bytes(self) -> int:
        """The largest file that is taken: four bytes per pixel, what the largest image has uncompressed."""
        return max(_SMALLEST_FILE, int(4e6 * self.max_upload_megapixels))

    @property
    def only_this_machine(self) -> bool:
        """Whether nobody else can reach the page."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
