"""The console's stream, as tests of several folders read it."""

from __future__ import annotations

import http.client
import json
from typing import Any

from tests.server.live import Live


def first_state(server: Live, headers: dict[str, str]) -> dict[str, Any]:
    """Open the stream, and return the whole state that it begins with."""
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.request("GET", "/console/events", headers=headers)
    response = connection.getresponse()
    assert response.status == 200
    for line in response:
        if line.startswith(b"data: "):
            connection.close()
            response.close()
            return dict(json.loads(line[6:]))
    raise AssertionError("the stream ended")
