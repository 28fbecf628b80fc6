"""Prompts beside decodes: a second Forward on a part of the multiprocessors computes prompts while the runner's steps
of decodes go on on the rest of them.

Decodes are bound by memory, prompts by arithmetic, so that both together take less time than one after the other, and
no decode waits for a prompt. The runner's tables of rows are shared: a prompt's row is nobody else's until a step has
joined it. Prompts follow each other on a stream of their own, so that the next ones may be given before the last ones
end.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from inlaid.config import ConfigError
from inlaid.engine.cuda_forward import ALL_ADAPTERS, ATTENTION_ADAPTERS, NO_ADAPTERS, QUERY_TILE, Forward, Layout
from inlaid.engine.request import Work
from inlaid.engine.scheduler import BESIDE_PROMPTS
from inlaid.kernels.auto import AutoPacked
from inlaid.kernels.division import Part, divide
from inlaid.kernels.exllama import ExllamaLinear
from inlaid.kernels.humming import HummingLinear
from inlaid.kernels.linear_triton import TritonLinear

if TYPE_CHECKING:
    from inlaid.engine.cuda_runner import CudaRunner, Ticket

log = logging.getLogger(__name__)

TOKENS = 256  # captured steps hold a multiple of so many
STAGES = 3  # of those under way, the scheduler has two at most
EARLY = 0.15  # of a decode step: so much sooner than prompts are expected to end they may be waited for
NEWEST = 0.3  # weight of the newest measurement in a running mean


@dataclass
class Prompts:
    """Prompts under way."""

    ticket: Ticket
    tokens: int
    begun: Any
    expected: float | None  # when they should be over


class Beside:
    """The part for prompts, and the graphs of decodes on the rest."""

    def __init__(self, runner: CudaRunner, share: float) -> None:
        self.runner = runner
        self.on_gpu = runner.device.type == "cuda"
        self.most_tokens = runner.config.scheduler.max_num_batched_tokens
        rows = min(BESIDE_PROMPTS, runner.max_rows)
        assert runner.adapters is not None
        self.forward = Forward(
            runner.model, runner.adapters.pages, self.most_tokens, rows, runner.max_blocks,
            runner.config.adapters.max_lora_rank, runner.device, runner.dtype, self._layout(self.most_tokens).size,
            beside=runner.forward,
        )  # fmt: skip
        self.part: Part | None = None
        self.rest: Part | None = None
        if self.on_gpu:
            self.part, self.rest = self._divided(share)
        self.graphs: dict[tuple[Layout, int], torch.cuda.CUDAGraph] = {}
        self._decodes: dict[tuple[Layout, int], torch.cuda.CUDAGraph] = {}
        self._staging = [runner.pinned(runner.meta_size) for _ in range(STAGES)]
        self._results = [runner.pinned(rows) for _ in range(STAGES)]
        self._num_submitted = 0
        self._under: deque[Prompts] = deque()
        self._seconds: dict[int, float] = {}  # that prompts of so many tokens take
        self._step_seconds = 0.0  # that a step of decodes takes meanwhile
        self._collected_at = 0.0

    def _divided(self, share: float) -> tuple[Part, Part]:
        config, device = self.runner.config, self.runner.device
        if config.enforce_eager:
            raise ConfigError("prompts_beside needs captured graphs: drop enforce_eager, or prompts_beside")
        if self.runner.arriving is not None:
            raise ConfigError(
                "prompts_beside goes with adapters that are loaded whole: choose adapter loading on-demand"
            )
        shared = sorted({b.name for b in self._backends() if isinstance(b, (TritonLinear, ExllamaLinear))})
        if shared:
            raise ConfigError(f"prompts_beside needs linear backend humming; {' and '.join(shared)} was chosen here")
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        try:
            return divide(device, max(8, round(share * sms)))
        except RuntimeError as error:
            raise ConfigError(f"prompts_beside: this GPU cannot be divided ({error}); drop prompts_beside") from error

    def _backends(self) -> set[Any]:
        found: set[Any] = set()
        for block in self.runner.model.blocks:
            for linear in (block.attention.qkv, block.attention.output, block.gate_up, block.down):
                for backend, packed in linear.parts:
                    choices = packed.choices if isinstance(packed, AutoPacked) else ((0, backend, packed),)
                    found.update(chosen for _, chosen, _ in choices)
        return found

    # Start-up.

    def _layout(self, tokens: int) -> Layout:
        rows = min(BESIDE_PROMPTS, self.runner.max_rows, tokens)
        return self.runner.exact_layout(tokens, 0, rows, rows, tokens // QUERY_TILE + rows)

    def _layouts(self) -> list[Layout]:
        sizes = range(TOKENS, self.most_tokens, TOKENS)
        return [self._layout(size) for size in (*sizes, self.most_tokens)]

    def warm(self) -> None:
        """Load every kernel, with blocks of each kind."""
        self.forward.cache = self.runner.forward.cache
        kinds, layouts = self.forward.kinds(), self._layouts()
        for level in (NO_ADAPTERS, ATTENTION_ADAPTERS, ALL_ADAPTERS):
            for layout in layouts if level == ALL_ADAPTERS else layouts[:1]:
                self.runner.idle_step(layout, level, kinds, self.forward)

    def capture(self, decodes: Sequence[Layout], progress: bool) -> None:
        """Graphs of prompts on their part, and of decodes on the rest."""
        assert self.part is not None
        assert self.rest is not None
        for part, forward, layouts, graphs in (
            (self.part, self.forward, self._layouts(), self.graphs),
            (self.rest, self.runner.forward, decodes, self._decodes),
        ):
            pool, side, forward.side = None, forward.side, part.side
            with self._apart(part.sms):
                for layout in tqdm(layouts[::-1], desc="capturing graphs", disable=not progress, delay=1, leave=False):
                    for level in (NO_ADAPTERS, ATTENTION_ADAPTERS, ALL_ADAPTERS):
                        graph = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graph, pool=pool, stream=part.stream):
                            forward.run(layout, level)
                        pool = pool or graph.pool()
                        graphs[layout, level] = graph
            forward.side = side
        log.info("prompts beside decodes: on %d and %d multiprocessors", self.part.sms, self.rest.sms)

    @contextmanager
    def _apart(self, sms: int) -> Iterator[None]:
        with ExitStack() as stack:
            for backend in self._backends():
                if isinstance(backend, HummingLinear):
                    stack.enter_context(backend.apart(sms))
            yield

    # Steps.

    def submit(self, works: Sequence[Work]) -> None:
        """Begin with these prompts as soon as what was submitted before is over."""
        runner = self.runner
        step = runner.lay_out(works, self._layout_for)
        stage = self._num_submitted % STAGES
        self._num_submitted += 1
        host, results = self._staging[stage], self._results[stage][: len(step.sampling)]
        runner.write(step, host.numpy())
        runner.tell_tables(step, host)
        with self._on(self.part):
            begun = self._event()
            self.forward.meta[: step.layout.size].copy_(host[: step.layout.size], non_blocking=True)
            graph = self.graphs.get((step.layout, step.adapters))
            if graph is not None:
                graph.replay()
            else:
                self.forward.run(step.layout, step.adapters)
            results.copy_(self.forward.sampled[: len(step.sampling)], non_blocking=True)
            done = self._event()
        tokens = step.layout.tokens
        ticket = runner.ticket(step, results, done)
        self._under.append(Prompts(ticket, tokens, begun, self._expected(tokens)))

    def replay(self, layout: Layout, level: int) -> bool:
        """A step of decodes on the rest of the device, if prompts are under way. False: not so, or none such was
        captured."""
        graph = self._decodes.get((layout, level)) if self._under else None
        if graph is not None:
            with self._on(self.rest):
                graph.replay()
            assert self.rest is not None
            torch.cuda.current_stream(self.runner.device).wait_stream(self.rest.stream)
        return graph is not None

    def join(self) -> Prompts:
        """What is submitted from here on comes after the prompts that are first."""
        first = self._under.popleft()
        if self.on_gpu:
            torch.cuda.current_stream(self.runner.device).wait_event(first.ticket.done)
        return first

    def drop(self, first: bool, last: bool) -> None:
        """Forget these prompts, whose step failed, once nothing is under way any more."""
        if self.on_gpu:
            torch.cuda.synchronize()
        if first and self._under:
            self._under.popleft()
        if last and self._under:
            self._under.pop()

    def due(self) -> bool:
        """Whether the first prompts will be over when the step that is submitted next is."""
        if not self._under:
            return False
        first = self._under[0]
        if first.ticket.done is None or first.ticket.done.query():
            return True
        return first.expected is not None and first.expected <= self._after(2.0 + EARLY)

    def note_step(self, seconds_from: float) -> None:
        """A step was collected, at this time."""
        if self._under and self._collected_at:
            seconds = seconds_from - self._collected_at
            known = self._step_seconds or seconds
            self._step_seconds = (1 - NEWEST) * known + NEWEST * seconds
        self._collected_at = seconds_from

    def _after(self, steps: float) -> float:
        """When so many steps will be over, counted from the one that was collected last."""
        return self._collected_at + steps * self._step_seconds

    def _expected(self, tokens: int) -> float | None:
        """When prompts that are given now should be over."""
        if not self._seconds:
            return None
        nearest = min(self._seconds, key=lambda known: abs(known - tokens))
        before = self._under[-1].expected if self._under else None
        begin = max(time.monotonic(), self._after(1.0), before or 0.0)
        return begin + self._seconds[nearest] * tokens / nearest

    def measured(self, prompts: Prompts) -> None:
        """They have been collected."""
        if self.on_gpu:
            seconds = prompts.begun.elapsed_time(prompts.ticket.done) / 1e3
            known = self._seconds.get(prompts.tokens, seconds)
            self._seconds[prompts.tokens] = (1 - NEWEST) * known + NEWEST * seconds

    def _layout_for(self, singles: Sequence[Work], prompts: Sequence[Work], samples: int) -> Layout:
        tokens = sum(work.num_tokens for work in prompts)
        assert not singles
        assert len(prompts) <= BESIDE_PROMPTS
        return self._layout(min(self.most_tokens, -(-tokens // TOKENS) * TOKENS))

    @contextmanager
    def _on(self, part: Part | None) -> Iterator[None]:
        """On the stream of a part, after what was submitted so far."""
        if part is None:
            yield
            return
        part.stream.wait_stream(torch.cuda.current_stream(self.runner.device))
        with torch.cuda.stream(part.stream):
            yield

    def _event(self) -> Any:
        if not self.on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
