"""Fetch every listed base model and adapter into models/cache: `python -m models.download_all`."""

from __future__ import annotations

import sys
from pathlib import Path

from data.fetching import fetch_each
from inlaid.flags import Parser
from models import download_lora, download_model, download_smollm2, hub


def main(argv: list[str] | None = None) -> int:
    """Fetch everything that can be had and return the exit status."""
    parser = Parser(prog="python -m models.download_all", description=__doc__)
    parser.add_argument("--output", type=Path, default=hub.CACHE, help="folder to fetch into (default: models/cache)")
    output = parser.parse_args(argv).output
    models = download_model.jobs(list(download_model.MODELS), output)
    bases = [base for base, adapters in download_lora.ADAPTERS.items() if adapters]
    return fetch_each(
        "download", [download_smollm2.job(output), *models, *download_lora.jobs(bases, output / "adapters")]
    )


if __name__ == "__main__":
    sys.exit(main())
