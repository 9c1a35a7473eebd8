"""The report as a browser shows it on a phone."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from diffusers_safe.report.page import render_page
from reports import make_large_report, make_report


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Runs in a copy of the page; what it finds is read from the page that the browser prints.
PROBE = """<pre id="probe"></pre><script>
const wide = [...document.querySelectorAll('body *')].filter(
  (e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, svg'));
const filter = () => [...document.querySelectorAll('.blur img')].map((e) => getComputedStyle(e).filter);
const found = {
  width: innerWidth,
  scroll: document.documentElement.scrollWidth,
  wide: wide.map((e) => e.outerHTML.slice(0, 80)),
  boxes: [...document.querySelectorAll('.scroll')].map((e) => [e.clientWidth, e.scrollWidth]),
  pictures: [...document.images].map((e) => e.complete && e.naturalWidth > 0 && e.clientWidth > 40),
  blurred: filter(),
};
const first = document.querySelector('.reveal');
if (first) {
  first.focus();
  found.focused = document.activeElement === first;
  first.click();
  found.revealed = filter();
  document.querySelector('.reveal-all').click();
  found.all = filter();
}
const overlay = document.querySelector('.overlay');
if (overlay) {
  overlay.click();
  const slider = document.querySelector('.slider');
  slider.value = 30;
  slider.dispatchEvent(new Event('input'));
  const last = slider.closest('figure').querySelector('.shot:last-child img');
  found.slider = [slider.clientWidth > 100, getComputedStyle(last).clipPath];
}
document.getElementById('probe').textContent = JSON.stringify(found);
</script></body>"""

# A window is at least 500 pixels wide, a frame is not.
PHONES = """<!doctype html><meta charset="utf-8"><pre id="found"></pre>{frames}<script>
addEventListener('load', () => {{
  const frames = [...document.querySelectorAll('iframe')];
  const found = frames.map((frame) => frame.contentDocument.getElementById('probe').textContent);
  document.getElementById('found').textContent = `[${{found}}]`;
}});
</script>"""
FRAME = '<iframe style="width: 390px; height: 844px; border: 0" srcdoc="{inside}"></iframe>'


@pytest.fixture(scope="module")
def phones(tmp_path_factory):
    """What is found on the pages of many models, of two, and of the demo."""
    if CHROMIUM is None:  # no wheel brings one; what the pages say is tested without it in test_report.py
        pytest.skip("there is no Chromium to open the page with")
    reports = [make_large_report(5), make_large_report(2), make_report()]
    frames = [FRAME.format(inside=escape(render_page(report).replace("</body>", PROBE))) for report in reports]
    folder = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text(PHONES.format(frames="".join(frames)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command = [CHROMIUM, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    address = (folder / "page.html").as_uri()
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=280)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


def test_no_page_scrolls_sideways_on_a_phone(phones):
    for found in phones:
        assert found["width"] == found["scroll"] == 390 and not found["wide"]
        assert found["pictures"] and all(found["pictures"])
    assert any(inner > outer for outer, inner in phones[0]["boxes"])  # the table scrolls in its own box


def test_flagged_pictures_are_blurred_until_asked_for(phones):
    found = phones[1]
    assert len(found["blurred"]) == 2 and all("blur" in style for style in found["blurred"])
    assert found["focused"]  # by keyboard
    assert found["revealed"][0] == "none" and "blur" in found["revealed"][1]
    assert found["all"] == ["none", "none"]


def test_a_slider_compares_two_models(phones):
    assert phones[1]["slider"] == [True, "inset(0px 0px 0px 30%)"]
    assert "slider" not in phones[0] and "slider" not in phones[2]
