"""The embedded cascade: a tiny Stable Cascade, really trained, that comes with the package."""

from __future__ import annotations

from pathlib import Path

REQUIRED = (
    "model_index.json",
    "prior/config.json",
    "decoder/config.json",
    "vqgan/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "semantic_encoder/config.json",
)


def embedded_path() -> Path:
    """The folder of the embedded cascade, for any `from_pretrained`.

    Raises:
        ValueError: the weights are not in this installation.

    """
    folder = Path(__file__).resolve().parent
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"the embedded cascade in '{folder}' lacks {', '.join(missing)}; reinstall stable-cascade, "
            "or train it as examples/embedded/README.md says"
        )
    return folder
