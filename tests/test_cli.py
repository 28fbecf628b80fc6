"""The command line: flags made from the configuration, adapters in every spelling, one-line errors, answers."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from inlaid import cli, flags
from inlaid.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    SchedulerConfig,
    ServerConfig,
    SpeculationConfig,
)

CONFIGS = [EngineConfig, SchedulerConfig, CacheConfig, AdapterConfig, SpeculationConfig, ServerConfig]


def parse(*arguments: str) -> argparse.Namespace:
    return cli.parse(arguments)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_a_flag_with_help(config: type) -> None:
    parser = argparse.ArgumentParser()
    flags.add_config_arguments(parser, config)
    text = " ".join(parser.format_help().split())
    hints = get_type_hints(config)
    for each in fields(config):
        if each.name != "model" and not is_dataclass(hints[each.name]):
            assert f"--{each.name.replace('_', '-')}" in text
            assert each.metadata["help"]


def test_no_flags_give_the_defaults() -> None:
    args = parse("serve")
    assert cli.engine_config(args, "") == EngineConfig()
    assert flags.config_from(args, ServerConfig) == ServerConfig()


def test_flags_reach_their_configuration() -> None:
    args = parse(
        *("serve", "a/model", "--max-model-len", "4k", "--max-num-seqs", "8", "--no-enable-prefix-caching"),
        *("--max-loras", "3", "--api-key", "one", "--api-key", "two", "--gpu-memory-utilization", "0.5"),
        *("--linear-backend", "triton", "--enforce-eager"),
    )
    config = cli.engine_config(args, args.model)
    assert config == EngineConfig(
        model="a/model",
        max_model_len=4000,
        linear_backend="triton",
        enforce_eager=True,
        scheduler=SchedulerConfig(max_num_seqs=8),
        cache=CacheConfig(enable_prefix_caching=False, gpu_memory_utilization=0.5),
        adapters=AdapterConfig(max_loras=3),
    )
    assert flags.config_from(args, ServerConfig) == ServerConfig(api_key=("one", "two"))


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("4k", 4000), ("4K", 4096), ("1.5k", 1500), ("2m", 2_000_000), ("-1", -1)]
)
def test_sizes(text: str, value: int) -> None:
    assert flags.size(text) == value


@pytest.mark.parametrize("text", ["", "k", "x", "1.5", "1e3", "0.0001k", "nan", "infk"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        flags.size(text)


def test_adapters_in_every_spelling() -> None:
    args = parse("serve", "--adapter", "a=/x", "--lora-modules", "b=/y=z", '{"name": "c", "path": "/w"}')
    assert cli.parse_adapters(args.adapter) == {"a": "/x", "b": "/y=z", "c": "/w"}
    for bad in ("a", "=x", "a=", "{", '{"name": "a"}'):
        with pytest.raises(cli.UsageError, match="is not an adapter"):
            cli.parse_adapters([bad])
    with pytest.raises(cli.UsageError, match="twice"):
        cli.parse_adapters(["a=1", "a=2"])


def test_adapters_are_pinned_by_flag_or_by_their_own_json() -> None:
    args = parse("serve", "--adapter", "a=/x", '{"name": "b", "path": "/y", "pinned": true}', "--pin-adapter", "a")
    assert cli.pinned_adapters(args, cli.parse_adapters(args.adapter)) == ["a", "b"]
    unknown = parse("serve", "--adapter", "a=/x", "--pin-adapter", "c")
    with pytest.raises(cli.UsageError, match="no adapter of that name is served: a"):
        cli.pinned_adapters(unknown, {"a": "/x"})
    later = parse("serve", "--pin-adapter", "c", "--allow-runtime-lora")
    assert cli.pinned_adapters(later, {}) == ["c"]


def test_no_model_is_the_demo_with_its_adapters() -> None:
    model, adapters = cli.model_and_adapters("", {"mine": "/m"})
    assert Path(model).is_dir()
    assert len(adapters) == 14  # of twelve tasks, `tools`, and mine
    assert cli.model_and_adapters("x/y", {"mine": "/m"}) == ("x/y", {"mine": "/m"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--prot", "3"), "unrecognized arguments: --prot; did you mean --port?"),
        (("serve", "--max-lora=3"), "did you mean --max-loras?"),
        (("generate", "--temp", "1"), "--temp; did you mean --temperature?"),
        (("serve", "--port", "x"), "'x' is not a whole number"),
        (("version", "please"), "unrecognized arguments: please"),
    ],
)
def test_a_wrong_flag_is_two_lines(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert message in error
    assert usage.startswith(f"usage: inlaid {arguments[0]}")


def test_every_flag_of_every_command_has_help_that_tells_its_default() -> None:
    bare, silent = [], []
    for command in ("serve", "generate", *(name for name, *_ in cli._PARTS)):
        (commands,) = (a for a in cli._parser(command)._actions if isinstance(a, argparse._SubParsersAction))
        parsers = [commands.choices[command]]
        for parser in parsers:
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += action.choices.values()
                    continue
                if not action.help:
                    bare.append((command, action.dest))
                elif action.option_strings and not action.required and action.dest != "help":
                    shown = parser.formatter_class("inlaid")._get_help_string(action)
                    silent += [] if "default" in shown else [(command, action.dest)]
    assert bare == [], "flags without help"
    assert silent == [], "flags whose help tells no default"


def test_flags_of_the_server_come_in_groups() -> None:
    parser = flags.Parser()
    for config in CONFIGS:
        flags.add_config_arguments(parser, config)
    sizes = {group.title: len(group._group_actions) for group in parser._action_groups}
    assert len(sizes) > 10
    assert max(sizes.values()) <= 14, "a heap: begin a section"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--policy", "nobody"), "unknown policy 'nobody'"),
        (("--policy", "vtc:predict=5"), "policy vtc"),
        (("--max-num-seqs", "0"), "max_num_seqs is 0; it must be at least 1"),
        (("--block-size", "0"), "--block-size 0: give 1 or more"),
        (("--gpu-memory-utilization", "9"), "--gpu-memory-utilization 9.0: give a number from 0.01 to 1"),
        (("--engine-timeout", "nan"), "--engine-timeout nan: give 0 or more"),
        (("--port", "70000"), "--port 70000: give a number from 0 to 65535"),
        (("--require-eval", "/nowhere"), "--require-eval /nowhere: there is no such file"),
        (("--adapter", "a=/nowhere"), "there is no adapter folder /nowhere"),
    ],
)
def test_flags_are_checked_before_the_model_is_loaded(
    arguments: tuple[str, ...],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inlaid.worker.client.EngineClient.start", None)
    assert cli.main(["serve", *(() if "--port" in arguments else ("--port", "0")), *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "oading" not in said


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "inlaid", *arguments], capture_output=True, text=True, timeout=120)


def test_version() -> None:
    ended = run("version")
    assert ended.returncode == 0
    assert ended.stdout.startswith("inlaid ")


def test_a_python_without_what_is_needed_is_one_line(tmp_path: Path) -> None:
    """`-S` leaves out site-packages, as a bare Python is."""
    bare = [sys.executable, "-S", "-c", "from inlaid.cli import main; raise SystemExit(main())"]
    env = {"PYTHONPATH": str(cli.DEMO.parents[1])}
    ended = subprocess.run([*bare, "version"], capture_output=True, text=True, env=env, check=False)
    assert (ended.returncode, ended.stdout.strip().endswith("no torch)")) == (0, True)
    ended = subprocess.run([*bare, "serve"], capture_output=True, text=True, env=env, check=False)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"inlaid: {sys.executable} has no ")
    assert "-m pip install" in line


def test_generate_answers_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("generate", "--adapter", "to_velar", "--max-tokens", "8", "--max-model-len", "128")
    once = run(*arguments, "--prompt", "hello there")
    assert once.returncode == 0, once.stderr
    assert once.stdout.strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello there\n\nhello there\n"))
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [once.stdout.strip("\n")] * 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("generate", "/nowhere", "--prompt", "a"), "/nowhere"),
        (("generate", "--adapter", "nobody", "--prompt", "a"), "to_velar"),
        (("serve", "/nowhere", "--port", "0"), "/nowhere"),
        (("serve", "--port", "0", "--adapter", "nothing"), "NAME=PATH"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_thousand_adapters_are_one_line() -> None:
    assert cli._listed([]) == "none"
    assert cli._listed(["a", "b"]) == "a, b"
    names = [f"task-{index:04}" for index in range(1000)]
    assert cli._listed(names).startswith("task-0000, task-0001, ")
    assert cli._listed(names).endswith("task-0015 and 984 more (1000 in all)")
