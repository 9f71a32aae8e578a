"""Complete conditionals of models that nobody wrote inference for, checked against textbook parameters and the model's own log joint."""
import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from pytensor.scalar.basic import Second
from pytensor.tensor.elemwise import Elemwise
from scipy import stats

from spike_ppl import conjugate, plan
from spike_ppl.conjugate import NotConjugate, complete_conditional, conjugacy, derive
from spike_ppl.joint import AS_WRITTEN, quick_function, untransformed


@pytest.fixture
def x():
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(-2, 1, (40, 3)), rng.normal(2, .5, (35, 3))])


def families(model):
    return {rv.name: complete_conditional(model, rv).family for rv in model.free_RVs}


def test_normal_mean_and_gamma_precision_are_the_textbook_ones(x):
    y = x[:, 0]
    with pm.Model() as model:
        mu = pm.Normal("mu", 1., 2.)
        tau = pm.Gamma("tau", 3., 2.)
        pm.Normal("y", mu, tau=tau, observed=y)
    c = complete_conditional(model, "mu")
    P, h = c.natural({"tau": 1.7})
    assert c.family == "Normal" and np.allclose(P, .25 + len(y) * 1.7) and np.allclose(h, .25 + 1.7 * y.sum())
    c = complete_conditional(model, "tau")
    a, b = c.natural({"mu": .3})
    assert c.family == "Gamma" and np.allclose(a, 3 + len(y) / 2) and np.allclose(b, 2 + ((y - .3) ** 2).sum() / 2)
    draws = np.array([c.draw({"mu": .3}, seed) for seed in range(2000)])
    assert stats.kstest(draws, stats.gamma(a, scale=1 / b).cdf).pvalue > 1e-3
    assert np.isclose(c.logp(.8, {"mu": .3}), stats.gamma(a, scale=1 / b).logpdf(.8))
    assert np.isclose(c.mean({"mu": .3}), a / b) and c.expected_statistics({"mu": .3}).keys() == {"log", "x"}


def test_linear_regression_couples_the_coefficients(x):
    rng = np.random.default_rng(1)
    X, y = x, rng.normal(size=len(x))
    with pm.Model() as model:
        beta = pm.Normal("beta", 0, 3., shape=3)
        tau = pm.Gamma("tau", 2., 2.)
        pm.Normal("y", X @ beta, tau=tau, observed=y)
    c = complete_conditional(model, "beta")
    P, h = c.natural({"tau": 1.3})
    assert c.family == "MvNormal" and np.allclose(P, np.eye(3) / 9 + 1.3 * X.T @ X) and np.allclose(h, 1.3 * X.T @ y)
    assert complete_conditional(model, "tau").family == "Gamma"


def mixture(x, K=3, **kw):
    """Weights, means and variances with hierarchical priors on top."""
    n, d = x.shape
    with pm.Model(coords={"unit": range(K), "spike": range(n), "feature": range(d)}) as model:
        w = pm.Dirichlet("w", np.full(K, 1.), dims="unit")
        centre = pm.Normal("centre", 0., 5., dims="feature")
        rate = pm.Gamma("rate", 2., 2.)
        mu = pm.Normal("mu", centre, 3., dims=("unit", "feature"))
        var = pm.InverseGamma("var", 3., rate, dims=("unit", "feature"))
        z = pm.Categorical("z", w, dims="spike")
        pm.Normal("y", mu[z], pt.sqrt(var)[z], observed=x, dims=("spike", "feature"))
    return model


def test_hierarchical_mixture(x):
    model = mixture(x)
    assert families(model) == dict(w="Dirichlet", centre="Normal", rate="Gamma", mu="Normal", var="InverseGamma", z="Categorical")
    z = np.random.default_rng(2).integers(3, size=len(x))
    assert np.allclose(complete_conditional(model, "w").natural(dict(z=z))[0], 1 + np.bincount(z, minlength=3))
    var = np.full((3, 3), .7)
    a, b = complete_conditional(model, "rate").natural(dict(var=var))
    assert np.allclose(a, 2 + 3 * 9) and np.allclose(b, 2 + (1 / var).sum())


def test_the_assignments_are_enumerated(x):
    model = mixture(x)
    c = complete_conditional(model, "z")
    rng = np.random.default_rng(3)
    point = dict(w=np.array([.2, .3, .5]), mu=rng.normal(size=(3, 3)), var=rng.gamma(3., size=(3, 3)))
    logits, = c.natural(point)
    expected = np.log(point["w"]) + stats.norm(point["mu"], np.sqrt(point["var"])).logpdf(x[:, None, :]).sum(-1)
    assert c.family == "Categorical" and np.allclose(logits, expected)


def test_sticks_and_concentration(x):
    K = 4
    with pm.Model() as model:
        alpha = pm.Gamma("alpha", 1., 1.)
        sticks = pm.Beta("sticks", 1., alpha, shape=K - 1)
        w = pm.Deterministic("w", pt.concatenate([sticks, pt.ones(1)]) * pt.concatenate([pt.ones(1), pt.cumprod(1 - sticks)]))
        mu = pm.Normal("mu", 0, 3, shape=K)
        z = pm.Categorical("z", w, shape=len(x))
        pm.Normal("y", mu[z], 1., observed=x[:, 0])
    z = np.random.default_rng(4).integers(K, size=len(x))
    n = np.bincount(z, minlength=K)
    a, b = complete_conditional(model, "sticks").natural(dict(alpha=1., mu=np.zeros(K), z=z))     # at alpha = 1 PyMC's logpow derivative is wrong
    assert np.allclose(a, 1 + n[:-1]) and np.allclose(b, 1 + n[::-1].cumsum()[::-1][1:])
    s = np.array([.2, .5, .1])
    shape, rate = complete_conditional(model, "alpha").natural(dict(sticks=s))
    assert np.allclose(shape, 1 + 3) and np.allclose(rate, 1 - np.log1p(-s).sum())


def test_a_drawn_stick_is_never_exactly_0_or_1(x):
    with pm.Model() as model:
        v = pm.Beta("v", .001, .001, shape=200)
        pm.Bernoulli("y", v, observed=np.ones(200, int))
    draw = complete_conditional(model, "v").draw({}, 0)
    assert ((draw > 0) & (draw < 1)).all() and np.isfinite(complete_conditional(model, "v").logp(draw, {}))


@pytest.mark.parametrize("form", ["cov", "chol"])
def test_full_covariances_by_wishart_precisions(x, form):
    K, d = 2, 3
    with pm.Model() as model:
        w = pm.Dirichlet("w", np.ones(K))
        mu = pm.Normal("mu", 0, 3, shape=(K, d))
        P = pm.Wishart("P", d + 2., np.eye(d) / 5, shape=(K, d, d))
        z = pm.Categorical("z", w, shape=len(x))
        how = dict(cov=pt.linalg.inv(P)[z]) if form == "cov" else dict(chol=pt.linalg.cholesky(pt.linalg.inv(P))[z])
        pm.MvNormal("y", mu[z], **how, observed=x)
    z = np.r_[np.zeros(40, int), np.ones(35, int)]
    m = np.stack([x[z == k].mean(0) for k in range(K)]) + .1
    c = complete_conditional(model, "P")
    nu, B = c.natural(dict(mu=m, z=z))
    S = np.stack([(x[z == k] - m[k]).T @ (x[z == k] - m[k]) for k in range(K)])
    assert c.family == "Wishart" and np.allclose(nu, d + 2 + np.bincount(z)) and np.allclose(B, 5 * np.eye(d) + S)
    P = np.linalg.inv(np.stack([np.cov(x[z == k].T) for k in range(K)]))
    c = complete_conditional(model, "mu")
    precision, linear = c.natural(dict(P=P, z=z))
    n = np.bincount(z)[:, None, None]
    assert c.family == "MvNormal" and np.allclose(precision, np.eye(d) / 9 + n * P)
    assert np.allclose(linear, np.stack([P[k] @ x[z == k].sum(0) for k in range(K)]))
    d_ = derive(model)
    assert d_.lowered and d_.structure == "full"


@pytest.mark.parametrize("n", [3, 40])
def test_the_tau_trap_of_pymc_is_refused_by_name(x, n):
    with pm.Model() as model:                                  # n = d = 3: model.logp() is silently wrong; else it breaks
        P = pm.Wishart("P", 5., np.eye(3) / 5, shape=(2, 3, 3))
        z = pm.Categorical("z", np.ones(2) / 2, shape=n)
        pm.MvNormal("y", np.zeros(3), tau=P[z], observed=x[:n])
    with pytest.raises(ValueError, match=r"cov=pt.linalg.inv\(P\)\[z\]"): complete_conditional(model, "P")


def test_poisson_and_bernoulli_components():
    rng = np.random.default_rng(5)
    counts, hits = rng.poisson([2., 9.], size=(50, 2)), rng.integers(0, 2, size=(50, 4))
    with pm.Model() as model:
        w = pm.Dirichlet("w", np.ones(2))
        rate = pm.Gamma("rate", 2., 1., shape=(2, 2))
        p = pm.Beta("p", 1.5, 1.5, shape=(2, 4))
        z = pm.Categorical("z", w, shape=50)
        pm.Poisson("counts", rate[z], observed=counts)
        pm.Bernoulli("hits", p[z], observed=hits)
    assert families(model) == dict(w="Dirichlet", rate="Gamma", p="Beta", z="Categorical")
    z = rng.integers(2, size=50)
    a, b = complete_conditional(model, "p").natural(dict(z=z))
    n = np.bincount(z, minlength=2)[:, None]
    ones = np.stack([hits[z == k].sum(0) for k in range(2)])
    assert np.allclose(a, 1.5 + ones) and np.allclose(b, 1.5 + n - ones)


def test_variational_updates_without_lowering_never_lower_the_elbo():
    rng = np.random.default_rng(5)
    counts = rng.poisson(np.array([[2., 9.], [7., 1.]])[rng.integers(2, size=60)])
    with pm.Model() as model:
        w = pm.Dirichlet("w", np.ones(2))
        rate = pm.Gamma("rate", 2., 1., shape=(2, 2))
        z = pm.Categorical("z", w, shape=60)
        pm.Poisson("counts", rate[z], observed=counts)
    d = derive(model)
    assert not d.lowered and d.assignments == "z" and d.weights == "w"
    q = dict(w=(np.array([3., 2.]),), rate=(rng.gamma(5., size=(2, 2)), np.ones((2, 2))))
    elbo = []
    for _ in range(8):
        q["z"] = (d.expected_logits(q),)
        for name in d.parameters: q[name] = d.expected_natural(name, q)
        elbo.append(d.energy(q) + d.entropy(q))
    assert np.all(np.diff(elbo) > -1e-9) and elbo[-1] > elbo[0] + 1
    a, b = q["rate"]                                            # the textbook update: prior + responsibility-weighted counts
    r = d.family["z"].probabilities(q["z"])
    assert np.allclose(a, 2 + r.T @ counts) and np.allclose(b, 1 + r.sum(0)[:, None])


def test_long_sums_still_run():
    from spike_ppl import models
    x = np.random.default_rng(0).normal(size=(60, 4))
    d = derive(models.template_mixture(x, 2, derivative=np.eye(4, k=1) - np.eye(4, k=-1)), apart=True)      # gains and shifts as variables
    point = d.initial(0)
    q = {k: d.natural(k, point) for k in d.parameters}
    q[d.assignments] = (d.logits(point),)
    elbo = []
    for _ in range(3):
        for k in d.parameters: q[k] = d.expected_natural(k, q)
        q[d.assignments] = (d.expected_logits(q),)
        elbo.append(d.energy(q) + d.entropy(q))
    assert not d.others and np.all(np.diff(elbo) > -1e-8)


def test_functions_of_many_terms_are_rewritten_like_others():
    "Left as written, their fills ran element by element, and the fit of a mixture of twenty units did not end."
    from spike_ppl import models
    from spike_ppl.passes import hard_statistics
    x, rng = np.random.default_rng(0).normal(size=(60, 4)), np.random.default_rng(1)
    d = derive(models.mfm(x, 20, covariance="block", channels=[0, 0, 1, 1]))
    point, s = d.initial(0), hard_statistics(x, rng.integers(20, size=60), 20, d.structure == "full")
    q = {k: d.natural(k, point, s) for k in d.parameters}
    for k in d.parameters: d.expected_natural(k, q, s)
    assert np.isfinite(d.energy(q, s))
    nodes = [n for (_, mode), (fn, *_) in d.plan.compiled.items() if mode == "FAST_COMPILE" for n in fn.maker.fgraph.apply_nodes if isinstance(n.op, Elemwise)]
    assert max(len(n.inputs) for n in nodes) < 32 and sum(isinstance(n.op.scalar_op, Second) for n in nodes) < .05 * len(nodes)


def test_student_components_through_their_scale_mixture(x):
    n, d = x.shape
    with pm.Model() as model:
        w = pm.Dirichlet("w", np.ones(2))
        mu = pm.Normal("mu", 0, 3, shape=(2, d))
        var = pm.InverseGamma("var", 3., 2., shape=(2, d))
        u = pm.Gamma("u", 2., 2., shape=n)
        z = pm.Categorical("z", w, shape=n)
        pm.Normal("y", mu[z], pt.sqrt(var[z] / u[:, None]), observed=x)
    assert families(model) == dict(w="Dirichlet", mu="Normal", var="InverseGamma", u="Gamma", z="Categorical")
    a, b = complete_conditional(model, "u").natural(dict(mu=np.zeros((2, d)), var=np.full((2, d), 2.), z=np.zeros(n, int)))
    assert np.allclose(a, 2 + d / 2) and np.allclose(b, 2 + (x ** 2).sum(1) / 4)


def test_an_outlier_component_stays_quadratic(x):
    n, d = x.shape
    with pm.Model() as model:
        w = pm.Dirichlet("w", np.ones(3))
        mu = pm.Normal("mu", 0, 3, shape=(2, d))
        var = pm.InverseGamma("var", 3., 2., shape=(2, d))
        z = pm.Categorical("z", w, shape=n)
        centres, spread = pt.concatenate([mu, np.zeros((1, d))]), pt.concatenate([var, np.full((1, d), 50.)])
        pm.Normal("y", centres[z], pt.sqrt(spread)[z], observed=x)
    d_ = derive(model)
    assert d_.lowered and d_.structure == "diagonal" and d_.n_units == 3 and set(d_.parameters) == {"w", "mu", "var"}


def test_data_containers_dims_and_rows_left_out(x):
    keep = np.flatnonzero(np.arange(len(x)) % 5)
    with pm.Model(coords={"spike": range(len(x)), "unit": range(2)}) as model:
        data = pm.Data("data", x[keep, 0])
        w = pm.Dirichlet("w", np.ones(2), dims="unit")
        mu = pm.Normal("mu", 0, 3, dims="unit")
        z = pm.Categorical("z", w, dims="spike")
        pm.Normal("y", mu[z[keep]], 1., observed=data)
    assert families(model) == dict(w="Dirichlet", mu="Normal", z="Categorical")
    point = dict(w=np.array([.3, .7]), mu=np.array([-1., 1.]))
    logits, = complete_conditional(model, "z").natural(point)
    gone = np.setdiff1d(np.arange(len(x)), keep)
    assert np.allclose(logits[gone], np.log(point["w"]))       # a spike that was not observed keeps its prior
    assert np.allclose(logits[keep], np.log(point["w"]) + stats.norm(point["mu"], 1).logpdf(x[keep, :1]))


def test_masked_observations_are_variables_of_their_own(x):
    y = x[:, 0].copy(); y[::7] = np.nan
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 3)
        with pytest.warns(UserWarning, match="missing"): pm.Normal("y", mu, 2., observed=np.ma.masked_invalid(y))
    P, h = complete_conditional(model, "mu").natural({"y_unobserved": np.zeros(np.isnan(y).sum())})
    assert np.allclose(P, 1 / 9 + len(y) / 4) and np.allclose(h, np.nansum(y) / 4)
    assert complete_conditional(model, "y_unobserved").family == "Normal"


# ---- what is not conjugate is refused, with its name
def test_refusals(x):
    with pm.Model() as model:
        sd = pm.HalfNormal("sd", 1.)
        nu = pm.Gamma("nu", 2., .1)
        bounded = pm.Uniform("bounded", -1, 3)
        k = pm.Poisson("k", 3.)
        pm.StudentT("y", nu, mu=bounded + 0 * k, sigma=sd, observed=x[:, 0])
    for name, words in dict(sd="Gamma.*InverseGamma", nu="'nu'", bounded="Uniform", k="Poisson").items():
        with pytest.raises(NotConjugate, match=words) as e: complete_conditional(model, name)
        assert e.value.variable == name
    with pytest.raises(NotConjugate): derive(model, exact=True)
    assert set(derive(model).others) == {"sd", "nu", "bounded", "k"}
    with pytest.raises(KeyError, match="free variables"): complete_conditional(model, "nobody")


def test_a_wrong_shape_of_density_says_how_far_off_it_was(x):
    with pm.Model() as model:
        v = pm.Gamma("v", 2., 2.)
        pm.Normal("y", 0, pt.sqrt(v), observed=x[:, 0])        # a Gamma prior on a variance: neither Gamma nor InverseGamma
    with pytest.raises(NotConjugate, match="off by") as e: complete_conditional(model, "v")
    assert e.value.discrepancy > 1e-3


def test_the_density_of_covariances_is_written_for_as_many_units_as_features():
    from spike_ppl.models import gmm, toy
    d = derive(gmm(toy(200, 3, 3)[0], 3, covariance="full"))           # means (3, 3) are no covariance
    assert d.lowered and d.family["precisions"].name == "Wishart"


def test_a_matrix_of_coefficients_may_be_coupled_in_everything(x):
    X, y = np.random.default_rng(3).normal(size=(30, 2, 3)), x[:30, 0]
    with pm.Model() as model:
        beta = pm.Normal("beta", 0, 2., shape=(2, 3))
        pm.Normal("y", (X * beta).sum((1, 2)), 1., observed=y)
    c = complete_conditional(model, "beta")
    P, h = c.natural({})
    F = X.reshape(30, 6)
    assert c.family_.axis == "all" and np.allclose(P, np.eye(6) / 4 + F.T @ F) and np.allclose(h, F.T @ y) and c.draw({}, 0).shape == (2, 3)


# ---- the check of what was read
def many_covariances(K=12, d=21, n=90):
    x = np.random.default_rng(0).normal(size=(n, d))
    with pm.Model() as model:
        mu = pm.Normal("mu", 0., 2., shape=(K, d))
        P = pm.Wishart("P", d + 22., np.eye(d) / 21, shape=(K, d, d))
        z = pm.Categorical("z", np.ones(K) / K, shape=n)
        pm.MvNormal("y", mu[z], cov=pt.linalg.inv(P)[z], observed=x)
    return model, x


def test_random_matrices_are_well_conditioned_at_every_size():
    from spike_ppl.families import Wishart
    for p in (2, 21, 60):
        X = Wishart((500, p, p)).generic(np.broadcast_to(np.eye(p), (500, p, p)), np.random.default_rng(0))
        assert np.linalg.cond(X).max() < 500, p


def test_the_check_is_within_round_off_for_many_large_covariances():
    model, x = many_covariances()
    c = complete_conditional(model, "P")
    rng = np.random.default_rng(1)
    mu, z = rng.normal(size=(12, 21)), rng.integers(12, size=90)
    nu, B = c.natural(dict(mu=mu, z=z))
    S = np.stack([(x[z == k] - mu[k]).T @ (x[z == k] - mu[k]) for k in range(12)])
    assert c.discrepancy < 1e-8 and np.allclose(nu, 43 + np.bincount(z, minlength=12), rtol=1e-12) and np.allclose(B, 21 * np.eye(21) + S, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shift", [100., 1e5])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_check_does_not_depend_on_the_unit_of_the_data(shift, scale):
    from spike_ppl.models import gmm, toy
    x = (toy(120, 2, 4)[0] + shift) * scale
    assert families(gmm(x, 2, covariance="full")) == dict(weights="Dirichlet", means="MvNormal", precisions="Wishart", assignments="Categorical")
    assert families(gmm(x, 2)) == dict(weights="Dirichlet", means="Normal", variances="InverseGamma", assignments="Categorical")


@pytest.mark.parametrize("name, field, change", [
    ("P", 0, lambda nu: nu + 1e-4), ("P", 1, lambda B: B * (1 + 1e-5)), ("mu", 0, lambda P: P * (1 + 1e-5)), ("mu", 1, lambda h: h * (1 + 1e-4))])
def test_a_conditional_that_is_slightly_wrong_is_refused(monkeypatch, name, field, change):
    model, _ = many_covariances()
    family = type(complete_conditional(model, name).family_)
    right = family.read
    def wrong(self, *args):
        natural = list(right(self, *args))
        natural[field] = change(natural[field])
        return natural
    monkeypatch.setattr(family, "read", wrong)
    with pytest.raises(NotConjugate, match="off by"): complete_conditional(model, name)


@pytest.mark.parametrize("name, field", [("w", 0), ("var", 0), ("var", 1), ("rate", 0), ("rate", 1)])
def test_one_count_off_by_a_ten_thousandth_is_refused(monkeypatch, x, name, field):
    model = mixture(x)
    family = type(complete_conditional(model, name).family_)
    right = family.read
    def wrong(self, *args):
        natural = list(right(self, *args))
        natural[field] = natural[field] + 1e-4
        return natural
    monkeypatch.setattr(family, "read", wrong)
    with pytest.raises(NotConjugate, match="off by"): complete_conditional(model, name)


def test_constraints_are_not_forgotten(x):
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 3, shape=2)
        pm.Potential("order", pt.switch(mu[0] < mu[1], 0., -np.inf))
        pm.Normal("y", mu.sum(), 1., observed=x[:, 0])
    with pytest.raises(NotConjugate): complete_conditional(model, "mu")
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 3, shape=2, transform=pm.distributions.transforms.ordered, initval=[-1., 1.])
        pm.Normal("y", mu.sum(), 1., observed=x[:, 0])
    with pytest.raises(NotConjugate, match="transform"): complete_conditional(model, "mu")


def test_stick_breaking_weights_are_refused_by_name(x):
    with pm.Model() as model:
        w = pm.StickBreakingWeights("w", 1., K=3)
        pm.Categorical("z", w, observed=np.array([0, 1, 2, 3, 0]))
    with pytest.raises(NotConjugate, match="generalised Dirichlet"): complete_conditional(model, "w")


def test_dependent_assignments_are_not_enumerated_one_by_one():
    with pm.Model() as model:
        z = pm.Bernoulli("z", .5, shape=4)
        pm.Normal("y", z.sum(), 1., observed=2.)
    with pytest.raises(NotConjugate): complete_conditional(model, "z")


def test_random_walks_are_coupled_along_their_axis(x):
    with pm.Model() as model:
        step = pm.Gamma("step", 2., 1.)
        path = pm.Normal("path", 0, 1, shape=(5, 2))
        pm.Potential("walk", -.5 * step * ((path[1:] - path[:-1]) ** 2).sum() + 4 * pt.log(step))
        pm.Normal("y", path, 1., observed=x[:10].reshape(5, 2, 3)[..., 0])
    c = complete_conditional(model, "path")
    assert c.family == "MvNormal" and c.family_.axis == 0
    assert families(model) == dict(step="Gamma", path="MvNormal")


# ---- the derivation as a whole
def test_the_reduced_log_joint_is_the_models_own(x):
    model = mixture(x)
    d = derive(model)
    assert d.lowered and d.assignments == "z" and d.weights == "w"
    rng = np.random.default_rng(6)
    point = d.initial(rng)
    z = point["z"]
    n = np.bincount(z, minlength=3).astype(float)
    mean = np.stack([x[z == k].mean(0) for k in range(3)])
    scatter = np.stack([((x[z == k] - mean[k]) ** 2).sum(0) for k in range(3)])
    values = {k + "": v for k, v in point.items()}
    from pymc.model.transform.conditioning import remove_value_transforms
    own = remove_value_transforms(model).compile_logp(jacobian=False)(values)
    assert np.isclose(d.log_joint(point, (n, mean, scatter)), own, rtol=1e-10)
    c, b, A = d.unit_quadratic(point)
    direct, = complete_conditional(model, "z").natural(point)
    assert np.allclose(c + x @ b.T - .5 * x ** 2 @ A.T, direct, rtol=1e-9, atol=1e-9)
    for name in d.parameters:
        lowered, full = d.natural(name, point, (n, mean, scatter)), complete_conditional(model, name).natural(point)
        assert all(np.allclose(p, q, rtol=1e-9) for p, q in zip(lowered, full)), name


def collided(x, K=3):
    "Two discrete questions about every spike: which unit, and how far from it."
    with pm.Model() as model:
        w = pm.Dirichlet("w", np.ones(K))
        f = pm.Beta("f", 1., 4.)
        mu = pm.Normal("mu", 0, 3, shape=(K, x.shape[1]))
        far = pm.Gamma("far", 2., 8.)
        c = pm.Bernoulli("c", f, shape=len(x))
        z = pm.Categorical("z", w, shape=len(x))
        pm.Normal("y", mu[z], 1 / pt.sqrt(pt.stack([pt.as_tensor(1.), far])[c])[:, None], observed=x)
    return model


def test_discrete_variables_that_share_a_spike_are_read_as_one(x):
    model = collided(x)
    d = derive(model)
    assert d.lowered and (d.assignments, d.n_units, d.n_states) == ("z", 3, 6) and "c" not in d.family
    point = d.initial(0)
    answers = d.each(point["z"])
    assert set(answers) == {"z", "c"} and np.array_equal(d.joined({**point, **answers})["z"], point["z"])
    from pymc.model.transform.conditioning import remove_value_transforms
    own = remove_value_transforms(model).compile_logp(jacobian=False)
    values = {k: v for k, v in point.items() if k != "z"}
    c, b, A = d.unit_quadratic(point)
    for i in (0, 7):
        direct = []
        for state in range(6):
            here = {k: v.copy() for k, v in answers.items()}
            for k, v in d.each(state).items(): here[k][i] = v
            direct.append(own({**values, **here}))
        quadratic = c + x[i] @ b.T - .5 * x[i] ** 2 @ A.T
        assert np.allclose(np.diff(direct), np.diff(quadratic), atol=1e-9)
    assert derive(collided(x[:40])).plan is d.plan and derive(collided(x), apart=True).family.keys() >= {"z", "c"}


def test_discrete_variables_that_depend_on_their_neighbours_stay_apart(x):
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 3, shape=2)
        z = pm.Categorical("z", [.5, .5], shape=len(x))
        c = pm.Bernoulli("c", pt.where(pt.eq(pt.concatenate([z[1:], z[:1]]), 1), .2, .6), shape=len(x))
        pm.Normal("y", mu[z] + 4 * c, 1., observed=x[:, 0])
    d = derive(model)
    assert d.states == {} and "z" in d.others and "c" in d.family


def test_the_expected_assignment_step_is_the_textbook_one(x):
    """Bishop (2006), eqs 10.46, 10.64, 10.65, for factorised means and variances."""
    from scipy.special import digamma
    model = mixture(x)
    d = derive(model)
    rng = np.random.default_rng(7)
    P, h = rng.gamma(5., size=(3, 3)), rng.normal(size=(3, 3))
    a, s = rng.gamma(5., size=(3, 3)) + 2, rng.gamma(5., size=(3, 3))
    w = rng.gamma(3., size=3)
    q = dict(w=(w,), mu=(P, h), var=(a, s), centre=(np.ones(3), np.zeros(3)), rate=(np.array(2.), np.array(1.)))
    c, b, A = d.expected_quadratic(q)
    ours = c + x @ b.T - .5 * x ** 2 @ A.T
    book = digamma(w) - digamma(w.sum()) - .5 * (np.log(2 * np.pi) + np.log(s) - digamma(a) + a / s * ((x[:, None] - h / P) ** 2 + 1 / P)).sum(-1)
    assert np.allclose(ours, book, rtol=1e-12, atol=1e-11)


def test_expectations_agree_with_monte_carlo(x):
    """The energy of a full-covariance mixture: two-point rules against draws from q."""
    with pm.Model() as model:
        alpha = pm.Gamma("alpha", 2., 1.)
        sticks = pm.Beta("sticks", 1., alpha, shape=1)
        w = pm.Deterministic("w", pt.stack([sticks[0], 1 - sticks[0]]))
        mu = pm.Normal("mu", 0, 3, shape=(2, 3))
        P = pm.Wishart("P", 5., np.eye(3) / 5, shape=(2, 3, 3))
        z = pm.Categorical("z", w, shape=len(x))
        pm.MvNormal("y", mu[z], cov=pt.linalg.inv(P)[z], observed=x)
    d = derive(model)
    rng = np.random.default_rng(8)
    z = np.r_[np.zeros(40, int), np.ones(35, int)]
    mean = np.stack([x[z == k].mean(0) for k in range(2)])
    s = (np.bincount(z).astype(float), mean, np.stack([(x[z == k] - mean[k]).T @ (x[z == k] - mean[k]) for k in range(2)]))
    point = d.initial()
    q = {}
    for k in d.parameters: q[k] = d.natural(k, {**point, **{j: d.family[j].mean(n) for j, n in q.items()}, "mu": mean}, s)
    draws = [{k: d.family[k].draw(n, rng) for k, n in q.items()} for _ in range(4000)]
    values = np.array([d.log_joint({**p, "z": z}, s) for p in draws])
    assert abs(d.energy(q, s) - values.mean()) < 4 * values.std() / np.sqrt(len(values))


def test_entropies_agree_with_the_families_own_density():
    from spike_ppl import families as c
    rng = np.random.default_rng(9)
    M = rng.normal(size=(2, 3, 3)); M = M @ M.transpose(0, 2, 1) + np.eye(3)
    cases = [(c.Normal((4,)), (rng.gamma(3., size=4), rng.normal(size=4))), (c.Normal((2, 3), 1), (M, rng.normal(size=(2, 3)))),
             (c.Gamma((3,)), (rng.gamma(3., size=3), rng.gamma(3., size=3))), (c.InverseGamma((3,)), (rng.gamma(3., size=3) + 2, rng.gamma(3., size=3))),
             (c.Beta((3,)), (rng.gamma(3., size=3), rng.gamma(3., size=3))), (c.Dirichlet((4,)), (rng.gamma(3., size=4),)),
             (c.Wishart((2, 3, 3)), (np.array([6., 9.]), M))]
    for family, natural in cases:
        logp = np.array([family.logp(natural, family.draw(natural, rng)) for _ in range(4000)])
        assert abs(family.entropy(natural) + logp.mean()) < 5 * logp.std() / np.sqrt(len(logp)), family.name


def test_new_data_of_the_same_structure_costs_no_new_compilation(x):
    a = derive(mixture(x)); a.unit_quadratic(a.initial(0))
    b = derive(mixture(x[:60] * 3))
    assert b.plan is a.plan and b.initial()["z"].shape == (60,)
    fresh = complete_conditional(mixture(x[:60] * 3), "z").natural(b.initial(0))[0]
    c, lin, A = b.unit_quadratic(b.initial(0))
    y = x[:60] * 3
    assert np.allclose(c + y @ lin.T - .5 * y ** 2 @ A.T, fresh)
    assert derive(mixture(x, K=4)).plan is not a.plan


def test_conjugacy_is_a_table(x):
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 1)
        sd = pm.HalfNormal("sd", 1.)
        pm.Normal("y", mu, sd, observed=x[:, 0])
    table = conjugacy(model)
    assert "Normal" in str(table) and "NUTS" in str(table) and "<table" in table._repr_html_()


# ---- structures that were met before

def _mixture(seed, n=60, K=3, D=2, sd=5., mean=None, stick=1., potential=False, prior="normal", **more):
    "A Dirichlet-process mixture with arrays that differ from seed to seed."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)) + 5 * rng.integers(0, K, size=(n, 1))
    mean = x.mean(0) if mean is None else mean
    with pm.Model(coords=dict(spike=np.arange(n), unit=np.arange(K), feature=np.arange(D))) as m:
        c = pm.Gamma("c", 1., stick)
        v = pm.Beta("v", 1., c, shape=K - 1)
        w = pm.Deterministic("w", pt.concatenate([v, [1.]]) * pt.concatenate([[1.], pt.cumprod(1 - v)]))
        mu = (pm.Normal("mu", mean, sd * x.std(0), dims=("unit", "feature"), **more) if prior == "normal" else
              pm.Laplace("mu", mean, sd * x.std(0), dims=("unit", "feature")))
        var = pm.InverseGamma("var", 3., 2. * x.var(0), dims=("unit", "feature"))
        z = pm.Categorical("z", p=w, dims="spike")
        pm.Normal("x", mu[z], pt.sqrt(var[z]), observed=x, dims=("spike", "feature"))
        if potential: pm.Potential("extra", -pt.sum(mu ** 2))
    return m

def _agree(d, m):
    "A derivation says of a model what one read in full says, and what the model itself says."
    own = conjugate._derived(m, False, False)
    for k, v in own.joint.initial.items(): np.testing.assert_array_equal(d.joint.initial[k], v)
    assert list(d.joint.data) == list(own.joint.data) and all(d.joint.data[k] is v or np.array_equal(d.joint.data[k], v) for k, v in own.joint.data.items())
    p = own.initial(3)
    for a, b in zip(d.initial(3).values(), p.values()): np.testing.assert_array_equal(a, b)
    count = np.bincount(p["z"], minlength=own.n_states).astype(float)
    means = np.stack([own.data[p["z"] == k].mean(0) if count[k] else np.zeros(own.data.shape[1]) for k in range(own.n_states)])
    s = count, means, np.stack([((own.data[p["z"] == k] - means[k]) ** 2).sum(0) for k in range(own.n_states)])
    for name in own.parameters:
        for a, b in zip(d.natural(name, p, s), own.natural(name, p, s)): np.testing.assert_array_equal(a, b)
    for a, b in zip(d.unit_quadratic(p), own.unit_quadratic(p)): np.testing.assert_array_equal(a, b)
    plain = untransformed(m)
    point = {k: np.asarray(p[k], plain[k].dtype) for k in p}
    logp = quick_function([plain.rvs_to_values[plain[k]] for k in point], [plain.logp(jacobian=False)])
    np.testing.assert_allclose(d.log_joint(p, s), logp(*point.values())[0], rtol=1e-10)
    at = {d.joint.free[k]: point[k] for k in point} | {d.joint.observed[k]: v for k, v in d.joint.data.items()}
    total = sum(t.sum() for t in d.joint.terms.values())                      # the terms hold this model's arrays
    np.testing.assert_allclose(total.eval(at, mode=AS_WRITTEN, on_unused_input="ignore"), d.log_joint(p, s), rtol=1e-10)
    for k, v in own.deterministics({k: np.asarray(v)[None] for k, v in p.items()}).items():
        np.testing.assert_array_equal(d.deterministics({k: np.asarray(v)[None] for k, v in p.items()})[k], v)

@pytest.fixture
def forgetful(monkeypatch):
    monkeypatch.setattr(conjugate, "_met", []); monkeypatch.setattr(plan, "_plans", [])

def test_the_third_model_of_a_structure_is_recognised_and_right(forgetful):
    m3, m4 = _mixture(2, n=90), _mixture(3, n=60)
    first, second, third, fourth = (derive(m) for m in (_mixture(0), _mixture(1, n=75), m3, m4))
    assert first._met is None and second._met is None and third._met is not None and fourth._met is not None
    assert third.plan is first.plan
    _agree(third, m3); _agree(fourth, m4)

def test_other_structures_are_never_recognised(forgetful):
    for seed, n in ((0, 60), (1, 75)): derive(_mixture(seed, n=n))
    assert derive(_mixture(2))._met is not None
    others = dict(constant=dict(stick=2.), shape=dict(K=4), width=dict(D=3), potential=dict(potential=True), family=dict(prior="laplace"), start=dict(initval=np.ones((3, 2))))
    for why, change in others.items():
        m = _mixture(4, **change)
        d = derive(m)
        assert d._met is None, why
        if why not in ("family", "potential"): _agree(d, m)
    assert "mu" in derive(_mixture(5, prior="laplace")).others and "mu" in derive(_mixture(6, prior="laplace")).others and "mu" in derive(_mixture(7, prior="laplace")).others
    _agree(derive(m := _mixture(8, n=61)), m)

def test_a_length_that_only_ever_was_one_number_is_not_free(forgetful):
    for seed in (0, 1): derive(_mixture(seed))
    assert derive(_mixture(2))._met is not None
    assert derive(_mixture(2, n=80))._met is None
    assert (d := derive(m := _mixture(3, n=90)))._met is not None
    _agree(d, m)

def test_numbers_made_of_arrays_forbid_the_memory(forgetful):
    "A number that PyMC may compute beforehand from an array is a number of one model."
    def model(seed):
        rng = np.random.default_rng(seed)
        scale = pt.constant(rng.gamma(5., size=4))
        with pm.Model() as m:
            mu = pm.Normal("mu", 0., scale.sum())
            pm.Normal("x", mu, 1., observed=rng.normal(size=30))
        return m
    for seed in range(4): assert derive(model(seed))._met is None

def test_data_that_may_change_forbid_the_memory(forgetful):
    for seed in range(4):
        with pm.Model() as m:
            mu = pm.Normal("mu", 0., 3.)
            pm.Normal("x", mu, 1., observed=pm.Data("data", np.random.default_rng(seed).normal(size=30)))
        assert derive(m)._met is None

def test_arrays_that_look_alike_forbid_the_memory(forgetful):
    "Which of two equal arrays a term holds cannot be told from one model."
    for seed in range(4):
        a = np.full(2, 1. + seed)
        with pm.Model() as m:
            mu = pm.Normal("mu", pt.constant(a), pt.constant(a.copy()))
            pm.Normal("x", mu, 1., observed=np.random.default_rng(seed).normal(size=(30, 2)))
        assert derive(m)._met is None

@pytest.mark.parametrize("prior", ["normal", "laplace"])
def test_what_is_remembered_keeps_no_model_and_no_data(forgetful, prior):
    "Neither a plan, lowered or not, nor a structure holds the recording it was made from in memory."
    import gc
    import weakref
    alive = []
    for seed in range(3):
        m = _mixture(seed, n=200 + seed, prior=prior)
        d = derive(m)
        assert d.lowered
        d.unit_quadratic(d.initial(0))
        data = d.data
        alive += [weakref.ref(m), weakref.ref(data if data.base is None else data.base)]
        with pm.Model() as m:
            mu = pm.Normal("mu", 0., 3., shape=3)
            z = pm.Categorical("z", np.full(3, 1 / 3), shape=len(data))
            pm.Laplace("x", mu[z], 1., observed=data[:, 0].copy())
        d = derive(m)
        assert not d.lowered
        d.logits(d.initial(0))
        data = d.data
        alive += [weakref.ref(m), weakref.ref(data if data.base is None else data.base)]
        del m, d, data, mu, z
    gc.collect()
    assert plan._plans and conjugate._met and [w() for w in alive] == [None] * 12

def test_a_plan_that_let_go_serves_other_data_of_its_structure(x):
    "Rows and elements of an enumerated variable that have other numbers: which belongs to which was found before."
    def model(y):
        with pm.Model() as m:
            mu = pm.Normal("mu", [-2., 2.], 1., shape=2)
            z = pm.Categorical("z", [.3, .7], shape=len(y) // 2)
            pm.Laplace("y", mu[z[np.arange(len(y)) // 2]], 1., observed=y)
        return m
    first, second = (derive(model(y)) for y in (x[:74, 0], x[:74, 1]))
    assert second.plan is first.plan and not first.lowered
    mu = np.array([-1., 1.5])
    y = x[:74, 1]
    one = stats.laplace(mu, 1.).logpdf(y[:, None])
    np.testing.assert_allclose(second.logits(dict(mu=mu)), np.log([.3, .7]) + one[::2] + one[1::2], rtol=1e-8)      # PyMC rounds log 2 to float32


def test_a_term_over_late_spikes_alone_is_seen_by_the_check():
    y = np.random.default_rng(0).normal(size=150)
    with pm.Model(coords={"spike": range(150)}) as model:
        mu = pm.Normal("mu", 0, 2, shape=2)
        z = pm.Categorical("z", [.5, .5], dims="spike")
        pm.Potential("unlike", -4. * pt.eq(z[120:-1], z[121:]))              # neighbours after the hundredth spike repel each other
        pm.Normal("y", mu[z], .9, observed=y)
    with pytest.raises(NotConjugate, match="'z'"): complete_conditional(model, "z")
    assert set(derive(model).others) == {"z"}


def test_observed_variables_keep_their_places_when_a_structure_is_met_again():
    def model(seed):
        rng = np.random.default_rng(seed)
        with pm.Model() as m:
            z = pm.Categorical("z", pm.Dirichlet("p", [1., 1.]), shape=20)
            mu, rate = pm.Normal("mu", 0, 2, shape=2), pm.Gamma("rate", 1., .3, shape=2)
            pm.Normal("y", mu[z], .7, observed=rng.normal(size=20))
            pm.Exponential("k", rate[z], observed=rng.gamma(2, size=20))
        return m
    for seed in range(3): d = derive(m := model(seed))
    assert d._met is not None and list(d.joint.data) == list(d.joint.observed)
    fresh, point = conjugate.log_joint(m), {"z": np.arange(20) % 2}
    assert np.allclose(complete_conditional(d.joint, "rate").natural(point), complete_conditional(fresh, "rate").natural(point))


@pytest.mark.parametrize("n", [30, 120])
def test_a_mixture_of_one_unit(n):
    x = np.random.default_rng(0).normal(size=(n, 2))
    with pm.Model(coords={"spike": range(n)}) as model:
        mu = pm.Normal("mu", 0, 2, shape=(1, 2))
        z = pm.Categorical("z", pm.Dirichlet("p", np.ones(1)), dims="spike")
        pm.Normal("x", mu[z], 1., observed=x)
    d = derive(model)
    assert d.lowered and not d.others


def test_what_a_correlation_of_zero_would_hide_is_seen():
    x = np.random.default_rng(0).normal(size=(40, 2))
    with pm.Model(coords={"spike": range(40)}) as model:
        mu = pm.Normal("mu", 0, 2, shape=(2, 2))
        z = pm.Categorical("z", [.4, .6], dims="spike")
        chol, *_ = pm.LKJCholeskyCov("chol", eta=2., n=2, sd_dist=pm.HalfNormal.dist(1., shape=2))
        pm.MvNormal("x", mu[z], chol=chol, observed=x)                      # chol is not conjugate and starts at the identity
    d = derive(model)
    assert set(d.others) == {"chol"} and d.structure == "full" and d.family["mu"].name == "MvNormal"
