"""The page in a browser: silent, fetching nothing, no wider than the window, readable in both themes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pytest

from sim.report.differences import compared, page
from tests import reported

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
WINDOWS = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 360, "height": 740}}
KINDS = (*reported.KINDS, "comparison")

LUMINANCE = """
(() => {
  const channel = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const seen = new Map();
  const parse = text => { if (!seen.has(text)) seen.set(text, drawn(text)); return seen.get(text); };
  const drawn = text => {
    const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    c.fillStyle = text; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data];
  };
  const light = text => { const [r, g, b] = parse(text); return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
  const behind = e => {
    for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (parse(c)[3] === 255 && c !== 'rgba(0, 0, 0, 0)') return c; }
    return getComputedStyle(document.body).backgroundColor;
  };
  const worst = {ratio: 99, text: ''};
  for (const e of document.querySelectorAll('p, li, dt, dd, th, td, td *, th *, a, h1, h2, h3, summary, figcaption, code, svg text')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), inSvg = e.namespaceURI.endsWith('svg');
    const [a, b] = [light(inSvg ? style.fill : style.color), light(behind(inSvg ? e.closest('svg').parentElement : e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst.ratio) { worst.ratio = ratio; worst.text = e.textContent; }
  }
  return worst;
})()
"""
OVERLAPS = """
[...document.querySelectorAll('tr, .prices, nav ul, .facts')].flatMap(row => {
  const boxes = [...row.children].map(e => e.getBoundingClientRect()).filter(b => b.width && b.height);
  const found = [];
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
    if (a.right > b.left + 1 && b.right > a.left + 1 && a.bottom > b.top + 1 && b.bottom > a.top + 1) found.push(row.textContent.trim().slice(0, 80));
  }));
  return found;
})
"""
SPILLS = """
[...document.querySelectorAll('thead th, tbody td')].filter(cell => {
  const outer = cell.getBoundingClientRect(), inner = [];
  const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    if (texts.currentNode.parentElement.closest('.vh')) continue; // for screen readers alone
    const range = document.createRange(); range.selectNodeContents(texts.currentNode); inner.push(...range.getClientRects());
  }
  return inner.some(r => r.left < outer.left - 1 || r.right > outer.right + 1);
}).map(cell => cell.textContent)
"""
SVG_SPILLS = """
[...document.querySelectorAll('figure svg')].filter(s => s.getClientRects().length).flatMap(svg => {
  const outer = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(t => {
    const r = t.getBoundingClientRect();
    return r.left < outer.left - 8 || r.right > outer.right + 8 || r.top < outer.top - 8 || r.bottom > outer.bottom + 8;
  }).map(t => t.textContent);
})
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    pages = {kind: reported.page_of(kind) for kind in reported.KINDS}
    results = {
        name: reported.run(steps__count=1, steps__timed="none", seed=seed)
        for name, seed in (("one", 0), (reported.EVIL, 1))
    }
    pages["comparison"] = page(compared(results, [{}, {}]), list(results))
    for kind, text in pages.items():
        (folder / f"{kind}.html").write_text(text, encoding="utf-8")
    return {kind: folder / f"{kind}.html" for kind in pages}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=[(w, t) for w in WINDOWS for t in ("light", "dark")], ids=lambda p: "-".join(p))
def window(request: pytest.FixtureRequest, browser: Any) -> Iterator[tuple[str, Any, list[str]]]:
    """A tab of one width and theme, and what it complained about or asked the network for."""
    width, theme = request.param
    context = browser.new_context(viewport=WINDOWS[width], color_scheme=theme)
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else said.append(r.url))
    tab.on("requestfailed", lambda r: said.append(f"failed: {r.url}"))
    yield width, tab, said
    context.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_in_a_window(kind: str, files: dict[str, Path], window: tuple[str, Any, list[str]]) -> None:
    width, tab, said = window
    said.clear()
    assert files[kind].stat().st_size < 5_000_000
    tab.goto(files[kind].as_uri())
    for details in tab.locator("details").all():
        details.evaluate("e => e.open = true")
    assert tab.evaluate("document.documentElement.scrollWidth") <= WINDOWS[width]["width"], (
        "the page itself never scrolls sideways"
    )
    worst = tab.evaluate(LUMINANCE)
    assert worst["ratio"] >= 4.5, worst
    assert tab.evaluate(OVERLAPS) == []
    assert tab.evaluate(SPILLS) == []
    assert tab.evaluate(SVG_SPILLS) == [], "text inside its figure"
    assert tab.evaluate("[...document.images].every(i => i.alt)")
    assert tab.evaluate("[...document.querySelectorAll('svg')].every(s => s.getAttribute('aria-label'))")
    assert said == []


def test_a_keyboard_reaches_what_scrolls_and_what_explains(
    files: dict[str, Path], window: tuple[str, Any, list[str]]
) -> None:
    _, tab, _ = window
    tab.goto(files["steps"].as_uri())
    stops = tab.evaluate("[...document.querySelectorAll('.scroll, pre')].every(e => e.tabIndex === 0)")
    assert stops, "boxes that scroll take the focus"
    tab.locator("thead a").first.focus()
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.querySelector(location.hash).closest('details').open"), "a head opens its meaning"


def test_negative_controls(files: dict[str, Path], browser: Any) -> None:
    """The checks see what they are there to see."""
    tab = browser.new_page(viewport=WINDOWS["phone"])
    tab.goto(files["steps"].as_uri())
    tab.add_style_tag(
        content=".scroll { overflow: visible } .kicker { color: #ccc !important } thead th { max-width: 1rem; min-width: 0 !important; white-space: nowrap; display: inline-block; width: 1rem; }"
    )
    assert tab.evaluate("document.documentElement.scrollWidth") > WINDOWS["phone"]["width"]
    assert tab.evaluate(LUMINANCE)["ratio"] < 4.5
    assert tab.evaluate(SPILLS)
    tab.close()
