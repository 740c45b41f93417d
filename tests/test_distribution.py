"""Distances of sets of clips: parity with torch-fidelity, torchmetrics, scipy and sixty digits; closed forms; properties; what is refused."""
import warnings

import mpmath
import numpy as np
import pytest
import torch
from scipy import linalg, stats

from vidgen.evaluate import distribution as d
from vidgen.evaluate.distribution import METRICS, Moments, SmallSample, floor, frechet, fvd, interval, jedi, kernel_distance, kernel_subsets, mmd

pytestmark = pytest.mark.filterwarnings("ignore::vidgen.evaluate.distribution.SmallSample")


def cloud(seed, n, D, scale=1.0, turn=True):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)) * np.arange(1, D + 1) ** -0.7 * scale + rng.normal(size=D) * 0.2
    return x @ np.linalg.qr(np.random.default_rng([seed, 1]).normal(size=(D, D)))[0] if turn else x


def whitened(seed, n, D):
    "Points with sample mean 0 and covariance I to the last digit."
    x = np.random.default_rng(seed).normal(size=(n, D))
    x -= x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T


SIZES = [(300, 280, 24), (20, 30, 64), (20, 300, 64), (300, 20, 64), (65, 64, 64)]


# Fréchet

@pytest.mark.parametrize(("n", "m", "D"), SIZES)
def test_frechet_is_that_of_scipy_torchmetrics_and_torch_fidelity(n, m, D):
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    X, Y = cloud(1, n, D), cloud(2, m, D, 1.2)
    m1, m2, S1, S2 = X.mean(0), Y.mean(0), np.cov(X.T), np.cov(Y.T)
    found, size = frechet(X, Y), np.trace(S1) + np.trace(S2)
    root = linalg.sqrtm(S1 @ S2)
    for theirs in (((m1 - m2) ** 2).sum() + size - 2 * np.trace(root).real, float(_compute_fid(*map(torch.from_numpy, (m1, S1, m2, S2)))),
                   fid_statistics_to_metric({"mu": m1, "sigma": S1}, {"mu": m2, "sigma": S2}, False)["frechet_inception_distance"]):
        assert abs(found - theirs) < 1e-5 * size


@pytest.mark.parametrize(("n", "m", "D"), [(6, 5, 9), (20, 7, 9), (30, 25, 9)])
def test_frechet_is_right_to_the_last_digits(n, m, D):
    X, Y = cloud(3, n, D), cloud(4, m, D)
    with mpmath.workdps(60):
        A, B = (mpmath.matrix(Z.tolist()) for Z in (X, Y))
        def centred(Z):
            mean = [mpmath.fsum(Z[i, j] for i in range(Z.rows)) / Z.rows for j in range(D)]
            return mean, mpmath.matrix([[(Z[i, j] - mean[j]) / mpmath.sqrt(Z.rows - 1) for j in range(D)] for i in range(Z.rows)])
        (m1, R1), (m2, R2) = centred(A), centred(B)
        root = mpmath.fsum(mpmath.svd_r(R1 * R2.T, compute_uv=False))
        truth = mpmath.fsum((a - b) ** 2 for a, b in zip(m1, m2)) + mpmath.mnorm(R1, "f") ** 2 + mpmath.mnorm(R2, "f") ** 2 - 2 * root
    for found in (frechet(X, Y), frechet(X, Y, exact=True), *([frechet(Moments.of(X), Moments.of(Y))] if min(n, m) > D else [])):
        assert abs(found - float(truth)) < 1e-12 * float(truth), (found, truth)


@pytest.mark.parametrize(("n", "D"), [(500, 32), (40, 64), (64, 64), (65, 64), (2, 30)])
def test_a_set_is_at_no_distance_from_itself(n, D):
    X = cloud(5, n, D) * 100 + 1e3
    trace = X.var(0, ddof=1).sum()
    order = np.random.default_rng(0).permutation(n)
    for found in (frechet(X, X), frechet(X, X, exact=True), frechet(X, X[order]), frechet(X, X, ddof=0), frechet(Moments.of(X), Moments.of(X))):
        assert 0 <= found < 1e-9 * trace


@pytest.mark.parametrize("dead", [0, 5])
@pytest.mark.parametrize("n", [200, 20])
def test_known_distances(n, dead):
    D = 12
    X = np.c_[cloud(6, n, D - dead), np.zeros((n, dead))]   # features that never fire make the covariance singular
    shift, S = np.linspace(-1, 1, D), np.cov(X.T)
    assert np.isclose(frechet(X, X + shift), (shift**2).sum(), rtol=1e-12)
    Y = X.mean(0) + 1.7 * (X - X.mean(0))
    assert np.isclose(frechet(X, Y), 0.7**2 * np.trace(S), rtol=1e-12)
    if n > D:
        a, b, Z = np.arange(1.0, D + 1), np.linspace(5, 0.1, D), whitened(7, n, D)
        assert np.isclose(frechet(Z * a, Z * b + 2), ((a - b) ** 2).sum() + 4 * D, rtol=1e-12)


def test_two_covariances_that_do_not_commute():
    Z = whitened(8, 50, 2)
    S1, S2 = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    X, Y = (Z @ np.linalg.cholesky(S).T for S in (S1, S2))
    root = np.sqrt(np.trace(S1 @ S2) + 2 * np.sqrt(np.linalg.det(S1) * np.linalg.det(S2)))
    assert np.isclose(frechet(X, Y), np.trace(S1) + np.trace(S2) - 2 * root, rtol=1e-12)


@pytest.mark.parametrize(("n", "m", "D"), SIZES)
def test_frechet_is_symmetric_and_does_not_mind_where_the_axes_lie(n, m, D):
    X, Y = cloud(9, n, D), cloud(10, m, D, 0.8)
    found = frechet(X, Y)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
    for other in (frechet(Y, X), frechet(X @ turn + 7, Y @ turn + 7), frechet(3 * X, 3 * Y) / 9, frechet(X, Y, exact=True), frechet(X[::-1], Y)):
        assert np.isclose(found, other, rtol=1e-9)
    assert found > 0


def test_ddof():
    X, Y = cloud(11, 30, 8), cloud(12, 30, 8)
    gap = ((X.mean(0) - Y.mean(0)) ** 2).sum()
    assert np.isclose((frechet(X, Y, ddof=0) - gap) * 30 / 29, frechet(X, Y) - gap)
    assert fvd(X, Y, mode="styleganv").value == frechet(X, Y, ddof=0) and fvd(X, Y).value == frechet(X, Y)


def test_frames_are_pooled():
    X, Y = cloud(13, 60, 8).reshape(12, 5, 8), cloud(14, 60, 8).reshape(12, 5, 8)
    assert frechet(X, Y) == frechet(X.reshape(60, 8), Y.reshape(60, 8))
    record = fvd(np.tile(X, (5, 1, 1)), np.tile(Y, (5, 1, 1)))
    assert record.detail["n"] == 60 and record.detail["frames"] == 300 and record.reason
    assert fvd(list(np.tile(X, (5, 1, 1))), list(np.tile(Y, (5, 1, 1)))) == record
    ragged = [cloud(k, 2 + k % 3, 8) for k in range(40)]
    assert frechet(ragged, Y) == frechet(np.concatenate(ragged), Y) and fvd(ragged, ragged[:25]).detail["frames"] == sum(map(len, ragged))


# moments

def test_moments_merge_in_any_order():
    X = cloud(15, 1000, 6) + 1e5
    whole, rng = Moments.of(X), np.random.default_rng(0)
    for _ in range(5):
        parts = [Moments.of(part) for part in np.split(X, sorted(rng.choice(np.arange(1, 1000), 7, replace=False)))]
        while len(parts) > 1:
            i, j = rng.choice(len(parts), 2, replace=False)
            both = parts[i].merge(parts[j])
            parts = [p for k, p in enumerate(parts) if k not in (i, j)] + [both]
        assert parts[0].n == 1000 and np.allclose(parts[0].mean_D, whole.mean_D, rtol=1e-14) and np.allclose(parts[0].cov(), np.cov(X.T), rtol=1e-9, atol=1e-10)
    assert np.allclose(whole.cov(0), np.cov(X.T, ddof=0), rtol=1e-9)


def test_moments_keep_their_digits_far_from_zero():
    X = cloud(16, 400, 4)
    for far in (1e2, 1e4, 1e6):
        shifted = X + far
        merged = Moments.of(shifted[:100]).merge(Moments.of(shifted[100:]))
        assert np.abs(merged.cov() - np.cov(shifted.T)).max() < 1e-15 * far + 1e-14 and frechet(merged, Moments.of(shifted)) < 1e-9


def test_moments_of_too_few_lose_half_the_digits_and_no_more():
    X, Y = cloud(17, 12, 30), cloud(18, 500, 30)
    for A, B in ((X, X[::-1]), (X, Y), (Y, X)):
        assert abs(frechet(Moments.of(A), Moments.of(B)) - frechet(A, B)) < 1e-6 * np.trace(np.cov(Y.T))


def test_moments_on_disk(tmp_path):
    moments = Moments.of(cloud(17, 50, 5))
    back = Moments.open(moments.save(tmp_path / "m.safetensors"))
    assert back.n == 50 and (back.mean_D == moments.mean_D).all() and (back.M2_DD == moments.M2_DD).all()


# kernel distances

def test_kernel_distance_is_that_of_torch_fidelity_and_torchmetrics():
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import poly_mmd

    X, Y = cloud(18, 90, 16), cloud(19, 90, 16, 1.3)
    assert np.isclose(kernel_distance(X, Y), float(poly_mmd(torch.from_numpy(X), torch.from_numpy(Y))), rtol=1e-9)
    theirs = kid_features_to_metric(torch.from_numpy(X), torch.from_numpy(Y), kid_subsets=7, kid_subset_size=40, rng_seed=2020, verbose=False, kid_kernel="poly",
                                    kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
    ours = kernel_subsets(X, Y, subsets=7, size=40)
    assert np.allclose(ours, [theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]], rtol=1e-9)


def test_kernel_distance_by_the_book():
    X, Y = cloud(20, 7, 3), cloud(21, 5, 3)
    k = lambda a, b: (a @ b / 3 + 1) ** 3
    book = sum(k(a, b) for i, a in enumerate(X) for j, b in enumerate(X) if i != j) / 42 + sum(k(a, b) for i, a in enumerate(Y) for j, b in enumerate(Y) if i != j) / 20
    book -= 2 * np.mean([k(a, b) for a in X for b in Y])
    assert np.isclose(kernel_distance(X, Y), book, rtol=1e-10)
    K = (X @ Y.T / 3 + 1) ** 3
    for block in (2, 7, 512):
        rows, columns = d._kernel_sums(X, Y, block)
        assert np.allclose(rows, K.sum(1)) and np.allclose(columns, K.sum(0))
    big = cloud(22, 1300, 3)   # more than two blocks
    assert np.isclose(kernel_distance(big, Y), _plain(big, Y), rtol=1e-8)


def _plain(X, Y):
    K = [(A @ B.T / X.shape[1] + 1) ** 3 for A, B in ((X, X), (Y, Y), (X, Y))]
    off = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in K[:2]]
    return off[0] + off[1] - 2 * K[2].mean()


def test_kernel_distance_has_no_bias_and_frechet_has():
    pairs = [(cloud(seed, 32, 10, turn=False)[:16], cloud(seed, 32, 10, turn=False)[16:]) for seed in range(400)]
    kernels, frechets = [kernel_distance(*p) for p in pairs], [frechet(*p) for p in pairs]
    assert abs(np.mean(kernels)) < 3 * np.std(kernels) / 20 and min(kernels) < 0
    assert np.mean(frechets) > 20 * np.std(frechets) / 20


def test_jedi_by_the_book():
    for n, m, D in ((30, 40, 6), (8, 9, 50)):
        X, Y = cloud(23, n, D), cloud(24, m, D)
        K = [((A @ B.T) / D) ** 2 for A, B in ((X, X), (Y, Y), (X, Y))]   # all pairs, the diagonal too
        assert np.isclose(jedi(X, Y), 100 * (K[0].mean() + K[1].mean() - 2 * K[2].mean()), rtol=1e-9)
    assert jedi(X, X) == 0 and np.isclose(jedi(X, Y), jedi(Y, X))


# permutation test

def test_mmd_is_that_of_loops():
    X, Y = cloud(25, 9, 3), cloud(26, 6, 3)
    Z = np.concatenate([X, Y])
    far = [((a - b) ** 2).sum() for i, a in enumerate(Z) for b in Z[:i]]
    k = lambda a, b: np.exp(-((a - b) ** 2).sum() / np.median(far))
    book = sum(k(a, b) for i, a in enumerate(X) for j, b in enumerate(X) if i != j) / 72 + sum(k(a, b) for i, a in enumerate(Y) for j, b in enumerate(Y) if i != j) / 30
    book -= 2 * np.mean([k(a, b) for a in X for b in Y])
    for block in (4, 15, 512):
        found = mmd(X, Y, block=block)
        assert np.isclose(found.statistic, book, rtol=1e-9) and np.isclose(found.bandwidth, np.median(far)) and (found.n, found.m) == (9, 6)


def test_every_permutation_is_scored_right():
    rng, Z = np.random.default_rng(0), cloud(27, 20, 4)
    W = np.zeros((30, 20))
    W[:, :8] = 1
    rng.permuted(W, axis=1, out=W)
    K = np.exp(-d._squared(Z, Z))
    found = d._permuted([(0, K[:, :7]), (7, K[:, 7:])], W, 8, 12)
    for w, value in zip(W.astype(bool), found):
        xx, yy, xy = K[w][:, w], K[~w][:, ~w], K[w][:, ~w]
        assert np.isclose(value, (xx.sum() - 8) / 56 + (yy.sum() - 12) / 132 - 2 * xy.mean())


def test_p_is_uniform_when_the_sets_are_alike():
    p = [mmd(cloud(seed, 50, 5, turn=False)[:20], cloud(seed, 50, 5, turn=False)[20:], permutations=200, seed=seed).p for seed in range(250)]
    assert stats.kstest(p, "uniform").pvalue > 0.01 and min(p) >= 1 / 201


def test_mmd_sees_what_the_moments_do_not():
    rng = np.random.default_rng(28)
    skewed, normal = rng.exponential(1, (600, 4)) - 1, rng.normal(size=(600, 4))
    assert mmd(skewed, normal).p == 1 / 1001 and mmd(normal[:300], normal[300:]).p > 0.01
    assert mmd(skewed, normal, seed=1).statistic == mmd(skewed, normal).statistic and mmd(normal[:300], normal[300:]) == mmd(normal[:300], normal[300:])


def test_mmd_of_points_that_coincide():
    same = mmd(np.ones((5, 3)), np.ones((7, 3)))
    assert (same.statistic, same.p, same.bandwidth) == (0, 1, 0)
    assert mmd(np.zeros((20, 2)), np.ones((20, 2))).p == 1 / 1001
    ties = np.r_[np.zeros((30, 1)), np.ones((4, 1))]
    assert np.isclose(mmd(ties[:17], ties[17:]).bandwidth, 1) and mmd(ties[::2], ties[1::2]).p > 0.3
    assert 0.25 < mmd([[0.0], [0.0]], [[1.0], [1.0]]).p < 0.42, "one split of three is this one"
    copies = np.random.default_rng(0).normal(10, 1, (3, 333))[[0] * 20 + [1, 2]]
    true = min(((copies[i] - copies[j]) ** 2).sum() for i, j in ((0, 20), (0, 21), (20, 21)))
    assert np.isclose(d.median_distance(copies), true), "rounding is no distance"
    assert mmd(cloud(29, 10, 3) + 1e6, cloud(29, 10, 3) + 1e6).p > 0.5


# floors, intervals, records

def test_the_floor_is_real_against_real():
    Y = cloud(30, 600, 16)
    found = {n: floor(Y, n) for n in (20, 100, 300, 5000)}
    assert found[20].value > 2 * found[100].value > 2 * found[300].value and found[5000].n == found[300].n == 300
    assert found[100].low <= found[100].value <= found[100].high and floor(Y, 100) == found[100] and floor(Y, 100, seed=1) != found[100]
    assert abs(floor(Y, 100, kernel_distance, splits=20).value) < 0.01
    ours = cloud(30, 600, 16)[:100]
    assert frechet(ours, Y) < found[100].high


def test_both_sides_of_a_floor_are_other_clips():
    seen = []
    floor(np.arange(40.0)[:, None], 15, lambda X, Y: seen.append((set(X[:, 0]), set(Y[:, 0]))) or 0.0)
    assert len(seen) == 5 and all(len(x) == 15 and len(y) == 25 and not x & y for x, y in seen)


def test_intervals_hold_the_distance():
    shift, held = 0.5, {"Fréchet": 0, "kernel": 0, "JEDi": 0}
    rng = np.random.default_rng(31)
    draw = lambda n, by: rng.normal(size=(n, 4)) + by
    truth = {"Fréchet": np.mean([frechet(draw(80, 0), draw(80, shift)) for _ in range(400)]), "kernel": kernel_distance(draw(6000, 0), draw(6000, shift)), "JEDi": 0}
    truth["JEDi"] = np.mean([jedi(draw(80, 0), draw(80, shift)) for _ in range(2000)])
    for _ in range(200):
        X, Y = draw(80, 0), draw(80, shift)
        for name, distance in (("Fréchet", frechet), ("kernel", kernel_distance), ("JEDi", jedi)):
            found = interval(X, Y, distance)
            held[name] += found.low <= truth[name] <= found.high
    assert all(0.87 <= count / 200 <= 1 for count in held.values()), held


def test_the_interval_of_a_difference_of_means_is_that_of_the_t_test():
    gap = lambda X, Y: float(X.mean() - Y.mean())
    widths = [interval(*np.random.default_rng(k).normal(size=(2, 100, 1)), gap).width for k in range(200)]
    assert abs(np.mean(widths) / (2 * stats.t.ppf(0.975, 9) * np.sqrt(2 / 100)) - 1) < 0.06


def test_no_distance_is_below_zero_but_that_of_the_kernel():
    X = cloud(40, 60, 4)
    assert interval(X, X).low == interval(X, X, jedi).low == 0 and interval(X, X[::-1], kernel_distance).low < 0


def test_the_fast_interval_of_the_kernel_leaves_every_clip_out():
    X, Y = cloud(32, 25, 4), cloud(33, 30, 4)
    left = [np.array([kernel_distance(np.delete(X, i, 0), Y) for i in range(25)]), np.array([kernel_distance(X, np.delete(Y, i, 0)) for i in range(30)])]
    error = 1.959964 * np.sqrt(sum((len(x) - 1) / len(x) * ((x - x.mean()) ** 2).sum() for x in left))
    found = interval(X, Y, kernel_distance)
    assert np.isclose(found.width / 2, error, rtol=1e-5) and found.value == kernel_distance(X, Y) and found.n == 25


def test_too_few_for_an_interval_is_unknown():
    X, Y = cloud(34, 19, 4), cloud(35, 30, 4)
    for found in (interval(X, Y), interval(X[:2], Y, kernel_distance)):
        assert found.low == -np.inf and found.high == np.inf and "unknown" in repr(found)
    assert interval(X, Y, groups=5).low >= 0


def test_a_bare_distance_of_few_carries_a_warning():
    X = cloud(36, 600, 8)
    for few in (X[:255], Moments.of(X[:255]), X[:255].reshape(51, 5, 8)):
        with pytest.warns(SmallSample, match="below 256"):
            frechet(few, X)
        with pytest.warns(SmallSample, match="below 256"):
            frechet(X, few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet(X[:256], X), interval(X[:64], X), floor(X, 64)
        record, enough = fvd(X[:255], X), fvd(X[:256], X)
    assert "below 256" in record.reason and "below 256" in repr(record) and enough.reason == "" and not fvd(X, X).reason


def test_records_say_what_is_known():
    import json

    X, Y = cloud(37, 300, 8), cloud(38, 700, 8)
    for metric in METRICS:
        value = metric(X, Y)
        assert json.loads(json.dumps(value.detail, allow_nan=False)) == value.detail
        assert value.detail["n"] == 300 and value.detail["n_reference"] == 700 and value.detail["floor"]["n"] == 300 and value.detail["low"] < value.value < value.detail["high"]
        assert metric(X[:1], Y).value is None and "takes two" in metric(X, Y[:1]).reason
        assert metric.name.endswith("@world") and metric.needs == ("reference",) and metric.kind == "set"
    assert (fvd(X, Y).detail["mode"], fvd(X, Y).detail["ddof"], fvd(X, Y).detail["resize"]) == ("tf", 1, "stretch")
    assert fvd(X, Y, mode="styleganv").detail["ddof"] == 0
    quick = fvd(X, Y, spread=False)
    assert quick.value == fvd(X, Y).value and quick.detail["low"] is None and quick.detail["floor"] is None


@pytest.mark.parametrize(("call", "says"), [
    (lambda X: frechet(X, X[:, :3]), "different backbones"), (lambda X: frechet(X[:1], X), "more than that"), (lambda X: frechet(X, X, ddof=2), "ddof is 1 or 0"),
    (lambda X: frechet(np.where(X > 1, np.nan, X), X), "not finite"), (lambda X: frechet(X[0], X), r"\(N, D\)"), (lambda X: frechet(X[:0], X), "none of them 0"),
    (lambda X: frechet(Moments.of(X), X, exact=True), "takes the features"), (lambda X: Moments.of(X).merge(Moments.of(X[:, :2])), "different backbones"),
    (lambda X: Moments.of(X[:1]).cov(), "at least 2"), (lambda X: kernel_distance(X[:1], X), "two of each"), (lambda X: kernel_distance(X, X[:, :2]), "same features"),
    (lambda X: jedi(X, X[:, :2]), "different backbones"), (lambda X: mmd(X, X, permutations=9), "at least 100"), (lambda X: mmd(X[:1], X), "two of each"),
    (lambda X: floor(X[:3], 2), "four clips"), (lambda X: kernel_subsets(X, X), "subsets of 1000"), (lambda X: fvd(X, X, mode="stylegan"), "nearest: styleganv"),
])
def test_what_can_not_be_compared_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(cloud(39, 20, 4))
