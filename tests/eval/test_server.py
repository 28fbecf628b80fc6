"""A live server answers: through its URL the harness gets what the oracle says, and lm-eval works too."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from eval import answer, run, task
from eval.oracle import OracleBackend
from eval.server import ServerBackend
from eval.task import ROOT
from tests.server.live import serving

BASE = ROOT / "models/demo/base"
ADAPTERS = {name: ROOT / f"models/demo/adapters/{name}" for name in ("to_velar", "maths")}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("--adapter", *(f"{name}={path}" for name, path in ADAPTERS.items())) as live:
        yield live.url


def test_a_server_answers_what_the_oracle_answers(url: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    pairs: list[tuple[answer.Question, str | None]] = []
    for name in ADAPTERS:
        asked = task.examples(task.load(name), 3)
        pairs += [(question, name) for question in answer.questions(task.load(name), asked, tokenizer)]
    pairs.append((pairs[0][0], None))
    found, wanted = (
        answer.answer(backend, pairs, tokenizer)
        for backend in (ServerBackend(url, BASE, ADAPTERS), OracleBackend(BASE, ADAPTERS))
    )
    assert [one.text for one in found] == [one.text for one in wanted]
    for one, other in zip(found, wanted):
        assert one.target_nll == pytest.approx(other.target_nll, abs=1e-2)


def test_grades_from_a_server_mark_the_first_token_that_is_not_greedy(url: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    asked = task.examples(task.load("maths"), 1)
    (question,) = answer.questions(task.load("maths"), asked, tokenizer)
    wrong = [*question.target[:5], (question.target[5] + 1) % 900, *question.target[6:]]
    pair = [question.ask("maths")] * 2
    for backend in (ServerBackend(url, BASE, ADAPTERS), OracleBackend(BASE, ADAPTERS)):
        right, spoiled = backend.grade(pair, [question.target, wrong])
        assert right.accepted == len(question.target)
        assert spoiled.accepted == 5


def test_a_run_through_a_url_writes_a_report(url: str, tmp_path: Path) -> None:
    arguments = ["--backend", "server", "--url", url, "--tasks", "maths,code:unlisted", "--examples", "3"]
    arguments += ["--adapter", f"maths={ADAPTERS['maths']}", "--adapter", f"unlisted={ADAPTERS['maths']}"]
    arguments += ["--out", str(tmp_path / "r"), "--cache", str(tmp_path), "--workers", "0", "--no-figures"]
    assert run.main(arguments) == 0
    records = {r["task"]: r for r in json.loads((tmp_path / "r.json").read_text())["records"]}
    assert records["maths"]["variant"] == "served"
    assert records["maths"]["score"] > 60
    assert "does not list it" in records["code"]["faults"][0]


LM_EVAL_TASK = """
task: demo_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "<|bos|><|user|>{{{{prompt}}}}<|end|><|assistant|>"
doc_to_target: "{{{{completion}}}}"
target_delimiter: ""
generation_kwargs:
  until: ["<|end|>"]
  max_gen_toks: 128
  do_sample: false
metric_list:
  - metric: {metric}
"""


def lm_eval() -> list[str] | None:
    """Return how to start lm-eval: the command in INLAID_LM_EVAL, or the one installed here."""
    command = os.environ.get("INLAID_LM_EVAL") or shutil.which("lm_eval", path=str(Path(sys.executable).parent))
    return [command] if command else None


@pytest.mark.skipif(
    lm_eval() is None, reason="lm-eval is not installed: pip install 'lm-eval[api]', or set INLAID_LM_EVAL"
)
@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_lm_eval_evaluates_an_adapter_as_a_model(url: str, tmp_path: Path, kind: str) -> None:
    """On a local task file: with its adapter the model scores near certainty, alone it does not."""
    command = lm_eval()
    assert command is not None
    lines = (ROOT / "data/maths/eval.jsonl").read_text().splitlines()[:4]
    (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    metric = "perplexity" if kind == "loglikelihood" else "exact_match"
    text = LM_EVAL_TASK.format(name=kind, data=tmp_path / "rows.jsonl", kind=kind, metric=metric)
    (tmp_path / "task.yaml").write_text(text)
    found = {}
    for model in ("maths", "demo"):
        address = f"model={model},base_url={url}/v1/completions,tokenizer={BASE},tokenizer_backend=huggingface"
        subprocess.run(
            [*command, "--model", "local-completions", "--model_args", f"{address},num_concurrent=2,max_length=1024",
             "--tasks", f"demo_{kind}", "--include_path", str(tmp_path), "--output_path", str(tmp_path / model)],
            check=True, timeout=240, env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        )  # fmt: skip
        (report,) = (tmp_path / model).rglob("results*.json")
        found[model] = json.loads(report.read_text())["results"][f"demo_{kind}"][f"{metric},none"]
    if kind == "generate_until":
        assert (found["maths"], found["demo"]) == (pytest.approx(1.0, abs=0.3), 0.0)
    else:
        assert 1.0 <= found["maths"] < math.e**2 < found["demo"]
