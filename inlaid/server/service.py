"""Service: the parts that routes need, made once at start and found on the application."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aiohttp import web

from inlaid.config import ServerConfig
from inlaid.server.metrics import Metrics
from inlaid.server.resolver import Resolver
from inlaid.server.safety import AllowedFolders, Keys
from inlaid.server.watcher import Watcher
from inlaid.text.encoder import RequestEncoder
from inlaid.text.tokenizer import Tokenizer
from inlaid.worker.client import EngineClient


@dataclass
class Service:
    """One server: its configuration, its parts, and the counts of what is under way."""

    config: ServerConfig
    engine: EngineClient
    encoder: RequestEncoder
    metrics: Metrics
    keys: Keys
    folders: AllowedFolders
    model_name: str
    model_path: str
    public_path: str  # the same for clients that may not see paths: a hub id as it is, else the model's name
    started: int  # Unix seconds
    resolver: Resolver | None = None
    watchers: Sequence[Watcher] = ()
    draining: bool = False
    num_in_flight: int = 0  # requests for answers
    num_loads: int = 0  # adapters being loaded, or waiting for that

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.encoder.tokenizer

    def root(self, headers: Mapping[str, str]) -> str:
        """Return the path of the base, as far as a client may see it."""
        return self.model_path if self.keys.opens_paths(headers) else self.public_path


SERVICE: web.AppKey[Service] = web.AppKey("service", Service)
