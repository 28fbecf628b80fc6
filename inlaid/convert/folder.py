"""A Hugging Face folder made of a GGUF file: fp16 safetensors, config, generation config, tokenizer, chat template.

The folder takes its place whole, or not at all. `source.json` in it holds the hash of the GGUF file and of every file
that was written; `is_whole` compares them.
"""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import torch

from inlaid.convert.gguf_file import ConvertError, GGUFFile
from inlaid.convert.llama import config_of, generation_of, names_of, tensor_of
from inlaid.convert.tokenizer import tokenizer_of
from inlaid.files import atomic_folder, hash_file
from inlaid.progress import Bar
from inlaid.tensorfiles import write_tensors

SUFFIX = ".gguf"
SOURCE = "source.json"
_SHARD_BYTES = 2 << 30
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def converted(path: Path) -> Path:
    """Return the folder of a GGUF file in the user's cache; it is made at the first call."""
    if not path.is_file():
        raise ConvertError(f"{path} does not exist; give a GGUF file, a Hugging Face folder or a hub id")
    stat = path.stat()
    key = sha256(f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inlaid" / "gguf"
    folder = cache / key / path.stem
    if not (folder / SOURCE).exists():
        convert(path, folder)
    return folder


def convert(path: Path, folder: Path, source: str = "") -> None:
    """Dequantize a GGUF file into `folder`. `source` says where the file came from."""
    file = GGUFFile(path)
    try:
        _fill(file, folder, source)
    except ConvertError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:  # of fields of other types
        raise ConvertError(
            f"{path} is damaged, a field has a value of the wrong kind: {error!r}; fetch it again"
        ) from error


def _fill(file: GGUFFile, folder: Path, source: str) -> None:
    path, config, names = file.path, config_of(file), names_of(file)
    with atomic_folder(folder) as filling:
        _write_tokenizer(file, filling)
        _write_json(filling / "config.json", config)
        _write_json(filling / "generation_config.json", generation_of(file))
        _write_weights(file, names, config, filling)
        written = {each.name: hash_file(each) for each in sorted(filling.iterdir())}
        about = {
            "source": source or path.name,
            "name": file.fields.get("general.name"),
            "licence": file.fields.get("general.license"),
            "gguf": hash_file(path),
            "files": written,
        }
        _write_json(filling / SOURCE, about)


def is_whole(folder: Path) -> bool:
    """Return True if the folder holds every file that was written, and each is as it was."""
    try:
        files = json.loads((folder / SOURCE).read_bytes())["files"]
        return all(hash_file(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _write_tokenizer(file: GGUFFile, folder: Path) -> None:
    beside = file.path.parent / _TOKENIZER_FILES[0]
    if beside.exists():
        for name in _TOKENIZER_FILES:
            if (file.path.parent / name).exists():
                shutil.copyfile(file.path.parent / name, folder / name)
        return
    text, config = tokenizer_of(file)
    (folder / _TOKENIZER_FILES[0]).write_text(text, encoding="utf-8")
    _write_json(folder / _TOKENIZER_FILES[1], config)


def _write_weights(file: GGUFFile, names: dict[str, str], config: dict[str, object], folder: Path) -> None:
    """Write shards of at most two GB, one after another, so that no more than one is in memory."""
    shards: list[dict[str, str]] = [{}]
    room = _SHARD_BYTES
    for name, stored in names.items():
        size = 2
        for extent in file.tensors[stored].shape:
            size *= extent
        if size > room and shards[-1]:
            shards.append({})
            room = _SHARD_BYTES
        shards[-1][name] = stored
        room -= size
    weight_map = {}
    with Bar(total=len(names), desc=f"reading {file.path.name}", unit=" tensors", delay=2.0) as bar:
        for i, shard in enumerate(shards):
            one = len(shards) == 1
            target = "model.safetensors" if one else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for name, stored in shard.items():
                tensors[name] = torch.from_numpy(tensor_of(file, stored, config)).to(torch.float16)
                if not torch.isfinite(tensors[name]).all():
                    raise ConvertError(f"{file.path}: {stored} has values beyond the range of fp16")
                weight_map[name] = target
                bar.update()
            write_tensors(folder / target, tensors, {"format": "pt"})
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
