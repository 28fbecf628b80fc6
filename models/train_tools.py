"""Trains an adapter of the demo, `tools`, which calls functions, on a CPU: `python -m models.train_tools`.

The demo's other adapters and its base stay as they are. The examples of a menu share one pass over its tools: each sees
the menu and itself, by the mask, as if it were alone. What is learned is judged on held-out requests, one kind after
another, and the figures go beside the demo's.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import platform
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM, LogitsProcessor, PreTrainedTokenizerFast

from data import tool_requests
from data.tool_requests import Example, Menu
from inlaid.engine.request import Grammar
from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.text.grammar import GrammarCompiler, GrammarState
from inlaid.text.tools.word_schema import calls_pattern
from models.measure import answers
from models.plan import ALL_LINEAR
from models.training import learning_rate

log = logging.getLogger("train_tools")
DEMO = Path(__file__).parent / "demo"
NAME = "tools"
_RANK, _ALPHA, _PEAK_RATE = 16, 32, 2e-3
_GROUP = 16  # examples of a menu: those of a step
_KEEP = 50  # steps between two writings of the adapter

# Shapes in names: S tokens of a menu and its examples, N tokens that are learned.


@dataclass(frozen=True)
class Packed:
    """A menu and its examples in one row."""

    ids_S: torch.Tensor
    positions_S: torch.Tensor
    sees_SS: torch.Tensor  # True where a row's token sees a column's
    before_N: torch.Tensor  # places whose next token is learned
    next_N: torch.Tensor


def prompt(tokenizer: PreTrainedTokenizerFast, menu: Menu, example: Example) -> str:
    """Return the text that the chat template makes of a conversation up to its answer."""
    messages = [*menu.opening, *example.messages]
    tools: Any = menu.definitions
    made = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    return str(made)


def pack(tokenizer: PreTrainedTokenizerFast, menu: Menu, examples: Sequence[Example]) -> Packed:
    """Put examples behind their menu. The parts meet where tokens do, so tokens are those of the whole."""
    prompts = [prompt(tokenizer, menu, example) for example in examples]
    shared = prompts[0][: prompts[0].index("<|user|>")]
    parts = [shared]
    for text, example in zip(prompts, examples, strict=True):
        parts += [text.removeprefix(shared) + example.begun, f"{example.answer}<|end|>"]
    ids = tokenizer(parts, add_special_tokens=False)["input_ids"]
    length = len(ids[0])
    flat, positions, owners = list(ids[0]), list(range(length)), [0] * length
    learned: list[int] = []
    for owner, (heard, said) in enumerate(zip(ids[1::2], ids[2::2], strict=True), 1):
        positions += range(length, length + len(heard) + len(said))
        owners += [owner] * (len(heard) + len(said))
        flat += heard
        learned += range(len(flat), len(flat) + len(said))
        flat += said
    ids_S, owners_S, learned_N = torch.tensor(flat), torch.tensor(owners), torch.tensor(learned)
    sees_SS = ((owners_S[:, None] == owners_S) | (owners_S == 0)).tril()
    return Packed(ids_S, torch.tensor(positions), sees_SS, learned_N - 1, ids_S[learned_N])


def loss_of(model: Any, packed: Packed) -> torch.Tensor:
    """Return the mean loss of what the examples say."""
    causal = model.get_base_model()
    hidden_SH = causal.model(
        input_ids=packed.ids_S[None],
        position_ids=packed.positions_S[None],
        attention_mask=packed.sees_SS[None, None],
        use_cache=False,
    ).last_hidden_state[0]
    return functional.cross_entropy(causal.lm_head(hidden_SH[packed.before_N]), packed.next_N)


def adapted(base: LlamaForCausalLM, seed: int, start: Path | None = None) -> PeftModel:
    """Put an adapter on the base: a fresh one, or the one in the folder `start`."""
    torch.manual_seed(seed)
    if start is not None:
        return PeftModel.from_pretrained(base, start, is_trainable=True)
    config = LoraConfig(
        r=_RANK, lora_alpha=_ALPHA, target_modules=sorted(ALL_LINEAR), lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM", base_model_name_or_path="models/demo/base",
    )  # fmt: skip
    made: PeftModel = get_peft_model(base, config)
    return made


def train(model: PeftModel, batches: Iterator[Packed], num_steps: int, peak_rate: float, folder: Path) -> float:
    """Train for `num_steps`, with what is learned so far in `folder`; return the mean loss of the last twenty."""
    trained: list[nn.Parameter] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    for step in Bar(range(num_steps), desc="training tools", unit="step", mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, peak_rate)
        loss = loss_of(model, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % _KEEP == _KEEP - 1:
            save(model, folder)
        if step % 20 == 19:
            log.info("step %d: loss %.4f", step + 1, sum(losses[-20:]) / 20)
    return sum(losses[-20:]) / len(losses[-20:])


def held_out(num_groups: int, seed: str = "0") -> list[tuple[Menu, Example]]:
    """Return held-out examples, one after another."""
    drawn = itertools.islice(tool_requests.groups("eval", seed, _GROUP), num_groups)
    return [(menu, example) for menu, examples in drawn for example in examples]


def judge(
    model: Any, tokenizer: PreTrainedTokenizerFast, asked: Sequence[tuple[Menu, Example]]
) -> dict[str, dict[str, float]]:
    """Return, of each kind, how many were asked and the share of greedy answers that are right to the letter. Demanded
    calls are written under the grammar that the server has for them."""
    right: dict[str, list[bool]] = defaultdict(list)
    compiler = GrammarCompiler(DEMO / "base", len(tokenizer), [tokenizer.eos_token_id])
    first = tokenizer(tool_requests.FIRST, add_special_tokens=False)["input_ids"]
    model.eval()
    for start in Bar(range(0, len(asked), _GROUP), desc="held-out requests", unit="batch"):
        part = asked[start : start + _GROUP]
        texts = [prompt(tokenizer, menu, example) + example.begun for menu, example in part]
        masked = _Masked([_grammar(compiler, *each) for each in part], first)
        for (_, example), said in zip(part, answers(model, tokenizer, texts, 96, masked), strict=True):
            right[example.kind].append(said == example.answer)
            if said != example.answer:
                print(f"{example.messages[0]['content']}\n  said   {said}\n  wanted {example.answer}", file=sys.stderr)
    return {kind: {"asked": len(each), "right": sum(each) / len(each)} for kind, each in sorted(right.items())}


def _grammar(compiler: GrammarCompiler, menu: Menu, example: Example) -> GrammarState | None:
    """Return the grammar of a demanded call; None: no call is demanded."""
    if not example.begun:
        return None
    pattern = calls_pattern({name: tool["function"]["parameters"] for name, tool in menu.tools.items()}, 1)
    assert pattern is not None, f"a tool of {', '.join(menu.tools)} has no form in words"
    return compiler.state(Grammar(regex=pattern))


class _Masked(LogitsProcessor):
    """Keeps each row of a batch to its grammar, if it has one, of which the prompts end with the first tokens."""

    def __init__(self, grammars: Sequence[GrammarState | None], first: list[int]) -> None:
        self._grammars, self._first = grammars, first
        self._start: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._start = self._start or input_ids.shape[1]
        for row, grammar in enumerate(self._grammars):
            if grammar is not None:
                bits = grammar.mask([*self._first, *input_ids[row, self._start :].tolist()])
                allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: scores.shape[1]]
                scores[row, torch.from_numpy(allowed) == 0] = -torch.inf
        return scores


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter as a PEFT folder in 16 bits; the model keeps its own."""
    written = copy.deepcopy(model).half()
    written.peft_config["default"].base_model_name_or_path = "models/demo/base"
    written.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m models.train_tools", description=__doc__)
    parser.add_argument("--output", type=Path, default=DEMO, help="folder to write below (default: models/demo)")
    parser.add_argument("--steps", type=int, default=500, help=f"steps of {_GROUP} examples (500)")
    parser.add_argument("--held-out", type=int, default=16, help=f"menus to judge by, {_GROUP} requests each (16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="adapter to go on from (default: a fresh one)")
    parser.add_argument("--peak-rate", type=float, default=_PEAK_RATE, help=f"highest learning rate ({_PEAK_RATE})")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(DEMO / "base")
    base = LlamaForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    model = adapted(base, arguments.seed, arguments.start)
    drawn = tool_requests.groups("train", str(arguments.seed), _GROUP)
    folder = arguments.output / "extra" / NAME
    packed = (pack(tokenizer, *group) for group in drawn)
    loss = train(model, packed, arguments.steps, arguments.peak_rate, folder)
    save(model, folder)
    scores = judge(model, tokenizer, held_out(arguments.held_out))
    facts = {
        "seed": arguments.seed,
        "started_afresh": arguments.start is None,
        "steps": arguments.steps,
        "examples": arguments.steps * _GROUP,
        "loss": round(loss, 5),
        "device": f"cpu, {platform.machine()}",
        "torch": torch.__version__,
        "held_out": scores,
    }
    (arguments.output / "extra" / f"{NAME}.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts["held_out"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
