"""Commands that start each kind of server: inlaid, its peers, and the fake one.

The runner asks for a command; `python -m perf.launch` (behind `perf/launch_server_*.sh`) runs one, or several
replicas of it, in the foreground until Ctrl-C.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import msgspec

from inlaid.flags import Parser
from perf import peers

ServerKind = Literal["inlaid", "vllm", "slora", "fake"]
Adapter = tuple[str, str]  # name, path
CACHE = Path("models/cache")  # where models/download.sh puts them

READY_PATHS: Mapping[ServerKind, str] = MappingProxyType(
    {"inlaid": "/ready", "vllm": "/health", "slora": "/health", "fake": "/ready"}
)
INSTALL: Mapping[ServerKind, str] = MappingProxyType(
    {
        "vllm": "vLLM is not installed here. In an environment of its own: pip install vllm  "
        "(then put its bin/ on PATH)",
        "slora": "S-LoRA is not installed here. It needs CUDA 11.8, torch 2.0.1 and triton 2.1 in its own environment: "
        "git clone https://github.com/S-LoRA/S-LoRA && cd S-LoRA && pip install -e .  (then name its python by "
        "PEER_PYTHON)",
    }
)


class ServerCommand(msgspec.Struct, frozen=True):
    """One server to start. `arguments` are its own flags: true gives the flag alone, false leaves it out."""

    kind: ServerKind
    model: str
    adapters: list[Adapter] = []
    policy: str = ""
    arguments: dict[str, str | int | float | bool] = {}

    def argv(self, port: int | str) -> list[str]:
        return _COMMANDS[self.kind](self, str(port))


def _inlaid(server: ServerCommand, port: str) -> list[str]:
    command = [sys.executable, "-m", "inlaid", "serve", *([server.model] if server.model else []), "--port", port]
    return command + _policy(server) + _pairs("--adapter", server.adapters) + _flags(server)


def _fake(server: ServerCommand, port: str) -> list[str]:
    command = [sys.executable, "-m", "perf.fake_server", "--port", port]
    return command + _policy(server) + _pairs("--adapter", server.adapters) + _flags(server)


def _vllm(server: ServerCommand, port: str) -> list[str]:
    command = ["vllm", "serve", server.model, "--host", "127.0.0.1", "--port", port]
    if server.adapters:
        modules = [f"{name}={path}" for name, path in server.adapters]
        command += [
            "--enable-lora",
            *peers.flags(peers.lora_flags(server.adapters, server.arguments), peers.VLLM, "vLLM"),
        ]
        command += ["--lora-modules", *modules]
    return command + peers.flags(server.arguments, peers.VLLM, "vLLM")


def _slora(server: ServerCommand, port: str) -> list[str]:
    command = [peer_python(), "-m", "slora.server.api_server", "--model_dir", server.model, "--port", port]
    command += ["--tokenizer_mode", "auto", "--swap"]
    if server.policy:
        command += ["--scheduler", server.policy]
    for _, path in server.adapters:
        command += ["--lora-dirs", path]
    return command + peers.flags(server.arguments, peers.SLORA, "S-LoRA")


def peer_python() -> str:
    """Return the interpreter of a peer that is started as a module: PEER_PYTHON, or else this one."""
    return os.environ.get("PEER_PYTHON") or sys.executable


_COMMANDS = MappingProxyType({"inlaid": _inlaid, "fake": _fake, "vllm": _vllm, "slora": _slora})


def _policy(server: ServerCommand) -> list[str]:
    return ["--policy", server.policy] if server.policy else []


def _pairs(flag: str, adapters: list[Adapter]) -> list[str]:
    return [part for name, path in adapters for part in (flag, f"{name}={path}")]


def _flags(server: ServerCommand) -> list[str]:
    flags: list[str] = []
    for name, value in server.arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is not False:
            flags += [flag] if value is True else [flag, str(value)]
    return flags


def why_absent(kind: ServerKind) -> str:
    """Say what to install to start this kind of server here, or nothing."""
    if kind == "vllm":
        return "" if shutil.which("vllm") else INSTALL[kind]
    if kind == "slora" and peer_python() != sys.executable:
        found = subprocess.run([peer_python(), "-c", "import slora"], capture_output=True, check=False)
        return "" if not found.returncode else f"PEER_PYTHON ({peer_python()}) has no slora. {INSTALL[kind]}"
    module = {"inlaid": "inlaid", "slora": "slora", "fake": "perf"}[kind]
    return "" if importlib.util.find_spec(module) else INSTALL.get(kind, f"{module} is not importable here")


def find_adapters(patterns: list[str]) -> list[Adapter]:
    """Find adapters by NAME=PATH, a folder, or a glob of folders, which are named by themselves."""
    found: list[Adapter] = []
    for pattern in patterns:
        name, equals, path = pattern.partition("=")
        if equals:
            found.append((name, path))
            continue
        folders = sorted(p for p in glob.glob(pattern) if (Path(p) / "adapter_config.json").is_file())
        if not folders:
            raise ValueError(f"no adapter (a folder with adapter_config.json) at {pattern}")
        found += [(Path(folder).name, folder) for folder in folders]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="perf.launch",
        description="Start a server, or replicas of it on neighbouring ports. Arguments after -- are the server's own.",
        allow_abbrev=False,  # --mode is not short for --model
    )
    parser.add_argument("--kind", choices=get_args(ServerKind), default="inlaid")
    parser.add_argument("--model", default="", help="folder or hub id; inlaid without one serves the demo")
    parser.add_argument("--fetch", default="", help="what models/download.sh calls the model, for the advice")
    parser.add_argument("--adapters", nargs="*", default=[], help="NAME=PATH, folders, or quoted globs")
    parser.add_argument("--merged", nargs="*", default=[], help="merged models, one a replica (instead of --model)")
    parser.add_argument("--replicas", type=int, choices=(1, 2, 4), default=1)
    parser.add_argument("--policy", default="")
    parser.add_argument("--mode", default="", help="inlaid's --adapter-mode: how an adapter gets ready")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--print", action="store_true", help="show the commands and start nothing")
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        commands = replica_commands(arguments)
    except ValueError as error:
        print(f"perf.launch: {error}", file=sys.stderr)
        return 2
    for command, extra in commands:
        shown = " ".join(f"{key}={value}" for key, value in extra.items())
        print(f"{shown} {shlex.join(command)}".strip(), flush=True)
    return 0 if arguments.print else run_until_stopped(commands)


def replica_commands(arguments: argparse.Namespace) -> list[tuple[list[str], dict[str, str]]]:
    """Make a command and its environment for each replica; replicas take the GPUs in turn."""
    problem = "" if arguments.print else why_absent(arguments.kind) or why_no_model(arguments)
    if problem:
        raise ValueError(problem)
    if arguments.mode and arguments.kind != "inlaid":
        raise ValueError(f"--mode is inlaid's; {arguments.kind} has no adapter modes")
    if arguments.policy and arguments.kind == "vllm":
        raise ValueError("--policy: vLLM has none of ours; give it its own flags after --")
    if arguments.merged and len(arguments.merged) != arguments.replicas:
        raise ValueError(f"--replicas {arguments.replicas} needs as many --merged models, not {len(arguments.merged)}")
    adapters = [] if arguments.merged else find_adapters(arguments.adapters)
    gpus = _gpus()
    commands = []
    for replica in range(arguments.replicas):
        model = arguments.merged[replica] if arguments.merged else arguments.model
        modes: dict[str, str | int | float | bool] = {"adapter-mode": arguments.mode} if arguments.mode else {}
        server = ServerCommand(arguments.kind, model, adapters, arguments.policy, modes)
        own = _share_of_gpu(arguments, len(gpus)) + arguments.rest
        extra = {"CUDA_VISIBLE_DEVICES": gpus[replica % len(gpus)]} if gpus and arguments.replicas > 1 else {}
        commands.append((server.argv(arguments.port + replica) + own, extra))
    return commands


def why_no_model(arguments: argparse.Namespace) -> str:
    """Say how to get a model whose folder is missing, or nothing."""
    for model in arguments.merged or [arguments.model]:
        if model.startswith(("/", ".", "models/")) and not Path(model).is_dir():
            advice = "fetch it" if arguments.merged else how_to_get(model, arguments.fetch)
            return f"there is no model at {model}: {advice} (or name yours: MODEL=FOLDER)"
    return ""


def how_to_get(model: str, fetch: str = "") -> str:
    """Say how to get a model that is missing; `fetch` is its name for models/download.sh where the path does not tell.

    The advice quantizes for general text; quantizing for one's own tasks is better (README).
    """
    name = fetch or (Path(model).name.removesuffix("-4bit") if Path(model).parent == CACHE else "")
    if not name:
        return "fetch it"
    advice = f"bash models/download.sh model {name}"
    if model.endswith("-4bit"):
        task = "general=none:eval/generic.jsonl"
        advice += f", then: inlaid quantize {CACHE / name} --bits 4 --out {model} --task {task}"
    return advice


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def _share_of_gpu(arguments: argparse.Namespace, gpus: int) -> list[str]:
    """Replicas of vLLM on one GPU must each be told their part of its memory."""
    on_one = -(-arguments.replicas // max(gpus, 1))
    if arguments.kind != "vllm" or on_one == 1:
        return []
    return ["--gpu-memory-utilization", f"{0.9 / on_one:.3f}"]


def run_until_stopped(commands: list[tuple[list[str], dict[str, str]]]) -> int:
    """Run the replicas; when one ends, or on Ctrl-C or SIGTERM, end the others and return."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wardens = [
        subprocess.Popen(
            [sys.executable, "-m", "perf.warden", "--", *command],
            stdin=subprocess.PIPE,
            env={**os.environ, **extra},
            start_new_session=True,
        )
        for command, extra in commands
    ]
    try:
        while all(warden.poll() is None for warden in wardens):
            time.sleep(0.2)
        return next(code for warden in wardens if (code := warden.poll()) is not None)
    except KeyboardInterrupt:
        return 130
    finally:
        for warden in wardens:
            assert warden.stdin is not None
            warden.stdin.close()
        for warden in wardens:
            warden.wait()


if __name__ == "__main__":
    sys.exit(main())
