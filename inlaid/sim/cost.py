"""Cost model: the seconds of a step on a machine, linear in what the batch holds, read from a measured file.

The coefficients of a machine are a JSON file (`sim/machines/`, or one that `python -m inlaid.sim.fit` wrote). The
simulator's runner asks `step_seconds`; its adapter directory asks `load_seconds`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec

from inlaid.cluster.view import Prices
from inlaid.engine.step_log import Load as Load
from inlaid.engine.step_log import Step as Step
from inlaid.kv_format import AUTO, KVFormat
from inlaid.sim.stairs import Stairs, seconds_at

MACHINES = Path(__file__).parent / "machines"
HEAD = 128  # numbers of a head of the models that the machines were measured with


@dataclass(frozen=True)
class CostModel:
    """Seconds per unit of load. A step takes at least `floor`; with prompts, whose kernels a GPU gets one by one, at
    least `prompt_floor`. Loading an adapter takes `load_base` + rank * `load_rank`."""

    name: str
    source: str
    step: float = 0.0
    floor: float = 0.0
    prompt_floor: float = 0.0
    prefill_tokens: float = 0.0
    prefills: float = 0.0
    decodes: float = 0.0
    prompt_context: float = 0.0
    output_context: float = 0.0
    prefill_attention: float = 0.0
    adapters: float = 0.0
    adapter_rows: float = 0.0
    ranks: float = 0.0
    guesses: float = 0.0  # 0: as much as a decode
    host: float = 0.0  # of the host that makes a step while the device computes the one before,
    host_prompts: float = 0.0  # more if it has prompts, whose kernels are launched one by one,
    host_rows: float = 0.0  # for each sequence
    host_tokens: float = 0.0  # and for each token of a prompt
    decode_stairs: Stairs = ()  # instead of step, prefill_tokens, prefills and decodes, of steps without prompts
    prompt_stairs: Stairs = ()  # and of those with prompts
    load_base: float = 0.0
    load_rank: float = 0.0
    assist: float = 0.0  # of the CPU's part of an adapter, all layers, for each row and rank; 0: not known

    def step_seconds(self, load: Load) -> float:
        seconds = (
            self._rows_seconds(load)
            + self.prompt_context * load.prompt_context
            + self.output_context * load.output_context
            + self.prefill_attention * load.prefill_attention
            + self.adapters * load.adapters
            + self.adapter_rows * load.adapter_rows
            + self.ranks * load.ranks
        )
        return max(self.floor, seconds, self.prompt_floor if load.prefills else 0.0)

    def _rows_seconds(self, load: Load) -> float:
        """Return the seconds that the rows of a step take, whatever they attend to."""
        stairs = self.prompt_stairs if load.prefills else self.decode_stairs
        if stairs:
            return seconds_at(stairs, load.prefill_tokens + load.decodes + load.guesses)
        return (
            self.step
            + self.prefill_tokens * load.prefill_tokens
            + self.prefills * load.prefills
            + self.decodes * load.decodes
            + (self.guesses or self.decodes) * load.guesses
        )

    def host_seconds(self, load: Load) -> float:
        """Return what the host takes to make a step and to launch it."""
        rows = load.decodes + load.prefills
        prompts = self.host_prompts if load.prefills else 0.0
        return self.host + prompts + self.host_rows * rows + self.host_tokens * load.prefill_tokens

    def load_seconds(self, rank: int) -> float:
        return self.load_base + self.load_rank * rank

    def scaled(self, factor: float, name: str) -> CostModel:
        """Return the same machine, slower or faster by a factor."""
        times = {f.name: getattr(self, f.name) * factor for f in fields(self) if f.type == "float"}
        decodes, prompts = (
            tuple((rows, seconds * factor) for rows, seconds in stairs)
            for stairs in (self.decode_stairs, self.prompt_stairs)
        )
        source = f"{self.source}, times {factor:g}"
        return CostModel(name=name, source=source, decode_stairs=decodes, prompt_stairs=prompts, **times)

    def divided(self, members: int, exchanges: float) -> CostModel:
        """Return `members` such machines that serve one model together: each reads its shard of weights, KV and
        adapters, and a step waits `exchanges` seconds for sums. What the host does for a step stays."""
        if members == 1:
            return self
        part = self.scaled(1 / members, self.name)
        kept = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith("host") or f.name == "load_base"
        }
        decodes, prompts = (
            tuple((rows, seconds + exchanges) for rows, seconds in stairs)
            for stairs in (part.decode_stairs, part.prompt_stairs)
        )
        source = f"{self.source}, divided among {members}, whose sums take {exchanges:g} s a step"
        return replace(
            part, source=source, step=part.step + exchanges, decode_stairs=decodes, prompt_stairs=prompts, **kept
        )

    def with_keys_and_values(self, form: KVFormat) -> CostModel:
        """Return the machine, measured with keys and values of 16 bits, with those of another form to read."""
        share = form.head_bytes(HEAD, 2) / AUTO.head_bytes(HEAD, 2)
        return replace(self, prompt_context=self.prompt_context * share, output_context=self.output_context * share)

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(asdict(self)), indent=1) + b"\n")


def prices_of(cost: CostModel) -> Prices:
    """Return a machine's prices for placement."""
    return Prices(
        step=cost.step,
        floor=cost.floor,
        context=cost.prompt_context,
        prefill_token=cost.prefill_tokens,
        prefill=cost.prefills,
        decode=cost.decodes,
        adapter=cost.adapters,
        rank=cost.ranks,
        load_base=cost.load_base,
        load_rank=cost.load_rank,
    )


def machine_facts(name: str) -> dict[str, Any]:
    """Return all that a machine's file says, by its name (a10g, a100-13b, h100, h200) or the path of a fitted file."""
    path = Path(name) if name.endswith(".json") else MACHINES / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in MACHINES.glob("*.json")))
        raise ValueError(f"no machine {name!r}; known: {known}; or give the path of a file from inlaid.sim.fit")
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not a cost file: {error}") from error


def load_cost(name: str) -> CostModel:
    """Load a machine's cost model by its name or the path of a fitted file."""
    facts, known = machine_facts(name), {f.name: f.type for f in fields(CostModel)}
    try:
        return msgspec.convert({key: value for key, value in facts.items() if key in known}, CostModel)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name} is not a cost file: {error}") from error
