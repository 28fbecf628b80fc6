"""Figures: equal files for equal figures, and one sentence where matplotlib is missing."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from inlaid.report.plots import PlotsMissing, colours, compare, is_wide, legend, new_figure, png, save

ROOT = Path(__file__).parents[2]


def test_equal_figures_make_equal_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    for name in ("a", "b"):
        figure, ((axis,),) = new_figure((3, 2))
        axis.plot([0, 1], [1, 0])
        save(figure, tmp_path / name, (".png", ".pdf"))
        assert png(figure).startswith(b"\x89PNG")
    for kind in (".png", ".pdf"):
        assert (tmp_path / f"a{kind}").read_bytes() == (tmp_path / f"b{kind}").read_bytes()


def test_axes_come_row_by_row() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    _, grid = new_figure((3, 2), 2, 3)
    assert [len(row) for row in grid] == [3, 3]
    _, ((axis,),) = new_figure((3, 2), polar=True)
    assert axis.name == "polar"


def test_compared_panels_have_one_axis_from_zero_and_one_legend_with_each_name_once() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    figure, (axes,) = new_figure((6, 2), 1, 2)
    colour = colours(["b", "a", "b"])
    assert list(colour) == ["b", "a"]
    assert len(set(colour.values())) == 2
    for axis, top in zip(axes, (3.0, 30.0)):
        for name in colour:
            axis.plot([0, 1], [1, top], color=colour[name], label=name)
    compare(axes)
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert axes[0].get_ylim()[0] == 0
    assert axes[0].get_ylim()[1] > 30
    legend(figure, axes)
    (shown,) = figure.legends
    assert [text.get_text() for text in shown.get_texts()] == ["b", "a"]
    assert all(axis.get_legend() is None for axis in axes)


def test_values_that_span_much_ask_for_a_logarithmic_axis() -> None:
    assert is_wide([0.0, 1.0, 100.0])
    assert not is_wide([0.0, 50.0, 100.0])
    assert not is_wide([])


def test_without_matplotlib_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotsMissing, match=r"pip install matplotlib; or pass --no-figures"):
        new_figure((3, 2))


def test_no_other_file_imports_matplotlib() -> None:
    found = set()
    for house in ("inlaid", "eval", "perf", "data", "models"):
        for path in (ROOT / house).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] == "matplotlib" for name in names):
                    found.add(path.relative_to(ROOT).as_posix())
    assert found == {"inlaid/report/plots.py"}
