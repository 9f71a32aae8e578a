"""Criticism against cases where the answer is known: models that are right, models that are wrong in one way, and truths."""
import json
import warnings

import numpy as np
import pytest
import xarray as xr
from scipy.special import logsumexp
from scipy.stats import norm

from spike_ppl import criticism as C, partition, predictive
from spike_ppl.models import dpmm, gmm, toy
from spike_ppl.partition import certainty, n_units, point_partition


def gaussian_fit(x, labels, k, draws=60, chains=2, seed=0, variances=None, noise=.02):
    "A fit of `gmm(x, k)` made by hand around given labels: parameters near their estimates, assignments drawn given them."
    rng = np.random.default_rng(seed)
    d = x.shape[1]
    present = [u for u in range(k) if (labels == u).sum() > 1]
    mean, var = np.tile(x.mean(0), (k, 1)), np.tile(x.var(0), (k, 1))
    for u in present: mean[u], var[u] = x[labels == u].mean(0), x[labels == u].var(0)
    if variances is not None: var = np.broadcast_to(variances, var.shape)
    weights = np.maximum(np.bincount(labels, minlength=k), .5) / len(x)
    M = mean + noise * rng.normal(size=(chains, draws, k, d)) * np.sqrt(var)
    V = var * np.exp(noise * rng.normal(size=(chains, draws, k, d)))
    W = rng.dirichlet(weights * len(x) * 5 + .1, (chains, draws))
    logits = np.log(W)[..., None, :] + norm.logpdf(x[:, None], M[:, :, None], np.sqrt(V)[:, :, None]).sum(-1)
    Z = (logits + rng.gumbel(size=logits.shape)).argmax(-1).astype("int16")
    lp = np.take_along_axis(logits, Z[..., None].astype(int), -1).sum((-1, -2))
    names = [f"f{i}" for i in range(d)]
    tree = xr.DataTree.from_dict(dict(
        posterior=xr.Dataset(dict(weights=(("chain", "draw", "unit"), W), means=(("chain", "draw", "unit", "feature"), M), variances=(("chain", "draw", "unit", "feature"), V),
                                  assignments=(("chain", "draw", "spike"), Z)), coords=dict(chain=range(chains), draw=range(draws), unit=range(k), feature=names, spike=range(len(x)))),
        sample_stats=xr.Dataset(dict(lp=(("chain", "draw"), lp))), observed_data=xr.Dataset(dict(features=(("spike", "feature"), x)), coords=dict(feature=names))))
    tree.attrs = dict(model="gmm", model_args=json.dumps(dict(n_units=k, covariance="diagonal")), model_priors="{}", method="gibbs", seed=seed,
                      roles=json.dumps(dict(assignments="assignments", weights="weights", observed="features", outlier_unit=None)))
    return tree, logits


@pytest.fixture(scope="module")
def data():
    x, truth = toy(n=300, n_units=3, n_features=3, seed=4)
    return x.values, truth


@pytest.fixture(scope="module")
def good(data): return gaussian_fit(*data, 3)[0]


@pytest.fixture(scope="module")
def too_few(data):
    x, truth = data
    return gaussian_fit(x, np.minimum(truth, 1), 2)[0]


# ---------------------------------------------------------------- convergence

def test_chains_that_agree_converge(good):
    found = C.convergence(good)
    assert found.converged and "2 chains agree" in found.verdict
    assert {"log joint", "units", "entropy of the partition [bits]"} <= set(found.table.index)
    assert "Converged" in repr(found) and "<table" in found._repr_html_()


def test_label_switching_is_no_failure(good):
    "The same draws under other names: identical diagnostics of everything label-free, and of the parameters after relabelling."
    rng = np.random.default_rng(0)
    post = good["posterior"].to_dataset().copy(deep=True)
    for c in range(2):
        for d in range(post.sizes["draw"]):
            name = rng.permutation(3)
            for v in ("weights", "means", "variances"): post[v].values[c, d] = post[v].values[c, d][np.argsort(name)]
            post["assignments"].values[c, d] = name[post["assignments"].values[c, d]]
    switched = partition.with_groups(good, posterior=post)
    import arviz as az
    assert float(az.rhat(post["means"].values[..., 0, 0])) > 1.5 or post["means"].values[..., 0, 0].std() > 1
    a, b = C.convergence(good), C.convergence(switched)
    assert b.converged
    np.testing.assert_allclose(a.table["rhat"], b.table["rhat"])


def test_a_stuck_chain_is_named(good, too_few):
    joined = C.join_chains(good, too_few)
    assert joined["posterior"].sizes["chain"] == 4
    found = C.convergence(joined)
    assert not found.converged and "stuck" in found.verdict and "chain 2" in found.verdict and "chain 3" in found.verdict and "chain 0 (" not in found.verdict
    page = C.verdict(joined, draws=0, figures=False)
    assert page.grade == "do not trust" and "not converged" in page.headline and "stuck" in page.text


def test_chains_in_different_partitions_of_like_probability(data):
    x, truth = data
    a, b = gaussian_fit(x, truth, 3)[0], gaussian_fit(x, np.minimum(truth, 1), 3)[0]
    joined = C.join_chains(a, b)
    joined["sample_stats"] = xr.DataTree(xr.Dataset(dict(lp=joined["sample_stats"]["lp"] * 0 + np.random.default_rng(0).normal(size=(4, 60)))))
    found = C.convergence(joined)
    assert not found.converged and "disagree" in found.verdict


def test_too_few_draws_are_said(data):
    found = C.convergence(gaussian_fit(*data, 3, draws=3)[0])
    assert not found.converged and ("too few" in found.verdict or "effective draws" in found.verdict)


def vb_of(fit, elbo):
    "A variational fit by hand with this path."
    z = fit["posterior"]["assignments"].values.reshape(-1, fit["posterior"].sizes["spike"])
    r = np.stack([(z == k).mean(0) for k in range(fit["posterior"].sizes["unit"])], 1)
    tree = xr.DataTree.from_dict(dict(posterior=fit["posterior"].to_dataset().isel(chain=[0]).drop_vars("assignments"), observed_data=fit["observed_data"].to_dataset(),
                                      unit_probability=xr.Dataset(dict(unit_probability=(("spike", "unit"), r))), optimisation=xr.Dataset(dict(elbo=("iteration", np.asarray(elbo, float))))))
    tree.attrs = dict(fit.attrs) | dict(method="vb")
    return tree


@pytest.mark.parametrize("elbo, ok, words", [([-900, -800, -799.99999, -799.999989], True, "Converged"), ([-900, -850], False, "still rose"),
                                            ([-900, -800, -810, -809.9999], False, "fell by 10"), ([-900, np.nan], False, "not finite")])
def test_vb_is_judged_by_its_elbo(good, elbo, ok, words):
    found = C.convergence(vb_of(good, elbo))
    assert found.converged == ok and words in found.verdict


# ---------------------------------------------------------------- predictive checks

def test_p_values_are_uniform_for_a_model_that_is_right():
    "Data drawn from the model with the parameters of the posterior: p-values of continuous statistics are spread over (0, 1)."
    p = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, 200)
        x = np.array([[-3., 0], [3, 1]])[labels] + rng.normal(size=(200, 2))
        fit = gaussian_fit(x, labels, 2, noise=0., seed=seed)[0]
        truth = fit["posterior"].to_dataset()
        truth["means"].values[:] = np.array([[-3., 0], [3, 1]]); truth["variances"].values[:] = 1.; truth["weights"].values[:] = .5
        fit = partition.with_groups(fit, posterior=truth)
        for stat in ("mean", "max", "min"): p += C.ppc(fit, stat, draws=60, seed=seed, per_unit=False).p_value.values.tolist()
    p = np.array(p)
    assert abs(p.mean() - .5) < .12 and .2 < p.std() < .38 and (p < .02).mean() < .1 and (p > .98).mean() < .1


@pytest.mark.parametrize("statistic, spoil", [
    ("max", lambda x, t, rng: np.where(rng.random((len(x), 1)) < .02, x + 25, x)),
    ("kurtosis", lambda x, t, rng: x + np.where(rng.random(x.shape) < .04, 8 * rng.normal(size=x.shape), 0)),
    ("tails", lambda x, t, rng: x + np.where(rng.random(x.shape) < .04, 8 * rng.normal(size=x.shape), 0)),
    ("covariance", lambda x, t, rng: np.c_[x[:, 0], x[:, 1] + 1.5 * (x[:, 0] - np.array([x[t == u, 0].mean() for u in range(3)])[t]), x[:, 2]]),
    ("outliers", lambda x, t, rng: np.where(rng.random((len(x), 1)) < .05, rng.uniform(-30, 30, x.shape), x)),
    ("nearest", lambda x, t, rng: np.where(rng.random((len(x), 1)) < .08, rng.uniform(-30, 30, x.shape), x)),
])
def test_each_statistic_catches_what_it_is_for(data, statistic, spoil):
    x, truth = data
    rng = np.random.default_rng(0)
    def off(x):
        var = np.tile(np.array([np.square(np.median(np.abs(x[truth == u] - np.median(x[truth == u], 0)), 0) / .6745) for u in range(3)]), 1)
        found = C.ppc(gaussian_fit(x, truth, 3, variances=var)[0], statistic, draws=50)
        return float(np.nanmax(predictive.absolute_z(found.z))), found
    fine, _ = off(x)
    bad, found = off(spoil(x.copy(), truth, rng))
    assert fine < 4 < bad, (fine, bad)
    assert {"p_value", "unit_p_value", "observed", "replicated", "unit_observed", "unit_replicated"} <= set(found.data_vars)


def test_too_few_units_show_in_bimodality_not_in_the_mean(too_few, good):
    assert C.ppc(too_few, "bimodality", draws=50).p_value < .02 < C.ppc(good, "bimodality", draws=50).p_value
    assert (np.abs(C.ppc(too_few, "mean", draws=50).z) < 4).all()
    per = C.ppc(too_few, "bimodality", draws=50)
    assert (per.unit_p_value.values < .02).sum() == 1 and per.sizes["unit"] == 2


def test_amplitude_has_channels(data):
    x, truth = data
    fit = gaussian_fit(x, truth, 3)[0]
    ds = fit["observed_data"].to_dataset().assign_coords(channel=("feature", ["a", "a", "b"]))
    found = C.ppc(partition.with_groups(fit, observed_data=ds), "amplitude", draws=20)
    assert found.observed.sel(channel="b", quantile=.5).values[0] == pytest.approx(np.median(np.abs(x[:, 2])))


def test_any_function_is_a_statistic(good, data):
    x, _ = data
    def spread(features): return np.ptp(features[:, 0])
    found = C.ppc(good, spread, draws=20)
    assert found.attrs["statistic"] == "spread" and found.p_value.shape == () and found.observed.values[0] == pytest.approx(np.ptp(x[:, 0]))
    def largest(features, labels): return np.bincount(labels).max()
    assert C.ppc(good, largest, draws=20, per_unit=False).replicated.std() > 0
    assert C.ppc(good, lambda f: f[:5], draws=5, per_unit=False).observed.shape == (5, 5, 3)
    with pytest.raises(ValueError, match="kurtosis"): C.ppc(good, "median absolute nonsense")
    with pytest.raises(TypeError, match="function"): C.ppc(good, 3)


def test_replicates_draw_new_assignments_from_the_weights(good):
    made = C.posterior_predictive(good, draws=30)["posterior_predictive"]
    assert made["features"].dims == ("chain", "draw", "spike", "feature")
    z = made["assignments"].values[0]
    assert (z != z[0]).any(1).sum() >= 29 and (z[:, 0] != z[0, 0]).any()
    share = np.bincount(z.ravel(), minlength=3) / z.size
    np.testing.assert_allclose(share, good["posterior"]["weights"].mean(("chain", "draw")), atol=.03)
    x = made["features"].values[0]
    means = good["posterior"]["means"].mean(("chain", "draw")).values
    for u in range(3): np.testing.assert_allclose(x[z == u].mean(0), means[u], atol=.1)


def test_replicates_are_the_same_for_a_seed_and_budgeted(good):
    a, b, c = (C.posterior_predictive(good, draws=3, seed=s)["posterior_predictive"]["features"].values for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    with pytest.raises(ValueError, match="max_bytes"): C.posterior_predictive(good, draws=50, max_bytes=1e3)


def test_a_foreign_model_is_asked_for(good):
    other = partition.with_groups(good); other.attrs["model"] = "mine"
    with pytest.raises(ValueError, match="model=..."): C.ppc(other, "mean")
    x = good["observed_data"]["features"].values
    xr.testing.assert_allclose(C.ppc(other, "mean", draws=5, model=gmm(x, 3)).observed, C.ppc(good, "mean", draws=5).observed)
    page = C.verdict(other, draws=5, figures=False, model=gmm(x, 3))
    assert page.grade in ("trust", "with care")


def test_prior_check(data):
    x, _ = data
    assert C.prior_check(gmm(x, 3), draws=100).attrs["ok"] and C.prior_check(dpmm(x, 6), draws=100).attrs["ok"]
    found = C.prior_check(gmm(x, 3, priors=dict(mean=1000., mean_sd=.1)), draws=50)
    assert not found.attrs["ok"] and "f0" in found.attrs["verdict"]


# ---------------------------------------------------------------- likelihood

def test_log_likelihood_is_marginal_over_units(data):
    fit, logits = gaussian_fit(*data, 3)
    ll = C.log_likelihood(fit)["log_likelihood"]["features"]
    assert ll.dims == ("chain", "draw", "spike")
    np.testing.assert_allclose(ll.values, logsumexp(logits, axis=-1), rtol=1e-9, atol=1e-8)
    few = C.log_likelihood(fit, draws=10)["log_likelihood"]["features"]
    assert few.sizes["draw"] == 5 and few.sizes["chain"] == 2
    np.testing.assert_allclose(few.values, ll.sel(draw=few.draw).values)
    assert C.log_likelihood(fit, max_bytes=8 * 300 * 8)["log_likelihood"].sizes["draw"] == 4


def test_mean_squared_error_is_its_definition(good, data):
    x, _ = data
    post = good["posterior"]
    chain, draw = partition.draw_positions(good, 100)
    expected = np.mean([np.mean((x - post["means"].values[c, d][post["assignments"].values[c, d]])**2) for c, d in zip(chain, draw)])
    assert C.mean_squared_error(good) == pytest.approx(expected)


def test_loo_agrees_with_refitting_by_hand(data):
    "Leaving a spike out changes a posterior this tight very little: LOO is just below the in-sample density, and ranks models rightly."
    x, truth = data
    fit, logits = gaussian_fit(x, truth, 3)
    elpd = C.loo(fit)
    inside = (logsumexp(logsumexp(logits, axis=-1).reshape(-1, len(x)), axis=0) - np.log(120)).sum()
    assert inside - 30 < elpd.elpd < inside and elpd.elpd_i.shape == (len(x),)


def test_pareto_trouble_is_told_with_what_to_do(data):
    x, truth = data
    x = x.copy(); x[7] = 200.
    fit = gaussian_fit(x, truth, 3, noise=.3)[0]
    with pytest.warns(C.ParetoWarning, match="spikes \\[7") as caught: C.loo(fit)
    assert "leave them out" in str(caught[0].message)


def test_compare(good, too_few, data):
    table = C.compare(dict(three=good, two=too_few))
    assert list(table.index) == ["three", "two"] and table.loc["three", "units"] == 3 and table.loc["two", "units_point"] == 2
    assert "must not choose the number of units" in table.attrs["caution"]
    other = gaussian_fit(data[0] + 1, data[1], 3)[0]
    with pytest.raises(ValueError, match="different data"): C.compare(dict(a=good, b=other))
    with pytest.raises(ValueError, match="at least two"): C.compare(dict(a=good))


# ---------------------------------------------------------------- truth

def test_recovery_of_known_mistakes():
    truth = np.repeat([10, 20, 30, 40], [40, 30, 20, 10])
    unit = np.repeat([0, 0, 1, 2, 3], [40, 30, 10, 10, 10])     # 10 and 20 merged, 30 split in two
    found = C.recovery(unit, truth)
    assert json.loads(found.attrs["merged"]) == [dict(unit=0, true_units=[10, 20])]
    assert json.loads(found.attrs["split"]) == [dict(true_unit=30, units=[1, 2])]
    assert found.accuracy.sel(true_unit=10).item() == pytest.approx(40 / 70) and found.accuracy.sel(true_unit=20).item() == 0
    assert found.accuracy.sel(true_unit=40).item() == 1 and found.accuracy.sel(true_unit=30).item() == .5
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
    assert found.attrs["ari"] == pytest.approx(adjusted_rand_score(truth, unit)) and found.attrs["ami"] == pytest.approx(adjusted_mutual_info_score(truth, unit))


def test_recovery_does_not_depend_on_names_and_knows_no_unit():
    rng = np.random.default_rng(0)
    truth, unit = rng.integers(-1, 3, 200), rng.integers(-1, 4, 200)
    a = C.recovery(unit, truth)
    name = np.array([3, 0, 2, 1])
    b = C.recovery(np.where(unit < 0, -1, name[unit]), truth)
    np.testing.assert_allclose(a.accuracy, b.accuracy)
    assert a.true_unit.values.tolist() == [0, 1, 2]
    text = C.recovery(np.repeat([0, 1], 5), np.repeat(["a", "b"], 5))
    assert text.attrs["ari"] == 1 and text.true_unit.values.tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="one true unit per spike"): C.recovery(unit, truth[:-1])


def test_calibration_of_an_honest_and_of_a_boastful_posterior():
    rng = np.random.default_rng(1)
    n, p = 600, .75
    base = np.repeat([0, 1, 2], n // 3)
    draw = lambda size: np.where(rng.random((size, n)) < p, base, rng.integers(0, 3, (size, n)))
    truth = draw(1)[0]
    honest = C.calibration(draw(200), truth)
    assert honest.attrs["ece"] < .02 and honest.attrs["spike_ece"] < .06
    boastful = C.calibration(np.tile(base, (50, 1)), truth)
    assert boastful.attrs["ece"] > .1 and boastful.attrs["spike_ece"] > .1
    assert honest["count"].sum() == n * (n - 1) / 2
    subset = C.calibration(draw(50), truth, n_spikes=100)
    assert subset.attrs["pairs"] == 100 * 99 / 2
    none = C.calibration(np.full((5, 10), -1), np.full(10, -1))
    assert none.attrs["ece"] == 0 and none.attrs["spike_ece"] == 0


def test_residuals_are_noise_when_templates_explain_everything():
    rng = np.random.default_rng(0)
    n, t, c = 300, 20, 4
    truth = rng.integers(0, 2, n)
    bump = np.exp(-.5 * ((np.arange(t) - 9) / 1.5)**2)
    template = np.stack([-12 * bump[:, None] * np.array([1, .6, .2, 0]), -9 * bump[:, None] * np.array([0, .3, 1, .5])])
    sd = np.array([1., 2, .5, 1])
    values = template[truth] + sd * rng.normal(size=(n, t, c))
    w = xr.DataArray(values, dims=("spike", "time", "channel"), coords=dict(time=np.arange(t) / 20., channel=list("abcd"), sample_index=("spike", np.arange(n) * 100)))
    z = np.tile(truth, (5, 1))
    left = C.residuals(z, w)
    np.testing.assert_allclose(left.noise, sd, rtol=.06)
    np.testing.assert_allclose(left.ratio, 1, atol=.2)
    moved = values.copy(); moved[:, 8:11, 0] *= rng.uniform(.5, 1.5, (n, 1))
    worse = C.residuals(z, w.copy(data=moved), noise=sd)
    assert worse.ratio.isel(time=9, channel=0) > 2 and worse.ratio.isel(time=2).max() < 1.2
    order = rng.permutation(n)
    draws = xr.DataArray(z[:, order[:200]], dims=("draw", "spike"), coords=dict(sample_index=("spike", np.arange(n)[order[:200]] * 100)))
    assert C.residuals(draws, w, noise=sd).ratio.max() < 1.3
    with pytest.raises(ValueError, match="sample_index"): C.residuals(z[:, :10], w.drop_vars("sample_index"))
    with pytest.raises(ValueError, match="noise has shape"): C.residuals(z, w, noise=[1, 2])


# ---------------------------------------------------------------- verdict

def test_verdict_of_a_good_fit(good, data, tmp_path):
    page = C.verdict(good, truth=data[1], draws=30)
    assert page.grade == "trust" and page.units.trusted.all() and len(page.figures) >= 4
    assert all(png[:8] == b"\x89PNG\r\n\x1a\n" for png in page.figures.values())
    for word in ("Did the inference converge?", "How many units?", "3 units with probability", "Held-out density alone must not choose the number of units", "ARI"): assert word in page.text
    page.save(tmp_path / "v.html"); page.save(tmp_path / "v.txt")
    text = (tmp_path / "v.html").read_text()
    assert text.startswith("<!doctype html>") and "src='http" not in text and text.count("data:image/png;base64") == len(page.figures)
    assert (tmp_path / "v.txt").read_text() == page.text
    np.testing.assert_array_equal(page.leave_out, np.flatnonzero(certainty(good).probability.values < .8))


def test_verdict_of_too_few_units(too_few, data):
    page = C.verdict(too_few, draws=40, figures=False)
    assert page.grade == "do not trust" and page.headline.startswith("Too few units") and "looks like two groups" in page.text
    assert (~page.units.trusted).sum() == 1


def test_verdict_names_units_to_merge():
    "One neuron that the posterior cuts in two at random places most of the time."
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(0, 1, (150, 2)), rng.normal(8, 1, (100, 2))]
    truth = np.repeat([0, 1], [150, 100])
    fit = gaussian_fit(x, truth, 3)[0]
    z = fit["posterior"]["assignments"].values
    z[:, :, :150] = 0; z[:, :, 150:] = 1
    split = rng.random(z.shape[:2]) < .6
    half = x[:150, 0] > 0
    z[:, :, :150] = np.where(split[..., None] & half, 2, z[:, :, :150])
    page = C.verdict(fit, draws=0, figures=False)
    words = page.text
    assert "are one with probability" in words or "is two with probability" in words
    assert page.grade != "trust"


def test_verdict_escapes_what_it_prints(good):
    page = C.Verdict("trust", "<script>", {"<b>": ["<i>"]}, C.verdict(good, draws=0, figures=False).units, np.array([]))
    assert "<script>" not in page._repr_html_() and "&lt;i&gt;" in page._repr_html_()


# ---------------------------------------------------------------- the whole, on real inference

@pytest.mark.parametrize("method, options", [("gibbs", dict(draws=200, tune=100, chains=2)), ("gibbs", dict(draws=200, tune=100, chains=2, keep_assignments=4)),
                                             ("gibbs", dict(draws=200, tune=100, chains=2, keep_assignments="counts")), ("vb", dict(draws=100))])
def test_every_function_takes_every_kind_of_fit(method, options, model=lambda x: dpmm(x, 5)):
    from spike_ppl.inference import fit as run
    x, truth = toy(n=200, n_units=3, n_features=2, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = run(model(x), method=method, seed=0, progressbar=False, **options)
    sure = certainty(made)
    assert n_units(made).sum().item() == pytest.approx(1)
    np.testing.assert_array_equal(sure.unit, point_partition(made))
    assert C.recovery(made, truth).attrs["ari"] > .9
    assert C.calibration(made, truth).attrs["ece"] < .05
    assert C.convergence(made).verdict
    assert np.isfinite(C.mean_squared_error(made))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", C.ParetoWarning)
        assert np.isfinite(C.loo(made).elpd)
    assert C.verdict(made, draws=10, truth=truth).units.shape[0] == sure.sizes["unit"]


@pytest.mark.slow
@pytest.mark.parametrize("method, options", [("nuts", dict(draws=200, tune=300, chains=2)), ("advi", dict(draws=200))])
def test_every_function_takes_fits_of_the_marginal_model(method, options):
    test_every_function_takes_every_kind_of_fit(method, options, lambda x: gmm(x, 3))


def test_log_likelihood_of_students_units():
    "The spikes' own scales are integrated out: the density of a mixture of multivariate t, by scipy."
    from scipy.stats import multivariate_t
    from spike_ppl.inference import fit as run
    from spike_ppl.models import robust
    x, _ = toy(n=150, n_units=2, n_features=2, seed=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = run(robust(x, 2), method="vb", seed=0, draws=4, progressbar=False)
    got, post = C.log_likelihood(made)["log_likelihood"]["features"], made["posterior"]
    for i in range(4):
        p = {k: post[k].values[0, i] for k in ("weights", "means", "variances", "dof")}
        want = np.logaddexp.reduce([np.log(p["weights"][k]) + multivariate_t(p["means"][k], np.diag(p["variances"][k]), df=p["dof"]).logpdf(x.values) for k in range(2)], axis=0)
        np.testing.assert_allclose(got.values[0, i], want, rtol=1e-6, atol=1e-6)


def test_prior_sensitivity_needs_draws_of_the_assignments():
    from spike_ppl.criticism import prior_sensitivity
    from spike_ppl.inference import fit
    from spike_ppl.models import gmm, toy
    x, _ = toy(n=120, n_units=2, n_features=2, seed=0)
    with pytest.raises(ValueError, match="gibbs"): prior_sensitivity(fit(gmm(x, 2), "vb", seed=0, progressbar=False))
