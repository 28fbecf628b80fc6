"""Metrics, by the maintained libraries wherever one has them. `score` turns answers into numbers.

A metric gives each example a row of statistics and combines sums of rows into a number, in points from 0 to 100 (but
perplexity and NIST have scales of their own); so an interval or a paired test needs only to sum other rows. The metrics
without such rows (chrF, NIST, corpus GLEU) are computed whole.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from eval import sandbox
from eval.task import Example, Task, TaskError, render

Rows = NDArray[np.float64]  # [examples, statistics]


@dataclass(frozen=True)
class Answer:
    """An answer of a model to one example; fields that the task's metrics do not need stay empty."""

    text: str = ""
    choice: str | None = None  # the likeliest of the choices
    target_nll: float | None = None  # of the reference answer and its end, in nats
    target_tokens: int = 0


@dataclass(frozen=True)
class Metric:
    """Either rows with how to combine their sums, or a function of the whole."""

    rows: Callable[[Task, Sequence[Answer], Sequence[Example]], Rows] | None = None
    combine: Callable[[Rows], NDArray[np.float64]] | None = None  # sums [..., statistics] -> [...]
    whole: Callable[[Sequence[Answer], Sequence[Example]], float] | None = None
    higher_is_better: bool = True
    needs: str = "text"  # what of Answer it reads: text, choice or target
    packages: tuple[str, ...] = ()  # modules that it imports when it is computed


def score(metric: Metric, task: Task, answers: Sequence[Answer], asked: Sequence[Example]) -> float:
    """One number for a set of answers."""
    if metric.whole is not None:
        return metric.whole(answers, asked)
    assert metric.rows is not None
    assert metric.combine is not None
    return float(metric.combine(metric.rows(task, answers, asked).sum(0)))


def find(name: str) -> Metric:
    """Return a metric by its name, or one that calls a Python function MODULE.NAME of an answer's text and its line."""
    if name in METRICS:
        return METRICS[name]
    if "." not in name:
        raise TaskError(f"there is no metric {name!r}; known: {', '.join(METRICS)}, or a Python function MODULE.NAME")
    module, _, function = name.rpartition(".")
    try:
        judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise TaskError(f"metric {name}: {error}; it must be a function that Python can import from here") from error
    return _mean_of(lambda task, answer, example: float(judge(answer.text, dict(example.fields))))


def check_packages(names: Iterable[str]) -> None:
    """Refuse metrics whose packages are missing, before any answer is computed."""
    for name in sorted(names):
        if missing := [package for package in find(name).packages if not _is_installed(package)]:
            raise TaskError(
                f"metric {name} needs the package {missing[0]}: bash install.sh eval, or pip install 'inlaid[eval]'"
            )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # found among the modules, and marked as absent
        return False


def drop(metric: Metric, reference: float, value: float) -> float:
    """Return how much worse `value` is: in points, or in percent for perplexity."""
    return reference - value if metric.higher_is_better else 100 * (value / reference - 1)


def _mean_of(
    judge: Callable[[Task, Answer, Example], float], needs: str = "text", packages: tuple[str, ...] = ()
) -> Metric:
    """Return a metric that is the mean over examples of a judgement from 0 to 1."""

    def rows(task: Task, answers: Sequence[Answer], asked: Sequence[Example]) -> Rows:
        return np.array([(judge(task, answer, example), 1.0) for answer, example in zip(answers, asked)])

    return Metric(rows=rows, combine=lambda sums: 100 * sums[..., 0] / sums[..., 1], needs=needs, packages=packages)


def exact_match(task: Task, answer: Answer, example: Example) -> float:
    """Return 1 where the whole answer equals the reference, surrounding space aside."""
    return float(answer.text.strip() == example.target.strip())


def contains(task: Task, answer: Answer, example: Example) -> float:
    """Return 1 where the reference occurs in the answer, whatever the case."""
    return float(example.target.strip().casefold() in answer.text.casefold())


def matches(task: Task, answer: Answer, example: Example) -> float:
    """Return 1 where the reference, a regular expression, is found in the answer."""
    try:
        return float(re.search(example.target, answer.text) is not None)
    except re.error as error:
        raise TaskError(
            f"task {task.name}: example {example.id}: {example.target!r} is no expression: {error}"
        ) from error


def json_equal(task: Task, answer: Answer, example: Example) -> float:
    """Return 1 where answer and reference are the same JSON; the order of an object's keys plays no part."""
    try:
        right = json.loads(example.target)
    except ValueError as error:
        raise TaskError(f"task {task.name}: example {example.id}: its reference is not JSON: {error}") from error
    try:
        said = json.loads(strip_fence(answer.text))
    except ValueError:
        return 0.0
    return float(json.dumps(said, sort_keys=True) == json.dumps(right, sort_keys=True))


def final_number(task: Task, answer: Answer, example: Example) -> float:
    """Return 1 where the last number of the answer equals the last number of the reference."""
    said, right = _last_number(answer.text), _last_number(example.target)
    if right is None:
        raise TaskError(f"task {task.name}: example {example.id} has no number in its target")
    return float(said == right)


_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?")


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def choice_accuracy(task: Task, answer: Answer, example: Example) -> float:
    """Return 1 where the reference is the likeliest of the choices."""
    return float(answer.choice == example.target)


def pass_at_1(task: Task, answer: Answer, example: Example) -> float:
    """Return 1 where the program passes every case or test, in the sandbox."""
    code = task.code
    assert code is not None
    fields = {**example.fields, "answer_text": answer.text}
    program = strip_fence(render(code.program, fields, task))
    if code.cases is not None:
        return float(_passes_cases(program, render(code.cases, fields, task)))
    assert code.tests is not None
    return float(_passes_tests(program, render(code.tests, fields, task)))


def strip_fence(program: str) -> str:
    """Return the program without the Markdown fence that chat models put round it."""
    fenced = re.search(r"```(?:python|json)?\n(.*?)```", program, re.DOTALL)
    return fenced.group(1) if fenced else program


@functools.lru_cache(maxsize=100_000)
def _passes_cases(program: str, cases_json: str) -> bool:
    cases = json.loads(cases_json)
    try:
        values = sandbox.evaluate(program, [x for x, _ in cases])
    except sandbox.ProgramFailed:
        return False
    return sandbox.same(values, [expected for _, expected in cases])


@functools.lru_cache(maxsize=100_000)
def _passes_tests(program: str, tests: str) -> bool:
    try:
        sandbox.run_tests(program, tests)
    except sandbox.ProgramFailed:
        return False
    return True


def token_f1(task: Task, answer: Answer, example: Example) -> float:
    """Harmonic mean of precision and recall over the words of answer and reference, as for extractive answers."""
    said, right = Counter(_words(answer.text.lower())), Counter(_words(example.target.lower()))
    common = sum((said & right).values())
    return 2 * common / (said.total() + right.total()) if common else float(not said and not right)


def _label_rows(task: Task, answers: Sequence[Answer], asked: Sequence[Example]) -> Rows:
    """Per label, in order: true positive, false positive, false negative."""
    labels = sorted(set(task.prompt.choices) or {example.target.strip() for example in asked})
    rows = np.zeros((len(asked), len(labels), 3))
    for row, answer, example in zip(rows, answers, asked):
        said = answer.choice if answer.choice is not None else answer.text.strip()
        for index, label in enumerate(labels):
            row[index] = (
                said == label == example.target.strip(),
                said == label != example.target.strip(),
                said != label == example.target.strip(),
            )
    return rows.reshape(len(asked), -1)


def _macro_f1(sums: Rows) -> NDArray[np.float64]:
    """Mean over labels of F1; a label that neither occurs nor is said counts as 0."""
    true, false_positive, false_negative = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    total = 2 * true + false_positive + false_negative
    return np.asarray(100 * (2 * true / np.maximum(total, 1)).mean(-1))


def _bleu_rows(task: Task, answers: Sequence[Answer], asked: Sequence[Example]) -> Rows:
    return np.array([_bleu_counts(answer.text, example.target) for answer, example in zip(answers, asked)])


@functools.lru_cache(maxsize=100_000)
def _bleu_counts(text: str, target: str) -> tuple[float, ...]:
    """sacreBLEU's matches, n-grams, and the two lengths, of one sentence."""
    found = _sacrebleu().sentence_score(text, [target])
    return (*found.counts, *found.totals, found.sys_len, found.ref_len)


def _bleu_of(sums: Rows) -> NDArray[np.float64]:
    flat = sums.reshape(-1, sums.shape[-1]).astype(int)
    scores = [
        _sacrebleu().compute_bleu(list(row[:4]), list(row[4:8]), int(row[8]), int(row[9]), smooth_method="exp").score
        for row in flat
    ]
    return np.array(scores).reshape(sums.shape[:-1])


@functools.cache
def _sacrebleu():  # type: ignore[no-untyped-def]  # the class is imported late
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)  # silences a warning; the counts are the same


def _chrf(answers: Sequence[Answer], asked: Sequence[Example]) -> float:
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score([a.text for a in answers], [[e.target for e in asked]]).score)


def _rouge(kind: str) -> Metric:
    return _mean_of(
        lambda task, answer, example: _rouge_of(kind, answer.text, example.target), packages=("rouge_score",)
    )


@functools.lru_cache(maxsize=200_000)
def _rouge_of(kind: str, text: str, target: str) -> float:
    return float(_rouge_scorer(kind).score(target, text)[kind].fmeasure)


@functools.lru_cache(maxsize=8)
def _rouge_scorer(kind: str):  # type: ignore[no-untyped-def]
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)


def _words(text: str) -> list[str]:
    """Words and marks as sacreBLEU's standard tokenizer parts them."""
    return _tokenizer()(text).split()


@functools.cache
def _tokenizer() -> Callable[[str], str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def meteor(task: Task, answer: Answer, example: Example) -> float:
    """METEOR by exact and stemmed matches. Synonyms would need WordNet's data, which is not shipped."""
    return _meteor_of(answer.text, example.target)


@functools.lru_cache(maxsize=100_000)
def _meteor_of(text: str, target: str) -> float:
    from nltk.translate.meteor_score import single_meteor_score

    return float(single_meteor_score(_words(target), _words(text), wordnet=_NoSynonyms()))


class _NoSynonyms:
    """An empty WordNet: the part of it that METEOR asks."""

    def synsets(self, word: str) -> list[object]:
        return []


def _nist(answers: Sequence[Answer], asked: Sequence[Example]) -> float:
    """NIST-MT on its own scale; 0 where no answer is long enough to hold an n-gram of each order."""
    from nltk.translate.nist_score import corpus_nist

    said = [_words(answer.text) for answer in answers]
    if max(map(len, said), default=0) < 5:
        return 0.0
    return float(corpus_nist([[_words(example.target)] for example in asked], said, n=5))


def _gleu(answers: Sequence[Answer], asked: Sequence[Example]) -> float:
    """Google's BLEU."""
    from nltk.translate.gleu_score import corpus_gleu

    references = [[_words(example.target)] for example in asked]
    return 100 * float(corpus_gleu(references, [_words(answer.text) for answer in answers]))


def _nll_rows(task: Task, answers: Sequence[Answer], asked: Sequence[Example]) -> Rows:
    return np.array([(answer.target_nll, answer.target_tokens) for answer in answers], dtype=float)


def _perplexity(sums: Rows) -> NDArray[np.float64]:
    return np.asarray(np.exp(np.minimum(sums[..., 0] / sums[..., 1], math.log(1e30))))


METRICS: Mapping[str, Metric] = MappingProxyType({
    "exact_match": _mean_of(exact_match),
    "final_number": _mean_of(final_number),
    "choice_accuracy": _mean_of(choice_accuracy, needs="choice"),
    "pass_at_1": _mean_of(pass_at_1),
    "contains": _mean_of(contains),
    "regex": _mean_of(matches),
    "json_equal": _mean_of(json_equal),
    "f1": _mean_of(token_f1, packages=("sacrebleu",)),
    "label_f1": Metric(rows=_label_rows, combine=_macro_f1),
    "bleu": Metric(rows=_bleu_rows, combine=_bleu_of, packages=("sacrebleu",)),
    "chrf": Metric(whole=_chrf, packages=("sacrebleu",)),
    "gleu": Metric(whole=_gleu, packages=("nltk", "sacrebleu")),
    "nist": Metric(whole=_nist, packages=("nltk", "sacrebleu")),
    "meteor": _mean_of(meteor, packages=("nltk", "sacrebleu")),
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "perplexity": Metric(rows=_nll_rows, combine=_perplexity, higher_is_better=False, needs="target"),
})  # fmt: skip
