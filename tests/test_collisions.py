"""A model that asks two discrete questions of every spike, through every door that takes a fit."""
import numpy as np, pytest, xarray as xr
from sklearn.metrics import adjusted_rand_score
from spike_ppl import criticism, inference, partition
from spike_ppl.conjugate import derive
from spike_ppl.inference import fit, log_density, predict
from spike_ppl.models import collisions, toy


@pytest.fixture(scope="module")
def data():
    features, unit = toy(300, 3, 3, seed=2)
    rng = np.random.default_rng(5)
    hit = rng.random(300) < 1 / 6
    return features.copy(data=features.values + hit[:, None] * rng.normal(0, 5, (300, 3))), unit, hit

@pytest.fixture(scope="module")
def made(data): return fit(collisions(data[0], 6, kinds=0), "vb", draws=100, seed=0, progressbar=False)


def test_closed_forms_are_those_of_the_derived_functions(data):
    d = inference._fast(derive(collisions(data[0], 4, kinds=0)))
    assert d._checked >= {*d.parameters, "quadratic", "joint"} and (d.n_units, d.n_states) == (4, 8)


def test_closed_forms_know_means_that_add_up(data):
    d = inference._fast(derive(collisions(data[0], 3, kinds=4)))        # more kinds than units: the units are the assignments all the same
    assert d._checked >= {*d.parameters, "quadratic", "joint"} and (d.n_units, d.n_states) == (3, 18)
    assert {"means", "displacements"} <= set(d._means) and inference.parts(d).unit == ("means", "precisions")


def test_bound_rises_with_kinds_too(data):
    found = fit(collisions(data[0], 4, kinds=2), "vb", draws=20, seed=0, progressbar=False)
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
    model = collisions(data[0], 4, kinds=0)
    first = fit(model, "gibbs", draws=30, tune=30, chains=1, seed=0, progressbar=False)
    assert first.attrs["moves"].startswith("off: each spike has several")
    more = fit(model, "gibbs", draws=20, chains=1, seed=0, resume=first, progressbar=False)
    assert more.posterior.sizes["draw"] == 50 and {"assignments", "collided"} <= set(more.posterior)
    start = fit(model, "gibbs", draws=2, tune=0, chains=1, seed=0, progressbar=False,
                start={k: first.posterior[k].values[0, -1] for k in ("means", "assignments", "collided")})
    assert start.posterior.sizes["draw"] == 2
    counted = fit(model, "gibbs", draws=10, tune=5, chains=1, seed=0, keep_assignments="counts", progressbar=False)["unit_probability"]
    assert counted["unit_probability"].sizes["unit"] == 4 and np.allclose(counted["collided_probability"].sum("collided_value"), 1)
