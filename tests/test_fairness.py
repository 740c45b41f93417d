"""Fairness: a planted bias is found, one that isn't there is not, and what can't be known is said to be unknown."""
import json

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from vidgen.evaluate.fairness import (Disparity, cells, check_suite, disparity, exchanged, fairness, fill, gap_interval, persistence, planted, ratio, requests, shown,
                                      uneven, unseen)
from vidgen.evaluate.statistics import holm, sign_flip

SUITE = {"name": "s", "version": 1, "templates": ["a {group} moving left", "the {group} grows"], "groups": ["orange circle", "red star"]}


def grid(gap=0.0, *, templates=40, groups=4, spread=0.1, luck=0.07, seed=0):
    "Scores of templates x groups, the last group served worse."
    rng = np.random.default_rng(seed)
    x = rng.normal(0.5, spread, (templates, 1)) + rng.normal(0, luck, (templates, groups))
    x[:, -1] -= gap
    return x


# what is asked

def test_requests_are_matched():
    asks = requests(SUITE, seeds=(3, 9))
    assert len(asks) == 2 * 2 * 2
    for template in (0, 1):
        by_group = {g: [a.seed for a in asks if (a.template, a.group) == (template, g)] for g in SUITE["groups"]}
        assert list(by_group.values()) == [[3, 9], [3, 9]]
    assert [a.prompt for a in asks[:2]] == ["an orange circle moving left", "a red star moving left"]


def test_groups_may_have_names_of_their_own():
    asks = requests(SUITE | {"groups": {"old": "elderly person", "young": "young person"}})
    assert {a.group for a in asks} == {"old", "young"} and asks[0].prompt == "an elderly person moving left"


@pytest.mark.parametrize(("template", "words", "said"), [
    ("a {group}", "orange", "an orange"), ("an {group}", "red", "a red"), ("A {group} x", "old man", "An old man x"), ("a {group}", "European", "a European"), ("a {group}", "uniform", "a uniform"),
    ("a {group}", "umbrella", "an umbrella"), ("panda {group}", "old", "panda old"), ("two {group}", "eggs", "two eggs")])
def test_articles(template, words, said):
    assert fill(template, words) == said


@pytest.mark.parametrize(("change", "says"), [
    ({"templates": []}, "none"), ({"templates": ["a red circle"]}, "names {group} once"), ({"templates": ["{group} {group}"]}, "once"), ({"templates": ["{group}", "{group}"]}, "twice"),
    ({"groups": ["one"]}, "two groups"), ({"groups": ["a", "a"]}, "two groups"), ({"groups": {"x": "same", "y": "same"}}, "two groups"), ({"templtes": []}, "nearest: templates")])
def test_a_suite_that_would_spoil_the_comparison_is_refused(change, says):
    with pytest.raises(ValueError, match=says.replace("{", r"\{")):
        check_suite(SUITE | change)


def test_seeds_are_different():
    for seeds in ((), (1, 1)):
        with pytest.raises(ValueError, match="seeds"):
            requests(SUITE, seeds=seeds)


# what counts

def row(t, g, s, x):
    return {"template": t, "group": g, "seed": s, "x": x}


def test_cells_by_hand():
    rows = [row(0, "a", 0, 1.0), row(0, "b", 0, 0.0), row(0, "a", 1, 0.0), row(0, "b", 1, 0.0), row(1, "a", 0, None), row(1, "b", 0, 1.0), row(2, "a", 0, 1), row(2, "b", 0, True)]
    found = cells(rows, "x", least=2)
    assert found.templates == (0, 2) and found.score_IG.tolist() == [[0.5, 0.0], [1.0, 1.0]]
    assert found.dropped == 1 and found.asked == {"a": 4, "b": 4} and found.measured == {"a": 3, "b": 4} and found.binary
    assert not cells(rows + [row(3, "a", 0, 0.5), row(3, "b", 0, 1.0)], "x", least=2).binary


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_what_is_no_number_is_not_measured(nothing):
    rows = [row(t, g, 0, nothing if (t, g) == (0, "a") else 0.5) for t in range(3) for g in "ab"]
    assert cells(rows, "x", least=2).templates == (1, 2)


def test_a_group_without_data_does_not_silence_the_others():
    rows = [r | {"score": None} if r["group"] == "star" and r["template"] > 3 else r for r in planted(0.0)]
    found = fairness(rows, {"score": 0.1})["score"]
    assert found.gap.n == 40 and {g.group: g.reason for g in found.groups}["star"].startswith("insufficient data: measured in 4 templates")
    assert len(found.groups) == 4 and sum(g.p is not None for g in found.groups) == 3


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match="twice"):
        cells([row(0, "a", 0, 1.0), row(0, "a", 0, 1.0)], "x")
    with pytest.raises(ValueError, match="nearest: score"):
        cells(planted(), "scor")


# the numbers

def test_gap_is_within_templates():
    x = grid(0.1)
    for other in (x + np.random.default_rng(1).normal(0, 5, (40, 1)), x[:, ::-1], x[::-1]):  # difficulty, order of groups, order of templates
        a, b = gap_interval(x), gap_interval(other)
        assert a.value == pytest.approx(b.value) and (a.low, a.high) == pytest.approx((b.low, b.high), abs=0.01)
    assert exchanged(grid(0.1, spread=5.0))[0] < 0.001  # unpaired statistics drown here


def test_scale():
    a, b = gap_interval(grid(0.1)), gap_interval(grid(0.1) * 10)
    assert (b.value, b.low, b.high) == pytest.approx((10 * a.value, 10 * a.low, 10 * a.high))


def test_two_groups_are_the_sign_flip_test():
    for seed in range(5):
        x = grid(0.05, templates=9, groups=2, seed=seed)
        p, each = exchanged(x, seed=seed)
        assert p == each[0] == each[1] and p == pytest.approx(sign_flip(x[:, 0] - x[:, 1]), abs=0.02)


def test_known_p():
    x = np.array([[1.0, 0.0]] * 3)
    assert exchanged(x)[0] == pytest.approx(2 / 8, abs=0.02)  # all three on one side, either side
    four = np.array([[1.0, 1, 1, 0]] * 3)
    assert exchanged(four)[1][3] == pytest.approx(4**-3, abs=0.005)  # the one that failed, three times of four
    assert exchanged(np.ones((8, 3)))[0] == 1.0
    assert exchanged(grid(0.5), permutations=200)[0] == 1 / 201


def test_false_alarms_and_the_intervals_promise():
    alarms, held = [], []
    for seed in range(150):
        x = grid(0.0, templates=20, seed=seed)
        alarms.append(bool((holm(exchanged(x, permutations=300, seed=seed)[1]) < 0.05).any()))
        held.append(gap_interval(x, resamples=300, seed=seed).low == 0)
    assert np.mean(alarms) <= 0.05 + 3 * 0.018 and np.mean(held) >= 0.95 - 3 * 0.018
    found = [gap_interval(grid(0.1, templates=20, seed=s), resamples=300, seed=s) for s in range(100)]
    assert np.mean([i.low <= 0.1 <= i.high for i in found]) >= 0.9 and np.mean([i.low > 0 for i in found]) > 0.8


def test_p_is_uniform_when_nothing_is_wrong():
    ps = np.array([exchanged(grid(templates=15, seed=s), permutations=200, seed=s)[0] for s in range(200)])
    assert abs(ps.mean() - 0.5) < 0.07 and abs((ps < 0.2).mean() - 0.2) < 0.09


def test_what_never_failed_may_still_fail():
    assert (1 - unseen(20)) ** 20 == pytest.approx(0.05) and unseen(300) == pytest.approx(3 / 300, rel=0.01)
    perfect = [row(t, g, 0, 1.0) for t in range(8) for g in "abc"]
    assert disparity(perfect, "x", 0.1).verdict == "INCONCLUSIVE" and disparity(perfect, "x", 0.4).verdict == "PASS"
    with pytest.raises(ValueError, match="n is 1 or more"):
        unseen(0)


# the verdicts

def test_planted_bias_is_found_and_named():
    found = fairness(planted(0.15, seed=1), {"score": 0.05})["score"]
    assert (found.verdict, found.worst, found.worse) == ("FAIL", "star", ["star"]) and found.gap.low > 0.05
    spared = fairness(planted(0.0, luck=0.05, seed=1), {"score": 0.05})["score"]
    assert spared.verdict == "PASS" and spared.worse == spared.different == []


@pytest.mark.parametrize(("margin", "verdict"), [(0.02, "FAIL"), (0.17, "INCONCLUSIVE"), (0.5, "PASS")])
def test_sides(margin, verdict):
    assert disparity(planted(0.15, seed=1), "score", margin).verdict == verdict


def test_insufficient_data_is_a_result():
    found = fairness(planted(0.3, templates=7), {"score": 0.05})
    assert found["score"].verdict == "INSUFFICIENT DATA" and found["score"].gap is None and "8 are the least" in repr(found)


def test_a_bias_hidden_by_missing_clips_is_found():
    found = fairness(planted(0.0, missing=0.4, seeds=4), {"score": 0.2})
    assert found["score"].verdict == "PASS" and found["score not measurable"].worse == ["star"] and found["score not measurable"].verdict == "FAIL"
    assert [d.metric for d in fairness(planted(), {"score": 0.2}).metrics] == ["score"]


def test_where_lower_is_better():
    rows = [r | {"error": 1 - r["score"]} for r in planted(0.15, seed=1)]
    found = fairness(rows, {"error": 0.05, "score": 0.05}, directions={"error": "lower"})
    assert found["error"].worst == found["score"].worst == "star" and found["error"].worse == ["star"] and found["error"].ratio == pytest.approx(found["score"].ratio)
    assert fairness(rows, {"error": 0.05}, directions={"error": "none"})["error"].worst is None


def test_holm_runs_over_metrics_and_groups():
    rng = np.random.default_rng(0)
    rows = [r | {f"m{i}": rng.normal() for i in range(5)} for r in planted(0.03, seed=2)]
    alone, among = fairness(rows, {"score": 0.1})["score"], fairness(rows, {"score": 0.1} | {f"m{i}": 1.0 for i in range(5)})
    every = [g for d in among.metrics for g in d.groups]
    assert [g.adjusted for g in every] == pytest.approx(holm([g.p for g in every]).tolist())
    assert min(g.adjusted for g in among["score"].groups) > min(g.adjusted for g in alone.groups)


def test_too_few_templates_for_so_many_tests_is_said():
    rows = [r | {f"m{i}": r["score"] for i in range(9)} for r in planted(0.3, templates=8, groups=("a", "b"))]
    assert any("too few templates" in n for n in fairness(rows, {f"m{i}": 0.1 for i in range(9)}).notes)
    assert not fairness(planted(0.3), {"score": 0.1}).notes


def test_ratio_is_of_rates():
    assert ratio([0.4, 0.8]) == (0.5, "")
    for means in ([-0.1, 0.5], [0.5, 1.5], [0.0, 0.0]):
        assert ratio(means)[0] is None and ratio(means)[1]


def test_a_margin_is_stated_and_metrics_have_names():
    with pytest.raises(ValueError, match="above 0"):
        fairness(planted(), {"score": 0.0})
    with pytest.raises(ValueError, match="nearest: score"):
        fairness(planted(), {"score": 0.1})["scor"]


def test_the_report_is_plain_data():
    found = fairness(planted(0.1, groups=("<b>", "c"), worst="<b>"), {"score": 0.05})
    assert json.loads(json.dumps(found.to_dict()))["metrics"][0]["metric"] == "score"
    assert len(found.rows()) == 2 and {"gap", "group", "adjusted", "not_measurable"} <= set(found.rows()[0])
    assert "&lt;b&gt;" in found._repr_html_() and "<b>" not in found._repr_html_()
    assert isinstance(found["score"], Disparity)


# shares

def test_measures_equal_scipys():
    rng = np.random.default_rng(0)
    p, fair = rng.dirichlet(np.ones(5), 7), np.array([0.1, 0.2, 0.3, 0.2, 0.2])
    found = uneven(p, fair)
    assert found["jensen_shannon"] == pytest.approx([jensenshannon(x, fair, base=2) ** 2 for x in p])
    assert found["entropy"] == pytest.approx([entropy(x, base=5) for x in p])
    assert found["total_variation"] == pytest.approx([np.clip(x - fair, 0, None).sum() for x in p])
    assert uneven(fair[None], fair)["jensen_shannon"][0] == pytest.approx(0, abs=1e-12)


def test_the_null_agrees_with_published_scores_of_a_fair_model():
    def fair(n, k):
        return shown([str(i % k) for i in range(n)], [str(i) for i in range(k)], seed=1).measures["total_variation"].fair
    assert 1 - 2 * fair(10, 2) == pytest.approx(0.754, abs=0.006) and 1 - 2 * fair(50, 2) == pytest.approx(0.888, abs=0.004)  # VBench's gender score
    assert 2 * fair(10, 10) / 10 == pytest.approx(0.0696, abs=0.001)  # HEIM's skin tones


def test_few_clips_prove_nothing():
    few, many = shown(["a"] * 7 + ["b"] * 3, "ab"), shown(["a"] * 70 + ["b"] * 30, "ab")
    assert all(m.p > 0.1 for m in few.measures.values()) and all(m.p < 0.01 for m in many.measures.values())
    assert shown(["a"] * 9, "ab") is None
    found = shown(["a"] * 12 + [None] * 4, "ab")
    assert found.n == 12 and found.unknown.value == 0.25 and found.shares == {"a": 1.0, "b": 0.0}
    assert shown(["a"] * 70 + ["b"] * 30, {"a": 0.7, "b": 0.3}).measures["total_variation"].p == 1.0


def test_bad_labels_and_shares():
    with pytest.raises(ValueError, match="nearest: red"):
        shown(["redd"], ["red", "blue"])
    for groups in (["a"], {"a": 0.5, "b": 0.6}, {"a": 0.0, "b": 1.0}):
        with pytest.raises(ValueError, match="shares above 0"):
            shown(["a"] * 20, groups)


def test_persistence():
    assert persistence([]) is None and persistence(["a", None]) is None
    assert persistence(["a", None, "b", "b"]) == 0.5
