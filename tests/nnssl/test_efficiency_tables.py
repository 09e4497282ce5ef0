"""From a result folder to rows and tables: values by hand, partial results, what is counted, published figures."""

from __future__ import annotations

import csv
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from nnssl.errors import NnsslError
from nnssl.experiments import tables
from nnssl.experiments.interpretation import answers
from nnssl.experiments.published import (
    left_over,
    left_over_table,
    of_setting,
    published_notes,
    published_table,
    read_published,
)
from nnssl.experiments.scores import Key, read_scores
from nnssl.experiments.summary import curves_of, mean_curve, read_curves, summarise, verdict

HEAD = "method,labels,setting,seed,fold,case,label,dice,surface_dice,hd95,reference_voxels,prediction_voxels"


def result(tmp_path, lines, **experiment):
    (tmp_path / "cases.csv").write_text("\n".join([HEAD, *lines]) + "\n")
    return read_scores(tmp_path, experiment)


def line(method, labels, seed, case, dice, label="a", fold=0, hd95="1.0", reference=10, prediction=10, setting=""):
    return f"{method},{labels},{setting},{seed},{fold},{case},{label},{dice},{dice},{hd95},{reference},{prediction}"


def two_by_two(**changes):
    """scratch and macl with 4 labels, seeds 0 and 1, cases x and y."""
    dice = {("scratch", 0, "x"): 0.6, ("scratch", 0, "y"): 0.8, ("scratch", 1, "x"): 0.5, ("scratch", 1, "y"): 0.7,
            ("macl", 0, "x"): 0.7, ("macl", 0, "y"): 0.9, ("macl", 1, "x"): 0.7, ("macl", 1, "y"): 0.7} | changes  # fmt: skip
    return [line(m, 4, s, c, d) for (m, s, c), d in dice.items()]


def row_of(rows, method, labels=4, setting="", label="mean"):
    (row,) = rows[
        (rows[["setting", "method", "labels", "label"]] == [setting, method, labels, label]).all(axis=1)
    ].itertuples()
    return row


def texts(table):
    """The cells of a table."""
    return table.frame.to_numpy().tolist()


def test_means_gain_and_tests_by_hand(tmp_path):
    rows = tables.means(summarise(result(tmp_path, two_by_two())))
    assert list(rows["method"]) == ["scratch", "macl"]
    scratch, macl = rows.itertuples()
    assert (scratch.dice, scratch.dice_sd) == pytest.approx((65.0, 100 * math.sqrt(0.005)))  # seeds 0.7 and 0.6
    assert math.isnan(scratch.gain) and math.isnan(scratch.cases) and math.isnan(scratch.label_factor)
    assert macl.gain == pytest.approx(10.0) and macl.gain_sd == pytest.approx(0.0)  # seeds +0.1, +0.1
    assert (macl.seeds_compared, macl.seeds_better, macl.cases, macl.cases_better) == (2, 2, 2, 2)
    assert macl.gain_low == pytest.approx(5.0) and macl.gain_high == pytest.approx(15.0)  # cases: +0.15 (x), +0.05 (y)
    assert macl.p == macl.p_holm == pytest.approx(0.5)  # two cases, both up: 2 / 2^2


def test_gain_is_paired_by_seed_and_case(tmp_path):
    """A seed that only scratch has, and a case that only macl has, do not enter the gain."""
    lines = two_by_two() + [line("scratch", 4, 2, c, 0.1) for c in "xy"] + [line("macl", 4, 0, "z", 0.0)]
    row = row_of(summarise(result(tmp_path, lines)), "macl")
    assert row.gain == pytest.approx(10.0) and row.seeds_compared == 2 and row.cases == 2


def test_holm_runs_over_the_whole_experiment(tmp_path):
    generator = np.random.default_rng(0)
    lines = []
    for setting in ("A", "B"):
        for n in (4, 16):
            base = generator.random(12) * 0.2 + 0.5
            for method, gain in (("scratch", 0), ("mae", 0.03)):
                lines += [line(method, n, 0, f"c{i}", b + gain * (i < 10), setting=setting) for i, b in enumerate(base)]
    rows = summarise(result(tmp_path, lines)).dropna(subset="gain")
    assert len(rows) == 4
    assert list(rows["p_holm"]) == pytest.approx(list((4 * rows["p"]).clip(upper=1.0)))  # all p are equal here


def test_label_factor(tmp_path):
    lines = []
    for n, dice in ((4, 0.6), (16, 0.7), (64, 0.8)):
        lines += [line("scratch", n, 0, c, dice) for c in "xyz"] + [line("macl", n, 0, c, dice + 0.05) for c in "xyz"]
    rows = summarise(result(tmp_path, lines))
    row = row_of(rows, "macl", 4)
    assert row.scratch_labels.value == pytest.approx(8.0) and row.label_factor.value == pytest.approx(2.0)
    assert row.label_factor_low.value == pytest.approx(2.0) and row.label_factor_high.value == pytest.approx(2.0)
    assert tables.label_factor_text(row) == "2.0×"
    assert tables.label_factor_text(row_of(rows, "macl", 64)) == ">1.0×"
    assert tables.label_factor_text(row_of(rows, "scratch", 4)) == "–"


def test_folds_are_pooled_as_cases(tmp_path):
    """Validation cases of two folds are one set; a test case predicted by two folds is their mean."""
    lines = [line("scratch", 4, 0, "x", 0.4, fold=0), line("scratch", 4, 0, "y", 0.8, fold=1)]
    assert row_of(summarise(result(tmp_path, lines)), "scratch").dice == pytest.approx(60.0)
    lines = [line("scratch", 4, 0, "x", 0.4, fold=f) for f in (0, 1)] + [line("scratch", 4, 0, "x", 0.8, fold=1)]
    found = result(tmp_path, lines)
    assert row_of(summarise(found), "scratch").dice == pytest.approx(60.0)  # and the later line of fold 1 holds
    assert found.expected[""] == {("0", "0"), ("0", "1")}


def test_empty_references_are_left_out_and_counted(tmp_path):
    lines = [
        line("scratch", 4, 0, "x", 0.6), line("scratch", 4, 0, "y", "nan", reference=0, prediction=0, hd95="nan"),
        line("scratch", 4, 0, "z", 0.0, reference=0, prediction=7, hd95="inf"),
        line("scratch", 4, 0, "w", 0.0, prediction=0, hd95=""),
    ]  # fmt: skip
    rows = summarise(result(tmp_path, lines))
    row = row_of(rows, "scratch")
    assert row.dice == pytest.approx(20.0) and row.hd95_mm == pytest.approx(1.0)
    assert (row.empty_references, row.false_alarms, row.missed, row.hd95_undefined) == (2, 1, 1, 2)
    text = " ".join(tables.notes(rows))
    assert "Empty references: 2 times" in text and "1 times it was not" in text and "undefined 2 times" in text


def test_partial_results_give_partial_tables(tmp_path):
    lines = [entry for entry in two_by_two() if not entry.startswith("macl,4,,1")]
    about = {"methods": ["scratch", "macl", "voco"], "labels": [4, 16], "seeds": [0, 1]}
    rows = summarise(result(tmp_path, lines, **about))
    cells = [(r.method, r.labels) for r in tables.means(rows).itertuples()]
    assert cells == [(m, n) for m in ("scratch", "macl", "voco") for n in (4, 16)]
    text = tables.markdown(tables.metric_table(rows, "dice", "Dice, %"))
    assert "80.0 (1/2)" in text and "| voco    |          – |" in text
    assert row_of(rows, "macl").seeds == 1 and row_of(rows, "scratch").seeds == 2
    notes = " ".join(tables.notes(rows))
    assert "4 of 6 cells" in notes and "Incomplete: 1 of 6 cells" in notes and "Only 2 test cases" in notes
    compared = tables.comparison_table(rows)
    assert compared is not None and compared.frame[["labels", "method"]].to_numpy().tolist() == [["4", "macl"]]


def test_a_seed_with_missing_cases_or_folds_is_incomplete(tmp_path):
    lines = [entry for entry in two_by_two() if not entry.startswith("macl,4,,1,0,y")]
    assert row_of(summarise(result(tmp_path, lines)), "macl").seeds == 1
    assert row_of(summarise(result(tmp_path, two_by_two(), folds=[0, 1])), "macl").seeds == 0


@pytest.mark.parametrize("lines", [None, [], ["scratch,4,,0,0,x"]])
def test_nothing_measured_is_no_error(tmp_path, lines):
    if lines is not None:
        (tmp_path / "cases.csv").write_text("\n".join([HEAD, *lines]) + "\n")
    rows = summarise(read_scores(tmp_path, {"methods": ["scratch", "mae"], "labels": ["10%"]}))
    assert list(rows["labels"]) == ["10%", "10%"] and not rows["measured"].any()
    assert "–" in tables.markdown(tables.metric_table(rows, "dice", "Dice, %"))
    assert tables.comparison_table(rows) is None and answers(rows) == []


def test_broken_lines_are_named(tmp_path):
    with pytest.raises(NnsslError, match=r"(?s)cases.csv.*line 3: could not convert dice = 'high'"):
        result(
            tmp_path,
            [line("scratch", 4, 0, "x", 0.5), line("scratch", 4, 0, "y", "high"), line("scratch", 4, 0, "z", 0.5)],
        )
    with pytest.raises(NnsslError, match="line 2: dice = 58"):
        result(tmp_path, [line("scratch", 4, 0, "x", 58)])
    (tmp_path / "cases.csv").write_text("method,labels\nscratch,4\n")
    with pytest.raises(NnsslError, match="no column seed, case, label, dice"):
        read_scores(tmp_path, {})


def test_settings_have_their_own_axes(tmp_path):
    asked = [
        {"name": "B", "methods": ["scratch"], "labels": [2], "seeds": [0]},
        {"name": "A", "methods": ["scratch", "mae"], "labels": [1], "seeds": [0, 1]},
    ]
    found = result(tmp_path, [line("scratch", 1, 0, "x", 0.5, setting="A")], settings=asked)
    assert found.settings == ["B", "A"]
    assert (found.labels("B"), found.labels("A")) == ([2], [1])
    assert found.methods("A") == ["scratch", "mae"] and found.complete_seeds(Key("A", "scratch", 1)) == (1, 2)


def test_without_scratch_the_first_method_is_the_baseline(tmp_path):
    lines = [entry.replace("scratch", "vox2vec") for entry in two_by_two()]
    rows = summarise(result(tmp_path, lines, methods=["vox2vec", "macl"]))
    assert row_of(rows, "macl").gain == pytest.approx(10.0)
    assert tables.comparison_table(rows).title == "Against vox2vec"


def runs_csv(curves):
    head = ["method", "labels", "seed", "fold", "epoch", "step", "pseudo_dice", "train_loss", "val_loss", "minutes"]
    rows = [[m, n, s, 0, e, e, d, 0, 0, 1] for (m, n, s), curve in curves.items() for e, d in enumerate(curve)]
    return pd.DataFrame(rows, columns=head).astype(str)


def test_epochs_to_scratchs_dice(tmp_path):
    curves = read_curves(runs_csv({("scratch", 4, 0): [0.1, 0.3, 0.4, 0.5], ("macl", 4, 0): [0.3, 0.5, 0.6, 0.6],
                                   ("mae", 4, 0): [0.0, 0.1, 0.2, 0.3]}))  # fmt: skip
    lines = [line(m, 4, 0, "x", 0.5) for m in ("scratch", "macl", "mae")]
    rows = summarise(result(tmp_path, lines), curves)
    row = row_of(rows, "macl")
    assert (row.epochs_to_scratch.value, row.scratch_epochs.value) == (2, 4)
    assert tables.epochs_text(row) == "2 / 4"
    assert tables.epochs_text(row_of(rows, "mae")) == ">4 / 4"
    assert tables.epochs_text(row_of(rows, "scratch")) == "–"


def test_curves_of_a_killed_run(tmp_path):
    """A run that was cut off: the mean goes as far as all runs go, and no target is taken from a scratch that is not finished."""
    rows = runs_csv({("scratch", 4, 0): [0.1, 0.3, 0.4], ("scratch", 4, 1): [0.2], ("macl", 4, 0): [0.3, 0.5]})
    rows.loc[0, "epoch"] = ""
    rows.loc[4, "pseudo_dice"] = "0.3."
    curves = read_curves(rows)
    scratch = curves_of(curves, Key("", "scratch", 4))
    assert scratch.shape == (2, 3) and list(mean_curve(scratch)) == [0.2]
    assert list(curves_of(curves, Key("", "macl", 4)).iloc[0].fillna(0)) == [0, 0.5]
    found = summarise(result(tmp_path, [line(m, 4, 0, "x", 0.5) for m in ("scratch", "macl")]), curves)
    assert tables.epochs_text(row_of(found, "macl")) == "–"


def gain(low, high, p, seeds=3, better=3):
    return SimpleNamespace(gain=(low + high) / 2, gain_low=low, gain_high=high, p_holm=p, seeds_compared=seeds,
                           seeds_better=better)  # fmt: skip


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (gain(0.01, 0.03, 0.01), "better"),
        (gain(-0.03, -0.01, 0.01, better=0), "worse"),
        (gain(-0.01, 0.03, 0.01), "unclear"),
        (gain(0.01, 0.03, 0.2), "unclear"),
        (gain(0.01, 0.03, 0.01, better=2), "unclear"),
        (gain(0.01, 0.03, 0.01, seeds=1, better=1), "one seed"),
        (gain(math.nan, math.nan, math.nan), "unclear"),
    ],
)
def test_verdict(of, said):
    assert verdict(of) == said


def test_answers_name_what_is_clear(synthetic_experiment):
    folder = synthetic_experiment(
        counts=(4, 64, 256), keep=lambda row: row["labels"] != 256 or row["method"] == "scratch"
    )
    rows = summarise(read_scores(folder, json.loads((folder / "experiment.json").read_text())))
    first, _, last = answers(rows)
    assert first.startswith("**4 labels**, scratch 58.8 % Dice: better than scratch: `macl` +5.0 (+4.")
    assert last == "**256 labels**, scratch 73.7 % Dice: nothing to compare yet."


def test_answers_group_by_verdict(tmp_path):
    lines = []
    for seed in (0, 1):
        for i in range(10):
            hard = 0.5 + 0.02 * i
            lines += [line("scratch", 4, seed, f"c{i}", hard), line("voco", 4, seed, f"c{i}", hard - 0.05 - 0.001 * i)]
            lines += [line("mae", 4, seed, f"c{i}", hard + (0.01 + 0.001 * i) * (-1) ** i)]
    assert answers(summarise(result(tmp_path, lines))) == [
        "**4 labels**, scratch 59.0 % Dice: worse than scratch: `voco` -5.5 (-5.6 to -5.3); "
        "no clear difference from scratch: `mae` -0.1 (-1.0 to +0.9)."
    ]


def test_csv_holds_everything(tmp_path):
    lines = two_by_two() + [line(m, 4, s, c, 0.5, label="b") for m in ("scratch", "macl") for s in (0, 1) for c in "xy"]
    rows = summarise(result(tmp_path, lines))
    read = list(csv.DictReader(io.StringIO(tables.csv_text(rows))))
    assert [(r["method"], r["label"]) for r in read] == [
        (m, n) for m in ("scratch", "macl") for n in ("mean", "a", "b")
    ]
    mean = read[3]
    assert float(mean["dice"]) == pytest.approx(62.5) and float(mean["gain"]) == pytest.approx(5.0)
    assert mean["cases_better"] == "2" and read[4]["gain"] == "" and float(read[4]["dice"]) == pytest.approx(75.0)
    assert None not in mean and None not in mean.values()


def test_markdown_and_tex_escape(tmp_path):
    table = tables.Table("T", pd.DataFrame({"method": ["a|b_c", "x"], "Dice, %": ["81.2 ± 0.4", ">4.0×"]}))
    assert "a\\|b_c" in tables.markdown(table)
    assert tables.tex_escape("-0.1 to +0.7, a-b, 2-3") == "$-$0.1 to +0.7, a-b, 2-3"
    frame = pd.DataFrame({"labels": ["4", "4", "8"], "m": ["a", "b", "a"], "d": "1"})
    grouped = tables.tex(tables.Table("T", frame, 2), "")
    assert grouped.count(r"\addlinespace") == 1
    tex = tables.tex(table, "50% of A_B & C")
    assert r"a|b\_c & 81.2 $\pm$ 0.4 \\" in tex and r"\caption{50\% of A\_B \& C}" in tex and r"$>$4.0$\times$" in tex
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 1 and r"\begin{tabular}{lr}" in tex


def test_figures_as_text():
    assert [tables.p_text(p) for p in (0.0004, 0.0123, 0.0999, 0.5, math.nan)] == [
        "<0.001",
        "0.012",
        "0.10",
        "0.50",
        "–",
    ]
    assert tables.plus_minus(81.2, math.nan) == "81.2" and tables.plus_minus(math.nan, math.nan) == "–"
    assert tables.plus_minus(81.24, 0.36) == "81.2 ± 0.4" and tables.signed(-0.04) == "-0.0"
    assert tables.labels_text(1) == "1 label" and tables.labels_text("all") == "all"


PUBLISHED = "setting,method,labels,label,dice,sd,source,note\n"


def published(tmp_path, text, head=PUBLISHED):
    file = tmp_path / "published.csv"
    file.write_text(head + text)
    return read_published(file)


def test_published_beside_ours(tmp_path):
    rows = summarise(result(tmp_path, two_by_two()))
    figures = published(
        tmp_path, "X,Scratch,4,,51.8,,Table I,other metric\nX,MACL,4,,65.1,1.2,Table I,\nX,PCL,8,,63.6,,Table I,\n"
    )
    table = published_table(rows, of_setting(figures, "Dataset007_X", ["Dataset007_X"]))
    assert texts(table) == [
        ["4", "Scratch", "51.8", "65.0 ± 7.1", "–", "–", "Table I"],
        ["4", "MACL", "65.1 ± 1.2", "75.0 ± 7.1", "+13.3", "+10.0", "Table I"],
        ["8", "PCL", "63.6", "–", "–", "–", "Table I"],
    ]
    assert published_notes(figures)[1:] == ["other metric"]
    assert published_table(rows, of_setting(figures, "Y", ["Y"])) is None
    assert left_over(figures, ["Dataset007_X"]).empty
    assert texts(left_over_table(left_over(figures, ["Y"])))[1] == ["X", "4", "MACL", "65.1 ± 1.2", "Table I"]


def test_published_for_all_labels_stands_beside_our_most(tmp_path):
    lines = [line("scratch", n, 0, "x", d) for n, d in ((4, 0.5), (33, 0.8))]
    figures = published(tmp_path, "X,scratch,all,,89.9,,,\n")
    table = published_table(summarise(result(tmp_path, lines)), figures)
    assert texts(table)[0][:4] == ["33", "scratch", "89.9", "80.0"]


def test_published_without_a_setting(tmp_path):
    figures = published(tmp_path, "scratch,4,51.8\n", head="method,labels,dice\n")
    assert of_setting(figures, "anything", ["anything"]).equals(figures)
    assert of_setting(figures, "A", ["A", "B"]).empty


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("X,a,4,,high,,,\n", "line 2: dice = 'high' is not a number"),
        ("X,a,4,,130,,,\n", "line 2: dice = 130 is not a percentage"),
        ("X,a,4,,50,,,\nX,,4,,50,,,\n", "line 3: method is empty"),
        ("X,a,4,,50,,,\nX,A,4,,51,,,\n", "line 3: gives the same figure as line 2"),
        ("X,a,4,,50,,t,n,m\n", "line 2: more fields than columns"),
        ("X,a,4,,0.51,,,\n", "write percent"),
    ],
)
def test_published_errors_name_the_line(tmp_path, text, message):
    with pytest.raises(NnsslError, match=message) as caught:
        published(tmp_path, text)
    assert "published.csv" in str(caught.value)


def test_published_columns_are_checked(tmp_path):
    with pytest.raises(NnsslError, match="no column 'dice'.*\n.*unknown column 'dise'. Did you mean 'dice'"):
        published(tmp_path, "a,4,50\n", head="method,labels,dise\n")
    with pytest.raises(NnsslError, match="cannot be read"):
        read_published(tmp_path / "nowhere.csv")
