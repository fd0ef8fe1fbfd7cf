"""Control images for the ControlNet: what a filter makes of an image before it guides the prior.

A filter is a class with `channels` and `__call__(pixels, generators=None)`: images in [0, 1], (B, 3, H, W), become
control images (B, channels, h, w). With one generator per sample it draws (training); with None it is deterministic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

if TYPE_CHECKING:
    from .auxiliary import ControlNetAuxFilter
    from .edges import CannyFilter, SoftEdgeFilter
    from .identity import CascadeFaceEmbedder, FaceEmbedder, IdentityFilter, InsightFaceEmbedder
    from .inpainting import InpaintFilter
    from .qr import QRFilter
    from .registry import ControlFilter, check_filter, filter_names, make_filter, view_control
    from .super_resolution import SREffnetFilter, SRPixelFilter

__all__ = [
    "CannyFilter",
    "CascadeFaceEmbedder",
    "ControlFilter",
    "ControlNetAuxFilter",
    "FaceEmbedder",
    "IdentityFilter",
    "InpaintFilter",
    "InsightFaceEmbedder",
    "QRFilter",
    "SREffnetFilter",
    "SRPixelFilter",
    "SoftEdgeFilter",
    "check_filter",
    "filter_names",
    "make_filter",
    "view_control",
]

__getattr__, __dir__ = lazy_exports(globals())
