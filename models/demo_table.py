"""The demo's table of scores as Markdown, printed by `build_demo` and put into `models/demo/README.md`."""

from __future__ import annotations

from pathlib import Path

from data.tasks import TASKS
from inlaid.report.tables import markdown
from models.plan import ADAPTERS, ALL_LINEAR, ATTENTION, AdapterPlan

COLUMNS = ("base", "adapter", "adapter_rtn4", "adapter_rtn3")
BEGIN, END = "<!-- table: written by build_demo -->", "<!-- end of table -->"
HEADER = ("task", "adapter", "metric", "base alone", "base + adapter", "RTN 4 bit", "RTN 3 bit")


def shape(plan: AdapterPlan) -> str:
    targets = {ALL_LINEAR: "all seven", ATTENTION: "q,k,v,o"}.get(plan.targets, "q,v")
    notes = [f"rank {plan.rank}", targets]
    notes += ["rsLoRA"] if plan.use_rslora else []
    notes += ["rank pattern"] if plan.rank_pattern else []
    return ", ".join(notes)


def table(columns: dict[str, dict[str, float]]) -> str:
    """One row a task, then the average, then the largest drop that rounding causes."""
    rows = [
        [task, shape(ADAPTERS[task]), TASKS[task].metric, *(f"{columns[column][task]:.1f}" for column in COLUMNS)]
        for task in TASKS
    ]
    means = {column: sum(columns[column].values()) / len(TASKS) for column in COLUMNS}
    rows.append(["**average**", "", "", *(f"{means[column]:.1f}" for column in COLUMNS)])
    drops = {
        column: max(columns["adapter"][task] - columns[column][task] for task in TASKS)
        for column in ("adapter_rtn4", "adapter_rtn3")
    }
    rows.append(["**largest drop**", "", "", "", "", *(f"{drop:.1f}" for drop in drops.values())])
    return markdown(HEADER, rows, "l")


def put(readme: Path, columns: dict[str, dict[str, float]]) -> None:
    """Replace the table between the README's two marks; a build into another folder has no README to keep true."""
    if not readme.exists():
        return
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{table(columns)}\n{END}{after}", encoding="utf-8")
