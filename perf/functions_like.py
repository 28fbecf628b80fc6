"""`python -m perf.functions_like --out FILE.csv`: a trace with the format and statistics of Azure's functions (2019).

Azure's own (`azurefunctions-dataset2019` of Azure/AzurePublicDataset) may be put in its place: `inlaid sim --suite
placement --trace FILE.csv` reads both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from inlaid.flags import Parser
from inlaid.workload.functions import MINUTES, synthetic, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the trace, and print its mean rate."""
    parser = Parser(prog="perf.functions_like", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--functions", type=int, default=4_000, help="Azure's first day has about 46,000")
    parser.add_argument("--minutes", type=int, default=MINUTES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    made = synthetic(args.functions, args.seed, args.minutes)
    write(args.out, made)
    calls = sum(len(made.calls(minute, args.seed)) for minute in range(0, args.minutes, 30))
    seconds = 60 * len(range(0, args.minutes, 30))
    print(f"wrote {args.out}: {args.functions} functions, {calls / seconds:.1f} calls a second without busy minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
