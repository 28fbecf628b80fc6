"""Service: what every route needs, made once at start and found on the application."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aiohttp import web

from inlaid.config import ServerConfig
from inlaid.server.metrics import Metrics
from inlaid.server.resolver import Resolver
from inlaid.server.safety import AllowedFolders, Keys
from inlaid.server.watcher import Watcher
from inlaid.text.tokenizer import Tokenizer
from inlaid.worker.client import AsyncEngine


@dataclass
class Service:
    config: ServerConfig
    engine: AsyncEngine
    tokenizer: Tokenizer
    metrics: Metrics
    keys: Keys
    folders: AllowedFolders
    model_name: str
    model_path: str
    public_path: str  # the same for those who may not know where things are: a hub id as it is, else the model's name
    max_model_len: int
    vocab_size: int
    started: int  # Unix seconds
    resolver: Resolver | None = None
    watchers: Sequence[Watcher] = ()
    draining: bool = False
    num_in_flight: int = 0  # requests for answers being worked on
    num_loads: int = 0  # adapters being loaded, or waiting for that

    def root(self, headers: Mapping[str, str]) -> str:
        """Where the base is, as far as a client may know."""
        return self.model_path if self.keys.opens_paths(headers) else self.public_path


SERVICE: web.AppKey[Service] = web.AppKey("service", Service)
