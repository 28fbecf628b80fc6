"""Tiny GGUF files, written with the package `gguf` in the way of llama.cpp's converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from inlaid.text.tokenizer import _byte_alphabet

HIDDEN, LAYERS, HEADS, KV_HEADS, WIDTH = 64, 2, 4, 2, 96
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "1 2")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokens() -> list[str]:
    return [*SPECIAL, *_byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def write_gguf(path: Path, seed: int = 0, *, tied: bool = True, kind: str = "llama", **fields: Any) -> Path:
    """Write a random model of type Q4_1, its embedding Q8_0, its norms F32. `fields` are added as they are."""
    writer = GGUFWriter(path, kind)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens()))
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL)))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, value in fields.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_string
        add(name.replace("__", "."), value)
    rng = np.random.default_rng(seed)

    def add_matrix(name: str, rows: int, columns: int, kind: GGMLQuantizationType = GGMLQuantizationType.Q4_1) -> None:
        values = rng.normal(0, 0.15, (rows, columns)).astype(np.float32)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    def add_norm(name: str) -> None:
        writer.add_tensor(name, rng.normal(1, 0.1, HIDDEN).astype(np.float32))

    add_matrix("token_embd.weight", len(tokens()), HIDDEN, GGMLQuantizationType.Q8_0)
    add_norm("output_norm.weight")
    if not tied:
        add_matrix("output.weight", len(tokens()), HIDDEN)
    shared = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        add_norm(f"blk.{layer}.attn_norm.weight")
        add_norm(f"blk.{layer}.ffn_norm.weight")
        for part, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN), ("attn_k", shared, HIDDEN), ("attn_v", shared, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN), ("ffn_gate", WIDTH, HIDDEN), ("ffn_up", WIDTH, HIDDEN),
            ("ffn_down", HIDDEN, WIDTH),
        ):  # fmt: skip
            add_matrix(f"blk.{layer}.{part}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
