"""The queue of requests whose grammars have to be compiled before the engine takes them."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from inlaid.engine.refusal import Refusal, RefusalKind, Refused
from inlaid.engine.request import Grammar, NewRequest
from inlaid.worker.threads import NUM_COMPILERS, Threads

MAX_COMPILING = 64  # requests of one tenant that wait for their grammars

Add = Callable[[NewRequest, Future[object]], None]


class Compilations:
    """Compiles each tenant's grammars one after another and the tenants' in turn, so that a tenant's slow constraints
    hold up its own requests only. A request that is aborted leaves the queue."""

    def __init__(self, compile_grammar: Callable[[Grammar], object], threads: Threads, add: Add) -> None:
        self._compile_grammar = compile_grammar
        self._threads = threads
        self._add = add  # what follows, with the outcome
        self._waiting: OrderedDict[str, deque[NewRequest]] = OrderedDict()  # by tenant, the next one first
        self._running: dict[str, str] = {}  # the request that is compiled for a tenant

    def submit(self, request: NewRequest) -> None:
        """Compile a request's grammar when its turn comes. Refused: too many of its tenant wait."""
        queue = self._waiting.setdefault(request.tenant, deque())
        if len(queue) >= MAX_COMPILING:
            message = f"{MAX_COMPILING} grammars of this tenant wait to be compiled already"
            raise Refused(Refusal(message, RefusalKind.TOO_MANY, retry_after=1.0))
        queue.append(request)
        self._start()

    def discard(self, request_id: str) -> None:
        """Forget a request that was aborted. One that is being compiled is finished, but not added."""
        for tenant, queue in self._waiting.items():
            self._waiting[tenant] = deque(request for request in queue if request.id != request_id)
        for tenant, running in self._running.items():
            if running == request_id:
                self._running[tenant] = ""

    def _start(self) -> None:
        """Start as many compilations as there are threads, at most one for each tenant."""
        for tenant in list(self._waiting):
            queue = self._waiting[tenant]
            if not queue:
                del self._waiting[tenant]
            elif tenant not in self._running and len(self._running) < NUM_COMPILERS:
                request = queue.popleft()
                self._waiting.move_to_end(tenant)
                self._running[tenant] = request.id
                assert request.params.grammar is not None
                work = partial(self._compile_grammar, request.params.grammar)
                self._threads.compile(work, partial(self._finish, request))

    def _finish(self, request: NewRequest, compiled: Future[object]) -> None:
        if self._running.pop(request.tenant) == request.id:  # it was not aborted meanwhile
            self._add(request, compiled)
        self._start()
