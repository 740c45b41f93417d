"""Paired comparison: who is better, whether that is shown, and what is left open."""
import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest

from vidgen.evaluate.compare import HUMAN, ballots, compare, pair, paired, plot_differences, plot_histograms, plot_tradeoff, rows_of, save
from vidgen.evaluate.fairness import unseen
from vidgen.evaluate.statistics import Interval, holm

WAYS = {"quality": "higher", "seconds": "lower"}


def sides(gain=0.0, *, prompts=40, seeds=2, luck=0.05, spread=0.2, seed=0):
    "Two sides whose prompts differ by `spread`; B is better by `gain`."
    rng, a, b = np.random.default_rng(seed), [], []
    for prompt, level in enumerate(rng.normal(0.7, spread, prompts)):
        for s in range(seeds):
            for side, more in ((a, 0.0), (b, gain)):
                side.append({"prompt": f"prompt {prompt}", "seed": s, "quality": level + more + rng.normal(0, luck), "seconds": 2 - 10 * more + rng.normal(0, 0.1)})
    return a, b


# pairs

def test_pairs_are_by_prompt_and_seed_whatever_the_order():
    a, b = sides(0.05)
    shuffled = [b[i] for i in np.random.default_rng(1).permutation(len(b))]
    assert compare(a, b, {}).to_dict() == compare(a, shuffled, {}).to_dict()
    left, right = pair([{"prompt": "p", "seed": s, "x": s} for s in (1, 2, 3)], [{"prompt": "p", "seed": s, "x": 10 * s} for s in (3, 1, 2)]).values("x")
    assert left.tolist() == [1, 2, 3] and right.tolist() == [10, 20, 30]


def test_what_has_no_partner_is_counted_and_said():
    a, b = sides()
    found = compare(a, b[:-6] + [{"prompt": "other", "seed": 0, "quality": 1.0}], {})
    assert found["quality"].n == 74 and any("6 clips of A have no partner" in n for n in found.notes) and any("1 clips of B" in n for n in found.notes)


def test_bad_sides():
    row = {"prompt": "p", "seed": 0, "quality": 1.0}
    with pytest.raises(ValueError, match="side B has prompt 'p' with seed 0 twice"):
        pair([row], [row, row])
    with pytest.raises(ValueError, match="no prompt and seed is on both sides"):
        pair([row], [row | {"seed": 1}])
    with pytest.raises(ValueError, match="without seed"):
        rows_of([{"prompt": "p", "quality": 1.0}])
    with pytest.raises(TypeError, match="only numbers"):
        rows_of([row | {"model": "shapes"}])


def test_scores_are_read_with_their_directions():
    def scores(gain):
        clips = [{"name": f"{i}.mp4", "prompt": f"p{i}", "values": {"wobble": 0.5 + gain + 0.01 * (i % 3)}} for i in range(12)]
        return SimpleNamespace(clips=clips, rows=[{"metric": "wobble", "direction": "lower"}])
    found = compare(scores(0.0), scores(-0.1), {"wobble": 0.05})
    assert found.verdict == "PASS" and found["wobble"].direction == "lower" and found["wobble"].wins.value == 1
    clips = [{"name": f"{i}.mp4", "prompt": f"p{i}", "seed": None, "values": {"wobble": 0.5}} for i in range(3)]
    table = SimpleNamespace(clips=clips, rows=[])   # as `vidgen.score` says it of clips that carry no seed
    assert compare(table, table, {}).pairs.keys == tuple((f"p{i}", f"{i}.mp4") for i in range(3))


def test_a_few_wins_are_no_certainty():
    for gain, value in ((1.0, 1.0), (-1.0, 0.0), (0.0, 0.5)):
        a, b = ([{"prompt": i, "seed": 0, "x": float(i) + g} for i in range(8)] for g in (0.0, gain))
        found = paired(pair(a, b), "x").wins
        assert found.value == value and found.width >= unseen(8) and 0 <= found.low <= value <= found.high <= 1


# one metric

@pytest.mark.parametrize(("gain", "margin", "verdict"), [(0.0, 0.05, "PASS"), (0.2, 0.01, "PASS"), (-0.2, 0.05, "FAIL"), (-0.05, 0.05, "INCONCLUSIVE"), (-0.05, 0.2, "PASS")])
def test_sides_of_the_margin(gain, margin, verdict):
    a, b = sides(gain)
    assert paired(pair(a, b), "quality", margin=margin).verdict == verdict
    assert paired(pair(a, b), "seconds", direction="lower", margin=10 * margin).verdict == verdict     # seconds fall as quality rises


def test_direction_turns_the_verdict_not_the_difference():
    p = pair(*sides(0.1))
    up, down = (paired(p, "quality", direction=d, margin=0.02) for d in ("higher", "lower"))
    assert (up.verdict, down.verdict) == ("PASS", "FAIL") and up.difference.value == down.difference.value > 0 and up.wins.value == pytest.approx(1 - down.wins.value)
    assert down.difference.low == pytest.approx(up.difference.low, abs=0.003)


def test_swapping_sides_turns_everything():
    a, b = sides(0.03)
    one, two = paired(pair(a, b), "quality"), paired(pair(b, a), "quality")
    assert one.difference.value == -two.difference.value and one.difference.low == pytest.approx(-two.difference.high, abs=0.004)
    assert one.p == pytest.approx(two.p, abs=0.01) and one.wins.value == pytest.approx(1 - two.wins.value)


def test_pairing_cancels_the_prompts():
    wide, narrow = (paired(pair(*sides(0.05, spread=s)), "quality") for s in (5.0, 0.0))
    assert wide.difference.width == pytest.approx(narrow.difference.width, rel=0.05) and wide.p < 0.001


def test_seeds_of_one_prompt_are_not_many_findings():
    rng = np.random.default_rng(0)
    level = rng.normal(0, 0.1, 12)
    a = [{"prompt": i, "seed": s, "x": 0.0} for i in range(12) for s in range(30)]
    b = [{"prompt": i, "seed": s, "x": level[i] + rng.normal(0, 0.001)} for i in range(12) for s in range(30)]
    swings = [row | {"x": (0.1, -0.06)[row["prompt"] % 2] + rng.normal(0, 0.001)} for row in a]
    assert paired(pair(a, swings), "x").p > 0.1
    found = paired(pair(a, b), "x")
    assert found.difference.n == 12 and found.difference.width > 0.6 * 2 * 1.96 * level.std() / np.sqrt(12)


def test_false_alarms_and_the_intervals_promise():
    found = [paired(pair(*sides(0.0, prompts=20, seed=s)), "quality", margin=0.02, resamples=300) for s in range(150)]
    assert np.mean([r.p < 0.05 for r in found]) <= 0.05 + 3 * 0.018
    assert np.mean([r.difference.low <= 0 <= r.difference.high for r in found]) > 0.87
    on_the_margin = [paired(pair(*sides(-0.02, prompts=20, seed=s)), "quality", margin=0.02, resamples=300).verdict for s in range(150)]
    assert on_the_margin.count("PASS") / 150 < 0.025 + 4 * 0.013 + 0.02  # a B that is worse by the whole margin seldom passes


def test_no_difference_in_few_right_or_wrong_pairs_is_no_certainty():
    a = [{"prompt": i, "seed": 0, "right": 1.0} for i in range(20)]
    found = paired(pair(a, a), "right", margin=0.1)
    assert found.verdict == "INCONCLUSIVE" and found.difference.high == pytest.approx(unseen(20, level=0.975)) and found.reason == "no pair differs"
    assert paired(pair(a, a), "right", margin=0.2).verdict == "PASS"
    ties = compare(a, a, {"human_preference": 0.1}, directions={"right": "none"}, votes=[{"prompt": i, "seed": 0, "choice": "tie"} for i in range(20)])["human_preference"]
    assert ties.verdict == "INCONCLUSIVE" and ties.difference.high == pytest.approx(unseen(20, level=0.975))
    nine = paired(pair(a[:9], a[:9]), "right", margin=0.9)
    assert nine.verdict == "INCONCLUSIVE" and "9 prompts" in nine.reason


def test_what_is_known_on_one_side_only():
    a, b = sides()
    b = [row | {"quality": None if i < 10 else row["quality"]} for i, row in enumerate(b)]
    a = [row | {"quality": float("nan") if i == 79 else row["quality"]} for i, row in enumerate(a)]
    found = compare(a, b, {"quality": 0.1}, directions=WAYS)
    assert found["quality"].n == 69 and (found["quality"].only_a, found["quality"].only_b) == (10, 1) and any("11 pairs" in n for n in found.notes)
    nothing = compare(a, [row | {"quality": None} for row in b], {"quality": 0.1}, directions=WAYS)
    assert nothing["quality"].verdict == nothing.verdict == "INCONCLUSIVE" and nothing["quality"].difference is None and "no pair has a number" in repr(nothing)


@pytest.mark.parametrize(("given", "says"), [({"direction": "up"}, "unknown direction"), ({"margin": 0.0}, "above 0"), ({"margin": -1.0}, "above 0"), ({"margin": 0.1, "direction": "none"}, "no better direction")])
def test_bad_statements(given, says):
    with pytest.raises(ValueError, match=says):
        paired(pair(*sides()), "quality", **given)


# all of them

def test_margins_need_metrics_and_directions():
    with pytest.raises(ValueError, match="which way is better for seconds"):
        compare(*sides(), {"quality": 0.1, "seconds": 1.0}, directions={"quality": "higher"})
    with pytest.raises(ValueError, match="nearest: quality"):
        compare(*sides(), {"qualty": 0.1}, directions=WAYS)
    with pytest.raises(ValueError, match="directions: unknown metric"):
        compare(*sides(), {}, directions={"speed": "lower"})


@pytest.mark.parametrize(("gain", "margins", "verdict"), [(0.0, {}, ""), (0.0, {"quality": 0.1, "seconds": 1.0}, "PASS"), (-0.2, {"quality": 0.1, "seconds": 9.0}, "FAIL"),
                                                          (-0.05, {"quality": 0.05, "seconds": 9.0}, "INCONCLUSIVE")])
def test_one_verdict_of_many(gain, margins, verdict):
    assert compare(*sides(gain), margins, directions=WAYS).verdict == verdict


def test_holm_runs_over_all_metrics():
    a, b = sides(0.02)
    rng = np.random.default_rng(0)
    a, b = ([row | {f"m{i}": rng.normal() for i in range(8)} for row in side] for side in (a, b))
    found = compare(a, b, {})
    assert [r.adjusted for r in found.rows] == pytest.approx(holm([r.p for r in found.rows]).tolist()) and len(found.rows) == 10


def test_votes_join_the_table():
    votes = [{"prompt": f"prompt {i}", "seed": 0, "judge": j, "choice": "B" if (i + j) % 4 else "A"} for i in range(30) for j in range(2)]
    found = compare(*sides(), {HUMAN: 0.1}, votes=votes)
    row = found[HUMAN]
    share = np.mean([v["choice"] == "B" for v in votes])
    assert (row.a, row.b, row.verdict) == (pytest.approx(1 - share), pytest.approx(share), "PASS") and row.n == 30
    ties = compare(*sides(), {}, votes=[{"prompt": str(i), "seed": 0, "choice": "tie"} for i in range(12)])[HUMAN]
    assert ties.difference.value == 0 and ties.wins.value == 0.5


def test_bad_votes():
    vote = {"prompt": "p", "seed": 0, "choice": "A"}
    with pytest.raises(ValueError, match="voted twice"):
        ballots([vote, vote])
    with pytest.raises(ValueError, match="unknown choice"):
        ballots([vote | {"choice": "left"}])
    assert len(ballots([vote | {"judge": 1}, vote | {"judge": 2, "choice": "B"}])[0]) == 1


# shown and kept

def test_it_saves_itself(tmp_path):
    a, b = sides(0.02)
    found = compare(a, b, {"quality": 0.05}, directions=WAYS, names=("<old>", "new"))
    kept = save(found, tmp_path / "x")
    assert set(kept) == {"comparison.json", "comparison.csv", "pairs.csv", "differences.png"} and all(p.stat().st_size for p in kept.values())
    back = json.loads(kept["comparison.json"].read_text())
    assert back["verdict"] == "PASS" and back["rows"][0]["difference"]["value"] == pytest.approx(found["quality"].difference.value)
    rows = list(csv.DictReader(kept["pairs.csv"].open()))
    assert len(rows) == 80 and float(rows[0]["quality_A"]) == a[0]["quality"] and float(rows[0]["quality_B"]) == b[0]["quality"]
    table = list(csv.DictReader(kept["comparison.csv"].open()))
    assert [r["metric"] for r in table] == ["quality", "seconds"] and table[1]["margin"] == ""
    assert "&lt;old&gt;" in found._repr_html_() and "<old>" not in found._repr_html_()


def test_one_prompt_is_unknown_not_certain(tmp_path):
    found = compare(*sides(prompts=1), {"quality": 0.05}, directions=WAYS)
    assert found.verdict == "INCONCLUSIVE" and "unknown" in repr(found)
    assert json.loads(save(found, tmp_path)["comparison.json"].read_text())["rows"][0]["difference"]["low"] is None


def test_plots():
    found = compare(*sides(), {"quality": 0.05}, directions=WAYS)
    assert plot_differences(found) and plot_histograms(found, "seconds") and plot_differences(compare(*sides(), {})) is None
    with pytest.raises(ValueError, match="nearest: quality"):
        plot_histograms(found, "qualit")
    point = (Interval(2.0, 1.9, 2.1, 9), Interval(0.8, 0.7, 0.9, 9))
    assert plot_tradeoff({"a": point, "b": (Interval(1.0, -np.inf, np.inf, 1), point[1])})
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_tradeoff({})
