"""Sections of a template, typed, and the words for a key that none of them has. Used by `perf.template`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Annotated, Any, get_args

import msgspec

from inlaid.workload.arrivals import Arrivals
from inlaid.workload.lengths import Lengths
from inlaid.workload.popularity import AdapterChoice
from inlaid.workload.spec import Objective, Stream
from inlaid.workload.traces import Trace, TraceFormat
from perf.launch import ServerKind
from perf.random_adapters import RandomAdapters

SECTIONS = ("global", "selection", "axes", "server", "router", "client", "slo", "features", "datasets", "models")
CLIENT_KEYS = (
    "warmup", "warmup_s", "timeout", "max_connections", "prompt_format", "backend", "tenant_as", "percentiles",
    "temperature", "extra_body", "respect_eos", "save_detailed", "save_text", "api_key", "tokenizer",
)  # fmt: skip


class Global(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`without` names keys that are knowingly dropped because they cannot be honoured here."""

    name: str = ""
    log_home: str = ".inlaid/experiments"
    num_gpus_per_node: int | None = None
    cuda_devices: list[int] | None = None
    retries: int = 1
    ready_timeout_s: float = 600.0
    point_timeout_s: float = 7200.0
    max_failed_share: float = 0.0
    without: list[str] = []

    def visible_devices(self) -> dict[str, str]:
        """Return the environment that shows one node's share of the devices named."""
        if self.cuda_devices is None:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(str(d) for d in self.cuda_devices[: self.num_gpus_per_node])}


class Triple(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    dataset: str
    feature: str = ""


class Selection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    models: list[str] = []
    datasets: list[str] = []
    features: tuple[str, ...] = ("",)
    tuples: list[Triple] = []

    def triples(self) -> list[Triple]:
        product = [Triple(m, d, f) for m in self.models for d in self.datasets for f in self.features]
        return product + self.tuples


class Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: ServerKind = "inlaid"
    policy: str = ""
    args: dict[str, str | int | float | bool] = {}


class Router(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 11236


class Axes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Quantities that grids of this field vary; each replaces what the other sections say."""

    adapters: int | None = None
    quant: str | None = None
    policy: str | None = None
    rate: float | None = None
    skew: str | float | None = None


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`quant` maps a name of the quant axis to a path; `adapters` are folders, globs or NAME=PATH."""

    model_path: str = ""
    tokenizer: str | None = None
    quant: dict[str, str] = {}
    adapters: list[str] = []
    random_adapters: RandomAdapters | None = None
    num_available_blocks: int | None = None
    num_hidden_layers: int | None = None
    tp_size: Annotated[int, msgspec.Meta(ge=1)] = 1


class Dataset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Either streams (or a workload file), or a trace, or one synthetic stream.

    `max_connections` is the client's, for this dataset: with a burst it makes a closed loop of that many requests."""

    dataset_path: str | None = None
    format: TraceFormat = "auto"
    time_in_secs: float | None = None
    num_requests: int | None = None
    time_scale: float = 1.0
    window: tuple[float, float] | None = None
    loop: bool | None = None
    max_input: int | None = None
    max_output: int | None = None
    arrival: Arrivals | None = None
    adapters: AdapterChoice | None = None
    input: Lengths | None = None
    output: Lengths | None = None
    streams: list[Stream] = []
    workload: str | None = None
    max_connections: int | None = None
    weights: dict[str, float] = {}
    seed: int = 0


EnvironmentName = Annotated[str, msgspec.Meta(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One combination of the axes, typed; the names of its parts are the template's sections."""

    model: Model
    dataset: Dataset
    glob: Global = msgspec.field(name="global", default=Global())
    server: Server = Server()
    router: Router = Router()
    axes: Axes = Axes()
    client: dict[str, str | int | float | bool] = {}
    slo: dict[str, Objective] = {}
    environment: dict[EnvironmentName, str | int | float] = msgspec.field(name="extra-envs", default={})


def convert_point(table: dict[str, Any]) -> Point:
    """Convert to types; an unknown key is refused with its place and the key that was probably meant."""
    try:
        return msgspec.convert(table, Point)
    except msgspec.ValidationError as error:
        unknown = re.search(r"unknown field `(.+?)`", str(error))
        hint = did_you_mean(unknown[1], _all_fields()) if unknown else ""
        if "enum value" in str(error) and "server.kind" in str(error):
            hint = f"; known: {', '.join(get_args(ServerKind))}"
        where = str(error).replace("`$.", "`").replace("Object contains unknown field", "unknown key")
        raise ValueError(where + (hint if "did you mean" in hint or not unknown else "")) from error


def _all_fields() -> tuple[str, ...]:
    kinds = (Global, Server, Router, Axes, Model, Dataset, Objective, Arrivals, AdapterChoice, Lengths, Stream, Trace)
    return tuple(dict.fromkeys(field for kind in kinds for field in kind.__struct_fields__))


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Word a hint at the known name that was probably meant, or else at all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
