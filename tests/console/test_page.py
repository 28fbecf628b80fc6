"""The console in a real browser: every panel with 1,000 adapters under load, and what a hostile name or a restart does.

One server and one browser serve all tests here; `fake_server.py` is a real server over an engine without a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from tests.console.conftest import API_KEY, NUM_ADAPTERS, FakeServer
from tests.console.fake_server import HOSTILE, PROTO, TENANTS
from tests.console.fake_tasks import GO
from tests.server.live import ADMIN_KEY, DEMO, serving

AXE = Path(__file__).with_name("axe.min.js").read_text()
PANELS = ("chat", "adapters", "residency", "fairness", "accuracy", "load")
MESSAGE = "What do you see?"
SETTINGS = {
    "System prompt": "Be brief.",
    "Temperature": "0.5",
    "Top p": "0.9",
    "Most tokens": "200",
    "Seed": "7",
    "Stop strings": "bye",
}
FAULTS = (
    ("JSON schema", '{"type": ', "The JSON schema cannot be used"),
    ("JSON schema", "[1]", "it is not an object"),
    ("Top p", "1.5", "Top p must be a number above 0 and at most 1."),
    ("Most tokens", "many", "Most tokens must be a whole number of at least 1."),
)
SCHEMA = '{"type": "object", "properties": {"a": {"const": "x"}}, "required": ["a"], "additionalProperties": false}'
TIMEOUT = 60_000  # milliseconds; nothing here judges speed


@pytest.fixture
def open_page(browser: Any, fake: FakeServer) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a page with a key. Afterwards nothing may have gone wrong, left the host or run."""
    contexts: list[Any] = []
    pages: list[Any] = []
    faults: list[str] = []
    hosts: set[str] = set()

    def opened(panel: str = "load", key: str = ADMIN_KEY, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(TIMEOUT)
        page = context.new_page()
        pages.append(page)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if "Security Policy" in said.text else None)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        if key:
            page.add_init_script(
                f"sessionStorage.getItem('inlaid.key') ?? sessionStorage.setItem('inlaid.key', {key!r})"
            )
        page.goto(f"{fake.url}/#/{panel}")
        if key in (ADMIN_KEY, API_KEY):
            page.wait_for_selector(".status.live")
        return page

    yield opened
    hacked = [page.evaluate("window.hacked") for page in pages]
    for context in contexts:
        context.close()
    assert faults == []
    assert hosts == {f"127.0.0.1:{fake.port}"}
    assert set(hacked) == {None}


def show(page: Any, panel: str) -> None:
    """Go to a panel, as a click on its link does."""
    page.evaluate("panel => { location.hash = '#/' + panel }", panel)
    current = "panel => document.querySelector('nav a[aria-current]').hash === '#/' + panel.split('/')[0]"
    page.wait_for_function(current, arg=panel)


def serious(page: Any, *rules: str) -> list[str]:
    """Return what axe finds that keeps people from using the page, by all rules of WCAG AA or by these.

    Of each table it reads the first rows: those below are of the same kind, and each takes as long."""
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(AXE)
    tags = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    only = {"type": "rule", "values": list(rules)} if rules else tags
    context = "{ include: [['html']], exclude: [['tbody tr:nth-of-type(n+8)']] }"
    found = page.evaluate(f"only => axe.run({context}, {{ runOnly: only, resultTypes: ['violations'] }})", only)
    return [
        f"{each['id']}: {node['html'][:200]}"
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def replayed(page: Any) -> Any:
    """Ask what if until there is an answer, as a replay needs some measured steps; return its table."""
    while True:
        page.get_by_role("button", name="What if?").click()
        said = page.locator("[role=status]", has_text="Replayed.").or_(page.locator("p.bad[role=status]"))
        said.wait_for(timeout=4 * TIMEOUT)  # a process of its own runs the simulator six times
        if "Replayed" in said.inner_text():
            return page.get_by_role("region", name="What if", exact=True)
        page.wait_for_timeout(500)


def reported(page: Any, doing: str) -> str:
    """Return what the page says when something is done, or why it is not."""
    said = page.locator("p[role=status]", has_text=f"{doing}: done.").or_(page.locator("p.bad[role=status]"))
    said.wait_for()
    return str(said.inner_text())


def test_residency_says_what_more_memory_would_bring(open_page: Callable[..., Any]) -> None:
    page = open_page("residency")  # before other tests: there are few requests to replay
    table = replayed(page)
    places = page.evaluate("() => +document.querySelector('.facts dd').textContent.split(' of ')[1].split(' ')[0]")
    wanted = ["in force", *(f"{each} adapters on the device" for each in (places // 2, 3 * places // 2, 2 * places))]
    assert [text for text in wanted if not table.get_by_role("cell", name=text, exact=True).count()] == []
    assert table.get_by_role("cell", name="KV for").count() == 1
    assert serious(page) == []


def test_every_panel_can_be_used_by_all_and_shows_figures(open_page: Callable[..., Any], long: bool) -> None:
    page = open_page(color_scheme="light")
    in_dark = (*PANELS, "adapters/adapter-0000") if long else ("overview", "adapters")  # colours come from one list
    for panel in (*PANELS, "adapters/adapter-0000"):
        page.emulate_media(color_scheme="light")
        show(page, panel)
        page.wait_for_selector("main h1:visible")
        assert serious(page) == [], panel
        if panel not in in_dark:
            continue
        page.emulate_media(color_scheme="dark")
        assert serious(page, "color-contrast") == [], f"{panel} in dark"  # the rest is the same in all colours
    show(page, "load")
    page.wait_for_function("() => !document.querySelector('.facts dd').textContent.startsWith('0 ')")
    assert page.locator("canvas").count() >= 9


def test_a_thousand_adapters_scroll_sort_and_filter(open_page: Callable[..., Any]) -> None:
    page = open_page("adapters")
    table = page.get_by_role("region", name="Adapters")
    page.wait_for_selector(f"table[aria-rowcount='{NUM_ADAPTERS + 1}']")
    assert table.locator("tbody tr:not(.pad)").count() < 90
    table.get_by_role("button", name="Adapter", exact=True).click()
    table.evaluate("box => { box.scrollTop = box.scrollHeight }")
    page.get_by_role("link", name="adapter-0997").wait_for()
    page.get_by_label("Filter by name").fill("-0123")
    page.wait_for_selector("table[aria-rowcount='2']")
    page.get_by_label("Filter by name").fill("<IMG")
    page.get_by_role("link", name=HOSTILE).click()
    assert page.get_by_role("heading", level=1).text_content() == HOSTILE
    page.get_by_text("k_proj").wait_for()  # it is not changed
    show(page, f"adapters/{quote(PROTO)}")
    page.get_by_text("k_proj").wait_for()


def test_a_phone_shows_every_panel_within_its_width(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": 375, "height": 720})
    for panel in (*PANELS, "adapters/adapter-0000"):
        show(page, panel)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), panel


def test_chat_in_three_columns_and_its_copies(open_page: Callable[..., Any]) -> None:
    page = open_page("chat")
    add = page.get_by_role("button", name="Add a column")
    add.click()
    add.click()
    assert add.is_disabled()
    for number, model in enumerate(("demo", "adapter-0001", HOSTILE), 1):
        page.get_by_label(f"Column {number}", exact=True).get_by_label("Model").fill(model)
    page.get_by_text("Settings").click()
    for label, text in SETTINGS.items():
        page.get_by_label(label).fill(text)
    page.get_by_label("Message").fill(MESSAGE)
    send = page.get_by_role("button", name="Send to all 3")
    for label, bad, said in FAULTS:
        field = page.get_by_label(label)
        before = field.input_value()
        field.fill(bad)
        page.locator("details").get_by_text(said).wait_for()
        assert field.get_attribute("aria-invalid") == "true"
        send.click()  # nothing is sent, and the message stays
        page.get_by_role("alert").get_by_text(said).wait_for()
        field.fill(before)
    assert page.get_by_text("No messages yet.").count() == 3
    page.get_by_label("Message").press("Control+Enter")
    for number in (1, 2, 3):
        column = page.get_by_label(f"Column {number}", exact=True)
        column.get_by_text("ended by stop").wait_for()
        assert "<script>window.hacked=2</script>" in column.locator(".message.assistant").inner_text()
        assert "tokens per s" in column.inner_text()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copied = []
    for kind in ("curl", "Python"):
        page.get_by_label("Column 2", exact=True).get_by_role("button", name=f"Copy as {kind}").click()
        page.get_by_text(f"Copied as {kind}.").wait_for()
        copied.append(page.evaluate("navigator.clipboard.readText()"))
    curl, python = copied
    compile(python, "copied", "exec")
    for sent in ('"temperature":0.5', '"top_p":0.9', '"max_tokens":200', '"seed":7', '"stop":["bye"]', "Be brief."):
        assert sent in curl
        assert sent.replace('":', "=").lstrip('"') in python
    assert all(ADMIN_KEY not in text and "adapter-0001" in text for text in copied)
    assert curl.startswith("curl ")
    assert page.evaluate("Object.values(localStorage).join().includes('admin-secret')") is False
    assert ADMIN_KEY not in page.url
    page.reload()
    page.get_by_label("Earlier conversations").select_option(label=MESSAGE)
    page.get_by_label("Column 3", exact=True).get_by_text(MESSAGE).wait_for()


def test_pin_drain_unload_and_load_an_adapter(open_page: Callable[..., Any], fake: FakeServer) -> None:
    page = open_page("adapters/adapter-0900")
    page.get_by_role("button", name="Pin to the device").click()
    page.get_by_role("button", name="Unpin").wait_for()
    page.get_by_role("button", name="Drain").click()
    page.get_by_role("button", name="Take requests again").wait_for()
    refused = page.evaluate(
        "key => fetch('/v1/completions', {method: 'POST', headers: {Authorization: 'Bearer ' + key},"
        " body: JSON.stringify({model: 'adapter-0900', prompt: [5]})}).then(r => r.status)",
        ADMIN_KEY,
    )
    assert refused == 503
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Unload").click()
    page.get_by_text("No adapter of this name is loaded.").wait_for()
    show(page, "adapters")
    page.get_by_text("Load a folder").click()
    page.get_by_label("Name", exact=True).fill("adapter-0900")
    page.get_by_label("Folder on the server").fill(str(DEMO / "adapters" / "code"))
    page.get_by_role("button", name="Load", exact=True).click()
    page.get_by_text("Loading adapter-0900: done.").wait_for()


def test_a_task_is_followed_switched_to_and_rolled_back(open_page: Callable[..., Any], fake: FakeServer) -> None:
    page = open_page("accuracy")
    page.on("dialog", lambda dialog: dialog.accept())
    task = {"name": "maths", "adapter": "none", "examples": [{"prompt": "1"}, {"prompt": "2"}], "switch": False}
    added = page.evaluate(
        "([key, task]) => fetch('/v1/tasks', {method: 'POST', headers: {Authorization: 'Bearer ' + key,"
        " 'Content-Type': 'application/json'}, body: JSON.stringify(task)}).then(r => r.status)",
        [ADMIN_KEY, task],
    )
    assert added == 200
    jobs = page.get_by_role("region", name="Jobs")
    jobs.get_by_text("1 of 4 calibration").wait_for()
    assert jobs.get_by_role("progressbar", name="Progress of maths").get_attribute("max") == "4"
    switch = jobs.get_by_role("button", name="Switch")
    assert switch.is_disabled()
    assert serious(page) == []
    (fake.bank / "jobs" / GO).touch()
    jobs.get_by_text("ready", exact=True).wait_for()
    jobs.get_by_text("maths 0.25").wait_for()
    switch.click()
    assert reported(page, "Switching to maths") == "Switching to maths: done."
    page.get_by_text("Version 1 of the base is served; 2 are kept.").wait_for()
    page.get_by_role("button", name="Roll back").click()
    while "try again when they have ended" in (said := reported(page, "Rolling back")):
        page.get_by_role("button", name="Roll back").click()  # requests of before the switch may still run
    assert said == "Rolling back: done."
    page.get_by_text("Version 0 of the base is served; 2 are kept.").wait_for()
    jobs.get_by_text("rolled back to version 0").wait_for()
    jobs.get_by_role("button", name="Forget").click()
    jobs.get_by_text("No job.").wait_for()


def tab_to(page: Any, name: str) -> None:
    """Press Tab until an element of this text or label has the focus."""
    named = "() => document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
    for _ in range(120):
        page.keyboard.press("Tab")
        if page.evaluate(named).strip().startswith(name):
            return
    raise AssertionError(f"the keyboard does not reach {name}")


def test_the_keyboard_reaches_and_does_everything(open_page: Callable[..., Any]) -> None:
    page = open_page("load")
    tab_to(page, "Skip to the content")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Shift+Tab")
    page.evaluate("document.querySelector('.skip').focus()")
    tab_to(page, "Adapters")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"table[aria-rowcount='{NUM_ADAPTERS + 1}']")
    tab_to(page, "Adapters")  # the table, which scrolls by the arrow keys
    page.keyboard.press("End")
    page.wait_for_function("() => document.querySelector('.table').scrollTop > 20000")
    tab_to(page, "Tier")
    page.keyboard.press("Enter")
    page.wait_for_selector("th[aria-sort=ascending] >> text=Tier")
    tab_to(page, "adapter-")
    page.keyboard.press("Enter")
    tab_to(page, "Pin to the device")
    page.keyboard.press("Space")
    page.get_by_role("button", name="Unpin").click()


def test_a_policy_is_tried_and_then_applied(open_page: Callable[..., Any]) -> None:
    page = open_page("fairness")
    page.get_by_role("cell", name=TENANTS[2], exact=True).first.wait_for()
    page.get_by_label("Policy").select_option("vtc")
    page.get_by_label("Weights").fill("alpha=2")
    page.get_by_label("Minutes to replay").fill("0.5")
    table = replayed(page)
    assert table.get_by_role("cell", name="in force").count() == table.get_by_role("cell", name="vtc").count() == 1
    page.get_by_role("button", name="Apply").click()
    page.get_by_text("The scheduler is changed").wait_for()
    page.wait_for_function("() => document.querySelector('.facts dd').textContent === 'vtc'")
    page.get_by_role("region", name="Queue").get_by_text("its tenant's counter is").first.wait_for()


def test_a_key_is_asked_for_and_decides_what_is_shown(open_page: Callable[..., Any]) -> None:
    page = open_page(key="")
    page.get_by_role("heading", name="This server asks for a key").wait_for()
    assert serious(page) == []
    page.get_by_role("textbox", name="Key").fill("wrong")
    page.get_by_role("button", name="Use it").click()
    page.get_by_text("This key is not valid here.").wait_for()
    page.get_by_role("textbox", name="Key").fill(API_KEY)
    page.get_by_role("button", name="Use it").click()
    page.wait_for_selector(".status.live")
    show(page, "fairness")
    page.get_by_text("Figures of tenants need the admin key").wait_for()
    show(page, "adapters/adapter-0001")
    page.get_by_text("Read-only: changes need the admin key").wait_for()
    assert page.get_by_role("button", name="Pin to the device").is_disabled()
    assert "/secret/" not in page.content()
    assert json.dumps(page.evaluate("Object.values(localStorage)")).count("secret") == 0
    page.get_by_role("button", name="Key:").click()
    page.get_by_role("textbox", name="Key").fill(ADMIN_KEY)
    page.get_by_role("button", name="Use it").click()
    page.get_by_text("/secret/adapter-0001").wait_for()


def test_a_restarted_server_is_found_again_and_nothing_typed_is_lost(
    open_page: Callable[..., Any], fake: FakeServer
) -> None:
    page = open_page("chat")
    page.get_by_label("Message").fill("half a thought")
    fake.stop()
    page.get_by_text("Connection lost, trying again").wait_for()
    page.get_by_text("what you typed is kept").wait_for()
    fake.start()
    page.get_by_text("Connected again").wait_for()
    assert page.get_by_label("Message").input_value() == "half a thought"
    show(page, "adapters")
    page.wait_for_selector(f"table[aria-rowcount='{NUM_ADAPTERS + 1}']")


def test_the_demos_server_shows_and_steers_its_real_adapters(browser: Any) -> None:
    """The same page over a real model: an answer of the base and an adapter, its modules, a pin."""
    flags = ("--admin-key", ADMIN_KEY, "--max-num-seqs", "4")
    with serving(*flags) as live:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT)
        page.add_init_script(f"sessionStorage.setItem('inlaid.key', {ADMIN_KEY!r})")
        page.goto(f"{live.url}/#/chat?model=to_velar")
        page.get_by_role("button", name="Add a column").click()
        page.get_by_text("Settings").click()
        page.get_by_label("Show log probabilities").check()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Message").fill("the small chair")
        page.get_by_role("button", name="Send to all 2").click()
        texts = []
        for number in (1, 2):
            column = page.get_by_label(f"Column {number}", exact=True)
            column.get_by_text("ended by").wait_for()
            texts.append(column.locator(".message.assistant").inner_text())
            assert column.locator(".token").count() > 2
        assert texts[0] != texts[1]
        page.get_by_label("JSON schema").fill(SCHEMA)
        page.get_by_label("Message").fill("an object")
        page.get_by_role("button", name="Send to all 2").click()
        for number in (1, 2):
            column = page.get_by_label(f"Column {number}", exact=True)
            column.locator(".message.assistant", has_text=re.compile(r'\{\s*"a"\s*:\s*"x"\s*\}')).wait_for()
        show(page, "adapters/to_velar")
        page.get_by_role("cell", name="q_proj").wait_for()
        page.get_by_role("button", name="Pin to the device").click()
        page.get_by_role("button", name="Unpin").wait_for()
        page.close()
