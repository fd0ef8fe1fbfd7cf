"""The processes of a launch: what they exchange, and what ends them early, a signal or one process's error."""

from __future__ import annotations

import copy
import functools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .optimizers import MovingAverage, averaged
from .run_folders import checked


def gathered(accelerator: Any, own: Any) -> list[Any]:
    """The objects of all processes, in their order; all of them have to call it together."""
    if accelerator.num_processes == 1:
        return [own]
    from accelerate.utils import gather_object

    return gather_object([own])


def broadcast(accelerator: Any, value: Any) -> Any:
    """The main process's object, on all processes; all of them have to call it together."""
    from accelerate.utils import broadcast_object_list

    values = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(values)
    return values[0]


class StopRequest:
    """Inside its `with` block SIGTERM, SIGINT and SIGHUP set `wanted`; a second one has its usual effect.

    SIGHUP is what a closed terminal sends; where it is ignored, as under `nohup`, it stays so.
    """

    signals = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.wanted = False
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in self.signals if signal.getsignal(number) is not signal.SIG_IGN]
            self._usual = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self._restore()

    def _restore(self) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)
        self._usual = {}


class ProcessFailedError(ValueError):
    """Another process of the training failed; its own error says why."""


class SharedFailure:
    """Inside its `with` block the error of one process ends all processes, and each of them names it.

    Without it the others would wait for the failed one in their next exchange, for as long as the backend's timeout,
    and then report a lost connection. The error goes through the store that the processes met at.
    """

    key, grace = "stable_cascade/failure", 10.0

    def __init__(self, accelerator: Any) -> None:
        """`grace` seconds after it learns of a failure elsewhere, a process that is still stuck ends itself."""
        self.process = accelerator.process_index
        self.over = threading.Event()
        self.store: Any = None
        if accelerator.num_processes > 1:
            import torch.distributed as dist

            self.store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None

    def __enter__(self) -> SharedFailure:
        if self.store is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        if self.store is None or error is None:
            return
        own = " ".join(f"{type(error).__name__}: {error}".split())
        try:
            process, first = self.store.compare_set(self.key, "", f"{self.process}\n{own}").decode().split("\n")
        except (RuntimeError, ValueError):
            return  # whoever kept the store is gone
        if first != own and int(process) != self.process:
            raise ProcessFailedError(f"process {process} failed: {first}") from error

    def _watch(self) -> None:
        """Look for a failure elsewhere every second; end this process if it is stuck afterwards."""
        try:
            while not self.over.wait(1.0):
                if self.store.check([self.key]):
                    break
            if self.over.wait(self.grace):
                return
            process, first = self.store.get(self.key).decode().split("\n")
        except (RuntimeError, ValueError):
            return
        sys.stderr.write(f"error: process {process} failed: {first}\n")
        sys.stderr.flush()
        os._exit(1)  # the main thread waits in a collective that no exception reaches


def is_sharded(accelerator: Any) -> bool:
    """Whether accelerate shards the model."""
    return str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type)) == "FSDP"


def refuse_unsupported(accelerator: Any, model: nn.Module, optimizer: str) -> None:
    """Refuse what a sharded model cannot be or be trained with.

    Raises:
        ValueError: an 8-bit optimizer, quantized weights, or under FSDP 1 weights of several number formats.
    """
    if optimizer != "adamw":
        raise ValueError(f"optimizer {optimizer} does not work on sharded weights; set optimizer: adamw")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or type(parameter.data) is not Tensor:
            raise ValueError(
                f"FSDP cannot shard the quantized weight '{name}'; set quantization: none, or launch ddp.yaml"
            )
    formats = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    if len(formats) > 1 and not accelerator.is_fsdp2:
        raise ValueError(
            f"FSDP 1 cannot shard {' and '.join(formats)} weights in one unit; launch accelerate_configs/fsdp2.yaml, "
            "or set dtype: float32"
        )


def keep_precision(accelerator: Any, model: nn.Module) -> None:
    """Make mixed precision mean under FSDP what it means without: call it before `accelerator.prepare`.

    Left alone, FSDP casts every input of the network, the time included, whose step numbers bfloat16 cannot tell
    apart, and adds gradients up in bfloat16; FSDP 2 runs without autocast besides.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin is None or plugin.mixed_precision_policy is None:
        return
    form = plugin.mixed_precision_policy.param_dtype
    # FSDP 1 casts parameters, and gradients are summed in float32.
    if not accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecision

        plugin.mixed_precision_policy = MixedPrecision(
            param_dtype=form, reduce_dtype=torch.float32, buffer_dtype=torch.float32, cast_root_forward_inputs=False
        )
        return
    # FSDP 2 likewise; autocast as without FSDP, and its output in float32.
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=form, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    forward = model.forward

    @functools.wraps(forward)
    def autocast(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            output = forward(*args, **kwargs)
        return output.float() if isinstance(output, Tensor) else output

    model.forward = autocast


def blueprint(model: nn.Module) -> nn.Module:
    """A copy of the model whose weights take no memory; `build` fills it.

    Buffers outside the state dict are copied, since no checkpoint could bring them back.
    """
    kept = set(model.state_dict(keep_vars=True))
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        kept.discard(name)
    for name, buffer in model.named_buffers():
        if name in kept:
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def build(plan: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A model of its own, made from a blueprint around whole weights; it lies where they lie."""
    whole = copy.deepcopy(plan)
    whole.load_state_dict(dict(weights), strict=True, assign=True)
    return whole


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers, whole, on the CPU."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    with _quiet():
        gathered: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return gathered


@dataclass(frozen=True)
class Parts:
    """What every process writes and reads its part of.

    Args:
        names: the weights and buffers that change.
        trained: the parameters among them, which the moving average has as well.
    """

    model: nn.Module
    optimizer: Any
    ema: MovingAverage | None
    names: frozenset[str]
    trained: frozenset[str]


def write_parts(folder: Path, parts: Parts) -> None:
    """Write weights, optimizer state and moving average into a folder, every process its part, as safetensors."""
    import torch.distributed.checkpoint as dcp

    with _quiet():
        values = _values(parts)
        if parts.ema is not None:
            with averaged(parts.model, parts.ema):
                own = _own_weights(parts.model)
                values |= {f"ema/{name}": copy.deepcopy(own[name].detach()) for name in parts.trained}
        dcp.save(values, storage_writer=dcp.HuggingFaceStorageWriter(path=str(folder), save_distributed=True))


def write_together(accelerator: Any, folder: Path, parts: Parts) -> dict[str, list[int]]:
    """Make the folder and let every process write its part into it; the files' sizes and checksums.

    Raises:
        ValueError: the processes do not see the same folder.
    """
    if accelerator.is_main_process:
        folder.mkdir()
    accelerator.wait_for_everyone()
    if not all(gathered(accelerator, folder.is_dir())):
        raise ValueError(f"{folder.parent} is not a folder that all machines share; set checkpoint_path to one")
    write_parts(folder, parts)
    files = sorted(folder.iterdir())[accelerator.process_index :: accelerator.num_processes]
    sums = gathered(accelerator, {f"{folder.name}/{path.name}": checked(path) for path in files})
    return {name: value for some in sums for name, value in some.items()}


def read_parts(folder: Path, parts: Parts) -> None:
    """Put what `write_parts` wrote in place, whatever number of processes wrote it.

    Raises:
        ValueError: the folder holds other weights.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    def load(values: dict[str, Any]) -> dict[str, Any]:
        dcp.load(values, storage_reader=dcp.HuggingFaceStorageReader(path=str(folder)))
        return {key.partition("/")[2]: value for key, value in values.items()}

    with _quiet():
        # The parts must be those of this model.
        keys = dcp.HuggingFaceStorageReader(path=str(folder)).read_metadata().state_dict_metadata
        there = {key.removeprefix("weights/") for key in keys if key.startswith("weights/")}
        if odd := sorted(there ^ parts.names):
            raise ValueError(
                f"checkpoint {folder.parent} and the model differ in '{odd[0]}'; resume with the same settings"
            )
        # The average passes through the model's weights, which are read after it.
        own = _own_weights(parts.model)
        if parts.ema is not None:
            _spread(parts.model, load({f"ema/{name}": copy.deepcopy(own[name].detach()) for name in parts.trained}))
            parts.ema.take(parts.model)
        _spread(parts.model, load({f"weights/{name}": own[name] for name in parts.names}))
        # The optimizer's state, into tensors of this process's own share.
        state = _optimizer_state(parts)
        tensors = {f"optimizer/{key}": value for key, value in state.items() if torch.is_tensor(value)}
        set_optimizer_state_dict(parts.model, parts.optimizer, state | load(tensors), options=_flat())


def _spread(model: nn.Module, own: dict[str, Any]) -> None:
    """Give the model this process's part of weights; names that are absent keep theirs."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, own, options=StateDictOptions(strict=False))


def _values(parts: Parts) -> dict[str, Any]:
    """What this process holds of weights and optimizer state, by the key it has on disk."""
    weights = {f"weights/{name}": value for name, value in _own_weights(parts.model).items() if name in parts.names}
    state = _optimizer_state(parts).items()
    return weights | {f"optimizer/{key}": value for key, value in state if torch.is_tensor(value)}


def _own_weights(model: nn.Module) -> dict[str, Any]:
    """What this process holds of all weights and buffers, on the CPU."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return dict(get_model_state_dict(model, options=StateDictOptions(cpu_offload=True)))


def _optimizer_state(parts: Parts) -> dict[str, Any]:
    """What this process holds of the optimizer's state, on the CPU, by parameter name."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return dict(get_optimizer_state_dict(parts.model, parts.optimizer, options=_flat()))


def _flat() -> Any:
    """Options under which torch names the optimizer's state by parameter, one tensor per key."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(cpu_offload=True, flatten_optimizer_state_dict=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about the tensor class that FSDP 1 itself uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        yield
