"""First paint of the console, its scrolling, and what five open pages cost the server.

    python -m perf.console --out perf/results/console.json

Why it matters: a page that operators leave open must not take from the requests that it shows. The server has 1,000
adapters and a little load. The CPU seconds of the HTTP process and of the engine process are read from /proc, without
pages and with five: the difference is theirs. First paint is the browser's own, of a page opened anew. Scrolling goes
through all rows of the table, some in each frame; the processor's time for a frame is that of the page's main thread.
The goals are under 1 s, under 3% of a core, under 16 ms for a frame and under 150 kB. Prints the result as JSON.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from inlaid.console.static import read_files
from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.report.provenance import now, provenance
from perf.process import ROOT, child_environment

CHROMIUM = "/usr/bin/chromium"
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
NUM_PAGES, NUM_ADAPTERS = 5, 1000
_TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(flags: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Run `inlaid serve` with these flags; yields its address and its process."""
    command = [sys.executable, "-m", "inlaid", "serve", "--port", "0", "--log-level", "error", *flags]
    process = subprocess.Popen(command, cwd=ROOT, env=child_environment({}), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"at:\s+(http://\S+)/v1 ", line):
                yield found[1], process.pid
                return
        raise RuntimeError("the server did not come up")
    finally:
        process.terminate()
        process.wait()


@contextmanager
def load(address: str, models: Sequence[str], headers: Sequence[dict[str, str]], pause: float) -> Iterator[None]:
    """Ask for short answers, a thread for each of `headers`, with a pause between two requests."""
    over = threading.Event()

    def ask(number: int) -> None:
        count = number
        while not over.wait(pause):
            count += 1
            body: dict[str, Any] = {"model": models[count * (1 + number) % len(models)], "prompt": "the small chair"}
            body |= {"max_tokens": 16, "deadline": 2.0}
            sent = {"Content-Type": "application/json", **headers[number]}
            request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), sent)
            with urllib.request.urlopen(request, timeout=120) as answer:
                answer.read()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(headers))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def cpu_seconds(process: int) -> float:
    """Return the CPU seconds that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def shares(processes: dict[str, int], seconds: float) -> dict[str, float]:
    """Return the share of a core that each process takes in the next seconds."""
    before, began = {name: cpu_seconds(process) for name, process in processes.items()}, time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    return {name: round((cpu_seconds(process) - before[name]) / passed, 4) for name, process in processes.items()}


def first_paint(page: Any, address: str, panel: str) -> float:
    """Open a panel anew and return the milliseconds to the browser's first paint with content."""
    page.goto("about:blank")
    page.goto(f"{address}/#/{panel}")
    page.wait_for_selector(".status.live")
    paint = "() => performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)[0]"
    page.wait_for_function(paint)
    return float(page.evaluate(paint))


_SCROLL = """() => new Promise((done) => {
  const box = document.querySelector(".table");
  const times = [];
  const step = (now) => {
    times.push(now);
    const before = box.scrollTop;
    box.scrollTop += 120;
    if (box.scrollTop === before) done(times);
    else requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
})"""


def scrolling(page: Any, address: str) -> dict[str, float]:
    """Scroll through the table of adapters; return milliseconds between frames, and the processor's for a frame."""
    page.goto(f"{address}/#/adapters")
    page.wait_for_selector("tr.pad", state="attached")  # rows beyond those in sight
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def thread_seconds() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return float(next(each["value"] for each in metrics if each["name"] == "TaskDuration"))

    before = thread_seconds()
    times = page.evaluate(_SCROLL)
    used = thread_seconds() - before
    gaps = sorted(after - this for this, after in pairwise(times))
    return {
        "frames": len(gaps),
        "median_ms": round(statistics.median(gaps), 1),
        "p95_ms": round(gaps[int(0.95 * len(gaps))], 1),
        "longest_ms": round(gaps[-1], 1),
        "processor_ms_per_frame": round(1e3 * used / len(gaps), 2),
    }


def measure(seconds: float) -> dict[str, Any]:
    """Measure on a server of the demo with many names for its adapters."""
    from playwright.sync_api import sync_playwright

    folders = sorted((ROOT / "models" / "demo" / "adapters").iterdir())
    named = {f"adapter-{number:04}": folders[number % len(folders)] for number in range(NUM_ADAPTERS)}
    given = [f"{name}={folder}" for name, folder in named.items()]
    with (
        serving(["--max-model-len", "512", "--num-blocks", "400", "--adapter", *given]) as (address, server),
        load(address, list(named)[:50], [{}], pause=0.5),
        sync_playwright() as playwright,
    ):
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        engines = [pid for pid in children if b"inlaid.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        processes = {"server": server, "engine": int(engines[0])}
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        warm = browser.new_page()
        paints = {panel: first_paint(warm, address, panel) for panel in ("load", "adapters", "fairness")}
        scrolled = scrolling(warm, address)
        warm.close()
        time.sleep(2.0)
        without = shares(processes, seconds)
        pages = [browser.new_page() for _ in range(NUM_PAGES)]
        for number, page in enumerate(pages):
            page.goto(f"{address}/#/{('load', 'adapters', 'fairness', 'residency', 'chat')[number]}")
            page.wait_for_selector(".status.live")
        time.sleep(3.0)
        with_pages = shares(processes, seconds)
        browser.close()
    more = {name: round(with_pages[name] - without[name], 4) for name in processes}
    return {
        "adapters": NUM_ADAPTERS,
        "pages": NUM_PAGES,
        "seconds": seconds,
        "page_bytes_gzipped": sum(len(file.packed) for file in read_files().values()),
        "first_paint_ms": paints,
        "scrolling": scrolled,
        "share_of_a_core_without_pages": without,
        "share_of_a_core_with_pages": with_pages,
        "share_of_a_core_of_the_pages": more,
        "goals": {
            "first_paint_ms": 1000,
            "share_of_a_core_of_the_pages": 0.03,
            "processor_ms_per_frame": 16,
            "page_bytes_gzipped": 150_000,
        },
        "load_average": os.getloadavg()[0],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, help="file for the result")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement (default: 30)")
    args = parser.parse_args(arguments)
    result = {**provenance(), "date": now(), **measure(args.seconds)}
    if args.out is not None:
        write_atomically(args.out, json.dumps(result, indent=1).encode() + b"\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
