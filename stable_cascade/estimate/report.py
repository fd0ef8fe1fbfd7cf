"""Parameters and peak memory of a training, added up.

Weights, optimizer and averages are counted. What a step makes on top of them is traced: the whole step, forward and
backward, runs on the meta device at its real shapes (`memory.py`), with checkpointing as the config says.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.data import make_buckets
from stable_cascade.estimate.memory import optimizer_bytes, peak_bytes, tensor_bytes
from stable_cascade.estimate.steps import StepShapes, decoder_step, network_shape, prior_step
from stable_cascade.factory.networks import PRETRAINED, SCRATCH, quantizes

FRAMEWORK = 600 * 2**20
"""What a process takes beside its tensors: CUDA's context and kernels, workspaces of cuBLAS, gaps of the allocator."""

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Estimate:
    """Parameters, and bytes by part, per process; `parts` add up to `total`."""

    trainer: str
    image: tuple[int, int]
    rows: int
    parameters: int = 0
    trainable: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Bytes at the peak, the framework's included."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """Bytes of tensors at the peak: what `torch.cuda.max_memory_allocated` counts."""
        return self.total - self.parts.get("framework", 0)

    def __str__(self) -> str:
        height, width = self.image
        lines = [
            f"trainer         {self.trainer}",
            f"parameters      {self.parameters:,}",
            f"trainable       {self.trainable:,}",
            f"micro-batch     {self.rows} x {height} x {width} px (the largest size)",
            *(f"{size / 1e9:>9.2f} GB    {name}" for name, size in self.parts.items()),
            f"{self.total / 1e9:>9.2f} GB    expected peak per process (GB = 10^9 bytes)",
        ]
        return "\n".join([*lines, *self.notes])


def estimate(config: Any, trainer: str, *, processes: int = 1, mixed_precision: str = "bf16") -> Estimate:
    """The estimate of a config of one of the trainers lora, text_to_image, controlnet, decoder.

    Args:
        processes: how many share a global batch; with `use_fsdp` they share weights, gradients and states as well.
        mixed_precision: accelerate's setting: no, bf16 or fp16.

    Raises:
        ValueError: the batch does not divide, or the config names no network.
    """
    # The size of a micro-batch: its largest bucket.
    parts = processes * config.grad_accum_steps
    if processes < 1 or config.batch_size % parts:
        raise ValueError(f"batch_size {config.batch_size} is not divisible by {processes} processes x "
                         f"grad_accum_steps {config.grad_accum_steps}; choose another --processes")  # fmt: skip
    config, autocast = _without_files(config), PRECISIONS[mixed_precision]
    factor = network_shape(config, "semantic_encoder").stride
    size = max(
        make_buckets(config.image_size, config.multi_aspect_ratio, factor=factor).sizes, key=lambda s: s[0] * s[1]
    )
    rows = config.batch_size // parts

    # Build the step without weights; count what lies there for the whole training, then trace what a step adds.
    subject = (decoder_step if trainer == "decoder" else prior_step)(config, trainer, size, autocast)
    result = Estimate(trainer, size, rows)
    _count(result, config, subject, processes)
    _trace(result, config, subject, processes, autocast)
    result.parts["framework"] = FRAMEWORK
    result.notes.append(f"accelerate's mixed_precision: {mixed_precision}; processes: {processes}"
                        f"{', sharded (use_fsdp)' if config.use_fsdp else ''}")  # fmt: skip
    return result


def _count(result: Estimate, config: Any, subject: StepShapes, processes: int) -> None:
    """The parts that lie there for the whole training."""
    # What trains and what it is put on, with optimizer and average.
    shared = processes if config.use_fsdp else 1
    frozen = [p for p in subject.model.parameters() if not p.requires_grad]
    trained = [p for p in subject.model.parameters() if p.requires_grad]
    result.parameters = _parameters(subject.model, config)
    result.trainable = sum(p.numel() for p in trained)
    result.parts["frozen weights"] = (tensor_bytes(frozen) + tensor_bytes(subject.model.buffers())) // shared
    if quantizes(config) and config.quantization == "nf4":  # traced as int8, whose bytes are not nf4's
        from stable_cascade.adapters.quantized import quantized_bytes

        shape = network_shape(config, "prior")
        result.parts["frozen weights"] += quantized_bytes(shape, "nf4")[1] - quantized_bytes(shape, "int8")[1]
    result.parts["weights that train"] = tensor_bytes(trained) // shared
    result.parts["optimizer"] = optimizer_bytes(trained, config.optimizer) // shared
    if config.ema_beta is not None and not config.ema_offload:
        result.parts["moving average"] = 4 * result.trainable // shared
    # The networks that only serve.
    for name, network in subject.serves.items():
        size = tensor_bytes([*network.parameters(), *network.buffers()])
        if config.offload and name not in ("previewer", "text encoder, which trains"):
            size = max(tensor_bytes(module.parameters(recurse=False)) for module in network.modules())
        result.parts[name] = size
    # What several processes hold for each other.
    if processes > 1 and config.use_fsdp:
        result.parts["gathered blocks"] = 2 * max(
            (
                tensor_bytes(m.parameters())
                for m in subject.model.modules()
                if type(m).__name__.startswith("SDCascade")
            ),
            default=0,
        )
    elif processes > 1:
        result.parts["gradients of other processes"] = tensor_bytes(trained)  # DDP's buckets


def _trace(result: Estimate, config: Any, subject: StepShapes, processes: int, autocast: torch.dtype | None) -> None:
    """What a step makes beside them, or a preview, whichever is more."""
    trained = [p for p in subject.model.parameters() if p.requires_grad]
    gradients, sharded = tensor_bytes(trained), config.use_fsdp and processes > 1
    resident = [*subject.model.parameters(), *subject.model.buffers()]
    resident += [t for network in subject.serves.values() for t in (*network.parameters(), *network.buffers())]
    hooks = [p.register_post_accumulate_grad_hook(_drop) for p in trained] if sharded else []

    def step() -> None:
        for _ in range(min(2, config.grad_accum_steps)):  # the second finds the gradients of the first
            with torch.no_grad():
                kept = subject.encode(result.rows)
            subject.forward(result.rows).float().square().mean().backward()
            del kept

    # A training step; sharded, each gradient goes to its owner as soon as it is there.
    subject.model.train()
    peak = peak_bytes(step, resident, autocast=autocast)
    subject.model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()

    # A preview, and which of the two is more.
    subject.model.eval()
    shown = len(getattr(config, "validation_prompts", None) or ()) or getattr(config, "num_preview_images", 0)
    preview = 0
    if config.num_preview_images:
        with torch.no_grad():
            preview = peak_bytes(lambda: subject.preview(shown), resident)
    held = gradients // processes if sharded else min(gradients, peak)
    result.parts["gradients"] = held
    result.parts["activations"] = peak if sharded else peak - held
    if preview > held + result.parts["activations"]:
        result.parts["previews, above a step"] = preview - held - result.parts["activations"]


def _drop(parameter: Tensor) -> None:
    """Forgets a gradient that a sharded training would hand to its owner."""
    parameter.grad = None


def _without_files(config: Any) -> Any:
    """The config with `scratch` in the place of files that are not here: `model_version` says their sizes."""
    keys = [key for key in vars(config) if key.endswith("_checkpoint_path")]
    absent = {
        key: SCRATCH
        for key in keys
        if (where := getattr(config, key)) and where not in (SCRATCH, PRETRAINED) and not Path(where).exists()
    }
    absent |= {key: None for key in absent if key in ("lora_checkpoint_path", "controlnet_checkpoint_path")}
    return replace(config, **absent)


def _parameters(model: nn.Module, config: Any) -> int:
    """Number of parameters of what trains and of what it is put on, quantised ones counted as the weights they are."""
    if not quantizes(config):
        return sum(p.numel() for p in model.parameters())
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return adapters + sum(p.numel() for p in network_shape(config, "prior").parameters())
