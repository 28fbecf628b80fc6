"""The request generator's command line, and how its flags become a `Workload`. Used by `perf.client`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, get_args

import msgspec

from inlaid.flags import Parser
from inlaid.workload.arrivals import Arrivals, Gaps, Process
from inlaid.workload.lengths import Lengths
from inlaid.workload.plan import rescale_rate
from inlaid.workload.popularity import AdapterChoice, Distribution
from inlaid.workload.prompts import PromptFormat
from inlaid.workload.spec import Objective, Stream, Workload
from inlaid.workload.suites import load_workload
from inlaid.workload.traces import Trace, TraceFormat
from perf.protocols import Backend

DESCRIPTION = """Sends a workload to a server in an open loop and writes what came back: one line of JSON per
request, and a summary with the field names of `vllm bench serve`. An argument @FILE is replaced by the lines
of FILE."""


def build_parser() -> Parser:
    parser = Parser(
        prog="perf.client",
        usage="python -m perf.client [FLAGS]  (--help lists them)",
        description=DESCRIPTION,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
    )
    _server_flags(parser.add_argument_group("server"))
    _workload_flags(parser.add_argument_group("workload (or --workload FILE)"))
    _run_flags(parser.add_argument_group("run and results"))
    return parser


def _server_flags(group: Any) -> None:
    group.add_argument("--base-url", nargs="+", default=["http://127.0.0.1:8000"], help="one URL a replica")
    group.add_argument("--route", choices=["round-robin", "adapter"], default="round-robin", help="over replicas")
    group.add_argument("--backend", choices=get_args(Backend), default="openai")
    group.add_argument("--model", help="base model's name (default: ask /v1/models)")
    group.add_argument("--adapters", nargs="*", default=["auto"], help="names, or auto: ask /v1/models")
    group.add_argument("--num-adapters", type=int, help="use only this many, the first ones")
    group.add_argument("--api-key", help="sent as a bearer token")
    group.add_argument("--tenant-as", default="user", help="user | none | api-key | header:NAME")
    group.add_argument("--policy", help="switch the server to this policy first (inlaid), as vtc:predict=predicted")
    group.add_argument("--ready-timeout", type=float, default=0.0, help="seconds to wait for /health")


def _workload_flags(group: Any) -> None:
    group.add_argument("--workload", help="TOML or JSON file with streams, classes and weights")
    group.add_argument("--arrival", choices=get_args(Process), help="default: poisson, or the --trace's own times")
    group.add_argument("--rate", type=float, help="requests a second (default 1; rescales --workload)")
    group.add_argument("--end-rate", type=float, help="a ramp's last rate")
    group.add_argument("--cv", type=float, default=1.0, help="gamma: coefficient of variation of the gaps")
    group.add_argument("--on-s", type=float, default=60.0)
    group.add_argument("--off-s", type=float, default=60.0)
    group.add_argument("--within", choices=get_args(Gaps), default="fixed", help="process inside on-off and ramp")
    group.add_argument("--num-requests", type=int)
    group.add_argument("--duration", type=float, help="seconds in which requests are due")
    group.add_argument("--distribution", choices=get_args(Distribution), help="of adapters (default uniform)")
    group.add_argument("--alpha", type=float, default=1.0, help="of zipf, skewed and power")
    group.add_argument("--adapter-rates", nargs="*", default=[], metavar="NAME=RATE", help="requests/s of each")
    group.add_argument(
        "--input",
        help="fixed:N | uniform:LOW:HIGH | lognormal:MEDIAN:SIGMA | trace (default fixed:128, or trace with --trace)",
    )
    group.add_argument("--output", help="as --input")
    group.add_argument("--max-input", type=int, help="shorten longer prompts")
    group.add_argument("--max-output", type=int, help="shorten longer answers")
    group.add_argument("--trace", help="trace or prompt file")
    group.add_argument("--trace-format", choices=get_args(TraceFormat), default="auto")
    group.add_argument("--time-scale", type=float, default=1.0, help="0.5 replays twice as fast")
    group.add_argument("--window", nargs=2, type=float, metavar=("START", "END"), help="seconds of the trace")
    group.add_argument("--loop", action="store_true", help="repeat the trace until the limit")
    group.add_argument("--tenant", default="{adapter}", help="a name; {adapter} is replaced")
    group.add_argument("--slo", nargs="*", default=[], metavar="ttft_ms=200", help="also tpot_ms=, e2el_ms=")
    group.add_argument("--seed", type=_seed, default=0)
    group.add_argument("--prompt-format", choices=get_args(PromptFormat), help="default ids, text for chat and slora")
    group.add_argument("--tokenizer", help="tokenizer.json or its folder (default: ask the server)")
    group.add_argument("--respect-eos", action="store_true", help="do not send ignore_eos")
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--extra-body", type=_json_object, default="{}", help="JSON object merged into every request")


def _run_flags(group: Any) -> None:
    group.add_argument("--warmup", type=int, default=0, help="requests sent first and not counted")
    group.add_argument("--warmup-s", type=float, default=0.0, help="requests due in the first seconds are not counted")
    group.add_argument("--max-connections", type=_positive, default=1000)
    group.add_argument("--timeout", type=_seconds, default=600.0, help="seconds a request may take; 0: any")
    group.add_argument("--max-failed-share", type=float, default=1.0, help="exit 3 above (refusals do not count)")
    group.add_argument("--percentiles", type=_percentiles, default="50,90,95,99")
    group.add_argument("--out", help="summary file; records go beside it as .jsonl")
    group.add_argument(
        "--server-log",
        type=Path,
        help="log of the inlaid server on this machine: records get each request's seconds by part",
    )
    group.add_argument("--label", default="", help="what to call this run in reports")
    group.add_argument("--save-detailed", action="store_true", help="per-request lists in the summary, as vLLM")
    group.add_argument("--save-text", action="store_true", help="answers in the records")
    group.add_argument("--no-progress", action="store_true")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        if 0 <= (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")


def _percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
        if all(0 <= value <= 100 for value in values):
            return values
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a list like 50,90,99")


def _json_object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object ({error})") from error


def workload_from(arguments: argparse.Namespace) -> Workload:
    """Read the workload file, or make one stream of the flags; raise ValueError with one clear line."""
    if arguments.workload:
        _refuse_beside_a_file(arguments)
        workload = load_workload(arguments.workload)
        return workload if arguments.rate is None else rescale_rate(workload, arguments.rate)
    try:
        stream = _stream(arguments)
        classes = {"default": _objective(arguments.slo)} if arguments.slo else {}
        return Workload([stream], arguments.seed, classes)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


STREAM_FLAGS = (
    "arrival", "end_rate", "cv", "on_s", "off_s", "within", "num_requests", "duration", "distribution", "alpha",
    "adapter_rates", "input", "output", "max_input", "max_output", "trace", "trace_format", "time_scale", "window",
    "loop", "tenant", "slo", "seed",
)  # fmt: skip


def _refuse_beside_a_file(arguments: argparse.Namespace) -> None:
    """Refuse a flag that the workload file would overrule in silence."""
    parser = build_parser()
    for name in STREAM_FLAGS:
        if getattr(arguments, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --workload: say it in the file")


def _stream(arguments: argparse.Namespace) -> Stream:
    process: Process = arguments.arrival or ("trace" if arguments.trace else "poisson")
    lengths = "trace" if arguments.trace else "fixed:128"
    bounded = arguments.num_requests is not None or arguments.duration is not None or process == "trace"
    return Stream(
        arrival=Arrivals(
            process=process,
            rate=_rate(arguments),
            cv=arguments.cv,
            on_s=arguments.on_s,
            off_s=arguments.off_s,
            end_rate=arguments.end_rate,
            within=arguments.within,
        ),
        adapters=_adapter_choice(arguments),
        input=parse_lengths(arguments.input or lengths, arguments.max_input),
        output=parse_lengths(arguments.output or lengths, arguments.max_output),
        duration_s=arguments.duration,
        num_requests=arguments.num_requests if bounded else 100,
        tenant=arguments.tenant,
        trace=_trace(arguments),
    )


def _trace(arguments: argparse.Namespace) -> Trace | None:
    if not arguments.trace:
        return None
    return Trace(
        path=arguments.trace,
        format=arguments.trace_format,
        time_scale=arguments.time_scale,
        window=tuple(arguments.window) if arguments.window else None,
        loop=arguments.loop,
    )


def _rate(arguments: argparse.Namespace) -> float:
    """Rates of single adapters add up to the stream's; --rate beside them keeps only their ratios."""
    own = [float(rate) for _, rate in _pairs(arguments.adapter_rates)]
    return float(arguments.rate if arguments.rate is not None else sum(own) or 1.0)


def _adapter_choice(arguments: argparse.Namespace) -> AdapterChoice:
    rates = {name: float(weight) for name, weight in _pairs(arguments.adapter_rates)}
    chosen: Distribution = arguments.distribution or ("rates" if rates else "uniform")
    return AdapterChoice(chosen, arguments.alpha, rates=rates)


def parse_lengths(text: str, maximum: int | None = None) -> Lengths:
    """Read `fixed:N`, `uniform:LOW:HIGH`, `lognormal:MEDIAN:SIGMA` or `trace`."""
    kind, *numbers = text.split(":")
    fields = {"fixed": ["value"], "uniform": ["low", "high"], "lognormal": ["median", "sigma"], "trace": []}
    if kind not in fields or len(numbers) != len(fields[kind]):
        raise ValueError(f"length {text!r}: use fixed:N, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA or trace")
    values = {"kind": kind, **dict(zip(fields[kind], numbers, strict=True))}
    if maximum is not None:
        values["high"] = str(min(maximum, int(values.get("high", maximum))))
    try:
        return msgspec.convert(values, Lengths, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"length {text!r}: {error}") from error


def _objective(pairs: list[str]) -> Objective:
    try:
        return msgspec.convert(dict(_pairs(pairs)), Objective, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"--slo {' '.join(pairs)}: {error}; known: ttft_ms, tpot_ms, e2el_ms") from error


def _pairs(texts: list[str]) -> list[tuple[str, str]]:
    for text in texts:
        if "=" not in text:
            raise ValueError(f"{text!r} is not NAME=VALUE")
    return [(text.partition("=")[0], text.partition("=")[2]) for text in texts]
