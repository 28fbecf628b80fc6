"""StepLog: the seconds and the load of some of the last steps, for the console and for fits of a cost model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import msgspec

from inlaid.engine.request import Batch
from inlaid.engine.steps import Timing

_RUN = 16  # steps in a row are kept, as the host's part of one falls into the time of the one before,
_EVERY = 4  # and then none for three times as many: measuring the load of each would cost time between steps
_KEPT = 600


class Load(msgspec.Struct, frozen=True):
    """Load of a step: the regressors of the model. Attention reads a prompt's keys for each of its tokens."""

    prefill_tokens: int = 0
    prefills: int = 0
    decodes: int = 0
    prompt_context: int = 0  # prompt tokens that decodes attend to
    output_context: int = 0  # output tokens that decodes attend to
    prefill_attention: int = 0  # pairs of tokens
    adapters: int = 0
    adapter_rows: int = 0  # requests with an adapter
    ranks: int = 0
    guesses: int = 0  # rows of drafts, which read no keys of their own

    @classmethod
    def of(cls, batch: Batch, ranks: Mapping[str, int]) -> Load:
        """Measure the load of a batch, given the ranks of its adapters."""
        tokens = prefills = attention = decodes = prompts = outputs = rows = guesses = 0
        adapters: set[str] = set()
        for work in batch.works:
            request = work.request
            if work.is_decode:
                decodes += 1
                guesses += len(work.draft)
                prompts += len(request.prompt)
                outputs += work.start - len(request.prompt) + 1
            else:
                prefills += 1
                tokens += work.num_tokens
                attention += work.num_tokens * (2 * work.start + work.num_tokens) // 2
            if request.adapter is not None:
                rows += 1
                adapters.add(request.adapter)
        ranks_sum = sum(ranks.get(adapter, 0) for adapter in adapters)
        return cls(tokens, prefills, decodes, prompts, outputs, attention, len(adapters), rows, ranks_sum, guesses)


class Step(msgspec.Struct, frozen=True):
    """A measured step: its load, and its wall time from the end of the step before, host work included.

    A host that works ahead makes the next step while the device computes this one, so `seconds` holds the `host`
    seconds of the next: `waited` is what the host then waited for this one to end, and None where it made no other.
    """

    seconds: float
    load: Load
    host: float = 0.0  # to make and submit this step
    waited: float | None = None
    number: int = 0  # of all steps; those of two that followed each other do so too


class StepLog:
    """The last steps that were measured, oldest first."""

    def __init__(self, rank_of: Callable[[str], int], every: int = _EVERY, kept: int | None = _KEPT) -> None:
        """Keep one run of steps out of `every`, and the last `kept` steps of them (None: all)."""
        self.seconds = 0.0  # of all steps
        self._rank_of = rank_of
        self._every = every
        self._num_seen = 0
        self._steps: deque[Step] = deque(maxlen=kept)

    def measure(self, batch: Batch) -> Load | None:
        """Return the load of a step if it is one to keep. Adapters of its requests must still be held."""
        self._num_seen += 1
        if (self._num_seen - 1) // _RUN % self._every:
            return None
        ranks = {name: self._rank_of(name) for work in batch.works if (name := work.request.adapter) is not None}
        return Load.of(batch, ranks)

    def note(self, load: Load | None, timing: Timing) -> None:
        """Count a step that is over."""
        self.seconds += timing.busy
        if load is not None:
            self._steps.append(Step(timing.busy, load, timing.host, timing.waited, self._num_seen))

    def list(self) -> list[Step]:
        """Return the steps that are kept."""
        return list(self._steps)
