"""TIS, the stopper, and every number of the public fixture (P16-P18)."""

import csv
import json
import math
from collections import defaultdict
from pathlib import Path

import pytest

from nnssl.errors import NnsslError
from nnssl.transferability import (
    Stopper,
    baselines,
    rank_correlation,
    select_best,
    select_online,
    select_robust,
    summarise,
    tis,
)


def test_p16_patience_and_ties():
    stopper, saved = Stopper(patience=2), []
    for epoch, value in enumerate((5, 4, 3, 3, 3.1), start=1):
        assert not stopper.stop
        saved.append(stopper.update(epoch, value))
    assert stopper.stop and stopper.stopped == 5 and stopper.best_epoch == 3
    assert saved == [True, True, True, False, False]


def test_p16_nan_epoch_zero_and_warmup_are_never_best():
    stopper = Stopper(patience=2, warmup=3)
    for epoch, value in enumerate((0.0, 0.1, 0.05, math.nan, 0.4, math.inf, 0.5)):
        stopper.update(epoch, value)
    assert stopper.best_epoch == 4 and stopper.failures == [3, 5] and stopper.bad == 1 and not stopper.stop
    fresh = Stopper(patience=1)
    assert not fresh.update(0, 0.0) and fresh.best_epoch is None
    assert fresh.update(1, 9.0) and fresh.best_epoch == 1


def test_p16_resume_decides_the_same():
    trace = (0.9, 0.8, 0.81, 0.7, 0.71, math.nan, 0.72, 0.73, 0.74)
    for cut in range(len(trace)):
        whole, first = Stopper(patience=3, warmup=1), Stopper(patience=3, warmup=1)
        for epoch, value in enumerate(trace):
            whole.update(epoch, value)
        for epoch, value in enumerate(trace[:cut]):
            first.update(epoch, value)
        second = Stopper()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for epoch, value in enumerate(trace[cut:], start=cut):
            second.update(epoch, value)
        assert second == whole and second.stopped == 7


def test_min_delta_and_bad_settings():
    stopper = Stopper(patience=2, min_delta=0.1)
    assert [stopper.update(e, v) for e, v in ((1, 1.0), (2, 0.95), (3, 0.89))] == [True, False, True]
    for settings in ({"patience": 0}, {"warmup": -1}, {"min_delta": -0.1}):
        with pytest.raises(NnsslError):
            Stopper(**settings)


def test_p17_tis():
    assert tis({0: 0.5, 1: 0.5, 9: 0.5}, 9) == 1
    dice = {0: 0.8, 1: 0.9, 2: 0.6}
    assert tis(dice, select_best(dice)) == 1
    assert tis(dice, 2) == pytest.approx(2 / 3)
    assert tis({e: 7 * v for e, v in dice.items()}, 2) == pytest.approx(2 / 3)
    assert math.isnan(tis({0: 0.0, 1: 0.0}, 1)) and math.isnan(tis(dice, None))
    assert summarise([1.0, math.nan, 0.5]) == summarise([0.5, 1.0, math.nan])
    assert (summarise([1.0, math.nan, 0.5]).mean, summarise([math.nan]).undefined) == (0.75, 1)
    with pytest.raises(NnsslError, match="epoch 5 .* 0, 1, 2"):
        tis(dice, 5)


def test_selectors_on_small_traces():
    assert select_robust({0: math.nan, 3: 0.2, 1: 0.2, 2: 0.5}) == 1
    assert select_robust({0: math.nan}) is None
    assert select_online({0: 0.1, 1: 0.5, 2: 0.6, 3: 0.2}, patience=1) == (select_online({1: 0.5, 2: 0.6}, patience=1))
    assert select_online({0: 0.1, 1: 0.5}, patience=1, start=0).selected == 0
    assert rank_correlation({1: 3.0, 2: 2.0, 3: 1.0}, {1: 0.1, 2: 0.2, 3: 0.3}) == pytest.approx(1)
    assert math.isnan(rank_correlation({1: 3.0, 2: 2.0}, {1: 0.1, 2: 0.2}))
    only = baselines({5: 0.4, 9: 0.8})
    assert math.isnan(only["no pretraining"]) and only["last"] == 1 and only["random pick"] == 0.75


# --- the public figures -----------------------------------------------------------------------------------------------

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def expected():
    return json.loads((FIXTURES / "tis_expected.json").read_text())


@pytest.fixture(scope="module")
def setups():
    """setup id -> {"name", "frozen", "dice": {epoch: value}, "valid": {epoch: bool}, column: {epoch: value}}"""
    found = defaultdict(lambda: defaultdict(dict))
    with open(FIXTURES / "tis_fixture.csv", newline="") as f:
        for row in csv.DictReader(f):
            setup, epoch = found[int(row["setup_id"])], int(row["epoch"])
            setup["cell"] = f"{row['encoder']}/{row['dataset']}"
            setup["frozen"] = row["freeze_encoder"] == "1"
            setup["dice"][epoch] = float(row["dice_mean"])
            setup["valid"][epoch] = row["robustness_valid"] == "1"
            for column in ("robustness", "rob_m000", "rob_m025", "rob_m075", "rob_m100", "rob_flat_m075"):
                setup[column][epoch] = float(row[column])
    return dict(found)


def trace(setup, column, policy):
    keep = {"published": lambda e: True, "clean": lambda e: setup["valid"][e], "no_epoch0": lambda e: e > 0}[policy]
    return {e: v for e, v in setup[column].items() if keep(e)}


def check(setups, selected, expected, stopped=None):
    """Compare a selection (setup id -> epoch) with one entry of the expected values."""
    values = {i: tis(setups[i]["dice"], e) for i, e in selected.items()}
    parts = {
        "mean": summarise(list(values.values())).mean,
        "min": summarise(list(values.values())).minimum,
        "finetuned": summarise([v for i, v in values.items() if not setups[i]["frozen"]]).mean,
        "frozen": summarise([v for i, v in values.items() if setups[i]["frozen"]]).mean,
        "mean_epoch": sum(selected.values()) / len(selected),
    }
    if stopped is not None:
        parts["mean_stop_epoch"] = sum(stopped.values()) / len(stopped)
    assert set(parts) == set(expected)
    for name, value in parts.items():
        tolerance = 1e-4 if "epoch" in name else 1e-6
        assert value == pytest.approx(expected[name], abs=tolerance), name


def test_p18_counts_best_and_random(setups, expected):
    assert len(setups) == expected["n_setups"] == 36
    assert {str(i): select_best(s["dice"]) for i, s in setups.items()} == expected["best_epoch"]
    same = sum(s["robustness"][0] == s["robustness"][300] for s in setups.values())
    assert same == expected["epoch0_equals_epoch300_setups"]
    for ours, theirs in (("random pick", "all10"), ("random pick, trained", "excl_epoch0")):
        mean = summarise([baselines(s["dice"])[ours] for s in setups.values()]).mean
        assert mean == pytest.approx(expected["random_pick_mean"][theirs], abs=1e-6)
    for ours, epoch in (("no pretraining", "0"), ("last", "300")):
        mean = summarise([baselines(s["dice"])[ours] for s in setups.values()]).mean
        assert mean == pytest.approx(expected["fixed_epoch"][epoch]["mean"], abs=1e-6)


def test_p18_fixed_lengths(setups, expected):
    for epoch, values in expected["fixed_epoch"].items():
        check(setups, dict.fromkeys(setups, int(epoch)), values)


@pytest.mark.parametrize("policy", ["published", "clean", "no_epoch0"])
@pytest.mark.parametrize(
    ("key", "column"),
    [
        ("offline_robustness", "robustness"),
        ("offline_rob_m000", "rob_m000"),
        ("offline_rob_m025", "rob_m025"),
        ("offline_rob_m075", "rob_m075"),
        ("offline_rob_m100", "rob_m100"),
        ("offline_rob_flat_m075", "rob_flat_m075"),
    ],
)
def test_p18_offline(setups, expected, key, column, policy):
    check(setups, {i: select_robust(trace(s, column, policy)) for i, s in setups.items()}, expected[key][policy])


def test_p18_cells_and_selected_epochs(setups, expected):
    chosen = {i: select_robust(trace(s, "robustness", "clean")) for i, s in setups.items()}
    assert {str(i): e for i, e in chosen.items()} == expected["selected_epoch_clean"]
    cells = defaultdict(list)
    for i, s in setups.items():
        cells[s["cell"]].append(tis(s["dice"], chosen[i]))
    ours = {name: summarise(values).mean for name, values in cells.items()}
    assert ours == pytest.approx(expected["offline_robustness"]["cells_clean"], abs=1e-6)


def test_p18_online(setups, expected):
    for key, values in expected["online_robustness_clean"].items():
        start, patience = (int(part.removeprefix(name)) for part, name in zip(key.split("_"), ("start", "patience")))
        choices = {
            i: select_online(trace(s, "robustness", "clean"), patience=patience, start=start) for i, s in setups.items()
        }
        selected = {i: c.selected for i, c in choices.items()}
        check(setups, selected, values, {i: c.stopped for i, c in choices.items()})
    for key in expected:  # nothing in the file is left without a test
        assert key.split("_")[0] in ("best", "epoch0", "fixed", "n", "offline", "online", "random", "selected"), key


@pytest.mark.parametrize(("policy", "rho", "negative"), [("published", 0.30, 8), ("clean", 0.34, 9)])
def test_the_published_rank_correlation_is_low(setups, policy, rho, negative):
    values = [rank_correlation(trace(s, "robustness", policy), s["dice"]) for s in setups.values()]
    assert summarise(values).mean == pytest.approx(rho, abs=0.005) and sum(v < 0 for v in values) == negative


def test_the_choice_does_not_beat_full_pretraining(setups):
    wins = {1: 0, 0: 0, -1: 0}
    difference = []
    for s in setups.values():
        chosen, full = tis(s["dice"], select_robust(trace(s, "robustness", "clean"))), tis(s["dice"], 300)
        wins[(chosen > full) - (chosen < full)] += 1
        difference.append(chosen - full)
    assert wins == {1: 11, 0: 2, -1: 23}
    assert summarise(difference).mean == pytest.approx(-0.0055, abs=5e-5)


def test_quality_that_is_missing_is_never_the_best():
    nan = math.nan
    quality = {0: 0.5, 5: nan, 10: 0.8, 20: math.inf}
    assert tis(quality, 0) == pytest.approx(0.625) and tis(quality, 10) == 1
    assert math.isnan(tis(quality, 5)) and math.isnan(tis(quality, None))
    assert math.isnan(tis({0: nan, 5: nan}, 0)) and math.isnan(tis({0: -0.2, 5: 0.0}, 0))
    assert select_best(quality) == 10 and select_robust({0: nan, 5: 0.4, 10: 0.4, 20: -math.inf}) == 5
    assert select_robust({0: nan}) is None and select_best({}) is None
    told = summarise([0.9, nan, 0.7])
    assert (told.mean, told.minimum, told.n, told.undefined) == (pytest.approx(0.8), 0.7, 2, 1)
    nothing = summarise([nan])
    assert math.isnan(nothing.mean) and math.isnan(nothing.minimum) and (nothing.n, nothing.undefined) == (0, 1)


def test_baselines_by_hand():
    told = baselines({0: 0.4, 5: 0.8, 10: 0.6})
    assert told["no pretraining"] == pytest.approx(0.5) and told["last"] == pytest.approx(0.75)
    assert told["random pick"] == pytest.approx((0.5 + 1 + 0.75) / 3)
    assert told["random pick, trained"] == pytest.approx((1 + 0.75) / 2)
    alone = baselines({5: 0.8})
    assert math.isnan(alone["no pretraining"]) and alone["last"] == 1
    assert all(math.isnan(v) for v in baselines({}).values())


def test_rank_correlation_by_hand():
    losses, quality = {0: 0.5, 1: 0.4, 2: 0.3, 3: math.nan, 7: 0.1}, {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.9, 9: 0.5}
    assert rank_correlation(losses, quality) == pytest.approx(1)  # lower loss, higher quality
    assert rank_correlation(losses, {e: -q for e, q in quality.items()}) == pytest.approx(-1)
    assert math.isnan(rank_correlation({0: 0.5, 1: 0.4}, {0: 0.1, 1: 0.2}))
    assert math.isnan(rank_correlation({0: 0.5, 1: 0.5, 2: 0.5}, quality))
    assert math.isnan(rank_correlation(losses, dict.fromkeys(quality, 0.7)))
