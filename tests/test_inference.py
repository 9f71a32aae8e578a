"""Inference against independent computations: sums written out, Monte Carlo, the model's own log-probability."""
import json, os, subprocess, sys
import numpy as np, pytest, xarray as xr
import pymc as pm, pytensor.tensor as pt
from scipy.special import expit, logsumexp
from scipy.stats import bernoulli, multivariate_t, poisson as poisson_
from spike_ppl import inference, variational
from spike_ppl.conjugate import NotConjugate, derive
from spike_ppl.passes import Spikes, start_partition, hard_statistics
from spike_ppl.closed_forms import parts, closed_form
from spike_ppl.gibbs import ConjugateGibbs
from spike_ppl.inference import fit, log_density, marginal, predict
from spike_ppl.models import dpmm, gmm, robust, toy

quiet = dict(progressbar=False)


@pytest.fixture(scope="module")
def data(): return toy(300, 3, 2, seed=1)

@pytest.fixture(scope="module")
def model(data): return gmm(data[0], 4)

@pytest.fixture(scope="module")
def vb(model): return fit(model, "vb", draws=200, **quiet)

@pytest.fixture(scope="module")
def gibbs(model): return fit(model, "gibbs", draws=300, tune=100, chains=2, **quiet)


def units(K, D, full, seed=0):
    rng = np.random.default_rng(seed)
    Q = rng.normal(size=(K, D, 2*D))/np.sqrt(2*D)
    A = Q @ Q.transpose(0, 2, 1) if full else rng.gamma(5., .2, (K, D))
    return rng.normal(size=K), rng.normal(size=(K, D)), A


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("n, K, D", [(7, 1, 1), (33_000, 5, 3), (700, 40, 24)])
def test_pass_is_the_sum_written_out(n, K, D, full):
    c, b, A = units(K, D, full)
    x = np.random.default_rng(1).normal(size=(n, D))*2 + 5
    quad = np.einsum("nd,kde,ne->nk", x, A, x, optimize=True) if full else x**2 @ A.T
    logits = c + x @ b.T - .5*quad
    lse = logsumexp(logits, 1)
    R = np.exp(logits - lse[:, None])
    got = Spikes(x).soft((c, b, A), responsibilities=True)
    N = R.sum(0); mean = R.T @ x/N[:, None]
    np.testing.assert_allclose(got.spikes, R, atol=1e-10)
    np.testing.assert_allclose(got.log_density, lse.sum(), rtol=1e-11)
    np.testing.assert_allclose(got.entropy, -(R*np.log(np.maximum(R, 1e-300))).sum(), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(got.statistics.count, N, rtol=1e-8)
    big = N > 1e-3
    np.testing.assert_allclose(got.statistics.mean[big], mean[big], rtol=1e-8)
    for k in np.flatnonzero(big):
        y = x - mean[k]
        S = (y.T*R[:, k]) @ y if full else R[:, k] @ y**2
        np.testing.assert_allclose(got.statistics.scatter[k], S, rtol=1e-8, atol=1e-8*N[k])
    np.testing.assert_allclose(Spikes(x).log_density((c, b, A)), lse, rtol=1e-11)


def test_pass_is_the_same_bits_on_any_number_of_threads_and_from_any_array():
    import dask.array
    q, x = units(6, 4, True), np.random.default_rng(0).normal(size=(50_001, 4))
    one = [Spikes(x, 1).soft(q), Spikes(x, 1).hard(q, 2**63 + 1)]
    for spikes in (Spikes(x, 2), Spikes(dask.array.from_array(x, chunks=(7_000, 4)), 2)):
        two = [spikes.soft(q), spikes.hard(q, 2**63 + 1)]
        for a, b in zip(one, two):
            assert a.log_density == b.log_density
            for u, v in zip(a.statistics, b.statistics): np.testing.assert_array_equal(u, v)
        np.testing.assert_array_equal(one[1].spikes, two[1].spikes)


def test_hard_pass_draws_from_the_probabilities():
    n, p = 200_000, np.array([.1, .2, .7])
    x = np.zeros((n, 2))
    z = Spikes(x).hard((np.log(p) + 3, np.zeros((3, 2)), np.ones((3, 2))), 12345).spikes
    count = np.bincount(z, minlength=3)
    assert ((count - n*p)**2/(n*p)).sum() < 13.8                     # chi-square, 2 degrees of freedom, 1 in 1000
    pairs = np.bincount(3*z[:-1] + z[1:], minlength=9)/(n - 1)       # neighbours are independent
    np.testing.assert_allclose(pairs, np.outer(p, p).ravel(), atol=.005)
    other = Spikes(x).hard((np.log(p) + 3, np.zeros((3, 2)), np.ones((3, 2))), 12346).spikes
    assert .52 < (z == other).mean() < .56                           # .54 when independent


def test_float32_pass_is_near():
    q, x = units(5, 6, False), np.random.default_rng(0).normal(size=(5000, 6))
    a, b = Spikes(x).soft(q), Spikes(x, float32=True).soft(q)
    np.testing.assert_allclose(b.statistics.mean, a.statistics.mean, atol=1e-3)
    np.testing.assert_allclose(b.log_density, a.log_density, rtol=1e-5)


@pytest.mark.parametrize("build", [lambda x: gmm(x, 4), lambda x: dpmm(x, 5, covariance="full", outliers=True)], ids=["gmm", "dpmm-full-outliers"])
def test_closed_forms_equal_the_derived_functions(build, data):
    d = derive(build(data[0]))
    fast, rng = closed_form(d), np.random.default_rng(5)
    assert fast._checked == {*d.parameters, "quadratic", "joint"}
    p = d.initial(rng)
    z = rng.integers(d.n_units, size=300)
    s = hard_statistics(np.asarray(data[0]), z, d.n_units, d.structure == "full")
    q = {k: fast.natural(k, p, s) for k in d.parameters}
    for k in d.parameters:
        for a, b in zip(fast.natural(k, p, s), d.natural(k, p, s)): np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
        for a, b in zip(fast.expected_natural(k, q, s), d.expected_natural(k, q, s)): np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    for a, b in zip(fast.unit_quadratic(p), d.unit_quadratic(p)): np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    for a, b in zip(fast.expected_quadratic(q), d.expected_quadratic(q)): np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(fast.log_joint(p, s), d.log_joint(p, s), rtol=1e-10)
    np.testing.assert_allclose(fast.energy(q, s), d.energy(q, s), rtol=1e-10)


def test_a_subset_of_none_is_all_spikes(data):
    a, b = (fit(gmm(data[0], 3), "vb", draws=2, seed=1, subset=n, **quiet)["unit_probability"].to_dataset() for n in (None, len(data[0])))
    xr.testing.assert_identical(a, b)


def test_parts_finds_the_roles(data):
    p = parts(derive(dpmm(data[0], 5, covariance="full", outliers=True)))
    assert set(p.unit) == {"means", "precisions"} and set(p.weights) == {"sticks", "outlier_fraction"} and p.hyper == ("concentration",)
    assert p.fixed.tolist() == [False]*5 + [True]


def test_elbo_equals_monte_carlo_from_the_models_own_logp(data):
    x = np.asarray(data[0])[:12]
    m = gmm(x, 2)
    f = fit(m, "vb", draws=1, subset=100, **quiet)
    d = derive(m)
    q = inference._stored_factors(f, d)
    R = f["unit_probability"].unit_probability.values
    rng, n = np.random.default_rng(0), 3000
    free = pm.model.transform.conditioning.remove_value_transforms(m)
    logp = free.compile_logp(jacobian=False)
    total = np.empty(n)
    for i in range(n):
        point = {k: d.family[k].draw(q[k], rng) for k in d.parameters}
        log_q = sum(d.family[k].logp(q[k], point[k]) for k in d.parameters)
        z = (rng.random(len(x))[:, None] > np.cumsum(R, 1)[:, :-1]).sum(1)
        total[i] = logp({**point, "assignments": z}) - log_q - np.log(R[np.arange(len(x)), z]).sum()
    elbo = f["optimisation"].elbo.values[-1]
    assert abs(total.mean() - elbo) < 5*total.std()/np.sqrt(n) + .05, (total.mean(), elbo)


def test_elbo_never_falls_with_batches():
    x, _ = toy(4000, 5, 3, seed=3)
    f = fit(dpmm(x, 8), "vb", draws=1, moves=False, starts=1, subset=60, batches=7, tolerance=1e-9, **quiet)
    e = f["optimisation"].elbo.values
    assert len(e) > 5 and (np.diff(e) > -1e-8*np.abs(e[1:])).all()
    assert set(f["optimisation"].data_vars) >= {"elbo", "means", "variances"}


def test_vb_finds_the_units(vb, data):
    truth = np.asarray(data[1])
    z = vb["unit_probability"].unit_probability.values.argmax(1)
    assert len({(a, b) for a, b in zip(z, truth)}) == 3                # one to one
    assert vb["posterior"].sizes["draw"] == 200 and vb["posterior"].weights.dims == ("chain", "draw", "unit")


def test_moves_free_a_stuck_mixture():
    rng = np.random.default_rng(4)
    truth = np.repeat(np.arange(10), 60)
    x = 8*rng.normal(size=(10, 4))[truth] + rng.normal(size=(600, 4))
    m = gmm(x, 10)
    def right(z): return len(set(zip(z, truth))) == 10 == len(set(z))
    # variational Bayes from one k-means++ start, with and without moves
    fits = {moves: [fit(m, "vb", draws=1, starts=1, moves=moves, seed=seed, **quiet) for seed in range(8)] for moves in (False, True)}
    bound = {moves: np.array([f["optimisation"].elbo.values[-1] for f in fs]) for moves, fs in fits.items()}
    assert all(right(f["unit_probability"].unit_probability.values.argmax(1)) for f in fits[True]) and np.ptp(bound[True]) < 1
    assert (bound[False] < bound[True].min() - 50).any() and bound[False].max() < bound[True].max() + 1
    # Gibbs from random assignments
    start = derive(m).initial()
    def chain(seed, moves):
        z = np.random.default_rng(seed).integers(10, size=600)
        f = fit(m, "gibbs", draws=100, tune=200, chains=1, seed=seed, moves=moves, start={**start, "assignments": z}, **quiet)
        return f["sample_stats"].lp.values[0, -50:].mean(), right(f["posterior"].assignments.values[0, -1])
    without, using = (list(zip(*(chain(seed, moves) for seed in range(4)))) for moves in (False, True))
    assert all(using[1]) and sum(without[1]) <= 1 and np.ptp(using[0]) < 20
    assert np.median(without[0]) < min(using[0]) - 100


def test_gibbs_agrees_with_vb_and_truth(gibbs, vb, data, model):
    new, _ = data[0], None
    a, b = log_density(gibbs, new, model=model, draws=100).mean().item(), log_density(vb, new, model=model, draws=100).mean().item()
    assert abs(a - b) < .03
    assert (gibbs["sample_stats"].n_occupied.values >= 3).all()
    assert {"lp", "n_occupied", "partition_entropy"} <= set(gibbs["sample_stats"].data_vars)


def test_lp_is_the_models_logp(gibbs, model):
    free = pm.model.transform.conditioning.remove_value_transforms(model)
    logp = free.compile_logp(jacobian=False)
    post = gibbs["posterior"].to_dataset()
    for c, t in ((0, 0), (1, 299)):
        point = {k: post[k].values[c, t] for k in ("weights", "means", "variances", "assignments")}
        np.testing.assert_allclose(gibbs["sample_stats"].lp.values[c, t], logp(point), rtol=1e-9)


def test_result_contract(gibbs, vb, tmp_path):
    for f in (gibbs, vb):
        assert json.loads(f.attrs["roles"]) == dict(assignments="assignments", weights="weights", observed="features", outlier_unit=None)
        assert f.attrs["model"] == "gmm" and json.loads(f.attrs["model_args"])["n_units"] == 4 and f.attrs["wall_time"] > 0
        assert {"posterior", "sample_stats", "observed_data", "constant_data"} <= set(f.children)
        assert np.issubdtype(f["posterior"].assignments.dtype, np.integer)
        f.to_netcdf(tmp_path/"f.nc", engine="h5netcdf")
        back = xr.open_datatree(tmp_path/"f.nc", engine="h5netcdf").load()
        for g in f.children: xr.testing.assert_identical(f[g].to_dataset(), back[g].to_dataset())
        x = f["observed_data"].features
        np.testing.assert_array_equal(predict(back, x, draws=20), predict(f, x, draws=20))
        back.close()


def test_arviz_reads_it(gibbs):
    import arviz as az
    s = az.summary(gibbs, var_names=["weights"])
    assert len(s) == 4
    assert float(az.ess(gibbs["sample_stats"].to_dataset()[["lp"]].rename(lp="log_joint")).log_joint) > 5


def test_same_seed_same_result_on_any_number_of_threads(data):
    x = np.concatenate([np.asarray(data[0])]*60)
    m = gmm(x, 3)
    a, b = (fit(m, "vb", draws=5, cores=c, subset=300, passes=3, **quiet) for c in (1, 2))
    np.testing.assert_array_equal(a["posterior"].means, b["posterior"].means)
    g = [fit(m, "gibbs", draws=3, tune=2, chains=1, cores=c, moves=False, **quiet) for c in (1, 2)]
    np.testing.assert_array_equal(g[0]["posterior"].means, g[1]["posterior"].means)
    np.testing.assert_array_equal(g[0]["posterior"].assignments, g[1]["posterior"].assignments)
    assert not np.array_equal(fit(m, "gibbs", draws=3, tune=2, chains=1, seed=1, moves=False, **quiet)["posterior"].means, g[0]["posterior"].means)


def test_resume_goes_on_where_it_stopped(model):
    kw = dict(tune=5, chains=2, seed=3, **quiet)
    whole, half = fit(model, "gibbs", draws=20, **kw), fit(model, "gibbs", draws=10, **kw)
    joined = fit(model, "gibbs", draws=10, resume=half, **kw)
    # chains run one after the other from their own generators, so the joined run is the whole one
    for k in ("means", "assignments"): np.testing.assert_allclose(joined["posterior"][k], whole["posterior"][k], rtol=1e-7)
    assert joined["posterior"].sizes["draw"] == 20
    more = fit(model, "vb", draws=5, resume=fit(model, "vb", draws=5, passes=1, **quiet), **quiet)
    assert np.isfinite(more["optimisation"].elbo.values).all()
    with pytest.raises(ValueError, match="resume"): fit(model, "vb", resume=half, **quiet)


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_stopping_early_leaves_a_valid_result(model, monkeypatch, error):
    step, calls = inference.gibbs_step, []
    def broken(*a, **k):
        calls.append(1)
        if len(calls) == 75: raise error("stop")
        return step(*a, **k)
    monkeypatch.setattr(inference, "gibbs_step", broken)
    with pytest.warns(UserWarning, match="stopped early"): f = fit(model, "gibbs", draws=40, tune=10, chains=2, **quiet)
    assert f["posterior"].sizes["draw"] == 40 and f["posterior"].sizes["chain"] == 1 and "stop" in f.attrs["stopped"]
    assert np.isfinite(f["posterior"].means).all()


def test_what_is_kept_of_the_assignments(model):
    kw = dict(draws=40, tune=5, chains=2, **quiet)
    thin = fit(model, "gibbs", keep_assignments=10, **kw)
    assert "assignments" not in thin["posterior"] and thin["assignments"].assignments.shape == (2, 4, 300)
    np.testing.assert_array_equal(thin["assignments"].draw, [0, 10, 20, 30])
    counts = fit(model, "gibbs", keep_assignments="counts", **kw)
    np.testing.assert_allclose(counts["unit_probability"].unit_probability.sum("unit"), 1)
    with pytest.warns(UserWarning, match="every 2th draw"): fit(model, "gibbs", memory=50_000, **kw)
    with pytest.raises(ValueError, match="keep_assignments"): fit(model, "gibbs", keep_assignments="some", **kw)


def test_predict_and_log_density_average_over_draws(gibbs, data, model):
    x = np.asarray(data[0])[:40]
    post = gibbs["posterior"].to_dataset().stack(s=("chain", "draw"))
    w, m, v = (post[k].transpose("s", ...).values for k in ("weights", "means", "variances"))
    log = np.log(w)[:, None] - .5*(((x[None, :, None] - m[:, None])**2/v[:, None] + np.log(2*np.pi*v[:, None])).sum(-1))
    lse = logsumexp(log, -1)
    np.testing.assert_allclose(log_density(gibbs, x, draws=10_000), logsumexp(lse, 0) - np.log(len(w)), rtol=1e-8)
    np.testing.assert_allclose(predict(gibbs, x, draws=10_000), np.exp(log - lse[..., None]).mean(0), atol=1e-8)


def test_relabelled_weights_count_as_they_stand(data):
    f = fit(dpmm(data[0], 4), "vb", draws=50, **quiet)
    order = [2, 0, 3, 1]
    post = f["posterior"].to_dataset().copy(deep=True)
    for k in ("weights", "means", "variances"): post[k] = post[k].copy(data=post[k].isel(unit=order).values)
    g = xr.DataTree.from_dict({**{k: v.to_dataset() for k, v in f.children.items()}, "posterior": post}); g.attrs.update(f.attrs)
    np.testing.assert_allclose(predict(g, data[0]).values, predict(f, data[0]).values[:, order], atol=1e-9)


def test_other_models_must_be_handed_over(data):
    x = np.asarray(data[0])
    with pm.Model() as m:
        share = pm.Dirichlet("share", np.ones(3))
        centre = pm.Normal("centre", 0, 10, shape=(3, 2))
        which = pm.Categorical("which", share, shape=len(x))
        pm.Normal("seen", centre[which], 1., observed=x)
    f = fit(m, "vb", draws=20, **quiet)
    assert json.loads(f.attrs["roles"]) == dict(assignments="which", weights="share", observed="seen", outlier_unit=None)
    with pytest.raises(ValueError, match="model="): predict(f, x)
    np.testing.assert_allclose(predict(f, x, model=m).sum("unit"), 1)


def poisson(counts):
    with pm.Model() as m:
        w = pm.Dirichlet("w", np.ones(3))
        rate = pm.Gamma("rate", 1., .1, shape=(3, counts.shape[1]))
        z = pm.Categorical("z", w, shape=len(counts))
        pm.Poisson("n", rate[z], observed=counts)
    return m

@pytest.mark.parametrize("method", ["gibbs", "vb", pytest.param("nuts", marks=pytest.mark.slow)])
def test_a_model_nobody_wrote_inference_for(method):
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=150)
    rates = np.array([[2., 20.], [15., 3.], [30., 30.]])
    f = fit(poisson(rng.poisson(rates[truth])), method, draws=60, tune=60, chains=1, seed=2, **quiet)
    found = f["posterior"].rate.mean(("chain", "draw")).values
    order = [np.argmin(((found - r)**2).sum(1)) for r in rates]
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_allclose(found[order], rates, rtol=.2, atol=.7)
    if method == "vb": assert (np.diff(f["optimisation"].elbo.values) > -1e-7).all()


def stiff(x):
    with pm.Model() as m:
        w = pm.Dirichlet("w", np.ones(2))
        mu = pm.Normal("mu", 0, 5, shape=2)
        sd = pm.HalfNormal("sd", 2.)
        z = pm.Categorical("z", w, shape=len(x))
        pm.Normal("x", mu[z], sd, observed=x)
    return m

def test_what_is_not_conjugate_is_refused_or_mixed():
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(-3, 1, 60), rng.normal(3, 1, 60)]
    m = stiff(x)
    with pytest.raises(NotConjugate, match="sd"): fit(m, "gibbs", exact=True, **quiet)
    with pytest.raises(NotConjugate, match="sd"): fit(m, "vb", **quiet)
    with m, pytest.raises(NotConjugate, match="sd"): ConjugateGibbs([m["sd"]])
    f = fit(m, "gibbs", draws=150, tune=150, chains=1, seed=1, **quiet)
    assert .85 < f["posterior"].sd.values.mean() < 1.2
    assert np.abs(np.sort(f["posterior"].mu.mean(("chain", "draw")).values) - [-3, 3]).max() < .5


def test_plain_pm_sample_uses_it(data):
    m = gmm(np.asarray(data[0])[:60], 3)
    with m:
        idata = pm.sample(30, tune=20, chains=2, cores=1, random_seed=1, progressbar=False, compute_convergence_checks=False, nuts_sampler="pymc")
        from pymc.sampling.mcmc import assign_step_methods
        _, chosen = assign_step_methods(m)
    assert list(chosen) == [ConjugateGibbs] and "log_joint" in idata["sample_stats"]
    with pm.Model() as other:
        pm.Normal("a")
        _, chosen = assign_step_methods(other)
    assert ConjugateGibbs not in chosen


def test_marginal_model_is_the_sum_over_assignments(data):
    x = np.asarray(data[0])[:5]
    m = gmm(x, 2)
    plain = pm.model.transform.conditioning.remove_value_transforms
    full, small = plain(m).compile_logp(jacobian=False), plain(marginal(m)).compile_logp(jacobian=False)
    p = derive(m).initial(np.random.default_rng(0))
    import itertools
    every = [full({**p, "assignments": np.array(z)}) for z in itertools.product(range(2), repeat=5)]
    np.testing.assert_allclose(small({k: v for k, v in p.items() if k != "assignments"}), logsumexp(every), rtol=1e-10)


@pytest.fixture(scope="module")
def few(): return toy(90, 3, 2, seed=1)

mixtures = {"gmm": lambda x: gmm(x, 3), "dpmm": lambda x: dpmm(x, 4)}

@pytest.mark.parametrize("name, method", [("gmm", "nuts"), ("gmm", "advi"), ("dpmm", "nuts"), pytest.param("dpmm", "advi", marks=pytest.mark.slow)])
def test_nuts_and_advi_through_the_same_door(name, method, few, tmp_path):
    x, truth = few
    m = mixtures[name](x)
    f = fit(m, method, draws=100, tune=120, chains=1, passes=6, seed=2, **quiet)
    assert json.loads(f.attrs["roles"]) == dict(assignments="assignments", weights="weights", observed="features", outlier_unit=None)
    assert f.attrs["method"] == method and f.attrs["model"] == name and "stopped" not in f.attrs
    post = f["posterior"].to_dataset()
    assert set(post.data_vars) >= {v.name for v in m.free_RVs} | {"weights"} and post.sizes["draw"] == 100
    assert set(f["sample_stats"].data_vars) >= {"lp", "log_density", "n_occupied"} | ({"diverging"} if method == "nuts" else set())
    p, ld = predict(f, x, draws=1000), log_density(f, x, draws=1000)
    # the assignments were summed out and drawn back from their complete conditional: their frequencies are the probabilities
    often = (post.assignments.values[0][..., None] == np.arange(p.sizes["unit"])).mean(0)
    assert np.abs(often - p.values).max() < .25 and abs((often - p.values).mean(0)).max() < .01
    assert len({(a, b) for a, b in zip(p.argmax("unit").values, np.asarray(truth))}) == len(np.unique(p.argmax("unit")))      # units are pure
    g = fit(m, "vb", draws=100, **quiet)
    assert abs(ld.mean().item() - log_density(g, x).mean().item()) < (.05 if method == "nuts" else .25)
    logp = pm.model.transform.conditioning.remove_value_transforms(m).compile_logp(jacobian=False)
    np.testing.assert_allclose(f["sample_stats"].lp.values[0, 7], logp({v.name: post[v.name].values[0, 7] for v in m.free_RVs}), rtol=1e-9)
    if method == "advi": assert f["optimisation"].elbo.shape == (6000,)
    f.to_netcdf(tmp_path/"f.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path/"f.nc", engine="h5netcdf") as back: np.testing.assert_array_equal(predict(back.load(), x, draws=20), predict(f, x, draws=20))


@pytest.mark.slow
def test_nuts_gives_the_same_on_one_process_and_two(few):
    a, b = (fit(gmm(few[0], 3), "nuts", draws=20, tune=40, chains=2, cores=c, seed=4, **quiet) for c in (1, 2))
    for k in ("means", "weights", "assignments"): np.testing.assert_array_equal(a["posterior"][k], b["posterior"][k])


def test_pymcs_own_samplers_go_on_and_stop_early(few, monkeypatch):
    m, kw = gmm(few[0], 3), dict(tune=60, chains=2, seed=1, **quiet)
    first = fit(m, "nuts", draws=20, keep_assignments="counts", **kw)
    both = fit(m, "nuts", draws=30, keep_assignments="counts", resume=first, **kw)
    assert both["posterior"].sizes["draw"] == 50 and both["posterior"].draw.values[-1] == 49
    np.testing.assert_array_equal(both["posterior"].means[:, :20], first["posterior"].means)
    np.testing.assert_allclose(both["unit_probability"].unit_probability.sum("unit"), 1)
    with pytest.raises(ValueError, match="chains"): fit(m, "nuts", resume=first, chains=3, **quiet)
    with pytest.raises(ValueError, match="method='gibbs'"): fit(m, "gibbs", resume=first, **quiet)
    with pytest.raises(ValueError, match="advi"): fit(m, "advi", resume=first, **quiet)
    step, calls = pm.NUTS.step, []
    for error, where in ((KeyboardInterrupt, 150), (FloatingPointError, 70)):         # in the second chain; in the first
        calls.clear()
        def broken(self, point):
            calls.append(1)
            if len(calls) == where: raise error("stop")
            return step(self, point)
        monkeypatch.setattr(pm.NUTS, "step", broken)
        with pytest.warns(UserWarning, match="nuts stopped early"): f = fit(m, "nuts", draws=40, **kw)
        assert f.attrs["stopped"].startswith(error.__name__) and f["posterior"].sizes["chain"] == 1
        assert f["posterior"].sizes["draw"] == (40 if where == 150 else 9) and np.isfinite(f["posterior"].means).all()
        monkeypatch.setattr(pm.NUTS, "step", step)


def test_advi_that_breaks_keeps_its_last_good_state(few, monkeypatch):
    sample, seen = pm.ADVI.fit, []
    def broken(self, n, callbacks, **k):
        def stop(approximation, losses, i):
            if i == 250: seen.append(1); approximation.params[0].set_value(np.full_like(approximation.params[0].get_value(), np.nan)); raise FloatingPointError("NaN occurred")
        return sample(self, n, callbacks=[*callbacks, stop], **k)
    monkeypatch.setattr(pm.ADVI, "fit", broken)
    with pytest.warns(UserWarning, match="advi stopped early"): f = fit(gmm(few[0], 3), "advi", draws=20, passes=1, **quiet)
    assert seen and "NaN" in f.attrs["stopped"] and f["optimisation"].sizes["iteration"] == 200 and np.isfinite(f["posterior"].means).all()


def test_a_mixed_run_goes_on():
    x = np.r_[np.random.default_rng(0).normal(-3, 1, 30), np.random.default_rng(1).normal(3, 1, 30)]
    kw = dict(tune=30, chains=1, **quiet)
    a = fit(stiff(x), "gibbs", draws=10, **kw)
    b = fit(stiff(x), "gibbs", draws=10, resume=a, **kw)
    assert b["posterior"].sizes["draw"] == 20 and not np.array_equal(b["posterior"].sd[0, :10], b["posterior"].sd[0, 10:])


def test_predict_and_log_density_of_components_that_are_not_gaussian(few):
    rng, n = np.random.default_rng(0), 60
    rates, chance = np.array([[2., 20.], [15., 3.]]), np.array([[-2., 2., 2.], [2., -2., 2.]])
    counts = poisson(rng.poisson(rates[rng.integers(2, size=n)]))
    with pm.Model() as flags:
        w = pm.Dirichlet("w", np.ones(2))
        p = pm.Beta("p", 1., 1., shape=(2, 3))
        z = pm.Categorical("z", w, shape=n)
        pm.Bernoulli("b", p[z], observed=rng.random((n, 3)) < expit(chance[rng.integers(2, size=n)]))
    y = np.asarray(few[0])
    with pm.Model() as student:
        w = pm.Dirichlet("w", np.ones(3))
        mu, var = pm.Normal("mu", 0, 10, shape=(3, 2)), pm.InverseGamma("var", 3., 2., shape=(3, 2))
        u = pm.Gamma("u", 2., 2., shape=90)
        z = pm.Categorical("z", w, shape=90)
        pm.Normal("y", mu[z], pt.sqrt(var[z]/u[:, None]), observed=y)
    new = {"counts": rng.poisson(rates[rng.integers(2, size=100)]), "flags": rng.random((100, 3)) < .5, "student": 4*rng.normal(size=(100, 2))}
    density = {"counts": lambda q, k: poisson_.logpmf(new["counts"], q["rate"][k]).sum(1), "flags": lambda q, k: bernoulli.logpmf(new["flags"], q["p"][k]).sum(1),
               "student": lambda q, k: multivariate_t.logpdf(new["student"], q["mu"][k], np.diag(q["var"][k]), df=4)}        # the scale u integrated out
    for name, m in dict(counts=counts, flags=flags, student=student).items():
        f = fit(m, "gibbs", draws=8, tune=20, chains=1, **quiet)
        with pytest.raises(ValueError, match="model="): predict(f, new[name])
        draws = [{k: f["posterior"][k].values[0, t] for k in f["posterior"].data_vars} for t in range(8)]
        logits = np.stack([np.stack([np.log(q["w"][k]) + density[name](q, k) for k in range(len(q["w"]))], 1) for q in draws])
        np.testing.assert_allclose(log_density(f, new[name], model=m), logsumexp(logsumexp(logits, -1), 0) - np.log(8), rtol=1e-6)
        np.testing.assert_allclose(predict(f, new[name], model=m), np.exp(logits - logsumexp(logits, -1, keepdims=True)).mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="must agree"): predict(f, np.zeros((4, 3)), model=student)


def test_package_models_without_a_quadratic_likelihood_are_rebuilt_too(few):
    x = few[0]
    f = fit(robust(x, 3), "gibbs", draws=6, tune=20, chains=1, **quiet)
    new = np.asarray(x)[:7] + .1
    p = predict(f, new)
    np.testing.assert_allclose(p.sum("unit"), 1)
    np.testing.assert_allclose(p, predict(f, np.concatenate([new]*20))[:7], atol=1e-12)
    np.testing.assert_allclose(log_density(f, new), log_density(f, new, model=robust(x, 3)), rtol=1e-10)


def test_new_spikes_cannot_stand_in_where_the_model_knows_each_of_them(few):
    y, when = np.asarray(few[0])[:60], np.linspace(0, 1, 60)
    def drift(x, t):
        with pm.Model() as m:
            w = pm.Dirichlet("w", np.ones(2))
            mu, slope = pm.Normal("mu", 0, 10, shape=(2, 2)), pm.Normal("slope", 0, 1, shape=(2, 2))
            z = pm.Categorical("z", w, shape=len(x))
            pm.Normal("x", mu[z] + slope[z]*t[:, None], 1., observed=x)
        return m
    f = fit(drift(y, when), "gibbs", draws=5, tune=5, chains=1, **quiet)
    with pytest.raises(ValueError, match="knows something of each spike"): predict(f, y[:7], model=drift(y, when))
    np.testing.assert_allclose(predict(f, y[:20], model=drift(y[:20], when[:20])), predict(f, y, model=drift(y, when))[:20], atol=1e-12)


def test_own_priors_are_kept_for_predict(few):
    x = few[0]
    priors = dict(mean_sd=7., weight_concentration=2.)
    f = fit(gmm(x, 3, priors=priors), "vb", draws=30, **quiet)
    np.testing.assert_allclose(predict(f, x), predict(f, x, model=gmm(x, 3, priors=priors)), atol=1e-12)


def test_the_result_says_whether_moves_were_tried():
    m = poisson(np.random.default_rng(1).poisson(9., (40, 2)))
    roles = parts(derive(m))
    assert roles.unit == ("rate",) and roles.weights == ("w",) and not roles.fixed.any()
    assert "of" in json.loads(fit(m, "gibbs", draws=9, tune=9, chains=1, **quiet).attrs["moves"])["splits"]
    assert fit(m, "vb", draws=1, **quiet).attrs["moves"].startswith("off: the likelihood")
    assert fit(m, "gibbs", draws=1, tune=0, chains=1, moves=False, **quiet).attrs["moves"] == "off: moves=False"


def test_single_precision_gives_nearly_the_same_fit(model, data):
    a, b = (fit(model, "vb", draws=2, float32=single, **quiet) for single in (False, True))
    np.testing.assert_allclose(b["optimisation"].elbo[-1], a["optimisation"].elbo[-1], rtol=1e-4)
    np.testing.assert_allclose(b["unit_probability"].unit_probability, a["unit_probability"].unit_probability, atol=1e-2)


def test_an_interrupted_vb_fit_is_a_valid_result(data, monkeypatch, tmp_path):
    run, calls = variational._Batches.run, []
    def broken(self, q, *a):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return run(self, q, *a)
    monkeypatch.setattr(variational._Batches, "run", broken)
    with pytest.warns(UserWarning, match="stopped early"): f = fit(gmm(data[0], 4), "vb", draws=10, subset=60, tolerance=-1e9, **quiet)
    assert f.attrs["stopped"] == "KeyboardInterrupt" and f["optimisation"].sizes["iteration"] == 2
    np.testing.assert_allclose(f["unit_probability"].unit_probability.sum("unit"), 1)
    f.to_netcdf(tmp_path/"f.nc", engine="h5netcdf")


def test_nan_is_refused_before_the_work(data):
    x = np.array(data[0]); x[3, 1] = np.nan
    m = gmm(np.asarray(data[0]), 3)
    for method in ("vb", "gibbs"):
        with pytest.raises(ValueError, match="NaN or infinite"): fit(m, method, features=x, **quiet)


program = """
import sys, numpy as np
from spike_ppl.inference import fit
from spike_ppl.models import gmm
n = int(sys.argv[1])
rng = np.random.default_rng(n)
x = 5*rng.normal(size=(3, 2))[rng.integers(3, size=n)] + rng.normal(size=(n, 2))
f = fit(gmm(x, 3), "vb", draws=2, progressbar=False)
f = fit(gmm(x, 3), "gibbs", draws=2, tune=1, chains=1, progressbar=False)
print(float(f["sample_stats"].lp[0, -1]))
"""

def test_what_one_process_compiled_the_next_one_finds(tmp_path):
    "A second process, with other data, adds nothing to the caches on disk."
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path/"numba"), "PYTENSOR_FLAGS": f"base_compiledir={tmp_path/'pytensor'}"}
    def run(n): return float(subprocess.run([sys.executable, "-c", program, str(n)], env=env, check=True, capture_output=True, text=True).stdout)
    def compiled(): return {str(p) for p in tmp_path.rglob("*") if p.suffix in (".nbc", ".nbi", ".so", ".pkl")}
    run(100)
    first = compiled()
    assert len(first) > 5
    run(170)
    assert compiled() == first


def test_all_rows_may_be_lazy_and_more_than_the_models(data):
    import dask.array
    x = np.concatenate([np.asarray(data[0])]*4)
    m = gmm(np.asarray(data[0])[:100], 3, priors=dict(mean=0.))
    a = fit(m, "vb", features=dask.array.from_array(x, chunks=(333, 2)), draws=5, **quiet)
    b = fit(m, "vb", features=x, draws=5, **quiet)
    assert a["unit_probability"].sizes["spike"] == len(x)
    np.testing.assert_allclose(a["posterior"].means, b["posterior"].means)


def test_errors_say_what_to_do(model, data):
    with pytest.raises(ValueError, match="'gibbs', 'vb', 'nuts', 'advi'"): fit(model, "em")
    with pytest.raises(ValueError, match="draws=0"): fit(model, "vb", draws=0)
    with pytest.raises(ValueError, match="2 features"): Spikes(np.zeros((3, 5))).soft(units(2, 2, False))


def test_start_partition_covers_the_clusters():
    x, labels = toy(400, 6, 3, seed=2)
    z = start_partition(np.asarray(x), 6, 0)
    assert z.shape == (400,) and len(np.unique(z)) == 6
    np.testing.assert_array_equal(z, start_partition(np.asarray(x), 6, 0))


# ---- models that people write in notebooks
y7 = np.array([-2., -1.6, -1.9, 1.5, 2.2, 1.9, .1])

def two_units(observed=y7, potential=None, **kw):
    with pm.Model() as m:
        z = pm.Categorical("z", pm.Dirichlet("p", [1., 1.]), **(kw or dict(shape=len(observed))))
        mu = pm.Normal("mu", 0, 2, shape=2)
        if potential: pm.Potential("potential", potential(mu))
        pm.Normal("y", mu[z], .7, observed=observed)
    return m

def test_units_whose_means_repel_each_other_are_sampled():
    m = two_units(potential=lambda mu: -.5*(mu[1] - mu[0] - 3)**2)
    assert parts(derive(m)).unit == () and derive(m).family["mu"].name == "MvNormal"      # no row of mu has a conditional of its own
    f = fit(m, "gibbs", draws=100, tune=20, chains=1, **quiet)
    assert np.isfinite(f.posterior["mu"]).all() and f.attrs["moves"].startswith("off: no variable belongs to one unit alone")

def test_the_missing_value_of_a_spike_is_kept_when_assignments_are_summed_out():
    gap = y7.copy(); gap[2] = np.nan
    with pytest.warns(Warning, match="impute|[Mm]issing|missing"): m = two_units(np.ma.masked_invalid(gap), shape=7)
    point = dict(p_simplex__=np.array([.3]), mu=np.array([-1.5, 1.]), y_unobserved=np.array([.4]))
    small = marginal(m)
    value = lambda **new: float(small.compile_logp(jacobian=False)({**point, **new}))
    density = lambda y: logsumexp(np.log(small.rvs_to_transforms[small["p"]].backward(pt.as_tensor([.3])).eval()) - .5*((y - point["mu"])/.7)**2)
    assert np.isclose(value() - value(y_unobserved=np.array([-1.])), density(.4) - density(-1.))

def test_a_model_without_assignments_and_one_with_two_for_each_spike():
    with pm.Model() as plain:
        mu, t = pm.Normal("mu", 0, 3), pm.Gamma("t", 2, 2)
        pm.Normal("y", mu, tau=t, observed=y7)
    f = fit(plain, "gibbs", draws=50, tune=10, chains=1, **quiet)
    assert abs(float(f.posterior["mu"].mean())) < 1.5
    f = fit(two_units(np.stack([y7, -y7], 1), shape=(7, 2)), "gibbs", draws=50, tune=50, chains=1, **quiet)
    z = f.posterior["z"].values[0]
    assert z.shape == (50, 7, 2) and (z[:, 0, 0] != z[:, 0, 1]).mean() > .9

def test_variational_bayes_starts_from_units_that_differ():
    m = two_units()
    with m:
        kind, rate = pm.Categorical("kind", pm.Dirichlet("q", [1., 1.]), shape=8), pm.Gamma("rate", 1., .3, shape=2)
        pm.Poisson("count", rate[kind], observed=[1, 0, 2, 1, 7, 9, 8, 4])
    f = fit(m, "vb", draws=100, **quiet)
    assert all(np.ptp(f.posterior[k].mean(("chain", "draw")).values) > 2 for k in ("mu", "rate"))

def test_other_rows_are_refused_where_pymc_samples(model, data):
    with pytest.raises(ValueError, match="features= cannot stand in"): fit(model, "nuts", features=np.r_[data[0].values, data[0].values], draws=2, tune=2, chains=1, **quiet)
