"""Drafts from a trace: what guesses a drafter had at each place of recorded answers, and how many were right.

The simulator has no text, so its drafter guesses the word that its runner says, and another one where the trace was
wrong; the runner then accepts what the trace accepted, whatever lengths were chosen, and the scheduler, the ledger and
the lengths are the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import msgspec

from inlaid.engine.request import Request
from inlaid.engine.speculation import Draft

WORD, OTHER = 0, 2  # what the simulated runner says, and what it never says


class Guesses(msgspec.Struct, frozen=True, array_like=True):
    """The guesses at one place of an answer, how many were right, their source, and the tokens before that agree."""

    guesses: int = 0
    right: int = 0
    source: int = 0
    match: int = 4


NONE = Guesses()
Answer = Sequence[Guesses]  # by the number of tokens that are known; before the first there are no guesses


@dataclass(frozen=True)
class Acceptances:
    """Recorded answers by adapter."""

    by_adapter: Mapping[str, Sequence[Answer]]

    def __post_init__(self) -> None:
        for adapter, answers in self.by_adapter.items():
            wrong = any(not 0 <= place.right <= place.guesses for answer in answers for place in answer)
            if wrong or not answers or not all(answers):
                raise ValueError(f"the trace of {adapter!r} needs answers, each with no more guesses right than made")

    @classmethod
    def load(cls, path: Path) -> Acceptances:
        """Read a trace that `save` wrote."""
        return cls(msgspec.json.decode(path.read_bytes(), type=dict[str, list[list[Guesses]]]))

    def save(self, path: Path) -> None:
        """Write the trace, a line for each adapter."""
        lines = (f"{msgspec.json.encode(name).decode()}:{msgspec.json.encode(answers).decode()}"
                 for name, answers in self.by_adapter.items())  # fmt: skip
        path.write_text("{" + ",\n".join(lines) + "}\n")

    def answer(self, adapter: str, order: int) -> Answer:
        """Return the answer of a request by its order among all that were added; each adapter's come round in turn."""
        answers = self.by_adapter.get(adapter)
        return () if answers is None else answers[order // len(self.by_adapter) % len(answers)]

    def tokens_a_step(self) -> dict[str, float]:
        """Return by adapter what all guesses bring: tokens by decodes, those of the first token not counted."""
        return {name: mean_yield(answers) for name, answers in self.by_adapter.items()}


def mean_yield(answers: Sequence[Answer]) -> float:
    """Return the tokens of a decode with every guess taken."""
    yields = []
    for answer in answers:
        at = 1
        while at < len(answer):
            yields.append(min(1 + answer[at].right, len(answer) - at))
            at += yields[-1]
    return mean(yields) if yields else 1.0


class TracedDrafter:
    """Drafts as a trace has them."""

    def __init__(self, acceptances: Acceptances) -> None:
        self._acceptances = acceptances
        self._answers: dict[str, Answer] = {}  # by request

    def assign(self, request_id: str, answer: Answer) -> None:
        """Let a request go through this answer. Without, its order among all requests tells."""
        self._answers[request_id] = answer

    def at(self, request: Request) -> Guesses:
        """Return what the trace has where a request stands."""
        answer = self._answers.get(request.id)
        if answer is None:
            answer = self._acceptances.answer(request.adapter_name or "", request.order)
            self._answers[request.id] = answer
        place = request.num_outputs
        return answer[place] if place < len(answer) else NONE

    def draft(self, request: Request, most: int) -> Draft | None:
        place = self.at(request)
        tokens = ((WORD,) * place.right + (OTHER,) * (place.guesses - place.right))[:most]
        return Draft(tokens, place.source, place.match) if tokens else None

    def end(self, request: Request) -> None:
        self._answers.pop(request.id, None)
