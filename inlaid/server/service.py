"""Service: the parts that routes need, made once at start and found on the application."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aiohttp import web

from inlaid.config import ServerConfig
from inlaid.server.background import Background
from inlaid.server.connections import Connections, most_connections
from inlaid.server.errors import Unavailable
from inlaid.server.metrics import Metrics
from inlaid.server.names import ModelNames
from inlaid.server.offload import Offload, Shared
from inlaid.server.online import OnlineTasks
from inlaid.server.resolver import Resolver
from inlaid.server.safety import AllowedFolders, Keys
from inlaid.server.state import ServerState
from inlaid.server.stored import StoredResponses
from inlaid.server.tracing import Traces
from inlaid.server.watcher import Watcher
from inlaid.text.encoder import RequestEncoder
from inlaid.text.tokenizer import Tokenizer
from inlaid.text.tools.answer import ModelForms
from inlaid.worker.interface import ServingEngine

_MIN_BODY_BYTES = 2 * 2**20
_BODY_BYTES_PER_TOKEN = 64


@dataclass
class Service:
    """One server: its configuration, its parts, and the counts of what is under way."""

    config: ServerConfig
    engine: ServingEngine
    encoder: RequestEncoder
    forms: ModelForms
    metrics: Metrics
    keys: Keys
    folders: AllowedFolders
    names: ModelNames
    model_path: str
    public_path: str  # the same for clients that may not see paths: a hub id as it is, else the model's name
    started: int  # Unix seconds
    state: ServerState = field(default_factory=lambda: ServerState(""))
    connections: Connections = field(default_factory=lambda: Connections(*most_connections()))
    offload: Offload = field(default_factory=Offload)
    metrics_page: Shared[bytes] = field(init=False)
    resolver: Resolver | None = None
    watchers: Sequence[Watcher] = ()
    online: OnlineTasks | None = None
    traces: Traces | None = None  # None: no spans are made
    background: Background = field(default_factory=Background)
    responses: StoredResponses = field(init=False)
    ignored_fields: set[str] = field(default_factory=set)  # that were logged: once each
    draining: bool = False
    num_in_flight: int = 0  # requests for answers
    draining_adapters: set[str] = field(default_factory=set)  # that take no new requests
    num_loads: int = 0  # adapters being loaded, or waiting for that

    def __post_init__(self) -> None:
        self.metrics_page = Shared(self.config.metrics_interval)
        self.responses = StoredResponses(self.config.max_stored_responses)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.encoder.tokenizer

    @property
    def max_body_bytes(self) -> int:
        """The largest body: what is configured, or enough for the longest prompt in any form."""
        configured = int(self.config.max_body_mib * 2**20)
        return configured or max(_MIN_BODY_BYTES, _BODY_BYTES_PER_TOKEN * self.encoder.max_model_len)

    def resolve(self, model: str, param: str = "model") -> str | None:
        """Return the adapter that a name stands for; None is the base."""
        adapter = self.names.resolve(model, self.engine.adapters, param)
        if adapter in self.draining_adapters:
            raise Unavailable(f"adapter {adapter!r} is drained and takes no new requests", retry_after=5)
        return adapter

    def root(self, headers: Mapping[str, str]) -> str:
        """Return the path of the base, as far as a client may see it."""
        return self.model_path if self.keys.opens_paths(headers) else self.public_path


SERVICE: web.AppKey[Service] = web.AppKey("service", Service)
