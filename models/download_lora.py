"""Fetches public adapters for a base model into models/cache/adapters: `python -m models.download_lora llama-2-7b`.

Any adapter's hub id works too. Only safetensors are fetched: an adapter published as a pickle is refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from models import hub
from models.download_model import MODELS

ADAPTERS: dict[str, tuple[str, ...]] = {
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
PATTERNS = ["adapter_config.json", "adapter_model.safetensors"]


def adapters_of(name: str) -> tuple[str, ...]:
    if "/" in name:
        return (name,)
    if not ADAPTERS.get(name):
        known = ", ".join(base for base, adapters in ADAPTERS.items() if adapters)
        raise hub.DownloadError(f"no adapters are listed for {name}: give an adapter's hub id, or one of {known}.")
    return ADAPTERS[name]


def download(repo_id: str, output: Path) -> Path:
    folder = hub.fetch(repo_id, output / repo_id.replace("/", "--"), PATTERNS)
    missing = [name for name in PATTERNS if not (folder / name).exists()]
    if missing:
        raise hub.DownloadError(f"{repo_id} has no {' and no '.join(missing)}, and inlaid never loads a pickle.")
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.download_lora", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"an adapter's hub id, or a base: {', '.join(MODELS)}")
    parser.add_argument("--output", type=Path, default=hub.CACHE / "adapters", help="folder to fetch into")
    arguments = parser.parse_args(argv)
    failures = 0
    for name in arguments.names:
        try:
            for repo_id in adapters_of(name):
                print(download(repo_id, arguments.output))
        except hub.DownloadError as error:
            print(f"download_lora: {error}", file=sys.stderr)
            failures += 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
