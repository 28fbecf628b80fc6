"""All that inlaid changes in humming-kernels, each change with its reason. Nothing else in the tree touches its inside.

The changes are written for version 0.1.19 and refuse any other (`check_version`).

1. Import without a background build (`load`). On import the package starts a process that builds a launcher which its
   wheel already has. HUMMING_DISABLE_PARALLEL_BUILD prevents that, but while it is set kernels are compiled one after
   another: it is set for the import only.
2. Import without torch.compile (`load`). The package marks a function for torch.compile, which inlaid does not use; the
   mark imports a thousand modules and takes 4 to 6 seconds. It is replaced by a function that does nothing.
3. Threads that compile at once (`load`). A thread may find a KernelRuntime that another thread has just made, before
   its constructor has set `inited`; the class gets the attribute.
4. Sums in a fixed order (`ordered_headers`). Stream-K lets several blocks ("slices") sum one output tile. Two slices
   are always added in the same order, and so are three without TMA stores; of more, those after the first are added as
   they arrive, in half precision, and the same batch need not give the same bits twice. For devices without atomic
   addition of half precision the package lets each slice wait for the one before it; a copy of its headers always does.
5. Products in parts (`ordered_headers`). A launch with top_k = IN_PARTS, which products of one matrix do not use, lets
   every slice write memory of its own, as if it were a whole tile, so that no slice waits. The kernel that reads the
   product adds the parts; `humming_schedule.slices_of` says how many a tile has.
6. Choice of headers (`use_headers`). The compiler has its folder of headers as a class method, lists their times for
   every kernel anew, and keeps compiled kernels by the parameters alone: the first is replaced, the second remembered,
   the third emptied when the choice changes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VERSION = "0.1.19"
IN_PARTS = 2  # top_k of a launch whose slices write parts
SWITCH = "HUMMING_DISABLE_PARALLEL_BUILD"

# Where a slice is told which slice it is, after where its tile lies.
_PLACED = "    locks_offset = locks_offset_;\n"
_AS_IT_ARRIVES = "(GmemWriter::kHasNativeAtomicAdd && slice_count > 3)"
_BY_ITSELF = f"""    if constexpr (Ctx::kIsDenseGemm && !Ctx::kUseTmaC) {{
      if (ctx.params.top_k == {IN_PARTS}) {{
        gmem_writer.gmem_ptr += slice_id_ * ctx.params.shape_m * ((Ctx::ProblemShape::N - Ctx::PadShape::N) / 8);
        slice_count = 1;
        slice_id = 0;
      }}
    }}
"""
EDITS: tuple[tuple[str, str, str, int], ...] = (  # (file, text, what it becomes, how often the text is there)
    ("epilogue/pipeline.cuh", f"if (Ctx::kUseTmaC || {_AS_IT_ARRIVES})", "if (false)", 2),
    ("epilogue/gmem_writer.cuh", "else if (kHasNativeAtomicAdd && slice_count > 3)", "else if (false)", 1),
    ("epilogue/pipeline.cuh", _PLACED, _PLACED + _BY_ITSELF, 1),
)  # fmt: skip


class PatchError(RuntimeError):
    """The installed humming-kernels is not what the changes are written for. No backend takes over: the start fails."""


@dataclass(frozen=True)
class Humming:
    """The pieces of the package that inlaid calls."""

    schema: Any
    transform: Any
    heuristics: Any
    prepare: Any


def check_version() -> None:
    """Refuse a version of the package that the changes were not written for."""
    try:
        found = importlib.metadata.version("humming-kernels")
    except importlib.metadata.PackageNotFoundError:
        found = "of unknown version"
    if found != VERSION:
        raise PatchError(
            f"humming-kernels {found} is installed, but inlaid changes the inside of {VERSION}: "
            f"pip install 'humming-kernels=={VERSION}', or pass --linear-backend triton"
        )


@functools.cache
def load() -> Humming:
    """Import the package (changes 1 to 3) and return its pieces."""
    check_version()
    with _environment(SWITCH, "1"), _without_compile_marks():
        from humming.jit.runtime import KernelRuntime
        from humming.kernel.humming import HummingKernel
        from humming.schema.humming import HummingWeightSchema
        from humming.transform import prepare_and_transform_humming_tensors
        from humming.tune import get_heuristics_config
    KernelRuntime.inited = False
    return Humming(
        HummingWeightSchema, prepare_and_transform_humming_tensors, get_heuristics_config, HummingKernel.prepare_kernels
    )


def use_headers(ordered: bool) -> None:
    """Compile from here on with sums in a fixed order, or as the package does (change 6).

    The choice is the whole process's. Kernels that are on the device already stay there."""
    from humming.jit.compiler import Compiler
    from humming.jit.runtime import KernelRuntime
    from humming.kernel.humming import HummingKernel
    from humming.utils.jit import get_humming_cache_dir

    installed = Path(importlib.import_module("humming").__file__ or "").parent / "include"
    wanted = ordered_headers(installed, Path(get_humming_cache_dir())) if ordered else installed
    if wanted != Path(Compiler.humming_include_dir()):
        Compiler.humming_include_dir = staticmethod(lambda: str(wanted))
        listed = getattr(Compiler, "listed", Compiler.cuh_last_update_time)  # the package's own function
        Compiler.listed, Compiler.cuh_last_update_time = staticmethod(listed), staticmethod(functools.cache(listed))
        KernelRuntime._instances, HummingKernel._str2kernel_cache = {}, {}


def ordered_headers(installed: Path, cache: Path) -> Path:
    """Return a copy of the headers with EDITS made (changes 4 and 5), made at first use and kept with compiled kernels.

    The times of the files are kept too: they are part of the names of compiled kernels."""
    made = cache / "ordered-headers" / _stamp(installed)
    if made.is_dir():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=made.parent))
    try:
        shutil.copytree(installed, scratch / "include")
        for name, before, after, times in EDITS:
            _edit(scratch / "include" / "humming" / name, before, after, times)
        try:
            os.rename(scratch / "include", made)
        except OSError:  # another process was first
            if not made.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return made


def _stamp(installed: Path) -> str:
    """Return a name that changes when an edited file or an edit changes."""
    status = [(installed / "humming" / name).stat() for name in dict.fromkeys(name for name, *_ in EDITS)]
    edits = hashlib.sha256(repr(EDITS).encode()).hexdigest()[:8]
    return "-".join([*(f"{one.st_size:x}.{one.st_mtime_ns:x}" for one in status), edits])


def _edit(file: Path, before: str, after: str, times: int) -> None:
    status, text = file.stat(), file.read_text()
    if text.count(before) != times:
        raise PatchError(
            f"{file.name} of the installed humming-kernels is not that of {VERSION}: reinstall it "
            f"(pip install --force-reinstall 'humming-kernels=={VERSION}'), or pass --no-deterministic"
        )
    file.write_text(text.replace(before, after))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment for the body."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _without_compile_marks() -> Iterator[None]:
    """Make torch.compiler.assume_constant_result return its function unmarked in the body."""
    mark = torch.compiler.assume_constant_result
    torch.compiler.assume_constant_result = _unmarked
    try:
        yield
    finally:
        torch.compiler.assume_constant_result = mark


def _unmarked(function: Any) -> Any:
    return function
