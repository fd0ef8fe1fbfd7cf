"""PEFT's adapter on a quantised layer."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear


class QuantizedLoraLinear(Linear):
    """LoRA or DoRA beside a `QuantizedLinear`. It cannot be merged: rounding to few bits would lose the update."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> Any:
        """Refuses.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"an adapter cannot be merged into {self.get_base_layer().form} weights; load the LoRA file into the "
            "network without quantization and fuse it there"
        )
