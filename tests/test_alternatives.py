"""Answers beside the best one: their evidence against a grid and against sequential Monte Carlo, their probabilities by hand, and what a result makes of them."""
import warnings
import numpy as np, pymc as pm, pytest, xarray as xr
from scipy.special import expit, logsumexp
from spike_ppl.alternatives import Answer, Location, _Around, answers, exchangeable, missed, weigh
from spike_ppl.closed_forms import closed_form, parts
from spike_ppl.conjugate import derive
from spike_ppl.criticism import calibration, posterior_predictive, verdict
from spike_ppl.inference import fit, predict
from spike_ppl.models import dpmm, gmm
from spike_ppl.partition import assignment_draws, certainty, coclustering, n_units, relabel
from spike_ppl.variational import Subset

quiet = dict(progressbar=False)

def two(gap, n=120, d=1, seed=2):
    "n spikes of two units `gap` sd apart along the first feature."
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal([side*gap/2] + [0]*(d - 1), 1., (n // 2, d)) for side in (-1, 1)])

def subset(model, x, labels, passes=2000, tolerance=1e-9):
    "The optimum that coordinate ascent reaches from these labels."
    d = closed_form(derive(model))
    local = Subset(d, x, parts(d))
    return local, local.passes(local.at(np.eye(d.n_units)[labels]), passes, tolerance)

def means_and_variances(x):
    with pm.Model() as m:
        means, variances = pm.Normal("means", 0, 3, shape=(2, 1)), pm.InverseGamma("variances", 3, 2, shape=(2, 1))
        z = pm.Categorical("z", np.ones(2)/2, shape=len(x))
        pm.Normal("x", means[z], pm.math.sqrt(variances[z]), observed=x)
    return m

@pytest.mark.parametrize("gap", [2.5, 3.5])
def test_the_corrected_bound_is_the_evidence(gap):
    "Two means and two variances: PyMC's sequential Monte Carlo, which knows nothing of factors, has the same evidence; the bound has not."
    x = two(gap)
    local, state = subset(means_and_variances(x), x, (x[:, 0] > 0).astype(int))
    with pm.Model():
        mu, v = pm.Normal("mu", 0, 3, shape=2), pm.InverseGamma("v", 3, 2, shape=2)
        pm.Mixture("x", [.5, .5], pm.Normal.dist(mu[None], pm.math.sqrt(v)[None]), observed=x[:, 0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            t = pm.sample_smc(1000, chains=2, cores=1, random_seed=1, progressbar=False)
    evidence = np.mean([np.ravel(c)[-1] for c in t["sample_stats"]["log_marginal_likelihood"].values])
    bound, more = state.elbo + np.log(2), missed(local, state, (0, 1))
    assert evidence - bound > .7 and abs(bound + more - evidence) < .2

@pytest.mark.parametrize("model", [lambda x: gmm(x, 3), lambda x: gmm(x, 3, covariance="full"), means_and_variances])
def test_a_location_moves_and_is_read_back(model):
    x = two(3., d=1 if model is means_and_variances else 3)
    local, state = subset(model(x), x, (x[:, 0] > 0).astype(int), 20)
    rng, seen = np.random.default_rng(0), 0
    for name in local.roles.unit:
        place = Location(local.d.family[name], state.q[name], 1)
        by = .1*rng.normal(size=place.size)
        q = place.moved(by, state.q[name])
        assert np.allclose(place.read(q), by, atol=1e-8 if place.name == "MvNormal" else .02)
        for old, new in zip(state.q[name], q): assert np.array_equal(np.asarray(old)[[0, *range(2, len(old))]] if np.ndim(old) else old, np.asarray(new)[[0, *range(2, len(new))]] if np.ndim(new) else new)
        seen += 1
    assert seen == 2

def test_a_step_is_one_sd():
    "Draws of a factor scatter by one unit of its location."
    x = two(3., 400, 2)
    local, state = subset(gmm(x, 2, covariance="full"), x, (x[:, 0] > 0).astype(int), 50)
    rng = np.random.default_rng(0)
    for name in local.roles.unit:
        family, q = local.d.family[name], state.q[name]
        place, seen = Location(family, q, 0), []
        for _ in range(1000):
            v = family.draw(q, rng)[0]
            other = (q[0], q[1].copy())                                         # the factor whose mean the draw is
            other[1][0] = q[0][0] @ v if place.name == "MvNormal" else q[0][0]*np.linalg.inv(v)
            seen.append(place.read(other))
        assert np.allclose(np.std(seen, 0), 1, atol=.15), name

def test_probing_agrees_with_columns():
    x = two(2.5, 300, 6)
    local, state = subset(gmm(x, 3, covariance="full"), x, (x[:, 0] > 0).astype(int), 500, 1e-7)
    around = _Around(local, state, (0, 1))
    matrices = [n for n in around.names if local.d.family[n].name == "Wishart"]
    assert around.exact(matrices) > 3 and abs(around.probed(matrices) - around.exact(matrices)) < .6
    assert abs(missed(local, state, (0, 1), columns=0) - missed(local, state, (0, 1), columns=1000)) < 1

def test_names_are_counted_where_they_are_free():
    x = two(6., 60, 2)
    z = (x[:, 0] > 0).astype(int)
    assert exchangeable(*subset(gmm(x, 5), x, z, 50))
    assert not exchangeable(*subset(gmm(x, 2), x, z, 50))                      # no unit is out of use
    assert not exchangeable(*subset(dpmm(x, 5), x, z, 50))

def test_probabilities_by_hand():
    rng, state = np.random.default_rng(0), None
    flat, other = np.zeros(200), np.full(200, .1)
    by = lambda bound, density: Answer("", state, bound, 0., 0., density)
    assert np.allclose(weigh([by(0., flat), by(-2., other)]), [expit(2.), expit(-2.)])          # a difference that is the same for all spikes does not vary
    rough = rng.normal(size=200); rough -= rough.mean()
    p = weigh([by(0., flat), by(-5., rough)], 1, 20_000)[1]
    exact = expit(-5 + np.sqrt((rough**2).sum())*rng.standard_normal(400_000)).mean()           # the bootstrap's sum is nearly Normal
    assert abs(p - exact) < .02 and p > .3
    assert np.array_equal(weigh([by(0., flat), by(-5., rough)], 1), weigh([by(0., flat), by(-5., rough)], 1))

@pytest.fixture(scope="module")
def near():
    x = xr.DataArray(two(2.8, 300, 2, 3), dims=("spike", "feature"), coords=dict(feature=["a", "b"]))
    return x, fit(gmm(x, 6, covariance="full"), "vb", draws=400, seed=1, alternatives=4, **quiet)

def test_what_the_result_holds(near):
    x, f = near
    ds = f["alternatives"].to_dataset()
    p = ds.probability.values
    assert len(p) > 1 and np.isclose(p.sum(), 1) and ds.move.values[0] == "" and np.allclose(ds.evidence, ds.bound + ds.missed + ds.namings)
    assert ds.evidence.values.argmax() == 0
    assert ds.unit_probability.dims == ("answer", "spike", "unit") and np.allclose(ds.unit_probability.sum("unit"), 1, atol=1e-5)
    assert np.allclose(f["unit_probability"].unit_probability, (ds.unit_probability*ds.probability).sum("answer"), atol=1e-6)
    share = np.bincount(f["sample_stats"]["answer"].values.ravel(), minlength=len(p))/400
    assert np.allclose(share, p, atol=.1)
    inside = f["posterior"]["assignments"].values[0]
    for a in range(len(p)):                                                                       # every draw is of its answer
        rows = inside[f["sample_stats"]["answer"].values[0] == a]
        often = (rows[:, :, None] == np.arange(6)).mean(0)
        assert np.abs(often - ds.unit_probability[a].values).mean() < .05

def test_partitions_are_drawn_answer_by_answer(near):
    "The number of units is that of an answer; with spikes drawn independently from the mean probabilities it would be the larger number in every draw."
    x, f = near
    ds = f["alternatives"].to_dataset()
    own = [int((p.sum("spike") > .5).sum()) for p in ds.unit_probability]
    assert len(set(own)) > 1
    pmf = n_units(f)
    for k in set(own): assert abs(float(pmf.sel(n_units=k)) - ds.probability.values[np.array(own) == k].sum()) < .08
    mean = sum(float(w)*(p.values @ p.values.T) for w, p in zip(ds.probability, ds.unit_probability))
    seen = coclustering(f, spikes=np.arange(40)).values
    assert np.abs(seen - mean[:40, :40])[~np.eye(40, dtype=bool)].max() < .12
    assert certainty(f).sizes["unit"] >= 1 and assignment_draws(f).sizes["spike"] == len(x)

def test_a_result_can_be_used(near, tmp_path):
    x, f = near
    f.to_netcdf(tmp_path/"fit.nc")
    with xr.open_datatree(tmp_path/"fit.nc") as back: assert np.array_equal(n_units(back).values, n_units(f).values)
    r = relabel(f)
    assert np.allclose(r["unit_probability"].unit_probability, (r["alternatives"].unit_probability*r["alternatives"].probability).sum("answer"), atol=1e-6)
    assert posterior_predictive(f, draws=5, seed=0) is not None and predict(f, x.values[:3]) is not None
    assert "one optimum" not in str(verdict(f))
    assert fit(gmm(x, 6, covariance="full"), "vb", resume=f, **quiet).attrs["method"] == "vb"

def test_the_same_seed_gives_the_same_answers(near):
    x, f = near
    again = fit(gmm(x, 6, covariance="full"), "vb", draws=400, seed=1, alternatives=4, cores=2, **quiet)
    for group in ("posterior", "alternatives"): xr.testing.assert_identical(f[group].to_dataset(), again[group].to_dataset())

def test_clear_units_have_no_other_answer():
    x = two(12., 200, 2)
    f = fit(gmm(x, 6, covariance="full", priors=dict(weight_concentration=.02)), "vb", seed=0, alternatives=4, **quiet)
    assert float(n_units(f, min_size=8).sel(n_units=2)) > .85

def test_no_answers_where_there_are_none_to_give():
    x = two(3., 100, 2)
    assert "alternatives" not in fit(gmm(x, 4), "vb", seed=0, alternatives=4, moves=False, **quiet).children
    with pytest.raises(ValueError, match="alternatives=-1"): fit(gmm(x, 4), "vb", alternatives=-1, **quiet)

def test_a_merge_that_only_long_passes_find():
    "One round unit cut in two across its middle: the first passes make the union worse, the optimum is better, and the answer is one unit."
    rng = np.random.default_rng(5)
    x = rng.normal(size=(400, 2))*[3., 1.]
    local, state = subset(gmm(x, 6, covariance="full"), x, (x[:, 0] > 0).astype(int), 3)
    found, p = answers(local, state, 4)
    assert (local.sizes(found[0].state.s) > .5).sum() == 1 and p[0] > .8

@pytest.mark.slow
def test_agreement_with_gibbs():
    "The number of units (of eight spikes or more) has about the probabilities that exact sampling gives it, where variational Bayes alone is certain."
    x = two(2.8, 300, 2, 3)
    m = gmm(x, 6, covariance="full", priors=dict(weight_concentration=.02))
    gibbs, alone, weighed = (n_units(fit(m, method, seed=0, draws=2000, **how, **quiet), min_size=8) for method, how in (("gibbs", {}), ("vb", {}), ("vb", dict(alternatives=4))))
    assert .1 < float(gibbs.sel(n_units=2)) < .9 and alone.max() == 1
    for n in (1, 2): assert abs(float(weighed.sel(n_units=n)) - float(gibbs.sel(n_units=n))) < .15

@pytest.mark.slow
def test_honest_about_one_or_two_units():
    "One unit or two, over many recordings: the probability given to the truth is higher than without other answers, and what is called probable is so about that often."
    said, alone, truth = [], [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        k, gap = 1 + seed % 2, rng.uniform(1.8, 3.2)
        x = two(gap, 300, 2, seed) if k == 2 else rng.normal(size=(300, 2))
        for out, a in ((said, 4), (alone, 0)):
            f = fit(gmm(x, 6, covariance="full"), "vb", draws=200, seed=seed, alternatives=a, **quiet)
            out.append(float(n_units(f).sel(n_units=slice(2, None)).sum()))
        truth.append(k == 2)
    said, alone, truth = np.array(said), np.array(alone), np.array(truth)
    log = lambda p: -np.mean(np.log(np.clip(np.where(truth, p, 1 - p), .01, None)))
    assert log(said) < log(alone)
    between = (said > .1) & (said < .9)
    assert between.sum() >= 5 and abs(said[between].mean() - truth[between].mean()) < .3

def test_an_interrupt_keeps_the_first_answer(monkeypatch):
    def interrupted(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr("spike_ppl.alternatives.missed", interrupted)
    x = two(2.8, 300, 2, 3)
    with pytest.warns(UserWarning, match="stopped early"): f = fit(gmm(x, 6, covariance="full"), "vb", draws=50, seed=1, alternatives=4, **quiet)
    assert "KeyboardInterrupt" in f.attrs["stopped"] and "alternatives" not in f.children
    assert np.allclose(f["unit_probability"].unit_probability.sum("unit"), 1) and float(n_units(f).sum()) == 1
