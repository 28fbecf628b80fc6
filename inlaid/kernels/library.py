"""Libraries built by nvcc or the C compiler at first use, kept in the user's cache by a hash of all they are made of.

A library has a C interface and is loaded by ctypes; neither torch nor Python is compiled in.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

NO_C_COMPILER = "no C compiler was found (CC, or cc, gcc, clang): install one (on Debian: apt install gcc)"
CSRC = Path(__file__).parent / "csrc"


class BuildError(RuntimeError):
    """The library could not be built; the message names what is missing."""


def nvcc() -> str | None:
    """Return the CUDA compiler on the path, or in CUDA_HOME or the usual folder; None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def cache_folder() -> Path:
    """Return the folder that keeps built libraries."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inlaid"


def build(compiler: str | None, source: Path, read: Iterable[Path], target: str, flags: Sequence[str]) -> Path:
    """Return the library of a CUDA source. `read`: every file that the compiler reads. `target`: architecture such as
    "90"."""
    if compiler is None:
        raise BuildError("nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to where it is")
    command = [
        compiler, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-split-compile=0", *flags,
        f"-gencode=arch=compute_{target},code=sm_{target}",
    ]  # fmt: skip
    return _built(command, source, read, target)


def c_compiler() -> str | None:
    """Return the C compiler: the one that CC names, else cc, gcc or clang; None where there is none."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return next(filter(None, map(shutil.which, names)), None)


def build_for_cpu(source: Path) -> Path:
    """Return the library of a C source, for this machine's processor."""
    if (compiler := c_compiler()) is None:
        raise BuildError(NO_C_COMPILER)
    command = [compiler, "-O3", "-std=gnu11", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    return _built(command, source, [source], _processor())


def load_for_cpu(source: Path) -> ctypes.CDLL:
    """Return the library of a C source, loaded. BuildError: it cannot be built, or not be loaded."""
    path = build_for_cpu(source)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error}); remove it, and it is built again") from error


def _processor() -> str:
    """Return what says which instructions there are: a cache may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _built(command: Sequence[str], source: Path, read: Iterable[Path], target: str) -> Path:
    """Return the library that a compiler makes of a source, from the cache unless something it is made of changed."""
    digest = hashlib.sha256()
    for file in read:
        digest.update(file.read_bytes())
    digest.update(f"{target} {_said_by(source, command[0], '--version')} {command[1:]}".encode())
    library = cache_folder() / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            _said_by(source, *command, str(source), "-o", str(made))
            os.replace(made, library)
    except OSError as error:
        place = f"{library.parent} ({error.strerror}: {error.filename})"
        raise BuildError(f"{source.name} could not be built into {place}; set XDG_CACHE_HOME") from error
    return library


def _said_by(source: Path, *command: str) -> str:
    """Return what a compiler printed. BuildError: it failed, or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (subprocess.CalledProcessError, OSError) as error:
        reason = getattr(error, "stderr", "").strip()[-2000:] or str(error)
        raise BuildError(f"{Path(command[0]).name} could not build {source.name}:\n{reason}") from error
