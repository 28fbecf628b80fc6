"""A task is one file: those that come with the repository render, a new one needs no code, a wrong one says why."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from eval import metrics, task
from eval.task import TaskError

DEMO = sorted(json.loads((task.ROOT / "data/tasks.json").read_text()))
PLAIN = (
    'family = "x"\nlicence = "none"\n[data]\nfile = {file}\n[prompt]\ntext = "{{{{ q }}}}"\ntarget = "{{{{ a }}}}"\n'
)
REST = '[decoding]\nmax_tokens = 4\n[metric]\nprimary = "exact_match"\n'
ROWS: dict[str, dict[str, Any]] = {
    "wmt16_cs": {"translation": {"en": "a dog", "cs": "pes"}},
    "wmt16_de": {"translation": {"en": "a dog", "de": "ein Hund"}},
    "wmt16_fi": {"translation": {"en": "a dog", "fi": "koira"}},
    "wmt16_ro": {"translation": {"en": "a dog", "ro": "un câine"}},
    "wmt16_ru": {"translation": {"en": "a dog", "ru": "собака"}},
    "wmt16_tr": {"translation": {"en": "a dog", "tr": "bir köpek"}},
    "cnn_dailymail": {"article": "Long.", "highlights": "Short."},
    "qtsumm": {"table": {"title": "T", "header": ["a", "b"], "rows": [["1", "2"]]}, "query": "Q?", "summary": "S."},
    "mbpp": {"prompt": "Add.", "code": "def f(): pass", "test_list": ["assert f()"], "test_imports": []},
    "gsm8k": {"question": "2+2?", "answer": "It is 4.\n#### 4"},
    "medmcqa": {"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2},
    "toxic_chat": {"user_input": "hi", "toxicity": 0},
}


def write(folder: Path, text: str, rows: list[dict[str, Any]]) -> str:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.toml").write_text(text.format(file=json.dumps(str(data))) + REST)
    return str(folder / "mine.toml")


@pytest.mark.parametrize("name", DEMO)
def test_the_demo_tasks_are_as_the_data_says(name: str) -> None:
    loaded, facts = task.load(name), json.loads((task.ROOT / "data/tasks.json").read_text())[name]
    assert (loaded.metric.primary, loaded.decoding.max_tokens) == (facts["metric"], facts["max_tokens"])
    assert (loaded.family, loaded.adapter, loaded.data.file) == (
        facts["family"],
        facts["adapter"],
        facts["splits"]["eval"],
    )
    assert loaded.calibration == facts["splits"]["calibration"]
    assert task.examples(loaded, 3)[0].target


def test_every_file_names_known_metrics_and_a_licence() -> None:
    families: dict[str, int] = {}
    for name in task.names():
        loaded = task.load(name)
        for metric in (loaded.metric.primary, *loaded.metric.also):
            metrics.find(metric)
        assert loaded.licence
        if loaded.data.hub:
            families[loaded.family] = families.get(loaded.family, 0) + 1
    assert families.pop("translation") == 6
    assert set(families.values()) == {1}
    assert sorted(families) == [
        "code generation", "malicious-request detection", "maths word problems", "medical question answering",
        "table summary", "text summary", "text to SQL",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_real_twelve_render_their_data_sets_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Render with a stand-in for `datasets`, whose rows have the fields that the data sets' cards describe."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(
        hub: str, config: str | None, split: str, revision: str | None, token: object
    ) -> list[dict[str, Any]]:
        asked.append((hub, config, split))
        return [ROWS[name]] * 3

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    loaded = task.load(name)
    found = task.examples(loaded, 2)
    assert len(found) == 2
    assert asked == [(loaded.data.hub, loaded.data.config, loaded.data.split)]
    assert found[0].target
    assert "{" not in found[0].text


def test_without_datasets_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"pip install 'inlaid\[eval\]'"):
        task.examples(task.load("gsm8k"), 1)


def test_a_task_of_ones_own_is_one_file(tmp_path: Path) -> None:
    mine = task.load(write(tmp_path, PLAIN, [{"q": "what", "a": "that"}, {"q": "who", "a": "she"}]))
    assert mine.name == "mine"
    assert [(e.text, e.target) for e in task.examples(mine)] == [("what", "that"), ("who", "she")]
    assert len(task.examples(mine, 1)) == 1


def test_the_fingerprint_follows_everything_that_matters(tmp_path: Path) -> None:
    rows = [{"q": "what", "a": "that"}, {"q": "who", "a": "she"}]
    mine = task.load(write(tmp_path, PLAIN, rows))
    seen = {task.fingerprint(mine, task.examples(mine))}
    seen.add(task.fingerprint(mine, task.examples(mine, 1)))
    other = task.load(write(tmp_path, PLAIN.replace("{{{{ q }}}}", "Q: {{{{ q }}}}"), rows))
    seen.add(task.fingerprint(other, task.examples(other)))
    changed = task.load(write(tmp_path, PLAIN, [{"q": "what", "a": "this"}, rows[1]]))
    seen.add(task.fingerprint(changed, task.examples(changed)))
    assert len(seen) == 4
    again = task.load(write(tmp_path, PLAIN, rows))
    assert task.fingerprint(again, task.examples(again)) in seen


@pytest.mark.parametrize(
    ("text", "rows", "reason"),
    [
        (PLAIN + "colour = 3\n", [{"q": "", "a": ""}], "unknown field `colour`"),
        (PLAIN.replace("licence", "license"), [{"q": "", "a": ""}], "license"),
        (PLAIN.replace("[data]\nfile = {file}", '[data]\nfile = {file}\nhub = "x/y"'), [], "either `file` or `hub`"),
        (PLAIN, [{"q": "what"}], "'a' is undefined; the data has: q"),
        (PLAIN, [], "no examples"),
        (PLAIN + 'choices = ["x", "y"]\n', [{"q": "", "a": ""}], "`choices` and the metric choice_accuracy"),
        (PLAIN.replace("{{{{ q }}}}", "{{{{ q"), [{"q": "", "a": ""}], "end of template"),
    ],
)
def test_a_wrong_task_says_what_is_wrong(tmp_path: Path, text: str, rows: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(TaskError, match=reason):
        task.examples(task.load(write(tmp_path, text, rows)))


def test_data_that_is_not_json_lines_or_not_there(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN, [{"q": "", "a": ""}])
    (tmp_path / "rows.jsonl").write_text("{\n")
    with pytest.raises(TaskError, match="not JSON lines"):
        task.examples(task.load(path))
    (tmp_path / "rows.jsonl").write_text("[1]\n")
    with pytest.raises(TaskError, match="not a JSON object"):
        task.examples(task.load(path))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(TaskError, match="does not exist"):
        task.examples(task.load(path))
    with pytest.raises(TaskError, match="no task 'nothing'; known: "):
        task.load("nothing")


def test_a_template_cannot_reach_python() -> None:
    with pytest.raises(TaskError, match="unsafe"):
        task.render("{{ q.__class__.__mro__ }}", {"q": ""}, task.load("maths"))
