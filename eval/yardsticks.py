"""Yardsticks for GPTQ, written as model folders: rounding, and AWQ-style scaling."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from inlaid.checkpoint import Checkpoint, QuantSpec, quantization_config, to_tensors
from inlaid.files import atomic_folder
from inlaid.quant.aggregate import TaskHessian, combine
from inlaid.quant.baselines import scaled_weight
from inlaid.quant.blocks import BlockModel
from inlaid.quant.calibration import CalibrationSettings, batches, load_calibration
from inlaid.quant.grid import Grid
from inlaid.quant.hessian import block_hessians
from inlaid.quant.solver import round_to_nearest
from inlaid.text.tokenizer_files import as_transformers

COPIED = (".json", ".jinja", ".model", ".txt")

SiteHessian = tuple[tuple[str, ...], Tensor]
"""The linears that read one input, and the second moments of that input."""


def write_rounded(checkpoint: Checkpoint, grid: Grid, out: Path) -> None:
    """Write a GPTQ folder with every linear rounded to nearest in searched ranges."""
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.dense}
    for name in BlockModel(checkpoint).shapes():
        weight_KN = tensors.pop(f"{name}.weight").float().T.contiguous()
        tensors |= to_tensors(name, round_to_nearest(weight_KN, grid).packed(grid))
    with _folder(checkpoint, out, grid.spec, grid.damping) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_scaled(checkpoint: Checkpoint, hessians: Sequence[SiteHessian], grid: Grid, out: Path) -> None:
    """Write a plain folder with every linear rounded after AWQ's scaling, which a GPTQ file has no place for.

    Linears that read one input share its scale, since AWQ folds its inverse into what comes before them.
    """
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.dense}
    for names, hessian_KK in hessians:
        weights = [tensors[f"{name}.weight"].float().T for name in names]
        scaled_KN = scaled_weight(torch.cat(weights, dim=1), hessian_KK, grid)
        parts = scaled_KN.split([weight_KN.shape[1] for weight_KN in weights], dim=1)
        tensors |= {f"{name}.weight": part_KN.T.contiguous() for name, part_KN in zip(names, parts, strict=True)}
    with _folder(checkpoint, out) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def mixed_hessians(checkpoint: Checkpoint, files: Sequence[Path], settings: CalibrationSettings) -> list[SiteHessian]:
    """Return the Hessians of all files' data mixed, without adapters, of every site of the base."""
    model, found = BlockModel(checkpoint), []
    tokenizer = as_transformers(checkpoint.path)
    data = [load_calibration(file, tokenizer, settings) for file in files]
    streams = [model.start(batches(calibration.fitting)) for calibration in data]
    for index in range(model.num_blocks):
        with model.loaded(index) as block:
            sites = [block_hessians(model, block, index, None, one, advance=True) for one in streams]
        hessians = [(site.hessians(), site.total) for site in sites]
        for site, names in sites[0].members.items():
            tasks = [TaskHessian(lambda held=held: held[site], total) for held, total in hessians]  # type: ignore[misc]  # noqa: B023
            found.append((tuple(names), combine("sum", tasks)))
    return found


@contextmanager
def _folder(checkpoint: Checkpoint, out: Path, spec: QuantSpec | None = None, damping: float = 0.0) -> Iterator[Path]:
    """Fill a new model folder that has the base's tokenizer and config."""
    config = dict(checkpoint.config)
    if spec is not None:
        config["quantization_config"] = quantization_config(spec, damping, static_groups=False)
    with atomic_folder(out) as folder:
        for file in checkpoint.path.iterdir():
            if file.is_file() and file.suffix in COPIED and "safetensors" not in file.name:
                shutil.copyfile(file, folder / file.name)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        yield folder
