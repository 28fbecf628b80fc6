"""The page of the papers is what the recorded results say, and each command on it can be run."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from perf.papers import __main__ as papers
from perf.papers.claims import PARTLY, REFUTED, REPRODUCED, VERDICTS, Results
from perf.papers.vtc import vtc

ROOT = Path(__file__).parents[2]
RESULTS = Results(ROOT)
CLAIMS = [claim for make in papers.PAPERS for claim in make(RESULTS).claims]


def test_the_page_is_up_to_date() -> None:
    assert papers.main(["--check"]) == 0, "run python -m perf.papers"


def test_each_claim_has_a_verdict_and_files_that_are_there() -> None:
    for claim in CLAIMS:
        assert claim.verdict in VERDICTS
        assert all((ROOT / file).is_file() for file in claim.files), claim
        assert bool(claim.files) == (claim.verdict != "not measured yet"), claim


def test_each_command_names_a_module_or_script_that_is_there() -> None:
    for claim in CLAIMS:
        command = papers.command_of(RESULTS, claim)
        if claim.files:
            (module, script) = re.findall(r"-m ([\w.]+)", command), re.findall(r"bash (\S+)", command)
            assert module or script, command
            assert all(importlib.util.find_spec(name) for name in module), command
            assert all((ROOT / name).is_file() for name in script), command
            assert "/tmp" not in command


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, REPRODUCED), (1e4, REFUTED)])
def test_a_verdict_follows_the_results(factor: float, verdict: str) -> None:
    class Changed(Results):
        """Results whose gaps of VTC are larger."""

        def __call__(self, name: str) -> Any:
            found = copy.deepcopy(super().__call__(name))
            for each in found.get("rows", ()):
                if "bound" in each:
                    each["largest_gap"] *= factor
            return found

    assert vtc(Changed(ROOT)).claims[0].verdict == verdict
    assert PARTLY in VERDICTS
