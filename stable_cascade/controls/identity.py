"""Vectors of faces, painted where the faces are, as control image: for images of a given person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .arguments import (
    checked_count,
    checked_number,
    checked_probability,
    constructed,
    draw_chance,
    load_class,
    needed_module,
    per_sample,
)
from .kernels import gaussian_blur, resized

CELL = 32


class IdentityFilter:
    """Zeros, and over every face its vector, on a grid of 32 x 32 pixels.

    The largest `max_faces` faces are kept, smaller ones painted last.

    Args:
        max_faces: faces per image at most.
        p_drop: how often a face is left out; never without a generator.
        p_full: how often the vector of an only face covers the whole image, which frees it of its place; never
            without a generator.
        embedder: "insightface" (ArcFace, an extra), "cascade" (packages alone, no ArcFace), "package.module:Class",
            or a `FaceEmbedder`.
        embedder_params: keyword arguments of an embedder given by name.

    Raises:
        ValueError: the embedder is unknown, its parameters are, or it is no `FaceEmbedder`.
    """

    def __init__(
        self,
        max_faces: int = 4,
        p_drop: float = 0.05,
        p_full: float = 0.3,
        *,
        embedder: str | FaceEmbedder = "insightface",
        embedder_params: Mapping[str, Any] | None = None,
    ) -> None:
        self.max_faces = checked_count("max_faces", max_faces)
        self.p_drop = checked_probability("p_drop", p_drop)
        self.p_full = checked_probability("p_full", p_full)
        self.embedder = _embedder(embedder, embedder_params)
        self.channels = self.embedder.size

    def __call__(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Shapes: (B, 3, H, W) in [0, 1] -> (B, 512, H // 32, W // 32), rounded down, at least 1."""
        painted = [self._painted(image, generator) for image, generator in per_sample(pixels, generators)]
        return torch.stack(painted).to(pixels.device)

    def _painted(self, image: Tensor, generator: Generator | None) -> Tensor:
        height, width = (max(1, side // CELL) for side in image.shape[-2:])
        control = torch.zeros(self.channels, height, width)
        boxes, vectors = self._largest(image)
        for box, vector in zip(boxes, vectors, strict=True):
            dropped, full = draw_chance(self.p_drop, generator), draw_chance(self.p_full, generator)
            if dropped:
                continue
            left, top, right, bottom = (int(value) for value in (box / CELL).round())
            left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
            right, bottom = max(right, left + 1), max(bottom, top + 1)
            if full and len(boxes) == 1:
                left, top, right, bottom = 0, 0, width, height
            control[:, top:bottom, left:right] = vector[:, None, None]
        return control

    def _largest(self, image: Tensor) -> tuple[Tensor, Tensor]:
        boxes, vectors = self.embedder(image)
        if boxes.shape != (len(boxes), 4) or vectors.shape != (len(boxes), self.channels):
            raise ValueError(
                f"{type(self.embedder).__name__} gave boxes {tuple(boxes.shape)} and vectors {tuple(vectors.shape)}; "
                f"expected (N, 4) and (N, {self.channels})"
            )
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        order = area.argsort(descending=True, stable=True)[: self.max_faces]
        return boxes[order].float().cpu(), vectors[order].float().cpu()


def _embedder(embedder: str | FaceEmbedder, params: Mapping[str, Any] | None) -> FaceEmbedder:
    if isinstance(embedder, str):
        cls = load_class("embedder", embedder, EMBEDDERS)
        embedder = constructed(cls, params, "embedder_params")
    elif params:
        raise ValueError("embedder_params go with an embedder given by name; this one is made already")
    if not callable(embedder) or not isinstance(getattr(embedder, "size", None), int):
        raise ValueError(
            f"embedder {type(embedder).__name__} needs `size`, the length of its vectors ({IDENTITY_SIZE} for the "
            "guide's ControlNet), and `__call__(image) -> (boxes, vectors)`"
        )
    return embedder


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


EMBEDDERS = {"insightface": InsightFaceEmbedder, "cascade": CascadeFaceEmbedder}
