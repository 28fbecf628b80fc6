"""500 requests that no server should serve, from a seed: each is answered with a 4xx in OpenAI's form, none is a
defect, and the server goes on as if nothing had been."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Callable
from typing import Any

from tests.server.live import Live

COUNT = 500
COMPLETION = {"model": "demo", "prompt": "the", "max_tokens": 2}
CHAT = {"model": "to_velar", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}

WHOLE_NUMBERS = ["max_tokens", "min_tokens", "top_k", "seed", "n", "best_of", "prompt_logprobs", "priority"]
NUMBERS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "deadline"]
BOOLEANS = ["stream", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "return_token_ids"]
OTHERS: dict[str, list[Any]] = {
    "stop": [5, {}, [5], [""], "x" * 2000, ["x"] * 100],
    "stop_token_ids": ["a", [-1], [10**9], ["a"], {}],
    "logit_bias": [[], "a", {"a": 1}, {"-1": 1}, {"99999999": 1}, {"5": "x"}, {"5": 1000}],
    "stream_options": [[], 1, {"include_usages": True}, {"include_usage": "yes"}],
    "response_format": [
        "json",
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_object", "json_schemas": 1},
    ],
    "guided_regex": [5, "(", "[z-a]"],
    "guided_choice": [[], [""], "a", [1]],
    "guided_json": ["{", [], {"type": "no such type"}],
    "guided_grammar": [5, "nonsense", "start: missing", "root ::= ("],
    "structured_outputs": [5, {"grammar": "("}, {"structural_tag": "x"}, {"json": "{"}],
    "allowed_token_ids": [[], [-1], [10**9], ["a"], 5, {}],
    "bad_words": ["a", [5], [""], ["a"] * 600, {}],
    "metadata": [[], "a", 1],
    "user": [5, [], {}],
    "model": [5, [], {}, "nobody", "demo:nobody", "nobody:to_velar", "../demo", "\u0000"],
    "use_beam_search": [True],
    "truncate_prompt_tokens": [0, -5, "a"],
}
RANGES: dict[str, list[Any]] = {
    "max_tokens": [-1, -(10**9), 10**30, 2**31],
    "min_tokens": [-1, 3, 10**12],
    "top_k": [-2, 10**12],
    "seed": [2**63, 10**40, -(10**30)],
    "n": [0, -1, 17, 10**9],
    "best_of": [0, 5],
    "prompt_logprobs": [-1, 101, 10**9],
    "priority": [10**12, -(10**12)],
    "temperature": [-0.1, 101, 1e300, -1e300],
    "top_p": [0, -1, 1.01, 1e30],
    "min_p": [-0.01, 1.01],
    "presence_penalty": [-2.1, 2.1, 1e30],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1, 1e10, 5e-324],
    "deadline": [0, -1, 1e9],
}
PROMPTS: list[Any] = [[], [[]], [-1], [1024], [10**18], [1, "a"], ["a", 1], [[1], "a"], [[[1]]], [True], [1.5], {}, 5,
                      None, [None], ["a"] * 17, [[1]] * 17, "word " * 2000, [5] * 1024, "x" * 200_000]  # fmt: skip
MESSAGES: list[Any] = [[], {}, "hi", [5], [{}], [{"role": "pirate", "content": "a"}], [{"content": "a"}],
                       [{"role": "user", "content": 5}], [{"role": "user", "content": "a", "tool_call": "red"}],
                       [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
                       [{"role": "user", "content": [{"type": "text"}]}], [None],
                       [{"role": "assistant", "tool_calls": [{"id": 5}]}],
                       [{"role": "user", "content": "word " * 2000}]]  # fmt: skip
TOOLS: list[Any] = [{}, "a", [5], [{}], [{"type": "code"}], [{"type": "function"}],
                    [{"type": "function", "function": {"name": 5}}]]  # fmt: skip

Bad = tuple[str, str, bytes]


def changed(rng: random.Random, **change: Any) -> Bad:
    path = rng.choice(list(PATHS))
    return "POST", path, json.dumps({**PATHS[path], **change}).encode()


def wrong_type(rng: random.Random) -> Bad:
    kind = rng.randrange(3)
    if kind == 0:
        return changed(rng, **{rng.choice(WHOLE_NUMBERS): rng.choice(["x", [], {}, 1.5, True, "5x"])})
    if kind == 1:
        return changed(rng, **{rng.choice(NUMBERS): rng.choice(["x", [], {}, True, "0,5"])})
    return changed(rng, **{rng.choice(BOOLEANS): rng.choice(["truly", 2, [], {}])})


def bad_value(rng: random.Random) -> Bad:
    name = rng.choice(list(OTHERS))
    return changed(rng, **{name: rng.choice(OTHERS[name])})


def absurd_number(rng: random.Random) -> Bad:
    name = rng.choice(list(RANGES))
    return changed(rng, **{name: rng.choice(RANGES[name])})


def nearly_known_field(rng: random.Random) -> Bad:
    name = rng.choice([*WHOLE_NUMBERS, *NUMBERS, *BOOLEANS])
    place = rng.randrange(1, len(name) - 1)
    swapped = name[:place] + name[place + 1] + name[place] + name[place + 2 :]
    if len(name) < 5 or swapped == name:
        swapped = f"{name}s" if len(name) > 4 else "max_token"
    return changed(rng, **{swapped: rng.choice([1, None, "a", {}])})


def bad_prompt(rng: random.Random) -> Bad:
    return "POST", "/v1/completions", json.dumps({**COMPLETION, "prompt": rng.choice(PROMPTS)}).encode()


def bad_messages(rng: random.Random) -> Bad:
    change = {"messages": rng.choice(MESSAGES)} if rng.random() < 0.7 else {"tools": rng.choice(TOOLS)}
    return "POST", "/v1/chat/completions", json.dumps({**CHAT, **change}).encode()


def truncated(rng: random.Random) -> Bad:
    method, path, body = changed(rng)
    return method, path, body[: rng.randrange(len(body))]


def broken_text(rng: random.Random) -> Bad:
    method, path, body = changed(rng, user="MARK")
    broken = rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x00", b"\\ud800", b"\\x41"])
    return method, path, body.replace(b"MARK", broken)


def nested(rng: random.Random) -> Bad:
    depth = rng.choice([70, 500, 5000, 100_000])
    path = rng.choice(list(PATHS))
    more = ["prompt"] if path == "/v1/completions" else ["chat_template_kwargs", "tools"]
    name = rng.choice(["metadata", "guided_json", "stop", "logit_bias", *more])
    open_, close = rng.choice([("[", "]"), ('{"a":', "}")])
    value = '{"a":' + open_ * depth + "1" + close * depth + "}"
    body = json.dumps(PATHS[path])[:-1] + f', "{name}": {value}}}'
    return "POST", path, body.encode()


def not_an_object(rng: random.Random) -> Bad:
    body = rng.choice([b"", b"null", b"[]", b"5", b'"a"', b"\x00\x01", b"{}", b"{}{}", b"NaN", b"<xml/>"])
    return "POST", rng.choice(list(PATHS)), body


def wrong_place(rng: random.Random) -> Bad:
    return rng.choice(
        [
            ("GET", "/v1/completions", b""),
            ("PUT", "/v1/chat/completions", b"{}"),
            ("GET", "/nowhere", b""),
            ("POST", "/v1/models", b"{}"),
            ("GET", "/v1/models/nobody", b""),
            ("GET", "/%ff%fe/..", b""),
            ("POST", "/tokenize", b'{"prompt": 5}'),
            ("POST", "/tokenize", b"{}"),
            ("POST", "/tokenize", b'{"prompt": "a", "messages": []}'),
            ("POST", "/detokenize", b'{"tokens": [-1]}'),
            ("POST", "/detokenize", b'{"tokens": ["a"]}'),
            ("POST", "/v1/load_lora_adapter", b'{"lora_name": "a", "lora_path": "/etc"}'),
            ("PUT", "/v1/scheduler", b'{"policy": "vtc"}'),
            ("GET", "/v1/fairness?window=never", b""),
            ("GET", "/v1/fairness?window=-1", b""),
        ]
    )


def too_large(rng: random.Random) -> Bad:
    return "POST", rng.choice(list(PATHS)), b'{"user": "' + b"x" * (2 * 2**20) + b'"}'


MAKERS: list[Callable[[random.Random], Bad]] = [
    wrong_type, bad_value, absurd_number, nearly_known_field, bad_prompt, bad_messages, truncated, broken_text, nested,
    not_an_object, wrong_place,
]  # fmt: skip


def test_each_of_500_is_refused_in_openais_form_and_the_server_goes_on(server: Live) -> None:
    rng = random.Random(2026)
    made = [rng.choice(MAKERS)(rng) for _ in range(COUNT - 5)] + [too_large(rng) for _ in range(5)]
    assert len(set(made)) > COUNT // 2
    before = server.ask("POST", "/v1/completions", {**COMPLETION, "temperature": 0}).json["choices"]
    logged = len(server.log)  # other tests share this server
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    for bad in made:
        _check(connection, *bad)
    connection.close()
    assert server.ask("POST", "/v1/completions", {**COMPLETION, "temperature": 0}).json["choices"] == before
    assert server.ask("GET", "/health").status == 200
    server.until_metric("inlaid:kv_blocks_used", 0)
    assert not [line for line in server.log[logged:] if "Traceback" in line]


def _check(connection: http.client.HTTPConnection, method: str, path: str, body: bytes) -> None:
    shown = (method, path, body[:300])
    connection.request(method, path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    assert 400 <= response.status < 500, (shown, response.status, text[:500])
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}, shown
    assert isinstance(error["message"], str), shown
    assert error["message"], shown
    assert isinstance(error["type"], str), shown


def test_half_a_character_is_called_that_and_half_a_body_is_not(server: Live) -> None:
    def told(prompt: bytes, end: bytes = b'"}') -> tuple[int, str]:
        answer = server.ask("POST", "/v1/completions", raw=b'{"max_tokens": 1, "prompt": "' + prompt + end)
        return answer.status, "" if answer.status == 200 else answer.json["error"]["message"]

    for half in (b"\\ud800", b"a\\uDBFF b", b"\\udc00", b"\\ud800\\u0041", b"\\\\\\ud83d"):
        status, message = told(half)
        assert status == 400
        assert "half a character" in message
    assert told(b"\\ud83d\\ude00") == (200, "")
    assert told(b"\\\\ud800") == (200, "")
    for whole in (b"the sea", b"\\\\ud800", b"\\ud83d\\ude00"):
        assert told(whole, b"")[1] == "Input data was truncated"
