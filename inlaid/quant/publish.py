"""The folder that a job writes: built beside the one that it replaces, and exchanged with it in one step when it is
whole.

    out                     the version that is there stays as it is until the new one is whole
    .out.KEY.N.partial      a version that is being built; KEY is the hash of the job, so that the same job resumes it
    .out.old                the old version for a moment, on a file system that cannot exchange two names
    .out.lock               held while a job runs

Nothing is removed that this program did not write: a partial folder is known by the mark in it, a finished one by the
list of files in its record. `recover` and `Publisher.tidy` repair what a kill has left, whenever it came.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from inlaid.files import exchange, remove_unfinished, sync_directory, sync_folder, write_atomically
from inlaid.quant.bank import bank_path, entry_key
from inlaid.quant.plan import Plan
from inlaid.quant.record import RECORD, Record
from inlaid.quant.settings import QuantizeError
from inlaid.tensorfiles import write_index, write_tensors

log = logging.getLogger(__name__)

MARK = ".inlaid-partial"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")
_OURS = ("config.json", "quantize_config.json", "model.safetensors.index.json", "model-rest.safetensors", RECORD)


def check_target(out: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse an output folder that would cost somebody a file. `inputs` are all paths that the job reads, by the words
    for them in a message.
    """
    if out.name in ("", "..") or out.absolute().parent == out.absolute():
        raise QuantizeError(f"the output {out} has no name of its own; give a folder by its name")
    bank = bank_path(out)
    for path in (out, bank):
        if path.is_symlink() and (path == out or not path.is_dir()):  # a bank may lie on another disk
            raise QuantizeError(f"{path} is a symbolic link; give the folder itself ({os.path.realpath(path)})")
        if path.exists() and not path.is_dir():
            raise QuantizeError(f"{path} is a file; give a folder that is new or was made by `inlaid quantize`")
        for what, source in inputs.items():
            _check_apart(path.resolve(), what, source.resolve())
    if out.is_dir() and any(out.iterdir()):
        _check_ours(out)


def _check_apart(out: Path, what: str, source: Path) -> None:
    if out == source:
        raise QuantizeError(f"the output is {what} itself ({source}); give another folder")
    if out in source.parents:
        raise QuantizeError(f"{out} holds {what} ({source}), and would be replaced; give another folder for the output")
    if source in out.parents:
        raise QuantizeError(f"{out} lies inside {what} ({source}); give a folder outside of it for the output")


def _check_ours(out: Path) -> None:
    try:
        record = Record.read(out)
    except QuantizeError as error:
        raise QuantizeError(
            f"{out} is not empty and holds no record of `inlaid quantize`, so it will not be replaced; "
            "give a new folder, or empty this one"
        ) from error
    foreign = sorted(set(os.listdir(out)) - _written_names(record))
    if foreign:
        raise QuantizeError(f"{out} holds {foreign[0]!r}, which `inlaid quantize` did not write; move it away first")


def _written_names(record: Record) -> set[str]:
    """Return the names that the job of a record wrote; version 1 did not list them, but they follow from its base."""
    if record.files:
        return set(record.files)
    blocks = {name for name in os.listdir(record.out) if name.startswith("model-block-")}
    base = set(os.listdir(record.base_path)) if record.base_path.is_dir() else set[str]()
    return {*_OURS, *blocks, *base}


@contextmanager
def only_job(out: Path) -> Iterator[None]:
    """Hold the lock of a folder: one job at a time."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f".{out.name}.lock"
    busy = QuantizeError(f"another job is working on {out}; wait for it to end")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
            raise busy  # it ended between our two calls, and took the file with it
        try:
            yield
        finally:
            if os.fstat(handle).st_size == 0:
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def recover(out: Path) -> None:
    """Bring back the old version if a kill came while it was aside, or drop it if the new one is in its place."""
    old = _aside(out)
    if is_finished(old):
        if out.exists():
            _remove_version(old)
        else:
            old.rename(out)


def read_record(out: Path) -> Record:
    """Read the record of a folder, be it that the folder is aside since a kill."""
    old = _aside(out)
    return Record.read(old if not out.exists() and is_finished(old) else out)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


class Publisher:
    """Builds versions of one folder and puts the chosen one in its place."""

    def __init__(self, out: Path, plan: Plan, variant: str = "") -> None:
        """Work with partial folders of this plan; `variant` keeps apart ways of solving it that end in other bits."""
        self.out = out
        self._plan = plan
        self._key = entry_key(plan=plan.key, variant=variant) if variant else plan.key

    def tidy(self) -> None:
        """Remove what killed jobs have left, but for the unfinished work of this very job."""
        for partial in self._partials():
            if f".{self._key}." not in partial.name or is_finished(partial) or not any(partial.iterdir()):
                remove_partial(partial)

    def partial(self, number: int = 0) -> Path:
        """Return a folder to fill: that of a killed run of the very same job, or a new one."""
        partial = self.out.parent / f".{self.out.name}.{self._key}.{number}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        if any(partial.iterdir()) and not (partial / MARK).exists():
            raise QuantizeError(f"{partial} is in the way, and `inlaid quantize` did not make it; move it away")
        (partial / MARK).touch()
        remove_unfinished(partial)
        config = self._plan.checkpoint.config | {"quantization_config": self._plan.quantization()}
        write_atomically(partial / "config.json", json.dumps(config, indent=2).encode())
        return partial

    def complete(self, partial: Path) -> None:
        """Add what is not a block: the other tensors, the index, and the base's small files."""
        checkpoint = self._plan.checkpoint
        rest = [name for name in checkpoint.dense if not name.startswith("model.layers.")]
        write_tensors(partial / "model-rest.safetensors", {n: checkpoint.tensor(n) for n in rest}, {"format": "pt"})
        write_index(partial)
        quantization = json.dumps(self._plan.quantization(), indent=2)
        write_atomically(partial / "quantize_config.json", quantization.encode())
        for file in self._plan.base.iterdir():
            weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
            other = file.is_file() and not weights and file.name not in ("README.md", RECORD, MARK)
            if other and not (partial / file.name).exists():
                shutil.copyfile(file, partial / file.name)

    def publish(self, partial: Path, record: Record) -> Record:
        """Put a whole version in its place, then remove the version that was there. Returns the record as written."""
        for note in partial.glob(".block-*.json"):
            note.unlink()
        record = record.naming(sorted({*os.listdir(partial), RECORD} - {MARK}))
        write_atomically(partial / RECORD, json.dumps(record.values(), indent=1).encode())
        (partial / MARK).unlink()  # from here on it is known by its record
        sync_folder(partial)
        check_target(self.out, {})  # a job takes hours: somebody may have put something there
        if self.out.exists():
            exchange(partial, self.out)
            _remove_version(partial)
        else:
            partial.rename(self.out)
        sync_directory(self.out.parent)
        self.discard()
        return record

    def discard(self) -> None:
        """Remove all partial folders of this output."""
        for partial in self._partials():
            remove_partial(partial)

    def _partials(self) -> list[Path]:
        named = sorted(self.out.parent.glob(f".{_escaped(self.out.name)}.*.partial"))
        return [folder for folder in named if folder.is_dir() and not folder.is_symlink()]


def _escaped(name: str) -> str:
    """Return a name as a pattern of `glob` that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def is_finished(folder: Path) -> bool:
    """Say whether a folder is a whole version: the old one after an exchange, or a new one just before it."""
    return (folder / RECORD).is_file() and not (folder / MARK).exists()


def remove_partial(partial: Path) -> None:
    """Remove a partial folder, its mark last, so that a kill leaves one that is still known as ours."""
    mark = partial / MARK
    if mark.exists():
        for path in partial.iterdir():
            if path != mark:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        mark.unlink()
    if is_finished(partial):
        _remove_version(partial)
    elif not any(partial.iterdir()):
        partial.rmdir()


def _remove_version(folder: Path) -> None:
    """Remove a version's files, the record last, and the folder if nothing else is in it."""
    if not any(folder.iterdir()):
        folder.rmdir()
        return
    record = Record.read(folder)
    for name in sorted(_written_names(record) - {RECORD}):
        path = folder / name
        if path.is_file() or path.is_symlink():
            path.unlink()
    left = sorted(set(os.listdir(folder)) - {RECORD})
    if left:
        log.warning("%s still holds %r, which inlaid did not write; look at it and remove the folder", folder, left[0])
    else:
        (folder / RECORD).unlink()
        folder.rmdir()
