"""Templates: TOML in, points of a grid out, everything checked before anything starts. Used by `perf.runner`.

Sections: [global] [selection] [axes] [server] [router] [client] [slo] [features] [datasets] [models] [extra-envs].
A list anywhere but in a key that is a list by nature is an axis, and axes multiply. Errors are `TemplateError`,
one line each.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec

from perf.adapters import AdapterChoice, parse_skew
from perf.arrivals import Arrivals
from perf.instance import Instance
from perf.launch import Adapter, ServerCommand, ServerKind, find_adapters
from perf.lengths import Lengths
from perf.prompts import Prompt, PromptFormat
from perf.random_adapters import RandomAdapters, paths_for
from perf.refused import refusals
from perf.sweep import expand
from perf.toml import load_toml
from perf.traces import Trace, TraceFormat
from perf.workload import Objective, Stream, Workload, load_workload, plan, rescale_rate

ADAPTER_ROOT = Path(".inlaid/perf/adapters")
BLOCKS_FLAGS: dict[ServerKind, str] = {"inlaid": "num-blocks", "vllm": "num-gpu-blocks-override"}


class TemplateError(ValueError):
    """A template that cannot be run, in one line."""


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
        """One node's worth of the devices named."""
        if self.cuda_devices is None:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(str(d) for d in self.cuda_devices[: self.num_gpus_per_node])}


class LengthsOnly:
    """Stands in for the prompts when a workload is only checked: every trace read, every adapter found."""

    form: PromptFormat = "ids"

    def make(self, index: int, length: int) -> Prompt:
        return ""

    def from_blocks(self, blocks: tuple[int, ...], length: int) -> Prompt:
        return ""

    def count(self, text: str) -> int | None:
        return 1


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
    """What grids of this field vary; each replaces what the other sections say."""

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
    tp_size: Literal[1] = 1


class Dataset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Either streams (or a workload file), or a trace, or one synthetic stream.

    `max_connections` is the client's, for this dataset: with a burst it makes a closed loop of so many requests."""

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


SECTIONS = ("global", "selection", "axes", "server", "router", "client", "slo", "features", "datasets", "models")
CLIENT_KEYS = (
    "warmup", "warmup_s", "timeout", "max_connections", "prompt_format", "backend", "tenant_as", "percentiles",
    "temperature", "extra_body", "respect_eos", "save_detailed", "save_text", "api_key", "tokenizer",
)  # fmt: skip


def instantiate(path: Path) -> list[Instance]:
    """Every point of one template."""
    try:
        data = load_toml(path)
        _check_sections(data)
        return _named_apart([point for triple in _triples(data) for point in _points(data, triple)])
    except (msgspec.ValidationError, ValueError, OSError) as error:
        text = str(error).removeprefix(f"{path}: ")
        raise TemplateError(f"{path}: {text}") from error


def template_settings(path: Path) -> Global:
    """What holds for the whole run of a template."""
    return msgspec.convert(load_toml(path).get("global", {}), Global)


def _check_sections(data: dict[str, Any]) -> None:
    for section in data:
        if section not in (*SECTIONS, "extra-envs"):
            raise ValueError(f"unknown section [{section}]{_did_you_mean(section, (*SECTIONS, 'extra-envs'))}")
    for key in data.get("client", {}):
        if key.replace("-", "_") not in CLIENT_KEYS:
            raise ValueError(f"unknown key client.{key}{_did_you_mean(key, CLIENT_KEYS)}")


def _did_you_mean(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _triples(data: dict[str, Any]) -> list[Triple]:
    """The selected combinations; each name must be defined."""
    triples = msgspec.convert(data.get("selection", {}), Selection).triples()
    if not triples:
        raise ValueError("[selection] chooses nothing: name models and datasets")
    for triple in triples:
        for kind, name in (("models", triple.model), ("datasets", triple.dataset), ("features", triple.feature)):
            known = tuple(data.get(kind, {}))
            if name and name not in known:
                raise ValueError(f"unknown {kind[:-1]} {name!r} in [selection]{_did_you_mean(name, known)}")
    return triples


def _points(data: dict[str, Any], triple: Triple) -> list[Instance]:
    """One combination of model, dataset and feature, with all axes multiplied out."""
    table = {key: data[key] for key in SECTIONS if key in data and key not in ("selection", "features", "datasets")}
    table.pop("models", None)
    table |= {"extra-envs": data.get("extra-envs", {})}
    table |= {"model": data["models"][triple.model], "dataset": data["datasets"][triple.dataset]}
    return [_instance(point, triple, labels, data) for point, labels in expand(table)]


def _instance(table: dict[str, Any], triple: Triple, labels: dict[str, str], data: dict[str, Any]) -> Instance:
    without = table.get("global", {}).get("without", [])
    feature = data.get("features", {}).get(triple.feature, "")
    table, feature, unusable = refusals(table, triple, feature)
    stray = [key for key in without if key not in unusable]
    if stray:
        raise ValueError(f"global.without names {stray[0]}, which is not a key that would be refused")
    point = convert_point(table)
    axes = point.axes
    model_path = _model_path(point.model, axes.quant, triple.model)
    adapters, random_adapters = _adapters(point.model, axes.adapters, model_path)
    server = _server(point, _feature_arguments(feature, triple.feature), model_path, adapters)
    workload = _workload(point, axes, bool(adapters))
    plan(workload, [name for name, _ in adapters], LengthsOnly())
    return Instance(
        point=_point_name(triple, labels),
        labels={"model": triple.model, "dataset": triple.dataset, "feature": triple.feature} | labels,
        server=server,
        workload=workload,
        client=_client(point),
        port=point.router.port,
        environment={k: str(v) for k, v in point.environment.items()} | point.glob.visible_devices(),
        random_adapters=random_adapters,
        num_hidden_layers=point.model.num_hidden_layers,
        ready_timeout_s=point.glob.ready_timeout_s,
        point_timeout_s=point.glob.point_timeout_s,
        max_failed_share=point.glob.max_failed_share,
        refused={key: reason for key, reason in unusable.items() if key not in without},
        dropped={key: reason for key, reason in unusable.items() if key in without},
    )


def convert_point(table: dict[str, Any]) -> Point:
    """Typed; an unknown key names itself, its place, and the key that was probably meant."""
    try:
        return msgspec.convert(table, Point)
    except msgspec.ValidationError as error:
        unknown = re.search(r"unknown field `(.+?)`", str(error))
        hint = _did_you_mean(unknown[1], _all_fields()) if unknown else ""
        if "enum value" in str(error) and "server.kind" in str(error):
            hint = f"; known: {', '.join(get_args(ServerKind))}"
        where = str(error).replace("`$.", "`").replace("Object contains unknown field", "unknown key")
        raise ValueError(where + (hint if "did you mean" in hint or not unknown else "")) from error


def _all_fields() -> tuple[str, ...]:
    kinds = (Global, Server, Router, Axes, Model, Dataset, Objective, Arrivals, AdapterChoice, Lengths, Stream, Trace)
    return tuple(dict.fromkeys(field for kind in kinds for field in kind.__struct_fields__))


def _model_path(model: Model, quant: str | None, name: str) -> str:
    if quant is None:
        return model.model_path
    if quant not in model.quant:
        raise ValueError(f"model {name} has no quant {quant!r}{_did_you_mean(quant, tuple(model.quant))}")
    return model.quant[quant]


def _adapters(model: Model, count: int | None, model_path: str) -> tuple[list[Adapter], RandomAdapters | None]:
    """The first `count` of the model's adapters; random ones are as many as asked for."""
    if model.random_adapters is not None and count != 0:
        spec = model.random_adapters if count is None else msgspec.structs.replace(model.random_adapters, count=count)
        return paths_for(model_path, spec, ADAPTER_ROOT), spec
    adapters = find_adapters(model.adapters)
    if count is not None and count > len(adapters):
        raise ValueError(f"axes.adapters asks for {count} and the model has {len(adapters)}: add random_adapters")
    return adapters[:count], None


def _feature_arguments(feature: str, name: str) -> dict[str, str | bool]:
    """`policy=vtc,adapter-mode=cached,enforce-eager`: server settings under one name."""
    arguments: dict[str, str | bool] = {}
    for part in filter(None, (part.strip() for part in feature.split(","))):
        key, equals, value = part.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", key):
            raise ValueError(f"feature {name!r}: {part!r} is not KEY or KEY=VALUE")
        arguments[key] = value if equals else True
    return arguments


def _server(point: Point, feature: dict[str, str | bool], model_path: str, adapters: list[Adapter]) -> ServerCommand:
    """The axis over the feature's or the section's flags; what this kind of server cannot be told is refused."""
    kind = point.server.kind
    if point.axes.policy and "policy" in feature:
        raise ValueError(f"axes.policy and a feature both say the policy ({feature['policy']}): say it once")
    arguments: dict[str, str | int | float | bool] = {**point.server.args, **feature}
    own = str(arguments.pop("policy", "") or point.server.policy)
    policy = point.axes.policy or own
    if policy and kind == "vllm":
        raise ValueError(f"policy {policy!r}: vLLM has none of ours; give it its own flags in server.args")
    if point.model.num_available_blocks is not None:
        if kind not in BLOCKS_FLAGS:
            raise ValueError(f"num_available_blocks: a server of kind {kind} cannot be told how many blocks to have")
        arguments[BLOCKS_FLAGS[kind]] = point.model.num_available_blocks
    return ServerCommand(kind, model_path, adapters, policy, arguments)


def _client(point: Point) -> dict[str, Any]:
    """What the dataset and the model say about the client, under what [client] says."""
    own = {"tokenizer": point.model.tokenizer, "max_connections": point.dataset.max_connections}
    stated = {key.replace("-", "_"): value for key, value in point.client.items()}
    return {key: value for key, value in own.items() if value is not None} | stated


def _workload(point: Point, axes: Axes, has_adapters: bool) -> Workload:
    """Without adapters, requests that do not say otherwise go to the base model."""
    dataset = point.dataset
    default = AdapterChoice() if has_adapters else AdapterChoice("none")
    if dataset.workload:
        workload = load_workload(dataset.workload)
    else:
        workload = Workload(dataset.streams or [_single_stream(dataset, default)], dataset.seed, {}, dataset.weights)
    if point.slo:
        workload = msgspec.structs.replace(workload, classes=point.slo)
    if axes.skew is not None or axes.adapters == 0:
        choice = parse_skew(axes.skew) if has_adapters and axes.skew is not None else AdapterChoice("none")
        streams = [msgspec.structs.replace(stream, adapters=choice) for stream in workload.streams]
        workload = msgspec.structs.replace(workload, streams=streams)
    return workload if axes.rate is None else rescale_rate(workload, axes.rate)


def _single_stream(dataset: Dataset, default: AdapterChoice) -> Stream:
    """A trace replays itself, again and again until time_in_secs is over; what the dataset sets is not taken
    from the trace."""
    trace = _trace(dataset)
    own_times = trace is not None and dataset.arrival is None
    lengths = Lengths("trace") if trace else Lengths()
    return Stream(
        arrival=Arrivals("trace") if own_times else dataset.arrival or Arrivals(),
        adapters=dataset.adapters or default,
        input=dataset.input or lengths,
        output=dataset.output or lengths,
        duration_s=dataset.time_in_secs,
        num_requests=dataset.num_requests,
        trace=trace,
    )


def _trace(dataset: Dataset) -> Trace | None:
    if dataset.dataset_path is None:
        return None
    loop = dataset.time_in_secs is not None if dataset.loop is None else dataset.loop
    return Trace(
        dataset.dataset_path, dataset.format, dataset.time_scale, dataset.window, loop, dataset.max_input,
        dataset.max_output,
    )  # fmt: skip


def _point_name(triple: Triple, labels: dict[str, str]) -> str:
    parts = ["-".join(filter(None, (triple.model, triple.dataset, triple.feature)))]
    parts += [f"{key}-{value}" for key, value in labels.items()]
    return "/".join(re.sub(r"[^A-Za-z0-9._=-]+", "_", part) for part in parts)


def _named_apart(instances: list[Instance]) -> list[Instance]:
    names = [instance.point for instance in instances]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"two points are both called {twice}: an axis names a value twice")
    inside = next((a for a in names for b in names if b.startswith(a + "/")), None)
    assert inside is None, f"{inside} would lie inside another point"
    return instances
