"""The report: numbers, ratios and warnings as text, and the page as a real browser shows it."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from inlaid.workload.spec import Objective
from perf.records import Record, write_records
from perf.report import main
from perf.summary import Options, summarize
from tests.perf.browser import Page, find_browser, with_page


def written(folder: Path, label: str, rate: float, slow: float = 1.0, late: float = 0.0, failed: int = 0) -> Path:
    """Write a run of 60 requests over three adapters, as `perf.client` would leave it."""
    rng = np.random.default_rng(int(rate * 10))
    records = []
    for i in range(60):
        gaps = (slow * rng.gamma(4, 0.005, 20)).round(6).tolist()
        ttft, sent = slow * float(rng.gamma(2, 0.05)), i / rate + late
        name, status = f"task-{i % 3}", "error" if i < failed else "ok"
        end = sent + ttft + sum(gaps)
        records.append(
            Record(i, name, name, "default", i / rate, sent, end, status, 32, 21, 21, ttft, gaps, 200)  # type: ignore[arg-type]
        )
    options = Options(objectives={"default": Objective(ttft_ms=100)})
    heading = {"label": label, "date": "20250101-000000", "interrupted": False, "command": ["perf.client", "<x>"]}
    summary = heading | summarize(records, options)
    path = folder / f"{label.replace('/', '_')}.json"
    path.write_bytes(msgspec.json.encode(summary))
    write_records(path.with_suffix(".jsonl"), records)
    return path


def report(folder: Path, *paths: Path) -> str:
    out = folder / "report.html"
    assert main([*map(str, paths), "--out", str(out)]) == 0
    return out.read_text()


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the words: drawing takes a second."""
    monkeypatch.setattr("perf.report.draw", lambda runs: ({"Empty": b"png"}, ""))


def cells(page: str, run: str) -> list[str]:
    """Return the texts of a run's row in the first table."""
    row = next(row for row in re.findall(r"<tr>(.*?)</tr>", page) if f"<td>{run}</td>" in row)
    return [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row)]


@pytest.mark.usefixtures("_undrawn")
def test_ratios_are_to_the_first_run_and_coloured_by_what_is_better(tmp_path: Path) -> None:
    page = report(tmp_path, written(tmp_path, "base", 10), written(tmp_path, "half", 10, slow=0.5))
    head = re.findall(r"<th>(.*?)</th>", page)
    found = dict(zip(head, cells(page, "half"), strict=False))
    assert found["mean TTFT (ms)"].endswith("&times;0.50")
    assert found["mean ITL (ms)"].endswith("&times;0.50")
    assert re.search(r'<small class="good">&times;0\.50</small>', page)
    back = report(tmp_path, tmp_path / "half.json", tmp_path / "base.json")
    assert re.search(r'<small class="bad">&times;2\.00</small>', back)


@pytest.mark.usefixtures("_undrawn")
def test_what_spoils_a_figure_is_said_above_it(tmp_path: Path) -> None:
    page = report(tmp_path, written(tmp_path, "late", 10, late=0.5), written(tmp_path, "broken", 10, failed=7))
    assert "late: half of the requests were sent more than 500 ms late" in page
    assert "broken: 7 of 60 requests got no full answer" in page


@pytest.mark.usefixtures("_undrawn")
def test_labels_leave_out_what_all_have_in_common_and_twins_are_numbered(tmp_path: Path) -> None:
    one, two = written(tmp_path, "demo/short/policy-a", 10), written(tmp_path, "demo/short/policy-b", 10)
    page = report(tmp_path, one, two, two)
    assert all(f"<td>{name}</td>" in page for name in ("policy-a", "policy-b", "policy-b (2)"))


@pytest.mark.usefixtures("_undrawn")
def test_labels_are_escaped(tmp_path: Path) -> None:
    page = report(tmp_path, written(tmp_path, "<script>alert(1)<", 10))
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a report of two policies at three rates, drawn."""
    folder = tmp_path_factory.mktemp("drawn")
    report(folder, *[written(folder, f"m/rate-{rate}/policy-{p}", rate) for p in "ab" for rate in (5.0, 10.0, 20.0)])
    return folder


def test_pictures_are_written_beside_the_page(drawn: Path) -> None:
    names = {path.name for path in drawn.glob("*.png")}
    assert names == {
        f"report-{name}.png"
        for name in (
            "rate", "ttft-over-time", "inter-token-latency-over-time", "distributions", "service-by-tenant",
            "against-rate",
        )
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn.glob("*.png"))


def test_without_matplotlib_the_tables_remain_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report(tmp_path, written(tmp_path, "base", 10))
    assert "pip install matplotlib" in page
    assert "pip install matplotlib" in capsys.readouterr().err
    assert cells(page, "base")[1] == "60"


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "is not a summary of a run"), ("[", "is not a summary"), (None, "No such file")]
)
def test_what_is_no_run_is_one_clear_line(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path), "--out", str(tmp_path / "r.html")]) == 2
    assert message in capsys.readouterr().err


def test_a_real_browser_shows_it_whole(drawn: Path, tmp_path: Path) -> None:
    """Every picture decoded and in view, no error, nothing fetched, no sideways scrolling of the page."""
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium to let the report be looked at")
    url = (drawn / "report.html").as_uri()

    async def look(page: Page, width: int) -> dict[str, Any]:
        page.requests.clear()
        await page.open(url, width)
        seen = {
            "images": await page.ask("[...document.images].map(i => [i.alt, i.naturalWidth, i.clientWidth])"),
            "title": await page.ask("document.querySelector('h1').innerText"),
            "rows": await page.ask("document.querySelectorAll('table')[0].tBodies[0].rows.length"),
            "charts": await page.ask("document.querySelectorAll('.plot canvas').length"),
            "overflow": await page.ask("document.documentElement.scrollWidth - window.innerWidth"),
            "ink": await page.ask(INK),
            "closed": await page.ask("document.querySelector('details').open"),
        }
        await page.ask("document.querySelector('details summary').click()")
        seen["opened"] = await page.ask("document.querySelector('details').open")
        seen["picture"] = await page.picture()
        return seen | {"errors": page.errors, "requests": list(page.requests)}

    async def look_twice(page: Page) -> dict[int, dict[str, Any]]:
        return {width: await look(page, width) for width in (1280, 390)}

    for width, seen in asyncio.run(with_page(browser, tmp_path, look_twice)).items():
        check(width, seen, url)


def check(width: int, seen: dict[str, Any], url: str) -> None:
    assert [name for name, _, _ in seen["images"]] == [
        "Rate", "TTFT over time", "Inter-token latency over time", "Distributions", "Service by tenant",
        "Against rate",
    ]  # fmt: skip
    assert all(natural > 800 and 300 < shown <= width for _, natural, shown in seen["images"])
    assert (seen["title"], seen["rows"], seen["errors"]) == ("Performance report", 6, [])
    assert [request for request in seen["requests"] if not request.startswith("data:")] == [url]
    assert seen["charts"] == 7
    assert seen["overflow"] <= 0
    assert min(seen["ink"]) > 0.005
    assert (seen["closed"], seen["opened"]) == (False, True)
    assert seen["picture"].startswith(b"\x89PNG")


# The share of pixels of each picture that are not white, as the browser decoded them: an empty plot would have few.
INK = """Promise.all([...document.images].map(image => {
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let dark = 0;
    for (let i = 0; i < data.length; i += 4) if (data[i] + data[i + 1] + data[i + 2] < 700 && data[i + 3] > 0) dark++;
    return dark / (data.length / 4);
}))"""
