"""Responses that later requests may refer to, within bounds on their number and bytes; the oldest go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from inlaid.server.errors import NotFound
from inlaid.server.protocol.responses import InputItem, Response

_MAX_BYTES = 64 * 2**20  # of all stored responses


class Stored(msgspec.Struct, frozen=True):
    """A response, with the whole conversation up to its end."""

    owner: str  # the client that may read it: the hash of its key
    response: Response
    items: list[InputItem]
    size: int


class StoredResponses:
    """The store."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._by_id: OrderedDict[str, Stored] = OrderedDict()
        self._holders: dict[str, str] = {}  # of each item that an answer made: its response

    def put(self, owner: str, response: Response, items: Sequence[InputItem]) -> None:
        """Store a response and the conversation before it; what it said is added."""
        whole = [*items, *(msgspec.convert(msgspec.to_builtins(item), InputItem) for item in response.output)]
        size = len(msgspec.json.encode(whole)) + len(msgspec.json.encode(response))
        if size > _MAX_BYTES or not self._most:
            return
        self._by_id[response.id] = Stored(owner, response, whole, size)
        self._bytes += size
        for item in response.output:
            self._holders[item.id] = response.id
        while len(self._by_id) > self._most or self._bytes > _MAX_BYTES:
            self._forget(next(iter(self._by_id)))

    def get(self, owner: str, name: str, param: str = "previous_response_id") -> Stored:
        """Return a stored response; NotFound: there is none of that name, or it is another client's."""
        stored = self._by_id.get(name)
        if stored is None or stored.owner != owner:
            why = f"it was sent with store false, is older than the last {self._most}, or from before a restart"
            raise NotFound(f"response {name!r} is not stored here: {why}; send the whole conversation", param)
        return stored

    def item(self, owner: str, name: str) -> InputItem:
        """Return an item that a stored response has made."""
        stored = self.get(owner, self._holders.get(name, name), "input")
        for item in stored.items:
            if item.id == name:
                return item
        raise NotFound(f"item {name!r} is not stored here; send it whole", "input")

    def delete(self, owner: str, name: str) -> None:
        """Forget a response."""
        self.get(owner, name, "id")
        self._forget(name)

    def _forget(self, name: str) -> None:
        stored = self._by_id.pop(name)
        self._bytes -= stored.size
        for item in stored.response.output:
            self._holders.pop(item.id, None)
