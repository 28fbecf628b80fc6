"""`python -m perf.client`: send a workload to any OpenAI-compatible server (or S-LoRA's) and measure it.

Exit codes: 0 done, 2 bad arguments or no server, 3 too many requests failed, 130 interrupted (what was done
is kept).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from inlaid.files import write_atomically
from inlaid.progress import Bar
from inlaid.workload.plan import PlannedRequest, plan
from inlaid.workload.prompts import PromptFormat, PromptMaker, TokenizerFile
from inlaid.workload.spec import Workload
from perf.options import build_parser, workload_from
from perf.parse_log import spans
from perf.protocols import PROTOCOLS, WireOptions
from perf.records import Record, encode_record, write_records
from perf.sender import Prepared, Sender, drive
from perf.summary import as_table, options_for, summarize
from perf.target import ServerTokenizer, Target, find_target, set_scheduler, wait_until_ready

LATE_MS = 10.0  # a median lateness above this is worth a warning: the load was not the one asked for
LOG_DELAY_S = 2.0  # seconds that the server's log may lag behind the last answer
START_DELAY_S = 0.05  # between the clock's zero and the first request, so that it is not late itself


class Interrupted(Exception):
    """Ctrl-C or SIGTERM during the run; the records made so far are kept."""


class Progress:
    """The live bar, the records as they come, and the file they go to."""

    def __init__(self, total: int, file: Path | None, shown: bool) -> None:
        self.records: list[Record] = []
        self.file = file.open("wb", buffering=1 << 16) if file else None
        self.bar = Bar(total=total, desc="sending", disable=not shown, unit="req")
        self.failed = self.tokens = 0
        self.flushed = time.monotonic()

    def add(self, record: Record) -> None:
        self.records.append(record)
        self.failed += record.status != "ok"
        self.tokens += record.output_len
        if self.file:
            self.file.write(encode_record(record))
            if time.monotonic() - self.flushed > 1.0:
                self.file.flush()
                self.flushed = time.monotonic()
        self.bar.update()
        elapsed = max(record.finished, 1e-9)
        self.bar.set_postfix_str(f"{self.tokens / elapsed:.0f} tok/s, {self.failed} failed", refresh=False)

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()


def prompt_maker(arguments: argparse.Namespace, target: Target, seed: int) -> PromptMaker:
    chat = arguments.backend != "openai"
    form: PromptFormat = arguments.prompt_format or ("text" if chat else "ids")
    tokens: TokenizerFile | ServerTokenizer | None = None
    if arguments.tokenizer:
        tokens = TokenizerFile(arguments.tokenizer)
    elif form != "words":
        tokens = ServerTokenizer(arguments.base_url[0], target.model)
    return PromptMaker(form, tokens, seed, special=arguments.backend != "openai-chat")


def prepare(
    arguments: argparse.Namespace, target: Target, planned: list[PlannedRequest], warmup: bool = False
) -> list[Prepared]:
    """Do what can be done before a request is due: choose its URL, make its headers, encode its body."""
    protocol = PROTOCOLS[arguments.backend]
    options = WireOptions(
        target.model,
        not arguments.respect_eos,
        arguments.temperature,
        arguments.tenant_as == "user",
        arguments.extra_body,
    )
    urls = [url.rstrip("/") + protocol.path for url in arguments.base_url]
    items = []
    shown = not (arguments.no_progress or warmup)
    for request in Bar(planned, desc="encoding", unit="req", delay=1, leave=False, disable=not shown):
        replica = request.index
        if arguments.route == "adapter" and request.adapter in target.adapters:
            replica = target.adapters.index(request.adapter)
        body = msgspec.json.encode(protocol.body(request, options))
        early = warmup or request.at < arguments.warmup_s
        items.append(Prepared(request, urls[replica % len(urls)], body, _headers(arguments, request), early))
    return items


def _headers(arguments: argparse.Namespace, request: PlannedRequest) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "X-Request-Id": f"perf-{request.index}"}
    if arguments.api_key:
        headers["Authorization"] = f"Bearer {arguments.api_key}"
    if arguments.tenant_as == "api-key":
        headers["Authorization"] = f"Bearer {request.tenant}"
    elif arguments.tenant_as.startswith("header:"):
        headers[arguments.tenant_as.removeprefix("header:")] = request.tenant
    elif arguments.tenant_as not in ("user", "none"):
        raise ValueError(f"--tenant-as {arguments.tenant_as}: use user, none, api-key or header:NAME")
    return headers


async def measure(
    arguments: argparse.Namespace,
    warmup: list[Prepared],
    items: list[Prepared],
    progress: Progress,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Warm up, then drive the workload; return the clock's reading at the run's zero."""
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    timeout = aiohttp.ClientTimeout(total=arguments.timeout)
    jar = aiohttp.DummyCookieJar()
    skip = ["Accept-Encoding", "User-Agent"]
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, cookie_jar=jar, skip_auto_headers=skip, trust_env=False
    ) as session:
        sender = Sender(session, PROTOCOLS[arguments.backend], clock, arguments.max_connections, arguments.save_text)
        await drive(sender, warmup, progress.add, stop)
        gc.collect()
        gc.freeze()  # the plan is large and lives to the end: do not walk it during the run
        sender.start = clock() + START_DELAY_S
        await drive(sender, items, progress.add, stop)
    if stop.is_set():
        raise Interrupted
    return sender.start


def run(arguments: argparse.Namespace) -> int:
    """Run everything and return the exit code."""
    workload = workload_from(arguments)
    wait_until_ready(arguments.base_url, arguments.ready_timeout)
    target = find_target(arguments)
    if arguments.adapters == ["auto"]:
        target = Target(target.model, workload.adapters_among(target.adapters))
    set_scheduler(arguments, workload.weights)
    maker = prompt_maker(arguments, target, workload.seed)
    items = prepare(arguments, target, plan(workload, target.adapters, maker, shown=not arguments.no_progress))
    warmup = _warmup_items(arguments, target, workload)
    out = Path(arguments.out) if arguments.out else None
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    _allow_many_sockets(arguments.max_connections)
    progress = Progress(len(items) + len(warmup), out.with_suffix(".jsonl") if out else None, not arguments.no_progress)
    code, clock_start = 0, 0.0
    try:
        clock_start = _event_loop_run(measure(arguments, warmup, items, progress))
    except Interrupted:
        code = 130
    finally:
        progress.close()
    if not any(not record.warmup for record in progress.records):
        print("perf.client: interrupted before a request was measured", file=sys.stderr)
        return 130
    if arguments.server_log is not None:
        _add_spans(arguments.server_log, progress, out)
    summary = _heading(arguments, target, workload.seed, len(items), clock_start) | {"interrupted": code == 130}
    summary |= summarize(progress.records, options_for(workload, arguments.percentiles, arguments.save_detailed))
    if out:
        write_atomically(out, msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    print(as_table(summary))
    _warn_if_late(summary)
    _say_why(progress.records)
    return code or _too_many_failed(summary, arguments.max_failed_share)


def _add_spans(log: Path, progress: Progress, out: Path | None) -> None:
    """Add each request's seconds by part to its record, and to the file of records."""
    wanted = {record.index for record in progress.records if record.status == "ok"}
    known = spans(log)
    end = time.monotonic() + LOG_DELAY_S
    while not wanted <= known.keys() and time.monotonic() < end:
        time.sleep(0.05)
        known = spans(log)
    if not wanted <= known.keys():
        print(
            f"perf.client: {log} tells nothing of {len(wanted - known.keys())} of {len(wanted)} requests, so their "
            "records have no seconds by part; the server must log requests, at info or lower",
            file=sys.stderr,
        )
    progress.records = [msgspec.structs.replace(each, spans=known.get(each.index, {})) for each in progress.records]
    if out is not None:
        write_records(out.with_suffix(".jsonl"), progress.records)


def _warmup_items(arguments: argparse.Namespace, target: Target, workload: Workload) -> list[Prepared]:
    """Other prompts than the run's own (or the prefix cache would know them), all due at once."""
    if not arguments.warmup:
        return []
    other = msgspec.structs.replace(workload, seed=workload.seed + 1_000_003)
    planned = plan(other, target.adapters, prompt_maker(arguments, target, other.seed))[: arguments.warmup]
    early = [msgspec.structs.replace(request, index=-1 - request.index, at=0.0) for request in planned]
    return prepare(arguments, target, early, warmup=True)


def _event_loop_run(job: Coroutine[Any, Any, float]) -> float:
    try:
        import uvloop
    except ImportError:  # not there on every platform; asyncio's loop is only slower
        return asyncio.run(job)
    return uvloop.run(job)


def _allow_many_sockets(max_connections: int) -> None:
    """Raise the soft limit of open files: the usual 1024 is less than a thousand connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        if raised < wanted:
            raise ValueError(f"{max_connections} connections need {wanted} open files, the limit is {hard}: ulimit -n")


def _heading(
    arguments: argparse.Namespace, target: Target, seed: int, count: int, clock_start: float
) -> dict[str, Any]:
    """Describe the run: vLLM's header fields, and the command."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S"),
        "backend": arguments.backend,
        "endpoint_type": arguments.backend,
        "request_rate": arguments.rate,
        "max_concurrency": arguments.max_connections,
        "label": arguments.label or (Path(arguments.out).stem if arguments.out else ""),
        "model_id": target.model,
        "num_prompts": count,
        "num_adapters": len(target.adapters),
        "command": ["python", "-m", "perf.client", *sys.argv[1:]],
        "seed": seed,
        "clock_start": clock_start,
    }


def _warn_if_late(summary: dict[str, Any]) -> None:
    late = summary["lateness_ms"]
    closed_loop = summary["offered_rate"] is None  # a burst behind a bound on connections waits on purpose
    if late["median"] > LATE_MS and not closed_loop:
        print(
            f"perf.client: half of the requests were sent more than {late['median']:.0f} ms after they were due: "
            "the load was lower than asked for. Raise --max-connections or give the generator a free core.",
            file=sys.stderr,
        )


def _say_why(records: list[Record]) -> None:
    """Print the commonest reason for requests without an answer."""
    reasons = Counter((record.status, record.error) for record in records if record.status != "ok")
    if reasons:
        (status, error), count = reasons.most_common(1)[0]
        said = f": {error}" if error else ""
        print(f"perf.client: {reasons.total()} not answered, {count} of them so: {status}{said}", file=sys.stderr)


def _too_many_failed(summary: dict[str, Any], allowed: float) -> int:
    """Return 3 if a larger share failed than is allowed, or nothing was answered; else 0."""
    total = summary["completed"] + summary["failed"]
    failed = summary["failed"] - summary["statuses"].get("refused", 0)
    if failed / total <= allowed and (summary["completed"] or not failed):
        return 0
    print(f"perf.client: {failed} of {total} requests failed: {summary['statuses']}", file=sys.stderr)
    return 3


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return run(arguments)
    except (ValueError, OSError) as error:
        print(f"perf.client: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
