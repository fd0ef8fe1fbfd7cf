"""File formats: names of weights as the original release has them and as ours has them."""

from __future__ import annotations

from .networks import KEY_MAPS, from_original, to_original

__all__ = ["KEY_MAPS", "from_original", "to_original"]
