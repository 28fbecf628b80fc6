"""Train PEFT adapters for a base on one's own data, on a CPU or a GPU, several side by side:

    python -m models.train_lora models/cache/smollm2 --task sql=sql.jsonl --task notes=notes.jsonl --out adapters

A line of data is what `inlaid quantize` reads: {"prompt", "completion"} or {"messages"}. The tasks of a group share the
passes through the base, block of rows by block of rows; each has its own examples, clipping and seed, so an adapter
does not depend on its neighbours. A killed run goes on where it was, to the same losses. Each adapter's folder holds
its loss curve and how it does on held-out examples (`training.json`, `loss.png`).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from inlaid.checkpoint import Checkpoint
from inlaid.files import hash_file
from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.quant.calibration import Sequence as Tokens
from inlaid.quant.calibration import encode, padded
from inlaid.quant.examples import read_examples
from inlaid.text.tokenizer_files import as_transformers
from models.lora_files import TrainingState, is_done, write_adapter
from models.plan import ALL_LINEAR
from models.training import learning_rate, stack, stacked_linears

_KEEP_EVERY = 50  # steps between two writings of the state
_MOST_HELD_OUT = 128
_HELD_OUT_ROWS = 8


class TrainError(ValueError):
    """Training cannot be done as asked; the message says why."""


@dataclass(frozen=True)
class TrainSettings:
    """The shape of the adapters, and how they are trained."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ALL_LINEAR
    steps: int = 300
    batch: int = 8
    rate: float = 1e-3
    max_length: int = 1024
    held_out: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class TrainTask:
    """A task's examples as tokens. `key` is the hash of all that its adapter follows from."""

    name: str
    fitting: tuple[Tokens, ...]
    held_out: tuple[Tokens, ...]
    key: str

    def rows(self, step: int, settings: TrainSettings) -> list[Tokens]:
        """Return the examples of a step: shuffled anew each epoch, and by the step alone."""
        rows = []
        for place in range(step * settings.batch, (step + 1) * settings.batch):
            epoch, at = divmod(place, len(self.fitting))
            order = torch.randperm(len(self.fitting), generator=seeded(settings.seed, self.name, epoch))
            rows.append(self.fitting[int(order[at])])
        return rows


@dataclass(frozen=True)
class HeldOut:
    """Figures of held-out answers: nats a token, and the share that greedy decoding gives word for word."""

    loss: float
    exact: float


def seeded(*parts: object) -> torch.Generator:
    """Return a generator whose draws follow from the parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def read_tasks(base: Path, given: Sequence[str], settings: TrainSettings) -> list[TrainTask]:
    """Read NAME=FILE.jsonl of each task into tokens of the base's tokenizer."""
    tokenizer = as_transformers(base)
    fingerprint = Checkpoint(base).fingerprint()
    tasks = []
    for text in given:
        name, equals, file = text.partition("=")
        if not (name and equals and file) or "/" in name or name.startswith("."):
            raise TrainError(f"--task {text}: write NAME=FILE.jsonl")
        examples = read_examples(Path(file))
        order = torch.randperm(len(examples), generator=seeded(settings.seed, name, "held out")).tolist()
        encoded = [encode(examples[at], tokenizer, settings.max_length) for at in order]
        num_held_out = min(_MOST_HELD_OUT, max(1, round(len(encoded) * settings.held_out)))
        if len(encoded) <= num_held_out:
            raise TrainError(f"{file} holds {len(encoded)} example; two or more are needed, one is held out")
        facts = json.dumps([fingerprint, hash_file(Path(file)), name, asdict(settings)])
        key = hashlib.sha256(facts.encode()).hexdigest()
        tasks.append(TrainTask(name, tuple(encoded[num_held_out:]), tuple(encoded[:num_held_out]), key))
    if len({task.name for task in tasks}) < len(tasks):
        raise TrainError("two tasks have the same name")
    return tasks


def load_base(base: Path, device: torch.device) -> Any:
    """Load the base in single precision."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    return model.to(device).eval()


def train_group(
    base: Path, tasks: Sequence[TrainTask], settings: TrainSettings, out: Path, device: torch.device
) -> Iterator[tuple[str, HeldOut, HeldOut]]:
    """Train the adapters of a group side by side and write their folders. Yield each one's name, and its held-out
    figures without and with the adapter."""
    model = load_base(base, device)
    scale = settings.alpha / settings.rank
    shapes = {module: [(settings.rank, scale)] * len(tasks) for module in settings.targets}
    generators = [seeded(settings.seed, task.name, "factors") for task in tasks]
    trained = stack(model, lambda module: shapes.get(module, [(0, 0.0)] * len(tasks)), generators)
    state = TrainingState(out, [task.key for task in tasks])
    optimizer = torch.optim.AdamW(trained, lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.0)
    first = state.load(trained, optimizer)
    names = ", ".join(task.name for task in tasks)
    with Bar(total=settings.steps, initial=first, desc=f"training {names}", unit=" steps", lines=10) as bar:
        for step in range(first, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings.steps, settings.rate)
            loss_T = losses(model, [task.rows(step, settings) for task in tasks], device)
            loss_T.sum().backward()
            clip_each(trained)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.losses.append(loss_T.tolist())
            bar.set_postfix_str(f"loss {loss_T.mean().item():.3f}", refresh=False)
            bar.update()
            if (step + 1) % _KEEP_EVERY == 0:
                state.save(step + 1, trained, optimizer)
    state.save(settings.steps, trained, optimizer)
    for at, task in enumerate(tasks):
        before, after = (held_out(model, task, which, device) for which in (-1, at))
        factors = {name: (one.a_TRI[at], one.b_TOR[at]) for name, one in stacked_linears(model).items()}
        about = {
            "task": task.name,
            "key": task.key,
            "settings": asdict(settings),
            "examples": len(task.fitting),
            "held_out_examples": len(task.held_out),
            "base": asdict(before),
            "adapter": asdict(after),
            "losses": [round(loss[at], 5) for loss in state.losses],
        }
        write_adapter(out / task.name, factors, settings.rank, settings.alpha, str(base), about)
        yield task.name, before, after
    state.drop()


def losses(model: Any, rows: Sequence[Sequence[Tokens]], device: torch.device) -> torch.Tensor:
    """Return each task's mean loss over the answer tokens of its rows; all tasks have as many rows."""
    batch = padded([row for block in rows for row in block])
    nll_N, row_N, _ = answer_tokens(model, batch.ids_BS.to(device), batch.answer_BS.to(device))
    task_N = row_N // len(rows[0])
    empty_T = torch.zeros(len(rows), device=device)
    counts_T = empty_T.index_add(0, task_N, torch.ones_like(nll_N))
    return empty_T.index_add(0, task_N, nll_N) / counts_T


def answer_tokens(
    model: Any, ids_BS: torch.Tensor, answer_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of each token to be predicted, its row, and True where it is the likeliest. The head sees these
    tokens alone."""
    with torch.autocast(ids_BS.device.type, torch.bfloat16, enabled=ids_BS.device.type == "cuda"):
        hidden_BSD = model.model(input_ids=ids_BS, use_cache=False).last_hidden_state
        wanted_BS = answer_BS[:, 1:]
        logits_NV = model.lm_head(hidden_BSD[:, :-1][wanted_BS]).float()
    next_N = ids_BS[:, 1:][wanted_BS]
    nll_N = functional.cross_entropy(logits_NV, next_N, reduction="none")
    return nll_N, wanted_BS.nonzero()[:, 0], logits_NV.argmax(-1) == next_N


def clip_each(trained: Sequence[nn.Parameter]) -> None:
    """Bound the norm of each task's gradient by 1: a task must not slow another down."""
    grads = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm_T = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
    factor_T = (1 / (norm_T + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor_T[:, None, None])


@torch.no_grad()
def held_out(model: Any, task: TrainTask, which: int, device: torch.device) -> HeldOut:
    """Judge adapter `which` of the stack (-1: the base alone) on a task's held-out examples."""
    for one in stacked_linears(model).values():
        one.only = which
    total = tokens = exact = 0.0
    for start in range(0, len(task.held_out), _HELD_OUT_ROWS):
        batch = padded(list(task.held_out[start : start + _HELD_OUT_ROWS]))
        nll_N, row_N, right_N = answer_tokens(model, batch.ids_BS.to(device), batch.answer_BS.to(device))
        total, tokens = total + float(nll_N.sum()), tokens + len(nll_N)
        wrong = set(row_N[~right_N].tolist())
        exact += len(batch.ids_BS) - len(wrong)
    for one in stacked_linears(model).values():
        one.only = None
    return HeldOut(total / tokens, exact / len(task.held_out))


def main(argv: list[str] | None = None) -> int:
    """Train what is not trained yet, group by group, and return the exit status."""
    args = _parser().parse_args(argv)
    settings = TrainSettings(**{name: getattr(args, name) for name in TrainSettings.__dataclass_fields__})
    settings = replace(settings, targets=tuple(args.targets))
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tasks = read_tasks(args.base, args.task, settings)
        left = [task for task in tasks if not is_done(args.out / task.name, task.key)]
        for task in tasks:
            if task not in left:
                print(f"{args.out / task.name}: trained before, with the same data and settings")
        group = args.side_by_side
        for start in range(0, len(left), group):
            for done, before, after in train_group(
                args.base, left[start : start + group], settings, args.out, torch.device(name)
            ):
                print(
                    f"{args.out / done}: held-out loss {before.loss:.3f} -> {after.loss:.3f}, "
                    f"exact answers {before.exact:.0%} -> {after.exact:.0%}",
                    flush=True,
                )
    except (ValueError, OSError) as error:
        print(f"train_lora: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    defaults = TrainSettings()
    parser = Parser(prog="python -m models.train_lora", description=__doc__)
    parser.add_argument("base", type=Path, help="folder of the 16-bit base")
    parser.add_argument("--task", action="append", required=True, metavar="NAME=FILE.jsonl", help="may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapters, one folder each")
    parser.add_argument("--rank", type=int, default=defaults.rank, help="of every adapted linear")
    parser.add_argument("--alpha", type=float, default=defaults.alpha, help="the adapter's scale is alpha / rank")
    parser.add_argument("--targets", nargs="+", choices=ALL_LINEAR, default=ALL_LINEAR, help="linears; default: all")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of each adapter")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="examples of a task in a step")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="highest learning rate")
    parser.add_argument("--max-length", type=int, default=defaults.max_length, help="most tokens of an example")
    parser.add_argument("--held-out", type=float, default=defaults.held_out, help="share of examples to judge with")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of factors, order and held-out examples")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it trains")
    parser.add_argument(
        "--side-by-side", type=int, default=4, metavar="N", help="adapters that share a pass; memory grows with it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
