"""Publishing: nothing is removed that this program did not write, and a kill at any point leaves a whole version."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from inlaid.adapters.peft import identity_of
from inlaid.quant import loop
from inlaid.quant.bank import bank_path, entry_key
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import Grid
from inlaid.quant.quantize import add_task, quantize, remove_task
from inlaid.quant.record import RECORD, Record
from inlaid.quant.settings import Gate, Place, QuantizeError, Settings, TaskSource
from tests.quant import killed
from tests.quant.tiny import write_adapter, write_base, write_data

ANYWAY = Gate(force=True)
SETTINGS = Settings(Grid(4, 32), CalibrationSettings(), "mean")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("world") / "base")


def source(root: Path, base: Path, name: str, seed: int) -> TaskSource:
    return TaskSource(name, write_adapter(root / name, base, seed), write_data(root / f"{name}.jsonl", seed))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_that_inlaid_did_not_write_is_refused_and_stays(tmp_path: Path, base: Path) -> None:
    task = source(tmp_path, base, "a", 0)
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("three years")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / RECORD).write_text("{}")
    (tmp_path / "link").symlink_to(thesis)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "banked.bank").write_text("mine")
    (tmp_path / "lost.bank").symlink_to(tmp_path / "nowhere")
    before = content(tmp_path)
    cases = [
        (thesis, "not empty and holds no record"),
        (tmp_path / "record", "not empty and holds no record"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "link", "symbolic link"),
        (tmp_path / "loop", "symbolic link"),
        (tmp_path / "banked", r"banked\.bank is a file"),
        (tmp_path / "lost", r"lost\.bank is a symbolic link"),
        (tmp_path, r"holds the adapter of task a|holds no record"),
        (Path("/"), "no name of its own"),
        (Path("."), "no name of its own"),
        (tmp_path / "thesis" / "..", "no name of its own"),
        (base.parent, "holds the base"),
        (base, "the base itself"),
        (base / "quantized", "inside the base"),
        (task.adapter / "out", "inside the adapter of task a"),
        (tmp_path / "link" / ".." / "a", "the adapter of task a itself"),
    ]
    for out, words in cases:
        with pytest.raises(QuantizeError, match=words):
            quantize(base, [task], SETTINGS, out, gate=ANYWAY)
    assert content(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_a_record_cannot_name_files_of_others(tmp_path: Path, base: Path) -> None:
    """Files that a record names are removed with its version, so a forged record must not name any outside."""
    out, thesis = tmp_path / "out", tmp_path / "thesis.txt"
    quantize(base, [source(tmp_path, base, "a", 0)], SETTINGS, out, gate=ANYWAY)
    thesis.write_text("three years")
    values = json.loads((out / RECORD).read_text())
    (out / RECORD).write_text(json.dumps(values | {"files": [*values["files"], "../thesis.txt"]}))
    for job in (
        lambda: remove_task(out, "a", gate=ANYWAY),
        lambda: quantize(base, [source(tmp_path, base, "b", 1)], SETTINGS, out, gate=ANYWAY),
    ):
        with pytest.raises(QuantizeError, match=r"outside of its folder|holds no record"):
            job()
    assert thesis.read_text() == "three years"


def test_a_bank_may_lie_on_another_disk(tmp_path: Path, base: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    bank_path(out).symlink_to(elsewhere)
    quantize(base, [source(tmp_path, base, "a", 0)], SETTINGS, out, gate=ANYWAY)
    assert len(list(elsewhere.iterdir())) == 1


def test_data_in_the_bank_is_refused(tmp_path: Path, base: Path) -> None:
    task = replace(source(tmp_path, base, "a", 0), data=write_data(tmp_path / "out.bank" / "a.jsonl", 0))
    with pytest.raises(QuantizeError, match=r"out\.bank holds the data of task a"):
        quantize(base, [task], SETTINGS, tmp_path / "out", gate=ANYWAY)


def test_foreign_files_are_never_lost(tmp_path: Path, base: Path) -> None:
    """Files in the folder are refused; those in the bank, and beside it under names like ours, are left alone."""
    one, two = source(tmp_path, base, "a", 0), source(tmp_path, base, "b", 1)
    out = tmp_path / "out"
    quantize(base, [one], SETTINGS, out, gate=ANYWAY)
    (out / "notes.txt").write_text("mine")
    before = content(out)
    for job in (
        lambda: add_task(out, two, gate=ANYWAY),
        lambda: quantize(base, [two], SETTINGS, out, gate=ANYWAY),
    ):
        with pytest.raises(QuantizeError, match=r"holds 'notes\.txt', which `inlaid quantize` did not write"):
            job()
    assert content(out) == before
    (out / "notes.txt").unlink()
    foreign = [
        bank_path(out) / "notes.txt",
        tmp_path / ".out.old" / "notes.txt",
        tmp_path / ".out.draft.partial" / "notes.txt",
        tmp_path / ".out.lock",
    ]
    for file in foreign:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    add_task(out, two, gate=ANYWAY)
    remove_task(out, "a", gate=ANYWAY)
    assert all(file.read_text() == "mine" for file in foreign)
    assert list(Record.read(out).tasks) == ["b"]
    assert set(Record.read(out).files) == set(os.listdir(out))


@pytest.mark.parametrize(
    ("owner", "name", "when", "at"),
    [
        ("publish", "sync_folder", "before", 1),
        ("publish", "exchange", "after", 1),
        ("Path", "unlink", "after", 3),
        ("Path", "rmdir", "before", 1),
    ],
)
def test_a_kill_while_publishing_leaves_a_whole_version(
    tmp_path: Path, base: Path, owner: str, name: str, when: str, at: int
) -> None:
    one, two = source(tmp_path, base, "a", 0), source(tmp_path, base, "b", 1)
    out = tmp_path / "out"
    quantize(base, [one], SETTINGS, out, gate=ANYWAY)
    old = content(out)
    task = f"{two.name}={two.adapter}:{two.data}"
    assert killed.exit_code(killed.publish_until, out, task, owner, name, when, at) == -signal.SIGKILL
    record = Record.read(out)
    assert set(record.files) == set(os.listdir(out))
    if sorted(record.tasks) == ["a"]:
        assert content(out) == old
        add_task(out, two, gate=ANYWAY)
    else:
        remove_task(out, "a", gate=ANYWAY)
    assert "b" in Record.read(out).tasks
    assert not list(tmp_path.glob(".*"))


def test_an_exchange_that_was_cut_short_is_repaired(tmp_path: Path, base: Path) -> None:
    """The folder is aside for a moment where names cannot be exchanged in one step."""
    one, two = source(tmp_path, base, "a", 0), source(tmp_path, base, "b", 1)
    out, aside = tmp_path / "out", tmp_path / ".out.old"
    quantize(base, [one], SETTINGS, out, gate=ANYWAY)
    out.rename(aside)
    assert sorted(add_task(out, two, gate=ANYWAY).tasks) == ["a", "b"]
    assert not aside.exists()


def test_another_who_puts_something_there_meanwhile_keeps_it(tmp_path: Path, base: Path) -> None:
    task, out = source(tmp_path, base, "a", 0), tmp_path / "out"

    def progress(step: str, done: int, total: int) -> None:
        if step.startswith("layer 2 solved"):
            out.mkdir()
            (out / "chapter.txt").write_text("three years")

    with pytest.raises(QuantizeError, match="not empty"):
        quantize(base, [task], SETTINGS, out, Place(progress=progress), ANYWAY)
    assert content(out) == {"chapter.txt": b"three years"}


def test_banks_and_records_of_former_versions_go_on(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 1 named adapters, and so the bank's entries, by sha256(config + weights)."""
    one, two = source(tmp_path, base, "a", 0), source(tmp_path, base, "b", 1)
    out = tmp_path / "out"
    quantize(base, [one], SETTINGS, out, gate=ANYWAY)
    want = content(out)
    config, weights = one.adapter / "adapter_config.json", one.adapter / "adapter_model.safetensors"
    former = hashlib.sha256(config.read_bytes() + weights.read_bytes()).hexdigest()
    values = json.loads((out / RECORD).read_text())
    values["version"] = 1
    del values["files"]
    values["tasks"]["a"]["adapter_hash"] = former
    (out / RECORD).write_text(json.dumps(values))
    (entry,) = bank_path(out).iterdir()
    key = entry_key(
        base=values["base"]["fingerprint"], adapter=former, data=values["tasks"]["a"]["data_hash"],
        calibration=values["settings"]["calibration"], dtype="float32", device="cpu",
    )  # fmt: skip
    entry.rename(entry.with_name(f"{key}-float32"))
    assert Record.read(out).tasks["a"]["adapter_hash"] == identity_of(one.adapter)

    made = []
    real = loop.block_hessians
    monkeypatch.setattr(loop, "block_hessians", lambda *args, **more: made.append(args[3]) or real(*args, **more))
    add_task(out, two, gate=ANYWAY)
    assert {adapter.identity for adapter in made} == {identity_of(two.adapter)}
    remove_task(out, "b", gate=ANYWAY)
    same = {name: data for name, data in content(out).items() if name != RECORD}
    assert same == {name: data for name, data in want.items() if name != RECORD}
    assert [folder.name for folder in bank_path(out).iterdir()] == [entry.name]
    write_adapter(one.adapter, base, 7)
    with pytest.raises(QuantizeError, match="adapter of task a has changed"):
        add_task(out, two, gate=ANYWAY)
    values["version"] = 3
    (out / RECORD).write_text(json.dumps(values))
    with pytest.raises(QuantizeError, match="version 3"):
        Record.read(out)
