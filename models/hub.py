"""Fetch a folder from the Hugging Face hub, with progress and resume, or says in one sentence why it cannot.

Used by `download_model` and `download_lora`; the hub's client shows the progress bars and resumes broken files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RepositoryNotFoundError

from data.fetching import DownloadError

CACHE = Path(__file__).parent / "cache"
TOKEN_VARIABLE = "HF_TOKEN"


def token() -> str | None:
    """Return the token of the environment."""
    return os.environ.get(TOKEN_VARIABLE) or None


def need_token(repo_id: str) -> None:
    """Refuse a gated model early where no token is set."""
    if token() is None:
        raise DownloadError(
            f"{repo_id} is gated: accept its licence at https://huggingface.co/{repo_id}, "
            f"then set {TOKEN_VARIABLE} to a token of that account."
        )


def fetch(repo_id: str, folder: Path, patterns: Sequence[str]) -> Path:
    """Fetch the files of a repository that match `patterns`; a second call fetches only what is missing."""
    try:
        snapshot_download(repo_id, local_dir=folder, allow_patterns=list(patterns), token=token())
    except GatedRepoError as error:
        raise DownloadError(
            f"{repo_id} is gated for this token: accept its licence at https://huggingface.co/{repo_id} first."
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{repo_id} is not on the hub, or is private and {TOKEN_VARIABLE} does not open it."
        ) from error
    except HfHubHTTPError as error:
        raise DownloadError(f"the hub refused {repo_id}: {error}") from error
    except (OSError, HTTPError) as error:
        raise DownloadError(
            f"could not fetch {repo_id}: {type(error).__name__}; check that this machine reaches "
            f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')} and that {folder} has room, "
            "then run the same command again: it resumes."
        ) from error
    return folder
