"""Fetches a real base model into models/cache: `python -m models.download_model llama-2-7b`.

Any hub id works too. Only safetensors and configuration files are fetched, never pickles.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from models import hub

MODELS = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
}
PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "LICENSE*"]


def download(name: str, output: Path) -> Path:
    repo_id = MODELS.get(name, name)
    if "/" not in repo_id:
        raise hub.DownloadError(f"{name} is neither a hub id (owner/name) nor one of {', '.join(MODELS)}.")
    if repo_id.startswith("meta-llama/"):
        hub.need_token(repo_id)
    folder = hub.fetch(repo_id, output / name.replace("/", "--"), PATTERNS)
    if not any(folder.glob("*.safetensors")):
        raise hub.DownloadError(f"{repo_id} has no safetensors files, and inlaid reads no others.")
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.download_model", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"a hub id, or one of: {', '.join(MODELS)}, all")
    parser.add_argument("--output", type=Path, default=hub.CACHE, help="folder to fetch into (default: models/cache)")
    arguments = parser.parse_args(argv)
    names = list(MODELS) if arguments.names == ["all"] else arguments.names
    try:
        for name in names:
            print(download(name, arguments.output))
    except hub.DownloadError as error:
        print(f"download_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
