"""The statistics against scipy, and against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nnssl.experiments import statistics as st
from nnssl.experiments.statistics import Factor

NAN = math.nan


def scores(*seeds):
    """The scores of a cell from nested lists (seeds, cases, labels)."""
    array = np.array(seeds, dtype=float)
    index = pd.MultiIndex.from_product([range(n) for n in array.shape], names=["seed", "case", "label"])
    return pd.Series(array.ravel(), index)


def test_seed_means_are_nnunets():
    """Label by label over cases first: the order matters where a value is missing."""
    found = st.seed_means(scores([[0.8, 0.6], [0.4, NAN]], [[1.0, NAN], [0.0, NAN]]))
    assert list(found) == pytest.approx([(0.6 + 0.6) / 2, 0.5])  # cases first would give 0.55 and 0.5
    assert st.seed_means(scores([[NAN, NAN]])).isna().all()


def test_weighted_mean_equals_resampling_by_hand():
    generator = np.random.default_rng(0)
    array = generator.random((3, 7, 2))
    array[1, 2, 0] = NAN
    weights = st.case_weights(range(7), 50, seed=3)
    assert (weights.sum(axis=1) == 7).all() and weights.shape == (50, 7)
    for row, value in zip(weights.to_numpy(), st.weighted_mean(scores(*array), weights)):
        drawn = np.repeat(np.arange(7), row.astype(int))
        assert value == pytest.approx(st.seed_means(scores(*array[:, drawn])).mean())


def test_weights_do_not_depend_on_what_was_drawn_before():
    first = st.case_weights("abcde", 20)
    np.random.default_rng(0).random(100)
    assert st.case_weights("abcde", 20).equals(first)
    assert not st.case_weights("abcde", 20, seed=1).equals(first)


def test_interval_takes_order_statistics():
    assert st.interval(np.arange(1001.0)) == (25.0, 975.0)
    assert st.interval(np.array([1.0, math.inf, NAN])) == (1.0, math.inf)
    assert all(map(math.isnan, st.interval(np.array([NAN]))))


def test_interval_agrees_with_scipys_bootstrap():
    sample = np.random.default_rng(1).normal(0.05, 0.1, 40)
    ours = st.interval(st.weighted_mean(scores(sample[:, None]), st.case_weights(range(40))))
    theirs = stats.bootstrap((sample,), np.mean, n_resamples=9999, method="percentile", rng=2).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.002)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Cases differ, and a hard case is hard under each seed: 150 experiments of 30 cases and 3 seeds, true gain 0.03."""
    generator = np.random.default_rng(7)
    weights = st.case_weights(range(30), 300)
    independent = st.case_weights(range(90), 300)
    covered, naive = 0, 0
    for _ in range(150):
        shared = generator.normal(0.03, 0.06, 30)
        gains = shared + generator.normal(0, 0.01, (3, 30))
        low, high = st.interval(st.weighted_mean(scores(*gains[:, :, None]), weights))
        covered += low <= 0.03 <= high
        low, high = st.interval(st.weighted_mean(scores(gains.reshape(90, 1)), independent))
        naive += low <= 0.03 <= high
    assert 0.90 <= covered / 150 <= 0.97
    assert naive / 150 < 0.80  # what drawing (seed, case) pairs independently would have claimed


def test_paired_differences():
    ours = scores([[0.8], [0.5], [NAN]], [[0.6], [NAN], [NAN]])
    base = scores([[0.7], [0.6], [0.1]], [[0.4], [0.9], [0.2]])
    assert list(st.paired_differences(ours, base)) == pytest.approx([0.15, -0.1])  # the third case has no pair


def test_wilcoxon_is_scipys():
    d = pd.Series([0.03, -0.01, 0.04, 0.02, 0.05, 0.011, 0.06])
    assert st.wilcoxon_p(d) == stats.wilcoxon(d).pvalue
    assert st.wilcoxon_p(pd.Series([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])) == pytest.approx(2 / 64)  # all of one sign: 2 / 2^6
    assert st.wilcoxon_p(pd.concat([d, pd.Series([0.0])])) == st.wilcoxon_p(d)
    assert st.wilcoxon_p(pd.Series(np.zeros(4))) == 1.0
    assert math.isnan(st.wilcoxon_p(pd.Series(np.zeros(0))))


def test_holm_by_hand():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert st.holm([0.02, 0.02, 0.02]) == pytest.approx([0.06, 0.06, 0.06])
    assert st.holm([]) == []
    found = st.holm([NAN, 0.02, 0.04])
    assert math.isnan(found[0]) and found[1:] == pytest.approx([0.04, 0.04])  # a test that was not made does not count


def test_labels_needed_by_hand():
    counts, dice = [4, 16, 64], [0.60, 0.70, 0.80]
    assert st.labels_needed(counts, dice, 0.65) == Factor(pytest.approx(8.0))  # half way in log labels
    assert st.labels_needed(counts, dice, 0.75) == Factor(pytest.approx(32.0))
    assert st.labels_needed(counts, dice, 0.60) == Factor(pytest.approx(4.0))
    assert st.labels_needed(counts, dice, 0.80) == Factor(pytest.approx(64.0))
    assert st.labels_needed(counts, dice, 0.81) == Factor(pytest.approx(64.0), ">")
    assert st.labels_needed(counts, dice, 0.50) == Factor(pytest.approx(4.0), "<")
    assert math.isnan(st.labels_needed(counts, dice, NAN).value)
    assert math.isnan(st.labels_needed([], [], 0.5).value)


def test_labels_needed_where_the_curve_falls():
    """Once reached it counts as reached: the smallest number of labels."""
    assert st.labels_needed([4, 16, 64], [0.60, 0.75, 0.70], 0.74).value == pytest.approx(4 * 4 ** (14 / 15))
    assert st.labels_needed([4, 16, 64], [0.60, 0.75, 0.70], 0.72).bound == ""
    assert st.labels_needed([4, 16, 64], [0.60, NAN, 0.70], 0.65).value == pytest.approx(16.0)


def test_first_reached():
    assert st.first_reached([0.1, 0.3, 0.5], 0.3) == 2
    assert (
        st.first_reached([0.9, 0.1, 0.5], 0.5, window=2) == 2
    )  # (0.9 + 0.1) / 2; the first epoch alone does not count
    assert st.first_reached([0.1, 0.2], 0.3) is None
    assert st.first_reached([NAN, 0.4], 0.4, window=2) == 2
    assert st.first_reached([], 0.4) is None
