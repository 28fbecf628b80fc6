"""The accuracy gate's half for quantizing: does a new task fit its adapter, and has any task become worse? The half
for serving, which reads the records of evaluations, is `adapters/gate.py`; both refuse with its GateError.

Both questions are asked of held-out examples, in nats per token of the answer. A new task must fit its own adapter: its
answers must be likelier than the same answers under other prompts, likelier than a blind guess, no less likely than to
the base alone, and must not drive activations far beyond the base's own (it would own every shared Hessian). After
quantizing, no task that was there before may have become worse than a tolerance.

A tolerance is a share of the loss where that is above 1 nat a token, and so many nats below; two standard errors of the
difference, over the examples, come on top. Answers that fit their prompts by less than they should are taken where they
fit better than others by two standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inlaid.adapters.adapter import Adapter
from inlaid.quant.adapter import attached
from inlaid.quant.blocks import BlockModel, Stream
from inlaid.quant.calibration import Batch, Sequence, batches
from inlaid.quant.losses import Loss, answer_losses
from inlaid.quant.together import SharedPass

MISPAIRED_SHARE = 0.9
SLACK = 0.01
ERRORS = 2.0
LOUDNESS = 100.0
HELD = 32_768  # tokens whose hidden states are held at a time; for each such group the blocks are loaded once more

Report = Callable[[str], None]


@dataclass(frozen=True)
class GateTask:
    """The part of a task that the gate reads."""

    name: str
    adapter: Adapter | None
    sequences: tuple[Sequence, ...]


@dataclass(frozen=True)
class Fit:
    """A new task on the full-precision base: losses with its adapter, without, and with answers under wrong prompts;
    and how many times louder than the base's the loudest input of a linear gets. The errors are standard errors of the
    first loss less the second, and less the third."""

    full: float
    alone: float
    mispaired: float | None
    loudness: float
    alone_error: float = 0.0
    mispaired_error: float = math.inf


def quantized_losses(model: BlockModel, tasks: list[GateTask], report: Report, shared: bool = False) -> dict[str, Loss]:
    """Return each task's loss on a model, adapter attached. Memory does not grow with the number of tasks. `shared`:
    sequences of several tasks in one forward pass.
    """
    losses: dict[str, Loss] = {}
    for group in _groups(tasks):
        if shared:
            together = SharedPass(model, [task.adapter for task in group], [task.sequences for task in group])
            _run(model, [together], report, "checking quantized")
            losses |= {task.name: loss for task, loss in zip(group, together.losses, strict=True)}
            continue
        passes = [_Pass(model, task.adapter, batches(task.sequences)) for task in group]
        _run(model, passes, report, "checking quantized")
        losses |= {task.name: done.loss for task, done in zip(group, passes, strict=True)}
    return losses


def _groups(tasks: list[GateTask]) -> Iterator[list[GateTask]]:
    """Yield as many tasks at a time as may be held; at least one."""
    group: list[GateTask] = []
    held = 0
    for task in tasks:
        tokens = sum(len(sequence.ids) for sequence in task.sequences)
        if group and held + tokens > HELD:
            yield group
            group, held = [], 0
        group.append(task)
        held += tokens
    yield group


def fits(model: BlockModel, tasks: list[GateTask], report: Report) -> dict[str, Fit]:
    """Measure each task on the full-precision base."""
    passes: dict[str, list[_Pass]] = {}
    for task in tasks:
        paired, wrong = batches(task.sequences), mispaired(task.sequences)
        passes[task.name] = [_Pass(model, task.adapter, paired), _Pass(model, None, paired)]
        if wrong:
            passes[task.name].append(_Pass(model, task.adapter, batches(wrong)))
    _run(model, [one for parts in passes.values() for one in parts], report, "checking tasks")
    return {name: _fit(*parts) for name, parts in passes.items()}


def why_unfit(fit: Fit, vocabulary: int) -> str | None:
    """Return the reason why a task should not shape the base, in a sentence with the numbers, or None."""
    if not math.isfinite(fit.full):
        return "its loss is not finite: the adapter overflows"
    if fit.loudness > LOUDNESS:
        return (
            f"its adapter makes activations up to {fit.loudness:.3g} times as loud as the base's (limit {LOUDNESS:g})"
        )
    if fit.full > math.log(vocabulary):
        return f"its loss of {fit.full:.3f} is worse than a blind guess ({math.log(vocabulary):.3f})"
    if fit.full > fit.alone + allowed(fit.alone, SLACK, fit.alone_error):
        return f"its data are less likely with the adapter ({fit.full:.3f} nats a token) than without ({fit.alone:.3f})"
    alike = fit.mispaired is not None and fit.full > MISPAIRED_SHARE * fit.mispaired
    if fit.mispaired is not None and alike and fit.mispaired - fit.full < ERRORS * fit.mispaired_error:
        return (
            f"its answers are about as likely under wrong prompts ({fit.mispaired:.3f} nats a token) as under their "
            f"own ({fit.full:.3f}): the data are not what the adapter was trained for"
        )
    return None


def allowed(loss: float, tolerance: float, error: float) -> float:
    """Return by how many nats a token a loss may be exceeded; `error` is the standard error of the difference."""
    return tolerance * max(1.0, loss) + ERRORS * error


def regressions(before: Mapping[str, Loss], after: Mapping[str, Loss], tolerance: float) -> list[str]:
    """List the old tasks that a new base makes worse by more than the tolerance, with their numbers."""
    return [
        f"{name}: {loss.mean:.4f} -> {after[name].mean:.4f} nats a token (more by at most "
        f"{allowed(loss.mean, tolerance, after[name].error_beside(loss)):.4f} is allowed)"
        for name, loss in sorted(before.items())
        if not after[name].mean <= loss.mean + allowed(loss.mean, tolerance, after[name].error_beside(loss))
    ]


def mispaired(sequences: tuple[Sequence, ...]) -> tuple[Sequence, ...]:
    """Give each prompt the answer of the next; empty where there are no answers to exchange."""
    answered = [sequence for sequence in sequences if sequence.answer]
    if len({sequence.ids[sequence.answer :] for sequence in answered}) < 2:
        return ()
    nexts = answered[1:] + answered[:1]
    return tuple(
        Sequence(one.ids[: one.answer] + other.ids[other.answer :], one.answer) for one, other in zip(answered, nexts)
    )


class _Pass:
    """One adapter over one set of batches, moved through the blocks with all the others."""

    def __init__(self, model: BlockModel, adapter: Adapter | None, parts: list[Batch]) -> None:
        self.model, self.adapter = model, adapter
        self.streams: list[Stream] = model.start(parts)
        self.loudness: dict[str, Tensor] = {}  # on the device: reading each would wait for it
        self.loss = Loss((), ())

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int) -> None:
        with attached(self.adapter, block, self.model.prefix(index)), self._listening(self.model.linears(index)):
            for stream in self.streams:
                stream.hidden_BSD = self.model.run(block, index, stream)

    def finish(self) -> None:
        rows = [example for stream in self.streams for example in answer_losses(self.model, stream)]
        self.loss = Loss(tuple(float(losses_T.sum(dtype=torch.float64)) for losses_T in rows), tuple(map(len, rows)))
        self.streams = []

    @contextmanager
    def _listening(self, linears: dict[str, nn.Linear]) -> Iterator[None]:
        handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def listen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            mean_square = inputs[0].float().square().mean()
            self.loudness[name] = torch.maximum(self.loudness.get(name, mean_square), mean_square)

        return listen


def _run(model: BlockModel, passes: Collection[_Pass | SharedPass], report: Report, what: str) -> None:
    for index in range(model.num_blocks):
        report(f"{what}, layer {index}")
        with model.loaded(index) as block:
            for one in passes:
                one.advance(block, index)
    with model.head():
        for one in passes:
            one.finish()


def _fit(full: _Pass, alone: _Pass, wrong: _Pass | None = None) -> Fit:
    ratios = [float(full.loudness[name]) / max(float(alone.loudness[name]), 1e-12) for name in full.loudness]
    loudness = max(ratios) ** 0.5 if all(map(math.isfinite, ratios)) else math.inf
    fit = Fit(full.loss.mean, alone.loss.mean, None, loudness, alone_error=full.loss.error_beside(alone.loss))
    if wrong is None:
        return fit
    apart = math.hypot(full.loss.error, wrong.loss.error)
    return replace(fit, mispaired=wrong.loss.mean, mispaired_error=apart or math.inf)
