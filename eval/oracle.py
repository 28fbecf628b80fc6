"""The oracle: the same questions through transformers and peft, one adapter after another, in fp32. Slow, and not ours:
a quantized base is read through `checkpoint.dequantize` and runs as a plain model."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import SafetensorError
from torch.nn.functional import log_softmax
from transformers import AutoConfig, AutoModelForCausalLM

from eval.backend import Ask, BackendError, Graded, check_full
from inlaid.adapters.peft import read_adapter
from inlaid.checkpoint import Checkpoint, dequantize
from inlaid.kv_format import AUTO
from inlaid.model.spec import read_spec
from inlaid.text.tokenizer_files import as_transformers

MAX_TOKENS = 8192  # in one padded batch


class OracleBackend:
    """A Backend that runs transformers and peft."""

    drafts = True

    def __init__(self, base: Path, adapters: Mapping[str, Path], kv: str = AUTO.name) -> None:
        check_full(kv, "oracle")
        self.refused: dict[str, str] = {}
        self.end = _ends(base)
        model: Any = load_dense(base)
        self.loaded: list[str] = []
        for name, path in adapters.items():
            try:
                read_adapter(path, read_spec(base), torch.float32)  # refuses all that serving refuses
                model = _attach(model, name, path)
                self.loaded.append(name)
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                self.refused[name] = str(error).split("\n")[0]
        self.model = model.eval()

    def generate(self, asks: Sequence[Ask]) -> list[list[int] | str]:
        said: list[list[int] | str] = [[] for _ in asks]
        for rows in self._batches([len(ask.prompt) + ask.max_tokens for ask in asks], asks):
            with self._adapter(asks[rows[0]].adapter):
                ids_BS, mask_BS = _pad([asks[row].prompt for row in rows], left=True)
                made = self.model.generate(
                    input_ids=ids_BS,
                    attention_mask=mask_BS,
                    do_sample=False,
                    max_new_tokens=max(asks[row].max_tokens for row in rows),
                    eos_token_id=list(self.end) or None,
                    pad_token_id=0,
                )
            for row, tokens in zip(rows, made[:, ids_BS.shape[1] :].tolist()):
                said[row] = _until_end(tokens[: asks[row].max_tokens], self.end)
        return said

    def grade(self, asks: Sequence[Ask], continuations: Sequence[Sequence[int]]) -> list[Graded]:
        graded: list[Graded] = [Graded((), ())] * len(asks)
        lengths = [len(ask.prompt) + len(continuation) for ask, continuation in zip(asks, continuations)]
        for rows in self._batches(lengths, asks):
            ids_BS, mask_BS = _pad([(*asks[row].prompt, *continuations[row]) for row in rows], left=False)
            with self._adapter(asks[rows[0]].adapter), torch.inference_mode():
                logits_BSV = self.model(input_ids=ids_BS, attention_mask=mask_BS).logits.float()
            for row, logits_SV in zip(rows, logits_BSV):
                start = len(asks[row].prompt) - 1
                graded[row] = _grade(logits_SV[start : lengths[row] - 1], continuations[row])
        return graded

    def close(self) -> None:
        del self.model

    @contextlib.contextmanager
    def _adapter(self, name: str | None) -> Iterator[None]:
        if name is not None:
            if name not in self.loaded:
                raise BackendError(f"adapter {name} is not loaded: {self.refused.get(name, 'it was not given')}")
            self.model.set_adapter(name)
            yield
        elif self.loaded:
            with self.model.disable_adapter():
                yield
        else:
            yield

    @staticmethod
    def _batches(lengths: Sequence[int], asks: Sequence[Ask]) -> Iterator[list[int]]:
        """Rows of one adapter and of like length, so that padding is little."""
        order = sorted(range(len(asks)), key=lambda row: (asks[row].adapter or "", lengths[row]))
        batch: list[int] = []
        for row in order:
            full = batch and (len(batch) + 1) * max(lengths[row], lengths[batch[-1]]) > MAX_TOKENS
            if batch and (full or asks[row].adapter != asks[batch[0]].adapter):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def setting() -> str:
    """Return what decides the oracle's numbers."""
    return f"float32, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"


def _attach(model: Any, name: str, path: Path) -> Any:
    if not isinstance(model, peft.PeftModel):
        return peft.PeftModel.from_pretrained(model, str(path), adapter_name=name)
    model.load_adapter(str(path), adapter_name=name)
    return model


def load_dense(base: Path) -> Any:
    """Load a transformers model in fp32; GPTQ linears become plain ones."""
    checkpoint = Checkpoint(base)
    if not checkpoint.is_quantized:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(plain))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    state = {name: checkpoint.tensor(name).float() for name in checkpoint.dense}
    state |= {f"{name}.weight": dequantize(checkpoint.linear(name)).T.contiguous() for name in checkpoint.linears}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise BackendError(f"{base}: missing {sorted(set(missing) - tied)[:3]}, unexpected {list(unexpected)[:3]}")
    model.tie_weights()
    return model


def _ends(base: Path) -> frozenset[int]:
    """Return the tokens that end an answer, as the generation config or else the tokenizer has them."""
    config = base / "generation_config.json"
    found = json.loads(config.read_text()).get("eos_token_id") if config.exists() else None
    if found is None:
        found = as_transformers(base).eos_token_id
    return frozenset(() if found is None else found if isinstance(found, list) else [found])


def _pad(sequences: Sequence[Sequence[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, sequences))
    ids_BS = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        ids_BS[row, place] = torch.tensor(sequence)
        mask_BS[row, place] = 1
    return ids_BS, mask_BS


def _until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    return tokens[: next((index for index, token in enumerate(tokens) if token in ends), len(tokens))]


def _grade(logits_SV: torch.Tensor, continuation: Sequence[int]) -> Graded:
    chosen = torch.tensor(continuation, dtype=torch.long)
    logprobs = log_softmax(logits_SV, dim=-1).gather(1, chosen[:, None])[:, 0]
    return Graded(tuple(logprobs.tolist()), tuple((logits_SV.argmax(-1) == chosen).tolist()))
