"""Recovery from a step that raised: find the requests that it fails on, so that only they end.

The works are run again by halves, one part after the other, without overlap. A work that fails alone is at fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from inlaid.engine.account import Account
from inlaid.engine.request import Batch, Request, Runner, SamplingParams, Status, StepResult, Work

PROBE = "probe"  # the id of the request that `probe` runs
MAX_RUNS = 64  # in one recovery; then what is left counts as failed, since the device may be the one at fault


@dataclass
class Recovered:
    """The works of a failed step that went well in the end, their result, and the errors of the others."""

    works: list[Work] = field(default_factory=list)
    result: StepResult = field(default_factory=lambda: StepResult([]))
    failed: list[tuple[Work, Exception]] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)


class _Runs:
    """Runs of parts of one batch, as long as some are left."""

    def __init__(self, runner: Runner, batch: Batch) -> None:
        self._runner = runner
        self._batch = batch
        self._num_left = MAX_RUNS
        self.recovered = Recovered()

    def halve(self, works: Sequence[Work], error: Exception) -> None:
        """Run works that have just failed together: each half alone."""
        if len(works) <= 1:
            self.recovered.failed += [(work, error) for work in works]
        else:
            middle = len(works) // 2
            self.run(works[:middle], error)
            self.run(works[middle:], error)

    def run(self, works: Sequence[Work], error: Exception | None = None) -> None:
        """Run works together, or give them up with the last error if no runs are left."""
        if not works:
            return
        if error is not None and not self._num_left:
            self.recovered.failed += [(work, error) for work in works]
            return
        self._num_left -= 1
        for work in works:
            work.request.num_preemptions += 1
        released = (*self._batch.released, *(work.request.id for work in works))
        try:
            part = Batch(self._batch.step, tuple(works), released)
            result = self._runner.collect(self._runner.submit(part))
        except Exception as raised:  # noqa: BLE001 - any error of the device, or of a request's own data
            self.halve(works, raised)
            return
        self.recovered.works += works
        self.recovered.result.sampled.extend(result.sampled)
        self.recovered.result.prompt_logprobs.update(result.prompt_logprobs)
        self.recovered.not_finite += result.not_finite


def recover(runner: Runner, batch: Batch, works: Sequence[Work], error: Exception | None) -> Recovered:
    """Run some works of a batch again after `error`, or for the first time if that is None.

    The runner's state of these requests is unknown: `released` names them, so that it is made anew, and a higher
    num_preemptions says that nothing carries on from the step before.
    """
    runs = _Runs(runner, batch)
    if error is None:
        runs.run(works)
    else:
        runs.halve(works, error)
    return runs.recovered


def probe(runner: Runner, block: int) -> Exception | None:
    """Compute one token of the base on a block of its own, and return why that failed, if it did.

    It tells a device that is broken from requests that each fail alone. The next batch must name PROBE as released.
    """
    request = Request(
        id=PROBE,
        prompt=[0],
        params=SamplingParams(max_tokens=1, temperature=0.0),
        adapter=None,
        adapter_name=None,
        account=Account("", 0),
        arrival=0.0,
        tokens=[0],
        blocks=[block],
        status=Status.RUNNING,
        limit=2,
    )
    try:
        runner.collect(runner.submit(Batch(0, (Work(request, 0, 1, True),), (PROBE,))))
    except Exception as error:  # noqa: BLE001 - whatever the device raises
        return error
    return None
