"""Cost model: the seconds of a step on a machine, linear in what the batch holds, read from a measured file.

The coefficients of a machine are a JSON file (`sim/machines/`, or one that `python -m inlaid.sim.fit` wrote). The
simulator's runner asks `step_seconds`; its adapter directory asks `load_seconds`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import msgspec

from inlaid.cluster.view import Prices
from inlaid.engine.step_log import Load as Load
from inlaid.engine.step_log import Step as Step
from inlaid.kv_format import AUTO, KVFormat

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
    load_base: float = 0.0
    load_rank: float = 0.0
    assist: float = 0.0  # of the CPU's part of an adapter, all layers, for each row and rank; 0: not known

    def step_seconds(self, load: Load) -> float:
        seconds = (
            self.step
            + self.prefill_tokens * load.prefill_tokens
            + self.prefills * load.prefills
            + self.decodes * load.decodes
            + self.prompt_context * load.prompt_context
            + self.output_context * load.output_context
            + self.prefill_attention * load.prefill_attention
            + self.adapters * load.adapters
            + self.adapter_rows * load.adapter_rows
            + self.ranks * load.ranks
            + (self.guesses or self.decodes) * load.guesses
        )
        return max(self.floor, seconds, self.prompt_floor if load.prefills else 0.0)

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
        return CostModel(name=name, source=f"{self.source}, times {factor:g}", **times)

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


def machine_facts(name: str) -> dict[str, str | float]:
    """Return all that a machine's file says, by its name (a10g, a100-13b, h100, h200) or the path of a fitted file."""
    path = Path(name) if name.endswith(".json") else MACHINES / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in MACHINES.glob("*.json")))
        raise ValueError(f"no machine {name!r}; known: {known}; or give the path of a file from inlaid.sim.fit")
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str | float])
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not a cost file: {error}") from error


def load_cost(name: str) -> CostModel:
    """Load a machine's cost model by its name or the path of a fitted file."""
    values = machine_facts(name)
    try:
        return CostModel(**{k: v for k, v in values.items() if k in {f.name for f in fields(CostModel)}})  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"{name} is not a cost file: {error}") from error
