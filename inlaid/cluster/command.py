"""`inlaid cluster`: a server over many replicas, and `inlaid cluster status`: its replicas, adapters and queues.

On one machine each replica is a process of the server's own, on a GPU of its own where there are GPUs. With
`--ray-address` Ray Serve places and watches the replicas (`ray_app.py`).
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from inlaid import cli
from inlaid.cluster.client import ClusterClient
from inlaid.cluster.fleet import MakeReplica
from inlaid.cluster.images import Images
from inlaid.cluster.placement import PLACEMENTS, make_placement
from inlaid.cluster.planner import BoundsPlanner, Router, SloPlanner, router_of
from inlaid.cluster.pricing import Pricer
from inlaid.cluster.scaler import Scaler
from inlaid.cluster.view import Prices
from inlaid.config import ConfigError, EngineConfig, ServerConfig, TaskConfig
from inlaid.flags import config_from
from inlaid.worker import logs
from inlaid.worker.client import EngineClient
from inlaid.workload.toml import load_toml

_PLACEMENT = "predicted"
_OF_OBJECTIVE = 0.8  # what placement aims at, as prompts come on top of its steps of decodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `inlaid cluster`: those of `inlaid serve`, and its own."""
    cli.add_serve_arguments(parser)
    parser.add_argument(
        "--replicas", type=replicas, default=(1, 1), metavar="MIN:MAX", help="how many replicas; N alone: exactly N"
    )
    parser.add_argument(
        "--placement", choices=sorted(PLACEMENTS), default=_PLACEMENT, help="which replica gets a request"
    )
    parser.add_argument(
        "--ray-address",
        default="",
        help="let Ray Serve place the replicas: host:port, auto, or local to start a Ray here",
    )
    parser.add_argument(
        "--gpus-per-replica", type=float, help="with Ray; default: 1 where the cluster has GPUs, else 0"
    )
    parser.add_argument(
        "--on-replica-death",
        choices=("resume", "fail"),
        default="resume",
        help="a stream whose replica dies goes on elsewhere, or ends with an error",
    )
    parser.add_argument(
        "--weights-from",
        choices=("peer", "disk"),
        default="peer",
        help="where a replica that is added gets its weights and adapters: from memory that a running one has written "
        "(on CPUs and without Ray), or from its files",
    )
    parser.add_argument(
        "--standby",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep a process with its libraries loaded for the next replica that is added (without Ray)",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="with status: where the cluster serves")
    parser.add_argument(
        "--ttft-slo", type=float, default=1.0, metavar="S", help="seconds to the first token, to scale by"
    )
    parser.add_argument("--tpot-slo", type=float, default=0.1, metavar="S", help="seconds for each token after it")
    parser.add_argument(
        "--router", type=Path, metavar="FILE.toml", help="scale by the bounds of a template's [router] instead"
    )
    parser.usage = "inlaid cluster [MODEL | status] [OPTIONS]  (inlaid cluster --help lists them)"


def replicas(text: str) -> tuple[int, int]:
    """Read MIN:MAX or N."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX or a number")
    least, most = int(found[1]), int(found[2] or found[1])
    if not 1 <= least <= most <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1 replica, and MIN at most MAX")
    return least, most


def run(args: argparse.Namespace) -> int:
    """Serve, or print the status."""
    if args.model == "status" and not Path("status").is_dir():
        return status(args.url)
    from inlaid.server.serving import serve

    model, adapters = cli.model_and_adapters(args.model, cli.parse_adapters(args.adapter), args.demo)
    args.pin_adapter = cli.pinned_adapters(args, adapters)
    config = config_from(args, ServerConfig, tasks=config_from(args, TaskConfig))
    logs.configure(level=config.log_level, form=config.log_format)
    if not args.model and not config.served_model_name:
        config = replace(config, served_model_name=cli.demo_name(args.demo))
    print(
        f"Starting {args.replicas[0]} replicas of {model} with {len(adapters)} adapters …", file=sys.stderr, flush=True
    )
    make = partial(make_client, args)
    return cli.run_loop(serve(config, cli.engine_config(args, model), adapters, cli.announce, make_engine=make))


def make_client(
    args: argparse.Namespace,
    config: EngineConfig,
    adapters: Mapping[str, str],
    *,
    on_death: str,
    timeout: float,
    give_up: Callable[[str], None],
    environment: Mapping[str, str],
    **options: Any,
) -> ClusterClient:
    """Make the cluster's client in the place of one engine's."""
    least, most = args.replicas
    if args.router is not None:
        bounds = read_router(args.router)
        least = bounds.least
    if args.ray_address:
        from inlaid.cluster.ray_app import ray_replicas

        make = ray_replicas(args.ray_address, args.gpus_per_replica, timeout, environment)
    else:
        make = local_replicas(on_death=on_death, timeout=timeout, environment=environment, **options)
    prices = Prices()
    client = ClusterClient(
        config,
        adapters,
        make=make,
        placement=make_placement(args.placement, prices, objective=_OF_OBJECTIVE * args.tpot_slo),
        count=least,
        resume=args.on_replica_death == "resume",
        give_up=give_up,
    )
    client.fleet.keeps_standby = args.standby and not args.ray_address
    if args.weights_from == "peer" and not args.ray_address and hasattr(os, "memfd_create"):
        client.fleet.images = Images()
    if args.router is not None:
        client.loops.append(Scaler(BoundsPlanner(bounds), client.fleet, client.demand))
    elif most > least:
        planner = SloPlanner(least, most, prices, args.ttft_slo, args.tpot_slo)
        client.loops.append(Scaler(planner, client.fleet, client.demand))
    client.loops.append(Pricer(prices, client.fleet, lambda: client.adapters.values()))
    return client


def read_router(path: Path) -> Router:
    """Read the bounds of a template, with the figures of the first model that it selects."""
    try:
        data = load_toml(path)
        selected = data.get("selection", {}).get("models", [])
        return router_of(data.get("router", {}), data["models"][selected[0]] if selected else {})
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"--router {path}: {error}") from error


def local_replicas(
    *, on_death: str = "restart", timeout: float = 0.0, environment: Mapping[str, str] | None = None, **options: Any
) -> MakeReplica:
    """Return what makes a replica as a process of this machine; the k-th takes the k-th GPU, if there are any."""
    numbers, devices = itertools.count(), visible_devices()

    def make(
        name: str, config: EngineConfig, adapters: Mapping[str, str], give_up: Callable[[str], None]
    ) -> EngineClient:
        own = {**(environment or {}), logs.NAME: name}
        if devices:
            own["CUDA_VISIBLE_DEVICES"] = devices[next(numbers) % len(devices)]
        return EngineClient(
            config,
            adapters,
            on_death=on_death,
            timeout=timeout,
            give_up=give_up,
            environment=own,
            report_load=True,
            **options,
        )

    return make


def visible_devices() -> list[str]:
    """List the GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name and name != "-1"]
    return [str(number) for number, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*")))]


def status(url: str) -> int:
    """Print the replicas of a running cluster, the adapters on the device of each, and their queues."""
    try:
        health = _get(url, "/health")
        metrics = _get(url, "/metrics", plain=True)
        adapters = _get(url, "/v1/adapters", optional=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no cluster answers at {url}: {error}; name another with --url") from error
    states: dict[str, str] = health.get("replicas") or {}
    if not states:
        raise ConfigError(f"{url} is one engine, not a cluster")
    figures = re.findall(r'^inlaid:replica_requests_(\w+)\{replica="([^"]+)"\} (\S+)$', metrics, re.M)
    queues = {(name, kind): float(value) for kind, name, value in figures}
    on_device: dict[str, list[str]] = {}
    for card in (adapters or {}).get("adapters", ()):
        for name, tier in card["replicas"].items():
            if tier == "device":
                on_device.setdefault(name, []).append(card["name"])
    for name, state in states.items():
        running, waiting = (int(queues.get((name, kind), 0)) for kind in ("running", "waiting"))
        there = ", ".join(sorted(on_device.get(name, ()))) or "none"
        print(f"{name}  {state:<8}  running {running}, waiting {waiting}  on the device: {there}")
    return 0


def _get(url: str, path: str, plain: bool = False, optional: bool = False) -> Any:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200 and not optional:
            raise ValueError(f"{path} answers {answer.status}")
        return body.decode() if plain else json.loads(body) if answer.status == 200 else None
    finally:
        connection.close()
