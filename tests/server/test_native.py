"""SGLang's native routes on a live server: requests as its benchmark and its RuntimeEndpoint send them."""

from __future__ import annotations

import http.client
import itertools
import json
from typing import Any

import pytest

from tests.server.live import Live

GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}


def bench(**changes: Any) -> dict[str, Any]:
    """Return the body that sglang.bench_serving sends by default."""
    body = {
        "text": "The sea and",
        "sampling_params": GREEDY,
        "stream": True,
        "lora_path": None,
        "return_logprob": False,
        "return_routed_experts": False,
        "logprob_start_len": -1,
    }
    return body | changes


def ask(server: Live, **changes: Any) -> Any:
    answer = server.ask("POST", "/generate", bench(stream=False) | changes)
    assert answer.status == 200, answer.body
    return answer.json


def streamed(server: Live, **changes: Any) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.request("POST", "/generate", json.dumps(bench(**changes)).encode())
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    lines = [line.removeprefix(b"data: ") for line in response.read().split(b"\n") if line]
    connection.close()
    assert lines.pop() == b"[DONE]"
    return [json.loads(line) for line in lines]


def completion(server: Live, **changes: Any) -> Any:
    body = {"prompt": "The sea and", "temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    return server.ask("POST", "/v1/completions", body | changes).json["choices"][0]


def refused(server: Live, **changes: Any) -> tuple[int, str, str]:
    answer = server.ask("POST", "/generate", bench(stream=False) | changes)
    error = answer.json["error"]
    return answer.status, error["param"], error["message"]


def test_an_answer_is_the_completions(server: Live) -> None:
    made, wanted = ask(server, rid="mine"), completion(server)
    assert (made["text"], made["output_ids"]) == (wanted["text"], wanted["token_ids"])
    meta = made["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(wanted["prompt_token_ids"]), 8)
    assert meta["e2e_latency"] > 0
    assert "output_token_logprobs" not in meta
    assert ask(server, text=None, input_ids=wanted["prompt_token_ids"])["text"] == wanted["text"]


def test_a_stream_grows_to_the_whole_answer(server: Live) -> None:
    events, whole = streamed(server, return_logprob=True), ask(server, return_logprob=True)
    for before, after in itertools.pairwise(events):
        assert after["text"].startswith(before["text"])
        assert after["meta_info"]["completion_tokens"] > before["meta_info"]["completion_tokens"]
        assert before["meta_info"]["finish_reason"] is None
    last = events[-1]
    assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    made = last["meta_info"]["output_token_logprobs"]
    assert [entry[1] for entry in made] == whole["output_ids"]
    assert [entry[0] for entry in made] == pytest.approx(
        [entry[0] for entry in whole["meta_info"]["output_token_logprobs"]], abs=1e-4
    )


def test_a_batch_has_an_adapter_and_wishes_for_each(server: Live) -> None:
    made = ask(
        server,
        text=["Tom has 6", "Tom has 6", "Tom has 6"],
        lora_path=["maths", None, "demo:maths"],
        sampling_params=[GREEDY, GREEDY, {**GREEDY, "max_new_tokens": 3}],
        return_logprob=[False, True, False],
        rid="batch",
    )
    assert [one["meta_info"]["id"] for one in made] == ["batch_0", "batch_1", "batch_2"]
    alone = [completion(server, prompt="Tom has 6", model=name)["token_ids"] for name in ("maths", "demo")]
    assert [one["output_ids"] for one in made] == [*alone, alone[0][:3]]
    assert alone[0] != alone[1]
    assert ["output_token_logprobs" in one["meta_info"] for one in made] == [False, True, False]
    assert len(ask(server, text=["x"])) == 1


def test_whole_numbers_with_a_point_are_token_ids(server: Live) -> None:
    assert ask(server, text=None, input_ids=[5.0, 6])["text"] == ask(server, text=None, input_ids=[5, 6])["text"]
    assert len(ask(server, text=None, input_ids=[[5.0], [6]])) == 2


def test_n_answers_a_prompt_each_with_its_index(server: Live) -> None:
    sampling = {"max_new_tokens": 5, "n": 2, "sampling_seed": 7, "ignore_eos": True}
    whole = ask(server, text=["The sea", "Tom has"], sampling_params=sampling)
    last: dict[int, Any] = {}
    for event in streamed(server, text=["The sea", "Tom has"], sampling_params=sampling):
        last[event["index"]] = event["output_ids"]
    assert [last[index] for index in range(4)] == [one["output_ids"] for one in whole]
    assert whole[0]["output_ids"] != whole[1]["output_ids"]
    assert len({one["meta_info"]["id"] for one in whole}) == 4


def test_logprobs_are_the_completion_routes(server: Live) -> None:
    meta = ask(server, return_logprob=True, top_logprobs_num=2, logprob_start_len=0, return_text_in_logprobs=True)[
        "meta_info"
    ]
    wanted = completion(server, echo=True, logprobs=2)["logprobs"]
    made = meta["input_token_logprobs"] + meta["output_token_logprobs"]
    tops = meta["input_top_logprobs"] + meta["output_top_logprobs"]
    assert [entry[2] for entry in made] == wanted["tokens"]
    assert made[0][0] is None
    assert tops[0] is None
    assert [entry[0] for entry in made[1:]] == pytest.approx(wanted["token_logprobs"][1:], abs=1e-4)
    for own, (logprob, _, text), top in zip(tops[1:], made[1:], wanted["top_logprobs"][1:]):
        assert {text: logprob} | {entry[2]: entry[0] for entry in own} == pytest.approx(top, abs=1e-4)
    later = ask(server, return_logprob=True, logprob_start_len=2)["meta_info"]
    assert len(later["input_token_logprobs"]) == later["prompt_tokens"] - 2
    assert later["input_token_logprobs"][0][:2] == pytest.approx(made[2][:2], abs=1e-4)
    assert later["input_token_logprobs"][0][2] is None


def test_runtime_endpoints_requests(server: Live) -> None:
    """select() and gen() of SGLang's frontend language, as its RuntimeEndpoint words them."""
    warm = ask(server, text="The sea", sampling_params={"max_new_tokens": 0})
    assert (warm["text"], warm["meta_info"]["completion_tokens"]) == ("", 0)
    assert "input_token_logprobs" not in warm["meta_info"]
    choices = ask(
        server,
        text=["The sea is", "The sea has"],
        sampling_params={"max_new_tokens": 0, "temperature": 0},
        return_logprob=True,
        return_text_in_logprobs=True,
        logprob_start_len=warm["meta_info"]["prompt_tokens"] - 2,
    )
    bare = ask(server, text=None, input_ids=[[5, 6, 7]], sampling_params={"max_new_tokens": 0}, return_logprob=True,
               logprob_start_len=None)  # fmt: skip
    values = [value for value, _, _ in bare[0]["meta_info"]["input_token_logprobs"]]
    assert values[0] is None
    assert [value < 0 for value in values[1:]] == [True, True]
    for choice in choices:
        assert all(value < 0 for value, _, _ in choice["meta_info"]["input_token_logprobs"])
        assert choice["meta_info"]["output_token_logprobs"] == []
    spoken = {
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "max_new_tokens": 8,
        "min_new_tokens": 0,
        "n": 1,
        "stop": [],
        "stop_token_ids": [],
        "stop_regex": [],
        "temperature": 0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "ignore_eos": True,
        "regex": None,
        "json_schema": None,
    }
    assert ask(server, sampling_params=spoken)["text"] == completion(server)["text"]


def test_a_stop_is_named_and_kept_on_request(server: Live) -> None:
    whole = ask(server)
    stop = whole["text"][3:6]
    cut = ask(server, sampling_params={**GREEDY, "stop": stop})
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    kept = ask(server, sampling_params={**GREEDY, "stop": stop, "no_stop_trim": True})
    assert kept["text"] == cut["text"] + stop
    token = whole["output_ids"][2]
    by_token = ask(server, sampling_params={**GREEDY, "stop_token_ids": [token]})
    assert by_token["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    chosen = ask(server, sampling_params={"temperature": 0, "regex": "yes|no"})
    assert chosen["text"] in ("yes", "no")
    assert chosen["meta_info"]["finish_reason"]["matched"] == chosen["output_ids"][-1]


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"text": None}, 400, "text"),
        ({"input_ids": [5]}, 400, "text"),
        ({"text": []}, 400, "text"),
        ({"text": None, "input_ids": []}, 400, "input_ids"),
        ({"text": None, "input_ids": [5, "a"]}, 400, "input_ids"),
        ({"text": None, "input_ids": [[5], 6]}, 400, "input_ids"),
        ({"text": None, "input_ids": ["a"]}, 400, "input_ids"),
        ({"text": None, "input_ids": [["a", "b"]]}, 400, "input_ids"),
        ({"text": None, "input_ids": [[]]}, 400, "input_ids"),
        ({"text": None, "input_ids": [10**9]}, 400, "input_ids"),
        ({"text": ["a", "b"], "lora_path": ["maths"]}, 400, "lora_path"),
        ({"sampling_params": [{}, {}]}, 400, "sampling_params"),
        ({"rid": ["a", "b"]}, 400, "rid"),
        ({"lora_path": "nobody"}, 404, "lora_path"),
        ({"sampling_params": {"max_new_tokens": -1}}, 400, "max_new_tokens"),
        ({"sampling_params": {"max_new_tokens": 2, "min_new_tokens": 3}}, 400, "min_new_tokens"),
        ({"sampling_params": {"sampling_seed": 2**63}}, 400, "sampling_seed"),
        ({"sampling_params": {"temperature": -1}}, 400, "temperature"),
        ({"sampling_params": {"n": 17}}, 400, "n"),
        ({"sampling_params": {"n": 0}}, 400, "n"),
        ({"sampling_params": {"stop_regex": "a"}}, 400, "stop_regex"),
        ({"text": ["a"] * 9, "sampling_params": {"n": 2}}, 400, "n"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 2}, {"n": 1}]}, 400, "n"),
        ({"return_logprob": True, "top_logprobs_num": 101}, 400, "top_logprobs_num"),
        ({"return_logprob": True, "logprob_start_len": 500}, 400, "logprob_start_len"),
        ({"return_logprob": True, "logprob_start_len": -2}, 400, "logprob_start_len"),
        ({"return_routed_experts": True}, 400, "return_routed_experts"),
        ({"image_data": "http://x"}, 400, "image_data"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_its_name(
    server: Live, changes: dict[str, Any], status: int, param: str
) -> None:
    got, named, message = refused(server, **changes)
    assert (got, named) == (status, param)
    assert "max_tokens" not in message


@pytest.mark.parametrize("body", [{"sampling_params": {"custom_params": {}}}, {"session_params": {}}])
def test_fields_that_mean_nothing_here_are_ignored_and_named(server: Live, body: dict[str, Any]) -> None:
    answer = server.ask("POST", "/generate", bench(stream=False) | body)
    assert answer.status == 200
    assert ("custom_params" if "sampling_params" in body else "session_params") in answer.headers["Warning"]


def test_a_constraint_that_cannot_be_followed_is_refused_or_ends_the_stream(server: Live) -> None:
    sampling = {"max_new_tokens": 64, "temperature": 0}  # and two constraints: the library remembers one that failed
    status, _, message = refused(server, sampling_params={**sampling, "regex": "[ac-z ]{20,40}b{1000}{1000}"})
    assert status == 400
    assert "cannot be followed after" in message
    *made, error = streamed(server, sampling_params={**sampling, "regex": "[ac-z ]{20,41}b{1000}{1000}"})
    assert made[-1]["text"]
    assert error["error"]["type"] == "invalid_request_error"


def test_what_its_clients_ask_beside_it(server: Live) -> None:
    for path in ("/get_server_info", "/server_info"):
        info = server.ask("GET", path).json
        assert info["internal_states"][0]["kv_blocks"] > 0
        assert info["context_length"] == 1024
    assert server.ask("GET", "/model_info").json == server.ask("GET", "/get_model_info").json
    assert server.ask("GET", "/health_generate").status == 200


def test_flushing_the_cache_forgets_prompts_and_needs_the_operator(server: Live) -> None:
    text = "a prompt that no other test has asked the server to continue, long enough for a few blocks of the cache"

    def cached() -> int:
        return int(ask(server, text=text)["meta_info"]["cached_tokens"])

    cached()
    assert cached() > 0
    assert server.ask("POST", "/flush_cache", {"empty_cache": True}).status == 401
    assert cached() > 0
    assert server.ask("POST", "/flush_cache", headers={"Authorization": "Bearer admin-secret"}).status == 200
    assert cached() == 0
