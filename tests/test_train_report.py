"""The page a training leaves behind: its numbers, its curves, its films, and nothing that a name in it could break."""
import base64
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vidgen import runs
from vidgen.clip import Clip
from vidgen.train.config import Recipe
from vidgen.train.report import curves, strips, write_report


class Page(HTMLParser):
    "Tags, texts of cells and sources of pictures, of a page whose tags are all closed."

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.pictures, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [] if tag in ("meta", "img", "br") else [tag]
        self.pictures += [dict(attributes)] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells += [data] if self.open and self.open[-1] in ("td", "th") else []


@pytest.fixture
def run(tmp_path):
    made = runs.Run.create("r&d", {}, root=tmp_path, trackers=[])
    for step in (1, 2, 3):
        made.log(step=step, **{"train/loss": 4.0 / step})
    made.log(step=3, **{"held/loss/mean": 2.0})
    return made


def points(svg):
    return {line.get("stroke"): [tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in ET.fromstring(svg).iter("polyline")}


def test_curves_lie_where_their_numbers_say():
    "The first step at the left, the last at the right, the largest loss at the top and nothing at the bottom; a held-out loss is a dot too."
    rows = [{"step": 0, "train/loss": 4.0}, {"step": 10, "train/loss": 0.0}, {"step": 5, "held/loss/mean": 2.0}]
    drawn = points(curves(rows, width=640, height=200))
    assert drawn["#888"] == [(40.0, 20.0), (620.0, 180.0)] and drawn["#c33"] == [(330.0, 100.0)]
    dot, = ET.fromstring(curves(rows)).iter("circle")
    assert (float(dot.get("cx")), float(dot.get("cy"))) == drawn["#c33"][0]


def test_a_loss_that_is_no_number_leaves_the_others_alone():
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": float("inf")}, {"step": 3, "train/loss": float("nan")}, {"step": 4, "train/loss": 1.0}, {"step": 4, "train/lr": 1e-3}]
    drawn = points(curves(rows))["#888"]
    assert len(drawn) == 2 and all(np.isfinite(drawn).ravel())
    assert curves(rows[:1]) == curves([]) == curves([{"step": 1, "train/lr": 0.1}]) == ""
    ET.fromstring(curves([{"step": 0, "train/loss": 0.0}, {"step": 0, "train/loss": 0.0}]))


def test_the_page_holds_what_was_measured(run):
    before, after = {"loss/mean": 0.5, "oracle": None}, {"loss/mean": 0.25, "oracle": 0.75, "new": 1.0}
    for when, grey in (("after-0", 200), ("before-0", 50), ("step000002-0", 90)):
        run.save_clip(when, Clip(np.full((4, 16, 24, 3), grey, np.uint8), fps=8))
    path = write_report(run, Recipe(data="world:12<script>", rank=7), before, after)
    page = Page(text := path.read_text(encoding="utf-8"))
    assert path == run.path / "artifacts/report.html" and "script" not in page.tags and "world:12<script>" in page.cells
    for name in after:
        assert name in page.cells
    row = page.cells[page.cells.index("loss/mean"):][:3]
    assert [float(x) for x in row[1:]] == [0.5, 0.25] and page.cells[page.cells.index("rank") + 1] == "7"
    assert [p["alt"] for p in page.pictures] == ["before-0", "after-0"] and "r&amp;d" in text and len(points(re.search("<svg.*</svg>", text)[0])["#888"]) == 3
    greys = [np.asarray(Image.open(io.BytesIO(base64.b64decode(p["src"].partition(",")[2]))).convert("L")).astype(int) for p in page.pictures]
    assert [[(abs(found - grey) < 6).sum() >= 4 * 16 * 24 * 0.9 for grey in (50, 200)] for found in greys] == [[True, False], [False, True]]
    assert not re.search(r"(src|href)='?http", text)


def test_a_run_without_films_has_a_page(run):
    page = Page(write_report(run, Recipe(data="world:12"), {}, {"loss/mean": 0.25}).read_text())
    assert not page.pictures and "loss/mean" in page.cells and list(strips(run.path / "samples")) == []
