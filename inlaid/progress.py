"""Progress bars of every command: one that is redrawn on a terminal, and a line per stage where the output is piped."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)


class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A tqdm whose remaining time follows from the whole run, not from the last steps, so that it does not jump.

    Where stderr is no terminal, nothing is redrawn: a line is printed when the bar ends, and with `lines` one for each
    further share of the total. A bar that ends within `delay` seconds says nothing.
    """

    def __init__(
        self, iterable: Iterable[Any] | None = None, desc: str | None = None, *, lines: int = 1, **options: Any
    ) -> None:
        hidden = bool(options.pop("disable", False))
        self._piped = not hidden and not (options.get("file") or sys.stderr).isatty()
        self._lines, self._told = lines, 0
        self._began, self._delay = time.monotonic(), options.get("delay", 0.0)
        self._title, self._unit = desc or "progress", str(options.get("unit", "")).strip()
        options = {"smoothing": 0.0, "dynamic_ncols": True, **options}
        super().__init__(iterable, desc, disable=hidden or self._piped, **options)

    def __iter__(self) -> Iterator[Any]:
        if not self._piped:
            yield from super().__iter__()
            return
        for each in self.iterable:
            yield each
            self.update()
        self.close()

    def update(self, n: float | None = 1) -> Any:
        if not self._piped:
            return super().update(n)
        self.n += n or 0
        share = self.n * self._lines // self.total if self.total else 0
        if self._told < share < self._lines:
            self._told = share
            self._print(left=True)
        return None

    def close(self) -> None:
        piped, self._piped = getattr(self, "_piped", False), False  # __del__ closes bars that were never made, too
        if piped and self.n and time.monotonic() - self._began >= self._delay:
            self._print()
        super().close()

    def _print(self, left: bool = False) -> None:
        spent = time.monotonic() - self._began
        of = f" of {self.total:,}" if self.total and self.n != self.total else ""
        rest = f", about {spent * (self.total - self.n) / self.n:.0f} s left" if left and self.total else ""
        now = f", {self.postfix}" if left and getattr(self, "postfix", None) else ""
        line = f"{self._title}: {self.n:,}{of}{self._unit and ' ' + self._unit}{now}, {spent:.1f} s{rest}"
        if log.hasHandlers():  # in the form of the log, which may be JSON
            log.info("%s", line)
        else:
            print(line, file=sys.stderr)
