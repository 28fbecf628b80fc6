"""Fetching several things one after another: each failure is one line and stops nothing, and the last line sums up.

Used by `data.download_data` and `models.download_*`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

Job = tuple[str, Callable[[], Iterable[Path]]]
"""A name, and the function that fetches it and returns the paths where it lies."""


class DownloadError(ValueError):
    """Something cannot be fetched; the message says in one sentence why and what would fix it."""


def fetch_each(program: str, jobs: Iterable[Job]) -> int:
    """Run every job and return the exit status: 1 if any failed.

    Paths and the summary go to standard output, failures to standard error. One job needs no summary.
    """
    fetched, failed = 0, []
    for name, fetch in jobs:
        try:
            for path in fetch():
                print(path, flush=True)
            fetched += 1
        except DownloadError as error:
            print(f"{program}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
    if fetched + len(failed) > 1:
        rest = f"; failed: {', '.join(failed)} (run the same command again once that is mended)" if failed else ""
        print(f"{program}: fetched {fetched} of {fetched + len(failed)}{rest}")
    return 1 if failed else 0
