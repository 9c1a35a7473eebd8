import base64
import io
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diffusers_safe.report.elements import (
    LIMITS,
    Change,
    Comparison,
    Grid,
    Headline,
    Plots,
    Scatter,
    Shot,
    Strip,
    Table,
)
from diffusers_safe.report.page import render_page
from diffusers_safe.report.results import headline_table, publish
from diffusers_safe.report.statistics import Estimate
from reports import make_large_report, make_report, noise


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
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("report", [make_report(), make_large_report(), make_large_report(2)])
def test_the_page_is_whole_and_asks_nothing_of_the_network(report):
    html = render_page(report)
    page = Page(html)
    assert not {"script", "iframe", "object", "video"} & set(page.seen)
    loaded = [value for name, value in page.attributes if name in ("src", "srcset", "action", "xlink:href")]
    assert loaded and all(link.startswith("data:") for link in loaded)
    links = [value for name, value in page.attributes if name == "href"]
    assert {link for link in links if not link.startswith("data:")} <= {"https://arxiv.org/abs/1"}
    assert "@import" not in html and "url(" not in html


def test_the_page_shows_numbers_pictures_protocol_and_limits(tmp_path):
    publish(tmp_path, {}, make_report())
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = " ".join(" ".join(Page(html).words).split())
    for expected in ("Erased: <weapon> & co", "95.0 % →", "2.0 %", "[0.6, 7.0], N=100", "3fa5c2d19b7e4410", *LIMITS):
        assert expected in text
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert [Image.open(io.BytesIO(base64.b64decode(png))).size for png in pictures] == [(128, 128)] * 2


def test_some_models_have_a_column_each_and_the_best_is_marked():
    html = render_page(make_large_report(4))
    assert '<div class="cards">' not in html
    rows = re.findall(r'<tr><th scope="row">(\w+).*?</tr>', html, re.S)
    assert rows[:2] == ["seen", "distance"]
    seen, distance = (re.search(rf'<tr><th scope="row">{name}.*?</tr>', html, re.S)[0] for name in rows[:2])
    assert seen.count("<td") == distance.count("<td") == 4
    assert [" best" in cell for cell in seen.split("<td")[1:]] == [False] * 3 + [True]
    assert '<td class="number kept best"><b>0.100</b>' in distance and distance.count("best") == 1
    assert "-45.0 points [-60.0, -30.0], p &lt; 0.001" in seen and 'class="change good"' in seen
    assert "3 images are black" in html and "model &lt;3&gt;" in html and "model <3>" not in html


def test_many_models_have_a_row_each():
    html = render_page(make_large_report(5))
    head = re.search(r'<table class="results">.*?</thead>', html, re.S)[0]
    assert re.findall(r'<th scope="col">(\w+)', head) == ["seen", "distance"]
    rows = re.findall(r'<tr><th scope="row">model &lt;(\d)&gt;.*?</tr>', html)
    assert rows[:5] == list("01234")
    last = re.search(r'<tr><th scope="row">model &lt;4&gt;.*?</tr>', html, re.S)[0]
    assert last.count("<td") == 2 and '<td class="number gone best">' in last


def test_what_rows_say_alike_is_said_once_where_that_is_asked():
    rows = [("A", "1 %", "why not", "x"), ("B", "1 %", "why not", "x"), ("C", "1 %", "", "x")]
    table = Table("t", ("", "value", "same?", "source"), [("seen", rows)], merged=True)
    html = render_page(make_report(sections=[table]))
    assert html.count("<td>1 %</td>") == 3 and html.count('<td rowspan="2">why not</td>') == 1
    assert html.count('<td rowspan="3">x</td>') == 1 and "<td></td>" in html
    apart = render_page(make_report(sections=[replace(table, merged=False)]))
    assert apart.count("<td>why not</td>") == 2 and "rowspan" not in apart


@pytest.mark.parametrize(
    ("value", "interval", "better", "expected"),
    [
        (-0.2, (-0.3, -0.1), "lower", "good"),
        (-0.2, (-0.3, -0.1), "higher", "bad"),
        (-0.2, (-0.3, 0.1), "lower", "soft"),
        (-0.2, (-0.3, -0.1), None, "soft"),
    ],
)
def test_a_difference_that_chance_may_have_made_is_grey(value, interval, better, expected):
    change = Change(Estimate(value, *interval, 100, "points"))
    rates = [Estimate.rate(50, 100), Estimate.rate(30, 100)]
    html = render_page(make_report(headline=[Headline("seen", rates, "gone", better=better, changes=[None, change])]))
    assert f'class="change {expected}"' in html


def test_of_two_models_cards_come_first_and_all_numbers_last():
    rates, change = [Estimate.rate(50, 100), Estimate.rate(30, 100)], Change(Estimate(-0.2, -0.3, -0.1, 100, "points"))
    few = [Headline("seen", rates, "gone", "As told.", "lower", [None, change])]
    html = render_page(make_report(headline=few))
    assert html.index('<div class="cards">') < html.index("<h2>Pairs</h2>") < html.index("<h2>All numbers</h2>")
    card = html.split('<div class="card gone">')[1].split("</div>\n</div>")[0]
    assert "Change: -20.0 points [-30.0, -10.0]" in card and "As told." in card
    many = render_page(make_report(headline=few * 7))
    assert '<div class="cards">' not in many and many.index("<h2>All numbers</h2>") < many.index("<h2>Pairs</h2>")


def test_a_difference_is_clear_where_interval_and_test_agree():
    estimate = Estimate(-0.6, -1, -0.2, 5, "points")
    assert Change(estimate).is_clear and Change(estimate, 0.01).is_clear and not Change(estimate, 0.25).is_clear
    assert not Change(Estimate(-0.1, -0.3, 0.1, 5, "points"), 0.01).is_clear


def test_a_picture_that_is_blurred_is_not_said_to_be_flagged():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    shots = [Shot(image, blurred=True), Shot(image, blurred=True, flagged=True)]
    html = render_page(make_report(sections=[Grid("g", [Strip("a", shots)], "gone")]))
    assert html.count("blurred · show") == html.count("flagged · show") == 1


def test_labels_of_a_plot_lie_inside_and_on_nothing():
    crowd = [Estimate(0.5 + 0.01 * i, 0.45, 0.6, 10) for i in range(6)]
    names = [f"a long name {i}" for i in range(6)]
    plot = Scatter("seen", "kept", list(zip(crowd, crowd)), ("lower", "higher"))
    report = make_report(models=names, headline=[], sections=[Plots("p", [plot])])
    html = render_page(report)
    spots = [(float(x), float(y)) for x, y in re.findall(r'<text class="name" x="([\d.]+)" y="([\d.]+)"', html)]
    assert len(spots) == 6
    for place, (x, y) in enumerate(spots):
        assert 0 < x < 460 and 0 < y < 330
        for other_x, other_y in spots[:place]:
            assert abs(x - other_x) >= 7.9 * len(names[0]) - 0.2 or abs(y - other_y) >= 14.8


def test_large_pictures_are_small_files_and_flagged_ones_are_blurred():
    html = render_page(make_large_report(2))
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert [Image.open(io.BytesIO(base64.b64decode(jpeg))).size for jpeg in pictures] == [(256, 256)] * 4
    assert html.count('class="blur"') == html.count('class="reveal"') == 2 and html.count('class="slider"') == 2
    assert "blur" not in render_page(make_report()).split("</style>")[1]


def test_results_are_plain_json(tmp_path):
    results = {"rate": Estimate.rate(1, 2), "count": np.int64(3), "mean": np.float32(0.5)}
    publish(tmp_path, results, make_report())
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["rate"] == asdict(Estimate.rate(1, 2))
    assert (read["count"], read["mean"]) == (3, 0.5)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["report.html", "results.json", "results.md"]


def test_the_headline_reads_back_as_a_table(tmp_path):
    publish(tmp_path, {}, make_large_report(3))
    results = json.loads((tmp_path / "results.json").read_text())
    lines = headline_table(results).split("\n")
    assert lines[0] == "|  | seen ↓, N=100 | distance ↓, N=100 |" and lines[1] == "|---|---|---|"
    assert lines[2].endswith(" | 90.0 % [82.6, 94.5] |  |")
    assert " | 60.0 % [50.2, 69.1] (-30.0 points [-40.0, -20.0], p < 0.001) | 0.200 [0.180, 0.220] |" in lines[4]
    assert lines[3].endswith("| 0.100 [0.090, 0.110] |")
    assert "points" not in headline_table(results, changes=False)
    turned = headline_table(results, turned=True).split("\n")
    assert (
        turned[0] == "|  | model <0> of this page | model <1> of this page | model <2> of this page |"
        and turned[1] == "|---|---|---|---|"
    )
    assert turned[2].startswith("| seen ↓, N=100 | 90.0 % [82.6, 94.5] | ")
    with pytest.raises(ValueError, match="no headline"):
        headline_table({"headline": []})


def test_what_is_no_number_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ValueError):
        publish(tmp_path, {"rate": float("nan")}, make_report())
    assert not list(tmp_path.iterdir())


def test_unknown_tones_and_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='tone is "nice"; allowed are gone, kept'):
        make_report(sections=[Grid("g", [], "nice")])
    with pytest.raises(ValueError, match="Prompts: has 1 entries for 2 models"):
        make_report(sections=[Comparison("Prompts", [("a", [Estimate.rate(1, 2)])], "gone")])


def test_no_text_becomes_markup():
    text = """"><script>alert(1)</script><img src=x onerror=alert(1)> ' {{ 7 * 7 }} </style>"""
    rates, shot = [Estimate.rate(1, 2)] * 2, Shot(noise(300), text, True, True, True)
    change = Change(Estimate(0.1, 0.05, 0.2, 3, "points"), 0.01)
    report = make_report(
        title=text,
        summary=text,
        models=(text, f"{text} again"),
        headline=[Headline(text, rates, "gone", text, "lower", [None, change])],
        sections=[
            Comparison(text, [(text, rates)], "gone", text),
            Grid(text, [Strip(text, [shot, shot])], "gone", text),
            Table(text, (text, text), [(text, [(text, f"x https://a{text}")])], text),
            Plots(text, [Scatter(text, text, [tuple(rates)] * 2, ("lower", "higher"))], text),
        ],
        protocol={text: text},
        limits=(text,),
        warnings=(text,),
    )
    page = Page(render_page(report))
    assert "script" not in page.seen and page.seen.count("img") == 2
    assert {name for name, _ in page.attributes if name.startswith("on")} == {"oninput"}  # of the slider
    assert sum(text in words for words in page.words) > 10
