"""The flags of `inlaid cluster`, and what it says when they cannot be carried out."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlaid import cli
from inlaid.cluster.command import local_replicas, read_router, replicas, visible_devices
from inlaid.config import EngineConfig

TEMPLATE = Path(__file__).parents[2] / "perf" / "experiments" / "autoscale" / "demo.toml"


def test_numbers_of_replicas_are_read_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert (replicas("3"), replicas("1:4")) == ((3, 3), (1, 4))
    for wrong in ("0", "4:1", "two", "1:2:3"):
        with pytest.raises(SystemExit):
            cli.parse(["cluster", "--replicas", wrong])
        assert f"{wrong!r}" in capsys.readouterr().err


def test_it_takes_the_flags_of_serve_beside_its_own() -> None:
    args = cli.parse(["cluster", "m", "--adapter", "a=p", "--port", "1", "--max-loras", "7", "--placement", "random"])
    assert (args.model, args.adapter, args.port, args.max_loras, args.placement) == ("m", ["a=p"], 1, 7, "random")
    assert args.on_replica_death == "resume"


def test_bounds_are_those_of_a_template(tmp_path: Path) -> None:
    router = read_router(TEMPLATE)
    assert (router.least, router.most, router.tokens_prefilled_per_sec) == (1, 3, 800)
    (tmp_path / "t.toml").write_text("[router]\nmax_prefil_num = 3\n")
    assert cli.main(["cluster", "--router", str(tmp_path / "gone.toml"), "--port", "0"]) == 2
    with pytest.raises(ValueError, match=r"t.toml: \[router\] has no key 'max_prefil_num'"):
        read_router(tmp_path / "t.toml")


def test_status_of_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cluster", "status", "--url", "http://127.0.0.1:9"]) == 2
    assert "no cluster answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_each_replica_has_a_gpu_of_its_own_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")
    assert visible_devices() == ["4", "GPU-5"]
    make = local_replicas()
    made = [make(f"replica-{n}", EngineConfig(model="m"), {}, print) for n in range(3)]
    environments = [each._environment for each in made]  # type: ignore[attr-defined]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["4", "GPU-5", "4"]
    assert [each["INLAID_LOG_NAME"] for each in environments] == ["replica-0", "replica-1", "replica-2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_devices() == []
