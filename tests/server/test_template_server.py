"""A chat template with nested loops: its own requests are refused, and everybody else goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from tests.server.live import Answer, serving

TEMPLATE = """
{%- if loops %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}"""
ASK = {"model": "to_velar", "prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "temperature": 0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def test_a_template_with_nested_loops_holds_up_nobody(tmp_path: Path) -> None:
    (tmp_path / "template").write_text(TEMPLATE)
    with serving("--chat-template", str(tmp_path / "template")) as server:
        alone = server.ask("POST", "/v1/completions", ASK).json["choices"]
        told: list[Answer] = []

        def chat() -> None:
            for path, body in (("/v1/chat/completions", CHAT), ("/tokenize", {"messages": CHAT["messages"]})):
                told.append(server.ask("POST", path, body | {"chat_template_kwargs": {"loops": True}}))

        hostile = threading.Thread(target=chat)
        hostile.start()
        num_healthy = 0
        while hostile.is_alive():
            assert server.ask("GET", "/health").status == 200
            num_healthy += len(told) < 2
        hostile.join()
        assert num_healthy > 2
        assert [answer.status for answer in told] == [400, 400]
        assert "the chat template refuses these messages: it takes more than" in told[0].json["error"]["message"]
        assert server.ask("POST", "/v1/completions", ASK).json["choices"] == alone
        assert server.ask("POST", "/v1/chat/completions", CHAT).status == 200
