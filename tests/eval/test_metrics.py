"""Metrics equal what their libraries, or a count by hand, say of the same answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from sacrebleu.metrics import BLEU

from data import scoring
from eval import metrics, task
from eval.metrics import METRICS, Answer, score
from eval.task import Example, Task, TaskError

ROOT = Path(__file__).parents[2]
REFERENCES = ["the cat sat on the mat today.", "a quick brown fox jumps over dogs", "one two three four five six"]
SAID = ["the cat sat on a mat today.", "a quick brown fox jumps over dogs", "six five four three two one"]


@pytest.fixture(scope="module")
def velar() -> Task:
    return task.load("to_velar")


def examples(targets: list[str]) -> list[Example]:
    return [Example(str(i), "", target, (), {}) for i, target in enumerate(targets)]


def texts(said: list[str]) -> list[Answer]:
    return [Answer(text=text) for text in said]


def test_bleu_from_summed_counts_is_the_corpus_bleu(velar: Task) -> None:
    ours = score(METRICS["bleu"], velar, texts(SAID), examples(REFERENCES))
    assert ours == pytest.approx(BLEU().corpus_score(SAID, [REFERENCES]).score)
    assert 0 < ours < 100


@pytest.mark.parametrize("name", ["exact_match", "f1", "bleu", "chrf", "gleu", "meteor", "rouge1", "rouge2", "rougeL"])
def test_a_perfect_answer_has_full_points_and_an_empty_one_none(velar: Task, name: str) -> None:
    asked = examples(REFERENCES)
    perfect = score(METRICS[name], velar, texts(REFERENCES), asked)
    assert perfect == pytest.approx(100, abs=0.5)  # METEOR keeps a fragmentation penalty
    assert score(METRICS[name], velar, texts(["", "", ""]), asked) == 0
    assert 0 < score(METRICS[name], velar, texts(SAID), asked) < perfect


def test_nist_orders_answers(velar: Task) -> None:
    asked = examples(REFERENCES)
    perfect, near, empty, short = (
        score(METRICS["nist"], velar, texts(said), asked)
        for said in (REFERENCES, SAID, ["", "", ""], ["the", "a quick", "one"])
    )
    assert perfect > near > short >= empty == 0


def test_token_f1_by_hand(velar: Task) -> None:
    assert score(METRICS["f1"], velar, texts(["a b c"]), examples(["b c d e"])) == pytest.approx(100 * 2 * 2 / 7)


def test_macro_f1_by_hand(velar: Task) -> None:
    asked = examples(["yes", "yes", "no", "no"])
    said = [Answer(choice=choice) for choice in ("yes", "no", "no", "no")]
    assert score(METRICS["label_f1"], velar, said, asked) == pytest.approx(100 * (2 / 3 + 4 / 5) / 2)


@pytest.mark.parametrize(
    ("said", "right"),
    [("so 12 + 3 = 15.", True), ("15 apples, then 16", False), ("none", False), ("-15", False), ("it is 15.0", True)],
)
def test_final_number(velar: Task, said: str, right: bool) -> None:
    assert score(METRICS["final_number"], velar, texts([said]), examples(["#### 15"])) == 100 * right


def test_final_number_reads_thousands_and_refuses_a_reference_without_one(velar: Task) -> None:
    assert score(METRICS["final_number"], velar, texts(["$1,234,567."]), examples(["1234567"])) == 100
    with pytest.raises(TaskError, match="no number"):
        score(METRICS["final_number"], velar, texts(["1"]), examples(["none"]))


def test_choice_accuracy_and_perplexity(velar: Task) -> None:
    said = [Answer(choice="A", target_nll=2.0, target_tokens=1), Answer(choice="B", target_nll=0.0, target_tokens=3)]
    assert score(METRICS["choice_accuracy"], velar, said, examples(["A", "A"])) == 50
    assert score(METRICS["perplexity"], velar, said, examples(["A", "A"])) == pytest.approx(math.exp(0.5))
    assert metrics.drop(METRICS["perplexity"], 2.0, 3.0) == pytest.approx(50)
    assert metrics.drop(METRICS["exact_match"], 98.0, 96.5) == pytest.approx(1.5)


@pytest.mark.parametrize("name", ["maths", "code", "medical"])
def test_the_demo_scoring_agrees(name: str) -> None:
    """On right answers, on another example's answer, and on broken ones."""
    loaded = task.load(name)
    asked = task.examples(loaded, 8)
    rows = [json.loads(line) for line in (ROOT / f"data/{name}/eval.jsonl").read_text().splitlines()[:8]]
    right = [row["completion"] for row in rows]
    for said in (right, right[1:] + right[:1], [text[:-2] for text in right], [""] * 8):
        ours = score(METRICS[loaded.metric.primary], loaded, texts(said), asked)
        assert ours == scoring.score(loaded.metric.primary, said, rows)


def test_programs_with_tests_pass_or_fail() -> None:
    mbpp = task.load("mbpp")
    fields = {"prompt": "", "test_imports": ["import math"], "test_list": ["assert f(4) == 2", "assert f(9) == 3"]}
    asked = [Example("0", "", "", (), fields)] * 2
    good = "Here:\n```python\nimport math\n\n\ndef f(n):\n    return math.isqrt(n)\n```\n"
    assert score(METRICS["pass_at_1"], mbpp, texts([good, "def f(n): return 2"]), asked) == 50


def test_an_unknown_metric_names_the_known() -> None:
    with pytest.raises(TaskError, match=r"no metric 'blue'; known: exact_match"):
        metrics.find("blue")
