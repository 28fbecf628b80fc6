"""The joint: packing, zero points, readers of other writers' folders, and writes that a kill cannot tear."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from inlaid import files
from inlaid.checkpoint import (
    BITS,
    Checkpoint,
    CheckpointError,
    QuantizedLinear,
    QuantSpec,
    dequantize,
    from_codes,
    holds_only,
    pack,
    quantization_config,
    to_tensors,
    unpack,
)
from inlaid.files import atomic_folder, hash_file, write_atomically
from inlaid.tensorfiles import Stages, tensors_in, write_tensors
from tests.examples import examples

CPU = torch.device("cpu")


def bit_stream(words: list[int], bits: int) -> list[int]:
    """Codes from words by the format's description, one bit at a time: the independent unpacker."""
    flat = [(word >> i) & 1 for word in (w & 0xFFFFFFFF for w in words) for i in range(32)]
    return [sum(flat[i + j] << j for j in range(bits)) for i in range(0, len(flat), bits)]


def independent_weight(tensors: dict[str, torch.Tensor], name: str, bits: int, add: int) -> torch.Tensor:
    """W[k, n] = scale * (code - (stored zero + add)), element by element in Python numbers."""
    qweight, qzeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    scales, g_idx = tensors[f"{name}.scales"], tensors[f"{name}.g_idx"].tolist()
    columns = [bit_stream(column, bits) for column in qweight.T.tolist()]
    zeros = [bit_stream(row, bits) for row in qzeros.tolist()]
    return torch.tensor(
        [
            [float(scales[g, n]) * (columns[n][k] - (zeros[g][n] + add) % 2**bits) for n in range(len(columns))]
            for k, g in enumerate(g_idx)
        ]
    )


def random_linear(
    bits: int, inputs: int, outputs: int, group: int, *, act_order: bool, symmetric: bool
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(bits * 1000 + inputs + group)
    groups = 1 if group == -1 else inputs // group
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(1, 2**bits, (groups, outputs), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    scales = torch.rand(groups, outputs, generator=generator).half() + 0.01
    g_idx = torch.arange(inputs) // (inputs if group == -1 else group)
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    return from_codes(codes, zeros, scales, g_idx, group, bits)


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict | None) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama"} | ({"quantization_config": metadata} if metadata else {}))
    )
    save_file(tensors, folder / "model.safetensors")


@examples(40)
@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 9), st.integers(0, 1), st.integers(0, 2**31))
def test_pack_round_trip(bits: int, blocks: int, other: int, dim: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (blocks * 32, other), generator=torch.Generator().manual_seed(seed))
    codes = codes if dim == 0 else codes.T
    packed = pack(codes, bits, dim)
    assert packed.dtype == torch.int32
    assert packed.shape[dim] == blocks * bits
    assert torch.equal(unpack(packed, bits, dim).long(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_the_described_bit_stream(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64, 3), generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    for n in range(3):
        assert bit_stream(packed[:, n].tolist(), bits) == codes[:, n].tolist()


def test_a_known_word() -> None:
    """Eight 4-bit codes 0..7, least significant first, are 0x76543210; a middle zero stored by v1 is 0x77777777."""
    assert pack(torch.arange(8).reshape(8, 1), 4).item() == 0x76543210
    linear = random_linear(4, 32, 8, 32, act_order=False, symmetric=True)
    assert to_tensors("x", linear)["x.qzeros"].tolist() == [[0x77777777]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("zero_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (4, 32), (4, -1), (8, 32)])
def test_folder_against_independent_unpacker(
    tmp_path: Path, bits: int, group: int, zero_format: str, act_order: bool, symmetric: bool
) -> None:
    act_order = act_order and group != -1
    linear = random_linear(bits, 64, 32, group, act_order=act_order, symmetric=symmetric)
    tensors = to_tensors("a.b", linear, zero_format)
    write_folder(
        tmp_path, tensors | {"norm.weight": torch.ones(4)}, quantization_config(linear.spec, 0.01, False, zero_format)
    )
    for checkpoint in (Checkpoint(tmp_path), Checkpoint(tmp_path, CPU)):  # mapped, and through a buffer
        assert checkpoint.linears == ("a.b",)
        assert checkpoint.dense == ("norm.weight",)
        read = checkpoint.linear("a.b")
        assert read.spec == linear.spec == QuantSpec(bits, group, symmetric, act_order)
        assert torch.equal(dequantize(read), independent_weight(tensors, "a.b", bits, add=int(zero_format == "gptq")))


@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("claimed", ["gptq", "gptq_v2"])
def test_symmetric_zeros_are_told_by_value_when_metadata_lies(tmp_path: Path, stored: str, claimed: str) -> None:
    linear = random_linear(4, 64, 32, 32, act_order=False, symmetric=True)
    write_folder(tmp_path, to_tensors("a", linear, stored), quantization_config(linear.spec, 0.01, False, claimed))
    assert torch.equal(dequantize(Checkpoint(tmp_path).linear("a")), dequantize(linear))


def test_dequantize_rounds_once() -> None:
    """Check that in half precision the result is what a half-precision multiplication gives: other readers do that."""
    linear = random_linear(8, 64, 32, 32, act_order=False, symmetric=False)
    codes, zeros = unpack(linear.qweight, 8).half(), unpack(linear.qzeros, 8, dim=1).half()
    expected = linear.scales[linear.g_idx.long()] * (codes - zeros[linear.g_idx.long()])
    assert torch.equal(dequantize(linear, torch.float16), expected)


def test_metadata_in_either_place_and_shards(tmp_path: Path) -> None:
    linear = random_linear(4, 64, 32, 32, act_order=False, symmetric=True)
    tensors = to_tensors("a", linear)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "sym": True, "desc_act": False})
    )
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:2]}, tmp_path / "one.safetensors")
    save_file({n: tensors[n] for n in names[2:]}, tmp_path / "two.safetensors")
    files = {n: "one.safetensors" if n in names[:2] else "two.safetensors" for n in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert torch.equal(dequantize(Checkpoint(tmp_path).linear("a")), dequantize(linear))


def test_missing_g_idx_means_in_order(tmp_path: Path) -> None:
    linear = random_linear(4, 64, 32, 32, act_order=False, symmetric=True)
    tensors = to_tensors("a", linear)
    del tensors["a.g_idx"]
    write_folder(tmp_path, tensors, quantization_config(linear.spec, 0.01, False))
    assert torch.equal(dequantize(Checkpoint(tmp_path).linear("a")), dequantize(linear))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "awq"}, "only GPTQ"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"bits": "four"}, "bits"),
        ({"bits": True}, "bits"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format"),
        ({"group_size": 16}, "groups"),
    ],
)
def test_bad_metadata_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    linear = random_linear(4, 64, 32, 32, act_order=False, symmetric=True)
    write_folder(tmp_path, to_tensors("a", linear), quantization_config(linear.spec, 0.01, False) | change)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(tmp_path).linear("a")


@pytest.mark.parametrize("files", [["x"], None, {"a": "../other.safetensors"}, {"a": "/x.safetensors"}, {"a": 5}])
def test_an_index_names_files_beside_it(tmp_path: Path, files: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(CheckpointError, match="names of files beside it"):
        Checkpoint(folder)


def test_quantization_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": "4 bits"}')
    with pytest.raises(CheckpointError, match="'4 bits'; it must be an object"):
        Checkpoint(tmp_path)


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")
    write_folder(tmp_path, {"a.weight": torch.ones(64, 64)}, None)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in (4, 20, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="fetch it again"):
            Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        Checkpoint(tmp_path)


def test_group_index_outside_is_refused(tmp_path: Path) -> None:
    linear = random_linear(4, 64, 32, 32, act_order=False, symmetric=True)
    tensors = to_tensors("a", linear)
    tensors["a.g_idx"] = tensors["a.g_idx"] + 1
    write_folder(tmp_path, tensors, quantization_config(linear.spec, 0.01, False))
    with pytest.raises(CheckpointError, match="g_idx"):
        Checkpoint(tmp_path).linear("a")


@pytest.mark.parametrize(
    ("spec", "shape", "words"),
    [
        (QuantSpec(3, -1, True, False), (48, 32), "inputs"),
        (QuantSpec(4, 32, True, False), (32, 12), "outputs"),
        (QuantSpec(4, 32, True, False), (48, 32), "groups of 32"),
    ],
)
def test_shapes_that_do_not_fit(spec: QuantSpec, shape: tuple[int, int], words: str) -> None:
    assert words in (spec.why_not(*shape) or "")
    assert QuantSpec(4, 32, True, False).why_not(64, 32) is None


def test_through_a_buffer_tensors_are_what_they_are(tmp_path: Path) -> None:
    """Read as for a GPU, here with the CPU as the device and a buffer that most tensors do not fit into."""
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
    tensors = {
        f"{dtype}-{shape}": (torch.randn(shape, generator=generator) * 50).to(dtype)
        for dtype in kinds
        for shape in ((), (0,), (3,), (7, 11), (40, 5, 3))
    }
    tensors["rare"] = torch.ones(3).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    read = Checkpoint(tmp_path, CPU)
    read._stages = Stages(CPU, size=64)
    with ThreadPoolExecutor(4) as readers:
        for name, found in zip(tensors, readers.map(read.tensor, tensors), strict=True):
            assert (found.dtype, found.shape) == (tensors[name].dtype, tensors[name].shape), name
            assert found.view(-1).view(torch.uint8).equal(tensors[name].view(-1).view(torch.uint8)), name
    for name, first in zip(tensors, [read.tensor(name) for name in tensors], strict=True):
        assert first.view(-1).view(torch.uint8).equal(tensors[name].view(-1).view(torch.uint8)), name  # none is a view


def damaged(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, bytes]]:
    whole = save(tensors)
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def with_header(found: Any) -> bytes:
        text = found if isinstance(found, bytes) else json.dumps(found).encode()
        return len(text).to_bytes(8, "little") + text + data

    assert tensors_in(bytearray(with_header(header))).keys() == tensors.keys()
    yield "empty", b""
    yield "no data", whole[: 8 + length]
    yield "cut", whole[:-1]
    yield "more", whole + b"0"
    yield "huge header", (1 << 62).to_bytes(8, "little") + whole[8:]
    yield "no json", with_header(b"x" * 40)
    yield "deep json", with_header(b"[" * 100_000)
    yield "a list", with_header([1, 2])
    for change in (
        {"dtype": "F7"}, {"dtype": "F64"}, {"shape": [3, 3]}, {"shape": [-2, -3]}, {"shape": "ab"}, {"shape": [1e30]},
        {"data_offsets": [4, 28]}, {"data_offsets": [-24, 0]}, {"data_offsets": [0, 1 << 40]}, {"data_offsets": [0]},
    ):  # fmt: skip
        yield str(change), with_header({**header, "a": {**header["a"], **change}})
    yield "overlap", with_header({**header, "c": header["a"]})
    yield "a hole", with_header({"b": header["b"]})


def test_files_in_memory_are_read_whole_or_refused() -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(5).to(torch.int8), "c": torch.ones(0, 4), "d": torch.ones(())}
    for offset in range(8):  # headers that end anywhere
        whole = bytearray(save({"x" * (1 + offset): torch.ones(2), **tensors}))
        found = tensors_in(whole)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    for about, data in damaged({name: tensors[name] for name in "ab"}):
        try:
            tensors_in(bytearray(data))
        except CheckpointError:
            continue
        pytest.fail(f"{about} was read")


def test_a_folder_with_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """Refuse when it is opened, or when the tensor is read, mapped or through a buffer; never with another error."""
    (tmp_path / "config.json").write_text("{}")
    for about, data in damaged({"a": torch.randn(2, 3), "b": torch.arange(5).to(torch.int8)}):
        (tmp_path / "model.safetensors").write_bytes(data)
        for device in (None, CPU):
            try:
                read = Checkpoint(tmp_path, device)
                for name in read.dense:
                    read.tensor(name)
            except CheckpointError:
                continue
            pytest.fail(f"{about} was read")


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100), "b": torch.ones(100)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    read = Checkpoint(tmp_path, CPU)
    read.tensor("a")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 4)
    with pytest.raises(CheckpointError, match="cut short while it was read"):
        read.tensor("b")


def test_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": torch.ones(4)}, None)
    first = Checkpoint(tmp_path).fingerprint()
    assert Checkpoint(tmp_path).fingerprint() == first
    write_folder(tmp_path, {"a": torch.zeros(4)}, None)
    assert Checkpoint(tmp_path).fingerprint() != first


def test_a_large_file_is_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, data = tmp_path / "file", bytes(range(256)) * 5
    file.write_bytes(data)
    assert hash_file(file) == hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(files, "PIECE", 512)
    read: list[int] = []
    pieces = [hashlib.sha256(data[at : at + 512]).digest() for at in (0, 512, 1024)]
    assert hash_file(file, read.append) == hashlib.sha256(b"pieces" + b"".join(pieces)).hexdigest()
    assert sum(read) == len(data)
    file.write_bytes(data[:512])
    assert hash_file(file) == hashlib.sha256(data[:512]).hexdigest()
    file.write_bytes(b"")
    assert hash_file(file) == hashlib.sha256().hexdigest()


def test_tensors_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A file may grow to 100 kB here: the second is too large, and the first is still there."""
    program = (
        "import resource, signal, sys, torch; from pathlib import Path; from inlaid.tensorfiles import write_tensors;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "file = Path(sys.argv[1]); write_tensors(file, {'a': torch.arange(10)}, {'format': 'pt'})\n"
        "try: write_tensors(file, {'a': torch.zeros(100_000)}, {})\n"
        "except OSError as error: print(error.errno, error.filename)"
    )
    file = tmp_path / "out.safetensors"
    found = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True)
    assert found.stdout.split() == [str(errno.EFBIG), str(file)], found.stderr
    with safe_open(file, "pt") as read:
        assert read.metadata() == {"format": "pt"}
        assert torch.equal(read.get_tensor("a"), torch.arange(10))
    assert list(tmp_path.iterdir()) == [file]


def test_atomic_folder_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("first", "second"):
        with atomic_folder(target) as folder:
            (folder / "file").write_text(text)
        assert (target / "file").read_text() == text

    def fail() -> None:
        with atomic_folder(target) as folder:
            (folder / "file").write_text("torn")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        fail()
    assert (target / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("old")
    program = (
        "import os, signal, sys\n"
        "from inlaid.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'file').write_text('new')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(target)], env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == -signal.SIGKILL
    assert (target / "file").read_text() == "old"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_of_one_code_are_told_from_others(bits: int) -> None:
    for value in (0, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1):
        codes = torch.full((3, 64), value)
        assert holds_only(pack(codes, bits, dim=1), value, bits)
        assert not holds_only(pack(codes, bits, dim=1), value ^ 1, bits)
        codes[2, 37] ^= 1
        assert not holds_only(pack(codes, bits, dim=1), value, bits)


def test_files_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    write_tensors(tmp_path / "tensors", {"a": torch.zeros(2)}, {})
    write_atomically(tmp_path / "text", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_the_quantizer_is_named_as_gptqmodel_asks_for() -> None:
    """It loads asymmetric checkpoints only of writers that keep a zero point of 0, which it knows by this entry."""
    made = quantization_config(QuantSpec(bits=4, group_size=32, symmetric=False, act_order=False), 0.01, False)
    producers = dict(entry.split(":") for entry in made["meta"]["quantizer"])
    assert list(producers) == ["inlaid", "gptqmodel"]
    assert tuple(map(int, producers["gptqmodel"].split("."))) >= (0, 9)
