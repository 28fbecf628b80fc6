"""The steps that the persistent decode kernel runs, and what is said when it cannot. Its values are tested in
tests/kernels/test_decode.py."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from inlaid.config import ConfigError, EngineConfig
from inlaid.kernels import library
from inlaid.kernels.backend import AdapterPages
from inlaid.kernels.decode import DecodeKernel, DecodeShape
from inlaid.model.spec import spec_from_config
from inlaid.runner import decode
from inlaid.runner.device_step import DeviceStep
from inlaid.runner.layout import Layouts
from inlaid.worker.loading import choose_kernels

LLAMA = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1,
    "num_attention_heads": 32,
}  # fmt: skip
PAGES = AdapterPages(torch.zeros(1).half(), torch.zeros(1, 7, 3), torch.zeros(1, 7), [0])


class FakeKernel:
    """A kernel that notes the steps it runs."""

    longest: ClassVar[dict[int, int]] = {1: 8, 2: 4, 4: 2}

    def __init__(self) -> None:
        self.ran: list[int] = []

    def run(self, step: Any, product_TD: torch.Tensor, residual_TD: torch.Tensor) -> None:
        self.ran.append(product_TD.shape[0])


@pytest.fixture
def step() -> Any:
    """Return a device step whose transformer counts its forward passes."""
    made: Any = object.__new__(DeviceStep)
    made.layers = 0

    def forward(*args: Any) -> None:
        made.layers += 1

    made.model = SimpleNamespace(spec=SimpleNamespace(hidden_size=8), forward=forward)
    made.workspace = SimpleNamespace(take=lambda name, *shape: torch.zeros(*shape))
    made.cache, made.decode = [], FakeKernel()
    return made


def test_small_steps_of_decodes_are_one_kernel(step: Any) -> None:
    layouts, context = Layouts(64, 8, 4), SimpleNamespace(arriving=None, vocabulary=None)
    for count in (1, 2, 4, 8):
        step.forward(layouts.decodes(count), context)
    step.forward(layouts.prompts(64), context)
    assert step.decode.ran == [1, 2, 4]
    assert step.layers == 2


def decode_of(position: int) -> Any:
    return SimpleNamespace(start=position, num_tokens=1)


def test_a_step_with_a_long_context_runs_by_layers(step: Any) -> None:
    """Each number of rows has its own limit, and a graph of either way is captured."""
    layouts, context = Layouts(64, 8, 4, longest=FakeKernel.longest), SimpleNamespace(arriving=None, vocabulary=None)
    for positions, ran in (((7,), [1]), ((8,), []), ((1, 3), [2]), ((4, 1), []), ((1, 1, 1), [4]), ((0, 2, 0), [])):
        step.decode.ran.clear()
        layout = layouts.choose([decode_of(position) for position in positions], [], len(positions), True)
        assert layout in layouts.captured()
        step.forward(layout, context)
        assert step.decode.ran == ran, positions
    long = [layout.decodes for layout in layouts.captured() if layout.is_long]
    assert long == [1, 2, 4]
    drafts = Layouts(64, 8, 4, 4, FakeKernel.longest)
    for position, ran in ((1, [4]), (2, [])):
        step.decode.ran.clear()
        works = [SimpleNamespace(start=position, num_tokens=4, draft=(1, 2, 3))]
        layout = drafts.choose_drafts(works, 4, True)
        assert layout in drafts.captured()
        step.forward(layout, context)
        assert step.decode.ran == ran, "guesses count as rows"
    assert layouts.choose([decode_of(9)], [], 1, captured=False).is_long
    assert not layouts.choose([decode_of(9)] * 8, [], 8, True).is_long, "eight rows have one way"
    assert not any(layout.is_long for layout in Layouts(64, 8, 4).captured())


def test_auto_takes_no_more_than_its_share_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**33))
    monkeypatch.setattr(DecodeKernel, "num_bytes", 2**30)
    monkeypatch.setattr(DecodeKernel, "finish", lambda self: self.refusal)
    caplog.set_level("INFO")
    spec = spec_from_config(LLAMA)
    for choice, served in (("auto", False), ("one", True)):
        kernel = DecodeKernel(DecodeShape(4096, 11008, 32, 32, 1, 16, 132, 16), 128, PAGES)
        model: Any = SimpleNamespace(kernels=SimpleNamespace(decode=kernel), spec=spec)
        assert (decode.finish_decode(model, EngineConfig(decode_kernel=choice), 100) is kernel) == served
    assert "would take 1.00 GiB, more than 5% of the device's memory" in caplog.text


def test_steps_run_by_layers_without_a_kernel_or_with_adapters_on_their_way(step: Any) -> None:
    layout = Layouts(64, 8, 4).decodes(1)
    step.forward(layout, SimpleNamespace(arriving=object(), vocabulary=None))
    step.decode = None
    step.forward(layout, SimpleNamespace(arriving=None, vocabulary=None))
    assert step.layers == 2


def test_a_model_that_is_refused_falls_to_layers_or_is_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "nvcc", lambda: None)
    caplog.set_level("INFO")
    spec = spec_from_config(LLAMA)
    kernel = DecodeKernel(DecodeShape(4096, 11008, 32, 32, 1, 16, 132, 16), 128, PAGES)
    model: Any = SimpleNamespace(kernels=SimpleNamespace(decode=kernel), spec=spec)
    assert decode.finish_decode(model, EngineConfig(), 100) is None
    assert "does not serve this model: nvcc" in caplog.text
    with pytest.raises(ConfigError, match=r"does not serve this model: nvcc.*use auto or layers"):
        decode.finish_decode(model, EngineConfig(decode_kernel="one"), 100)


def test_a_linear_backend_that_is_named_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that was measured, and only there, auto means one kernel, unless linears have a backend by name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    pages: Any = SimpleNamespace(pool=SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16))
    spec = spec_from_config(LLAMA)
    auto = EngineConfig(decode_kernel="auto")
    assert decode.make_decode(auto, spec, pages) is not None
    assert decode.make_decode(replace(auto, linear_backend="exllama"), spec, pages) is None
    assert decode.make_decode(EngineConfig(linear_backend="exllama", decode_kernel="one"), spec, pages) is not None
    assert decode.make_decode(EngineConfig(decode_kernel="layers"), spec, pages) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert decode.make_decode(auto, spec, pages) is None


def test_windows_shorter_than_the_context_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "nvcc", lambda: "nvcc")
    spec = spec_from_config({**LLAMA, "model_type": "mistral", "sliding_window": 64})
    kernel = DecodeKernel(DecodeShape(4096, 11008, 32, 32, 1, 16, 132, 16), 128, PAGES)
    model: Any = SimpleNamespace(kernels=SimpleNamespace(decode=kernel), spec=spec)
    with pytest.raises(ConfigError, match="reads whole contexts, not windows"):
        decode.finish_decode(model, EngineConfig(decode_kernel="one"), 100)


def test_on_a_cpu_there_is_none() -> None:
    spec = spec_from_config(LLAMA)
    assert decode.make_decode(EngineConfig(), spec, PAGES) is None
    pages = AdapterPages(torch.zeros(1), torch.zeros(1, 7, 3, dtype=torch.int64), torch.zeros(1, 7), [0])
    assert choose_kernels(EngineConfig(), torch.device("cpu"), pages, spec).decode is None
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        choose_kernels(EngineConfig(decode_kernel="one"), torch.device("cpu"), PAGES, spec)
