"""The grid of answers: for each base, every task with its adapter. Only what the cache does not know is asked, all
adapters of a base together, and answers are kept after every few hundred questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import answer as asking
from eval import provenance, task
from eval.answer import Decoding, Question
from eval.backend import Backend, OpenBackend
from eval.cache import Cache, Key
from eval.metrics import Answer
from eval.task import Example, Task
from inlaid.adapters.peft import identity_of
from inlaid.kv_format import AUTO
from inlaid.progress import Bar
from inlaid.text.tokenizer_files import as_transformers

CHUNK = 1024  # questions asked at once, and lost at most by a kill


@dataclass(frozen=True)
class Base:
    """One base to evaluate: a variant at a bit width for a calibration seed, as a folder.

    With `task` the base is for that task alone. `kv` is the form of keys and values in the cache, see
    `inlaid/kv_format.py`.
    """

    variant: str
    bits: int
    folder: Path
    seed: int = 0
    task: str | None = None
    kv: str = AUTO.name


@dataclass(frozen=True)
class Cell:
    """One task with one adapter (None: the base alone) on one base. `refusal` says why there are no answers."""

    base: Base
    base_version: str
    task: Task
    adapter: str | None
    adapter_identity: str
    answers: tuple[Answer, ...]
    refusal: str | None = None


@dataclass(frozen=True)
class Asked:
    """A task with its examples, made once for the whole grid."""

    task: Task
    examples: tuple[Example, ...]
    fingerprint: str

    @classmethod
    def load(cls, name: str, limit: int | None) -> Asked:
        loaded = task.load(name)
        return cls.of(loaded, task.examples(loaded, limit))

    @classmethod
    def of(cls, loaded: Task, examples: Sequence[Example]) -> Asked:
        return cls(loaded, tuple(examples), task.fingerprint(loaded, examples))


class Grid:
    """The questions and the backend, which are the same for every base."""

    def __init__(
        self,
        asked: Sequence[Asked],
        adapters: Mapping[str, Path],
        adapter_of: Mapping[str, str | None],
        open_backend: OpenBackend,
        backend_key: tuple[str, str],
        cache: Cache,
        decoding: Decoding = "draft",
    ) -> None:
        self.asked = asked
        self.adapters = adapters
        self.adapter_of = adapter_of  # task -> adapter
        self.open_backend = open_backend
        self.backend_key = backend_key  # name and setting
        self.cache = cache
        self.decoding = decoding
        self.identities = {name: identity_of(path) for name, path in adapters.items()}
        self._known_questions: dict[tuple[str, str], list[Question]] = {}  # by task and tokenizer

    def run(self, base: Base, alone: bool = False) -> list[Cell]:
        """Return every task's cell on this base; with `alone`, those of the base without adapters too."""
        version, tokens = provenance.base_identity(base.folder), provenance.tokenizer_identity(base.folder)
        tasks = [asked for asked in self.asked if base.task in (None, asked.task.name)]
        wanted = [(asked, self.adapter_of[asked.task.name]) for asked in tasks]
        if alone:
            wanted += [(asked, None) for asked in tasks if self.adapter_of[asked.task.name] is not None]
        keys = [self._key(version, tokens, base.kv, asked, adapter) for asked, adapter in wanted]
        missing = [index for index, key in enumerate(keys) if self.cache.get(key) is None]
        refused = self._ask(base, [wanted[index] for index in missing], [keys[index] for index in missing])
        return [self._cell(base, version, asked, adapter, key, refused) for (asked, adapter), key in zip(wanted, keys)]

    def _key(self, version: str, tokens: str, kv: str, asked: Asked, adapter: str | None) -> Key:
        how = ", forward only" if self.decoding == "forward" else ""
        how += f", {kv} keys and values" if kv != AUTO.name else ""
        return Key(
            base=version,
            tokenizer=tokens,
            adapter=self._identity(adapter),
            task=asked.fingerprint,
            backend=self.backend_key[0],
            setting=self.backend_key[1] + how,
            draft=self.decoding != "plain",
        )

    def _identity(self, adapter: str | None) -> str:
        return "none" if adapter is None else self.identities[adapter]

    def _cell(
        self, base: Base, version: str, asked: Asked, adapter: str | None, key: Key, refused: Mapping[str, str]
    ) -> Cell:
        refusal = refused.get(adapter or "")
        answers = () if refusal else tuple(self.cache.get(key) or ())
        return Cell(base, version, asked.task, adapter, self._identity(adapter), answers, refusal)

    def _ask(self, base: Base, wanted: Sequence[tuple[Asked, str | None]], keys: Sequence[Key]) -> dict[str, str]:
        """Put the missing answers into the cache; return the adapters that could not be loaded."""
        if not wanted:
            return {}
        tokenizer, asked_with = as_transformers(base.folder), provenance.tokenizer_identity(base.folder)
        used = {adapter for _, adapter in wanted if adapter is not None}
        adapters = {name: path for name, path in self.adapters.items() if name in used}
        backend = self.open_backend(base.folder, adapters, base.kv)
        try:
            able = [pair for pair in zip(wanted, keys) if pair[0][1] not in backend.refused]
            questions = [
                (index, question, adapter)
                for index, ((asked, adapter), _) in enumerate(able)
                for question in self._questions(asked, asked_with, tokenizer)
            ]
            self._ask_in_chunks(base, backend, questions, [key for _, key in able], tokenizer)
            return dict(backend.refused)
        finally:
            backend.close()

    def _questions(self, asked: Asked, asked_with: str, tokenizer: Any) -> list[Question]:
        """Return a task's questions as a tokenizer has them; the bases of a grid mostly share one."""
        key = asked.fingerprint, asked_with
        if key not in self._known_questions:
            self._known_questions[key] = asking.questions(asked.task, asked.examples, tokenizer)
        return self._known_questions[key]

    def _ask_in_chunks(
        self,
        base: Base,
        backend: Backend,
        questions: Sequence[tuple[int, Question, str | None]],
        keys: Sequence[Key],
        tokenizer: Any,
    ) -> None:
        """Ask, and keep the answers of a cell as soon as it has all of its own."""
        left = [sum(owner == index for owner, _, _ in questions) for index in range(len(keys))]
        answers: list[list[Answer]] = [[] for _ in keys]
        title = f"{base.variant} {base.bits}-bit"
        with Bar(total=len(questions), desc=title, unit="answer", leave=False) as progress:
            for start in range(0, len(questions), CHUNK):
                chunk = questions[start : start + CHUNK]
                pairs = [(question, adapter) for _, question, adapter in chunk]
                for (owner, _, _), given in zip(chunk, asking.answer(backend, pairs, tokenizer, self.decoding)):
                    answers[owner].append(given)
                    if len(answers[owner]) == left[owner]:
                        self.cache.put(keys[owner], answers[owner])
                progress.update(len(chunk))
