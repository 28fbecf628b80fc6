"""Atomic writing of files and folders: a process killed at any moment leaves the old one or the new one. And hashes of
large files. Every part of inlaid, eval and perf that writes a result uses these functions."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PIECE = 256 << 20  # bytes of a file that are hashed by one thread
HASHERS = 8
MAX_JSON_BYTES = 64 << 20  # of a config or an index


def hash_file(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> str:
    """Hash a file with SHA-256 and return the hex digest; `on_bytes` is called with the number of bytes of each read.

    A file above PIECE bytes is hashed in pieces by several threads. Its digest is the SHA-256 of the prefix "pieces"
    and the pieces' digests; the prefix keeps it apart from the hash of a file that holds those digests.
    """
    starts = range(0, max(1, path.stat().st_size), PIECE)
    with ThreadPoolExecutor(min(HASHERS, len(starts)), "hash") as hashers:
        digests = list(hashers.map(lambda start: _hash_piece(path, start, on_bytes), starts))
    return (digests[0] if len(digests) == 1 else hashlib.sha256(b"pieces" + b"".join(digests)).digest()).hex()


def _hash_piece(path: Path, start: int, on_bytes: Callable[[int], object]) -> bytes:
    digest, left = hashlib.sha256(), PIECE
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(min(left, 1 << 22)):
            digest.update(chunk)
            on_bytes(len(chunk))
            left -= len(chunk)
    return digest.digest()


@contextmanager
def atomic_folder(path: str | Path, partial: Path | None = None) -> Iterator[Path]:
    """Fill a new folder beside `path`; it takes the place of `path`, whole, when the body ends without an exception.

    A kill at any moment leaves the old folder (or none) as it was. `partial` names the folder to fill and may hold work
    of an earlier, killed run; without it a fresh one is made, and removed if the body fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    filling = partial or path.parent / f".{path.name}.{os.getpid()}.partial"
    if partial is None and filling.exists():
        shutil.rmtree(filling)
    filling.mkdir(exist_ok=True)
    try:
        yield filling
        sync_folder(filling)
        replace_folder(filling, path)
    except BaseException:
        if partial is None:
            shutil.rmtree(filling, ignore_errors=True)
        raise


def replace_folder(new: Path, path: Path) -> None:
    """Put `new` in the place of `path` in one step, and drop what was there."""
    if path.exists():
        exchange(new, path)
        sync_directory(path.parent)
        shutil.rmtree(new)
    else:
        os.rename(new, path)
        sync_directory(path.parent)


def open_unblocked(path: Path) -> BinaryIO:
    """Open a file for reading. A pipe that nobody writes to seems empty, instead of holding up the reader for ever."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def read_bounded(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """Read a whole file of at most so many bytes. ValueError: it has more, or is no regular file."""
    with open_unblocked(path) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most} bytes")
    return data


def sync_folder(folder: Path) -> None:
    """Make every file below a folder durable."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    sync_directory(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write a file under; the file takes the place of `path` when the body ends without an
    exception. A kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode & 0o777  # as the umask has it, whatever a library that writes here prefers
    try:
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files that killed processes left in a folder. No process may be writing there now."""
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write one file so that a kill leaves the old one or the new one."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def exchange(new: Path, path: Path) -> None:
    """Swap two folders: in one step on Linux, elsewhere by way of a third name."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        at_cwd, both = -100, 2
        if libc.renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(path), both) == 0:
            return
    aside = path.with_name(f".{path.name}.old")
    os.rename(path, aside)
    os.rename(new, path)
    os.rename(aside, new)


def sync_directory(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
