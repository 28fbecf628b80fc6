"""Fetch a real base model into models/cache: `python -m models.download_model llama-2-7b`.

Any hub id works too. Only safetensors and configuration files are fetched, never pickles.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from data.fetching import DownloadError, Job, fetch_each
from inlaid.flags import Parser
from models import hub

MODELS = MappingProxyType(
    {
        "llama-2-7b": "meta-llama/Llama-2-7b-hf",
        "llama-2-13b": "meta-llama/Llama-2-13b-hf",
        "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
        "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    }
)
PATTERNS = ("*.safetensors", "*.json", "tokenizer*", "*.jinja", "LICENSE*")


def jobs(names: Sequence[str], output: Path) -> list[Job]:
    """Return one job for each base model."""
    return [(name, partial(download, name, output)) for name in names]


def download(name: str, output: Path) -> list[Path]:
    """Fetch one base model, by its name here or its hub id."""
    repo_id = MODELS.get(name, name)
    if "/" not in repo_id:
        raise DownloadError(f"{name} is neither a hub id (owner/name) nor one of {', '.join(MODELS)}.")
    if repo_id.startswith("meta-llama/"):
        hub.need_token(repo_id)
    folder = hub.fetch(repo_id, output / name.replace("/", "--"), PATTERNS)
    if not any(folder.glob("*.safetensors")):
        raise DownloadError(f"{repo_id} has no safetensors files, and inlaid reads no others.")
    return [folder]


def main(argv: list[str] | None = None) -> int:
    """Fetch the named base models and return the exit status."""
    parser = Parser(prog="python -m models.download_model", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"a hub id, or one of: {', '.join(MODELS)}, all")
    parser.add_argument("--output", type=Path, default=hub.CACHE, help="folder to fetch into (default: models/cache)")
    arguments = parser.parse_args(argv)
    names = list(MODELS) if arguments.names == ["all"] else arguments.names
    return fetch_each("download_model", jobs(names, arguments.output))


if __name__ == "__main__":
    sys.exit(main())
