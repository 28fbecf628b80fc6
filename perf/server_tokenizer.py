"""A server's own tokenizer over HTTP, for prompts of an exact length. Used by `perf.client`."""

from __future__ import annotations

import json
import urllib.error
import urllib.request


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
