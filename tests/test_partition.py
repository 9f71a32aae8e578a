"""What `partition` answers, against cases small enough to enumerate and truths that are known."""
import itertools
import json

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment

from spike_ppl import partition as P


def all_partitions(n):
    "Every partition of n items as labels in order of first appearance (restricted growth strings)."
    rows = [[0]]
    for _ in range(n - 1): rows = [r + [k] for r in rows for k in range(max(r) + 2)]
    return np.array(rows)


def vi(a, b):
    "Variation of information in bits from its definition with joint probabilities."
    joint = np.array([[np.mean((a == i) & (b == j)) for j in np.unique(b)] for i in np.unique(a)])
    h = lambda p: -(p[p > 0] * np.log2(p[p > 0])).sum()
    return 2 * h(joint.ravel()) - h(joint.sum(0)) - h(joint.sum(1))


def binder(a, b):
    "Fraction of ordered pairs on which two partitions disagree."
    return np.mean((a[:, None] == a) != (b[:, None] == b))


def misassigned(a, b):
    "Share of spikes in the wrong unit under the best of all ways to match the units of two partitions, every way tried."
    m = max(a.max(), b.max()) + 1
    joint = np.array([[np.mean((a == i) & (b == j)) for j in range(m)] for i in range(m)])
    return 1 - max(sum(joint[i, j] for i, j in enumerate(way)) for way in itertools.permutations(range(m)))


def all_losses(loss, partitions, draws):
    "Distances between all partitions (p, n) and all draws (s, n), from joint tables: (p, s)."
    hot = lambda z: (z[:, :, None] == np.arange(z.max() + 1)).astype(float)
    joint = np.einsum("pia,sib->psab", hot(partitions), hot(draws)) / partitions.shape[1]
    if loss == "misassigned": return 1 - np.array([[t[linear_sum_assignment(t, maximize=True)].sum() for t in row] for row in joint])
    f = (lambda x: x * np.log2(np.where(x > 0, x, 1))) if loss == "vi" else np.square
    return f(joint.sum(3)).sum(2) + f(joint.sum(2)).sum(2) - 2 * f(joint).sum((2, 3))


def random_posterior(n, size, k, seed):
    "Draws of partitions that scatter around two different ones, named at random in every draw."
    rng = np.random.default_rng(seed)
    bases = rng.integers(0, k, (2, n))
    z = bases[rng.integers(0, 2, size)]
    noise = rng.random(z.shape) < .25
    z = np.where(noise, rng.integers(0, k, z.shape), z)
    return np.array([rng.permutation(k + 2)[row] for row in z])


def exact_posterior(x, n_units, alpha=1., prior_sd=3., sd=1.):
    "Partitions of the points x and their posterior probabilities in a Dirichlet-weighted Gaussian mixture, by enumeration."
    labels = np.array(list(itertools.product(range(n_units), repeat=len(x))))
    from math import lgamma
    def weight(z):
        total = lgamma(alpha * n_units) - lgamma(alpha * n_units + len(x))
        for k in range(n_units):
            xk = x[z == k]; m = len(xk)
            total += lgamma(alpha + m) - lgamma(alpha)
            if m:
                cov = sd**2 * np.eye(m) + prior_sd**2
                total += -.5 * (xk @ np.linalg.solve(cov, xk) + np.linalg.slogdet(2 * np.pi * cov)[1])
        return total
    logw = np.array([weight(z) for z in labels])
    p = np.exp(logw - logw.max())
    return labels, p / p.sum()


def as_fit(assignments, weights=None, means=None, **extra):
    "A fit in the form of the data contract, from assignments (chain, draw, spike)."
    c, d, n = assignments.shape
    k = int(assignments.max()) + 1 if weights is None else weights.shape[-1]
    if weights is None: weights = np.full((c, d, k), 1 / k)
    data = {"pi_": (("chain", "draw", "component"), weights), "z_": (("chain", "draw", "spike"), assignments)}
    if means is not None: data["mu_"] = (("chain", "draw", "component", "feature"), means)
    posterior = xr.Dataset(data | extra, coords=dict(chain=range(c), draw=range(d), component=range(k)))
    tree = xr.DataTree.from_dict(dict(posterior=posterior))
    tree.attrs["roles"] = json.dumps(dict(assignments="z_", weights="pi_", observed="y_", outlier_unit=None))
    return tree


# ---------------------------------------------------------------- distances

@pytest.mark.parametrize("n", [1, 2, 5])
def test_distances_are_the_definitions(n):
    rows = all_partitions(n)
    for a, b in itertools.product(rows, rows):
        assert P.partition_distance(a, b) == pytest.approx(vi(a, b), abs=1e-12)
        assert P.partition_distance(a, b, "misassigned") == pytest.approx(misassigned(a, b), abs=1e-12)
        assert P.partition_distance(a, b, "binder") == pytest.approx(binder(a, b), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_losses_are_metrics(seed):
    a, b, c = np.random.default_rng(seed).integers(0, 4, (3, 12))
    for loss in ("misassigned", "vi", "binder"):
        d = lambda x, y: P.partition_distance(x, y, loss)
        assert d(a, a) == pytest.approx(0, abs=1e-12) and d(a, b) == pytest.approx(d(b, a))
        assert d(a, c) <= d(a, b) + d(b, c) + 1e-12


# ---------------------------------------------------------------- point estimate

@pytest.mark.parametrize("loss", ["misassigned", "vi", "binder"])
@pytest.mark.parametrize("seed", range(12))
def test_point_partition_is_the_best_of_all_partitions(loss, seed):
    n = 6 + seed % 2
    z = random_posterior(n, 60, 2 + seed % 3, seed)
    losses = all_losses(loss, all_partitions(n), z).mean(1)
    found = P.point_partition(z, loss=loss, seed=seed)
    assert all_losses(loss, found.values[None], z).mean() == pytest.approx(losses.min(), abs=1e-10)
    assert found.attrs["expected_loss"] == pytest.approx(losses.min(), abs=1e-10)


def test_point_partition_recovers_what_every_draw_hides():
    "Each draw misplaces some spikes of its own; their average misplaces none."
    rng = np.random.default_rng(0)
    truth = np.sort(rng.integers(0, 5, 400))
    z = np.where(rng.random((200, 400)) < .2, rng.integers(0, 5, (200, 400)), truth)
    for loss in ("vi", "misassigned"): assert P.partition_distance(P.point_partition(z, loss).values, truth) == pytest.approx(0)
    assert min(P.partition_distance(row, truth) for row in z) > 1


def test_units_that_are_surely_two_are_not_joined_however_many_spikes_they_share():
    "Every draw has two units of 60, and cannot tell 80 of the 120 spikes apart."
    rng = np.random.default_rng(0)
    z = np.repeat([[0] * 20 + [1] * 20], 100, 0)
    z = np.concatenate([z, rng.integers(0, 2, (100, 80))], 1)
    best = P.point_partition(z, "misassigned").values
    assert len(np.unique(best)) == 2 and len(np.unique(best[:20])) == len(np.unique(best[20:40])) == 1 and best[0] != best[20]
    assert len(np.unique(P.point_partition(z, "vi"))) == 1
    single = P.point_partition(np.where(rng.random((100, 1)) < .4, z, 0), "misassigned")
    assert len(np.unique(single)) == 1


def test_the_share_of_misassigned_spikes_is_what_certainty_says():
    for seed in range(5):
        z = random_posterior(30, 40, 4, seed)
        z[:, ::7] = np.where(z[:, ::7] == 2, -1, z[:, ::7])
        for loss in ("vi", "misassigned"):
            sure = P.certainty(z, loss=loss)
            np.testing.assert_array_equal(sure.unit, P.point_partition(z, loss))
            assert P.expected_loss(z, sure.unit.values, "misassigned") == pytest.approx(1 - sure.probability.mean().item())


def test_point_partition_handles_edges():
    assert P.point_partition(np.zeros((3, 1), int)).values.tolist() == [0]
    assert P.point_partition(np.zeros((3, 5), int)).values.tolist() == [0] * 5
    assert P.point_partition(np.tile(np.arange(5), (3, 1))).values.tolist() == [0, 1, 2, 3, 4]
    assert P.point_partition(np.full((3, 4), -1)).values.tolist() == [-1] * 4
    assert P.point_partition(np.array([[0, 0, -1, -1, 5]] * 4)).values.tolist() == [0, 0, -1, -1, 1]
    assert P.point_partition(np.array([[10**12, 5, 10**12]] * 2)).values.tolist() == [0, 1, 0]


def test_units_are_consecutive_and_ordered_by_size():
    best = P.point_partition(random_posterior(60, 50, 4, 1)).values
    size = np.bincount(best)
    assert (size > 0).all() and (np.diff(size) <= 0).all()


def test_same_seed_same_partition():
    z = random_posterior(80, 50, 5, 2)
    np.testing.assert_array_equal(P.point_partition(z, seed=4), P.point_partition(z, seed=4))


# ---------------------------------------------------------------- names do not matter

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_answers_do_not_depend_on_names(seed):
    rng = np.random.default_rng(seed)
    z = random_posterior(15, 30, 3, seed)
    other = np.array([rng.permutation(9)[row] for row in z])
    xr.testing.assert_identical(P.n_units(z), P.n_units(other))
    xr.testing.assert_identical(P.coclustering(z), P.coclustering(other))
    xr.testing.assert_identical(P.point_partition(z), P.point_partition(other))
    xr.testing.assert_identical(P.certainty(z), P.certainty(other))
    xr.testing.assert_identical(P.credible_partitions(z), P.credible_partitions(other))


# ---------------------------------------------------------------- exact small posteriors

def test_coclustering_and_n_units_of_an_enumerated_posterior():
    x = np.array([-4., -3.5, -.3, .4, 3., 4.2])
    labels, p = exact_posterior(x, 3)
    draws = labels[np.random.default_rng(0).choice(len(p), 20_000, p=p)]
    exact = np.einsum("s,sij->ij", p, labels[:, :, None] == labels[:, None, :])
    np.testing.assert_allclose(P.coclustering(draws), exact, atol=.012)
    units = np.array([len(set(z)) for z in labels])
    pmf = P.n_units(draws)
    for k in pmf.n_units.values: assert pmf.sel(n_units=k).item() == pytest.approx(p[units == k].sum(), abs=.012)
    for loss in ("vi", "misassigned"):
        exact_loss = all_losses(loss, all_partitions(6), labels) @ p
        found = P.point_partition(draws, loss)
        assert (all_losses(loss, found.values[None], labels) @ p)[0] == pytest.approx(exact_loss.min(), abs=.01)


def test_coclustering_of_subsets_and_its_limits():
    z = random_posterior(40, 30, 4, 0)
    whole = P.coclustering(z).values
    np.testing.assert_allclose(whole, (z[:, :, None] == z[:, None]).mean(0))
    index = np.array([7, 3, 3, 39])
    np.testing.assert_allclose(P.coclustering(z, index), whole[np.ix_(index, index)])
    mask = np.zeros(40, bool); mask[[3, 7]] = True
    np.testing.assert_allclose(P.coclustering(z, mask), whole[np.ix_([3, 7], [3, 7])])
    assert P.coclustering(z, 10, seed=1).shape == (10, 10)
    with pytest.raises(ValueError, match="spikes=2000"): P.coclustering(z, max_bytes=100)
    with pytest.raises(IndexError, match="40 spikes"): P.coclustering(z, [40])


def test_spikes_of_no_unit_share_none():
    z = np.array([[-1, -1, 0, 0]] * 3 + [[0, -1, 1, 1]])
    pi = P.coclustering(z).values
    assert pi[0, 1] == 0 and pi[2, 3] == 1 and (np.diag(pi) == 1).all()
    assert P.n_units(z).to_series().to_dict() == {1: .75, 2: .25}


def test_min_size_leaves_small_units_out():
    z = np.array([[0, 0, 0, 1], [0, 0, 1, 1]])
    assert P.n_units(z).to_series().to_dict() == {2: 1.}
    assert P.n_units(z, min_size=2).to_series().to_dict() == {1: .5, 2: .5}


# ---------------------------------------------------------------- probabilities instead of draws

def vb_fit(r, outlier=None):
    k = r.shape[1]
    posterior = xr.Dataset(dict(weights=(("chain", "draw", "unit"), np.tile(r.mean(0), (1, 5, 1)))), coords=dict(chain=[0], draw=range(5), unit=range(k)))
    tree = xr.DataTree.from_dict(dict(posterior=posterior, unit_probability=xr.Dataset(dict(unit_probability=(("spike", "unit"), r)))))
    tree.attrs["roles"] = json.dumps(dict(assignments="assignments", weights="weights", observed="features", outlier_unit=outlier))
    return tree


def test_vb_is_exact_where_it_can_be():
    rng = np.random.default_rng(0)
    r = rng.dirichlet(np.full(3, .05), 40)
    fit = vb_fit(r)
    pi = P.coclustering(fit).values
    expected = r @ r.T; np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(pi, expected)
    draws = P.assignment_draws(fit, 4000).values
    np.testing.assert_allclose(np.stack([(draws == k).mean(0) for k in range(3)], 1), r, atol=.04)
    sure = P.certainty(fit)
    own = np.array([r[i].max() for i in range(40)])
    assert (sure.probability.values <= own + 1e-12).all() and (sure.probability.values == own).mean() > .8
    np.testing.assert_allclose(np.sort(P.relabel(fit)["unit_probability"]["unit_probability"].sum("spike"))[::-1],
                               P.relabel(fit)["unit_probability"]["unit_probability"].sum("spike"))


def test_outlier_unit_is_minus_one():
    r = np.zeros((30, 3)); r[:10, 0] = 1; r[10:25, 1] = 1; r[25:, 2] = .9; r[25:, 0] = .1
    fit = vb_fit(r, outlier=2)
    sure = P.certainty(fit)
    assert sure.unit.values.tolist() == [1] * 10 + [0] * 15 + [-1] * 5
    np.testing.assert_allclose(sure.probability[25:], .9)
    np.testing.assert_allclose(sure.outlier_probability[25:], .9)
    assert sure.sizes["unit"] == 2
    z = np.array([[0] * 10 + [1] * 15 + [2] * 5] * 6)[None]
    tree = as_fit(z); tree.attrs["roles"] = json.dumps(dict(assignments="z_", weights="pi_", observed="y_", outlier_unit=0))
    assert P.point_partition(tree).values.tolist() == [-1] * 10 + [0] * 15 + [1] * 5
    named = P.relabel(tree)
    assert P.roles(named)["outlier_unit"] == 2
    assert named["posterior"]["z_"].values[0, 0].tolist() == [2] * 10 + [0] * 15 + [1] * 5
    assert P.point_partition(named).values.tolist() == P.point_partition(tree).values.tolist()


def test_outlier_unit_outside_the_weights():
    "The outlier component may have no place among the weights: assignments then have one value more."
    rng = np.random.default_rng(0)
    base = np.array([0] * 10 + [1] * 15 + [2] * 5)
    z = np.array([np.r_[rng.permutation(2), 2][base] for _ in range(12)]).reshape(2, 6, 30)
    means = np.where(z[..., :1, None] == 0, np.array([[5.], [9.]]), np.array([[9.], [5.]]))
    tree = as_fit(z, np.full((2, 6, 2), .5), means)
    tree.attrs["roles"] = json.dumps(dict(assignments="z_", weights="pi_", observed="y_", outlier_unit=2))
    named = P.relabel(tree)
    assert (named["posterior"]["z_"].values == np.array([1] * 10 + [0] * 15 + [2] * 5)).all()
    np.testing.assert_array_equal(named["posterior"]["mu_"].values, np.broadcast_to([[9.], [5.]], (2, 6, 2, 1)))
    assert named["sample_stats"]["unit_size"].values[0, 0].tolist() == [15, 10] and named["sample_stats"]["outlier_size"].values[0, 0] == 5
    assert P.roles(named)["outlier_unit"] == 2
    assert P.certainty(tree).unit.values.tolist() == [1] * 10 + [0] * 15 + [-1] * 5
    soft = vb_fit(np.eye(3)[base], outlier=2)
    soft["posterior"] = xr.DataTree(soft["posterior"].to_dataset().isel(unit=slice(2)))
    named = P.relabel(soft)
    assert named["unit_probability"]["unit_probability"].values.argmax(1).tolist() == [1] * 10 + [0] * 15 + [2] * 5


# ---------------------------------------------------------------- certainty

def test_certainty_of_a_posterior_that_can_be_counted_by_hand():
    a, b = [0] * 6 + [1] * 4, [0] * 10
    z = np.array([a] * 60 + [b] * 20 + [[0] * 5 + [1] * 5] * 20)
    sure = P.certainty(z)
    assert sure.unit.values.tolist() == a
    assert sure.probability.values.tolist() == pytest.approx([1.] * 5 + [.8] + [.8] * 4)
    assert sure.existence.values.tolist() == pytest.approx([1., .8])
    assert sure.merge_probability.values.tolist() == pytest.approx([.2, .2])
    assert sure.confusable_with.values.tolist() == [1, 0]
    assert sure.false_positive.values.tolist() == pytest.approx([.2 / 6, .2])
    assert sure.false_negative.values.tolist() == pytest.approx([.8 / 6.6, .2 / 3.4])
    share = (.2 * 24 + .2 * 4) / 24
    assert sure.shared.values[0, 1] == pytest.approx(share)
    assert sure.second.values.tolist() == [-1] * 5 + [1] + [0] * 4
    assert sure.entropy.values[5] == pytest.approx(-(.8 * np.log2(.8) + .2 * np.log2(.2)))


def test_split_probability():
    z = np.array([[0] * 8] * 7 + [[0] * 4 + [1] * 4] * 3)
    assert P.certainty(z).split_probability.values.tolist() == pytest.approx([.3])


def test_certainty_of_a_given_partition():
    z = np.array([[0, 0, 1, 1]] * 3 + [[0, 0, 0, 1]])
    sure = P.certainty(z, partition=[0, 0, 1, 1])
    assert sure.probability.values.tolist() == pytest.approx([1, 1, .75, 1])
    with pytest.raises(ValueError, match="without gaps"): P.certainty(z, partition=[0, 0, 2, 2])
    with pytest.raises(ValueError, match="expected \\(4,\\)"): P.certainty(z, partition=[0, 0])


def test_probability_is_calibrated_under_the_true_posterior():
    "Draws of the truth and of the posterior come from one distribution: spikes called p sure are right a fraction p of the time."
    rng = np.random.default_rng(0)
    said, right = [], []
    for _ in range(150):
        base = np.repeat([0, 1, 2], [12, 9, 7])
        flip = np.where(rng.random(28) < .4, rng.uniform(0, .5, 28), 0)
        other = rng.integers(0, 3, 28)
        draw = lambda size: np.where(rng.random((size, 28)) < flip, other, base)
        truth, z = draw(1)[0], draw(300)
        sure = P.certainty(z)
        said.append(sure.probability.values)
        right.append(_matched(truth, sure.unit.values))
    said, right = np.concatenate(said), np.concatenate(right)
    edges = np.linspace(0, 1, 11)
    where = np.digitize(said, edges[1:-1])
    for k in range(10):
        if (where == k).sum() > 100: assert said[where == k].mean() == pytest.approx(right[where == k].mean(), abs=.06)


def _matched(truth, unit):
    from scipy.optimize import linear_sum_assignment
    table = np.array([[np.sum((truth == t) & (unit == u)) for u in range(unit.max() + 1)] for t in range(3)])
    rows, cols = linear_sum_assignment(table, maximize=True)
    name = dict(zip(rows, cols))
    return np.array([name.get(t, -2) for t in truth]) == unit


# ---------------------------------------------------------------- relabelling

def switching_fit(chains=2, draws=40, n=60, seed=0, unused=1):
    "Draws of four units whose names are shuffled in every draw; the sizes, means and weights go along. And the truth."
    rng = np.random.default_rng(seed)
    truth = np.sort(np.r_[np.zeros(24), np.ones(18), np.full(12, 2), np.full(6, 3)].astype(int))[:n]
    k = 4 + unused
    z = np.broadcast_to(truth, (chains, draws, n)).copy()
    noise = rng.random(z.shape) < .05
    z[noise] = rng.integers(0, 4, noise.sum())
    means = np.broadcast_to(np.arange(k)[:, None] * 10. + np.arange(2), (chains, draws, k, 2)) + rng.normal(0, .1, (chains, draws, k, 2))
    weights = rng.dirichlet(np.arange(k, 0, -1) * 50, (chains, draws))
    out_z, out_m, out_w = z.copy(), means.copy(), weights.copy()
    for c, d in itertools.product(range(chains), range(draws)):
        name = rng.permutation(k)
        out_z[c, d] = name[z[c, d]]
        out_m[c, d, name], out_w[c, d, name] = means[c, d], weights[c, d]
    return as_fit(out_z, out_w, out_m), z, means, weights, truth


def test_relabel_undoes_switching():
    fit, z, means, weights, truth = switching_fit()
    named = P.relabel(fit)
    post = named["posterior"]
    np.testing.assert_array_equal(post["z_"], z)
    np.testing.assert_allclose(post["mu_"].values, means)
    np.testing.assert_allclose(post["pi_"].values, weights)
    np.testing.assert_array_equal(named["sample_stats"]["unit_size"].values[..., :4], np.stack([(z == k).sum(-1) for k in range(4)], -1))
    np.testing.assert_array_equal(fit["posterior"]["z_"].values[0, 0] == fit["posterior"]["z_"].values[0, 0, 0], z[0, 0] == z[0, 0, 0])
    blocked = P.relabel(fit, cells=200)
    xr.testing.assert_identical(blocked["posterior"].to_dataset(), post.to_dataset())


def test_relabel_with_draws_that_differ_in_their_number_of_units():
    rng = np.random.default_rng(0)
    base = np.repeat([0, 1, 2], [24, 15, 6])
    rows = []
    for s in range(60):
        z = base.copy()
        if s % 3 == 0: z[z == 2] = 1                    # two units
        if s % 3 == 1: z[:6] = 3                        # four units
        rows.append(rng.permutation(5)[z])
    weights = np.full((2, 30, 5), .2)
    named = P.relabel(as_fit(np.array(rows).reshape(2, 30, 45), weights))["posterior"]["z_"].values.reshape(60, 45)
    assert (named[:, 6:24] == 0).all() and (named[:, 24:39] == 1).all()
    for s in range(60):
        assert set(named[s, 39:]) == ({1} if s % 3 == 0 else {2})
        assert set(named[s, :6]) == ({3} if s % 3 == 1 else {0})


def test_sticks_follow_the_weights():
    fit, z, means, weights, truth = switching_fit()
    w = fit["posterior"]["pi_"].values
    left = 1 - np.cumsum(w, -1) + w
    sticks = w[..., :-1] / left[..., :-1]
    post = fit["posterior"].to_dataset().assign(v_=(("chain", "draw", "stick"), sticks))
    fit["posterior"] = xr.DataTree(post)
    named = P.relabel(fit)["posterior"]
    np.testing.assert_allclose(P._break_sticks(named["v_"].values), named["pi_"].values, atol=1e-10)


def test_default_dims_are_understood():
    "A model without dims names them after its variables."
    fit, z, means, *_ = switching_fit()
    post = fit["posterior"].to_dataset().drop_vars("component").rename(component="pi__dim_0")
    post["mu_"] = post["mu_"].rename({"pi__dim_0": "mu__dim_0", "feature": "mu__dim_1"})
    post["z_"] = post["z_"].rename(spike="z__dim_0")
    fit["posterior"] = xr.DataTree(post)
    named = P.relabel(fit)
    np.testing.assert_allclose(named["posterior"]["mu_"].values, means)
    assert P.n_units(fit).sum() == 1


def test_square_variables_are_permuted_along_units_only():
    "As many units as features: only the units' axis moves."
    rng = np.random.default_rng(0)
    z = np.array([rng.permutation(2)[np.repeat([0, 1], [6, 4])] for _ in range(10)])
    cov = np.stack([np.where(z[s, 0] == 0, np.arange(8.).reshape(2, 2, 2), np.arange(8.).reshape(2, 2, 2)[::-1]) for s in range(10)])
    fit = as_fit(z[None], np.full((1, 10, 2), .5), S_=(("chain", "draw", "component", "feature", "feature_bis"), cov[None]))
    named = P.relabel(fit)["posterior"]["S_"].values
    np.testing.assert_array_equal(named, np.broadcast_to(np.arange(8.).reshape(2, 2, 2), named.shape))


# ---------------------------------------------------------------- spread

def test_credible_ball():
    z = np.array([[0] * 10] * 10 + [[0] * 5 + [1] * 5] * 75 + [[0] * 5 + [1] * 3 + [2] * 2] * 15)
    ball = P.credible_partitions(z, level=.95)
    assert ball.partition.sel(bound="point").values.tolist() == [0] * 5 + [1] * 5
    assert ball.attrs["radius"] == pytest.approx(1.)
    assert P.credible_partitions(z, level=.95, loss="misassigned").attrs["radius"] == pytest.approx(.5)
    assert ball.n_units.values.tolist() == [2, 1, 1, 3]
    tight = P.credible_partitions(z, level=.7)
    assert tight.attrs["radius"] == 0 and tight.n_units.values.tolist() == [2, 2, 2, 2]


# ---------------------------------------------------------------- large

def test_twenty_thousand_spikes_in_bounded_memory():
    import tracemalloc
    rng = np.random.default_rng(0)
    n, k, S = 20_000, 12, 300
    truth = rng.integers(0, k, n)
    unsure = rng.random(n) < .15
    z = np.where((rng.random((S, n)) < .4) & unsure, (truth + 1) % k, truth).astype(np.int8)
    P.point_partition(z[:20, :200]); P.certainty(z[:20, :200])
    tracemalloc.start()
    sure = P.certainty(z)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 400e6
    assert P.partition_distance(sure.unit.values, truth) < .01


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize("call, error, text", [
    (lambda: P.n_units(np.zeros((2, 3))), TypeError, "integers"),
    (lambda: P.n_units(np.zeros((3,), int)), ValueError, "expected \\(draw, spike\\)"),
    (lambda: P.n_units(np.full((2, 3), -2)), ValueError, "-1 means no unit"),
    (lambda: P.n_units(np.zeros((2, 3), int), min_size=0), ValueError, "min_size=0"),
    (lambda: P.point_partition(np.zeros((2, 3), int), loss="rand"), ValueError, "misassigned"),
    (lambda: P.relabel(np.zeros((2, 3), int)), TypeError, "inference.fit"),
    (lambda: P.n_units(xr.DataTree()), ValueError, "roles"),
    (lambda: P.credible_partitions(np.zeros((2, 3), int), level=0), ValueError, "level=0"),
])
def test_errors_say_what_to_do(call, error, text):
    with pytest.raises(error, match=text): call()
