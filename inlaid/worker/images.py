"""Weight images of an engine: one that serves writes its weights and adapters for other engines of the machine, and one
that starts takes them from there instead of from disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import msgspec
import torch

from inlaid import __version__
from inlaid.adapters.adapter import Adapter, AdapterEntry
from inlaid.config import EngineConfig
from inlaid.model.image import ImageError, ImageKey, WeightImage, write_image
from inlaid.worker.loading import LoadedModel, OpenedModel

log = logging.getLogger(__name__)

Read = Callable[[str], Adapter]


class _Record(NamedTuple):
    """An adapter of an image, but for its tensor, which is called by the identity."""

    identity: str
    path: str
    entries: tuple[AdapterEntry, ...]


def _key(config: EngineConfig, dtype: torch.dtype, version: str) -> ImageKey:
    return ImageKey(__version__, version, str(dtype), config.linear_backend)


def prepare_image(config: EngineConfig, model: LoadedModel, path: str) -> Callable[[], int]:
    """Note on the engine's thread what an image will hold; the function returned writes it, on any thread, into the
    empty file `path`, and returns its bytes."""
    adapters = model.adapters.in_host_memory()
    records = [_Record(each.identity, each.path, each.entries) for each in adapters]
    beside: Mapping[str, torch.Tensor] = {each.identity: each.flat for each in adapters}
    key = _key(config, model.dtype, model.base_version)
    return partial(write_image, path, key, model.runner.model, msgspec.msgpack.encode(records), beside)


def open_image(config: EngineConfig, opened: OpenedModel, path: str) -> WeightImage | None:
    """Map the image to start from. One that cannot be used is named in the log, and the engine reads its files."""
    if not path:
        return None
    try:
        image = WeightImage(path)
        wanted = _key(config, opened.dtype, opened.base.version)
        if image.key != wanted:
            raise ImageError(f"it is of {image.key}, not of {wanted}")
        if opened.device.type != "cpu":
            raise ImageError(f"weights on {opened.device} are not taken from images")
    except (OSError, ImageError) as error:
        log.warning("weights are read from disk, not from the weight image of a running engine: %s", error)
        return None
    log.info("weights come from the image of a running engine")
    return image


def reader_from(image: WeightImage | None, read: Read) -> Read:
    """Return a function that takes an adapter from an image, and reads those that the image does not hold."""
    if image is None:
        return read
    records = {record.path: record for record in msgspec.msgpack.decode(image.adapters, type=list[_Record])}

    def take(path: str) -> Adapter:
        if path not in records:
            return read(path)
        record = records[path]
        return Adapter(record.identity, path, image.beside(record.identity), record.entries)

    return take
