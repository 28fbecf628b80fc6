"""A runner for the time in which requests that began on the old base finish on it, while new ones run on the new base.

A step is divided: works of old requests run on the old model, kernel by kernel, the others as always. Both share the KV
pages and the adapters; no request ever reads KV of the other base, as blocks are named by base version.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from inlaid.engine.request import Batch, Sampled, StepResult, TokenLogprobs
from inlaid.model.transformer import Transformer

if TYPE_CHECKING:
    from inlaid.runner.cuda_runner import CudaRunner
    from inlaid.runner.model_runner import ModelRunner


class TwoBases:
    """Runs the requests in `old` on another model than the rest."""

    overlap = False  # a step is over before the next begins, so that nothing of one base waits for the other's

    def __init__(self, runner: ModelRunner | CudaRunner, model: Transformer, old: Set[str]) -> None:
        self.runner, self._model, self._old = runner, model, old

    def submit(self, batch: Batch) -> StepResult:
        """Compute both parts of the step; `collect` hands the result out."""
        stay = [work.request.id in self._old for work in batch.works]
        olds = tuple(work for work, old in zip(batch.works, stay, strict=True) if old)
        news = tuple(work for work, old in zip(batch.works, stay, strict=True) if not old)
        results: dict[bool, StepResult] = {}
        released = batch.released
        if news or not olds:
            results[False] = self._run(replace(batch, works=news, released=released))
            released = ()
        if olds:
            with self.runner.on(self._model):
                results[True] = self._run(replace(batch, works=olds, released=released))
        return _merged(batch, stay, results)

    def collect(self, ticket: StepResult) -> StepResult:
        return ticket

    def _run(self, batch: Batch) -> StepResult:
        runner: Any = self.runner
        result: StepResult = runner.collect(runner.submit(batch))
        return result


def _merged(batch: Batch, stay: list[bool], results: dict[bool, StepResult]) -> StepResult:
    """Return the results in the batch's order."""
    own = {old: iter(result.sampled) for old, result in results.items()}
    sampled: list[Sampled] = [next(own[old]) for work, old in zip(batch.works, stay, strict=True) if work.samples]
    logprobs: dict[str, list[TokenLogprobs]] = {}
    for result in results.values():
        logprobs.update(result.prompt_logprobs)
    return StepResult(sampled, logprobs)
