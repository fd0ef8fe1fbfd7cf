"""Faces in an image, and a vector that says whose they are."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import checked_count, checked_number, needed_module
from .kernels import gaussian_blur, resized

IDENTITY_SIZE = 512


@runtime_checkable
class FaceEmbedder(Protocol):
    """Finds faces. `size` is the length of its vectors; a fixed image always gives the same answer."""

    size: int

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (left, top, right, bottom, in pixels) and vectors of length one.

        Shapes: (3, H, W) in [0, 1] on the CPU -> (N, 4) float32, (N, size) float32.
        """
        ...


class InsightFaceEmbedder:
    """ArcFace vectors through the package insightface: what the original trained with.

    The models are downloaded by insightface on first use, unless `root` holds them; their licence is not this
    package's and forbids commercial use.

    Args:
        name: the model pack, or a folder with its ONNX files.
        root: the folder under which insightface keeps its models; None: its own.
        detection_size: side of the square in which faces are looked for.
        threshold: how sure the detector has to be.
        app: a prepared `insightface.app.FaceAnalysis`, or anything with its `get(bgr)`, instead of all that.
    """

    size = IDENTITY_SIZE

    def __init__(
        self,
        name: str = "buffalo_l",
        root: str | None = None,
        *,
        detection_size: int = 640,
        threshold: float = 0.5,
        app: Any = None,
    ) -> None:
        self.name, self.root, self._app = name, root, app
        self.detection_size = checked_count("detection_size", detection_size, lowest=32)
        self.threshold = checked_number("threshold", threshold, 0, 1)

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and ArcFace vectors; shapes as in `FaceEmbedder`.

        Raises:
            ValueError: insightface is not installed.
        """
        if self._app is None:
            self._app = self._prepared()
        levels = (image.clamp(0, 1) * 255).round().byte()
        found = self._app.get(levels.flip(0).permute(1, 2, 0).contiguous().numpy())
        boxes = [torch.as_tensor(face.bbox).float() for face in found]
        vectors = [torch.as_tensor(face.embedding).float().flatten() for face in found]
        return _stacked(boxes, vectors, self.size)

    def _prepared(self) -> Any:
        remedy = "pip install 'stable-cascade[identity]', or embedder: cascade in controlnet_filter_params"
        module = needed_module("insightface.app", "IdentityFilter", remedy)
        kept = {} if self.root is None else {"root": self.root}
        app = module.FaceAnalysis(name=self.name, allowed_modules=["detection", "recognition"], **kept)
        app.prepare(ctx_id=0, det_thresh=self.threshold, det_size=(self.detection_size, self.detection_size))
        return app


class CascadeFaceEmbedder:
    """Faces by a cascade of local binary patterns, described by the directions of their gradients.

    Works from packages alone: scikit-image ships the trained cascade (frontal faces), and the vector is a fixed
    description of the face's crop, 8 x 8 cells of 8 directions. It is no ArcFace: it tells images of one shot
    apart from those of another, and does not recognise a person across pose, age or light. Use it to try out and
    test identity trainings, not to train one for use.

    Args:
        side: the image's shorter side at which faces are looked for.
        smallest: smallest face, as a share of the shorter side.
        neighbours: how many overlapping findings make a face.

    Source: Viola & Jones 2001, Liao et al. 2007 (the cascade); Dalal & Triggs 2005 (the description).
    """

    size = IDENTITY_SIZE
    cells, directions, crop = 8, 8, 64

    def __init__(self, *, side: int = 400, smallest: float = 0.1, neighbours: int = 6) -> None:
        self.side = checked_count("side", side, lowest=32)
        self.smallest = checked_number("smallest", smallest, 0.01, 1)
        self.neighbours = checked_count("neighbours", neighbours)
        self._cascade: Any = None

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and descriptions; shapes as in `FaceEmbedder`.

        Raises:
            ValueError: scikit-image is not installed.
        """
        brightness = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=0, keepdim=True)
        boxes = self._faces(brightness)
        return _stacked(boxes, [self._described(brightness, box) for box in boxes], self.size)

    def _faces(self, brightness: Tensor) -> list[Tensor]:
        shorter = min(brightness.shape[-2:])
        scale = min(1.0, self.side / shorter)
        size = (round(brightness.shape[-2] * scale), round(brightness.shape[-1] * scale))
        levels = (resized(brightness, size, antialias=True).clamp(0, 1) * 255).round().byte()[0].numpy()
        least, most = max(24, round(self.smallest * min(size))), min(size)
        if least > most:
            return []
        found = self._detector().detect_multi_scale(
            levels, 1.1, 1, min_size=(least, least), max_size=(most, most), min_neighbor_number=self.neighbours
        )
        corners = [(f["c"], f["r"], f["c"] + f["width"], f["r"] + f["height"]) for f in found]
        return [torch.tensor(corner, dtype=torch.float32) / scale for corner in corners]

    def _detector(self) -> Any:
        if self._cascade is None:
            remedy = "pip install 'stable-cascade[controls]'"
            feature = needed_module("skimage.feature", "the cascade face embedder", remedy)
            data = needed_module("skimage.data", "the cascade face embedder", remedy)
            self._cascade = feature.Cascade(data.lbp_frontal_face_cascade_filename())
        return self._cascade

    def _described(self, brightness: Tensor, box: Tensor) -> Tensor:
        """Directions of the gradients in every cell of the face, what all cells share taken off.

        Shapes: (1, H, W), (4,) -> (size,).
        """
        left, top, right, bottom = (int(value) for value in box.round())
        face = brightness[:, max(top, 0) : max(bottom, top + 1), max(left, 0) : max(right, left + 1)]
        face = gaussian_blur(resized(face, self.crop, antialias=True), 1.0)[0]
        dy, dx = torch.gradient(face)
        angle = torch.atan2(dy, dx).remainder(torch.pi) * (self.directions / torch.pi)
        lower = angle.floor()
        share, bins = angle - lower, torch.arange(self.directions).view(-1, 1, 1)
        strength = torch.hypot(dx, dy)
        weights = strength * (
            (bins == lower.remainder(self.directions)) * (1 - share)
            + (bins == (lower + 1).remainder(self.directions)) * share
        )
        pooled = F.avg_pool2d(weights[None], self.crop // self.cells)[0].sqrt()
        return (pooled - pooled.mean(dim=(1, 2), keepdim=True)).flatten()


def _stacked(boxes: list[Tensor], vectors: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Both as one tensor each, vectors of length one; empty ones where there is no face."""
    if not boxes:
        return torch.zeros(0, 4), torch.zeros(0, size)
    return torch.stack(boxes), F.normalize(torch.stack(vectors), dim=1)
