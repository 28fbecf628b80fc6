"""A model divided among members gives the tokens of one that is whole: every family and format, adapters of any ranks,
every mode of the engine. The members are threads, of which two tests make processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from inlaid.adapters.adapter import Adapter
from inlaid.adapters.peft import lay_out
from inlaid.adapters.shard import divide
from inlaid.config import ConfigError, SpeculationConfig
from inlaid.engine.engine import Engine
from inlaid.engine.request import NewRequest
from inlaid.kernels.backend import MODULES
from inlaid.model.spec import ModelSpec
from inlaid.runner.following import FollowingRunner
from inlaid.worker.lead import MemberProcess
from inlaid.worker.loading import LoadedModel
from inlaid.worker.member import Member
from tests.oracle.oracle import FAMILIES, Answer, ask, family_config, load_engine, prompts, save_gptq, save_model, serve
from tests.worker.group_threads import MemberThread, members_of

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo" / "base"
RANKS = (1, 3, 5, 8, 17)
SHORT = ("llama-tied", "llama-bias", "mistral", "qwen2-sliding", "qwen3")  # families of short runs


def adapter(spec: ModelSpec, dtype: torch.dtype, seed: int) -> Adapter:
    """Return a random adapter of odd and mixed ranks, on some or all of the linears."""
    random = torch.Generator().manual_seed(seed)
    factors, scales = {}, {}
    for site in range(spec.num_sites):
        if seed % 3 == 0 or (site + seed) % 3:
            rank, (outputs, inputs) = RANKS[(site + seed) % len(RANKS)], spec.module_shape(MODULES[site % len(MODULES)])
            factors[site] = tuple(
                torch.randn(*shape, generator=random) * 0.15 for shape in ((rank, inputs), (outputs, rank))
            )
            scales[site] = 0.5 + site % 2
    return lay_out(f"adapter-{seed}", "", factors, scales, dtype, False)


def add_adapters(loaded: LoadedModel, count: int = 4) -> None:
    for seed in range(count):
        whole = adapter(loaded.spec, loaded.dtype, seed)
        lead = loaded.lead
        loaded.adapters.add(f"a{seed}", whole if lead is None else divide(whole, loaded.spec, lead.count))


def requests(count: int = 7, longest: int = 30, **params: Any) -> list[NewRequest]:
    """Return requests of the base and four adapters."""
    names = ["a0", None, "a1", "a2", "a3"]
    return [
        ask(f"r{index}", prompt, names[index % len(names)], **{"max_tokens": 6, **params})
        for index, prompt in enumerate(prompts(count, 1, longest))
    ]


@contextmanager
def group(model: Path, members: int, start: Any = MemberThread, timeout: float = 20.0, **changes: Any) -> Iterator[Any]:
    """Serve a model with members, with one also without others."""
    engine = {"tensor_parallel_size": members, "tensor_parallel_timeout": timeout, **changes.pop("engine", {})}
    made = load_engine(model, engine=engine, start_member=start, **changes)
    try:
        yield made
    finally:
        if made[1].lead is not None:
            made[1].lead.close()


def answers(
    model: Path, members: int, asked: list[list[NewRequest]], start: Any = MemberThread, **changes: Any
) -> list[Any]:
    with group(model, members, start, **changes) as (engine, loaded):
        add_adapters(loaded)
        found = [serve(engine, each) for each in asked]
        loaded.adapters.check()
        return found


def check_equal(one: list[dict[str, Answer]], many: list[dict[str, Answer]], mode: str = "") -> None:
    """Compare answers. 8-bit codes may round otherwise; members have more room for prefixes beside adapters."""
    atol = 0.05 if mode == "int8" else 1e-4
    for before, after in zip(one, many, strict=True):
        for name, answer in before.items():
            assert after[name].tokens == answer.tokens, name
            assert after[name].logprobs == pytest.approx(answer.logprobs, abs=atol)
            assert mode == "unified" or after[name].num_cached == answer.num_cached
            assert len(after[name].prompt_logprobs) == len(answer.prompt_logprobs)
            pairs = zip(after[name].prompt_logprobs, answer.prompt_logprobs, strict=True)
            assert all(got == want if want is None else got == pytest.approx(want, abs=1e-4) for got, want in pairs)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder, family_config("llama"))
    return folder


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in FAMILIES]
)
def test_every_family_gives_the_tokens_of_one(family: str, tmp_path: Path) -> None:
    """Two members, or four, which have copies of two key/value heads."""
    save_model(tmp_path, family_config(family))
    members = 4 if FAMILIES.index(family) % 3 == 0 else 2
    asked = [requests(prompt_logprobs=0)]
    check_equal(answers(tmp_path, 1, asked), answers(tmp_path, members, asked))


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, -1), (4, 32), (8, -1)])
def test_every_format_gives_the_tokens_of_one(bits: int, group_size: int, tmp_path: Path) -> None:
    config = family_config("llama-wide-heads")
    config.intermediate_size = 128
    save_model(tmp_path / "model", config)
    save_gptq(tmp_path / "gptq", tmp_path / "model", tmp_path / "judged", bits, group_size, False)
    asked = [requests(4)]
    check_equal(answers(tmp_path / "gptq", 1, asked), answers(tmp_path / "gptq", 2, asked))


MODES: dict[str, dict[str, Any]] = {
    "preempted": {"num_blocks": 24, "prefix": False, "max_loras": 2},
    "chunked": {"max_num_batched_tokens": 17, "engine": {"linear_backend": "reference"}},
    "cached": {"adapters": {"adapter_mode": "cached"}},
    "pipelined": {"max_loras": 2, "adapters": {"adapter_mode": "pipelined", "adapter_link_gbps": 0.05}},
    "unified": {"num_blocks": 90, "max_loras": 6, "max_model_len": 80, "cache": {"unified_memory": True}},
    "int8": {"cache": {"kv_cache_dtype": "int8"}},
    "speculation": {"engine": {"speculation": SpeculationConfig(speculation="ngram", num_speculative_tokens=3)}},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_tokens_of_one(llama: Path, mode: str) -> None:
    """Each prompt twice, so that prefixes are found again; draws and penalties beside greedy answers."""
    first = requests(6, max_tokens=10)
    drawn = [
        ask(
            f"d{index}",
            [*each.prompt, 3],
            each.adapter,
            8,
            temperature=0.9,
            top_p=0.9,
            seed=index,
            frequency_penalty=0.3,
        )
        for index, each in enumerate(first)
    ]
    one = answers(llama, 1, [first, drawn], **dict(MODES[mode]))
    check_equal(one, answers(llama, 2, [first, drawn], **dict(MODES[mode])), mode)


def test_answers_repeat_to_the_last_bit(llama: Path) -> None:
    asked = [requests(5)]
    runs = [answers(llama, 4, asked)[0] for _ in range(2)]
    assert {name: answer.logprobs for name, answer in runs[0].items()} == {
        name: answer.logprobs for name, answer in runs[1].items()
    }


def test_a_step_that_fails_on_a_member_is_run_again_on_all(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, failing = [requests(5)], [3, 4]  # these steps
    want = answers(llama, 1, asked)
    run, count = FollowingRunner.run, [0]

    def faulty(self: FollowingRunner, step: Any) -> None:
        count[0] += 1
        if count[0] in failing:
            raise RuntimeError("no memory")
        run(self, step)

    monkeypatch.setattr(FollowingRunner, "run", faulty)
    with group(llama, 2) as (engine, loaded):
        add_adapters(loaded)
        check_equal(want, [serve(engine, asked[0])])
        assert engine.num_failures == 1
        assert loaded.lead.fault() is None


def test_a_step_that_fails_on_the_lead_leaves_no_member_waiting(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [requests(5)]
    want = answers(llama, 1, asked)
    with group(llama, 4) as (engine, loaded):
        add_adapters(loaded)
        block = loaded.runner.model.blocks[1]
        activate, count = loaded.runner.model.kernels.ops.activate, [0]

        def faulty(*arguments: Any) -> torch.Tensor:
            count[0] += 1
            if count[0] == 4:
                raise RuntimeError("no memory")
            return activate(*arguments)

        monkeypatch.setattr(loaded.runner.model.kernels.ops, "activate", faulty)
        assert block.down.group is loaded.lead.group
        check_equal(want, [serve(engine, asked[0])])
        assert engine.num_failures == 1


def test_an_adapter_that_fails_on_a_member_is_refused_on_all(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = Member._show

    def faulty(self: Member, command: Any) -> None:
        if self._begin.index == 2 and failing:
            raise MemoryError("no room for an adapter")
        show(self, command)

    failing = True
    monkeypatch.setattr(Member, "_show", faulty)
    with group(llama, 4) as (engine, loaded):
        add_adapters(loaded)
        engine.add(ask("r", [5, 6, 7], "a1"))
        outputs = [output for _ in range(3) for output in engine.step()]
        assert "member 2 of the group: no room for an adapter" in outputs[-1].refusal.message
        serve(engine, [ask("base", [5, 6, 7])])  # members have done what came before a step when they compute it
        tables = [loaded.adapters.pages.table, *(member._loaded.pages.table for member in members_of(loaded))]
        assert not any(table.any() for table in tables)
        loaded.adapters.check()
        failing = False
        served = serve(engine, [ask("again", [5, 6, 7], "a1")])
        slots = {tuple(table[:, :, 2].sum(dim=1).tolist()) for table in tables}
        assert len(slots) == 1
    with group(llama, 1) as (engine, loaded):
        add_adapters(loaded)
        assert serve(engine, [ask("again", [5, 6, 7], "a1")])["again"].tokens == served["again"].tokens


def test_an_adapter_that_fails_in_mode_cached_is_refused_when_it_is_loaded(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(self: Member, command: Any) -> None:
        raise MemoryError("no room for an adapter")

    monkeypatch.setattr(Member, "_take", faulty)
    with group(llama, 2, adapters={"adapter_mode": "cached"}) as (_, loaded):
        with pytest.raises(ValueError, match="adapter 'a0': member 1 of the group: no room for an adapter"):
            add_adapters(loaded, 1)
        loaded.adapters.check()
        assert loaded.adapters.names() == []


def test_a_member_that_cannot_load_says_why(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(self: Member, command: Any) -> None:
        raise MemoryError("no room for the weights")

    monkeypatch.setattr(Member, "_load", faulty)
    with pytest.raises(RuntimeError, match="member 1 of the group: no room for the weights"), group(llama, 2):
        pass


def test_what_does_not_divide_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"size 3: its 4 heads do not divide by 3; this model can be divided by 1, 2"):
        load_engine(DEMO, engine={"tensor_parallel_size": 3})


def children() -> list[psutil.Process]:
    """Return the processes of members, by their numbers."""
    found = [each for each in psutil.Process().children() if "inlaid.worker.member" in each.cmdline()]
    return sorted(found, key=lambda each: each.cmdline()[-1])


def fails(engine: Engine, name: str) -> str:
    """Return why a request fails."""
    engine.add(ask(name, [5, 6, 7]))
    outputs = [output for _ in range(3) for output in engine.step()]
    assert outputs[-1].refusal is not None
    return outputs[-1].refusal.message


@pytest.mark.parametrize(
    ("members", "number", "reason"),
    [
        pytest.param(2, signal.SIGKILL, "member 1 of the group has ended (signal SIGKILL)", marks=pytest.mark.long),
        (4, signal.SIGSTOP, "member 1 of the group has not answered within 0.5 s"),
    ],
)
def test_processes_give_the_tokens_of_one_until_one_dies_or_hangs(
    llama: Path, members: int, number: signal.Signals, reason: str
) -> None:
    """Then every step fails at once, and neither a process nor memory is left."""
    asked = [requests(6, prompt_logprobs=1), requests(6)]
    before = set(os.listdir("/dev/shm"))
    with group(llama, members, MemberProcess) as (engine, loaded):
        add_adapters(loaded)
        found = [serve(engine, each) for each in asked]
        first, *others = children()
        assert len(others) == members - 2
        loaded.lead.group._seconds = loaded.lead._seconds = 0.5
        first.send_signal(number)
        assert reason in fails(engine, "first")
        assert loaded.lead.fault() == reason
        assert reason in fails(engine, "second")
        _, alive = psutil.wait_procs([first, *others], 20)
        assert not alive, "the members that are left are killed with it"
    assert children() == []
    assert set(os.listdir("/dev/shm")) <= before
    check_equal(answers(llama, 1, asked), found)
