"""Mutator: requests over all routes, each a valid one that was changed at random: its JSON, its bytes, its headers, its
path. The same seed gives the same requests.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from inlaid.server.routes import ROUTES
from tests.chaos.wire import Sent, request

_CHAT = {"model": "maths", "messages": [{"role": "user", "content": "2+2"}], "max_tokens": 2, "temperature": 0}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
_TEXT = {"kind": "text", "name": "t", "template": "{item}"}
_NODES = (
    {
        "kind": "generate",
        "name": "draft",
        "adapter": "maths",
        "messages": _CHAT["messages"],
        "params": {"max_tokens": 2},
    },
    {"kind": "generate", "name": "more", "prompt": "{draft} {text}", "params": {"max_tokens": 2, "temperature": 0}},
    {"kind": "map", "name": "all", "over": "list", "result": "t", "nodes": [_TEXT]},
    {"kind": "branch", "name": "side", "when": {"value": "more", "test": "contains", "against": "a"}, "then": "draft"},
    {"kind": "best", "name": "best", "of": "list", "by": "all"},
    {"kind": "join", "name": "joined", "of": "all", "separator": ","},
)
_PROGRAM = {"nodes": list(_NODES), "inputs": {"text": "a", "list": ["1", "2"]}, "user": "mutant"}
_BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"model": "demo", "prompt": "hello", "max_tokens": 2, "temperature": 0}),
    ("/v1/completions", {"model": "maths", "prompt": [5, 6, 7], "max_tokens": 1, "n": 2, "logprobs": 2, "seed": 3}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "stream": True, "stop": ["x"], "echo": True}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 3, "guided_regex": "[ab]+", "logit_bias": {"5": 1.5}}),
    ("/v1/chat/completions", _CHAT),
    ("/v1/chat/completions", {**_CHAT, "stream": True, "stream_options": {"include_usage": True}, "top_p": 0.5}),
    ("/v1/chat/completions", {**_CHAT, "tools": [_TOOL], "tool_choice": "auto", "logprobs": True, "top_logprobs": 1}),
    ("/v1/chat/completions", {**_CHAT, "response_format": {"type": "json_object"}, "user": "u", "priority": 1}),
    ("/v1/programs", _PROGRAM),
    ("/v1/programs", {**_PROGRAM, "stream": True, "options": {"fuse_decode": False, "max_in_flight": 1}, "seed": 5}),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 2, "temperature": 0}, "return_logprob": True}),
    ("/generate", {"input_ids": [[5, 6], [7]], "sampling_params": {"max_new_tokens": 1, "n": 2}, "stream": True}),
    ("/tokenize", {"prompt": "hello", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "tools": [_TOOL]}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/v1/load_lora_adapter", {"lora_name": "mutated", "lora_path": "maths", "load_inplace": True, "pinned": False}),
    ("/v1/unload_lora_adapter", {"lora_name": "mutated", "lora_int_id": 1}),
    ("/load_lora_adapter", {"lora_name": "mutated2", "lora_path": "maths"}),
    ("/unload_lora_adapter", {"lora_name": "mutated2"}),
    ("/v1/scheduler", {"policy": "vtc", "options": {"predict": "none"}, "weights": {"mutant": 2.0}}),
    ("/v1/scheduler", {"policy": "inlaid", "options": {"beta": 5}, "limits": {"mutant": {"requests_per_minute": 9}}}),
)
_QUERIES = ("/v1/fairness?window=60", "/metrics", "/v1/models/maths", "/v1/models/demo:maths", "/health")
_TEXTS = (
    *("", " ", "a", "hello", "\0", "\ud800", "\udc00x", "é", "🙂", "\u202e", "a" * 300, "</s>", "demo:", "../../x"),
    *("{{7*7}}", "{% for i in range(10**9) %}x{% endfor %}", "(a+)+$", "%s%n", "\r\nX: y", "[" * 200, "json", "auto"),
    *("NaN", "1", "-1", "true", "null", "(?:" * 50, "root ::= root", "\ufeff", "\x7f", "/etc/passwd", "mutated"),
)
_NUMBERS = (
    *(0, -1, 1, 2, 7, 255, 256, 1023, 1024, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30),
    *(0.5, -0.0, 1e-300, 5e-324, 1e308, float("inf"), float("-inf"), float("nan"), 1.0, 2.5, 10**400),
)
_FIELDS = tuple(
    "max_tokens n seed stop stream echo logprobs prompt messages model lora_path top_k top_p min_p logit_bias "
    "bad_words allowed_token_ids prompt_logprobs user tools guided_json guided_regex guided_choice guided_grammar "
    "truncate_prompt_tokens request_id deadline priority min_tokens repetition_penalty stop_token_ids "
    "response_format suffix chat_template_kwargs structured_outputs best_of metadata weights limits policy "
    "options max_num_waiting sampling_params rid lora_name pinned x __class__ ignore_eos".split()
)
_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "get", "FOO", "")


class Mutator:
    """An endless row of mutated requests."""

    def __init__(self, seed: int, admin_key: str, long_body: int = 0) -> None:
        self._draw = random.Random(seed)
        self._admin_key = admin_key
        self._long_body = long_body  # bytes of the rare long bodies; 0: none
        known = {path for path, _ in _BODIES}
        self._bodies = [*_BODIES, *((r.path, dict(_CHAT)) for r in ROUTES if r.body and r.path not in known)]
        self._methods = {route.path: route.method for route in ROUTES}
        self._queries = [*_QUERIES, *(r.path for r in ROUTES if r.body is None and r.method == "GET")]

    def next(self) -> Sent:
        """Return the next request."""
        draw = self._draw
        headers = [("Content-Type", "application/json"), ("X-Tenant", "mutant")]
        if draw.random() < 0.9:
            headers.append(("Authorization", f"Bearer {self._admin_key}"))
        if draw.random() < 0.1:
            return self._finished("GET", draw.choice(self._queries), headers, b"")
        path, body = draw.choice(self._bodies)
        data = b""
        while not data:
            value = copy.deepcopy(body)
            for _ in range(draw.choice((0, 1, 1, 1, 2, 3, 5))):
                value = self._changed(value)
            with suppress(RecursionError):  # nested more deeply than json writes it
                data = json.dumps(value).encode()
        if draw.random() < 0.15:
            data = draw.choice(_BYTES)(draw, data)
        if self._long_body and draw.random() < 0.0005:
            data = b'{"prompt": "' + b"a" * draw.randrange(self._long_body) + b'"}'
        return self._finished(self._methods.get(path, "POST"), path, headers, data)

    def _finished(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> Sent:
        draw, breaks, half = self._draw, False, False
        if draw.random() < 0.05:
            path = draw.choice(_PATHS)(draw, path)
        if draw.random() < 0.03:
            method, breaks = draw.choice(_METHODS), True
        if draw.random() < 0.1:
            name, value = draw.choice(_HEADERS)
            headers, breaks, half = [*headers, (name, value)], True, True
        raw = request(method, path, headers, body)
        if draw.random() < 0.01:
            raw, breaks, half = _flipped(draw, raw), True, True
        return Sent(raw, breaks, half)

    # The JSON.

    def _changed(self, value: Any) -> Any:
        """Return the value with one change somewhere in it."""
        draw = self._draw
        places = _places(value)
        if not places or draw.random() < 0.02:
            return self._any(2)
        container, key = draw.choice(places)
        kind = draw.random()
        if kind < 0.35:
            container[key] = self._any(2)
        elif kind < 0.45:
            del container[key]
        elif kind < 0.65 and isinstance(value, dict):
            value[draw.choice(_FIELDS)] = self._any(2)
        elif kind < 0.72:
            container[key] = [container[key]] * draw.choice((0, 1, 2, 5, 40))
        elif kind < 0.77:
            container[key] = {draw.choice(_FIELDS): container[key]}
        elif kind < 0.8:
            for _ in range(draw.choice((5, 70, 900))):
                container[key] = [container[key]] if draw.random() < 0.5 else {"a": container[key]}
        elif kind < 0.88 and isinstance(container[key], (int, float)):
            container[key] = draw.choice(
                (-container[key], container[key] + 1, container[key] * 10**9, str(container[key]))
            )
        else:
            other, at = draw.choice(places)
            if type(container[key]) in (int, str, float, bool) and type(other[at]) in (int, str, float, bool):
                container[key], other[at] = other[at], container[key]
        return value

    def _any(self, depth: int) -> Any:
        draw = self._draw
        kind = draw.randrange(8 if depth else 5)
        if kind < 2:
            return draw.choice(_NUMBERS)
        if kind < 4:
            return draw.choice(_TEXTS)
        if kind == 4:
            return draw.choice((None, True, False))
        if kind == 5:
            return [self._any(depth - 1) for _ in range(draw.choice((0, 1, 2, 3, 20)))]
        if kind == 6:
            return [draw.randrange(1100) for _ in range(draw.choice((1, 10, 100)))]
        return {draw.choice((*_FIELDS, *_TEXTS[:8])): self._any(depth - 1) for _ in range(draw.choice((0, 1, 3)))}


def _places(value: Any) -> list[tuple[Any, Any]]:
    """List the places in a JSON value that can be changed, as container and key."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo and len(found) < 200:
        container = todo.pop()
        if not isinstance(container, (dict, list)):
            continue
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                todo.append(container[key])
    return found


# The bytes.


def _flipped(draw: random.Random, data: bytes) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 3, 20))):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _doubled(draw: random.Random, data: bytes) -> bytes:
    at, end = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
    return data[:end] + data[at:end] * draw.choice((1, 3)) + data[end:]


def _strange(draw: random.Random, data: bytes) -> bytes:
    choices = (
        b"", b"null", b"[]", b"{}", b'""', b"0", b" " * 9999, b"\xff\xfe", b"\xef\xbb\xbf" + data, data + data,
        data.decode().encode("utf-16"), b"[" * 5000, b'{"a":' * 5000, data.replace(b'"', b"'"), b'"\\ud800"',
        gzip.compress(data), data.replace(b":", b": 1e999, \"x\":", 1), data[:-1] + b', "model": "\\udfff"}',
    )  # fmt: skip
    return draw.choice(choices)


_BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (_flipped, _cut, _doubled, _strange)
_PATHS: tuple[Callable[[random.Random, str], str], ...] = (
    lambda draw, path: path + "/",
    lambda draw, path: path.replace("/", "//"),
    lambda draw, path: path.upper(),
    lambda draw, path: (
        path + "?" + draw.choice(("window=nan", "window=1e999", "window=", "window=-1", "a=%ff", "%", "&"))
    ),
    lambda draw, path: path + draw.choice(("%00", "%2e%2e", "%ff", "/%2f", "/🙂", ";a", "#b", "/" + "a" * 5000)),
    lambda draw, path: "/v1/models/" + draw.choice(("%00", "%0a", "..", "a/b/c", "%f0%9f%98%80", "demo:", ":", " ")),
    lambda draw, path: "http://else.where" + path,
    lambda draw, path: "*",
)
_HEADERS = (
    ("X-Tenant", "\udcff\udcfe"), ("X-Tenant", "a" * 5000), ("Authorization", "Bearer \udcff"), ("Authorization", ""),
    ("Authorization", "Basic " + "A" * 2000), ("Content-Encoding", "gzip"), ("Content-Encoding", "deflate, gzip"),
    ("Content-Encoding", "br"), ("Content-Length", "0"), ("Content-Length", "99999999999999999999"),
    ("Content-Length", "-1"), ("Content-Length", "5"), ("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "x"),
    ("Expect", "100-continue"), ("Expect", "nothing"), ("Content-Type", "text/plain; charset=utf-99"),
    ("Content-Type", "multipart/form-data"), ("Connection", "close"), ("Upgrade", "websocket"), ("Host", "\udcff"),
    ("Accept-Encoding", "gzip"), ("Origin", "null"), ("Cookie", "a" * 9000), ("X" * 9000, "a"), ("Bad Name", "a"),
    ("Range", "bytes=0-"), ("If-None-Match", "*"), ("X-Request-Id", "\udc80" * 99), ("Content-Type", "\x01"),
)  # fmt: skip
