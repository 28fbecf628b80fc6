"""Running requests: one token for each decode, then prompts under way, and the blocks that they grow into."""

from __future__ import annotations

from inlaid.engine.endings import Endings
from inlaid.engine.progress import Progress
from inlaid.engine.request import Status, Work
from inlaid.engine.speculation import Speculation
from inlaid.engine.state import State


class Decodes:
    """Share out a step's budget of tokens among the requests that run already."""

    def __init__(self, state: State, endings: Endings) -> None:
        self._state = state
        self._endings = endings
        self._num_awaiting = 0  # running requests that wait for deferred blocks in this step
        self._num_held = 0  # requests that wait until the step in flight is seen, for drafts

    def schedule(self) -> tuple[list[Work], list[Work], int]:
        """Return works of one token, longer works, and the tokens left for new requests."""
        state = self._state
        self._num_awaiting = self._num_held = 0
        preemptions = state.num_preemptions
        singles, unfinished = self._decode()
        if self._num_held and not singles:
            return [], [], 0  # prompts alone would be a step more: they come with the decodes
        if state.num_preemptions != preemptions:
            singles = self._still_running(singles)
        budget = state.config.max_num_batched_tokens - len(singles)
        if state.config.enable_chunked_prefill:
            budget = state.step_time.bound(budget, len(singles))
        prefills: list[Work] = []
        for progress in unfinished:
            if progress.request.status is Status.RUNNING and budget > 0:
                work = self.prefill(progress, budget)
                budget -= work.num_tokens
                (singles if work.num_tokens == 1 else prefills).append(work)
        return singles, prefills, budget

    def _decode(self) -> tuple[list[Work], list[Progress]]:
        """Return one token's work for each decode, and the requests whose prompts are not computed yet."""
        speculation, looking = self._state.speculation, False
        if speculation is not None:
            running = self._state.running
            alone = next(iter(running.values())).request if len(running) == 1 else None
            speculation.begin(len(running), None if alone is None else alone.adapter)
            looking = speculation.looking
        block_size = self._state.pool.block_size
        singles: list[Work] = []
        unfinished: list[Progress] = []
        for progress in list(self._state.running.values()):
            start = progress.num_computed
            if start < progress.decode_until and not looking:
                progress.num_computed = start + 1
                singles.append(Work(progress.request, start, 1, True, True))
                continue
            request = progress.request
            known, limit, must_see = len(request.tokens), request.limit, request.must_see
            if speculation is not None:
                must_see = must_see or progress.drafted or looking
            if start + 1 < known or progress.num_charged < len(request.prompt):
                unfinished.append(progress)
                continue
            if start >= known and (start + 1 >= limit or must_see):
                self._num_held += looking
                continue  # its newest token must be seen first, or is the last
            if start >= len(request.blocks) * block_size and not self._grow(progress):
                continue
            progress.num_computed = start + 1
            singles.append(Work(request, start, 1, start + 1 < limit, start + 2 < limit))
            if not must_see:
                progress.decode_until = min(len(request.blocks) * block_size, limit - 2)
        return singles, unfinished

    def draft(self, speculation: Speculation, singles: list[Work], budget: int) -> tuple[list[Work], list[Work]]:
        """Return the decodes without a draft, and those that have one now: `budget` guesses at most, none of which
        takes a block that a decode of the next step may need."""
        drafts = speculation.choose(singles, budget)
        if not drafts:
            return singles, []
        rest: list[Work] = []
        drafted: list[Work] = []
        for work in singles:
            draft = drafts.get(work.request.id)
            count = 0 if draft is None else self._room(work, len(draft.tokens))
            if draft is None or not count:
                rest.append(work)
                continue
            tokens = draft.tokens[:count]
            drafted.append(Work(work.request, work.start, 1 + count, True, draft=tokens))
            speculation.submitted(work.request, draft)
            progress = self._state.progress[work.request.id]
            progress.drafted, progress.decode_until = True, 0
        return rest, drafted

    def _room(self, work: Work, count: int) -> int:
        """Return how many of `count` guesses have a place in KV, after taking the blocks that are free for them."""
        state, blocks = self._state, work.request.blocks
        last = work.start + count
        while len(blocks) * state.pool.block_size <= last and state.pool.num_available > len(state.running):
            blocks.append(state.pool.take())
        return min(count, len(blocks) * state.pool.block_size - 1 - work.start)

    def _still_running(self, works: list[Work]) -> list[Work]:
        """Leave out the requests that were preempted after they had been given their share of this step."""
        for work in works:
            if work.request.status is not Status.RUNNING and work.samples:
                self._state.progress[work.request.id].num_pending -= 1
        return [work for work in works if work.request.status is Status.RUNNING]

    def prefill(self, progress: Progress, budget: int) -> Work:
        """Compute as much of what a request has as the budget allows, and charge the part of it that is prompt."""
        request = progress.request
        start, total = progress.num_computed, len(request.tokens)
        count = min(total - start, budget)
        first, last = max(start, progress.num_charged), min(start + count, request.num_prompt)
        if first < last:
            self._state.ledger.charge_prefill(request.account, first, last)
            progress.num_charged = last
        samples = start + count == total and total < request.limit
        progress.num_computed = start + count
        return Work(request, start, count, samples)

    def _grow(self, progress: Progress) -> bool:
        """Take one more block; for want of one preempt the last in the policy's order, which may be this request."""
        state, request = self._state, progress.request
        while request.status is Status.RUNNING:
            if state.pool.num_available or state.pool.want(1, 0, request.adapter):
                request.blocks.append(state.pool.take())
                return True
            if self._num_awaiting < state.steps.num_deferred_blocks:
                self._num_awaiting += 1  # enough comes free when the step in flight is over
                return False
            self._endings.preempt(max(state.running.values(), key=lambda other: state.standing(other.request)))
        return False
