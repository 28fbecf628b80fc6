"""Two predictors of answer lengths on the same data: a learned encoder, as LoRA-Inlaid has one, and inlaid's own.

The paper's is a separate model of 255 MB (an encoder of some 66 million parameters) that takes 16 ms of a CPU for each
request. Its weights and data are not public, and none of its size can be trained on a CPU, so an encoder of the same
kind and of 2 layers is trained here on pairs of prompt and length, before anything is served. inlaid's is a sparse
linear model (`inlaid/engine/predictor.py`) that learns while it serves.

The data are the demo's twelve tasks: it trains on train.jsonl and calibration.jsonl and predicts eval.jsonl; lengths
are of the answers there, in the demo's tokens. Where the prompts hold no text (the suite tasks-100) the model is
replaced by the best that any could be: the mean of ten times as many answers of the same task.

    python -m perf.scheduling.predictors --out perf/results
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from inlaid.engine.account import Account
from inlaid.engine.policy import Lengths
from inlaid.engine.predictor import Oracle, Predictor
from inlaid.engine.request import FinishReason, NewRequest, Request, SamplingParams
from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.report.provenance import provenance
from inlaid.report.tables import markdown
from inlaid.sim.experiment import draw_trace, prepare
from inlaid.sim.metrics import summarize
from inlaid.sim.request_log import Arrival
from inlaid.sim.simulate import Setup, simulate
from inlaid.workload.plan import rescale_rate
from inlaid.workload.prompts import TokenizerFile
from inlaid.workload.suites import load_suite

ROOT = Path(__file__).resolve().parents[2]
LAYERS, WIDTH, HEADS, MOST = 2, 128, 4, 192  # of the encoder; its prompts end at so many tokens
PAPER = (6, 768, 12)  # layers, width and heads of an encoder of 66 million parameters
SECONDS, SLO_S, SEATS = 120.0, 6.0, 24


@dataclass(frozen=True)
class Example:
    """A prompt of a task, and how many tokens its answer has."""

    task: str
    prompt: tuple[int, ...]
    length: int


def read_examples(files: Sequence[str], root: Path = ROOT) -> list[Example]:
    """Read the demo's splits, in the demo's tokens."""
    tokens = TokenizerFile(str(root / "models" / "demo" / "base"))
    found = []
    for file in files:
        for path in sorted((root / "data").glob(f"*/{file}")):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                length = len(tokens.encode(row["completion"], False)) + 1
                found.append(Example(row["task"], tuple(tokens.encode(row["prompt"], True)), length))
    return found


class Encoder(nn.Module):
    """A bidirectional transformer that reads task and prompt and returns the guess of log(length)."""

    def __init__(self, vocabulary: int, layers: int = LAYERS, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width, padding_idx=0), nn.Embedding(MOST, width)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        there = ids != 0
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        x = self.body(x, src_key_padding_mask=~there) * there[:, :, None]
        pooled: torch.Tensor = x.sum(1) / there.sum(1, keepdim=True)
        guesses: torch.Tensor = self.head(pooled)[:, 0]
        return guesses


class Model:
    """The learned model, trained once: a Lengths whose guess does not change while it serves."""

    def __init__(self, examples: Sequence[Example], epochs: int) -> None:
        torch.manual_seed(0)
        self._tasks = {task: number for number, task in enumerate(sorted({e.task for e in examples}))}
        self._first = 1 + max(max(e.prompt) for e in examples)
        self._encoder = Encoder(1 + self._first + len(self._tasks))
        self._mean = statistics.fmean(math.log(e.length) for e in examples)
        self._train(list(examples), epochs)
        self.parameters = sum(p.numel() for p in self._encoder.parameters())
        self._kept: dict[tuple[int, ...], float] = {}

    def _ids(self, task: str, prompt: Sequence[int]) -> list[int]:
        return [1 + self._first + self._tasks[task], *(1 + token for token in prompt[-(MOST - 1) :])]

    def _train(self, examples: list[Example], epochs: int) -> None:
        order, size = random.Random(0), 64
        optimizer = torch.optim.AdamW(self._encoder.parameters(), 1e-3)
        steps = epochs * -(-len(examples) // size)
        pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
        for _ in range(epochs):
            order.shuffle(examples)
            batches = [examples[i : i + size] for i in range(0, len(examples), size)]
            for batch in Bar(batches, desc="training", leave=False):
                wanted = torch.tensor([math.log(e.length) - self._mean for e in batch])
                loss = nn.functional.smooth_l1_loss(
                    self._encoder(_padded(self._ids(e.task, e.prompt) for e in batch)), wanted
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                pace.step()
        self._encoder.eval()

    def guess(self, task: str, prompt: Sequence[int]) -> float:
        """Return the expected length."""
        key = tuple(self._ids(task, prompt))
        if key not in self._kept:
            with torch.inference_mode():
                self._kept[key] = math.exp(self._mean + float(self._encoder(_padded([key]))[0]))
        return self._kept[key]

    def remaining(self, request: Request) -> float:
        return max(1.0, self.guess(request.adapter_name or "", request.prompt) - request.num_outputs)

    def observe(self, request: Request) -> None:
        """Do nothing: it is not trained while it serves."""


class TaskMeans:
    """The mean length of a task's answers, as a Lengths."""

    def __init__(self, lengths: Mapping[str, Sequence[int]]) -> None:
        self._means = {task: statistics.fmean(own) for task, own in lengths.items()}
        self._any = statistics.fmean(self._means.values())

    def remaining(self, request: Request) -> float:
        return max(1.0, self._means.get(request.adapter_name or "", self._any) - request.num_outputs)

    def observe(self, request: Request) -> None:
        """Do nothing: it knows the past as a whole."""


def _padded(rows: Any) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def as_request(example: Example, number: int) -> Request:
    return Request(
        id=str(number), prompt=list(example.prompt), params=SamplingParams(), adapter=example.task,
        adapter_name=example.task, account=Account("", 0), arrival=0.0, limit=len(example.prompt) + 1024,
        tokens=list(example.prompt),
    )  # fmt: skip


def taught(examples: Sequence[Example]) -> Predictor:
    """Return inlaid's predictor after these answers, in a random order."""
    predictor, order = Predictor(), list(examples)
    random.Random(0).shuffle(order)
    for number, example in enumerate(order):
        _tell(predictor, as_request(example, number), example.length)
    return predictor


def _tell(predictor: Lengths, request: Request, length: int) -> None:
    predictor.remaining(request)
    request.tokens += [0] * length
    request.finish_reason = FinishReason.STOP
    predictor.observe(request)


def errors(guesses: Sequence[float], examples: Sequence[Example], seconds: float) -> dict[str, float]:
    """Compare guesses with lengths: the error in tokens and as a factor, and the share of pairs in the right order."""
    off = [abs(guess - e.length) for guess, e in zip(guesses, examples)]
    factor = [abs(math.log(guess / e.length)) for guess, e in zip(guesses, examples)]
    rng, right, right_within, pairs, pairs_within = random.Random(1), 0.0, 0.0, 0, 0
    by_task: dict[str, list[int]] = defaultdict(list)
    for number, e in enumerate(examples):
        by_task[e.task].append(number)
    for _ in range(40_000):
        first = rng.randrange(len(examples))
        for second, within in (
            (rng.randrange(len(examples)), False),
            (rng.choice(by_task[examples[first].task]), True),
        ):
            longer = examples[first].length - examples[second].length
            if longer:
                guessed = guesses[first] - guesses[second]
                score = 0.5 if guessed == 0 else float(guessed * longer > 0)
                right, pairs = (right, pairs) if within else (right + score, pairs + 1)
                right_within, pairs_within = (
                    (right_within + score, pairs_within + 1) if within else (right_within, pairs_within)
                )
    return {
        "mean_error_tokens": statistics.fmean(off),
        "mean_error_factor": math.exp(statistics.fmean(factor)),
        "pairs_in_order": right / pairs,
        "pairs_in_order_within_a_task": right_within / pairs_within,
        "ms_per_request": 1e3 * seconds / len(examples),
    }


def compare_errors(model: Model, train: Sequence[Example], test: Sequence[Example]) -> list[dict[str, Any]]:
    """Make a row of errors for each predictor."""
    means = defaultdict(list)
    for e in train:
        means[e.task].append(e.length)
    ways: list[tuple[str, Lengths, bool]] = [
        ("a task's mean", TaskMeans(means), False),
        ("inlaid's, taught before", taught(train), False),
        ("inlaid's, learning while it serves", Predictor(), True),
        ("learned encoder", model, False),
    ]
    rows = []
    for name, lengths, learning in ways:
        requests = [as_request(e, number) for number, e in enumerate(test)]
        order = list(range(len(test)))
        random.Random(2).shuffle(order)
        guesses, spent = [0.0] * len(test), 0.0
        for number in order:
            began = time.thread_time()
            guesses[number] = lengths.remaining(requests[number])
            spent += time.thread_time() - began
            if learning:
                _tell(lengths, requests[number], test[number].length)
        rows.append({"predictor": name, **errors(guesses, test, spent)})
    return rows


def milliseconds_of_the_papers_size(vocabulary: int = 30_000, repeats: int = 5) -> dict[str, float]:
    """Time an encoder of the paper's size on one thread, for one prompt of 128 tokens."""
    encoder = Encoder(vocabulary, *PAPER).eval()
    ids = torch.randint(1, vocabulary, (1, 128))
    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            began = time.thread_time()
            encoder(ids)
            times.append(time.thread_time() - began)
    return {"parameters": float(sum(p.numel() for p in encoder.parameters())), "ms": 1e3 * min(times)}


def always(lengths: Lengths) -> Callable[[], Lengths]:
    return lambda: lengths


def demo_trace(test: Sequence[Example], rate: float, seed: int) -> list[Arrival]:
    """Draw requests for the demo's tasks: Poisson arrivals, each with a prompt of eval.jsonl."""
    rng, now, arrivals = random.Random(seed), 0.0, list[Arrival]()
    while (now := now + rng.expovariate(rate)) < SECONDS:
        e = rng.choice(test)
        new = NewRequest(
            id=str(len(arrivals)), prompt=list(e.prompt), params=SamplingParams(max_tokens=256), adapter=e.task,
            tenant=e.task, deadline=now + SLO_S, true_output_len=e.length,
        )  # fmt: skip
        arrivals.append(Arrival(now, new))
    return arrivals


def schedule_rows(
    name: str, traces: Sequence[list[Arrival]], setup: Setup, seconds: float, ways: Mapping[str, Callable[[], Lengths]]
) -> list[dict[str, Any]]:
    """Simulate `inlaid` with each predictor, and fcfs, over some traces; return the means."""
    kept = ("slo_attainment", "mean_latency", "mean_ttft", "p99_ttft", "max_ttft")
    rows = []
    for way, make in {"fcfs": Oracle, **ways}.items():
        policy = "fcfs" if way == "fcfs" else "inlaid"
        found = [
            summarize(simulate(trace, replace(setup, policy=policy, lengths=make)), seconds, None, {})
            for trace in traces
        ]
        rows.append({"trace": name, "lengths": way, **{k: statistics.fmean(f[k] for f in found) for k in kept}})
    return rows


def compare_scheduling(
    model: Model, train: Sequence[Example], test: Sequence[Example], seeds: int
) -> list[dict[str, Any]]:
    """Make rows of attainment and latency for both sorts of traffic."""
    base = prepare(load_suite("tasks-100")).setup
    demo = replace(base, scheduler={"max_num_seqs": SEATS}, ranks={}, resident=tuple(sorted({e.task for e in test})))
    burst = [Arrival(0.0, arrival.request) for arrival in demo_trace(test, 5.0, 7)]
    capacity = len(burst) / simulate(burst, replace(demo, policy="fcfs")).end
    traces = [demo_trace(test, 1.1 * capacity, seed) for seed in range(seeds)]
    ways: dict[str, Callable[[], Lengths]] = {
        "inlaid's": Predictor,
        "inlaid's, taught before": lambda: taught(train),
        "learned encoder": always(model),
        "oracle": Oracle,
    }
    rows = schedule_rows("the demo's tasks", traces, demo, SECONDS, ways)
    rows = [{**row, "rate": 1.1 * capacity} for row in rows]
    for rate in (6.5, 7.0):
        suite = rescale_rate(load_suite("tasks-100"), rate)
        for seed in range(42, 42 + seeds):
            experiment = prepare(suite, seed)
            means = defaultdict(list)
            longer = msgspec.structs.replace(suite, seed=seed, duration_s=10.0 * experiment.duration)
            for arrival in draw_trace(longer):
                means[arrival.request.adapter or ""].append(arrival.request.true_output_len or 0)
            best = TaskMeans(means)
            ways = {"inlaid's": Predictor, "best that a model could be": always(best), "oracle": Oracle}
            found = schedule_rows("tasks-100", [experiment.trace], experiment.setup, experiment.duration, ways)
            rows += [{**row, "rate": rate, "seed": seed} for row in found]
    return rows


def _report(made: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    keys = ("slo_attainment", "mean_latency", "mean_ttft", "p99_ttft")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in record["scheduling"]:
        groups[row["trace"], f"{row['rate']:.1f}", row["lengths"]].append(row)
    lines = []
    for group, rows in groups.items():
        share, *seconds = (statistics.fmean(row[key] for row in rows) for key in keys)
        lines.append([*group, f"{share:.1%}", *(f"{value:.1f}" for value in seconds)])
    head = ("predictor", "tokens off", "factor off", "pairs in order", "within a task", "ms a request")
    cells = [
        [
            row["predictor"], f"{row['mean_error_tokens']:.1f}", f"{row['mean_error_factor']:.3f}",
            f"{row['pairs_in_order']:.1%}", f"{row['pairs_in_order_within_a_task']:.1%}",
            f"{row['ms_per_request']:.3f}",
        ]
        for row in record["errors"]
    ]  # fmt: skip
    size = record["papers_size"]
    parts = [
        "# Predictors of answer lengths\n",
        f"Made by `{made['command']}` at {made['commit']}. The learned encoder has {record['parameters'] / 1e6:.1f} "
        f"million parameters and was trained for {record['train_s']:.0f} s of one core; one of the paper's size "
        f"({size['parameters'] / 1e6:.0f} million) takes {size['ms']:.0f} ms of it for a prompt of 128 tokens.\n",
        f"## Error on {record['num_test']:,} prompts of the demo's tasks, after {record['num_train']:,} others\n",
        markdown(head, cells, "lrrrrr"),
        "\n## Scheduling by them (simulated, A10G profile)\n",
        "On `tasks-100` prompts hold no text: the best that a model could be is the mean of its task's answers.\n",
        markdown(("trace", "req/s", "lengths", "SLO", "mean latency s", "mean TTFT s", "p99 TTFT s"), lines, "lrlrrrr"),
    ]
    return "\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for sim-predictors.json and .md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    train, test = read_examples(("train.jsonl", "calibration.jsonl")), read_examples(("eval.jsonl",))
    began = time.thread_time()
    model = Model(train, args.epochs)
    record = {
        "train_s": time.thread_time() - began,
        "parameters": model.parameters,
        "papers_size": milliseconds_of_the_papers_size(),
        "num_train": len(train),
        "num_test": len(test),
        "errors": compare_errors(model, train, test),
        "scheduling": compare_scheduling(model, train, test, args.seeds),
    }
    made = provenance(seed=0)
    (args.out / "sim-predictors.json").write_text(json.dumps({**made, **record}, indent=1) + "\n")
    (args.out / "sim-predictors.md").write_text(_report(made, record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
