"""Each page of docs/methods is what the code is: every option with its default, every preset, the clipping."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from nnssl.config import make_config
from nnssl.plans import Plan
from nnssl.pretrain.methods import SourceStats, get_method, list_methods

METHODS = sorted(list_methods())
PAGES = Path(__file__).parents[2] / "docs" / "methods"
HOME = {"vox2vec": "hdense"}
"""Methods that have no page of their own."""


def page(name):
    return (PAGES / f"{HOME.get(name, name)}.md").read_text(encoding="utf-8")


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def listed(name):
    """Option -> default as the table of options says it."""
    out = {}
    for row in section(page(name), "Options").splitlines():
        cells = [c.strip() for c in row.strip("|").split("|")]
        options = re.findall(r"`(\w+)`", cells[0])
        if not row.startswith("| `") or not options:
            continue
        defaults = [re.sub(r" *\(.*?\)", "", d) for d in cells[1].split(", ")]
        assert len(options) == len(defaults), row
        assert not set(options) & set(out), row
        out |= dict(zip(options, defaults))
    for option, default in out.items():  # "5; vox2vec 0": of this method, and of one that shares its page
        own, _, other = default.partition("; ")
        out[option] = other.removeprefix(f"{name} ") if other.startswith(f"{name} ") else own
    return out


def equal(told, value):
    words = {None: ("auto",), True: ("true", "on"), False: ("false", "off")}
    if value is None or isinstance(value, bool):
        return told in words[value]
    if isinstance(value, str):
        return told == value
    if isinstance(value, tuple):
        return told == ",".join(map(str, value))
    return float(told) == value


@pytest.mark.parametrize("name", METHODS)
def test_options_and_their_defaults(name):
    cls = get_method(name)
    config = {f.name: f.default for f in fields(cls.Config)}
    assert MISSING not in config.values()
    told = (listed("mae") if name == "glmae" else {}) | listed(name)  # glmae's page leaves masking to mae's
    told = {o: d for o, d in told.items() if name != "glmae" or o in config}
    assert set(told) <= set(config)
    wrong = {o: (d, config[o]) for o, d in told.items() if not equal(d, config[o])}
    assert not wrong, f"docs/methods/{HOME.get(name, name)}.md says otherwise than the config: {wrong}"
    assert set(config) == set(told), set(config) - set(told)


@pytest.mark.parametrize("name", METHODS)
def test_presets_are_named_and_have_options(name):
    cls, text = get_method(name), page(name)
    names = {f.name for f in fields(cls.Config)}
    for preset, values in cls.presets.items():
        assert set(values) <= names, preset
        assert re.search(rf"`{preset}`|preset={preset}\b", text), preset
    known = {p for n in METHODS if HOME.get(n, n) == HOME.get(name, name) for p in get_method(n).presets}
    assert set(re.findall(r"preset=(\w+)", text)) <= known


ALONE = {"gather": False}
VOCO = {"standardise": False, **ALONE, "intensity": 0.0, "random_crops": 2, "lr": 1e-4}
VOCO_V1 = VOCO | {
    "teacher": "none",
    "inter_weight": 0.0,
    "feature_dropout": 0.0,
    "proj_dim": 2048,
    "negatives": "square",
}
MACL = {
    **{"decoder_blocks": 2, "pooling": "gap", "batch_standardise": False, "align_corners": True, "negatives": "local"},
    **{"padding": "zeros", "offset": 0, "sites": "crops", "dense_positives": "position_axial"},
    **{"rotation": 180.0, "min_scale": 0.7},
    **{"max_scale": 1.3, "mirror": True, "optimiser": "sgd", "weight_decay": 1e-5, "warmup": 0.0},
}
CPU = {"n_voxels": 128, "crop_voxels": 16384}
PRESETS = {
    "macl": {"paper": MACL | {"lr": 0.1, "shift": 0.1}, "code": MACL | {"lr": 0.01, "jitter": True}},
    "hdense": {
        "paper": {"negatives": "pair", "recon_head": "double", **ALONE},
        "released": {"train_scale_proj": False, "independent_permutations": False, "shuffle_blocks": 5000, **ALONE},
        "no_restoration": {"level_dim": 0, "levels": 0, "restoration_weight": 0.0},
        "no_balance": {"level_dim": 0, "levels": 0},
        "restoration_only": {"contrast_weight": 0.0},
        "frozen_projections": {"train_scale_proj": False},
        "cpu": CPU,
    },
    "vox2vec": {"paper": ALONE, "no_corruption": {"corruption": "none"}, "cpu": CPU},
    "voco": {
        "tpami": {},
        "paper": VOCO | {"relu": False, "weighting": "all", "reg": "linear"},
        "released": VOCO | {"reg_detach": True, "drop_rows": True},
        "nnssl": VOCO_V1 | {"pool": "batch", "reg": "linear", "proj_norm": "row", "intensity": 0.2, "random_crops": 4},
        "voco_v1": VOCO_V1 | {"weighting": "binary"},
    },
    "mae": {
        "sparse": {"masking": "sparse"},
        "s3d": {"masking": "sparse", "mask_ratio": 0.75, "mask_spread": 0.15},  # 0.6 to 0.9
        "learned_fill": {"fill": "learned"},
        "adamw": {"optimiser": "adamw"},
    },
    "glmae": {
        "arm_a": {"global_views": 0, "gg_weight": 0.0, "lg_weight": 0.0},
        "arm_b": {"gg_weight": 0.0, "lg_weight": 0.0},
        "arm_c": {"lg_weight": 0.0},
        "arm_d": {},
        "sparse": {"masking": "sparse"},
        "more_views": {"global_views": 2, "local_views": 4},
        "short": {
            **{"prototypes": 256, "hidden": 256, "bottleneck": 64, "teacher_momentum": 0.99, "centre_momentum": 0.9},
            **{"gg_weight": 0.3, "lg_weight": 0.3, "koleo_weight": 0.06, "lr": 1e-3},
        },
    },
    "robust": {"hinge": {"form": "hinge"}, "smooth": {"form": "softplus"}},
}


@pytest.mark.parametrize("name", METHODS)
def test_presets_set_what_was_published_or_measured(name):
    """Figures of the papers, of their code and of our own tables: a run with a preset is compared with these."""
    cls = get_method(name)
    assert set(cls.presets) == set(PRESETS[name])
    for preset, values in PRESETS[name].items():
        assert make_config(cls.Config, {}, cls.presets[preset]) == cls.Config(**values), preset


STEPS = {"mae": ("plan", 1), "glmae": ("plan", 2), "macl": (8, 8), "voco": (4, 1), "robust": (16, 4)}
STEPS |= {"hdense": (10, 1), "vox2vec": (10, 1)}
"""Crops (volumes, pairs) of a step, as the pages say, and the fewest that a step may have."""


@pytest.mark.parametrize("planned", [1, 3, 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_has_as_many_crops_as_the_page_says(name, planned, tiny_plans, tiny_dataset_json):
    plans = tiny_plans(3, features=(4, 6, 8), patch=(16, 24, 16), median_shape=(32, 40, 36))
    plans["configurations"]["3d_fullres"]["batch_size"] = planned
    plan, cls = Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json()), get_method(name)
    request = cls.crops(plan, SourceStats((32, 40, 36), 9), cls.Config())
    wanted, fewest = STEPS[name]
    if wanted == "plan":  # but the consistency of glmae wants 4 volumes, and mae two crops
        wanted = max(planned, {"mae": 2, "glmae": 4}[name])
    assert (request.batch_size, request.min_batch) == (wanted, fewest)


@pytest.mark.parametrize("name", METHODS)
def test_clipping_is_named(name):
    told = {float(n) for n in re.findall(r"clipped at (\d+(?:\.\d+)?)", page(name))}
    assert get_method(name).grad_clip in told


@pytest.mark.parametrize("name", METHODS)
def test_deviations_have_a_table(name):
    titles = re.findall(r"^## ((?:Where it differs|Differs from).*)$", page(name), re.MULTILINE)
    assert len(titles) == 1
    assert section(page(name), titles[0]).count("\n|") >= 7


def test_the_table_of_parts_names_each_method_s_default():
    rows = section((PAGES / "README.md").read_text(encoding="utf-8"), "Which parts segmentation gets").splitlines()
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    told = {name: row[2].split(",")[0] for row in cells for name in row[0].split(", ") if name in METHODS}
    assert told == {name: get_method(name).default_transfer for name in METHODS}
