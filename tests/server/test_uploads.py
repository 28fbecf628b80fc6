"""Adapters in the body of a request: served under their name, swapped while requests run, bounded, refused by name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import ADMIN_KEY, DEMO, Live, serving

PATH = "/v1/load_lora_adapter_from_tensors"
EDGE = "a-boundary-of-the-form"
LONG: dict[str, Any] = {"model": "mine", "prompt": "The sea", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


def form(fields: dict[str, str | bytes]) -> bytes:
    parts = []
    for name, value in fields.items():
        data = value.encode() if isinstance(value, str) else value
        head = f'--{EDGE}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{EDGE}--\r\n".encode()


def files(adapter: str) -> dict[str, str | bytes]:
    folder = DEMO / "adapters" / adapter
    return {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }


def upload(server: Live, fields: dict[str, str | bytes], key: str = ADMIN_KEY) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": f"multipart/form-data; boundary={EDGE}"}
    answer = server.ask("POST", PATH, headers=headers, raw=form(fields))
    return answer.status, answer.body.decode()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def live(root: Path) -> Iterator[Live]:
    flags = ["--allow-runtime-lora", "--admin-key", ADMIN_KEY, "--lora-root", str(root)]
    with serving(*flags, "--lora-upload-root", str(root), "--max-upload-mib", "1.2") as server:
        yield server


def test_a_name_is_served_and_swapped_while_a_request_runs(live: Live, root: Path) -> None:
    def text(model: str) -> str:
        return str(live.ask("POST", "/v1/completions", {**LONG, "model": model}).json["choices"][0]["text"])

    old, new = text("maths"), text("code")
    assert old != new
    assert upload(live, {"lora_name": "mine", **files("maths")})[0] == 200
    assert text("mine") == old
    told: list[str] = []
    running = threading.Thread(target=lambda: told.append(text("mine")))
    running.start()
    live.until_metric("vllm:num_requests_running", 1)
    before = live.metric("vllm:generation_tokens_total")
    assert upload(live, {"lora_name": "mine", **files("code")})[0] == 409
    status, body = upload(live, {"lora_name": "mine", "load_inplace": "true", **files("code")})
    assert status == 200, body
    running.join()
    assert told == [old]
    assert text("mine") == new
    assert live.metric("vllm:generation_tokens_total") > before
    for _ in range(3):
        assert upload(live, {"lora_name": "mine", "load_inplace": "1", **files("maths")})[0] == 200
    assert text("mine") == old
    assert len(list(root.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"weights": b"not safetensors"}, 400, "damaged"),
        ({"config": b"{}"}, 400, "peft_type"),
        ({"weights": b"\0" * 1_400_000}, 413, "--max-upload-mib"),
        ({"lora_name": ""}, 400, "cannot be an adapter's name"),
        ({"pinned": "perhaps"}, 400, "pinned is 'perhaps'"),
        ({"extra": "x"}, 400, "'extra'"),
    ],
)
def test_what_cannot_be_served_is_refused_and_leaves_nothing(
    live: Live, root: Path, change: dict[str, str | bytes], status: int, message: str
) -> None:
    before = sorted(root.iterdir())
    found, body = upload(live, {"lora_name": "other", **files("maths"), **change})
    assert (found, message in body) == (status, True), body
    assert sorted(root.iterdir()) == before


def test_a_form_without_its_parts_or_a_key_is_refused(live: Live) -> None:
    assert upload(live, {"lora_name": "other"})[0] == 400
    assert upload(live, {"lora_name": "other", **files("maths")}, key="wrong")[0] == 401
    assert live.admin("POST", PATH, {"lora_name": "x"}).status == 400
    headers = {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": f"multipart/form-data; boundary={EDGE}"}
    assert live.ask("POST", PATH, headers=headers, raw=form(files("maths"))[:5000]).status == 400


def test_without_a_folder_for_them_none_are_taken(server: Live) -> None:
    status, body = upload(server, {"lora_name": "other", **files("maths")})
    assert (status, "--lora-upload-root" in body) == (403, True)
