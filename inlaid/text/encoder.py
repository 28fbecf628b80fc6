"""The engine's requests, made of a request's words: prompts and conversations become token ids within the model's
limits, sampling parameters are checked, n answers are expanded. The server and LLM both go through here.

A request that cannot be served is refused (`Refused`) by the name of its parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from inlaid.engine.refusal import Refusal, Refused
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.text.literal import StandIns
from inlaid.text.nesting import check_depth
from inlaid.text.params import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_LOGPROB_ENTRIES,
    answer_params,
    check,
    check_tokens,
)
from inlaid.text.template import RESERVED, Message, plain_message
from inlaid.text.tokenizer import Tokenizer

_FORMS = "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids"


class RequestEncoder:
    """A model's tokenizer, and the limits of requests to the model. Its methods only read, and may run in threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        max_model_len: int,
        max_answers: int = 0,
        num_seats: int = 0,
        special_tokens_are_text: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.max_answers = max_answers  # most prompts times n in one request; 0: any number
        self.special_tokens_are_text = special_tokens_are_text  # in messages; prompts may hold any
        self.num_seats = num_seats  # requests that run at once; n is less; 0: any number

    def text(self, text: str, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Return the token ids of a text."""
        self._check_size(param, len(text))
        return self.tokens(self.tokenizer.encode(text, add_special_tokens), param)

    def tokens(self, ids: list[int], param: str = "prompt") -> list[int]:
        """Return token ids once they are checked: a tokenizer may have tokens that the model's embedding does not."""
        check_tokens(param, ids, self.vocab_size)
        return ids

    def prompts(self, given: str | list[Any], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each prompt: a text, several, token ids, or several lists of them."""
        if isinstance(given, str):
            return [self.text(given, add_special_tokens)]
        if not given:
            raise _refused("prompt is an empty list", "prompt")
        if (ids := as_ids(given)) is not None:
            return [self.tokens(ids)]
        if self.max_answers and len(given) > self.max_answers:
            raise _refused(f"{len(given)} prompts; at most {self.max_answers} in one request", "prompt")
        if all(isinstance(item, str) for item in given):
            return [self.text(item, add_special_tokens) for item in given]
        several = [as_ids(item) if isinstance(item, list) else None for item in given]
        if None in several:
            raise _refused(_FORMS, "prompt")
        return [self.tokens(item) for item in several if item is not None]

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        options: dict[str, Any] | None = None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Return the token ids of a conversation, written out by the chat template, which adds the special tokens
        itself; those that the messages or tools hold are text, unless the server was told otherwise. `options` is what
        the template is told besides messages and tools."""
        self.check_messages(len(messages))
        check_depth("tools", tools)
        given = {"messages": messages, "tools": tools, "chat_template_kwargs": options}
        for param, value in given.items():
            self._check_size(param, num_chars(value))
        words: Any = ([plain_message(message) for message in messages], tools, options)
        stand_ins: StandIns = {}
        if self.special_tokens_are_text:
            words, stand_ins = self.tokenizer.special_tokens.replaced(words)
        text = self.tokenizer.template.render(*words)
        self._check_size("messages", len(text))
        return self.tokens(self.tokenizer.encode_literally(text, stand_ins, add_special_tokens), "messages")

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return each word's token ids, with a space before it and without."""
        most = MAX_BAD_WORDS // 2
        if len(words) > most:
            raise _refused(f"bad_words has {len(words)} entries; at most {most}", "bad_words")
        if sum(map(len, words)) > MAX_BAD_WORD_CHARS:
            raise _refused(f"bad_words has more than {MAX_BAD_WORD_CHARS} characters", "bad_words")
        encode = self.tokenizer.encode
        spelled = [tuple(encode(space + word.lstrip(), False)) for word in words for space in ("", " ")]
        return tuple(dict.fromkeys(spelled))

    def check_messages(self, num_messages: int) -> None:
        """Refuse a conversation of more messages than the context has tokens."""
        if num_messages > self.max_model_len:
            raise _refused(f"messages has {num_messages} entries, more than {self.max_model_len} tokens", "messages")

    def check_count(self, n: int, num_prompts: int) -> None:
        """Refuse more answers in one request than the server gives."""
        if n < 1 or (self.max_answers and n * num_prompts > self.max_answers):
            raise _refused(f"n is {n} with {num_prompts} prompts; 1 to {self.max_answers} answers in one request", "n")

        if self.num_seats and n > max(1, self.num_seats - 1):
            raise _refused(f"n is {n}; it must be less than the {self.num_seats} requests that run at once", "n")

    def requests(
        self,
        ids: Iterator[str],
        prompts: Sequence[list[int]],
        params: SamplingParams,
        n: int = 1,
        *,
        adapter: str | None = None,
        tenant: str = "",
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str = "",
        speculation: bool = True,
    ) -> list[NewRequest]:
        """Return the engine's requests for n answers to each prompt, prompt by prompt."""
        self.check_count(n, len(prompts))
        check(params, self.vocab_size)
        for prompt in prompts:
            self._check_length(len(prompt), params.max_tokens)
        _check_prompt_logprobs(n * sum(map(len, prompts)), params)
        sampling = [answer_params(params, answer) for answer in range(n)]
        return [
            NewRequest(
                id=next(ids),
                prompt=prompt,
                params=one,
                adapter=adapter,
                tenant=tenant,
                priority=priority,
                deadline=deadline,
                cache_salt=cache_salt,
                speculation=speculation,
            )
            for prompt in prompts
            for one in sampling
        ]

    def _check_length(self, num_tokens: int, max_tokens: int) -> None:
        """Refuse a prompt that the engine would refuse, before it is sent once for each answer."""
        most = self.max_model_len
        if num_tokens + (max_tokens > 0) > most:
            text = f"the prompt has {num_tokens} tokens; with max_model_len {most} it can have {most - 1} at most"
            raise Refused(Refusal(text))

    def _check_size(self, param: str, num_chars: int) -> None:
        """Refuse a text that is too long whatever its tokens are, before tokenizing it."""
        if num_chars > self.max_model_len * self.tokenizer.max_token_bytes:
            raise _refused(f"{param} has {num_chars} characters, more than {self.max_model_len} tokens can hold", param)


def _check_prompt_logprobs(num_tokens: int, params: SamplingParams) -> None:
    """Refuse to answer with more log probabilities of prompts than the server should hold."""
    if params.prompt_logprobs is None:
        return
    count = num_tokens * (params.prompt_logprobs + 1)
    if count > MAX_LOGPROB_ENTRIES:
        text = f"{num_tokens} prompt tokens with {params.prompt_logprobs} log probabilities beside each"
        raise _refused(f"{text} make {count} entries; at most {MAX_LOGPROB_ENTRIES} in one request", "prompt_logprobs")


def num_chars(value: Any) -> int:
    """Count the characters of all texts in a JSON value, and one for each value in it."""
    total, left = 0, [value]
    while left:
        item = left.pop()
        total += 1 + (len(item) if isinstance(item, str) else 0)
        if isinstance(item, dict):
            left += item.keys()
            left += item.values()
        elif isinstance(item, (list, tuple)):
            left += item
    return total


def last_tokens(prompt: list[int], count: int | None) -> list[int]:
    """Return the last tokens of a prompt, where the client asks for that."""
    if count is None:
        return prompt
    if count < 1:
        raise _refused(f"truncate_prompt_tokens is {count}; it must be at least 1", "truncate_prompt_tokens")
    return prompt[-count:] if len(prompt) > count else prompt


def check_template_options(options: dict[str, Any]) -> None:
    """Refuse options of the chat template that are not its own."""
    check_depth("chat_template_kwargs", options)
    for name in RESERVED:
        if name in options:
            raise _refused(f"chat_template_kwargs must not have {name!r}", "chat_template_kwargs")


def as_ids(items: list[Any]) -> list[int] | None:
    """Return a list of whole numbers, None if it holds anything else. 5.0 is whole, as JSON does not tell it from 5."""
    if all(type(item) is int for item in items):
        return items
    whole = all(type(item) is int or (type(item) is float and item.is_integer()) for item in items)
    return [int(item) for item in items] if whole else None


def _refused(message: str, param: str) -> Refused:
    return Refused(Refusal(message, param=param))
