"""Vectors of faces, painted where the faces are, as control image: for images of a given person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from .arguments import checked_count, checked_probability, draw_chance, per_sample
from .faces import IDENTITY_SIZE, CascadeFaceEmbedder, FaceEmbedder, InsightFaceEmbedder
from .loading import constructed, load_class

EMBEDDERS = {"insightface": InsightFaceEmbedder, "cascade": CascadeFaceEmbedder}
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
