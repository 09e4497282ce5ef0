"""What a run draws: every method's panels rest on terms that it logs, and pictures hold what they promise."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.engine import progress
from nnssl.pretrain.engine.pictures import save_picture
from nnssl.pretrain.engine.progress import MOST_PANELS, PLACE, SPREAD, plot_details, plot_progress
from nnssl.pretrain.methods import SourceStats, get_method, list_methods
from nnssl.pretrain.types import Curve, Level, Picture

SMALL = {
    "glmae": {"prototypes": 32, "bottleneck": 8, "hidden": 16},
    "hdense": {"n_voxels": 16, "level_dim": 4, "proj_dim": 8},
    "vox2vec": {"n_voxels": 16, "proj_dim": 8},
    "voco": {"proj_dim": 16},
    "macl": {"proj_dim": 8},
}


def cut_or_overlapping(figure):
    """Words that leave the picture, and pairs of words that lie on each other."""
    words = [*figure.texts, *(t for ax in figure.axes for t in (ax.title, ax.xaxis.label))]
    boxes = [(t.get_text(), t.get_window_extent()) for t in words if t.get_text()]
    across, tall = figure.canvas.get_width_height()
    out = [text for text, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > across + 1 or b.y1 > tall + 1]
    pairs = [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[:i] if x.overlaps(y)]
    return out + pairs


@pytest.mark.parametrize("name", list_methods())
def test_panels_and_pictures_of_every_method(name, tiny_plans, tiny_dataset_json, make_crops, tmp_path, monkeypatch):
    plans = tiny_plans(3, features=(4, 6, 8), patch=(16, 24, 16), median_shape=(32, 40, 36))
    plan = Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json())
    cls = get_method(name)
    known = {k: v for k, v in SMALL.get(name, {}).items() if k in cls.Config.__dataclass_fields__}
    config = cls.Config(**known)
    request = cls.crops(plan, SourceStats((32, 40, 36), 9), config)
    torch.manual_seed(0)
    method = cls(build_network(plan), plan, request, config).eval()
    crops = make_crops(method, max(4, request.min_batch))
    with torch.no_grad():
        batch = method.views(crops, StepRNG(0, 0, len(crops)))
        terms = {k: float(v) for k, v in method(batch).items()}
        picture = method.pictures(batch)
    curves = method.curves()
    assert 1 <= len(curves) <= 4, "room for robustness and the place must be left"
    for curve in curves:
        assert set(curve.lines) | {level.term for level in curve.levels if level.term} <= set(terms), curve.title
        assert curve.title and curve.unit and curve.hint
    rows = [
        {"epoch": e, "step": e, **{f"{k}/{t}": v for k in ("train", "held_out") for t, v in terms.items()}}
        for e in (1, 2)
    ]
    drawn = {"first": terms, "title": name, "sentence": method.verdict(terms, terms)[1]}
    plot_progress(rows, tmp_path / "progress.png", curves, **drawn)
    assert imread(tmp_path / "progress.png").shape[1] == 416 * min(3, len(curves) if len(curves) != 4 else 2)
    assert picture.title and picture.note.startswith("How to read it") and "earnt" in picture.note
    marked = {*picture.scales, *picture.boxes, *picture.points, *picture.tags}
    assert marked <= set(picture.columns), "a mark without its column is not drawn"
    written = []
    keep = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (written.append(figure), keep(figure, *a, **k)))
    save_picture(picture, tmp_path / "views.png", heading="heading", aspect=2.0)
    assert imread(tmp_path / "views.png").shape[1] >= 190 * len(picture.columns)
    assert not cut_or_overlapping(written[0])


ROWS = [
    {
        "epoch": e,
        "train/a": 3.0 - e,
        "held_out/a": 4.0 - e,
        "held_out/b": 1.5,
        "embedding_sd": 0.4,
        "lr": 1e-3,
        "grad_norm": None,
    }
    for e in (1, 2, 3)
]
A = Curve("title", "unit", {"a": ""}, (Level("b", "level", 2.0), Level("", "fixed", 0.25)), "hint")


def axes_of(monkeypatch, *args, **kwargs):
    found = []
    finish = progress._finish
    monkeypatch.setattr(progress, "_finish", lambda ax: (finish(ax), found.append(ax)))
    plot_progress(*args, **kwargs)
    return found


def test_a_panel_holds_both_kinds_of_cases_the_start_and_the_levels(monkeypatch, tmp_path):
    (ax, spread) = axes_of(monkeypatch, ROWS, tmp_path / "p.png", [A], first={"a": 9.0, "b": 1.5, "embedding_sd": 0.7})
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert lines["held-out cases"] == [[0, 9.0], [1, 3.0], [2, 2.0], [3, 1.0]]
    assert lines["cases that it learns from"] == [[1, 2.0], [2, 1.0], [3, 0.0]]
    assert lines["level"][-1] == [3, 3.0] and lines["fixed"][0][1] == 0.25
    assert ax.get_ylabel() == "unit" and "before training" in ax.get_xlabel()
    assert spread.get_title() == SPREAD.title and spread.get_lines()[0].get_ydata().tolist() == [0.7, 0.4, 0.4, 0.4]


def test_at_most_six_panels_and_the_methods_own_come_first(monkeypatch, tmp_path):
    hook = []
    shown = axes_of(monkeypatch, ROWS, tmp_path / "p.png", [A] * 5, [lambda ax: hook.append(ax)])
    assert len(shown) == MOST_PANELS and len(hook) == 1 and shown[-1] is hook[0]
    missing = Curve("never logged", "u", {"nothing": ""})
    shown = axes_of(monkeypatch, ROWS, tmp_path / "p.png", [missing, A])
    assert [ax.get_title() for ax in shown] == ["title", SPREAD.title]


def test_training_values_where_nothing_is_held_out(monkeypatch, tmp_path):
    rows = [{"epoch": 1, "train/a": 1.0}, {"epoch": 2, "train/a": 0.5}]
    (ax,) = axes_of(monkeypatch, rows, tmp_path / "p.png", [A])
    assert "not measured on others" in ax.get_lines()[0].get_label() and ax.get_xlabel() == "epoch"


def test_shares_are_percents_from_zero(monkeypatch, tmp_path):
    rows = [{"epoch": e, "held_out/place_noise": 0.1, "held_out/place_crops": 0.25 + 0.01 * e} for e in (1, 2)]
    (ax,) = axes_of(monkeypatch, rows, tmp_path / "p.png")
    assert ax.get_title() == PLACE.title and ax.get_ylim()[0] == 0
    assert np.allclose(ax.get_lines()[0].get_ydata(), [26, 27]) and np.allclose(ax.get_lines()[1].get_ydata(), 10)


def test_details_hold_every_logged_number(monkeypatch, tmp_path):
    titles = []
    from matplotlib.axes import Axes

    own = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **k: (titles.append(text), own(self, text, **k))[1])
    plot_details(ROWS, tmp_path / "d.png")
    assert titles == ["a", "b", "embedding_sd", "lr"] and (tmp_path / "d.png").stat().st_size > 1000


def test_a_picture_without_any_extras(tmp_path):
    save_picture(Picture({"one": np.zeros((2, 6, 8))}), tmp_path / "v.png")
    assert imread(tmp_path / "v.png").shape[2] == 4


def test_lines_are_measured_in_the_font_that_they_are_written_in():
    """Digits are wider than letters: a verdict full of figures was cut off at the right."""
    from nnssl.pretrain.engine.pictures import wrapped

    figure = Figure(figsize=(15.6, 2), dpi=72)
    canvas = FigureCanvasAgg(figure)
    for text, bold in (
        ("0.1234 (0.5678), " * 40, False),
        ("illicit lilt " * 40, False),
        ("Model 88 of 88, " * 40, True),
    ):
        lines = wrapped(text, 15.2, 10.5, dpi=72, bold=bold)
        written = figure.text(0, 0, "\n".join(lines), fontsize=10.5, fontweight="bold" if bold else "normal")
        assert 0.9 * 15.2 * 72 < written.get_window_extent(canvas.get_renderer()).width <= 15.2 * 72 + 1
        assert " ".join(lines).split() == text.split()
    assert wrapped("", 3, 10, dpi=80) == [] and "".join(wrapped("x" * 300, 2, 10, dpi=80)) == "x" * 300
