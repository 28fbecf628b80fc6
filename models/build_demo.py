"""Rebuilds the bundled demo from its seed: tokenizer, data, base model, twelve adapters, and the table.

    python -m models.build_demo                      everything, on one GPU, in minutes
    python -m models.build_demo --stages adapters table   keep the base, train the adapters again
    python -m models.build_demo --tiny --output /tmp/demo   a smoke run of every stage on a CPU, in seconds

Seeds fix the data and the initial weights; GPU arithmetic is not bit-exact from run to run, so weights and
scores of a rebuild differ slightly from the committed ones. Data files, which have no arithmetic, never differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import multiprocessing
import sys
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from data import generate
from data.tasks import TASKS
from inlaid.flags import Parser
from models import corpus, demo_table, measure, spread, training
from models.plan import TINY, BuildPlan

DEMO = Path(__file__).parent / "demo"
STAGES = ("data", "tokenizer", "base", "adapters", "table")
log = logging.getLogger("build_demo")


@dataclasses.dataclass(frozen=True)
class Build:
    """The folder, the plan and the device of one build."""

    plan: BuildPlan
    output: Path
    device: torch.device
    seed: int
    num_workers: int

    @property
    def base(self) -> Path:
        return self.output / "base"

    @property
    def adapters(self) -> Path:
        return self.output / "adapters"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        made: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(self.base)
        return made

    def model(self) -> LlamaForCausalLM:
        return on(self.device, LlamaForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval())


def on(device: torch.device, model: Any) -> LlamaForCausalLM:
    moved: LlamaForCausalLM = model.to(device)
    return moved


def build_data(build: Build) -> None:
    """Write the committed splits; a build elsewhere than models/demo leaves them alone and only compares."""
    if build.output == DEMO:
        generate.write(generate.FOLDER)
    elif changed := generate.differences(generate.FOLDER, generate.all_files()):
        raise ValueError(f"data/ is not what its generators give ({', '.join(changed)}): run python -m data.generate")


def build_tokenizer(build: Build) -> None:
    corpus.save_tokenizer(corpus.train_tokenizer(build.plan), build.base)


def build_base(build: Build) -> None:
    tokenizer = build.tokenizer()
    ids_RS, labels_RS = corpus.base_rows(tokenizer, build.plan, build.num_workers)
    log.info("pretraining text: %.1f million tokens", ids_RS.numel() / 1e6)
    torch.manual_seed(build.seed)
    token_ids = {token: tokenizer.get_vocab()[token] for token in corpus.SPECIAL}
    model = on(build.device, training.new_model(build.plan, token_ids))
    log.info("base model: %.2f million parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    batches = training.base_batches(ids_RS, labels_RS, build.plan, build.seed, build.device)
    weights = list(model.parameters())
    training.train(model, weights, batches, build.plan.base_steps, build.plan.base_rate, "training the base")
    spread.spread_channels(model, build.plan.channel_spread, build.seed)
    training.save_base(model, build.base)


def build_adapters(build: Build) -> None:
    ids_TNS, labels_TNS = corpus.adapter_rows(build.tokenizer(), build.plan, build.num_workers)
    stack = build.model()
    trained = training.stack_adapters(stack, build.seed)
    batches = training.adapter_batches(ids_TNS, labels_TNS, build.plan, build.seed, build.device)
    training.train(
        stack, trained, batches, build.plan.adapter_steps, build.plan.adapter_rate, "training twelve adapters"
    )
    training.save_adapters(stack, build.base, build.adapters)


def build_table(build: Build) -> None:
    count = build.plan.eval_examples
    examples = {task: list(itertools.islice(generate.load(task, "eval"), count)) for task in TASKS}
    columns = measure.measure(
        build.model(), build.adapters, build.tokenizer(), examples, corpus.CODES, build.plan.max_new_tokens
    )
    facts = {
        "examples_per_task": count,
        "seed": build.seed,
        "plan": dataclasses.asdict(build.plan),
        "device": torch.cuda.get_device_name() if build.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "points": columns,
    }
    (build.output / "scores.json").write_text(json.dumps(facts, indent=2) + "\n")
    demo_table.put(build.output / "README.md", columns)
    print(demo_table.table(columns))


RUN = MappingProxyType(
    {
        "data": build_data,
        "tokenizer": build_tokenizer,
        "base": build_base,
        "adapters": build_adapters,
        "table": build_table,
    }
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m models.build_demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=DEMO, help="folder to write (default: models/demo)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which stages to run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count(), help="processes that draw text")
    parser.add_argument("--tiny", action="store_true", help="a model and a few steps that a CPU does in seconds")
    parser.add_argument("--base-steps", type=int, help="train the base for so many steps")
    parser.add_argument("--adapter-steps", type=int, help="train the adapters for so many steps")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    steps = {"base_steps": arguments.base_steps, "adapter_steps": arguments.adapter_steps}
    plan = dataclasses.replace(
        TINY if arguments.tiny else BuildPlan(), **{name: count for name, count in steps.items() if count}
    )
    if arguments.tiny and arguments.output == DEMO:
        print("--tiny would overwrite the demo with an untrained one: give --output FOLDER", file=sys.stderr)
        return 2
    build = Build(plan, arguments.output, torch.device(arguments.device), arguments.seed, arguments.workers)
    for stage in [stage for stage in STAGES if stage in arguments.stages]:
        started = time.perf_counter()
        RUN[stage](build)
        log.info("stage %s: %.1f s", stage, time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
