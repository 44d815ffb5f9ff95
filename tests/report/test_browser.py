"""The page in headless Chromium: it fits, plays, sorts, and asks for nothing."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from glocal.report import render_advice

from .browser import Browser, others

pytestmark = pytest.mark.browser

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=3000"),
)

# Reads the layout after the page's own script ran and leaves the answer in an attribute.
PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const box = (node) => node.getBoundingClientRect();
  const shown = (node) => box(node).width > 0;
  const small = [...document.querySelectorAll("svg text")].filter(shown).map((node) => {
    const svg = node.ownerSVGElement, scale = box(svg).width / svg.viewBox.baseVal.width;
    return parseFloat(getComputedStyle(node).fontSize) * scale;
  });
  const clipped = [...document.querySelectorAll("main .panel svg text, main .headline svg text")].filter(shown)
    .filter((node) => box(node).right > innerWidth + 1 || box(node).left < -1).map((node) => node.textContent);
  const requests = performance.getEntriesByType("resource").map((r) => r.name).filter((n) => !n.startsWith("data:"));
  const first = document.querySelector(".row-four h2");
  const answer = { wide: document.documentElement.scrollWidth, inner: innerWidth, smallest: Math.min(...small), clipped,
    fold: box(first).bottom, requests };
  parent.document.documentElement.dataset.probe = JSON.stringify(answer);
}, 600));</script>"""


def in_phone(page: str) -> str:
    """The page inside a frame of 390 x 844: a window that Chromium dumps is never narrower than 500."""
    frame = f'<iframe style="width:390px;height:844px;border:0" srcdoc="{html.escape(page)}"></iframe>'
    return f"<!doctype html><html><body>{frame}</body></html>"


def dump(page: str, folder: Path, *, phone: bool = False, fragment: str = "") -> str:
    """DOM of the page after its script ran; of the frame around it where `phone`."""
    chromium = shutil.which("chromium")
    assert chromium is not None
    path = folder / "page.html"
    probed = page.replace("</body>", PROBE + "</body>")
    path.write_text(in_phone(probed) if phone else probed, encoding="utf-8")
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1440,900", "--dump-dom"]
    done = subprocess.run([*command, f"file://{path}{fragment}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def probe(dom: str) -> dict:
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found is not None, "the probe did not run"
    return json.loads(html.unescape(found.group(1)))


@pytest.mark.parametrize("which", ["advice_page", "dense_page", "large_page"])
@pytest.mark.parametrize("phone", [False, True])
def test_page_fits_and_is_legible(which, phone, request, tmp_path):
    seen = probe(dump(render_advice(request.getfixturevalue(which)), tmp_path, phone=phone))
    assert seen["inner"] == (390 if phone else 1440)
    assert seen["wide"] <= seen["inner"], "the page scrolls sideways"
    assert seen["clipped"] == [] and seen["requests"] == []
    assert seen["smallest"] >= 10.5
    if not phone:
        assert seen["fold"] <= 900


def test_player_starts_and_shows_the_asked_pair(advice_page, tmp_path):
    dom = dump(render_advice(advice_page), tmp_path, fragment="#strip=median&frame=4")
    assert 'data-ready="yes"' in dom and "Median held-out sample" in dom
    assert re.search(r'id="frame-number"[^>]*>5 / 16<', dom)
    assert re.findall(r'data-strip="(\d)" aria-pressed="true"', dom) == ["1"]


def test_table_sorts_by_value_with_missing_last(advice_page, tmp_path):
    dom = dump(render_advice(advice_page), tmp_path, fragment="#frame=0&sort=ladder:4:asc")
    table = re.search(r'<table id="ladder".*?</table>', dom, re.S)
    assert table is not None
    firsts = re.findall(r"<tr>\s*<td>([^<]+)</td>", table.group(0))
    assert firsts[0] == "allocation, 70 %" and firsts[-1] == "radial, published"
    assert 'aria-sort="ascending"' in table.group(0)


def test_dark_theme_is_chosen_by_the_address(advice_page, tmp_path):
    dom = dump(render_advice(advice_page), tmp_path, fragment="#frame=0&theme=dark")
    assert 'data-theme="dark"' in dom and re.search(r'id="theme"[^>]*>Light<', dom)


@pytest.fixture
def browser(tmp_path):
    chromium = shutil.which("chromium")
    assert chromium is not None
    with Browser(chromium, tmp_path) as opened:
        yield opened


def written(page, folder):
    path = folder / "page.html"
    path.write_text(render_advice(page), encoding="utf-8")
    return path


def tab_to(browser, condition):
    """Presses Tab until `condition` holds of the focused element, in JavaScript."""
    for _ in range(80):
        browser.press("Tab")
        if browser.eval(f"(e => Boolean({condition}))(document.activeElement)"):
            return
    raise AssertionError(f"no Tab leads to an element with {condition}")


def test_the_page_is_used_by_keyboard_alone(browser, advice_page, tmp_path):
    browser.open(written(advice_page, tmp_path), 1440, 900)
    tab_to(browser, 'e.dataset && e.dataset.strip === "1"')
    assert browser.eval("getComputedStyle(document.activeElement).outlineStyle") != "none", "focus cannot be seen"
    browser.press("Enter")
    assert browser.eval("document.activeElement.getAttribute('aria-pressed')") == "true"
    tab_to(browser, 'e.id === "frame"')
    first = browser.eval("document.getElementById('frame-number').textContent")
    browser.press("ArrowRight")
    assert browser.eval("document.getElementById('frame-number').textContent") != first
    tab_to(browser, "e.tagName === 'BUTTON' && e.closest('th') && e.closest('table').id === 'ladder'")
    browser.press(" ")
    assert browser.eval("document.activeElement.closest('th').getAttribute('aria-sort')") in ("ascending", "descending")
    assert others(browser.requests) == []


@pytest.mark.parametrize("which", ["advice_page", "dense_page"])
def test_the_verdict_comes_first_on_screen_and_phone(browser, which, request, tmp_path):
    path = written(request.getfixturevalue(which), tmp_path)
    for width, height in ((1440, 900), (390, 844)):
        browser.open(path, width, height)
        verdict = "document.querySelector('section.headline').getBoundingClientRect()"
        assert browser.eval(f"{verdict}.top") >= 0 and browser.eval(f"{verdict}.top") < height / 3
        assert browser.eval("document.documentElement.scrollWidth") <= width
        if which == "dense_page":
            words = browser.eval("document.querySelector('section.headline').innerText")
            assert "dense" in words.lower() and request.getfixturevalue(which).headline.reason in words
    assert others(browser.requests) == []


def test_frame_buttons_change_the_pair(browser, advice_page, tmp_path):
    browser.open(written(advice_page, tmp_path), 1440, 900)
    roles = browser.eval("[...document.querySelectorAll('[data-strip]')].map(b => b.textContent.trim())")
    for number in range(len(roles)):
        browser.eval(f"document.querySelectorAll('[data-strip]')[{number}].click()")
        pressed = browser.eval("[...document.querySelectorAll('[data-strip]')].map(b => b.ariaPressed)")
        assert pressed == ["true" if i == number else "false" for i in range(len(roles))]
