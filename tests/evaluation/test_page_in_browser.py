"""The report as a browser shows it on a phone."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from diffusers_safe.evaluation.page import render_page
from reports import make_large_report, make_report


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Runs in a copy of the page; what it finds is read from the page that the browser prints.
PROBE = """<pre id="probe"></pre><script>
const wide = [...document.querySelectorAll('body *')].filter(
  (e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, svg'));
const filter = () => [...document.querySelectorAll('.veil img')].map((e) => getComputedStyle(e).filter);
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


@pytest.fixture
def probe(tmp_path):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to open the page with")

    def open_page(report):
        page = tmp_path / "page.html"
        page.write_text(render_page(report).replace("</body>", PROBE), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,844"]
        done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=240)
        found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
        assert found, done.stderr[-2000:]
        return json.loads(unescape(found[1]))

    return open_page


def test_a_phone_shows_many_models_without_scrolling_sideways(probe):
    found = probe(make_large_report(5))
    assert found["width"] == found["scroll"] == 390 and not found["wide"]
    assert any(inner > outer for outer, inner in found["boxes"])  # the table scrolls in its own box
    assert len(found["pictures"]) == 10 and all(found["pictures"])


def test_flagged_pictures_are_blurred_until_asked_for_and_a_slider_compares_two(probe):
    found = probe(make_large_report(2))
    assert found["width"] == found["scroll"] == 390 and not found["wide"]
    assert len(found["blurred"]) == 2 and all("blur" in style for style in found["blurred"])
    assert found["focused"]  # by keyboard
    assert found["revealed"][0] == "none" and "blur" in found["revealed"][1]
    assert found["all"] == ["none", "none"]
    assert found["slider"] == [True, "inset(0px 0px 0px 30%)"]


def test_the_demos_page_fits_a_phone(probe):
    found = probe(make_report())
    assert found["width"] == found["scroll"] == 390 and not found["wide"] and all(found["pictures"])
