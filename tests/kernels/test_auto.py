"""The choice among linear backends: by the table where a shape was measured, by order elsewhere, around refusals."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from inlaid.checkpoint import QuantizedLinear, QuantSpec
from inlaid.kernels import command
from inlaid.kernels.auto import UNLIMITED, AutoLinear, Measured, backends, choose, read_table
from inlaid.kernels.cpu import DensePacked, ReferenceLinear
from inlaid.kernels.measure import random_weight

CPU = torch.device("cpu")
SPEC = QuantSpec(4, 32, True, False)
NAMES = {"a", "b"}


def measured(rows: int, **times: float) -> Measured:
    return Measured("chip", 4, 64, 128, rows, times, floor=1.0)


def test_one_backend_where_it_is_best_everywhere() -> None:
    table = [measured(1, a=2.0, b=3.0), measured(64, a=4.0, b=9.0)]
    assert choose(table, NAMES, "chip", 4, 64, 128) == [(UNLIMITED, "a")]


def test_another_for_few_rows_where_that_is_worth_a_copy() -> None:
    table = [measured(1, a=2.0, b=1.5), measured(8, a=2.0, b=1.98), measured(64, a=4.0, b=90.0)]
    assert choose(table, NAMES, "chip", 4, 64, 128) == [(1, "b"), (UNLIMITED, "a")]


def test_only_backends_of_these_names_are_chosen() -> None:
    assert choose([measured(64, a=4.0, reference=1.0)], NAMES, "chip", 4, 64, 128) == [(UNLIMITED, "a")]


def test_unknown_shapes_and_devices_are_left_to_the_order() -> None:
    table = [measured(1, a=1.0)]
    assert choose(table, NAMES, "other chip", 4, 64, 128) == []
    assert choose(table, NAMES, "chip", 3, 64, 128) == []


class Recording(ReferenceLinear):
    """A backend that says which rows it was given."""

    def __init__(self, name: str, refuses: str = "") -> None:
        self.name = name
        self.refuses = refuses
        self.rows: list[int] = []

    def prepare(self, weight: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> DensePacked:
        if self.refuses:
            raise ValueError(self.refuses)
        return super().prepare(weight, device, dtype)

    def gemm(self, x_TK: torch.Tensor, packed: DensePacked, out_TN: torch.Tensor) -> None:
        self.rows.append(x_TK.shape[0])
        super().gemm(x_TK, packed, out_TN)


def test_rows_go_to_the_backend_chosen_for_them() -> None:
    a, b = Recording("a"), Recording("b")
    table = [
        Measured("cpu", 4, 64, 128, 1, {"a": 2.0, "b": 1.0}, 1.0),
        Measured("cpu", 4, 64, 128, 8, {"a": 2.0, "b": 9.0}, 1.0),
    ]
    auto = AutoLinear((a, b), table)
    packed = auto.prepare(random_weight(64, 128, SPEC, CPU), CPU, torch.float32)
    for rows in (1, 2, 30):
        auto.gemm(torch.randn(rows, 64), packed, torch.empty(rows, 128))
    assert (a.rows, b.rows) == ([2, 30], [1])
    assert "b up to 1 rows, a" in auto.report()[0]


def test_dequantized_weights_are_not_chosen_by_time() -> None:
    table = [Measured("cpu", 4, 64, 128, 1, {"a": 4.0, "reference": 1.0}, 1.0)]
    auto = AutoLinear((Recording("a"), ReferenceLinear()), table)
    assert auto.prepare(random_weight(64, 128, SPEC, CPU), CPU, torch.float32).choices[0][1].name == "a"


def test_what_adds_by_arrival_is_left_out_unless_it_may() -> None:
    assert "exllama" not in {backend.name for backend in backends()}
    assert "exllama" in {backend.name for backend in backends(deterministic=False)}


def test_a_weight_that_one_refuses_goes_to_the_next() -> None:
    auto = AutoLinear((Recording("a", refuses="odd shape"), Recording("b")), [])
    packed = auto.prepare(random_weight(64, 128, SPEC, CPU), CPU, torch.float32)
    assert packed.choices[0][1].name == "b"
    with pytest.raises(ValueError, match="a: odd shape"):
        AutoLinear((Recording("a", refuses="odd shape"),), []).prepare(
            random_weight(64, 128, SPEC, CPU), CPU, torch.float32
        )


def test_the_shipped_table_chooses_something_that_exists() -> None:
    names = {backend.name for backend in AutoLinear().candidates}
    table = read_table()
    assert table
    for m in table:
        assert choose(table, names, m.device, m.bits, m.inputs, m.outputs)
        assert all(time >= 0.7 * m.floor for time in m.microseconds.values())


def test_command_tells_of_this_machine_and_of_others_when_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([])) == 0
    printed = capsys.readouterr().out
    assert "CPU, " in printed
    assert "reference  available" in printed
    assert "humming    its kernels need an NVIDIA GPU" in printed
    assert "H200" not in printed
    assert command.run(parser.parse_args(["--table"])) == 0
    printed = capsys.readouterr().out
    assert "NVIDIA H200" in printed
    assert "of floor" in printed
    assert command.run(parser.parse_args(["--measure"])) == 1
    assert "there is no GPU" in capsys.readouterr().out
    made = [measured(1, a=1.0)]
    (tmp_path / "table.json").write_text(command.dumps(made))
    assert list(read_table(tmp_path / "table.json")) == made
