"""The openai SDK against a live server."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest

from tests.server.live import Live


@pytest.fixture(scope="module")
def client(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


MESSAGES: list[Any] = [{"role": "user", "content": "hello there"}]


def test_models_are_the_base_and_its_adapters(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert "demo" in listed
    adapters = [model for model in listed.values() if model.model_dump()["parent"] == "demo"]
    assert len(adapters) >= 12
    assert client.models.retrieve("to_velar").model_dump()["parent"] == "demo"
    assert client.models.retrieve("to_velar").model_dump()["root"].endswith("to_velar")


def test_a_streamed_chat_says_what_the_whole_one_says(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="to_velar", messages=MESSAGES, temperature=0, max_tokens=24)
    chunks = list(
        client.chat.completions.create(
            model="to_velar",
            messages=MESSAGES,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_base_adapter_and_both_names_answer(client: openai.OpenAI) -> None:
    def say(model: str) -> str | None:
        answer = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0, max_tokens=16)
        assert answer.model == model
        return answer.choices[0].message.content

    assert say("to_velar") == say("demo:to_velar")
    assert say("demo") != say("to_velar")


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="maths", messages=MESSAGES, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert answer.usage is not None
    assert len(logprobs.content) == answer.usage.completion_tokens
    for item in logprobs.content:
        assert len(item.top_logprobs) == 3
        assert item.logprob == item.top_logprobs[0].logprob  # greedy: the chosen one is the likeliest
        assert sum(math.exp(top.logprob) for top in item.top_logprobs) <= 1.0001
        assert item.bytes is not None


def test_completion_logprobs_and_offsets(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="the", temperature=0, max_tokens=6, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens
    assert "".join(logprobs.tokens).startswith(answer.choices[0].text)
    assert logprobs.text_offset is not None
    for at, token in zip(logprobs.text_offset, logprobs.tokens):
        assert "".join(logprobs.tokens)[at:].startswith(token)


def test_n_answers_to_each_of_several_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=["one", "two", "three"], n=2, max_tokens=5, seed=7)
    assert [choice.index for choice in answer.choices] == list(range(6))
    again = client.completions.create(model="demo", prompt=["one", "two", "three"], n=2, max_tokens=5, seed=7)
    assert [c.text for c in again.choices] == [c.text for c in answer.choices]
    assert answer.choices[0].text != answer.choices[1].text
    streamed: dict[int, str] = {}
    for chunk in client.completions.create(
        model="demo", prompt=["one", "two", "three"], n=2, max_tokens=5, seed=7, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[n] for n in range(6)] == [choice.text for choice in answer.choices]


def test_stop_strings_do_not_show(client: openai.OpenAI) -> None:
    free = client.completions.create(model="demo", prompt="the", temperature=0, max_tokens=12).choices[0].text
    stop = free[3:5]
    cut = client.completions.create(model="demo", prompt="the", temperature=0, max_tokens=12, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == free[: free.index(stop)]


def test_tools_reach_the_template(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}

    def prompt_tokens(**more: object) -> int:
        answer = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=1, **more)  # type: ignore
        assert answer.usage is not None
        return int(answer.usage.prompt_tokens)

    assert prompt_tokens(tools=[tool]) > prompt_tokens() + 5
    assert prompt_tokens(tools=[tool], tool_choice="none") == prompt_tokens()


def test_a_second_request_finds_the_prefix_of_the_first(client: openai.OpenAI) -> None:
    prompt = "a prompt of some length that nobody else sends, " * 4
    client.completions.create(model="maths", prompt=prompt, max_tokens=1)
    usage = client.completions.create(model="maths", prompt=prompt, max_tokens=1).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens
    assert usage.prompt_tokens_details.cached_tokens > 16
    other = client.completions.create(model="to_velar", prompt=prompt, max_tokens=1).usage
    assert other is not None
    assert other.prompt_tokens_details is not None
    assert other.prompt_tokens_details.cached_tokens == 0


def test_structured_output_keeps_to_its_form(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=8, extra_body={"guided_choice": ["north", "south"]}
    )
    assert answer.choices[0].message.content in ("north", "south")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"guided_regex": "(unclosed"})


def test_errors_are_the_sdks_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature is 1000") as absurd:
        client.chat.completions.create(model="demo", messages=MESSAGES, temperature=1000)
    assert absurd.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="unknown field 'tempreature'"):
        client.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"tempreature": 1})
    with pytest.raises(openai.BadRequestError, match="the prompt has"):
        client.completions.create(model="demo", prompt="word " * 1500)


def test_what_vllms_and_sglangs_benchmarks_send_is_accepted(server: Live) -> None:
    """`vllm bench serve` (both endpoints) and SGLang's bench with an adapter, their bodies field by field."""
    usage = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    sampling = {"temperature": 0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    sglang = {"model": "maths", "lora_path": "maths", "temperature": 0.0, "ignore_eos": True, "stream": True}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"model": "maths", "prompt": "x", "max_tokens": 3, "logprobs": None, **sampling, **usage}),
        (
            "/v1/chat/completions",
            {"model": "maths", "messages": parts, "max_completion_tokens": 3, **sampling, **usage},
        ),
        ("/v1/completions", {"prompt": "x", "best_of": 1, "max_tokens": 3, **sglang}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_completion_tokens": 3, **sglang}),
        (
            "/v1/completions",
            {"model": "maths", "prompt": "x", "max_tokens": 3, "max_completion_tokens": 3, "stop": None},
        ),
    ]
    for path, body in bodies:
        answer = server.ask("POST", path, body)
        assert answer.status == 200, (body, answer.body)
        assert body.get("stream") is None or answer.body.endswith(b"data: [DONE]\n\n")


def test_lora_path_names_the_adapter_as_model_does(server: Live) -> None:
    def ask(**names: str) -> tuple[int, dict[str, Any]]:
        answer = server.ask(
            "POST", "/v1/completions", {"prompt": "Tom has 6", "max_tokens": 8, "temperature": 0, **names}
        )
        return answer.status, answer.json

    status, by_path = ask(model="demo", lora_path="maths")
    assert status == 200
    assert by_path["model"] == "maths"
    assert by_path["choices"] == ask(model="maths")[1]["choices"]
    assert by_path["choices"] == ask(lora_path="demo:maths")[1]["choices"]
    assert by_path["choices"] != ask(model="demo", lora_path="")[1]["choices"]
    for names, wanted in (
        ({"model": "maths", "lora_path": "code"}, 400),
        ({"lora_path": "demo"}, 400),
        ({"lora_path": "nobody"}, 404),
    ):
        status, refusal = ask(**names)
        assert (status, refusal["error"]["param"]) == (wanted, "lora_path")


def test_vllms_ways_to_say_what_may_be_written(client: openai.OpenAI) -> None:
    def say(**body: Any) -> str:
        made = client.completions.create(model="demo", prompt="The sea", temperature=0, max_tokens=8, extra_body=body)
        return made.choices[0].text

    for grammar in ('start: "north" | "south"', 'root ::= "north" | "south"'):
        for body in ({"guided_grammar": grammar}, {"structured_outputs": {"grammar": grammar}}, {"ebnf": grammar}):
            assert say(**body) in ("north", "south")
    assert say(structured_outputs={"choice": ["east", "west"]}) in ("east", "west")
    assert say(structured_outputs={"regex": "[0-9]{3}"}).isdigit()
    free = say(ignore_eos=True)
    word = free.split()[1]
    assert word not in say(ignore_eos=True, bad_words=[word]).split()
    made = client.completions.create(
        model="demo",
        prompt="The sea",
        max_tokens=9,
        extra_body={"allowed_token_ids": [70, 80], "return_token_ids": True},
    )
    assert set(made.choices[0].token_ids) <= {70, 80}  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError, match="only one constraint"):
        say(guided_grammar='start: "a"', guided_regex="a")


def test_a_constraint_that_cannot_be_followed_is_an_error_and_not_an_answer(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        client.completions.create(model="demo", prompt="x", extra_body={"guided_json": {"$ref": "#"}})
    with pytest.raises(openai.BadRequestError, match="cannot be followed after"):
        client.completions.create(model="demo", prompt="x", extra_body={"guided_regex": "b{1000}{1000}"})
    with pytest.raises(openai.APIError, match="cannot be followed after") as late:
        list(
            client.completions.create(
                model="demo", prompt="x", stream=True, extra_body={"guided_regex": "b{1000}{1000}"}
            )
        )
    assert late.value.type == "invalid_request_error"
