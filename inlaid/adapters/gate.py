"""The accuracy gate's half for serving: an adapter is served only with a passing record for exactly this base and
exactly its weights. The half for quantizing, which measures losses itself, is `quant/gate.py`.

Records are written by the accuracy harness (`python -m eval.run`); the server calls `check` before it lists or loads an
adapter when it was started with `--require-eval FILE --max-drop POINTS`. Nothing here knows how a score was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from inlaid.kv_format import AUTO


class GateError(ValueError):
    """The accuracy gate refuses an adapter or a task; the message says which number failed and what would fix it."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter's score at one task on one base. `drop` is in points of the metric against full precision."""

    base_version: str
    adapter_identity: str
    adapter: str
    task: str
    metric: str
    score: float
    reference: float | None = None  # the score of the same adapter on the full-precision base
    drop: float | None = None  # None: there was no full-precision score to compare with
    kv_cache_dtype: str = AUTO.name  # the form of keys and values, see kv_format.py
    faults: tuple[str, ...] = ()  # what the harness found wrong besides the drop, e.g. an adapter that does nothing


class _Report(msgspec.Struct, frozen=True):
    """The part of a report that the gate reads; the rest is for people."""

    records: tuple[Record, ...]


def check(
    record_file: str | Path, base_version: str, adapter_identity: str, max_drop: float, kv: str = AUTO.name
) -> None:
    """Raise GateError unless every record of this adapter on this base, with keys and values in the form `kv`, passes,
    and there is at least one."""
    if not max_drop >= 0:
        raise GateError(f"max drop {max_drop}: give a number of points, 0 or more")
    every = read(record_file)
    records = tuple(record for record in every if record.kv_cache_dtype == kv)
    if every and not records:
        raise GateError(
            f"{record_file} has no record with {kv} keys and values (--kv-cache-dtype); run `python -m eval.run` with "
            + ("variants" if kv == AUTO.name else f"variants that end with +kv-{kv}")
        )
    ours = [r for r in records if (r.base_version, r.adapter_identity) == (base_version, adapter_identity)]
    if not ours:
        raise GateError(_why_no_record(record_file, records, base_version, adapter_identity))
    failed = [reason for record in ours if (reason := why_not(record, max_drop))]
    if failed:
        raise GateError(f"{record_file} refuses this adapter: {'; '.join(failed)}")


def read(record_file: str | Path) -> tuple[Record, ...]:
    """Read the records of a report; a file that is absent, cut short or of another kind is refused."""
    try:
        return msgspec.json.decode(Path(record_file).read_bytes(), type=_Report).records
    except OSError as error:
        raise GateError(
            f"{record_file} cannot be read ({error.strerror}); write it with `python -m eval.run`"
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise GateError(f"{record_file} is not a report of `python -m eval.run`: {error}") from error


def why_not(record: Record, max_drop: float) -> str | None:
    """Return the reason to refuse this record, or None."""
    named = f"task {record.task} ({record.metric} {record.score:.2f})"
    if record.faults:
        return f"{named}: {', '.join(record.faults)}"
    if record.drop is None:
        return f"{named}: no full-precision score to compare with; evaluate the fp16 variant too"
    if not record.drop <= max_drop:
        against = "" if record.reference is None else f" against {record.reference:.2f} in full precision"
        return f"{named} drops {record.drop:.2f} points{against}, more than the {max_drop:g} allowed"
    return None


def _why_no_record(record_file: str | Path, records: Sequence[Record], base_version: str, adapter_identity: str) -> str:
    """Say which half of the pair is unknown, so that the reader knows what to evaluate."""
    bases = {r.base_version for r in records if r.adapter_identity == adapter_identity}
    if bases:
        found = f"this adapter is recorded there only for other bases ({', '.join(b[:12] for b in sorted(bases))})"
    elif any(r.base_version == base_version for r in records):
        found = "this base is recorded there, but not with these adapter weights"
    else:
        found = "neither this base nor these adapter weights are recorded there"
    return (
        f"{record_file} has no record for base {base_version[:12]} with adapter {adapter_identity[:12]}: {found}; "
        "run `python -m eval.run` for this base and adapter"
    )
