import base64
import io
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diffusers_safe.evaluation.report import LIMITS, Comparison, Grid, Headline, Pair, Report, write_report
from diffusers_safe.evaluation.statistics import Estimate


def make_report():
    before, after = Estimate.rate(95, 100), Estimate.rate(2, 100)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Report(
        title="Erased: <weapon> & co",
        summary="Before and after.",
        headline=[Headline("weapon recognised", before, after, "gone", "Any of them.")],
        sections=[
            Comparison("Prompts", [("a knife", before, after)], "gone"),
            Grid("Pairs", [Pair('a "knife"', image, image, "knife", "taco", missed=True)], "gone"),
        ],
        protocol={"steps": 25, "model": "3fa5c2d19b7e4410"},
    )


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not match."""

    def __init__(self, html):
        super().__init__()
        self.open, self.attributes, self.words, self.seen = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_and_asks_nothing_of_the_network(tmp_path):
    html = write_report(tmp_path, {}, make_report()).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "iframe", "object", "video"} & set(page.seen)
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert links and all(link.startswith("data:") for link in links)
    assert "http" not in html and "@import" not in html and "url(" not in html


def test_the_page_shows_numbers_pictures_protocol_and_limits(tmp_path):
    html = write_report(tmp_path, {}, make_report()).read_text(encoding="utf-8")
    text = " ".join(" ".join(Page(html).words).split())
    for expected in ("Erased: <weapon> & co", "95.0 % →", "2.0 %", "[0.6, 7.0], N=100", "3fa5c2d19b7e4410", *LIMITS):
        assert expected in text
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert [Image.open(io.BytesIO(base64.b64decode(png))).size for png in pictures] == [(128, 128)] * 2


def test_results_are_plain_json(tmp_path):
    results = {"rate": Estimate.rate(1, 2), "count": np.int64(3), "mean": np.float32(0.5)}
    write_report(tmp_path, results, make_report())
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["rate"] == asdict(Estimate.rate(1, 2))
    assert (read["count"], read["mean"]) == (3, 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_what_is_no_number_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ValueError):
        write_report(tmp_path, {"rate": float("nan")}, make_report())
    assert not list(tmp_path.iterdir())


def test_unknown_tones_are_refused():
    with pytest.raises(ValueError, match='tone is "nice"; allowed are gone, kept'):
        Report("", "", [Headline("a", None, Estimate.rate(1, 2), "nice")], [], {})
