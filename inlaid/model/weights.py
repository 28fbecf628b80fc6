"""Loading a Hugging Face folder (or hub id) into a Transformer on a device: dense or GPTQ, sharded or not, tied or not.
Every tensor of the checkpoint must find its place and every place its tensor; those that do not are named.
The runner's start-up calls `fetch`, `read_spec`, `load` and `base_version`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import torch

from inlaid.checkpoint import Checkpoint, QuantizedLinear, QuantSpec
from inlaid.convert.folder import SUFFIX, converted
from inlaid.files import write_atomically
from inlaid.kernels.backend import MODULES, Gemm, HeadLinear, HeadNorms, Kernels, LinearBackend, Site
from inlaid.kernels.cpu import DENSE
from inlaid.kernels.group import Group
from inlaid.layers.attention import Attention
from inlaid.layers.embedding import Embedding, Head
from inlaid.layers.linear import Linear, Reader
from inlaid.layers.norm import RMSNorm
from inlaid.layers.rotary import Rotary
from inlaid.model.image import HEAD, WeightImage
from inlaid.model.shard import BY_INPUTS, Shard, ShardReader
from inlaid.model.spec import ModelSpec, module_path
from inlaid.model.transformer import SIBLINGS, Block, Transformer
from inlaid.progress import Bar

log = logging.getLogger(__name__)

READERS = 4  # threads that bring weights into memory
AHEAD = 3  # layers that they are ahead of the one being repacked
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
)


class WeightError(ValueError):
    """A checkpoint does not hold the model that its config describes."""


def fetch(model: str) -> Path:
    """Return a local folder as it is; dequantize a .gguf file once, and download a hub id once, with progress."""
    if Path(model).is_dir():
        return Path(model)
    if model.endswith(SUFFIX):
        return converted(Path(model))
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise WeightError(f"{model!r} is neither a folder on this machine nor a hub id such as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (LocalEntryNotFoundError, ConnectionError, OSError) as error:
        if isinstance(error, HfHubHTTPError):
            raise WeightError(f"{model!r} could not be downloaded: {error}") from error
        raise WeightError(
            f"{model!r} is not a folder on this machine and the hub cannot be reached; "
            "download it where there is a network and give the folder's path"
        ) from error


def compute_dtype(name: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """Return the named type. `auto` is fp32 on a CPU; on a GPU fp16 for quantized weights, else the stored type."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    if spec.quantized or spec.dtype not in ("float16", "bfloat16"):
        return torch.float16
    return DTYPES[spec.dtype]


def base_version(checkpoint: Checkpoint) -> str:
    """Return the hash of the base's config and every stored byte.

    Hashing takes about a second per GB, so the hash is kept beside the user's other caches, keyed by each file's path,
    size and modification time."""
    files = sorted([*checkpoint.path.glob("*.safetensors"), checkpoint.path / "config.json"])
    key = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inlaid"
    store = folder / "versions.json"
    try:
        known = json.loads(store.read_text())
    except (OSError, ValueError):
        known = {}
    if known.get(str(checkpoint.path.resolve()), {}).get("key") == key:
        return str(known[str(checkpoint.path.resolve())]["version"])
    version = checkpoint.fingerprint()
    known[str(checkpoint.path.resolve())] = {"key": key, "version": version}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(store, json.dumps(known).encode())
    except OSError:
        pass  # a read-only home costs the next start a second, nothing else
    return version


def load(
    checkpoint: Checkpoint | WeightImage,
    spec: ModelSpec,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    max_len: int | None = None,
    progress: bool = True,
    group: Group | None = None,
) -> Transformer:
    """Build the model from a checkpoint, layer by layer, so that no more than one layer is in memory twice; or from an
    image, whose memory it shares. With a `group`, of which `spec` is the whole model, only this member's shard is
    read."""
    began, loader = time.monotonic(), _Loader(checkpoint, spec, kernels, device, dtype, group)
    model = loader.build(max_len or spec.max_len, progress)
    spent = time.monotonic() - began
    log.info("start-up: weights %.1f s, of them %.1f waiting for the file", spent, loader.waited)
    return model


def load_blocks(
    checkpoint: Checkpoint, spec: ModelSpec, kernels: Kernels, device: torch.device, dtype: torch.dtype
) -> Iterator[Block]:
    """Yield a checkpoint's blocks one by one, without the rest of the model. Nothing is read ahead."""
    loader = _Loader(checkpoint, spec, kernels, device, dtype)
    for layer in range(spec.num_layers):
        yield loader.block(layer)


class _Loader:
    """Tensors of a checkpoint on their way into a model; those that nothing took are named at the end."""

    def __init__(
        self,
        checkpoint: Checkpoint | WeightImage,
        spec: ModelSpec,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        group: Group | None = None,
    ) -> None:
        self.checkpoint: Checkpoint | WeightImage | ShardReader = checkpoint
        self.spec, self.vocab_rows = spec, spec.vocab_size
        if group is not None:
            assert isinstance(checkpoint, Checkpoint), "an image holds whole weights"
            shard = Shard(group.index, group.count)
            self.checkpoint = ShardReader(checkpoint, spec, shard)
            self.spec, self.vocab_rows = shard.spec(spec), shard.vocab_rows(spec)
        self.group = group
        self.kernels = kernels
        self.device = device
        self.dtype = dtype
        self.unused = {name for name in checkpoint.dense if not name.endswith("rotary_emb.inv_freq")}
        self.unused |= set(checkpoint.linears)
        self.ahead: dict[str, Future[list[QuantizedLinear]]] = {}  # by the first of the siblings
        self.waited = 0.0  # seconds for readers

    def build(self, max_len: int, progress: bool) -> Transformer:
        with ThreadPoolExecutor(READERS, "read-weights") as readers:
            try:
                return self._build(max_len, progress, readers)
            finally:
                readers.shutdown(wait=False, cancel_futures=True)

    def _build(self, max_len: int, progress: bool, readers: ThreadPoolExecutor) -> Transformer:
        spec = self.spec
        linear = self.kernels.head or DENSE
        embedding = self.tensor("model.embed_tokens.weight", (self.vocab_rows, spec.hidden_size), linear)
        layers = Bar(range(spec.num_layers), desc="loading layers", disable=not progress, delay=1, leave=False)
        blocks = []
        for layer in layers:
            for coming in range(layer if layer == 0 else layer + AHEAD, min(layer + AHEAD + 1, spec.num_layers)):
                self.read_ahead(coming, readers)
            blocks.append(self.block(layer))
        norm = self.norm("model.norm.weight", spec.hidden_size)
        head = self.head(embedding, linear)
        if self.unused:
            raise WeightError(
                f"{self.checkpoint.path}: {len(self.unused)} tensors fit nowhere in a {spec.architecture} model: "
                f"{_some(sorted(self.unused))}"
            )
        rotary = Rotary(spec.rope, spec.head_dim, max_len, self.device, self.dtype)
        embedded = Embedding(embedding, self.kernels.ops, self.group)
        return Transformer(spec, self.kernels, embedded, blocks, norm, head, rotary)

    def head(self, embedding: torch.Tensor, linear: HeadLinear) -> Head:
        """Return the output head, which may share the embedding's weight."""
        if isinstance(self.checkpoint, WeightImage):
            ((_, packed),) = self.checkpoint.parts(HEAD, (linear,))
            return Head(packed, linear)
        if self.spec.tied:
            self.unused.discard("lm_head.weight")
        else:
            embedding = self.tensor("lm_head.weight", tuple(embedding.shape), linear)
        return Head(linear.pack(embedding), linear, self.group, self.spec.vocab_size)

    def read_ahead(self, layer: int, readers: ThreadPoolExecutor) -> None:
        """Read a layer's quantized linears into memory, siblings fused, while earlier layers are repacked."""
        for first, last in SIBLINGS:
            paths = [module_path(layer, module) for module in MODULES[first:last]]
            if all(path in self.checkpoint.linears for path in paths):
                shapes = [self.spec.module_shape(module) for module in MODULES[first:last]]
                self.ahead[paths[0]] = readers.submit(self.quantized_siblings, paths, shapes)

    def block(self, layer: int) -> Block:
        spec, prefix = self.spec, f"model.layers.{layer}"
        attention = Attention(
            qkv=self.linear(layer, MODULES[0:3], spec.qkv_bias, "rope"),
            output=self.linear(layer, MODULES[3:4], spec.output_bias, "norm"),
            num_heads=spec.num_heads,
            kernels=self.kernels,
            window=spec.windows[layer],
            head_norms=self.head_norms(f"{prefix}.self_attn") if spec.qk_norm else None,
        )
        return Block(
            attention_norm=self.norm(f"{prefix}.input_layernorm.weight", spec.hidden_size),
            attention=attention,
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm.weight", spec.hidden_size),
            gate_up=self.linear(layer, MODULES[4:6], spec.mlp_bias, "activation"),
            down=self.linear(layer, MODULES[6:7], spec.mlp_bias, "norm"),
        )

    def linear(self, layer: int, modules: Sequence[str], bias: bool, reader: Reader) -> Linear:
        """Return the siblings of one input, fused when their weights allow it."""
        paths = [module_path(layer, module) for module in modules]
        shapes = [self.spec.module_shape(module) for module in modules]
        site = Site(layer * len(MODULES) + MODULES.index(modules[0]), tuple(shape[0] for shape in shapes))
        biases = [self.bias(path, shape[0], bias) for path, shape in zip(paths, shapes, strict=True)]
        whole_bias = None
        if any(b is not None for b in biases):
            filled = [
                b if b is not None else torch.zeros(shape[0], device=self.device, dtype=self.dtype)
                for b, shape in zip(biases, shapes, strict=True)
            ]
            whole_bias = torch.cat(filled)
        parts = self.parts(paths, shapes, site, whole_bias is not None)
        group = self.group if modules[0] in BY_INPUTS else None
        return Linear(parts, whole_bias, site, self.kernels.lora, reader, group)

    def parts(
        self, paths: list[str], shapes: list[tuple[int, int]], site: Site, bias: bool
    ) -> list[tuple[Gemm, object]]:
        if isinstance(self.checkpoint, WeightImage):
            return self.checkpoint.parts(paths[0], (*self.kernels.quantized, DENSE))
        quantized = [path in self.checkpoint.linears for path in paths]
        if not any(quantized):
            weights = [self.tensor(f"{path}.weight", shape) for path, shape in zip(paths, shapes, strict=True)]
            return [(DENSE, DENSE.pack(torch.cat(weights)))]
        if not all(quantized):
            groups = [self.parts([path], [shape], site, bias) for path, shape in zip(paths, shapes, strict=True)]
            return [part for group in groups for part in group]
        read = self.ahead.pop(paths[0], None)
        began = time.monotonic()
        weights_q = self.quantized_siblings(paths, shapes) if read is None else read.result()
        self.waited += time.monotonic() - began
        if self.kernels.decode is not None:
            self.kernels.decode.keep(site, weights_q, bias)
        return [self.prepare(weight) for weight in weights_q]

    def quantized_siblings(self, paths: list[str], shapes: list[tuple[int, int]]) -> list[QuantizedLinear]:
        """Return one weight where the siblings can be fused, else one each."""
        weights_q = [self.quantized(path, shape) for path, shape in zip(paths, shapes, strict=True)]
        fused = fuse(weights_q)
        return [fused] if fused is not None else weights_q

    def prepare(self, weight: QuantizedLinear) -> tuple[LinearBackend, object]:
        reasons = []
        for backend in self.kernels.quantized:
            reason = backend.why_not(weight.spec, self.device)
            if reason is None:
                return backend, backend.prepare(weight, self.device, self.dtype)
            reasons.append(f"{backend.name}: {reason}")
        raise WeightError(f"no linear backend serves {weight.spec} on {self.device}: {'; '.join(reasons)}")

    def quantized(self, path: str, shape: tuple[int, int]) -> QuantizedLinear:
        assert not isinstance(self.checkpoint, WeightImage), "an image holds packed weights"
        self.unused.discard(path)
        weight = self.checkpoint.linear(path)
        if (weight.out_features, weight.in_features) != shape:
            found = (weight.out_features, weight.in_features)
            raise WeightError(f"{self.checkpoint.path}: {path} is {found}, the config says {shape}")
        return weight

    def bias(self, path: str, width: int, required: bool) -> torch.Tensor | None:
        """Return the bias wherever one is stored: some quantizers write zero biases where the model has none."""
        name = f"{path}.bias"
        return self.tensor(name, (width,)) if required or name in self.checkpoint else None

    def head_norms(self, prefix: str) -> HeadNorms:
        q, k = (self.tensor(f"{prefix}.{name}.weight", (self.spec.head_dim,)) for name in ("q_norm", "k_norm"))
        return HeadNorms(q, k, self.spec.norm_eps)

    def norm(self, name: str, width: int) -> RMSNorm:
        return RMSNorm(self.tensor(name, (width,)), self.spec.norm_eps, self.kernels.ops)

    def tensor(self, name: str, shape: tuple[int, ...], reader: HeadLinear = DENSE) -> torch.Tensor:
        """Return a tensor in the compute type, or as it is stored if its reader keeps it so."""
        if name not in self.checkpoint:
            raise WeightError(f"{self.checkpoint.path}: the tensor {name} is missing")
        self.unused.discard(name)
        tensor = self.checkpoint.tensor(name)
        if tuple(tensor.shape) != shape:
            raise WeightError(f"{self.checkpoint.path}: {name} is {tuple(tensor.shape)}, the config says {shape}")
        if not tensor.is_floating_point():
            raise WeightError(f"{self.checkpoint.path}: {name} is {tensor.dtype}, not a floating-point type")
        return tensor.to(device=self.device, dtype=tensor.dtype if reader.keeps(tensor.dtype) else self.dtype)


def fuse(weights: Sequence[QuantizedLinear]) -> QuantizedLinear | None:
    """Return siblings side by side in N, or None when their bits, groups or input orders differ."""
    first = weights[0]
    if len(weights) == 1:
        return first
    for weight in weights[1:]:
        same = (weight.bits, weight.group_size) == (first.bits, first.group_size)
        if not same or not torch.equal(weight.g_idx, first.g_idx):
            return None
    spec = QuantSpec(first.bits, first.group_size, all(w.spec.symmetric for w in weights), first.spec.act_order)
    qweight, qzeros, scales = (
        torch.cat([getattr(w, name) for w in weights], dim=1) for name in ("qweight", "qzeros", "scales")
    )
    return QuantizedLinear(spec, qweight, qzeros, scales, first.g_idx)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
