"""A model that asks two discrete questions of every spike, through every door that takes a fit."""
import numpy as np, pymc as pm, pytest, xarray as xr
from sklearn.metrics import adjusted_rand_score
from spike_ppl import criticism, models, partition
from spike_ppl.conjugate import derive
from spike_ppl.passes import Spikes, hard_statistics
from spike_ppl import closed_forms
from spike_ppl.closed_forms import closed_form, parts, recognised
from spike_ppl.gibbs import Sweep, gibbs_step
from spike_ppl.inference import fit, log_density, predict
from spike_ppl.models import collisions, gmm, toy


# units with covariances of their own, as these tests' data have them; the default, in which they share their noise and vary in directions, has its own test below
def own_covariances(x, n_units, kinds=12): return collisions(x, n_units, kinds=kinds, directions=0, priors=dict(common_dof=np.shape(x)[1] + 32.))


@pytest.fixture(scope="module")
def data():
    features, unit = toy(300, 3, 3, seed=2)
    rng = np.random.default_rng(5)
    hit = rng.random(300) < 1 / 6
    return features.copy(data=features.values + hit[:, None] * rng.normal(0, 5, (300, 3))), unit, hit

@pytest.fixture(scope="module")
def made(data): return fit(own_covariances(data[0], 6, kinds=0), "vb", draws=100, seed=0, progressbar=False)


def test_closed_forms_are_those_of_the_derived_functions(data):
    d = closed_form(derive(own_covariances(data[0], 4, kinds=0)))
    assert d._checked >= {*d.parameters, "quadratic", "joint"} and (d.n_units, d.n_states) == (4, 8)


def test_closed_forms_know_means_that_add_up(data):
    d = closed_form(derive(own_covariances(data[0], 3, kinds=4)))        # more kinds than units: the units are the assignments all the same
    assert d._checked >= {*d.parameters, "quadratic", "joint"} and (d.n_units, d.n_states) == (3, 18)
    assert {"means", "displacements"} <= set(d._means) and parts(d).unit == ("means", "precisions")


def test_bound_rises_with_kinds_too(data):
    found = fit(own_covariances(data[0], 4, kinds=2), "vb", draws=20, seed=0, progressbar=False)
    assert np.all(np.diff(found["optimisation"]["elbo"]) >= -1e-6)
    assert found["unit_probability"]["collided_probability"].shape == (300, 4) and found.posterior["displacements"].shape == (1, 20, 2, 3)


def test_units_and_collisions_are_found(made, data):
    features, unit, hit = data
    p = made["unit_probability"]
    assert p["unit_probability"].dims == ("spike", "unit") and np.allclose(p["unit_probability"].sum("unit"), 1)
    z = p["unit_probability"].values.argmax(1)
    assert (np.bincount(z) > 3).sum() == 3 and adjusted_rand_score(unit[~hit], z[~hit]) > .95
    seen = p["collided_probability"].sel(collided_value=1).values
    assert seen[hit].mean() > .75 and seen[~hit].mean() < .1
    assert np.all(np.diff(made["optimisation"]["elbo"]) >= -1e-6)
    assert set(np.unique(made.posterior["collided"])) <= {0, 1} and made.posterior["assignments"].max() < 6
    assert criticism.calibration(made, unit).attrs["ece"] < .03


@pytest.mark.filterwarnings("ignore::spike_ppl.criticism.ParetoWarning")
def test_prediction_restores_the_model_from_the_file(made, data, tmp_path):
    features = data[0]
    made.to_netcdf(tmp_path / "fit.nc")
    back = xr.open_datatree(tmp_path / "fit.nc")
    p = predict(back, features[:40])
    assert p.sizes["unit"] == 6 and np.allclose(p.sum("unit"), 1)
    assert np.abs(p.values - made["unit_probability"]["unit_probability"].values[:40]).max() < .1
    assert np.isfinite(log_density(back, features[:40])).all()
    named = partition.relabel(made)
    assert np.allclose(log_density(named, features[:40]), log_density(made, features[:40]), atol=1e-8)      # names change no density
    assert np.isfinite(criticism.loo(made, 50).elpd)


def test_gibbs_keeps_both_answers_and_goes_on(data):
    model = own_covariances(data[0], 4, kinds=0)
    first = fit(model, "gibbs", draws=30, tune=30, chains=1, seed=0, progressbar=False)
    assert first.attrs["moves"].startswith("off: each spike has several")
    more = fit(model, "gibbs", draws=20, chains=1, seed=0, resume=first, progressbar=False)
    assert more.posterior.sizes["draw"] == 50 and {"assignments", "collided"} <= set(more.posterior)
    start = fit(model, "gibbs", draws=2, tune=0, chains=1, seed=0, progressbar=False,
                start={k: first.posterior[k].values[0, -1] for k in ("means", "assignments", "collided")})
    assert start.posterior.sizes["draw"] == 2
    counted = fit(model, "gibbs", draws=10, tune=5, chains=1, seed=0, keep_assignments="counts", progressbar=False)["unit_probability"]
    assert counted["unit_probability"].sizes["unit"] == 4 and np.allclose(counted["collided_probability"].sum("collided_value"), 1)


# ---- kinds of collision
def hit_units(seed, n=600, d=3, kinds=2, share=.2):
    "Three well separated units; a fifth of their spikes collided, broadly or displaced in one of some ways that all units share."
    rng = np.random.default_rng(seed)
    while True:
        means = rng.normal(0, 8, (3, d))
        if np.linalg.norm(means[:, None] - means, axis=-1)[np.triu_indices(3, 1)].min() > 6: break
    displacement = rng.normal(0, 5, (kinds, d))
    unit, hit = rng.integers(3, size=n), np.where(rng.random(n) < share, 1 + rng.integers(kinds + 1, size=n), 0)
    x = means[unit] + rng.normal(size=(n, d))*rng.uniform(.7, 1.2, (3, d))[unit]
    broad = means[unit] + rng.multivariate_normal(np.zeros(d), np.cov(means.T) + np.eye(d), n)
    x[hit == 1] = broad[hit == 1]
    for k in range(kinds): x[hit == 2 + k] = (means[unit] + displacement[k] + 1.5*rng.normal(size=(n, d)))[hit == 2 + k]
    return x, unit, hit

@pytest.mark.parametrize("seed", [0, 3, 9])      # from 3 and 9 a displaced group starts as a unit
def test_units_are_recovered_through_two_kinds_of_collision(seed):
    x, unit, hit = hit_units(seed)
    p = fit(own_covariances(x, 6, kinds=2), "vb", draws=20, seed=0, progressbar=False)["unit_probability"]
    z, c = p["unit_probability"].values.argmax(1), p["collided_probability"].values.argmax(1)
    assert (np.bincount(z) > 3).sum() == 3 and adjusted_rand_score(unit, z) > .9 and adjusted_rand_score(unit[hit == 0], z[hit == 0]) > .98
    assert ((c > 0) == (hit > 0)).mean() > .95


def test_gibbs_draws_kinds_too():
    x, unit, hit = hit_units(1, n=60, d=2)
    found = fit(own_covariances(x, 4, kinds=2), "gibbs", draws=60, tune=60, chains=2, seed=0, progressbar=False)
    post = found.posterior
    assert post["displacements"].shape == (2, 60, 2, 2) and post["kind_precisions"].shape == (2, 60, 2, 2, 2) and post["kind_shares"].shape == (2, 60, 3)
    assert set(np.unique(post["collided"])) == {0, 1, 2, 3} and np.isfinite(found.sample_stats["lp"]).all()
    z = post["assignments"].values[0, -1]
    assert adjusted_rand_score(unit[hit == 0], z[hit == 0]) > .8


def small(n=10, d=2, seed=0):
    "Collisions of two kinds with priors weak enough that a few spikes move every variable."
    x = np.random.default_rng(seed).normal(size=(n, d))*[2., 1.]
    dof = dict.fromkeys(("common_dof", "collision_dof", "kind_dof"), d + 6.)
    return collisions(x, 2, kinds=2, priors=dict(mean=0., mean_sd=2., variance_scale=1., collision_odds=2., **dof))

def summaries(p, n_units):
    "Numbers that the joint distribution fixes, from every variable and its ties to the others."
    out, size = [], lambda k: np.log(np.linalg.det(p[k])).mean()
    for k in ("common_covariance", "precisions", "collision_precision", "kind_precisions"): out += [size(k), p[k][..., 0, 1].mean(), np.trace(p[k], axis1=-2, axis2=-1).mean()**.5]
    for k in ("means", "displacements"): out += [p[k].mean(), (p[k]**2).mean()]
    z, c = np.asarray(p["assignments"]), np.asarray(p["collided"])
    out += [p["collided_fraction"], (c > 0).mean(), (c > 0).mean()**2, (c == 1).mean(), (c == 2).mean(), p["kind_shares"][0], (p["kind_shares"]**2).sum(),
            p["weights"][0], (p["weights"]**2).sum(), (np.bincount(z, minlength=n_units)/len(z))@(np.bincount(z, minlength=n_units)/len(z)), p["means"][z].mean(), (p["means"][z]**2*(c > 0)[:, None]).mean()]
    return np.array(out, float)

def joint_distribution_score(model, sweeps, seed=0):
    "Geweke's test: alternate data given everything (drawn by PyMC) and a sweep given data; every variable must keep its prior."
    names = [v.name for v in model.free_RVs]
    prior = pm.draw([model[k] for k in names], sweeps, random_seed=seed)
    free = np.array([summaries(dict(zip(names, row)), 2) for row in zip(*prior)])
    fixed = pm.do(model, {k: v[0] for k, v in zip(names, prior)})
    data = pm.compile([], fixed["features"], random_seed=seed + 1)
    d, rng = closed_form(derive(model)), np.random.default_rng(seed + 2)
    point, out = {k: np.asarray(v[0]) for k, v in zip(names, prior)}, []
    for _ in range(sweeps):
        for k in names: fixed[k].set_value(np.asarray(point[k], fixed[k].dtype))
        x = data()
        joined = d.joined(point)
        s = hard_statistics(x, joined[d.assignments], d.n_states, d.structure == "full")
        after = gibbs_step(d, Spikes(x), Sweep(joined, s, np.nan), rng).point
        point = {**{k: v for k, v in after.items() if k != d.assignments}, **d.each(after[d.assignments])}
        out.append(summaries(point, 2))
    chain = np.array(out)
    blocks = np.array([b.mean(0) for b in np.array_split(chain, 40)])
    return (chain.mean(0) - free.mean(0))/np.sqrt(blocks.var(0, ddof=1)/40 + free.var(0)/len(free))

@pytest.mark.slow
def test_geweke_with_kinds():
    score = joint_distribution_score(small(), 4000)
    assert (np.abs(score) < 4.2).all() and np.mean(score**2) < 3, score


def test_units_that_vary_in_directions_of_their_own_stay_whole():
    rng = np.random.default_rng(4)
    means = np.array([[40., 0, 10, -5], [0, 9, 0, 3], [-4, 0, 8, 0]])
    unit = rng.integers(3, size=900)
    hit = rng.random(900) < .15
    x = means[unit]*(1 + .1*rng.normal(size=(900, 1))) + rng.normal(size=(900, 4)) + hit[:, None]*rng.normal(0, 6, (900, 4))      # the first varies by 4 noise sd
    found = fit(collisions(x, 8, kinds=2), "vb", draws=20, seed=0, progressbar=False)
    z = found["unit_probability"]["unit_probability"].values.argmax(1)
    assert (np.bincount(z) > 3).sum() == 3 and adjusted_rand_score(unit, z) > .95
    biggest = np.argmax(found.posterior["means"].mean(("chain", "draw")).values[:, 0])
    along = np.linalg.eigvalsh(found.posterior["covariances"].mean(("chain", "draw")).values[biggest])
    assert 10 < along[-1] < 24 and along[:-1].max() < 2.5                                          # variance of its gain: (.1 |mean|)^2 = 17


def collinear(cond, d=4, seed=1, n=200):
    "Features whose covariance has that condition number, and a covariance that has it."
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    wide = turn*np.geomspace(1, 1/cond, d) @ turn.T
    x = np.asarray(toy(n, 3, d, seed=1)[0].values)
    own = np.linalg.cholesky(np.cov(x.T))
    return (x - x.mean(0)) @ np.linalg.inv(own).T @ np.linalg.cholesky(wide).T, (wide + wide.T)/2


@pytest.mark.parametrize("cond", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("seed", range(4))
def test_the_broad_covariances_stay_covariances(cond, seed):
    x, wide = collinear(cond, seed=seed)
    mine = np.linalg.inv(np.linalg.cholesky(wide))
    rounded = models._round_covariance(np.cov(x.T), "it")
    assert np.array_equal(rounded, rounded.T) and abs(np.linalg.eigvalsh(mine @ rounded @ mine.T) - 1).max() < .5
    _, cloud = models._outliers(x, "full", models.default_priors(x, 3))
    assert np.linalg.eigvalsh(mine @ cloud @ mine.T).min() > 2                      # four times as wide

def test_three_digits_where_they_are_enough():
    wide = np.array([[1.23456, .5], [.5, 3.]])
    assert np.array_equal(models._round_covariance(wide, "it"), [[1.23, .5], [.5, 3.]])

def test_features_that_say_the_same_are_refused_by_collisions():
    x, rng = toy(100, 3, 3, seed=1)[0].values, np.random.default_rng(0)
    for same in (np.c_[x, x[:, 0] - 2*x[:, 1]], x[:3]):
        with pytest.raises(ValueError, match="covariance of all spikes is singular"): collisions(same, 3)
    with pytest.raises(ValueError, match="is nearly singular: a weighted sum of the features is nearly the same"): collisions(np.c_[x, x[:, 0] + x.std() * rng.normal(size=100) / 1000], 3)
    gmm(np.c_[x, x[:, 0]], 3, covariance="full", outliers=True)                    # whose outliers are made a little wider

def test_closed_forms_that_other_data_had_are_not_taken_for_granted(monkeypatch, data):
    "A structure is compared once and remembered; where the numbers of these data do not show it, the derived functions are used."
    assert recognised(closed_form(derive(own_covariances(data[0], 4, kinds=0))))
    monkeypatch.setattr(closed_forms._Factors, "_find", lambda self: setattr(self, "_ok", False))
    monkeypatch.setattr(closed_forms._Gaussian, "_find", lambda self: setattr(self, "_ok", False))
    d = closed_form(derive(own_covariances(data[0], 4, kinds=0)))
    assert not recognised(d)
    p = d.initial(0)
    for k in d.parameters: d.natural(k, p, d.complete(p, hard_statistics(np.asarray(data[0]), np.zeros(len(data[0]), int), d.n_states, True), np.random.default_rng(0)))

def test_collisions_of_nearly_collinear_features_are_fitted():
    x, _ = collinear(1e4)
    found = fit(collisions(x, 3, kinds=0, directions=0), "vb", draws=5, starts=1, progressbar=False)
    assert np.isfinite(log_density(found, x)).all()

@pytest.mark.parametrize("d", [8, 20])
def test_units_may_have_an_ill_conditioned_scale(d):
    x, wide = collinear(1e6, d=d)
    found = fit(gmm(x, 3, covariance="full", priors=dict(variance_scale=wide)), "vb", draws=5, starts=1, progressbar=False)
    assert np.isfinite(log_density(found, x)).all()
