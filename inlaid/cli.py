"""The `inlaid` command. `flags.py` makes the flags of `serve` and `generate` from the fields of `config.py`. Other
commands add their flags in their own package, which is imported only when that command is given.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inlaid import __version__
from inlaid.config import (
    AdapterConfig,
    CacheConfig,
    ConfigError,
    EngineConfig,
    SchedulerConfig,
    ServerConfig,
    SpeculationConfig,
    TaskConfig,
)
from inlaid.flags import Parser, add_config_arguments, config_from, size
from inlaid.worker import logs, trim

_ROOT = Path(__file__).resolve().parents[1]
_PACKED = Path(__file__).parent / "demo"  # in a wheel
DEMO = _PACKED if _PACKED.is_dir() else _ROOT / "models" / "demo"
SMOLLM2 = _ROOT / "models" / "cache" / "smollm2"
SMOLLM2_ADAPTERS = _ROOT / "models" / "smollm2" / "adapters"
DEMOS = ("tiny", "smollm2")
_MAX_NAMES = 16  # adapters that the line at the start lists

# command, module, function that adds its arguments, function that runs it, help
_PARTS = (
    ("quantize", "inlaid.quant.entry", "add_quantize_arguments", "run_quantize", "quantize a base for several tasks"),
    ("task", "inlaid.quant.entry", "add_task_arguments", "run_task", "add, remove or list the tasks of a base"),
    ("kernels", "inlaid.kernels.command", "add_arguments", "run", "which kernels this machine has, and their times"),
    ("cluster", "inlaid.cluster.command", "add_arguments", "run", "serve a model on many replicas"),
    ("sim", "inlaid.sim.command", "add_arguments", "run", "run a workload on the simulated engine"),
)


class UsageError(ValueError):
    """A command line that cannot be carried out; the message says what to type instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "inlaid"):
            raise
        source = f"--editable {_ROOT}" if (_ROOT / "pyproject.toml").exists() else name
        install = f"install what inlaid needs: {sys.executable} -m pip install {source}"
        print(f"inlaid: {sys.executable} has no {name}; {install}", file=sys.stderr)
        return 2


def _run(arguments: Sequence[str]) -> int:
    args = parse(arguments)
    logs.configure()
    try:
        return int(args.run(args))
    except (ConfigError, UsageError) as error:
        print(f"inlaid: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. SystemExit, after a line on stderr that says what is wrong with it."""
    args, unknown = _parser(arguments[0] if arguments else None).parse_known_args(arguments)
    if unknown:
        known, flag = args.parser._option_string_actions, unknown[0].partition("=")[0]
        close = [each for each in known if each.startswith(flag)] or difflib.get_close_matches(flag, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


def _parser(command: str | None) -> Parser:
    parser = Parser(prog="inlaid", description="One quantized base, hundreds of LoRA adapters.")
    parser.add_argument("--version", action="version", version=f"inlaid {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, help in (
        ("serve", add_serve_arguments, "serve a model and its adapters"),
        ("generate", _add_generate, "answer one prompt, or chat in the terminal"),
    ):
        # Short, as argparse prints the usage before an error, and a list of all flags would hide the error.
        usage = f"inlaid {name} [MODEL] [OPTIONS]  (inlaid {name} --help lists them)"
        add(commands.add_parser(name, help=help, usage=usage, allow_abbrev=False))
    for name, module, add_arguments, run, help in _PARTS:
        _add_part(commands.add_parser(name, help=help), name == command, module, add_arguments, run)
    version = commands.add_parser("version", help="print versions")
    version.set_defaults(run=run_version)
    for each in commands.choices.values():
        each.set_defaults(parser=each)  # an error shows the usage of this command
    return parser


def _add_part(parser: argparse.ArgumentParser, chosen: bool, module: str, add: str, run: str) -> None:
    """Add a command of another package; import the package only when its command is given."""
    if chosen:
        part = importlib.import_module(module)
        getattr(part, add)(parser)
        parser.set_defaults(run=getattr(part, run))


def engine_config(args: argparse.Namespace, model: str) -> EngineConfig:
    """Make the engine's configuration of the given flags."""
    config: EngineConfig = config_from(
        args,
        EngineConfig,
        model=model,
        scheduler=config_from(args, SchedulerConfig),
        cache=config_from(args, CacheConfig),
        adapters=config_from(args, AdapterConfig),
        speculation=config_from(args, SpeculationConfig),
    )
    return config


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="", help="a Hugging Face folder, a .gguf file or a hub id; none: the demo"
    )
    parser.add_argument(
        "--demo",
        choices=DEMOS,
        default=None,
        help="without a model, what is served: the bundled base of 5M parameters (tiny, the default), or a real one of "
        "135M that `bash models/download.sh smollm2` fetches",
    )
    for config in (EngineConfig, SchedulerConfig, CacheConfig, AdapterConfig, SpeculationConfig):
        add_config_arguments(parser, config)


def parse_adapters(given: Sequence[str]) -> dict[str, str]:
    """Parse adapters written as NAME=PATH or as vLLM's JSON {"name": …, "path": …}; return paths by name."""
    adapters: dict[str, str] = {}
    for text in given:
        name, path, _ = _parse_adapter(text)
        if name in adapters:
            raise UsageError(f"adapter {name!r} is given twice")
        adapters[name] = path
    return adapters


def pinned_adapters(args: argparse.Namespace, adapters: Mapping[str, str]) -> list[str]:
    """Return the names that --pin-adapter or an adapter's own JSON pins."""
    named = list(getattr(args, "pin_adapter", []))
    comes_later = args.allow_runtime_lora if hasattr(args, "allow_runtime_lora") else False
    for name in named:
        if name not in adapters and not comes_later:
            raise UsageError(
                f"--pin-adapter {name}: no adapter of that name is served: {', '.join(adapters) or 'none'}"
            )
    return [*named, *(name for name, _, pinned in map(_parse_adapter, args.adapter) if pinned and name not in named)]


def _parse_adapter(text: str) -> tuple[str, str, bool]:
    """Return an adapter's name, its path, and True if its JSON pins it."""
    if text.startswith("{"):
        try:
            values = json.loads(text)
            return str(values["name"]), str(values["path"]), values.get("pinned", False) is True
        except (ValueError, KeyError) as error:
            raise UsageError(f'{text!r} is not an adapter: write NAME=PATH or {{"name": …, "path": …}}') from error
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"{text!r} is not an adapter: write NAME=PATH (and the model before --adapter)")
    return name, path, False


def demo_name(demo: str | None) -> str:
    """Return the name of a demo's base in the API."""
    return "smollm2" if demo == "smollm2" else "demo"


def demo_base(demo: str | None) -> Path:
    """Return the folder of a demo's base. UsageError: it is not here."""
    if demo == "smollm2":
        if not (SMOLLM2 / "config.json").exists():
            raise UsageError(f"the base smollm2 is not at {SMOLLM2}; fetch it: bash models/download.sh smollm2")
        return SMOLLM2
    if not (DEMO / "base" / "config.json").exists():
        raise UsageError(f"no model named, and the bundled demo is not at {DEMO}; name a model")
    return DEMO / "base"


def demo_adapters(demo: str | None) -> dict[str, str]:
    """Return the paths of a demo's adapters by name: those that are bundled, and those trained here."""
    if demo == "smollm2":
        parents = [SMOLLM2_ADAPTERS, SMOLLM2.parent / "smollm2-adapters"]
    else:
        parents = [DEMO / "adapters", DEMO / "extra"]
    folders = [folder for parent in parents for folder in sorted(parent.glob("*"))]
    return {folder.name: str(folder) for folder in folders if (folder / "adapter_config.json").exists()}


def model_and_adapters(model: str, given: dict[str, str], demo: str | None = None) -> tuple[str, dict[str, str]]:
    """Return the model to load and its adapters; a demo brings its own beside those given."""
    if model:
        if demo:
            raise UsageError(f"--demo {demo} serves a model of its own; leave it out, or leave {model} out")
        return model, given
    return str(demo_base(demo)), {**demo_adapters(demo), **given}


# serve


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `inlaid serve`."""
    parser.add_argument(
        "--adapter",
        "--lora-modules",
        dest="adapter",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="serve a LoRA adapter under a name; may be repeated",
    )
    parser.add_argument("--enable-lora", action="store_true", help="accepted as vLLM has it; adapters always work")
    _add_model_arguments(parser)
    for config in (ServerConfig, TaskConfig):
        add_config_arguments(parser, config)
    parser.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    from inlaid.server.serving import serve

    model, adapters = model_and_adapters(args.model, parse_adapters(args.adapter), args.demo)
    args.pin_adapter = pinned_adapters(args, adapters)
    config = config_from(args, ServerConfig, tasks=config_from(args, TaskConfig))
    logs.configure(level=config.log_level, form=config.log_format)
    if not args.model and not config.served_model_name:
        config = replace(config, served_model_name=demo_name(args.demo))
    return run_loop(serve(config, engine_config(args, model), adapters, announce))


def run_loop(main: Any) -> int:
    """Run a coroutine to its end, on uvloop where it is installed."""
    trim.keep_giving_back()
    make: Any = importlib.import_module("uvloop" if importlib.util.find_spec("uvloop") else "asyncio")
    loop = make.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return int(loop.run_until_complete(main))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def announce(service: Any, address: str) -> None:
    """Print the model, its adapters, the address, and a curl command that asks it."""
    model = service.engine.model
    names = sorted(service.engine.adapters)
    asked = names[0] if names else service.names.base
    body = json.dumps({"model": asked, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    path = "/v1/chat/completions"
    if not service.tokenizer.template.exists:
        path, body = "/v1/completions", json.dumps({"model": asked, "prompt": "Hello", "max_tokens": 32})
    lines = [
        f"Serving {service.names.base} ({model.device}, {model.dtype}, up to {model.max_model_len} tokens, "
        f"{model.num_blocks} KV blocks of {model.block_size}{_kv_form(model)})",
        f"  adapters: {_listed(names)}",
        f"  at:       {address}/v1  (metrics: {address}/metrics, API: {address}/openapi.json)",
        f"  ask it:   curl {address}{path} -H 'Content-Type: application/json' -d '{body}'",
    ]
    print("\n".join(lines), flush=True)


def _kv_form(model: Any) -> str:
    """Name the form of keys and values and its bytes, where it is not the usual one."""
    form = model.kv_cache_dtype
    return "" if form == "auto" else f" in {form}, {model.kv_token_bytes / 1024:.1f} KiB a token"


def _listed(names: Sequence[str]) -> str:
    """Join names for one line: the first few, and how many more there are."""
    more = len(names) - _MAX_NAMES
    shown = ", ".join(names[:_MAX_NAMES]) or "none"
    return f"{shown} and {more} more ({len(names)} in all)" if more > 0 else shown


# generate


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", help="answer this and end; without it: a chat in the terminal")
    parser.add_argument("--adapter", help="answer with this adapter: NAME of the demo's, or NAME=PATH or a PATH")
    parser.add_argument("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    parser.add_argument("--max-tokens", type=size, default=256, help="most tokens of an answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    _add_model_arguments(parser)
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    from inlaid.engine.request import SamplingParams
    from inlaid.llm import LLM

    model, adapters, chosen = _generate_adapters(args)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature)
    try:
        llm = LLM(model, adapters, config=engine_config(args, model))
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    chat = llm.tokenizer.template.exists and not args.raw

    def say(conversation: list[dict[str, str]]) -> str:
        prompt: Any = conversation[-1]["content"]
        if chat:
            prompt = llm.tokenizer.encode(llm.tokenizer.template.render(conversation), False)
        text = ""
        for piece in llm.stream(prompt, params, chosen):
            print(piece.text, end="", flush=True)
            text += piece.text
        print(flush=True)
        return text

    if args.prompt is not None:
        try:
            say([{"role": "user", "content": args.prompt}])
        except ValueError as error:
            raise UsageError(str(error)) from error
        return 0
    return _chat(say, chosen or "the base", remember=chat)


def _generate_adapters(args: argparse.Namespace) -> tuple[str, dict[str, str], str | None]:
    """Return the model, the adapters to load (the chosen one only) and the chosen name."""
    if args.adapter is None:
        return model_and_adapters(args.model, {}, args.demo)[0], {}, None
    if "=" in args.adapter:
        (name, path), *_ = parse_adapters([args.adapter]).items()
    elif not args.model and args.adapter in (bundled := demo_adapters(args.demo)):
        name, path = args.adapter, bundled[args.adapter]
    elif Path(args.adapter).is_dir():
        name, path = Path(args.adapter).resolve().name, args.adapter
    else:
        known = "" if args.model else f", nor one of the demo's: {', '.join(demo_adapters(args.demo))}"
        raise UsageError(f"--adapter {args.adapter}: neither NAME=PATH nor a folder{known}")
    return model_and_adapters(args.model, {}, args.demo)[0], {name: path}, name


def _chat(say: Callable[[list[dict[str, str]]], str], who: str, remember: bool) -> int:
    """Answer questions from the terminal until its end of file."""
    print(f"Chatting with {who}; an empty line starts anew, Ctrl-D ends.", file=sys.stderr)
    conversation: list[dict[str, str]] = []
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not question.strip():
            conversation = []
            continue
        conversation = [*(conversation if remember else []), {"role": "user", "content": question}]
        try:
            conversation.append({"role": "assistant", "content": say(conversation)})
        except ValueError as error:
            print(f"inlaid: {error}; starting anew", file=sys.stderr)
            conversation = []


def run_version(args: argparse.Namespace) -> int:
    torch = "no torch"
    if importlib.util.find_spec("torch"):
        torch = f"torch {importlib.metadata.version('torch')}"
    print(f"inlaid {__version__} (Python {platform.python_version()}, {torch})")
    return 0
