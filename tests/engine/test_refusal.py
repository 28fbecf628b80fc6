"""A refusal keeps its kind and its hints on the way to the server."""

from __future__ import annotations

import msgspec
import pytest

from inlaid.engine.refusal import Refusal, RefusalKind, Refused
from inlaid.engine.request import FinishReason, Output


@pytest.mark.parametrize("kind", RefusalKind)
def test_a_refusal_crosses_the_socket_as_it_is(kind: RefusalKind) -> None:
    output = Output(id="r", tokens=[], finish_reason=FinishReason.ERROR, refusal=Refusal("why", kind, "top_p", 2.5))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=Output) == output


def test_the_exception_reads_as_its_refusal() -> None:
    error = Refused(Refusal("try again in 3 s", RefusalKind.TOO_MANY, retry_after=3.0))
    assert (str(error), error.retry_after) == ("try again in 3 s", 3.0)
    assert isinstance(error, ValueError)
