"""Published traces and prompt files, read into rows.

Formats, told apart by their first line unless named:
azure     CSV  TIMESTAMP,ContextTokens,GeneratedTokens (the 2023 and the 2024 release)
burstgpt  CSV  Timestamp,Model,Request tokens,Response tokens,...
mooncake  JSONL {timestamp (ms), input_length, output_length, hash_ids}; a hash is one block of 512 tokens
vtc       JSON list [{model, conversation: [{content}, {content}], tstamp}]
prompts   JSONL {prompt, completion?, adapter?, input_length?, output_length?, at?}
sharegpt  JSON list [{conversations: [{value}, {value}]}]
tenants   JSONL [seconds, tenant, input tokens, output tokens], in any order
Any CSV may carry an `adapter` column.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TextIO

import msgspec

TraceFormat = Literal["auto", "azure", "burstgpt", "mooncake", "vtc", "prompts", "sharegpt", "tenants"]


class TraceRow(msgspec.Struct, frozen=True):
    """`at` is seconds on the trace's own clock; what the trace does not say is None."""

    at: float | None = None
    input_length: int | None = None
    output_length: int | None = None
    adapter: str | None = None
    tenant: str | None = None
    prompt: str | None = None
    completion: str | None = None
    blocks: tuple[int, ...] = ()


class Trace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`window` is seconds [start, end) of the trace; times are multiplied by `time_scale` (0.5: twice as fast).

    With `loop` the window repeats until the stream's limit; `max_input`/`max_output` shorten long rows.
    """

    path: str
    format: TraceFormat = "auto"
    time_scale: float = 1.0
    window: tuple[float, float] | None = None
    loop: bool = False
    max_input: int | None = None
    max_output: int | None = None

    def __post_init__(self) -> None:
        if not self.time_scale > 0:
            raise ValueError("time_scale must be above 0")
        if self.window is not None and not 0 <= self.window[0] < self.window[1]:
            raise ValueError("window must be [start, end) in seconds with 0 <= start < end")


def read_trace(spec: Trace) -> list[TraceRow]:
    """Read rows in time order, starting at 0, after window, scale and truncation."""
    path = Path(spec.path)
    if not path.is_file():
        raise FileNotFoundError(f"dataset {spec.path} does not exist: No such file")
    rows = list(_windowed(spec, _based(_rows(path, spec.format))))
    if not rows:
        raise ValueError(f"{spec.path}: no request falls into the window {spec.window}")
    return rows


def repeat_rows(rows: list[TraceRow], until_s: float | None, count: int | None, period_s: float) -> list[TraceRow]:
    """Repeat the rows again and again, one period later each time, up to the limit."""
    if until_s is None and count is None:
        raise ValueError("a looped trace needs duration_s or num_requests to end it")
    looped: list[TraceRow] = []
    for turn in range(1_000_000):
        for row in rows:
            at = (row.at or 0.0) + turn * period_s
            if (until_s is not None and at >= until_s) or (count is not None and len(looped) >= count):
                return looped
            looped.append(msgspec.structs.replace(row, at=at))
    raise ValueError("the trace is too short to loop that often")


def trace_period(spec: Trace, rows: list[TraceRow]) -> float:
    """Seconds from one turn of a looped trace to the next: its window, or its length plus one mean gap."""
    if spec.window is not None:
        return (spec.window[1] - spec.window[0]) * spec.time_scale
    last = rows[-1].at or 0.0
    return last * len(rows) / (len(rows) - 1) if len(rows) > 1 and last > 0 else 1.0


def _based(rows: Iterator[TraceRow]) -> Iterator[TraceRow]:
    """Shift times so that the first row is at 0, and check that rows are in time order."""
    first: float | None = None
    previous = 0.0
    for number, row in enumerate(rows, 1):
        if row.at is None:
            yield row
            continue
        first = row.at if first is None else first
        if row.at - first < previous - 1e-3:
            raise ValueError(f"row {number} is earlier than the row before it: sort the trace by time")
        previous = max(previous, row.at - first)
        yield msgspec.structs.replace(row, at=previous)


def _windowed(spec: Trace, rows: Iterator[TraceRow]) -> Iterator[TraceRow]:
    start, end = spec.window or (0.0, float("inf"))
    for row in rows:
        at = row.at
        if at is not None and at >= end:
            return
        if at is None or at >= start:
            yield msgspec.structs.replace(
                row,
                at=None if at is None else (at - start) * spec.time_scale,
                input_length=_at_most(row.input_length, spec.max_input),
                output_length=_at_most(row.output_length, spec.max_output),
            )


def _at_most(value: int | None, limit: int | None) -> int | None:
    return value if value is None or limit is None else min(value, limit)


def _rows(path: Path, name: TraceFormat) -> Iterator[TraceRow]:
    with path.open(encoding="utf-8", errors="strict", newline="") as file:
        try:
            reader = _READERS[_detect(file, path) if name == "auto" else name]
            yield from reader(file)
        except (KeyError, IndexError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a valid {name} file: {type(error).__name__} {error}") from error


def _detect(file: TextIO, path: Path) -> TraceFormat:
    head = file.read(65536)
    file.seek(0)
    first = head.split("\n", 1)[0]
    if head.lstrip().startswith("["):
        if '"conversations"' in head:
            return "sharegpt"
        return "tenants" if _is_row(first) else "vtc"
    if first.startswith("{"):
        return "mooncake" if '"timestamp"' in first else "prompts"
    if "ContextTokens" in first:
        return "azure"
    if "Request tokens" in first:
        return "burstgpt"
    raise ValueError(f"{path}: unknown trace format; name it with format = one of {', '.join(_READERS)}")


def _is_row(line: str) -> bool:
    """Tell a line that is a JSON list of its own from the start of a longer one."""
    try:
        return isinstance(json.loads(line)[0], (int, float))
    except (json.JSONDecodeError, IndexError):
        return False


def _azure(file: TextIO) -> Iterator[TraceRow]:
    for row in csv.DictReader(file):
        yield TraceRow(
            at=_azure_seconds(row["TIMESTAMP"]),
            input_length=max(1, int(row["ContextTokens"])),
            output_length=max(1, int(row["GeneratedTokens"])),
            adapter=row.get("adapter"),
        )


def _azure_seconds(stamp: str) -> float:
    """Read a time of the 2023 (seven digits, no zone) or the 2024 release (six digits, +00:00 throughout)."""
    day_time, _, fraction = stamp.strip().replace("+00:00", "").partition(".")
    whole = (datetime.fromisoformat(day_time) - datetime(2020, 1, 1)).total_seconds()
    return whole + (float(f"0.{fraction}") if fraction else 0.0)


def _burstgpt(file: TextIO) -> Iterator[TraceRow]:
    for row in csv.DictReader(file):
        if int(row["Response tokens"]) > 0:  # the release records failed requests with 0 response tokens
            yield TraceRow(
                at=float(row["Timestamp"]),
                input_length=max(1, int(row["Request tokens"])),
                output_length=int(row["Response tokens"]),
                adapter=row.get("adapter") or row.get("Model"),
            )


def _mooncake(file: TextIO) -> Iterator[TraceRow]:
    for row in _json_lines(file):
        yield TraceRow(
            at=float(row["timestamp"]) / 1000,
            input_length=max(1, int(row["input_length"])),
            output_length=max(1, int(row["output_length"])),
            adapter=row.get("adapter"),
            blocks=tuple(row.get("hash_ids", ())),
        )


def _vtc(file: TextIO) -> Iterator[TraceRow]:
    for row in sorted(json.load(file), key=lambda r: float(r["tstamp"])):
        question, answer = row["conversation"][0]["content"], row["conversation"][1]["content"]
        yield TraceRow(at=float(row["tstamp"]), adapter=row["model"], prompt=question, completion=answer)


def _prompts(file: TextIO) -> Iterator[TraceRow]:
    for row in _json_lines(file):
        yield TraceRow(
            at=row.get("at"),
            input_length=row.get("input_length"),
            output_length=row.get("output_length"),
            adapter=row.get("adapter"),
            prompt=row["prompt"],
            completion=row.get("completion"),
        )


def _sharegpt(file: TextIO) -> Iterator[TraceRow]:
    for row in json.load(file):
        turns = row["conversations"]
        if len(turns) >= 2:
            yield TraceRow(prompt=turns[0]["value"], completion=turns[1]["value"])


def _tenants(file: TextIO) -> Iterator[TraceRow]:
    """Read rows in order of time, tenant and lengths; a wrong line is named."""
    rows: list[tuple[float, str, int, int]] = []
    for number, line in enumerate(file, 1):
        try:
            row = msgspec.json.decode(line, type=tuple[float, str, int, int])
        except msgspec.DecodeError as error:
            wanted = "wanted [seconds, tenant, input, output]"
            raise ValueError(f"{file.name}, line {number}: {error}; {wanted}") from error
        if row[0] < 0 or row[2] < 1 or row[3] < 1:
            raise ValueError(f"{file.name}, line {number}: seconds must be >= 0 and lengths at least 1")
        rows.append(row)
    for at, tenant, input_length, output_length in sorted(rows):
        yield TraceRow(at=at, tenant=tenant, input_length=input_length, output_length=output_length)


def _json_lines(file: TextIO) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in file if line.strip())


_READERS: Mapping[str, Callable[[TextIO], Iterator[TraceRow]]] = MappingProxyType(
    {
        "azure": _azure,
        "burstgpt": _burstgpt,
        "mooncake": _mooncake,
        "vtc": _vtc,
        "prompts": _prompts,
        "sharegpt": _sharegpt,
        "tenants": _tenants,
    }
)
