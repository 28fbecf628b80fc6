"""Record of one request, a line of JSONL.

Written by `perf.client` and `perf.in_process`, read by `perf.summary` and `perf.report`.

Times are seconds after the start of the run on the generator's clock; durations are seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

# ok; refused: 429, 503 or S-LoRA's finished=-1; error: any other status, broken connection or message in the
# stream; timeout; cut: the stream ended before it said it was done; cancelled: Ctrl-C
Status = Literal["ok", "refused", "error", "timeout", "cut", "cancelled"]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`itls` are the gaps between chunks that carried text; a chunk may hold several tokens.

    `input_len` and `output_len` are the server's own counts where it gives them, else the planned input
    and the chunks seen. `ttft` and `e2el` start when the request was sent, not when it was due.
    """

    index: int
    adapter: str | None
    tenant: str
    service_class: str
    due: float
    sent: float
    finished: float
    status: Status
    input_len: int
    output_len: int
    planned_output_len: int
    ttft: float | None = None
    itls: list[float] = []
    http_status: int | None = None
    error: str = ""
    text: str = ""
    warmup: bool = False
    spans: dict[str, float] = {}  # seconds by part, by an inlaid server's log; see perf/parse_log.py

    @property
    def lateness(self) -> float:
        return self.sent - self.due

    @property
    def e2el(self) -> float:
        return self.finished - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for a single token."""
        if self.ttft is None or self.output_len < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_len - 1)

    def token_times(self) -> list[float]:
        """List the times at which chunks of text arrived."""
        if self.ttft is None:
            return []
        times = [self.sent + self.ttft]
        for gap in self.itls:
            times.append(times[-1] + gap)
        return times


def encode_record(record: Record) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def write_records(path: Path, records: Iterable[Record]) -> None:
    with path.open("wb") as file:
        for record in records:
            file.write(encode_record(record))


def read_records(path: Path) -> list[Record]:
    """Read every whole line; a last line cut by a kill is left out."""
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    decoder = msgspec.json.Decoder(Record)
    try:
        return [decoder.decode(line) for line in lines]
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: not a file of request records: {error}") from error
