"""Rows of data sets of the Hugging Face hub: the only file that imports `datasets`."""

from __future__ import annotations

import os
from typing import Any


class HubError(ValueError):
    """A data set cannot be had; the message says why and what would help."""


class HubUnreachable(HubError):
    """The hub, or the data set on it, does not answer."""


def rows(name: str, config: str | None, split: str, revision: str | None, limit: int | None) -> list[dict[str, Any]]:
    """Return the first `limit` rows of a split. Data sets that come with code are refused by `datasets` itself."""
    try:
        import datasets
    except ImportError as error:
        raise HubError(
            f"data set {name} needs `datasets`: bash install.sh eval (or pip install 'inlaid[eval]'"
        ) from error
    token = os.environ.get("HF_TOKEN") or None
    try:
        loaded = datasets.load_dataset(name, config, split=split, revision=revision, token=token)
    except (OSError, ValueError) as error:
        raise HubUnreachable(str(error)) from error
    count = len(loaded) if limit is None else min(limit, len(loaded))
    return [dict(loaded[index]) for index in range(count)]
