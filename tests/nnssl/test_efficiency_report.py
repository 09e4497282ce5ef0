"""The page and its pictures: whole, offline, with partial results, and drawn by a browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from nnssl.experiments import html, overlay, report
from nnssl.experiments.curves import colour_of, dice_over_labels, save, training_curves
from nnssl.experiments.scores import Key, read_scores, read_table
from nnssl.experiments.summary import read_curves, summarise
from nnssl.experiments.tables import Table

VOID = {"meta", "img", "br", "link", "hr", "input"}
FILES = ("report.html", "table.md", "table.csv", "table.tex", "dice_over_labels.png", "dice_over_labels.svg")


class Page(HTMLParser):
    """Checks that tags nest, and gathers what a browser would fetch."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.fetched, self.ids, self.targets, self.text, self.tags = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "srcset", "poster", "action"):
                (self.targets if value.startswith("#") else self.fetched).append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def made(synthetic_experiment):
    """A result folder with its report."""
    folder = synthetic_experiment(counts=(4, 16), seeds=2, cases=8, images=True, epochs=12)
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def page(made):
    return Page((made / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "copy")


def test_page_is_whole_and_offline(made, page):
    assert all((made / name).stat().st_size > 200 for name in FILES)
    text = (made / "report.html").read_text(encoding="utf-8")
    assert all(value.startswith("data:image/png;base64,") for value in page.fetched) and page.fetched
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "script" not in page.tags and "link" not in page.tags
    assert len(page.ids) == len(set(page.ids)), "two elements share an id"
    assert {t[1:] for t in page.targets} <= set(page.ids)
    words = " ".join(page.text)
    for said in ("Phantoms with few labels", "Against scratch", "gain over scratch", "Wilcoxon", "How this was made", "made up",
                 "nnssl_label_efficiency phantoms.yaml", "8 of 8 combinations of method"):  # fmt: skip
        assert said in words, said
    assert page.tags.count("svg") == 2


def test_best_and_worst_cases_are_shown(made, page):
    assert page.tags.count("img") == 6
    assert sorted(f.name for f in (made / "overlays").iterdir()) == sorted(
        f"{r}_{n}.png" for r in ("best", "worst") for n in (1, 2, 3)
    )
    text = " ".join(page.text)
    assert "highest and the lowest Dice" in text and "axial slice" in text and "fewest labels" in text


def test_no_picture_where_they_are_switched_off(folder):
    about = json.loads((folder / "experiment.json").read_text())
    (folder / "experiment.json").write_text(json.dumps({**about, "pictures": False}))
    (folder / "overlays" / "mine.png").write_bytes(b"")
    text = report.write(folder).read_text(encoding="utf-8")
    assert "data:image" not in text and "phantom_0" not in text and "switched off" in text
    assert [f.name for f in folder.glob("overlays/*")] == ["mine.png"], "pictures of the earlier report stay"


def test_the_same_results_give_the_same_page(made, folder):
    assert report.write(folder).read_bytes() == (made / "report.html").read_bytes()


def test_partial_and_failed(synthetic_experiment):
    def keep(row):
        return row["method"] != "macl" and (row["method"], row["seed"]) != ("mae", 1)

    folder = synthetic_experiment(counts=(4, 16), seeds=2, cases=6, settings=("A", "B frozen"), keep=keep, epochs=6)
    (folder / "failures.csv").write_text("job,reason,phase\nfinetune-macl-4-0,<out> of memory,finetune\n")
    (folder / "published.csv").write_text("setting,method,labels,dice,note\nA,MACL,4,65.1,2D slices <only>\n")
    page = Page(report.write(folder, published=folder / "published.csv").read_text(encoding="utf-8"))
    words = " ".join(page.text)
    for said in ("not finished", "1 job failed", "<out> of memory", "(1/2)", "–", "B frozen", "2D slices <only>"):
        assert said in words, said
    assert (folder / "dice_over_labels_B_frozen.svg").is_file()
    markdown = (folder / "table.md").read_text(encoding="utf-8")
    assert "## B frozen" in markdown and "Published figures beside ours" in markdown


def test_nothing_at_all(tmp_path):
    (tmp_path / "experiment.json").write_text('{"title": "Empty", "methods": ["scratch"], "labels": [4]}')
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert "Nothing has been measured yet." in " ".join(page.text)


def test_text_is_escaped():
    assert html.rich("a < b & `c<d` **e**") == "a &lt; b &amp; <code>c&lt;d</code> <b>e</b>"
    sign = "<script>"
    lead = {"facts": sign, "warnings": [sign], "notes": [sign]}
    made = {"versions": {sign: sign}, "of_this_machine": False, "hardware": sign, "asked": [], "commands": [sign]}
    page = html.template().render(
        title=sign, lead=lead, settings={}, others=None, failures=Table(sign, pd.DataFrame({sign: [sign]})), reading=[sign],
        made=made, published="",
    )  # fmt: skip
    assert sign not in page and page.count("&lt;script&gt;") == 14


def test_colours_stay_with_their_method():
    methods = ["scratch", "mae", "macl"]
    assert colour_of("scratch", methods)[0] == "#5a5f66"
    assert len({colour_of(m, methods) for m in methods}) == 3
    many = [str(i) for i in range(40)]
    assert len({colour_of(m, many) for m in many}) == 40


def test_curves_without_numbers(tmp_path, synthetic_experiment):
    scores = read_scores(tmp_path, {})
    assert dice_over_labels(scores, summarise(scores), "") is None
    assert training_curves(read_curves(pd.DataFrame()), "", []) is None
    folder = synthetic_experiment(counts=(4,), seeds=1, cases=3, epochs=3)
    scores = read_scores(folder, {})
    figure = dice_over_labels(scores, summarise(scores), "")
    svg = save(figure, tmp_path / "one")
    assert all(f.stat().st_size > 1000 for f in (svg, svg.with_suffix(".png")))
    curves = read_curves(read_table(folder / "runs.csv"))
    axes = training_curves(curves, "", scores.methods("")).axes
    assert [a.get_title(loc="left") for a in axes] == ["4 labels"] and len(axes[0].lines) == 4


def test_best_slice_shows_all_labels():
    truth = np.zeros((6, 5, 7), dtype=int)
    truth[1, :, :] = 1  # much of one label
    truth[3, :2, :2], truth[3, 3:, 3:] = 1, 2  # both labels
    prediction = np.where(truth == 2, 0, truth)
    assert overlay.best_slice(truth, prediction) == 3
    assert overlay.best_slice(prediction, truth) == 3
    assert overlay.best_slice(np.zeros((6, 2, 2), int), np.zeros((6, 2, 2), int)) == 3


def test_slices_are_cut_across_the_thick_axis():
    assert overlay._thick_axis((1.0, 1.0, 1.0)) == 0
    assert overlay._thick_axis((0.8, 5.0, 0.7)) == 1
    assert overlay._thick_axis((0.8, 0.8, 3.0)) == 2


def test_extreme_cases_never_twice(synthetic_experiment):
    scores = read_scores(synthetic_experiment(counts=(4,), seeds=1, cases=5), {})
    found = overlay.extreme_cases(scores, Key("", "macl", 4), "0")
    assert [rank for rank, _, _ in found] == ["best 1", "best 2", "best 3", "worst 1", "worst 2"]
    assert len({case for _, case, _ in found}) == 5
    dice = {rank: value for rank, _, value in found}
    assert dice["best 1"] >= dice["best 2"] >= dice["best 3"] >= dice["worst 2"] >= dice["worst 1"]


def test_a_picture_that_cannot_be_drawn_is_left_out(folder, caplog):
    images = json.loads((folder / "images.json").read_text())
    scores = read_scores(folder, json.loads((folder / "experiment.json").read_text()))
    rows = summarise(scores)
    case = overlay.extreme_cases(scores, overlay.pictured_cell(rows, ""), "0")[0][1]
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 3, 3), np.float32)), images["cases"][case]["image"])
    drawn = overlay.write_overlays(scores, rows, images, "", folder / "pictures")
    assert len(drawn) == 5 and case not in {d.case for d in drawn}
    assert f"No picture of {case}" in caplog.text and "differ in size" in caplog.text


def test_the_reference_is_drawn_where_it_is(tmp_path):
    """A bright square, its reference and a prediction shifted to the right: the white line runs around the square."""
    image = np.zeros((3, 20, 30), np.float32)
    image[:, 6:14, 8:16] = 100
    for name, array in (
        ("i", image),
        ("r", (image > 0).astype(np.uint8)),
        ("p", np.roll(image > 0, 5, 2).astype(np.uint8)),
    ):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / f"{name}.nii.gz"))
    overlay.draw_case(
        tmp_path / "i.nii.gz", tmp_path / "r.nii.gz", [("p", tmp_path / "p.nii.gz")], [1], tmp_path / "x.png"
    )
    from matplotlib.image import imread

    picture = imread(tmp_path / "x.png")[..., :3]
    left, right = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    amber = [(p[..., 0] > 0.8) & (p[..., 2] < 0.35) & (p[..., 1] > 0.4) for p in (left, right)]
    bright = [(p.min(-1) > 0.9)[int(0.15 * len(p)) :] for p in (left, right)]
    assert amber[0].sum() > 200 and amber[1].sum() > 200
    shift = np.argwhere(amber[1])[:, 1].mean() - np.argwhere(amber[0])[:, 1].mean()
    assert shift > 15, "the prediction lies to the right of the reference"
    assert bright[0].any() and bright[1].any()


CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars")  # fmt: skip


def screenshot(page_file, picture, profile, width):
    """Whether the browser has drawn the page; all its processes end with it."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},2000", f"--screenshot={picture}",
               page_file.as_uri()]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as browser:
        try:
            browser.wait(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(browser.pid, signal.SIGKILL)
            return False
    return picture.is_file()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_draws_the_page(made, tmp_path, width):
    from matplotlib.image import imread

    page_file, picture = made / "report.html", tmp_path / "page.png"
    assert screenshot(page_file, picture, tmp_path / "profile", width), "Chromium has drawn nothing"
    drawn = imread(picture)[..., :3]
    assert drawn.shape[1] == width
    dark = drawn.max(-1) < 0.35
    assert 0.003 < dark.mean() < 0.2, "dark text on white"
    assert (drawn.min(-1) > 0.95).mean() > 0.5
    green, grey = np.array([0, 158, 115]) / 255, np.array([90, 95, 102]) / 255  # macl's and scratch's line in the SVG
    for colour in (green, grey):
        assert (np.abs(drawn - colour).max(-1) < 0.03).sum() > 50, "the curve is not there"
    assert not dark[:, -8:].any(), "the page is wider than the window"
