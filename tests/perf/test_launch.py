"""The commands that start servers, and what is said where one is absent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid

import pytest

from perf.known_flags import why_not
from perf.launch import ServerCommand, ServerKind, find_adapters, main
from perf.process import ROOT
from tests.perf.marked import marked_processes

SCRIPTS = sorted(path.name for path in (ROOT / "perf").glob("launch_server_*.sh"))


def test_each_kind_gets_its_own_words() -> None:
    adapters = [("a", "/x/a"), ("b", "/x/b")]
    inlaid = ServerCommand("inlaid", "m", adapters, "vtc", {"max-loras": 4, "enforce-eager": True, "seed": False})
    assert inlaid.argv(7)[1:] == [
        "-m", "inlaid", "serve", "m", "--port", "7", "--policy", "vtc", "--adapter", "a=/x/a", "--adapter", "b=/x/b",
        "--max-loras", "4", "--enforce-eager",
    ]  # fmt: skip
    vllm = ServerCommand("vllm", "m", adapters).argv(7)
    assert vllm[vllm.index("--enable-lora") :] == [
        "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--lora-modules", "a=/x/a", "b=/x/b",
    ]  # fmt: skip
    slora = ServerCommand("slora", "m", adapters, "slora", {"max-total-token-num": 9, "enable_abort": True}).argv(7)
    assert slora[slora.index("--lora-dirs") :] == [
        "--lora-dirs", "/x/a", "--lora-dirs", "/x/b", "--max_total_token_num", "9", "--enable-abort",
    ]  # fmt: skip


def test_sizes_for_vllm_follow_from_the_adapters() -> None:
    """Its own defaults would serve one adapter a batch, and refuse rank 32."""
    folder = ROOT / "models" / "demo" / "adapters"
    adapters = find_adapters([f"{folder}/*"])
    made = ServerCommand("vllm", "m", adapters).argv(7)
    assert [made[made.index(flag) + 1] for flag in ("--max-loras", "--max-lora-rank")] == ["12", "16"]
    own = ServerCommand("vllm", "m", adapters, "", {"max_loras": 4, "max-lora-rank": 64}).argv(7)
    assert own.count("--max-loras") == own.count("--max-lora-rank") == 1
    assert own[own.index("--max-lora-rank") + 1] == "64"
    assert own[own.index("--max-loras") + 1] == "4"


@pytest.mark.parametrize(
    ("kind", "flag", "reason"),
    [
        ("slora", "max-total-tokens", "did you mean --max_total_token_num"),
        ("vllm", "num-blocks", "vLLM has no flag --num-blocks"),
    ],
)
def test_a_flag_that_a_peer_does_not_have_is_refused(kind: ServerKind, flag: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ServerCommand(kind, "m", [], "", {flag: 1}).argv(7)


def test_adapters_are_found_by_name_folder_and_glob() -> None:
    folder = ROOT / "models" / "demo" / "adapters"
    assert find_adapters(["x=/anywhere"]) == [("x", "/anywhere")]
    assert find_adapters([f"{folder}/maths"]) == [("maths", f"{folder}/maths")]
    assert len(find_adapters([f"{folder}/*"])) == 12
    with pytest.raises(ValueError, match="no adapter"):
        find_adapters([str(ROOT / "perf")])


def test_replicas_have_ports_and_a_share_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert main(["--kind", "vllm", "--merged", "m1", "m2", "--replicas", "2", "--port", "9000", "--print"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "CUDA_VISIBLE_DEVICES=3 vllm serve m1 --host 127.0.0.1 --port 9000 --gpu-memory-utilization 0.450"
    assert "m2" in second
    assert "--port 9001" in second
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    main(["--kind", "vllm", "--model", "m", "--replicas", "2", "--print"])
    assert "memory" not in capsys.readouterr().out
    assert main(["--kind", "vllm", "--merged", "m1", "--replicas", "2", "--print"]) == 2


@pytest.mark.parametrize(("kind", "words"), [("vllm", "pip install vllm"), ("slora", "pip install -e .")])
def test_an_absent_peer_says_what_to_install(
    kind: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["--kind", kind, "--model", "m"]) == 2
    assert words in capsys.readouterr().err


def test_an_absent_model_says_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "models/cache/no-such-4bit", "--fetch", "no-such"]) == 2
    error = capsys.readouterr().err
    assert "bash models/download.sh model no-such" in error
    advice = "inlaid quantize models/cache/no-such --bits 4 --out models/cache/no-such-4bit --task general=none:"
    assert advice in error
    assert (ROOT / error.split(advice)[1].split()[0]).is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_prints_its_command(script: str) -> None:
    arguments = ["--print"] if "vllm" not in script else ["2", "--print"]
    env = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "MODEL": "m", "ADAPTERS": "a=b c=d"}
    done = subprocess.run(["bash", str(ROOT / "perf" / script), *arguments], env=env, capture_output=True, check=True)
    lines = done.stdout.decode().splitlines()
    assert len(lines) == (2 if "vllm" in script else 1)
    assert {"vllm": "vllm serve", "slora": "slora.server"}.get(script[:-3].rsplit("_", 1)[1], "inlaid serve") in lines[
        0
    ]


def test_sizes_and_peers_are_all_there() -> None:
    sizes = [f"launch_server_{size}{peer}.sh" for size in ("7b", "8b", "13b") for peer in ("", "_slora", "_vllm")]
    assert set(SCRIPTS) == {*sizes, "launch_server_demo.sh"}


def test_when_one_replica_ends_the_others_do_too() -> None:
    """The second finds its port taken."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1] - 1
        command = [sys.executable, "-m", "perf.launch", "--kind", "fake", "--port", str(port), "--replicas", "2"]
        env = {**os.environ, "PERF_TEST_MARK": (mark := uuid.uuid4().hex)}
        done = subprocess.run(command, timeout=60, check=False, capture_output=True, env=env)
    assert done.returncode == 1
    assert marked_processes(mark) == []


def test_arguments_of_inlaid_are_checked_without_starting_it() -> None:
    assert why_not(ServerCommand("inlaid", "m", [], "vtc", {"max-loras": 4, "no-enable-prefix-caching": True})) == ""
    assert "did you mean max-loras?" in why_not(ServerCommand("inlaid", "m", [], "", {"max-lora": 4}))
    assert "unknown policy 'vct'" in why_not(ServerCommand("inlaid", "m", [], "vct"))


def test_policy_and_mode_are_arguments_of_the_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--policy", "vtc", "--mode", "pipelined", "--print"]) == 0
    assert capsys.readouterr().out.strip().endswith("--policy vtc --adapter-mode pipelined")
    assert main(["--kind", "vllm", "--model", "m", "--mode", "cached", "--print"]) == 2
    assert "vllm has no adapter modes" in capsys.readouterr().err
    assert main(["--kind", "vllm", "--model", "m", "--policy", "vtc", "--print"]) == 2
    assert "vLLM has none of ours" in capsys.readouterr().err
