"""Prompt programs: graphs of generate calls with adapters, compiled and run in shared batches."""

from __future__ import annotations

from inlaid.program.compile import compile_program
from inlaid.program.execute import Results
from inlaid.program.nodes import Condition
from inlaid.program.options import Limits, Options
from inlaid.program.plan import Plan
from inlaid.program.program import Program
from inlaid.program.refused import ProgramError
from inlaid.program.values import Failure

__all__ = ("Condition", "Failure", "Limits", "Options", "Plan", "Program", "ProgramError", "Results", "compile_program")
