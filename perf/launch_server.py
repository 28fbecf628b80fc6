"""VTC's `launch_server.py` by its own flags: a server of inlaid that does what these name there.

    python -m perf.launch_server --scheduler vtc_fair --num-adapter 10 --num-token 10000
    python -m perf.launch_server --model-setting demo --scheduler lshare_fair --rate-limit 10

Clients are told apart by the field `user` of their requests. The admin key, by which `perf.run_exp` switches policies,
is INLAID_ADMIN_KEY, or `vtc`. Flags after `--` are those of `inlaid serve`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from inlaid.flags import Parser
from perf import launch
from perf.random_adapters import RandomAdapters, make_adapters

SCHEDULERS: Mapping[str, str] = MappingProxyType({"slora": "fcfs", "vtc_fair": "vtc", "lcf_fair": "lcf"})
LIMITED = "lshare_fair"
DEMO = Path("models/demo/base")
MODELS: Mapping[str, tuple[str, str]] = MappingProxyType(  # folder, and what models/download.sh calls it
    {
        "S1": ("models/cache/llama-2-7b-4bit", "llama-2-7b"),
        "S4": ("models/cache/llama-2-13b-4bit", "llama-2-13b"),
        "Real": ("models/cache/llama-2-7b-4bit", "llama-2-7b"),
        "demo": (str(DEMO), ""),
    }
)
BLOCK = 16  # tokens of a KV block
RANK = 8
MADE = Path(".inlaid/vtc-adapters")


def admin_key() -> str:
    """Return the key by which run_exp may switch the policy of such a server."""
    return os.environ.get("INLAID_ADMIN_KEY", "vtc")


def policy_of(scheduler: str, rate_limit: int) -> str:
    """Return inlaid's policy for a scheduler of the artifact."""
    return f"rpm:limit={rate_limit}" if scheduler == LIMITED else SCHEDULERS[scheduler]


def arguments(args: argparse.Namespace) -> list[str]:
    """Translate to the flags of `perf.launch`."""
    folder, name = MODELS[args.model_setting]
    model = args.model or folder
    command = ["--model", model, "--policy", policy_of(args.scheduler, args.rate_limit), "--port", str(args.port)]
    if name and not args.model:
        command += ["--fetch", name]
    if args.num_adapter and not args.no_lora:
        command += ["--adapters", *(f"{adapter}={path}" for adapter, path in _adapters(Path(model), args.num_adapter))]
    blocks = -(-args.num_token // BLOCK)
    more = args.more[1:] if args.more[:1] == ["--"] else args.more
    sizes = ["--block-size", str(BLOCK), "--num-blocks", str(blocks)]
    return [*command, "--", "--tenant", "user", "--admin-key", admin_key(), *sizes, *more]


def _adapters(model: Path, count: int) -> list[tuple[str, str]]:
    """Make random adapters of the model's shape."""
    if not (model / "config.json").exists():
        raise SystemExit(f"{model} is not there: bash models/download.sh, or name one by --model")
    return make_adapters(model, RandomAdapters(count, (RANK,), seed=0), MADE / model.name, progress=False)


def parser() -> Parser:
    """Return the parser of the artifact's flags."""
    made = Parser(prog="perf.launch_server", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--model-setting", choices=list(MODELS), default="S1", help="7B (S1, Real), 13B (S4) or the demo")
    made.add_argument("--scheduler", choices=[*SCHEDULERS, LIMITED], default="vtc_fair", help="who goes next")
    made.add_argument("--rate-limit", type=int, default=20, help="requests a minute of a client, with lshare_fair")
    made.add_argument("--enable-abort", action="store_true", help="accepted: what is above a limit is refused anyway")
    made.add_argument("--num-adapter", type=int, default=0, help="random adapters of rank 8")
    made.add_argument("--num-token", type=int, default=10000, help="KV memory in tokens")
    made.add_argument("--no-lora", action="store_true", help="no adapters; clients are told apart all the same")
    made.add_argument("--model", default="", help="another model's folder (default: that of the setting)")
    made.add_argument("--port", type=int, default=8000, help="port of the server")
    made.add_argument("more", nargs=argparse.REMAINDER, help="-- and flags of inlaid serve")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return launch.main(arguments(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
