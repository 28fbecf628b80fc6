"""Fetch public adapters for a base model into models/cache/adapters: `python -m models.download_lora llama-2-7b`.

Any adapter's hub id works too. Only safetensors are fetched: an adapter published as a pickle is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from data.fetching import DownloadError, Job, fetch_each
from inlaid.flags import Parser
from models import hub
from models.download_model import MODELS

ADAPTERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "llama-2-7b": ("yard1/llama-2-7b-sql-lora-test", "FinGPT/fingpt-mt_llama2-7b_lora"),
        "llama-2-13b": ("FinGPT/fingpt-sentiment_llama2-13b_lora",),
        "llama-3.1-8b": (
            "nvidia/llama-3.1-nemoguard-8b-topic-control",
            "algoprog/fact-generation-llama-3.1-8b-instruct-lora",
            "philschmid/code-llama-3-1-8b-text-to-sql-lora",
            "pbevan11/llama-3.1-8b-ocr-correction",
        ),
        "qwen2.5-7b": (),
    }
)
PATTERNS = ("adapter_config.json", "adapter_model.safetensors")


def jobs(names: Sequence[str], output: Path) -> list[Job]:
    """Return one job for each adapter of the named bases, and one for each name that is a hub id."""
    found: list[Job] = []
    for name in names:
        if "/" not in name and not ADAPTERS.get(name):
            found.append((name, partial(_refuse, name)))
        else:
            found += [(repo_id, partial(download, repo_id, output)) for repo_id in ADAPTERS.get(name, (name,))]
    return found


def _refuse(name: str) -> Iterator[Path]:
    known = ", ".join(base for base, adapters in ADAPTERS.items() if adapters)
    raise DownloadError(f"no adapters are listed for {name}: give an adapter's hub id, or one of {known}.")


def download(repo_id: str, output: Path) -> list[Path]:
    """Fetch one adapter by its hub id."""
    folder = hub.fetch(repo_id, output / repo_id.replace("/", "--"), PATTERNS)
    missing = [name for name in PATTERNS if not (folder / name).exists()]
    if missing:
        raise DownloadError(f"{repo_id} has no {' and no '.join(missing)}, and inlaid never loads a pickle.")
    return [folder]


def main(argv: list[str] | None = None) -> int:
    """Fetch the named adapters and return the exit status."""
    parser = Parser(prog="python -m models.download_lora", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"an adapter's hub id, or a base: {', '.join(MODELS)}")
    parser.add_argument("--output", type=Path, default=hub.CACHE / "adapters", help="folder to fetch into")
    arguments = parser.parse_args(argv)
    return fetch_each("download_lora", jobs(arguments.names, arguments.output))


if __name__ == "__main__":
    sys.exit(main())
