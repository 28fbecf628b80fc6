"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json: byte-level BPE of the vocabulary and merges
in the file. How a text is split before the merges is not in the file, only its name; the splits known here are those of
the models' own tokenizer.json. A tokenizer.json beside the GGUF file comes first.
"""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from inlaid.convert.gguf_file import ConvertError, GGUFFile

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_REGEXES = MappingProxyType({"llama-bpe": _LLAMA_3, "qwen2": _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")})
_KNOWN = ("gpt-2", "smollm", *_REGEXES)


def tokenizer_of(file: GGUFFile) -> tuple[str, dict[str, Any]]:
    """Return the text of tokenizer.json and the content of tokenizer_config.json."""
    fields = file.fields
    tokens, kinds = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type", [])
    merges = fields.get("tokenizer.ggml.merges")
    split = fields.get("tokenizer.ggml.pre", "gpt-2")
    beside = "put the model's tokenizer.json and tokenizer_config.json beside the file"
    if fields.get("tokenizer.ggml.model") != "gpt2" or not tokens or merges is None:
        raise ConvertError(f"{file.path} has a tokenizer that is not byte-level BPE; {beside}")
    if split not in _KNOWN:
        raise ConvertError(f"{file.path} splits texts as {split!r}; known are {', '.join(_KNOWN)}; {beside}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split == "llama-bpe"))
    made.pre_tokenizer = _splitter(split)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if split == "qwen2":
        made.normalizer = normalizers.NFC()
    added = [(token, kind) for token, kind in zip(tokens, kinds) if kind in (_CONTROL, _USER_DEFINED)]
    made.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token, kind in added])
    begin = _token(fields, "bos")
    if fields.get("tokenizer.ggml.add_bos_token") and begin is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, vocabulary[begin])]
        )
    return made.to_str(), _config(fields)


def _splitter(split: str) -> Any:
    if split in _REGEXES:
        pattern = pre_tokenizers.Split(Regex(_REGEXES[split]), behavior="isolated")
        return pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return words if split == "gpt-2" else pre_tokenizers.Sequence([pre_tokenizers.Digits(True), words])


def _token(fields: dict[str, Any], which: str) -> str | None:
    place = fields.get(f"tokenizer.ggml.{which}_token_id")
    tokens = fields["tokenizer.ggml.tokens"]
    return tokens[place] if place is not None and 0 <= place < len(tokens) else None


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    kind = fields.get("general.architecture")
    named = {name: _token(fields, which) for name, which in (
        ("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown"),
    )}  # fmt: skip
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields.get(f"{kind}.context_length"),
        "chat_template": fields.get("tokenizer.chat_template"),
        **named,
    }
    return json.loads(json.dumps({name: value for name, value in values.items() if value is not None}))  # type: ignore[no-any-return]
