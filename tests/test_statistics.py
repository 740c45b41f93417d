"""Intervals, tests and verdicts: parity with scipy, coverage, exactness, and what they must not pretend to know."""
import json
from itertools import product
from math import inf, isfinite

import numpy as np
import pytest
from scipy import stats

from vidgen.evaluate.statistics import FAIL, INCONCLUSIVE, PASS, Interval, bootstrap, detectable, equivalent, holm, noninferior, sign_flip, wilson
from vidgen.world import oracle


@pytest.mark.parametrize(("given", "shown"), [
    ((0.931, 0.912, 0.949, 200), "0.93 [0.91, 0.95], n 200"), ((151.3, 120.0, 190.0, 64), "151 [120, 190], n 64"), ((0.93117, 0.93012, 0.9325, 9), "0.9312 [0.9301, 0.9325], n 9"),
    ((2.0, 2.0, 2.0, 3), "2.0000 [2.0000, 2.0000], n 3"), ((0.5, -inf, inf, 1), "0.5 [unknown], n 1"),
])
def test_an_interval_prints_what_it_knows(given, shown):
    assert repr(Interval(*given)) == shown
    back = json.loads(json.dumps(Interval(*given).to_dict(), allow_nan=False))
    assert back["n"] == given[3] and back["low"] == (given[1] if isfinite(given[1]) else None)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (20, 20), (186, 200), (3, 7), (500, 1000)])
def test_wilson_is_scipys_and_the_oracles(right, n):
    found = wilson(right, n)
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert np.allclose((found.low, found.high), theirs, atol=1e-12)
    assert np.allclose((found.low, found.high), oracle.wilson(right, n), atol=1e-4)
    assert wilson(right, n, level=0.5).width < found.width


def _widened(n, level=0.95):
    "The confidence of a bootstrap of many that reaches as far as Student's t of n does (Hesterberg 2015)."
    return 2 * stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf(0.5 + level / 2, n - 1)) - 1


@pytest.mark.parametrize("statistic", [np.mean, np.median, np.std])
@pytest.mark.parametrize("skewed", [False, True])
def test_bootstrap_is_scipys(statistic, skewed):
    rng = np.random.default_rng(4)
    values = rng.exponential(1, 80) if skewed else rng.normal(5, 1, 80)
    found = bootstrap(values, statistic, resamples=20_000)
    theirs = stats.bootstrap((values,), statistic, confidence_level=_widened(80), n_resamples=20_000, method="BCa", rng=np.random.default_rng(5)).confidence_interval
    assert np.allclose((found.low, found.high), theirs, atol=0.05 * found.width)
    assert found.value == statistic(values) and found.n == 80


def test_a_skewed_handful_gets_scipys_acceleration():
    values = np.random.default_rng(3).exponential(1, 12) ** 2
    found = bootstrap(values, resamples=100_000)
    theirs = stats.bootstrap((values,), np.mean, confidence_level=_widened(12), n_resamples=100_000, method="BCa", rng=np.random.default_rng(5)).confidence_interval
    plain = stats.bootstrap((values,), np.mean, confidence_level=_widened(12), n_resamples=100_000, method="percentile", rng=np.random.default_rng(5)).confidence_interval
    assert np.allclose((found.low, found.high), theirs, atol=0.03 * found.width) and plain.high < found.high - 0.1 * found.width
    a, b = bootstrap(values), bootstrap(1000 * values)
    assert np.allclose((1000 * a.low, 1000 * a.high), (b.low, b.high))


def test_the_fast_mean_is_the_plain_mean():
    values, labels = np.random.default_rng(0).normal(size=(2, 50)), np.repeat(np.arange(10), 5)
    slow = lambda x: float(np.mean(x))
    rowwise = lambda x, axis=None: np.mean(x, axis=axis)
    for clusters in (None, labels):
        ours = [bootstrap(values[0], statistic, clusters_N=clusters) for statistic in (np.mean, slow, rowwise)]
        assert np.allclose([i.low for i in ours], ours[0].low) and np.allclose([i.high for i in ours], ours[0].high)


def test_clusters_of_one_are_no_clusters_and_order_does_not_matter():
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap(values) == bootstrap(values, clusters_N=[f"p{i:02d}" for i in range(40)])
    labels, order = np.arange(40) // 4, np.random.default_rng(1).permutation(40)
    a, b = bootstrap(values, clusters_N=labels), bootstrap(values[order], clusters_N=labels[order])
    assert np.allclose([a.low, a.high], [b.low, b.high]) and a.n == 10


def test_clusters_of_unequal_size_count_by_their_values():
    values, labels = [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]
    found = bootstrap(values, clusters_N=labels)
    assert found.value == 0.8 and found.low < 0 and found.high > 1 and found.n == 2   # two clusters know next to nothing


def test_ninety_five_percent_keeps_its_word():
    rng = np.random.default_rng(9)
    kept = [i.low <= 1 <= i.high for i in (bootstrap(rng.exponential(1, 60), resamples=500, seed=k) for k in range(400))]
    assert 0.9 <= np.mean(kept) <= 0.98
    percentile_ends = [np.quantile(x[rng.integers(0, 60, (500, 60))].mean(1), 0.975) for x in rng.exponential(1, (400, 60))]
    above = [i.high < 1 for i in (bootstrap(rng.exponential(1, 60), resamples=500, seed=k) for k in range(400))]
    assert np.mean(above) < np.mean(np.array(percentile_ends) < 1) + 0.02


@pytest.mark.parametrize("n", [2, 3, 5, 6, 10])
def test_a_handful_keeps_its_word_too(n):
    rng = np.random.default_rng(n)
    kept = [i.low <= 3 <= i.high for i in (bootstrap(rng.normal(3, 1, n), resamples=400, seed=k) for k in range(400))]
    assert 0.92 <= np.mean(kept) <= 0.985, np.mean(kept)   # a plain BCa: .50, .71, .86, .87, .90


def test_below_six_it_is_students():
    x = [0.2, 0.5, 0.1, 0.9]
    found, theirs = bootstrap(x), stats.t.interval(0.95, 3, np.mean(x), stats.sem(x))
    assert np.allclose((found.low, found.high), theirs)
    assert np.allclose(np.array([bootstrap(np.array(x) + 7).low, bootstrap(10 * np.array(x)).low]), [theirs[0] + 7, 10 * theirs[0]])


def test_one_value_tells_no_spread():
    for found in (bootstrap([0.3]), bootstrap([0.3, 0.5], clusters_N=["a", "a"])):
        assert found.n == 1 and found.low == -inf and found.high == inf
    assert bootstrap([2.0, 2.0, 2.0]).width == 0


def test_the_seed_is_the_result():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap(values) == bootstrap(values) and bootstrap(values, seed=1) != bootstrap(values)
    assert sign_flip(values) == sign_flip(values)


@pytest.mark.parametrize("n", [1, 2, 5, 9, 13])
def test_few_differences_are_counted_exactly(n):
    x = np.random.default_rng(n).normal(0.7, 1, n)
    every = np.array([abs(np.dot(s, x)) for s in product((1, -1), repeat=n)])
    assert sign_flip(x) == np.mean(every >= abs(x.sum()) * (1 - 1e-9))


def test_sign_flip_is_scipys():
    for seed, shift in ((1, 0.0), (2, 0.3), (3, 0.6)):
        x = np.random.default_rng(seed).normal(shift, 1, 40)
        theirs = stats.permutation_test((x,), lambda v, axis: v.mean(axis), permutation_type="samples", n_resamples=20_000, vectorized=True, rng=np.random.default_rng(0)).pvalue
        assert abs(sign_flip(x, permutations=20_000) - theirs) < 0.02
        assert abs(sign_flip(x) - stats.ttest_1samp(x, 0).pvalue) < 0.03


def test_p_values_are_uniform_when_nothing_differs():
    rng = np.random.default_rng(3)
    p = [sign_flip(rng.standard_t(3, 25), permutations=500, seed=k) for k in range(400)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert sign_flip(np.ones(50), permutations=500) == 1 / 501


def test_ties_and_clusters_of_signs():
    assert sign_flip(np.zeros(50)) == 1 and sign_flip([0.0]) == 1
    assert sign_flip([0.1] * 3 + [0.2] * 3) == 2 / 64
    assert sign_flip([1.0] * 12, clusters_N=np.repeat([0, 1, 2], 4)) == 2 / 8
    copies = np.repeat(np.random.default_rng(0).normal(0.3, 1, 20), 10)
    assert sign_flip(copies, clusters_N=np.repeat(np.arange(20), 10)) > 5 * sign_flip(copies)


def test_holm():
    p = np.random.default_rng(0).uniform(size=12) ** 3
    adjusted = holm(p)
    order = np.argsort(p)
    by_hand = [min(1, max((12 - j) * p[order[j]] for j in range(k + 1))) for k in range(12)]
    assert np.allclose(adjusted[order], by_hand)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(1, 12 * p)).all() and np.allclose(holm([0.03]), 0.03)
    assert np.allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


def test_the_three_verdicts():
    rng = np.random.default_rng(2)
    assert noninferior(rng.normal(0, 0.2, 300), 0.05).verdict == PASS
    assert noninferior(rng.normal(-0.12, 0.2, 300), 0.05).verdict == FAIL
    assert noninferior(rng.normal(0, 0.2, 20), 0.05).verdict == INCONCLUSIVE
    assert noninferior([0.0] * 9, 0.05).verdict == INCONCLUSIVE and noninferior([0.0] * 10, 0.05).verdict == PASS
    assert noninferior(rng.normal(0, 0.01, 300), 0.05, clusters_N=np.arange(300) % 5).verdict == INCONCLUSIVE


def test_at_the_margin_a_pass_is_rare():
    rng = np.random.default_rng(6)
    verdicts = [noninferior(rng.normal(-0.1, 0.2, 50), 0.1, resamples=300, seed=k).verdict for k in range(400)]
    assert verdicts.count(PASS) / 400 < 0.05 and verdicts.count(FAIL) / 400 < 0.05


def test_equivalence_needs_both_ends():
    assert equivalent(Interval(0, -0.04, 0.04, 9), 0.05)
    for low, high in ((-0.06, 0.01), (-0.01, 0.06), (-0.05, 0.05), (-inf, inf)):
        assert not equivalent(Interval(0, low, high, 9), 0.05)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("n", [4, 12, 60])
def test_what_is_called_detectable_is_detected(n, paired):
    rng, effect = np.random.default_rng(n), detectable(2.0, n, paired=paired)
    x, y = rng.normal(effect, 2.0, (4000, n)), rng.normal(0, 2.0, (4000, n))
    p = stats.ttest_1samp(x, 0, axis=1).pvalue if paired else stats.ttest_ind(x, y, axis=1).pvalue
    assert abs((p < 0.05).mean() - 0.8) < 0.03


def test_detectable_shrinks_with_n_and_grows_with_noise():
    effects = [detectable(0.2, n) for n in (2, 3, 5, 10, 100, 10_000, 1_000_000)]
    assert effects == sorted(effects, reverse=True) and np.isclose(detectable(0.4, 50), 2 * detectable(0.2, 50)) and detectable(0, 5) == 0
    for n in (5, 20, 80):
        limit, effect = stats.t.ppf(0.975, n - 1), detectable(1, n) * n**0.5
        assert abs(stats.nct.sf(limit, n - 1, effect) + stats.nct.cdf(-limit, n - 1, effect) - 0.8) < 1e-4
    assert np.isclose(detectable(1, 1_000_000), 2.8016e-3, rtol=1e-3) and detectable(1, 50, power=0.95) > detectable(1, 50)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: bootstrap([]), "at least one"), (lambda: bootstrap([0.1, np.nan]), "1 of 2"), (lambda: bootstrap([[1, 2]]), "shape"), (lambda: bootstrap([1, 2], level=95), "0.95 is usual"),
    (lambda: bootstrap([1, 2], clusters_N=[1]), "2 labels"), (lambda: bootstrap([1, 2], resamples=5), "at least 100"), (lambda: sign_flip([np.inf]), "not finite"),
    (lambda: sign_flip([1, 2], permutations=3), "at least 100"), (lambda: holm([0.5, 1.5]), "0..1"), (lambda: holm([]), "at least one"), (lambda: noninferior([1, 2], 0), "above 0"),
    (lambda: noninferior([1, 2], float("nan")), "above 0"), (lambda: equivalent(Interval(0, 0, 0, 1), -1), "above 0"), (lambda: wilson(5, 4), "0 <= k <= n"), (lambda: wilson(0, 0), "n >= 1"),
    (lambda: detectable(1, 1), "at least 2"), (lambda: detectable(-1, 10), "sd at least 0"), (lambda: Interval(0, 1, 0, 3), "from low to high"),
])
def test_a_wrong_question_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
