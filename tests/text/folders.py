"""Folders with tokenizers in the layouts of known models, made small: bytes or letters, and a few merges."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from inlaid.convert.tokenizer import _REGEXES

MERGES = ("t h", "th e", "Ġ the", "i n", "in g", "1 2", "12 3", "Ċ Ċ", "â Ĥ")
PIECES = ("▁ t", "▁t h", "▁th e", "i n", "in g", "▁ ▁")
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _bytes(splitter: Any, special: list[str], *, begin: str = "", normalizer: Any = None) -> Tokenizer:
    """Return a byte-level BPE whose special tokens come behind the others."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    vocabulary |= {"".join(pair): len(vocabulary) + i for i, pair in enumerate(pairs)}
    made = Tokenizer(models.BPE(vocabulary, pairs))
    made.pre_tokenizer, made.decoder = splitter, decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if begin:
        made.post_processor = _after(begin, made.token_to_id(begin))
    return made


def _after(begin: str, number: int) -> Any:
    return processors.TemplateProcessing(single=f"{begin} $A", pair=f"{begin} $A {begin} $B",
                                         special_tokens=[(begin, number)])  # fmt: skip


def _pieces() -> Tokenizer:
    """Return a BPE of pieces that falls back to bytes, as sentencepiece's are written out."""
    known = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz123.\n"]
    pairs = [tuple(merge.split(" ")) for merge in PIECES]
    known += ["".join(pair) for pair in pairs]
    vocabulary = {piece: i for i, piece in enumerate(known)}
    made = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.post_processor = _after("<s>", 1)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known[:3]])
    return made


def _words() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(which: str) -> Any:
    pattern = pre_tokenizers.Split(Regex(_REGEXES[which]), behavior="isolated")
    return pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _decoder_of(made: Tokenizer) -> dict[str, Any]:
    """Return the added tokens as version 4 of transformers writes them into the configuration."""
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = made.get_added_tokens_decoder().items()
    return {str(number): {flag: getattr(token, flag) for flag in flags} for number, token in added}


def _llama_3() -> tuple[Tokenizer, dict[str, Any]]:
    made = _bytes(_split("llama-bpe"), ["<|begin|>", "<|im_start|>", "<|im_end|>"], begin="<|begin|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    return made, config | {"added_tokens_decoder": _decoder_of(made), "clean_up_tokenization_spaces": True}


def _smollm(kind: str) -> tuple[Tokenizer, dict[str, Any]]:
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _words()])
    made = _bytes(split, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return made, {"tokenizer_class": kind, **named, "add_prefix_space": False}


def _gpt2() -> tuple[Tokenizer, dict[str, Any]]:
    made = _bytes(_words(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return made, {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}


def _qwen(kind: str) -> tuple[Tokenizer, dict[str, Any]]:
    made = _bytes(_split("qwen2"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizer=normalizers.NFC())
    config = {"tokenizer_class": kind, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    more = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "split_special_tokens": False}
    return made, config | more | {"added_tokens_decoder": _decoder_of(made)}


def _llama_2(kind: str, legacy: bool) -> tuple[Tokenizer, dict[str, Any]]:
    made = _pieces()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": kind, **named, "add_bos_token": True, "add_eos_token": False, "legacy": legacy}
    return made, config | {"added_tokens_decoder": _decoder_of(made)}


def _added() -> tuple[Tokenizer, dict[str, Any]]:
    """Name tokens in the configuration that the vocabulary lacks, one with flags, one of a name of its own."""
    made = _bytes(_words(), ["<|endoftext|>"])
    pad = {"__type": "AddedToken", "content": "<pad>", "lstrip": True, "normalized": False, "rstrip": False,
           "single_word": False, "special": True}  # fmt: skip
    behind = {"400": {"content": "<tool>", "special": False}, "300": {"content": "<|im_end|>", "special": False}}
    named = {"eos_token": "<|im_end|>", "pad_token": pad, "image_token": "<image>", "add_bos_token": True}
    more = {"extra_special_tokens": ["<|im_start|>", "<tool>"], "split_special_tokens": False}
    return made, {"tokenizer_class": "TokenizersBackend", **named, **more, "added_tokens_decoder": behind}


# Layout: model type, how it is made, whether transformers is not needed.
LAYOUTS: Mapping[str, tuple[str, Callable[[], tuple[Tokenizer, dict[str, Any]]], bool]] = MappingProxyType({
    "llama 3": ("llama", _llama_3, True),
    "smollm, generic": ("llama", lambda: _smollm("PreTrainedTokenizerFast"), True),
    "gpt-2": ("llama", _gpt2, True),
    "qwen": ("qwen2", lambda: _qwen("Qwen2Tokenizer"), False),
    "qwen 3, generic": ("qwen3", lambda: _qwen("PreTrainedTokenizerFast"), True),
    "llama 2, legacy": ("llama", lambda: _llama_2("LlamaTokenizer", True), False),
    "llama 2": ("llama", lambda: _llama_2("LlamaTokenizerFast", False), False),
    "llama 2, generic": ("llama", lambda: _llama_2("PreTrainedTokenizerFast", False), True),
    "mistral": ("mistral", lambda: _llama_2("LlamaTokenizer", False), False),
    "tokens added": ("llama", _added, True),
})  # fmt: skip


def write(folder: Path, layout: str) -> Path:
    """Write the files of a layout."""
    kind, make, _ = LAYOUTS[layout]
    made, config = make()
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder
