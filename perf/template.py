"""Templates: TOML in, points of a grid out, everything checked before anything starts. Used by `perf.runner`.

Sections: [global] [selection] [axes] [server] [router] [client] [slo] [features] [datasets] [models] [extra-envs].
A list anywhere but in a key that is a list by nature is an axis, and axes multiply. Errors are `TemplateError`,
one line each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from inlaid.workload.arrivals import Arrivals
from inlaid.workload.lengths import Lengths
from inlaid.workload.plan import plan, rescale_rate, with_adapters
from inlaid.workload.popularity import AdapterChoice, parse_skew
from inlaid.workload.prompts import LengthsOnly
from inlaid.workload.spec import EngineSizes, Stream, Workload
from inlaid.workload.suites import load_workload, suite_names
from inlaid.workload.toml import load_toml
from inlaid.workload.traces import Trace
from perf.instance import Instance
from perf.launch import Adapter, ServerCommand, ServerKind, find_adapters
from perf.random_adapters import RandomAdapters, paths_for
from perf.refused import refusals
from perf.sections import (
    CLIENT_KEYS,
    SECTIONS,
    Axes,
    Dataset,
    Global,
    Model,
    Point,
    Selection,
    Triple,
    convert_point,
    did_you_mean,
)
from perf.sweep import expand

ADAPTER_ROOT = Path(".inlaid/perf/adapters")
BLOCK_SIZE = 16  # tokens, the default of inlaid and vLLM


class TemplateError(ValueError):
    """A template that cannot be run, in one line."""


def instantiate(path: Path, dry: bool = False) -> list[Instance]:
    """Make every point of one template; with `dry`, a missing data file is noted in the point and not an error."""
    try:
        data = load_toml(path)
        _check_sections(data)
        instances = [point for triple in _triples(data) for point in _points(data, triple, dry)]
        _check_without(data.get("global", {}).get("without", []), instances)
        return _named_apart(instances)
    except (msgspec.ValidationError, ValueError, OSError) as error:
        text = str(error).removeprefix(f"{path}: ")
        raise TemplateError(f"{path}: {text}") from error


def _check_without(without: list[str], instances: list[Instance]) -> None:
    """Refuse a key in global.without that no point would refuse: it is a typing mistake."""
    known = {key for instance in instances for key in (*instance.refused, *instance.dropped)}
    stray = [key for key in without if key not in known]
    if stray:
        raise ValueError(f"global.without names {stray[0]}, which is not a key that would be refused")


def template_settings(path: Path) -> Global:
    """Read the settings that hold for the whole run of a template."""
    return msgspec.convert(load_toml(path).get("global", {}), Global)


def _check_sections(data: dict[str, Any]) -> None:
    for section in data:
        if section not in (*SECTIONS, "extra-envs"):
            raise ValueError(f"unknown section [{section}]{did_you_mean(section, (*SECTIONS, 'extra-envs'))}")
    for key in data.get("client", {}):
        if key.replace("-", "_") not in CLIENT_KEYS:
            raise ValueError(f"unknown key client.{key}{did_you_mean(key, CLIENT_KEYS)}")


def _triples(data: dict[str, Any]) -> list[Triple]:
    """List the selected combinations; each name must be defined, except that a dataset may be a suite."""
    triples = msgspec.convert(data.get("selection", {}), Selection).triples()
    if not triples:
        raise ValueError("[selection] chooses nothing: name models and datasets")
    suites = tuple(suite_names())
    for triple in triples:
        for kind, name in (("models", triple.model), ("datasets", triple.dataset), ("features", triple.feature)):
            known = (*data.get(kind, {}), *(suites if kind == "datasets" else ()))
            if name and name not in known:
                raise ValueError(f"unknown {kind[:-1]} {name!r} in [selection]{did_you_mean(name, known)}")
    return triples


def _points(data: dict[str, Any], triple: Triple, dry: bool) -> list[Instance]:
    """Multiply out all axes of one combination of model, dataset and feature."""
    table = {key: data[key] for key in SECTIONS if key in data and key not in ("selection", "features", "datasets")}
    table.pop("models", None)
    dataset = data.get("datasets", {}).get(triple.dataset, {"workload": triple.dataset})
    table |= {"extra-envs": data.get("extra-envs", {})}
    table |= {"model": data["models"][triple.model], "dataset": dataset}
    return [_instance(point, triple, labels, data, dry) for point, labels in expand(table)]


def _instance(
    table: dict[str, Any], triple: Triple, labels: dict[str, str], data: dict[str, Any], dry: bool
) -> Instance:
    without = table.get("global", {}).get("without", [])
    feature = data.get("features", {}).get(triple.feature, "")
    table, feature, unusable = refusals(table, triple, feature)
    point = convert_point(table)
    axes = point.axes
    model_path = _model_path(point.model, axes.quant, triple.model)
    adapters, random_adapters = _adapters(point.model, axes.adapters, model_path)
    workload, missing = _workload(point, axes, bool(adapters)), ""
    try:
        workload = workload if axes.rate is None else rescale_rate(workload, axes.rate)
        plan(workload, [name for name, _ in adapters], LengthsOnly())
    except FileNotFoundError as error:
        if not dry:
            raise
        missing = str(error)
    server = _server(point, _feature_arguments(feature, triple.feature), model_path, adapters, workload.engine)
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
        missing=missing,
        refused={key: reason for key, reason in unusable.items() if key not in without},
        dropped={key: reason for key, reason in unusable.items() if key in without},
    )


def _model_path(model: Model, quant: str | None, name: str) -> str:
    if quant is None:
        return model.model_path
    if quant not in model.quant:
        raise ValueError(f"model {name} has no quant {quant!r}{did_you_mean(quant, tuple(model.quant))}")
    return model.quant[quant]


def _adapters(model: Model, count: int | None, model_path: str) -> tuple[list[Adapter], RandomAdapters | None]:
    """Take the first `count` of the model's adapters; random ones are as many as asked for."""
    if model.random_adapters is not None and count != 0:
        spec = model.random_adapters if count is None else msgspec.structs.replace(model.random_adapters, count=count)
        return paths_for(model_path, spec, ADAPTER_ROOT), spec
    adapters = find_adapters(model.adapters)
    if count is not None and count > len(adapters):
        raise ValueError(f"axes.adapters asks for {count} and the model has {len(adapters)}: add random_adapters")
    return adapters[:count], None


def _feature_arguments(feature: str, name: str) -> dict[str, str | bool]:
    """Read a feature, server settings under one name: `policy=vtc,adapter-mode=cached,enforce-eager`."""
    arguments: dict[str, str | bool] = {}
    for part in filter(None, (part.strip() for part in feature.split(","))):
        key, equals, value = part.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", key):
            raise ValueError(f"feature {name!r}: {part!r} is not KEY or KEY=VALUE")
        arguments[key] = value if equals else True
    return arguments


Arguments = dict[str, str | int | float | bool]


def _server(
    point: Point, feature: dict[str, str | bool], model_path: str, adapters: list[Adapter], sizes: EngineSizes
) -> ServerCommand:
    """Combine the axis, the feature, the section and the workload's sizes, the first of them that says a flag.

    A flag that this kind of server does not have is refused.
    """
    kind = point.server.kind
    if point.axes.policy and "policy" in feature:
        raise ValueError(f"axes.policy and a feature both say the policy ({feature['policy']}): say it once")
    arguments: Arguments = {**point.server.args, **feature}
    arguments = _sizes(kind, sizes, int(arguments.get("block-size", BLOCK_SIZE))) | arguments
    own = str(arguments.pop("policy", "") or point.server.policy)
    policy = point.axes.policy or own
    if policy and kind == "vllm":
        raise ValueError(f"policy {policy!r}: vLLM has none of ours; give it its own flags in server.args")
    if point.model.num_available_blocks is not None:
        flag = _blocks_flag(kind)
        if not flag:
            raise ValueError(f"num_available_blocks: a server of kind {kind} cannot be told how many blocks to have")
        arguments[flag] = point.model.num_available_blocks
    if point.model.tp_size > 1:
        if kind not in ("inlaid", "vllm"):
            raise ValueError(f"tp_size: a server of kind {kind} cannot be told among how many GPUs to divide a model")
        arguments["tensor-parallel-size"] = point.model.tp_size
    return ServerCommand(kind, model_path, adapters, policy, arguments)


def _blocks_flag(kind: ServerKind) -> str:
    """Name the flag for the number of KV blocks, or nothing where a kind of server has none."""
    return "num-blocks" if kind == "inlaid" else "num-gpu-blocks-override" if kind == "vllm" else ""


def _sizes(kind: ServerKind, sizes: EngineSizes, block_size: int) -> Arguments:
    """Turn the sizes that a workload is made for into a server's flags."""
    if kind == "slora":
        return {} if sizes.kv_tokens is None else {"max-total-token-num": sizes.kv_tokens}
    flag = _blocks_flag(kind)
    if not flag:
        return {}
    blocks = None if sizes.kv_tokens is None else -(-sizes.kv_tokens // block_size)
    flags = {flag: blocks, "max-loras": sizes.max_loras, "max-num-seqs": sizes.max_num_seqs}
    return {name: value for name, value in flags.items() if value is not None}


def _client(point: Point) -> dict[str, Any]:
    """Combine the client's flags; [client] wins over the dataset and the model."""
    own = {"tokenizer": point.model.tokenizer, "max_connections": point.dataset.max_connections}
    stated = {key.replace("-", "_"): value for key, value in point.client.items()}
    return {key: value for key, value in own.items() if value is not None} | stated


def _workload(point: Point, axes: Axes, has_adapters: bool) -> Workload:
    """Make the workload; without adapters, requests that do not say otherwise go to the base model."""
    dataset = point.dataset
    default = AdapterChoice() if has_adapters else AdapterChoice("none")
    if dataset.workload:
        workload = load_workload(dataset.workload)
    else:
        workload = Workload(dataset.streams or [_single_stream(dataset, default)], dataset.seed, {}, dataset.weights)
    if point.slo:
        workload = msgspec.structs.replace(workload, classes=point.slo)
    if axes.skew is None and axes.adapters != 0:
        return workload
    choice = parse_skew(axes.skew) if has_adapters and axes.skew is not None else AdapterChoice("none")
    return with_adapters(workload, choice)


def _single_stream(dataset: Dataset, default: AdapterChoice) -> Stream:
    """Make the one stream of a dataset.

    A trace is replayed, again and again until time_in_secs is over; a part that the dataset sets is not taken from it.
    """
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
