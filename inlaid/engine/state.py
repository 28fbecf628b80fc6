"""The state that the parts of the scheduler share: requests, queue, pool of KV blocks, ledger and limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from inlaid.config import SchedulerConfig
from inlaid.engine.kv_cache import BlockPool
from inlaid.engine.ledger import Ledger
from inlaid.engine.limits import QueueLimits
from inlaid.engine.policy import Policy, View
from inlaid.engine.prefix import PrefixCache
from inlaid.engine.progress import Progress
from inlaid.engine.request import Request
from inlaid.engine.residency import AdapterDirectory
from inlaid.engine.seniority import Seniority
from inlaid.engine.speculation import Speculation
from inlaid.engine.step_time import StepTime
from inlaid.engine.steps import Steps
from inlaid.engine.waiting import WaitingQueue
from inlaid.engine.working_set import WorkingSet


@dataclass(eq=False)
class State:
    """The scheduler makes it; admission, decodes, delivery and endings change it."""

    config: SchedulerConfig
    adapters: AdapterDirectory
    pool: BlockPool
    prefix: PrefixCache
    steps: Steps
    step_time: StepTime
    ledger: Ledger
    limits: QueueLimits
    working_set: WorkingSet
    view: View
    waiting: WaitingQueue
    speculation: Speculation | None = None  # None: every decode is one token
    seniority: Seniority = field(default_factory=Seniority)
    progress: dict[str, Progress] = field(default_factory=dict)  # of every request that has not ended, by id
    running: dict[str, Progress] = field(default_factory=dict)
    num_reserved: int = 0  # blocks that the running requests were admitted on
    num_preemptions: int = 0
    host_share: float = 0.0  # the host's seconds for each step over the requests in it, summed over all steps
    # What was free when the last look at the queue found no request that fits; None: something has changed since.
    nothing_fits: tuple[int, int] | None = None

    @property
    def policy(self) -> Policy:
        return self.waiting.policy

    @property
    def num_waiting(self) -> int:
        """Requests in the queue or set aside."""
        return len(self.waiting) + self.working_set.num_aside

    def enqueue(self, request: Request) -> None:
        """Put a request into the queue, and look at the queue again."""
        self.waiting.push(request)
        if self.policy.seniority_s < math.inf:
            self.seniority.watch(request)
        self.nothing_fits = None

    def standing(self, request: Request) -> tuple[tuple[float, ...], int]:
        """Return the request's place in the policy's order now; smaller goes first."""
        policy, view = self.policy, self.view
        return policy.key(policy.group(request), policy.rank(request, view), view), request.order

    def blocks_for(self, num_tokens: int) -> int:
        """Count the blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.pool.block_size)
