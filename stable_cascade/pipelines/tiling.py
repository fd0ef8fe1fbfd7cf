"""Stage A in tiles, as a pipeline asks for it."""

from __future__ import annotations

from typing import Any


class VAETilingMixin:
    """`enable_vae_tiling` and `disable_vae_tiling` of a pipeline with a `vqgan`."""

    vqgan: Any

    def enable_vae_tiling(
        self, tile_sample_min_height: int | None = None, tile_sample_min_width: int | None = None
    ) -> None:
        """Stage A works in tiles: memory for one of them, and the same picture.

        Pictures of 2048 x 2048 pixels and more do so without being asked; see `StableCascadeVQGAN.enable_tiling`.
        """
        self.vqgan.enable_tiling(tile_sample_min_height, tile_sample_min_width)

    def disable_vae_tiling(self) -> None:
        """Stage A works on whole pictures, however large."""
        self.vqgan.disable_tiling()
