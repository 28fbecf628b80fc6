"""Pictures of the console's panels for `docs/console.md`, from a server that really serves.

    python -m perf.console_shots --out docs/img --model .inlaid/demo-4bit

Three tenants of unequal greed ask a server of the demo, which has fewer places than adapters. Each panel is taken wide
and light, one dark and one as on a phone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inlaid.flags import Parser
from perf.console import CHROMIUM, FLAGS, load, serving
from perf.process import ROOT

ADMIN = "admin-of-the-pictures"
TENANTS = ("anna", "anna", "anna", "ben", "ben", "carla")
PANELS = ("load", "adapters", "adapters/to_velar", "residency", "accuracy")


def take(page: Any, panel: str, path: Path, height: int = 900) -> None:
    """Show a panel and take its picture."""
    page.set_viewport_size({"width": page.viewport_size["width"], "height": height})
    page.evaluate("panel => { location.hash = '#/' + panel }", panel)
    page.wait_for_timeout(2500)
    page.screenshot(path=path, full_page=panel == "load")  # with all its charts
    print(path, path.stat().st_size)


def chat(page: Any, names: Sequence[str]) -> None:
    """Ask the base and two adapters for the same, with log probabilities."""
    page.evaluate("() => { location.hash = '#/chat' }")
    for _ in names[1:]:
        page.get_by_role("button", name="Add a column").click()
    for number, name in enumerate(names, 1):
        page.get_by_label(f"Column {number}", exact=True).get_by_label("Model").fill(name)
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("40")
    page.get_by_label("Show log probabilities").check()
    page.get_by_text("Settings").click()
    page.get_by_label("Message").fill("the small chair never caught this duck")
    page.get_by_label("Message").press("Control+Enter")
    for number in range(1, len(names) + 1):
        page.get_by_label(f"Column {number}", exact=True).get_by_text("ended by").wait_for(timeout=120_000)


def what_if(page: Any) -> None:
    """Try another policy."""
    page.evaluate("() => { location.hash = '#/fairness' }")
    page.get_by_label("Policy").select_option("fcfs")
    page.get_by_label("Minutes to replay").fill("1")
    page.get_by_role("button", name="What if?").click()
    page.get_by_text("Replayed.").wait_for(timeout=120_000)


def pictures(out: Path, model: str, more: Sequence[str], seconds: float) -> None:
    """Serve, ask for a while and take all pictures."""
    from playwright.sync_api import sync_playwright

    folders = sorted((ROOT / "models" / "demo" / "adapters").iterdir())
    adapters = [f"{folder.name}={folder.relative_to(ROOT)}" for folder in folders]  # no path of this machine
    memory = ["--max-model-len", "512", "--num-blocks", "200", "--max-loras", "6", "--max-num-seqs", "3"]
    policy = ["--policy", "vtc", "--tenant", "header", "--admin-key", ADMIN, "--allow-runtime-lora"]
    root = ["--lora-root", str(folders[0].parent)]
    headers = [{"X-Tenant": tenant, "Authorization": f"Bearer {ADMIN}"} for tenant in TENANTS]
    out.mkdir(parents=True, exist_ok=True)
    named = [model] if model else []
    with (
        serving([*named, *memory, *policy, *root, "--adapter", *adapters, *more]) as (address, _),
        load(address, [folder.name for folder in folders], headers, pause=0.05),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.evaluate("key => sessionStorage.setItem('inlaid.key', key)", ADMIN)
        page.reload()
        page.wait_for_selector(".status.live")
        time.sleep(seconds)
        for panel in PANELS:
            take(page, panel, out / f"console-{panel.replace('/', '-')}.png")
        chat(page, ("demo" if not model else Path(model).name, "to_velar", "text_summary"))
        take(page, "chat", out / "console-chat.png")
        what_if(page)
        page.screenshot(path=out / "console-what-if.png", full_page=True)
        page.get_by_role("button", name="Dark colours").click()
        take(page, "load", out / "console-load-dark.png")
        page.set_viewport_size({"width": 390, "height": 800})
        take(page, "adapters", out / "console-phone.png", 800)
        browser.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/img"), help="folder for the pictures")
    parser.add_argument("--model", default="", help="the base to serve, made of the demo; none: the demo")
    parser.add_argument("--adapter", nargs="*", default=[], metavar="NAME=PATH", help="further adapters")
    parser.add_argument("--seconds", type=float, default=90.0, help="of load before the first picture")
    args = parser.parse_args(arguments)
    pictures(args.out, args.model, args.adapter, args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
