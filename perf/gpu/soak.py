"""Soak the engine on the bundled demo: random arrivals, lengths, temperatures, aborts, adapters that come and go.

Afterwards nothing may have leaked (blocks, rows, adapter pages, host memory), and answers must be those of the same
requests run alone. A stage of bench.py; runs on a CPU too.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from inlaid.engine.engine import Engine
from inlaid.engine.request import FinishReason, NewRequest, SamplingParams
from inlaid.layers import sampler
from inlaid.worker.build import Loaded, build_engine
from perf.gpu.demo import ADAPTERS, MODEL, questions

CHECKED = 150  # answers compared with the same request run alone


@dataclass
class Seen:
    """A request, its answer so far, and how it ended."""

    request: NewRequest
    tokens: list[int] = field(default_factory=list)
    reason: FinishReason | None = None


def load(device: str) -> Loaded:
    names = sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir())
    config = EngineConfig(
        model=str(MODEL),
        device=device,
        max_model_len=256,
        cache=CacheConfig(num_blocks=50),  # tight, so that requests are preempted
        adapters=AdapterConfig(max_loras=5, max_lora_rank=16),  # fewer places than adapters
        scheduler=SchedulerConfig(max_num_seqs=48, max_num_batched_tokens=512),
    )
    return build_engine(config, {name: str(ADAPTERS / name) for name in names})


def disturb(loaded: Loaded, seconds: float, gone: set[str], generator: random.Random) -> dict[str, Seen]:
    """Serve random traffic for `seconds`, then let every request end; return the requests by id."""
    engine, prompts = loaded.engine, questions()
    names = sorted({adapter for _, adapter, _ in prompts})
    seen: dict[str, Seen] = {}
    live: list[str] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or engine.has_work:
        arriving = time.monotonic() < end and len(live) < 120
        for _ in range(generator.choice((0, 0, 1, 2, 8)) if arriving else 0):
            request = _random_request(len(seen), prompts, gone, generator)
            engine.add(request)
            seen[request.id] = Seen(request)
            live.append(request.id)
        if live and generator.random() < 0.05:
            engine.abort(generator.choice(live))
        if generator.random() < 0.02:
            _come_or_go(loaded, names, gone, generator)
        for output in engine.step():
            one = seen[output.id]
            one.tokens += output.tokens
            if output.finish_reason is not None:
                one.reason = output.finish_reason
                live.remove(output.id)
    return seen


def _random_request(
    number: int, prompts: list[tuple[str, str, list[int]]], gone: set[str], generator: random.Random
) -> NewRequest:
    _, adapter, ids = generator.choice(prompts)
    ids = ids[:200]
    draws = generator.random() < 0.3
    params = SamplingParams(
        max_tokens=generator.choice((1, 4, 16, 48)),
        temperature=0.8 if draws else 0.0,
        top_p=0.9 if draws else 1.0,
        seed=number,
        ignore_eos=generator.random() < 0.5,
    )
    chosen = None if adapter in gone or generator.random() < 0.2 else adapter
    return NewRequest(
        id=f"r{number}", prompt=ids[: generator.randrange(1, len(ids) + 1)], params=params, adapter=chosen
    )


def _come_or_go(loaded: Loaded, names: list[str], gone: set[str], generator: random.Random) -> None:
    name = generator.choice(names)
    if name in gone:
        loaded.adapters.install(name, loaded.adapters.read(str(ADAPTERS / name)), False, 0.0)
        gone.discard(name)
    else:
        loaded.adapters.remove(name)
        gone.add(name)


def alone(engine: Engine, request: NewRequest) -> list[int]:
    """Return the answer to a request that runs with no other beside it."""
    engine.add(msgspec.structs.replace(request, id="alone-" + request.id))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.tokens
    return tokens


def difference(engine: Engine, seen: Seen) -> dict[str, Any] | None:
    """Return where an answer first differs from the request's answer alone, and the lead there; None if nowhere."""
    request, tokens = seen.request, alone(engine, seen.request)
    if tokens == seen.tokens:
        return None
    at = next((i for i, (a, b) in enumerate(zip(tokens, seen.tokens, strict=False)) if a != b), None)
    found = {
        "id": request.id, "temperature": request.params.temperature, "at": at, "tokens": [len(tokens), len(seen.tokens)]
    }  # fmt: skip
    return found if at is None else found | lead(engine, request, tokens, at, seen.tokens[at])


def lead(engine: Engine, request: NewRequest, tokens: Sequence[int], at: int, other: int) -> dict[str, Any]:
    """Return by how much the token at a place of an answer led another one.

    `lead`: the difference of their scores, noise of drawn tokens included: logits would have to change by as much for
    the other to be chosen. `past_top_p`: where top_p leaves the other out, the probability by which it comes too late.
    `explained`: the token recomputed here from the model's probabilities is the one that was chosen."""
    params = request.params
    size: int = engine.runner.model.spec.vocab_size  # type: ignore[attr-defined]
    logprobs_1V = torch.full((1, size), -torch.inf)
    told = _logprobs(engine, request, msgspec.structs.replace(params, logprobs=size))[at].top
    logprobs_1V[0, [token for token, _ in told]] = torch.tensor([value for _, value in told])
    if params.greedy:
        scores_V, kept_V, heat = logprobs_1V[0], torch.ones(size, dtype=torch.bool), 1.0
    else:
        heat = params.temperature
        cut = sampler.Truncation(
            *(torch.tensor([value]) for value in (0, max(0, params.top_k), params.top_p, params.min_p))
        )
        kept_V = sampler._truncate(logprobs_1V / heat, cut)[0] > -torch.inf
        key, position = sampler.seed_key(params.seed or 0), len(request.prompt) + at
        scores_V = (logprobs_1V / heat + sampler.gumbel(torch.tensor([key]), torch.tensor([position]), size))[0]
    best = int(scores_V.masked_fill(~kept_V, -torch.inf).argmax())
    found = {"lead": round(float(scores_V[tokens[at]] - scores_V[other]) * heat, 4), "explained": best == tokens[at]}
    if not kept_V[other]:
        probabilities_V = (logprobs_1V[0] / heat).softmax(-1)
        before = float(probabilities_V[probabilities_V > probabilities_V[other]].sum())
        found["past_top_p"] = round(before - params.top_p, 4)
    return found


def _logprobs(engine: Engine, request: NewRequest, params: SamplingParams) -> list[Any]:
    engine.add(msgspec.structs.replace(request, id="again-" + request.id, params=params))
    found: list[Any] = []
    while engine.has_work:
        for output in engine.step():
            found += output.logprobs or []
    return found


def left_over(loaded: Loaded) -> dict[str, int]:
    """Return the counts of what an idle engine still holds; all must be zero."""
    engine = loaded.engine
    engine.step()
    engine.scheduler.check_whole()
    pool = engine.scheduler.pool
    runner: Any = engine.runner
    runner.adapters.check()
    ended = set(engine.scheduler.endings.released)  # since the last step; the next one tells the runner
    return {
        "kv_blocks": pool.capacity - pool.num_available,
        "requests": len(engine.scheduler.requests),
        "adapter_requests": sum(int(runner.adapters.references(info.identity)) for info in loaded.adapters.list()),
        "noise_keys": len(set(runner.sampling.keys) - ended),
        "rows": len(set(runner.rows.of if hasattr(runner, "rows") else ()) - ended),
    }


def run(seconds: float = 40.0, device: str | None = None) -> dict[str, Any]:
    """Soak in two halves, so that memory after the first can be compared with memory after the second."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded, generator = load(device), random.Random(0)
    memory: list[int] = []
    seen: dict[str, Seen] = {}
    gone: set[str] = set()
    for half in range(2):
        traffic = disturb(loaded, seconds / 2, gone, generator)
        seen |= {f"{half}-{name}": one for name, one in traffic.items()}
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    for name in sorted(gone):
        loaded.adapters.install(name, loaded.adapters.read(str(ADAPTERS / name)), False, 0.0)
    finished = [one for one in seen.values() if one.reason in (FinishReason.STOP, FinishReason.LENGTH)]
    checked = generator.sample(finished, min(CHECKED, len(finished)))
    different = [found for one in checked if (found := difference(loaded.engine, one)) is not None]
    reasons = [one.reason.value if one.reason else "none" for one in seen.values()]
    report = {
        "device": device,
        "requests": len(seen),
        "ended": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "output_tokens": sum(len(one.tokens) for one in seen.values()),
        "preemptions": loaded.engine.scheduler.num_preemptions,
        "failed_steps": loaded.engine.num_failures,
        "left_over": left_over(loaded),
        "peak_memory_mib": memory,
        "checked_alone": len(checked),
        "different_alone": different,
    }
    print(report, flush=True)
    return report
