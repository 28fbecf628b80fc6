"""Examples from data sets of the Hugging Face hub: the only file that imports `datasets`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.task import Data


def rows(data: Data, limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` rows of a split. Data sets that come with code are refused by `datasets` itself."""
    from eval.task import TaskError

    try:
        import datasets
    except ImportError as error:
        raise TaskError(f"data set {data.hub} needs `datasets`: pip install 'inlaid[eval]'") from error
    try:
        loaded = datasets.load_dataset(data.hub, data.config, split=data.split, revision=data.revision)
    except (OSError, ValueError) as error:
        raise TaskError(f"data set {data.hub} ({data.config}, {data.split}) cannot be loaded: {error}") from error
    count = len(loaded) if limit is None else min(limit, len(loaded))
    return [dict(loaded[index]) for index in range(count)]
