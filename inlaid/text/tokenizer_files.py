"""The files of a model's tokenizer and chat template, read in one of two ways to the same end.

plain          `tokenizer.json` and `tokenizer_config.json`, by the library `tokenizers`. For folders whose
               `tokenizer_class` is generic: transformers takes their `tokenizer.json` as it is, and adds the tokens
               that the configuration names. And for GPT2Tokenizer, which transformers 5 builds anew without what the
               file says of digits: SmolLM2 reads them one by one
transformers   all others: a class that builds its tokenizer anew (LlamaTokenizer, Qwen2Tokenizer), vocabularies of
               sentencepiece or tiktoken, folders in the forms of old versions. Importing it takes a second or two
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Fast

_MAX_BYTES = 512 << 20
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
_OF_GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")
_GPT2 = MappingProxyType(
    dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
)  # unless they are given
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_TRANSFORMERS_ALONE = ("fast_tokenizer_files", "fix_mistral_regex")  # keys that change which ids come out
_OLD_FORMS = ("special_tokens_map.json", "added_tokens.json")  # read where `added_tokens_decoder` is missing


@dataclass(frozen=True)
class TokenizerFiles:
    """Content of the files."""

    fast: Any  # a tokenizer of the library `tokenizers`
    chat_template: str | dict[str, str] | None  # several by name
    special_tokens: dict[str, str]  # by the names that chat templates know


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read the tokenizer of a model's folder. The readers raise anything where a file is not what they expect."""
    for pattern in ("*.json", "*.jinja", "additional_chat_templates/*.jinja"):
        for file in folder.glob(pattern):  # a pipe would be waited for, and terabytes read
            if not file.is_file() or file.stat().st_size > _MAX_BYTES:
                raise ValueError(f"{file} is not a regular file of at most {_MAX_BYTES} bytes")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_bytes()) if file.exists() else {}
    kind = config.get("tokenizer_class")
    if kind in _OF_GPT2:
        config = {**_GPT2, **config}
    as_it_is = kind in _GENERIC or (kind in _OF_GPT2 and not config.get("add_prefix_space"))
    generic = as_it_is and (folder / "tokenizer.json").exists()
    return _read_plain(folder, config) if generic and _is_plain(folder, config) else _read_other(folder, generic)


def as_transformers(folder: Path) -> Any:
    """Return the same tokenizer as one of transformers, for code that wants its methods: its ids are those that are
    served, which transformers' own reading of a folder does not always give (SmolLM2's digits)."""
    from transformers import PreTrainedTokenizerFast

    files = read_tokenizer(folder)
    kind: Any = PreTrainedTokenizerFast  # takes the tokenizer as it is
    return kind(
        tokenizer_object=files.fast,
        chat_template=files.chat_template,
        clean_up_tokenization_spaces=False,
        split_special_tokens=files.fast.encode_special_tokens,
        **files.special_tokens,
    )


def _is_plain(folder: Path, config: Mapping[str, Any]) -> bool:
    """Tell whether a folder of a generic class can be read without transformers."""
    old = "added_tokens_decoder" not in config and any((folder / name).exists() for name in _OLD_FORMS)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return not old and not any(map(config.get, _TRANSFORMERS_ALONE)) and isinstance(extra, list)


def _read_plain(folder: Path, config: Mapping[str, Any]) -> TokenizerFiles:
    fast = Fast.from_file(str(folder / "tokenizer.json"))
    fast.encode_special_tokens = bool(config.get("split_special_tokens", False))
    own = (
        name for name, value in config.items() if name.endswith("_token") and name not in _NAMES and _is_token(value)
    )
    named = {name: _token(config[name]) for name in (*_NAMES, *own) if config.get(name) is not None}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    _add_tokens(fast, config.get("added_tokens_decoder", {}), named, [*named.values(), *map(_token, extra)])
    special = {name: str(token) for name, token in named.items()}
    return TokenizerFiles(fast, _chat_template(folder, config), special)


def _add_tokens(fast: Any, decoder: Mapping[str, Any], named: Mapping[str, Any], wanted: list[Any]) -> None:
    """Add the configuration's tokens as transformers does: those with a number, then special ones that are missing."""
    adding = [AddedToken(**token) for _, token in sorted(decoder.items(), key=lambda item: int(item[0]))]
    known = {token.content for token in (*fast.get_added_tokens_decoder().values(), *adding)}
    for token in wanted:
        if str(token) not in known:
            known.add(str(token))
            adding.append(AddedToken(token, special=True) if isinstance(token, str) else token)
    special = set(map(str, named.values()))
    for token in adding:
        token.special = token.special or token.content in special
    if adding:
        fast.add_tokens(adding)


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and value.get("__type") == "AddedToken")


def _token(value: Any) -> Any:
    """Return a special token of the configuration: a text, or one with flags."""
    if not _is_token(value):
        raise ValueError(f"{value!r} is no token")
    if isinstance(value, str):
        return value
    return AddedToken(**{key: flag for key, flag in value.items() if key != "__type"})


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the templates that lie in files of their own, or else those of the configuration."""
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    found = {file.stem: file.read_text(encoding="utf-8") for file in others}
    if (default := folder / "chat_template.jinja").exists():
        found = {"default": default.read_text(encoding="utf-8"), **found}
    if found:
        return found if found.keys() != {"default"} else found["default"]
    template = config.get("chat_template")
    return {each["name"]: each["template"] for each in template} if isinstance(template, list) else template


def _read_other(folder: Path, generic: bool) -> TokenizerFiles:
    """Read what only transformers can. Its generic class does not import torch."""
    import transformers

    quieten: Any = transformers.utils.logging.set_verbosity_error
    quieten()  # its warnings are about training and generating with transformers
    reader: Any = transformers.PreTrainedTokenizerFast if generic else transformers.AutoTokenizer
    model = reader.from_pretrained(str(folder))
    return TokenizerFiles(model.backend_tokenizer, model.chat_template, model.special_tokens_map)
