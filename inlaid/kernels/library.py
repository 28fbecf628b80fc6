"""Libraries built by nvcc at first use, kept under the user's cache by a hash of everything that they are made of.

A library has a C interface and is loaded by ctypes; neither torch nor Python is compiled in.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

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
    """Return the library of a source, from the cache unless something it is made of changed.

    `read`: every file that the compiler reads. `target`: architecture such as "90"."""
    if compiler is None:
        raise BuildError("nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to where it is")
    digest = hashlib.sha256()
    for file in read:
        digest.update(file.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest.update(f"{target} {version} {flags}".encode())
    library = cache_folder() / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        command = [
            compiler, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-split-compile=0", *flags,
            f"-gencode=arch=compute_{target},code=sm_{target}", str(source), "-o", str(made),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise BuildError(f"nvcc could not build {source.name}:\n{result.stderr.strip()[-2000:]}")
        os.replace(made, library)
    return library
