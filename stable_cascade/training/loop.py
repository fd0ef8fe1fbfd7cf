"""The one training loop. It does not know what it trains.

    for each step: grad_accum_steps micro-batches -> loss -> gradients -> clip -> optimizer -> moving average

`step` is the number of optimizer updates done. All randomness is a function of (seed, step, sample), so a run that is
stopped and resumed ends with the weights of one that never stopped, bit for bit on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.config import TrainingSettings
from stable_cascade.training import tracking
from stable_cascade.training.optimizers import set_learning_rate
from stable_cascade.training.processes import SharedFailure, StopRequest, gathered
from stable_cascade.training.run import Figures, PreviewFunction, Run, SaveFunction, TrainResult
from stable_cascade.training.run_folders import held, named_if_full
from stable_cascade.transfer import to_host

LossFunction = Callable[[nn.Module, Any], Mapping[str, Tensor]]


class NonFiniteError(FloatingPointError):
    """The loss or the gradient of a step is infinite or not a number; the weights were not touched by it."""


def train(
    config: TrainingSettings,
    accelerator: Any,
    *,
    model: nn.Module,
    batches: Callable[..., Iterator[Any]],
    loss_fn: LossFunction,
    save_fn: SaveFunction,
    preview_fn: PreviewFunction,
    stateful: Mapping[str, Any] | None = None,
    after_step: Callable[[Tensor, Tensor], None] | None = None,
    learning_rate: Callable[[str], float] | None = None,
    data: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train the parameters of `model` that require gradients until `config.updates` steps are done, or a signal comes.

    Args:
        model: what `loss_fn` calls; parameters that require gradients train.
        batches: start step -> this process's micro-batches from that step on, `grad_accum_steps` per step; a batch has
            `keys` and `broken`.
        loss_fn: (model, batch) -> `loss` (B,), and `log_snr` and `unweighted` (B,) for `after_step`.
        save_fn: (folder, model, averaged weights or None) writes the model in its own format.
        preview_fn: (folder, model, step, averaged weights or None) draws preview sheets and returns their paths.
        stateful: objects with `state_dict` and `load_state_dict` that belong to the run, by name.
        after_step: (log_snr, unweighted) of the whole global batch in sample order, after the step's update.
        learning_rate: name of a parameter -> its learning rate after the warm-up, instead of `config.lr` for all; the
            course over the steps is the same for every rate.
        data: what tells the samples from others (`SampleIndex.content`); a resumed run must have the same.

    Raises:
        ValueError: nothing trains, launch, config, data and checkpoint do not fit together, or another training
            holds the run's folder.
        NonFiniteError: the loss or gradient of a step is not finite.
        ProcessFailedError: another process of the launch failed.
        DiskFullError: there is no space for a checkpoint.
    """
    run = Run(config, accelerator, model, dict(stateful or {}), save_fn, preview_fn, learning_rate, data)
    alone = held(run.folder) if accelerator.is_main_process else contextlib.nullcontext()
    with SharedFailure(accelerator), named_if_full(run.images), alone:
        # Take up the last checkpoint.
        run.restore()
        if run.step >= config.updates:
            accelerator.print(f"{config.experiment_id}: all {config.updates} steps are done already")
            return run.finish()
        # Train until the last step or a signal.
        tracking.start_trackers(config, accelerator, run.tracker_run)
        stream = batches(run.step, run.data_state) if run.data_state else batches(run.step)
        try:
            with StopRequest() as stop:
                finished = _steps(run, stream, loss_fn, after_step, stop)
        finally:
            run.progress.close()
            if hasattr(stream, "close"):
                stream.close()
        # Save, export, or stop in order.
        result = run.finish() if finished else run.interrupted()
    accelerator.end_training()
    return result


def _steps(
    run: Run,
    stream: Iterator[Any],
    loss_fn: LossFunction,
    after_step: Callable[[Tensor, Tensor], None] | None,
    stop: StopRequest,
) -> bool:
    """Do the steps and end with a checkpoint; True when all are done, False when a signal ended them early."""
    config, accelerator = run.config, run.accelerator
    pending: Figures | None = None
    while run.step < config.updates:
        run.rate = set_learning_rate(run.optimizer, config, run.step, config.updates)
        figures = gradients(run, stream, loss_fn)
        norm = _clip(accelerator, run.model, config.max_grad_norm)
        figures.status = _status(run, figures.losses, norm, stop.wanted)
        figures.read_status = to_host(figures.status)
        if run.reads_late:
            # The device skips the update if the step is bad; the host asks one step later and so never waits.
            if accelerator.scaler is None:
                run.plain_optimizer.found_inf = (figures.status[1] > 0).float()
            stopping = pending is not None and _settle(accelerator, pending)
        else:
            stopping = _settle(accelerator, figures)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        if run.ema is not None:
            run.ema.update(run.trained, run.step)
        if after_step is not None and figures.noise_levels is not None and figures.unweighted is not None:
            after_step(
                global_order(accelerator, figures.noise_levels, config.grad_accum_steps),
                global_order(accelerator, figures.unweighted, config.grad_accum_steps),
            )
        run.count(figures)
        pending = figures
        last = run.step == config.updates
        saving = run.step % config.save_every == 0 or last or stopping
        if run.reads_late and (saving or run.backup_due):
            _settle(accelerator, figures)
            pending = None
        run.log(saving or run.backup_due)  # a checkpoint ends a line of the log, so that resuming loses no figure
        if saving or run.backup_due:
            whole = run.gather()
            run.save(whole)
            if (run.step % config.save_every == 0 and not stopping) or last:
                run.preview(whole)
            del whole
        if stopping and not last:
            return False
    return True


def gradients(run: Run, stream: Iterator[Any], loss_fn: LossFunction) -> Figures:
    """Add up the gradients of one global batch; the processes are averaged with the last micro-batch."""
    config, accelerator, parts = run.config, run.accelerator, run.config.grad_accum_steps
    terms: list[Mapping[str, Tensor]] = []
    keys: list[str] = []
    broken = 0
    for part in range(parts):
        batch = next(stream)
        run.after = getattr(batch, "after", None)
        with contextlib.nullcontext() if part == parts - 1 else accelerator.no_sync(run.model):
            with seeded(accelerator.device, config.seed, run.step, part, accelerator.process_index):
                computed = loss_fn(run.model, batch)
            accelerator.backward(computed["loss"].mean() / parts)
        terms.append({name: value.detach() for name, value in computed.items()})
        keys += batch.keys
        broken += batch.broken
    whole = {name: torch.cat([part[name].float() for part in terms]) for name in terms[0]}
    return Figures(run.step, whole["loss"], keys, broken, whole.get("log_snr"), whole.get("unweighted"))


def global_order(accelerator: Any, values: Tensor, parts: int) -> Tensor:
    """A value per sample of this process -> of all samples of the global batch, in its order.

    Shapes: (parts * m,) -> (parts * processes * m,).
    """
    if accelerator.num_processes == 1:
        return values
    gathered = accelerator.gather(values.to(accelerator.device).contiguous())
    return gathered.view(accelerator.num_processes, parts, -1).transpose(0, 1).reshape(-1)


def _clip(accelerator: Any, model: nn.Module, limit: float | None) -> Tensor:
    """Scale the gradient down to the norm `limit`; returns the norm it had."""
    # All parameters, though only some have gradients: accelerate recognises a sharded model by its complete list.
    norm = accelerator.clip_grad_norm_(list(model.parameters()), float("inf") if limit is None else limit)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    return (
        norm.detach().to(accelerator.device)
        if isinstance(norm, Tensor)
        else torch.zeros((), device=accelerator.device)
    )


def _status(run: Run, losses: Tensor, norm: Tensor, stop: bool) -> Tensor:
    """Summed over processes: the loss, how many of them have a non-finite loss or gradient, how many want to stop."""
    loss = losses.to(norm.device).mean()
    # With float16 gradients overflow now and then by design; the scaler skips those steps by itself.
    finite = loss.isfinite() if run.accelerator.scaler is not None else loss.isfinite() & norm.isfinite()
    status = torch.stack([loss, (~finite).float(), torch.full_like(loss, float(stop))])
    return run.accelerator.reduce(status, "sum") if run.accelerator.num_processes > 1 else status


def _settle(accelerator: Any, figures: Figures) -> bool:
    """Read the status of a step: whether somebody wants to stop.

    Raises:
        NonFiniteError: the step was bad.
    """
    assert figures.read_status is not None
    _, bad, stop = figures.read_status()
    if bad:
        named = [key for key, loss in zip(figures.keys, figures.losses.tolist(), strict=True) if loss - loss != 0]
        everyone = gathered(accelerator, (named, figures.keys))
        culprits = [key for some, _ in everyone for key in some] or [key for _, some in everyone for key in some]
        what = "loss" if any(some for some, _ in everyone) else "gradient norm"
        raise NonFiniteError(
            f"step {figures.step + 1}: the {what} is not finite; samples: {', '.join(culprits[:32])}"
            f"{', …' if len(culprits) > 32 else ''}; nothing of it was saved. Look at these samples, or lower "
            "lr, and resume from the last checkpoint"
        )
    return stop > 0


def step_seed(*parts: int) -> int:
    """A 63-bit number that depends on all parts and their order."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextlib.contextmanager
def seeded(device: torch.device, *parts: int) -> Iterator[None]:
    """Torch's generators seeded from `parts` inside the `with` block, and as they were after it.

    Dropout has no generator argument; this is the one place where the package touches the global generators.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(step_seed(*parts))
        yield
