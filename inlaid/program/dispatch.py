"""Dispatch: which of the calls that could run are sent to the engine now.

By default all of them, except for those that wait for another call: an equal one, whose answer they take, or one of the
same adapter that is computing a prefix of theirs.
"""

from __future__ import annotations

from inlaid.engine.kv_cache import Key, extend_keys, root_key
from inlaid.program.call import Call, equality, salt_of
from inlaid.program.options import Limits, Options
from inlaid.program.scope import determined
from inlaid.program.values import Failure

_LEAST_SHARED = 32  # tokens of a common prefix that are worth waiting for


class Dispatch:
    """The calls of one run between being known and being answered."""

    def __init__(self, options: Options, limits: Limits, block_size: int, secret: str) -> None:
        self._options = options
        self._limits = limits
        self._block_size = block_size
        self._least_blocks = -(-_LEAST_SHARED // block_size)
        self._secret = secret  # that no other run has
        self._waiting: list[Call] = []
        self._equal: dict[object, Call] = {}
        self._followers: dict[Call, list[Call]] = {}  # that take the answer of a call
        self._in_flight: set[Call] = set()
        self._computing: dict[Key, Call] = {}
        self._computed: set[Key] = set()
        self._adapter: tuple[str | None] | None = None  # whose calls run, if one at a time
        self._full = False  # the engine's queue: until a call ends
        self.num_sent = 0
        self._num_offered = 0
        self.num_tokens = 0  # of calls that have ended, and that those in flight may take

    @property
    def num_in_flight(self) -> int:
        """Count the calls that the engine has."""
        return len(self._in_flight)

    def offer(self, call: Call) -> Call | None:
        """Take a call whose prompt is known. Return the call that it equals, if that has been answered already."""
        if self._options.merge_equal and determined(call.element):
            first = self._equal.setdefault(equality(call), call)
            if first is not call:
                call.equals = first
                if first.cell.done:
                    return first
                self._followers.setdefault(first, []).append(call)
                return None
        self._num_offered += 1
        call.salt = salt_of(call, self._num_offered, self._options.keep_kv, self._options.share_prefixes, self._secret)
        if self._options.share_prefixes:
            root = root_key("", call.adapter, salt=call.salt)
            extend_keys(call.keys, root, call.prompt[:-1], self._block_size)
        self._waiting.append(call)
        return None

    def take(self) -> tuple[list[Call], list[tuple[Call, Failure]]]:
        """Return the calls to send now, and those that the limits do not allow."""
        left: list[Call] = []
        sent: list[Call] = []
        over: list[tuple[Call, Failure]] = []
        if not self._waiting or self._full:
            return sent, over
        self._choose_adapter()
        for call in self._waiting:
            failure = self._over_limit(call)
            if failure is not None and not self._in_flight:
                over.append((call, failure))
            elif failure is None and self._may_go(call):
                self._send(call)
                sent.append(call)
            else:
                left.append(call)
        self._waiting = left
        return sent, over

    def _may_go(self, call: Call) -> bool:
        if 0 < self._options.max_in_flight <= len(self._in_flight):
            return False
        return self._adapter in (None, (call.adapter,)) and not self._waits_for_prefix(call)

    def _over_limit(self, call: Call) -> Failure | None:
        """Return why the limits do not allow a call now; tokens may be left when those in flight have ended."""
        calls, tokens = self._limits.max_calls, self._limits.max_tokens
        if calls and self.num_sent >= calls:
            return Failure(call.where, f"the program makes more than the {calls} calls that it may")
        if tokens and self.num_tokens + call.most_tokens > tokens:
            return Failure(
                call.where,
                f"prompt and answer may take {call.most_tokens} tokens; of the {tokens} that the program may take "
                f"{tokens - self.num_tokens} are left",
            )
        return None

    def _choose_adapter(self) -> None:
        """Choose the adapter with most calls once the last one has none left, if adapters take turns."""
        if self._options.fuse_decode:
            return
        waiting = [call.adapter for call in self._waiting]
        if self._in_flight or (self._adapter is not None and self._adapter[0] in waiting):
            return
        self._adapter = (max(dict.fromkeys(waiting), key=waiting.count),)

    def _waits_for_prefix(self, call: Call) -> bool:
        """Tell whether a call in flight computes a prefix of this one that is worth waiting for."""
        num_computed = num_coming = 0
        for depth, key in enumerate(call.keys, 1):
            if key in self._computed:
                num_computed = depth
            elif key in self._computing:
                num_coming = depth
            else:
                break
        return num_coming - num_computed >= self._least_blocks

    def _send(self, call: Call) -> None:
        self._in_flight.add(call)
        self.num_sent += 1
        self.num_tokens += call.most_tokens
        for key in call.keys:
            if key not in self._computed:
                self._computing.setdefault(key, call)

    def returned(self, call: Call) -> bool:
        """Take back a call for which the engine's queue had no room, until another ends. Return False if none runs."""
        self._forget(call)
        self.num_sent -= 1
        self.num_tokens -= call.most_tokens
        if not self._in_flight:
            return False
        self._waiting.insert(0, call)
        self._full = True
        return True

    def prefilled(self, call: Call) -> None:
        """Note that a call's prompt is computed: those that waited for its prefix may go."""
        for key in call.keys:
            if self._computing.get(key) is call:
                del self._computing[key]
            self._computed.add(key)

    def ended(self, call: Call) -> list[Call]:
        """Note the end of a call, sent or not, and return those that take its answer."""
        if call in self._in_flight:
            self._forget(call)
            self.num_tokens += call.num_tokens - call.most_tokens
            self._full = False
        else:
            self._waiting = [other for other in self._waiting if other is not call]
        return self._followers.pop(call, [])

    def _forget(self, call: Call) -> None:
        self._in_flight.discard(call)
        for key in call.keys:
            if self._computing.get(key) is call:
                del self._computing[key]

    def running(self) -> list[Call]:
        """List the calls that the engine has."""
        return list(self._in_flight)
