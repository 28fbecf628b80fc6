"""Spare Triton's interpreter what it does for nothing: a third of a launch, and launches are minutes of a test run.
And let it round to 8 bits as GPUs do."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch


def spare() -> None:
    """Do so if Triton has been imported with its interpreter."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:
        _spare_sums(interpreter)
        _spare_searches(interpreter)
        _spare_tables(interpreter)
        _round_to_8_bits(interpreter)


def _spare_sums(interpreter: ModuleType) -> None:
    """Leave out each sum's second one in int64: it is compared for an assertion, which only debugging would make."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def _spare_searches(interpreter: ModuleType) -> None:
    """Look once for the functions of the language that every launch, and every call in it, replaces."""

    @cache
    def builtins(package: Any) -> list[tuple[str, Any]]:
        return [(name, it) for name, it in inspect.getmembers(package) if interpreter.tl.core.is_builtin(it)]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins(package):
            if getattr(package, name) is member:  # else a launch around this call has replaced it
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch  # type: ignore[attr-defined]


def _spare_tables(interpreter: ModuleType) -> None:
    """Keep numpy's type of each type; a table of all was made for every one of a kernel's operations."""
    pointer, of_scalar = interpreter.tl.pointer_type, cache(interpreter._get_np_dtype)

    def type_of(given: Any) -> Any:
        scalar = given.scalar
        return of_scalar(interpreter.tl.uint64 if isinstance(scalar, pointer) else scalar)

    interpreter._get_np_dtype = type_of  # type: ignore[attr-defined]


def _round_to_8_bits(interpreter: ModuleType) -> None:
    """Round to e4m3 by torch: the interpreter loses the carry of a mantissa that it rounds up: 1.99 becomes 1."""
    plain, tl = interpreter._convert_float, interpreter.tl

    def convert(given: Any, from_type: Any, to_type: Any, rounding: Any) -> Any:
        if to_type != tl.float8e4nv or from_type != tl.float32:
            return plain(given, from_type, to_type, rounding)
        numbers = torch.from_numpy(np.ascontiguousarray(given).view(np.float32))
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = convert  # type: ignore[attr-defined]
