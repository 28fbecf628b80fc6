"""Run other people's clients against the demo, each in an environment of its own: `bash tests/clients/run.sh NAME|all`.

What a client can do goes into results.json, and from there into the table of docs/clients.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".inlaid" / "clients"
RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "clients.md"
NAMES = ("openai", "anthropic", "pydantic_ai", "instructor", "llama_index", "langchain", "openai_agents", "vercel")
FEATURES = ("chat", "streaming", "tools", "streamed tools", "agent", "structured output", "conversation")
_START, _END = "<!-- table: written by tests/clients/run.sh -->\n", "<!-- end of table -->"
_PATIENCE = 900  # seconds for one client

Results = dict[str, dict[str, str]]


def environment(name: str) -> Path:
    """Make a client's environment, unless it is there for these versions already; return the program that runs it."""
    folder, pins = ENVIRONMENTS / name, HERE / name / ("package.json" if name == "vercel" else "requirements.txt")
    made_for = folder.parent / f"{name}.made-for"
    program = folder / "bin" / "python"
    if not made_for.exists() or made_for.read_text() != pins.read_text():
        print(f"{name}: making its environment", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        if name == "vercel":
            (folder / pins.name).write_text(pins.read_text())
            subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=folder, check=True)
        else:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([program, "-m", "pip", "install", "-q", "-r", pins], check=True)
        made_for.write_text(pins.read_text())
    return program


def check(name: str, url: str) -> dict[str, str]:
    """Run one client's checks; return what each feature did: yes, or no and why."""
    program = environment(name)
    if name == "vercel":  # its packages are found from the file's folder
        script = ENVIRONMENTS / name / "check.mjs"
        script.write_text((HERE / name / "check.mjs").read_text())
        command: list[str | Path] = ["node", script]
    else:
        command = [program, HERE / name / "check.py"]
    given = {
        "INLAID_URL": url,
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": "none",
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "none",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "PYTHONPATH": str(HERE),
    }
    log = ENVIRONMENTS / f"{name}.log"
    with log.open("w") as errors:
        done = subprocess.run(
            command, env={**os.environ, **given}, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=_PATIENCE
        )
    lines = [line.split("\t") for line in done.stdout.splitlines() if line.count("\t") == 2]
    if not lines:
        raise SystemExit(f"{name}: no check ran; {log} says why")
    return {feature: answer if answer == "yes" else f"no: {why}" for feature, answer, why in lines}


@contextmanager
def demo() -> Iterator[str]:
    """Serve the demo on a free port; yield its address."""
    command = [sys.executable, "-m", "inlaid", "serve", "--port", "0", "--no-log-requests"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    try:
        for line in server.stdout:
            if found := re.search(r"at:\s+(http://\S+)/v1 ", line):
                yield found.group(1)
                return
        raise SystemExit("the demo did not start")
    finally:
        server.terminate()
        server.stdout.read()
        server.wait()


def table(results: Results) -> str:
    """Return the results as a table of Markdown."""
    lines = [f"| client | {' | '.join(FEATURES)} |", "|---|" + "---|" * len(FEATURES)]
    for name in NAMES:
        if name in results:
            marks = {"yes": "yes", None: ""}
            cells = [marks.get(results[name].get(feature), "no") for feature in FEATURES]
            lines.append(f"| {_versions(name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _versions(name: str) -> str:
    if name == "vercel":
        pins = json.loads((HERE / name / "package.json").read_text())["dependencies"]
        return ", ".join(f"{package} {version}" for package, version in pins.items())
    return ", ".join((HERE / name / "requirements.txt").read_text().replace("==", " ").split("\n")[:-1])


def main() -> int:
    wanted = sys.argv[1:]
    if not wanted or set(wanted) - {*NAMES, "all"}:
        print(f"usage: bash tests/clients/run.sh all | {' | '.join(NAMES)}", file=sys.stderr)
        return 2
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with demo() as url:
        for name in NAMES if "all" in wanted else wanted:
            results[name] = check(name, url)
            for feature, answer in results[name].items():
                print(f"{name}: {feature}: {answer}")
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    page = PAGE.read_text()
    before, rest = page.split(_START)
    PAGE.write_text(before + _START + table(results) + rest[rest.index(_END) :])
    return int(any(answer != "yes" for answers in results.values() for answer in answers.values()))


if __name__ == "__main__":
    sys.exit(main())
