"""`inlaid task … --server URL`: the same verbs, carried out by a server that was started with --online-tasks."""

from __future__ import annotations

import argparse
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from inlaid.quant.examples import read_examples
from inlaid.quant.settings import QuantizeError, TaskSource

POLL = 0.5  # seconds between two looks at a job
_OVER = ("serving", "ready", "refused", "failed", "cancelled")
Progress = Callable[[str, int, int], None]


class Server:
    """A server's routes of tasks."""

    def __init__(self, url: str, admin_key: str) -> None:
        self._url, self._key = url.rstrip("/"), admin_key

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request and return its JSON. QuantizeError holds what the server says is wrong."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise QuantizeError(_message(error)) from error
        except (OSError, ValueError) as error:
            raise QuantizeError(f"{self._url} does not answer as an inlaid server: {error}") from error

    def follow(self, name: str, progress: Progress) -> dict[str, Any]:
        """Wait until a job is over, and return its card."""
        while True:
            card: dict[str, Any] = self.ask("GET", f"/v1/tasks/{quote(name)}")
            progress(card["stage"] or card["state"], card["done"], max(card["total"], card["done"], 1))
            if card["state"] in _OVER:
                return card
            time.sleep(POLL)


def run(args: argparse.Namespace, progress: Progress) -> str:
    """Carry out a verb; returns what to print."""
    key = args.admin_key or os.environ.get("INLAID_ADMIN_KEY", "")
    if not key:
        raise QuantizeError("a server changes its tasks for the admin key only: give --admin-key, or INLAID_ADMIN_KEY")
    server = Server(args.server, key)
    if args.verb == "list":
        listed = server.ask("GET", "/v1/tasks")
        return json.dumps(listed, indent=1) if args.json else _listed(listed)
    if args.verb == "rollback":
        return f"version {server.ask('POST', '/v1/base/rollback')['current']} of the base is served"
    if args.verb == "switch":
        return _told(server.ask("POST", f"/v1/tasks/{quote(args.name)}/switch"))
    if args.verb == "remove":
        card = server.ask("DELETE", f"/v1/tasks/{quote(args.name)}")
        name = args.name
        if card["state"] != "queued":
            return f"the job of task {name} is {card['state']}"
    else:
        source = TaskSource.parse(args.task)
        name = source.name
        server.ask("POST", "/v1/tasks", _body(source, args))
    card = server.follow(name, progress)
    if card["state"] not in ("serving", "ready"):
        raise QuantizeError(f"task {name}: {card['state']}: {card['why']}")
    return _told(card)


def _body(source: TaskSource, args: argparse.Namespace) -> dict[str, Any]:
    """Return the order; the data are read here and sent along."""
    read_examples(source.data)  # mistakes are told before anything is sent
    examples = [json.loads(line) for line in source.data.read_text(encoding="utf-8").split("\n") if line.strip()]
    return {
        "name": source.name,
        "adapter": str(source.adapter),
        "examples": examples,
        "solve": args.solve,
        "check": args.check,
        "threshold": args.threshold,
        "tolerance": args.tolerance,
        "force": args.force,
        "switch": not args.no_switch,
    }


def _told(card: dict[str, Any]) -> str:
    """Return a job's losses and where its seconds went."""
    why = f" ({card['why']})" if card["why"] else ""
    lines = [
        f"task {card['name']}: {card['state']}{why}; version {card['version']}",
        f"{'task':24} {'before':>10} {'after':>10}  nats a token",
    ]
    for name, after in sorted(card["after"].items()):
        before = card["before"].get(name)
        lines.append(f"{name:24} {'new' if before is None else f'{before:.5f}':>10} {after:>10.5f}")
    if card["seconds"]:
        parts = ", ".join(f"{part} {spent:.1f}" for part, spent in card["seconds"].items())
        lines.append(f"the job took {sum(card['seconds'].values()):.1f} s: {parts}")
    return "\n".join(lines)


def _listed(listed: dict[str, Any]) -> str:
    lines = [f"version {listed['version']} of the base", f"{'task':24} {'quantized':>10}"]
    lines += [f"{name:24} {loss:>10.5f}" for name, loss in sorted(listed["tasks"].items())]
    for card in listed["jobs"]:
        why = f": {card['why']}" if card["why"] else ""
        lines.append(f"job {card['verb']} {card['name']}: {card['state']}{why}; {card['stage']}")
    return "\n".join(lines)


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"the server answered {error.code} {error.reason}"
