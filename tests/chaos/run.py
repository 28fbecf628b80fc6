"""The long forms of the chaos suite: `python -m tests.chaos.run KIND`, each until its time or its count is over. What
it found is written to a file with its provenance; the exit status is 1 if anything is not as `docs/trust.md` promises.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from inlaid.files import write_atomically
from inlaid.report.provenance import provenance
from tests.chaos.attackers import Rates, attack
from tests.chaos.fake_server import Nursery, ended
from tests.chaos.kills import Kills
from tests.chaos.mix import Mix, flags
from tests.server.live import DEMO, serving


def mix(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Run everything beside ordinary traffic; return what happened, and True if all of it was as promised."""
    rates = Rates(mutants_per_second=args.rate, attack_pause=1.0, change_pause=0.5)
    return _mixed(args, rates)


def mutated(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Send mutated requests as fast as a server without a model answers them."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        root = Path(folder) / "root"
        for name in ("maths", "code"):
            (root / name).mkdir(parents=True)
        nursery = Nursery()
        server = nursery.started(Path(folder) / "state.json", root)
        try:
            assert (
                server.admin("POST", "/v1/load_lora_adapter", {"lora_name": "maths", "lora_path": "maths"}).status
                == 200
            )
            rates = Rates(mutants=12, attack_pause=0.0)
            tally = attack(server.url, server.address, root, args.seed, rates, args.seconds, args.count or 1_000_000)
            restarts = server.ask("GET", "/health").json["restarts"]
        finally:
            ended(server)
            nursery.close()
    found = {
        "mutated requests": tally.num_mutants,
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "answers of 500 and more that are not stated": tally.faults[:50],
        "slowest requests": [f"{seconds:.2f} s {what}" for seconds, what in tally.slowest],
        "engine restarts": restarts,
    }
    return found, not tally.faults and not restarts


def _mixed(args: argparse.Namespace, rates: Rates) -> tuple[dict[str, Any], bool]:
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, serving(*flags(Path(folder))) as server:
        found = asyncio.run(Mix(server, Path(folder), args.seed, rates).run(args.seconds, args.count))
        found["last lines of the log"] = [line.rstrip() for line in server.log[-20:]]
    faults = found["answers of 500 and more that are not stated"] + found["wrong answers"]
    return found, not faults and found["held after"] == found["held before"]


def kills(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Kill engine and server at random while changes and answers are asked for."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        killed = Kills(Path(folder), args.seed)
        killed.run(args.count or 1000, args.seconds)
    return {**killed.counts, "faults": killed.faults}, not killed.faults


def quantizer(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Kill the quantizer at random."""
    from tests.chaos.quantizer import QuantizerKills  # imports torch, which the other kinds do without

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        killed = QuantizerKills(Path(folder), args.seed)
        killed.run(args.count or 1000, args.seconds)
    return {**killed.counts, "faults": killed.faults}, not killed.faults


def loads(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Load, swap, unload and ask adapters at random."""
    from tests.chaos.loads import Loads

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        found = Loads(Path(folder), args.seed).run(args.count or 100_000, args.seconds)
    return found, not found["faults"]


def folders(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Read hostile folders: of ten, nine adapters and a base."""
    from tests.chaos.reading import adapter_reader, read_base, read_spoilt
    from tests.quant.tiny import write_base

    count = args.count or 10_000
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        sources = DEMO / "adapters" / "to_velar", write_base(Path(scratch) / "base")
        readers = adapter_reader(DEMO / "base"), read_base
        first = args.seed * 1_000_000
        seeds = range(first, first + count * 9 // 10), range(first, first + count // 10)
        adapters, bases = (read_spoilt(r, s, Path(scratch), n) for r, s, n in zip(readers, sources, seeds))
    return {"adapters": adapters, "bases": bases}, not adapters["faults"] and not bases["faults"]


def main() -> int:
    """Run one kind and write what it found."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.run", description=__doc__)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--seconds", type=float, default=3600.0, help="end after so many seconds (default: an hour)")
    parser.add_argument("--count", type=int, default=0, help="end after so many requests, kills, changes or folders")
    parser.add_argument("--rate", type=float, default=10.0, help="mutated requests a second in the mix")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file for what was found, with its provenance")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # servers are ended on the way
    found, good = KINDS[args.kind](args)
    text = json.dumps({"provenance": provenance(args.seed), "as promised": good, **found}, indent=1)
    if args.out is not None:
        write_atomically(args.out, text.encode() + b"\n")
    print(text)
    return 0 if good else 1


KINDS = {"mix": mix, "mutated": mutated, "kills": kills, "quantizer": quantizer, "loads": loads, "folders": folders}

if __name__ == "__main__":
    sys.exit(main())
