"""Special tokens that a client wrote into its messages, kept as text.

A template writes control tokens such as <|im_end|> between messages. A message that holds the same characters could
otherwise end its own turn and begin another's. Before the template runs, each special token in a message is exchanged
for one character of Unicode's private use area that occurs in none of the texts; the tokenizer exchanges it back, and
encodes what is between the template's special tokens as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from inlaid.engine.refusal import Refusal, Refused

_PRIVATE = (0xE000, 0xF8FF)
StandIns = Mapping[str, str]  # the special token that each character stands for


class SpecialTokens:
    """The special tokens of a vocabulary, to be found in texts."""

    def __init__(self, tokens: Collection[str]) -> None:
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def replaced(self, value: Any) -> tuple[Any, StandIns]:
        """Return a JSON value whose texts hold no special token, and what stands for each that was there."""
        texts = list(_texts(value))
        found = {token for text in texts for token in self._pattern.findall(text)}
        if not found:
            return value, {}
        taken = {char for text in texts for char in text if _PRIVATE[0] <= ord(char) <= _PRIVATE[1]}
        free = (char for char in map(chr, range(_PRIVATE[0], _PRIVATE[1] + 1)) if char not in taken)
        by_token = dict(zip(sorted(found), free))
        if len(by_token) < len(found):
            raise Refused(Refusal("the messages hold special tokens, and every character of private use"))
        exchanged = _mapped(value, lambda text: self._pattern.sub(lambda match: by_token[match[0]], text))
        return exchanged, {char: token for token, char in by_token.items()}

    def stretches(self, text: str, stand_ins: StandIns) -> Iterator[tuple[str, bool]]:
        """Yield the stretches of a text, in order, and True for those that are plain text: between two special tokens
        of the template, with at least one character that stands for another."""
        chars = re.compile("[" + "".join(map(re.escape, stand_ins)) + "]")
        start = begin = 0  # of what has not been yielded; of the text after the last special token
        for end, after in [*(match.span() for match in self._pattern.finditer(text)), (len(text), len(text))]:
            if chars.search(text, begin, end):
                if start < begin:
                    yield text[start:begin], False
                yield chars.sub(lambda match: stand_ins[match[0]], text[begin:end]), True
                start = end
            begin = after
        if start < len(text):
            yield text[start:], False


def _texts(value: Any) -> Iterator[str]:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            left += item


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(each, change) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(each, change) for each in value]
    return value
