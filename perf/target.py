"""The server under test, as it is asked before a run: ready, its models, its tokenizer, its scheduler's settings.

Used by `perf.client`.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.request
from typing import Any

import msgspec


class Target(msgspec.Struct, frozen=True):
    """Names of the server's base model and adapters."""

    model: str
    adapters: list[str]


def find_target(arguments: argparse.Namespace) -> Target:
    """Take names from the flags; where they say auto, from the server's own list."""
    adapters, model = list(arguments.adapters), arguments.model
    if adapters == ["auto"] or model is None:
        if arguments.backend == "slora":
            raise ValueError("S-LoRA lists no models: name them with --model and --adapters")
        listed = _listed_models(arguments)
        parents = [card["id"] for card in listed if not card.get("parent")]
        adapters = [card["id"] for card in listed if card.get("parent")] if adapters == ["auto"] else adapters
        model = model or (parents[0] if parents else None)
    if model is None:
        raise ValueError(f"{arguments.base_url[0]}/v1/models lists no base model: name one with --model")
    return Target(model, adapters[: arguments.num_adapters])


def _listed_models(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    url = arguments.base_url[0].rstrip("/") + "/v1/models"
    try:
        request = urllib.request.Request(url, headers=_authorization(arguments))
        with urllib.request.urlopen(request, timeout=30) as response:
            return list(msgspec.json.decode(response.read())["data"])
    except (urllib.error.URLError, OSError, KeyError, TypeError, msgspec.DecodeError) as error:
        raise ValueError(f"no list of models at {url} ({error}): is the server up?") from error


def wait_until_ready(base_urls: list[str], timeout_s: float) -> None:
    """Ask every replica's /health until it answers 200."""
    end = time.monotonic() + timeout_s
    for base_url in base_urls:
        while not _healthy(base_url):
            if time.monotonic() > end:
                raise ValueError(f"{base_url}/health did not answer within {timeout_s:g} s: is the server up?")
            time.sleep(0.2)


def _healthy(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(base_url.rstrip("/") + "/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def set_scheduler(arguments: argparse.Namespace, weights: dict[str, float]) -> None:
    """Set policy and tenant weights of every replica by inlaid's PUT /v1/scheduler, if the run asks for any."""
    changes: dict[str, Any] = {} if arguments.policy is None else {"policy": arguments.policy}
    if weights:
        changes["weights"] = weights
    for base_url in arguments.base_url if changes else ():
        url = base_url.rstrip("/") + "/v1/scheduler"
        headers = {"Content-Type": "application/json", **_authorization(arguments)}
        request = urllib.request.Request(url, json.dumps(changes).encode(), headers, method="PUT")
        try:
            with urllib.request.urlopen(request, timeout=30):
                pass
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise ValueError(f"{url} does not take {' and '.join(changes)} (HTTP {error.code}): {said}") from error
        except OSError as error:
            raise ValueError(f"{url} does not answer ({error}): is the server up?") from error


def _authorization(arguments: argparse.Namespace) -> dict[str, str]:
    return {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}


class ServerTokenizer:
    """The server's `/tokenize`, as vLLM and inlaid have it."""

    def __init__(self, base_url: str, model: str, timeout_s: float = 30.0) -> None:
        self.url, self.model, self.timeout_s = base_url.rstrip("/") + "/tokenize", model, timeout_s

    def encode(self, text: str, special: bool) -> list[int]:
        body = {"model": self.model, "prompt": text, "add_special_tokens": special}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return [int(token) for token in json.load(response)["tokens"]]
        except (urllib.error.URLError, KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self.url} does not tokenize ({error}); name a tokenizer with --tokenizer, "
                "or use --prompt-format words (length then approximate)"
            ) from error
