"""Hostile folders: an adapter or a base, spoilt in one of many ways. Some ways leave it whole, so a reader may accept a
folder; it must never do anything but accept it or refuse it by name, in bounded memory and time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 10**30, 2**63, 0.5, 1e308, float("nan"), float("inf"), "", "\ud800", "a" * 10_000, "\n\0"),
    *([], {}, [[]], [None], {"a": {"b": 1}}, ["q_proj"], ["(a+)+$"], "(a|a)*$", "all-linear", [10**400], 10**400),
)
_SPARSE = 5 << 30


def spoil(source: Path, folder: Path, draw: random.Random) -> str:
    """Copy an adapter or a base to a new folder, spoilt, and return how."""
    shutil.copytree(source, folder)
    ways = _ADAPTER if (folder / "adapter_config.json").exists() else _BASE
    names = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        way = draw.choice(ways)
        names.append(way.__name__)
        try:
            way(folder, draw)
        except Exception:  # noqa: BLE001 - the way before has left nothing that this one can spoil
            names[-1] += " (not possible after the one before)"
    return ", ".join(names)


def _config(folder: Path) -> Path:
    return _small(next(folder / name for name in ("adapter_config.json", "config.json") if (folder / name).exists()))


def _weights(folder: Path) -> Path:
    return _small(next(folder.glob("*.safetensors")))


def _small(file: Path) -> Path:
    """Return a file that can be read. ValueError: an earlier way has made it huge, or no file."""
    if not file.is_file() or file.stat().st_size >= _SPARSE:
        raise ValueError(f"{file} cannot be spoilt again")
    return file


# The config.


def setting(folder: Path, draw: random.Random) -> None:
    """Give one setting a strange value."""
    config = json.loads(_config(folder).read_text())
    config[draw.choice(list(config))] = draw.choice(_STRANGE)
    _config(folder).write_text(json.dumps(config))


def missing_setting(folder: Path, draw: random.Random) -> None:
    """Leave one setting out."""
    config = json.loads(_config(folder).read_text())
    del config[draw.choice(list(config))]
    _config(folder).write_text(json.dumps(config))


def more_settings(folder: Path, draw: random.Random) -> None:
    """Add settings, patterns among them."""
    config = json.loads(_config(folder).read_text())
    value = draw.choice(_STRANGE)
    key = draw.choice(
        ("rank_pattern", "alpha_pattern", "layers_to_transform", "quantization_config", "rope_scaling", "x")
    )
    config[key] = draw.choice((value, {draw.choice(("(a+)+$", ".*", "q_proj", "\\", "a{99999}", "(?=x)")): value}))
    _config(folder).write_text(json.dumps(config))


def config_bytes(folder: Path, draw: random.Random) -> None:
    """Cut, flip or replace the config's bytes."""
    _damage(_config(folder), draw)


def deep_config(folder: Path, draw: random.Random) -> None:
    """Nest the config deeply."""
    deep = draw.choice((100, 5_000, 200_000))
    _config(folder).write_text(draw.choice(("[" * deep, '{"r":' * deep, '{"r": ' + "[" * deep + "]" * deep + "}")))


def huge_config(folder: Path, draw: random.Random) -> None:
    """Make the config large: sparse, or a list of many names."""
    if draw.random() < 0.5:
        os.truncate(_config(folder), _SPARSE)
    else:
        config = json.loads(_config(folder).read_text())
        config["target_modules"] = [f"m{n}" for n in range(20_000)]
        _config(folder).write_text(json.dumps(config))


# The weights.


def weights_bytes(folder: Path, draw: random.Random) -> None:
    """Cut, flip or replace the weights' bytes."""
    _damage(_weights(folder), draw)


def header_length(folder: Path, draw: random.Random) -> None:
    """Say something else about the header's length."""
    with _weights(folder).open("r+b") as file:
        file.write(struct.pack("<Q", draw.choice((0, 1, 7, 2**20, 2**31, 2**63, 2**64 - 1, draw.randrange(10_000)))))


def header(folder: Path, draw: random.Random) -> None:
    """Change the header: types, shapes, offsets, names."""
    path = _weights(folder)
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    entries = json.loads(data[8 : 8 + length])
    name = draw.choice([name for name in entries if name != "__metadata__"])
    entry = entries[name]
    kind = draw.randrange(7)
    if kind == 0:
        entry["dtype"] = draw.choice(("F64", "I8", "BOOL", "F8_E4M3", "X", 5, None, "F16" * 999))
    elif kind == 1:
        entry["shape"] = draw.choice(([], [0], [2**40, 2**40], [-1, 4], [4], entry["shape"][::-1], [1e3], None, [[4]]))
    elif kind == 2:
        entry["data_offsets"] = draw.choice(([0, 0], [5, 1], [-1, 4], [0, 2**60], [0], None, [1, 2, 3]))
    elif kind == 3:
        del entries[name]
    elif kind == 4:
        entries[draw.choice(("", "\ud800", "a" * 9999, "base_model.model.x.lora_A.weight", "../x"))] = entries.pop(name)
    elif kind == 5:
        entries["__metadata__"] = draw.choice((5, {"a": 5}, [], {"format": "np"}, {"a": "x" * 99_999}))
    else:
        entries.update({f"more{n}": entry for n in range(draw.choice((1, 2_000)))})
    new = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


def numbers(folder: Path, draw: random.Random) -> None:
    """Put infinities, NaN or huge numbers into the weights."""
    path = _weights(folder)
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    piece = draw.choice((b"\x00\x7c", b"\x00\x7e", b"\xff\x7b", b"\xff\xff\x7f\x7f"))
    for _ in range(draw.choice((1, 50))):
        at = 8 + length + 4 * draw.randrange((len(data) - 8 - length) // 4)
        data[at : at + len(piece)] = piece
    path.write_bytes(data)


def sparse_weights(folder: Path, draw: random.Random) -> None:
    """Let the weights be 5 GiB that take no room on the disk."""
    os.truncate(_weights(folder), _SPARSE)


# The files.


def missing_file(folder: Path, draw: random.Random) -> None:
    """Remove a file."""
    draw.choice(list(folder.iterdir())).unlink()


def other_kind(folder: Path, draw: random.Random) -> None:
    """Put something else in the place of a file: a pipe, a folder, a link to itself, to a device, or to nothing."""
    path = draw.choice([_config(folder), _weights(folder)])
    path.unlink()
    kind = draw.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    else:
        target: Any = (path, "/dev/zero", "/dev/null", "/nowhere/at/all", "/proc/self/mem")[kind - 2 if kind < 6 else 0]
        path.symlink_to(target)


def empty_file(folder: Path, draw: random.Random) -> None:
    """Leave nothing in a file."""
    draw.choice([_config(folder), _weights(folder)]).write_bytes(b"")


def pickled(folder: Path, draw: random.Random) -> None:
    """Offer pickled weights instead."""
    _weights(folder).rename(folder / draw.choice(("adapter_model.bin", "pytorch_model.bin", "model.pt")))


def tokenizer(folder: Path, draw: random.Random) -> None:
    """Damage the tokenizer."""
    _damage(folder / draw.choice(("tokenizer.json", "tokenizer_config.json")), draw)


def _damage(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    kind = draw.randrange(5)
    if kind == 0:
        data = data[: draw.randrange(len(data))]
    elif kind == 1:
        for _ in range(draw.choice((1, 3, 100))):
            data[draw.randrange(min(len(data), 4096))] = draw.randrange(256)
    elif kind == 2:
        data = bytearray(draw.randbytes(draw.choice((1, 8, 5000))))
    elif kind == 3:
        data += draw.randbytes(draw.choice((1, 5000)))
    else:
        data = bytearray(draw.choice((b"null", b"[]", b"{}", b"\xff\xfe{}", b'"\\ud800"', b"\0" * 64)))
    path.write_bytes(data)


_Way = Callable[[Path, random.Random], None]
_COMMON: tuple[_Way, ...] = (
    *(setting, setting, missing_setting, more_settings, config_bytes, deep_config, huge_config, weights_bytes, header),
    *(header, header_length, numbers, sparse_weights, missing_file, other_kind, empty_file, pickled),
)
_ADAPTER: tuple[_Way, ...] = _COMMON
_BASE: tuple[_Way, ...] = (*_COMMON, tokenizer)
