"""What each spike has of its own, a gain, a shift, factor scores, is integrated out: against SciPy, brute force, enumeration and Geweke's test."""
import itertools
import numpy as np, pymc as pm, pytensor.tensor as pt, pytest, xarray as xr
from scipy import stats
from scipy.special import logsumexp
from spike_ppl import closed_forms, conjugate, plan, variational
from spike_ppl.conjugate import Scored, derive
from spike_ppl.passes import Spikes, Statistics, hard_statistics
from spike_ppl.closed_forms import closed_form, factor_near
from spike_ppl.gibbs import Sweep, gibbs_step
from spike_ppl.inference import fit, log_density, marginal, predict
from spike_ppl.models import collisions, template_mixture, toy

quiet = dict(progressbar=False)

def spikes_of(n=60, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (3, d))[rng.integers(3, size=n)] + rng.normal(size=(n, d))

def factors(x, K=2, kind="one", noise="wishart", width=None, mean=0., sd=3.):
    "A mixture with scores: `kind` says how they enter, `noise` what they leave, `width` what their variance is."
    n, d = x.shape
    with pm.Model(coords=dict(spike=range(n), unit=range(K))) as m:
        w = pm.Dirichlet("w", np.full(K, 2.), dims="unit")
        mu = pm.Normal("mu", 0., sd, shape=(K, d))
        if noise == "wishart": cov = pt.linalg.inv(pm.Wishart("T", nu=d + 3., V=np.eye(d)/(d + 3), shape=(K, d, d)))
        if noise == "shared": cov = pt.linalg.inv(pm.Wishart("T", nu=d + 3., V=np.eye(d)/(d + 3)))
        if noise in ("white", "diagonal"): sd = pt.sqrt(pm.InverseGamma("var", 3., 2., **({} if noise == "white" else dict(shape=(K, d)))))
        if noise == "precision": sd = 1/pt.sqrt(pm.Gamma("tau", 3., 2.))
        if noise == "known": cov = pt.constant(np.eye(d) + .3)
        spread = 1. if width is None else pt.sqrt(pm.InverseGamma("v", 3., 1.)) if width == "variance" else 1/pt.sqrt(pm.Gamma("v", 3., 1.))
        z = pm.Categorical("z", w, dims="spike")
        if kind == "gain": centre = mu[z]*pm.Normal("gain", 1., spread, dims="spike")[:, None]
        else:
            load = pm.Normal("load", 0., 1., shape=(K, d))
            if kind == "columns": scores = pm.Normal("score", mean, spread, shape=(n, 2))
            else: first = pm.Normal("score", mean, spread, dims="spike")
            if kind != "one": more = pm.Normal("more", 0., 1., shape=(K, d))
            if kind == "columns": centre = mu[z] + load[z]*scores[:, :1] + more[z]*scores[:, 1:]
            else: centre = mu[z] + load[z]*first[:, None]
            if kind == "two": centre = centre + more[z]*pm.Normal("second", 0., 1., dims="spike")[:, None]
        if noise in ("wishart", "shared", "known"): pm.MvNormal("x", centre, cov=cov[z] if noise == "wishart" else cov, observed=x)
        else: pm.Normal("x", centre, sd[z] if noise == "diagonal" else sd, observed=x)
    return m

def by_hand(p, K, d, kind="one", noise="wishart", width=None, mean=0.):
    "Mean and covariance of every unit with the scores integrated out."
    v = 1. if width is None else float(p["v"]) if width == "variance" else 1/float(p["v"])
    out = []
    for k in range(K):
        C = {"wishart": lambda: np.linalg.inv(p["T"][k]), "shared": lambda: np.linalg.inv(p["T"]), "white": lambda: p["var"]*np.eye(d), "diagonal": lambda: np.diag(p["var"][k]),
             "precision": lambda: np.eye(d)/p["tau"], "known": lambda: np.eye(d) + .3}[noise]()
        if kind == "gain": out.append((p["mu"][k], C + v*np.outer(p["mu"][k], p["mu"][k]))); continue
        m, C = p["mu"][k] + mean*p["load"][k], C + v*np.outer(p["load"][k], p["load"][k])
        if kind == "two": C = C + np.outer(p["more"][k], p["more"][k])
        if kind == "columns": m, C = m + mean*p["more"][k], C + v*np.outer(p["more"][k], p["more"][k])
        out.append((m, C))
    return out

structures = [dict(), dict(noise="shared"), dict(noise="white"), dict(noise="precision"), dict(noise="diagonal"), dict(kind="two"), dict(kind="two", noise="white"), dict(kind="columns"),
              dict(kind="columns", noise="diagonal"), dict(kind="gain"), dict(kind="gain", noise="white"), dict(kind="gain", noise="white", width="variance"), dict(width="variance"),
              dict(noise="shared", width="precision"), dict(mean=.7), dict(kind="two", mean=.7, noise="white"), dict(kind="columns", width="variance", mean=-.4),
              dict(kind="gain", noise="diagonal", width="precision")]
names = ["-".join(map(str, s.values())) or "plain" for s in structures]

def values_of(quadratic, x):
    c, b, A = quadratic
    return c + x @ b.T - .5*np.einsum("ni,kij,nj->nk", x, A, x)


@pytest.mark.parametrize("how", structures, ids=names)
def test_marginal_is_the_normal_with_loadings_in_its_covariance(how):
    x = spikes_of()
    d = derive(factors(x, **how))
    assert isinstance(d, Scored) and d.lowered and d.n_features == 3
    for seed in range(2):
        p, rows = d.initial(np.random.default_rng(seed)), np.random.default_rng(9).normal(0, 4, (20, 3))
        want = np.stack([np.log(p["w"][k]) + stats.multivariate_normal(m, C).logpdf(rows) for k, (m, C) in enumerate(by_hand(p, 2, 3, **how))], 1)
        for used in (d, closed_form(d)):
            got = values_of(used.unit_quadratic(p), rows)
            assert np.allclose(got, want, rtol=1e-8, atol=1e-8)
        z = np.random.default_rng(1).integers(2, size=len(x))
        prior = sum(float(np.sum(t)) for t in [pm.logp(d.model[k], p[k]).eval() for k in ("w", "mu")])
        own = np.stack([np.log(p["w"][k]) + stats.multivariate_normal(m, C).logpdf(x) for k, (m, C) in enumerate(by_hand(p, 2, 3, **how))], 1)[np.arange(len(x)), z].sum()
        s = hard_statistics(x, z, 2, True)
        other = d.log_joint(p, hard_statistics(x[:0], z[:0], 2, True))
        assert np.isclose(d.log_joint(p, s) - other, own) and np.isclose(closed_form(d).log_joint(p, s), d.log_joint(p, s)) and np.isfinite(prior)


# ---- the statistics of scores that nobody drew
def gram(x, y):
    v = np.hstack([x, y])
    m = v.mean(0)
    return m, (v - m).T @ (v - m)

def flat(N, m, S, D):
    "Sums of scores, and of their products with the spikes and with one another."
    second = S + N*m[..., :, None]*m[..., None, :]
    return np.concatenate([N*m[..., D:], second[..., D:, :].reshape(*m.shape[:-1], -1)], -1)

@pytest.mark.parametrize("N, D, r", [(1, 2, 1), (2, 2, 2), (2, 3, 1), (3, 2, 2), (5, 2, 1), (5, 6, 2), (14, 3, 2), (200, 3, 2)])
def test_statistics_with_scores_are_those_of_scores_drawn_one_by_one(N, D, r):
    rng, draws = np.random.default_rng(N + 10*D), 12_000 if N < 50 else 4000
    x, L = rng.normal(size=(N, D)) @ rng.normal(size=(D, D)) + 1, rng.normal(size=(D + r, D + r))
    b, A = rng.normal(size=(1, D + r)), (L @ L.T + np.eye(D + r))[None]
    cov = np.linalg.inv(A[0, D:, D:])
    centre = (b[0, D:] - x @ A[0, :D, D:]) @ cov
    y = centre + rng.normal(size=(draws, N, r)) @ np.linalg.cholesky(cov).T
    v = np.concatenate([np.broadcast_to(x, (draws, N, D)), y], 2)
    m = v.mean(1)
    v = v - m[:, None]
    brute = flat(N, m, np.swapaxes(v, 1, 2) @ v, D)
    m, S = gram(x, x[:, :0])
    s = Statistics(np.array([float(N)]), m[None], S[None])
    made = [conjugate._with_scores(b, A, s, D, rng) for _ in range(draws)]
    drawn = np.array([flat(N, m[0], S[0], D) for _, m, S in made])
    assert all(np.allclose(S, np.swapaxes(S, 1, 2)) and np.linalg.eigvalsh(S[0])[0] >= -1e-9*(1e-9 + np.abs(S).max()) for _, _, S in made[:50])
    _, m, S = conjugate._with_scores(b, A, s, D)
    want = flat(N, m[0], S[0], D)
    error = np.sqrt(brute.var(0)/draws) + 1e-9*np.abs(want).max()
    assert (np.abs(brute.mean(0) - want) < 5*error).all() and (np.abs(drawn.mean(0) - want) < 5*error).all()      # expected
    pairs = lambda u: (u[:, :, None]*u[:, None, :]).reshape(draws, -1)                                                 # variances and covariances of everything
    p, q = pairs(brute - want), pairs(drawn - want)
    error = np.sqrt((p.var(0) + q.var(0))/draws) + 1e-9*np.abs(p).max()
    assert (np.abs(p.mean(0) - q.mean(0)) < 5.5*error).all()
    p, q = (brute - want)**3, (drawn - want)**3                                                                        # and skew: a Wishart is no Normal
    assert (np.abs(p.mean(0) - q.mean(0)) < 6*np.sqrt((p.var(0) + q.var(0))/draws) + 1e-9*np.abs(p).max()).all()


def test_statistics_with_scores_where_spikes_are_alike():
    "Copies of one spike have no scatter; a unit without spikes has no scores."
    rng = np.random.default_rng(0)
    b, A = rng.normal(size=(3, 3)), np.tile(np.eye(3)*2 + .5, (3, 1, 1))
    s = Statistics(np.array([4., 0., 1.]), np.array([[1., 2.], [0., 0.], [3., 1.]]), np.zeros((3, 2, 2)))
    S = np.array([conjugate._with_scores(b, A, s, 2, rng)[2] for _ in range(4000)])
    assert np.isfinite(S).all() and np.abs(S[:, 1:]).max() < 1e-20 and np.abs(S[:, 0, :2]).max() < 1e-7
    assert abs(S[:, 0, 2, 2].mean()/(3/2.5) - 1) < .1 and abs(S[:, 0, 2, 2].var()/(6/2.5**2) - 1) < .2


# ---- closed forms
meant = [s for s in structures if s.get("noise") != "diagonal"]

@pytest.mark.parametrize("how", meant, ids=["-".join(map(str, s.values())) or "plain" for s in meant])
def test_closed_forms_are_those_of_the_derived_functions(how):
    d = closed_form(derive(factors(spikes_of(), **how)))
    assert isinstance(d, closed_forms._Factors) and d._checked >= {*d.parameters, "quadratic", "joint"}
    x, rng = spikes_of(90, 3, 4), np.random.default_rng(8)
    s = hard_statistics(x, rng.integers(2, size=90), 2, True)
    q = {k: factor_near(d.family[k], v) for k, v in d.initial(rng).items() if k in d.parameters}
    for _ in range(3): q = {k: d.expected_natural(k, q, d.averaged(q, s)) for k in d.parameters}                       # factors of several widths
    slow, whole = d._d, d.averaged(q, s)
    near = lambda a, b: all(np.allclose(u, v, rtol=1e-7, atol=1e-9*np.abs(v).max()) for u, v in zip(a, b))
    assert near(whole, slow.averaged(q, s)) and near(d.expected_quadratic(q), slow.expected_quadratic(q)) and np.isclose(d.energy(q, s), slow.energy(q, s), rtol=1e-9)
    for k in d.parameters: assert near(d.expected_natural(k, q, whole), slow.expected_natural(k, q, whole)), k


@pytest.mark.parametrize("how", [dict(noise="diagonal"), dict(noise="known"), dict(kind="gain", noise="diagonal", width="precision")])
def test_other_noise_keeps_the_derived_functions(how):
    x = spikes_of()
    m = factors(x, **how)
    d = closed_form(derive(m))
    assert not d._checked
    elbo = fit(m, "vb", draws=5, starts=1, passes=8, **quiet)["optimisation"].elbo.values
    assert np.isfinite(elbo).all() and (np.diff(elbo) > -1e-6).all()


def test_closed_forms_know_sizes():
    x = spikes_of(80, 3)
    d = closed_form(derive(collisions(x, 3, kinds=2, directions=2)))
    assert d._checked >= {*d.parameters, "quadratic", "joint"} and set(d._sized) == {"means", "loadings_0", "loadings_1"}
    d = closed_form(derive(collisions(x, 3, kinds=0, directions=1)))
    assert d._checked >= {*d.parameters, "quadratic", "joint"}
    d = closed_form(derive(template_mixture(x, 3)))
    assert d._checked >= {*d.parameters, "quadratic", "joint"}


wrong = dict(loadings=("_natural", lambda self, right, name, e, s: (right[0]*1.001, right[1]) if name == "load" else right, {"load"}),
             width=("_natural", lambda self, right, name, e, s: (right[0] + .5, right[1]) if name == "v" else right, {"v"}),
             noise=("_natural", lambda self, right, name, e, s: (right[0], right[1]*(1 if e["load"][1] is None else 1.01)) if name == "T" else right, {"T"}),
             quadratic=("_joint_quadratic", lambda self, right, e: (right[0] - (0 if e["load"][1] is None else .1), *right[1:]), None),
             prior=("_priors", lambda self, right, e, p, q: right + .01, {"joint"}),
             expected_prior=("_priors", lambda self, right, e, p, q: right + (0 if q is None else .01), {"joint"}))

@pytest.mark.parametrize("which", wrong)
def test_a_wrong_closed_form_is_noticed(which, monkeypatch):
    d = derive(factors(spikes_of(), width="variance"))
    everything = {*d.parameters, "quadratic", "joint"}
    monkeypatch.setattr(plan, "_plans", [])                 # what was found before is forgotten
    d = derive(factors(spikes_of(), width="variance"))
    name, change, dropped = wrong[which]
    right = getattr(closed_forms._Factors, name)
    monkeypatch.setattr(closed_forms._Factors, name, lambda self, *a: change(self, right(self, *a), *a))
    assert closed_form(d)._checked == (everything - dropped if dropped else frozenset())


# ---- fits
def with_loadings(n=600, d=4, seed=0):
    rng = np.random.default_rng(seed)
    means, loadings = 8*np.eye(3, d), np.array([[0, 0, 3., 0], [0, 2., 0, 2.], [1.5, -1.5, 0, 0]])[:, :d]
    unit = rng.integers(3, size=n)
    return means[unit] + loadings[unit]*rng.normal(size=(n, 1)) + .7*rng.normal(size=(n, d)), unit, means, loadings

def matched(found, means):
    order = [np.argmin(((found - m)**2).sum(1)) for m in means]
    assert len(set(order)) == 3
    return order

@pytest.mark.parametrize("noise", ["white", "shared", "precision"])
def test_vb_finds_the_loadings_and_its_bound_never_falls(noise):
    x, unit, means, loadings = with_loadings()
    f = fit(factors(x, 3, noise=noise), "vb", draws=50, starts=2, passes=60, **quiet)
    assert (np.diff(f["optimisation"].elbo) >= -1e-6).all()
    post = f.posterior
    order = matched(post.mu.values[0].mean(0), means)
    got = post["load"].values[0][:, order].mean(0)
    for a, b in zip(got, loadings): assert min(np.abs(a - b).max(), np.abs(a + b).max()) < .35, (a, b)
    z = f["unit_probability"].unit_probability.values.argmax(1)
    assert (z == np.array(order)[unit]).mean() > .97


def test_gibbs_finds_the_loadings():
    x, unit, means, loadings = with_loadings(400)
    f = fit(factors(x, 3, noise="white"), "gibbs", draws=150, tune=150, chains=1, seed=1, **quiet)
    assert f.attrs["moves"].startswith("off: each spike has continuous variables of its own")
    order = matched(f.posterior.mu.values[0].mean(0), means)
    outer = np.einsum("tki,tkj->tkij", *[f.posterior["load"].values[0][:, order]]*2).mean(0)
    assert np.abs(outer - loadings[:, :, None]*loadings[:, None, :]).max() < 1.2
    assert np.isclose(f.posterior["var"].values.mean(), .49, rtol=.12)


@pytest.mark.parametrize("how", [dict(kind="gain", noise="white", width="variance"), dict(kind="two", noise="wishart"), dict(kind="columns", width="precision", noise="shared")], ids=["gain", "two", "columns"])
def test_bound_never_falls(how):
    f = fit(factors(spikes_of(120), **how), "vb", draws=5, starts=2, passes=30, **quiet)
    assert (np.diff(f["optimisation"].elbo) >= -1e-6).all()


# ---- every door
def hand_average(m, f, x, K, **how):
    "log p(x, unit) at every kept draw, (draw, spike, unit)."
    post = f.posterior
    points = [{k: post[k].values[c, t] for k in post.data_vars if k != "z"} for c in range(post.sizes["chain"]) for t in range(post.sizes["draw"])]
    return np.array([np.stack([np.log(p["w"][k]) + stats.multivariate_normal(a, C).logpdf(x) for k, (a, C) in enumerate(by_hand(p, K, x.shape[1], **how))], 1) for p in points])

@pytest.mark.parametrize("method, how", [("gibbs", dict(noise="white", width="variance", kind="gain")), ("vb", dict(noise="shared")), ("gibbs", dict(noise="diagonal"))], ids=["gibbs", "vb", "derived"])
def test_new_spikes_have_the_average_over_draws(method, how, tmp_path):
    x, new = spikes_of(80), spikes_of(25, seed=7)
    m = factors(x, **how)
    f = fit(m, method, draws=20, seed=0, **(dict(tune=10, chains=1) if method == "gibbs" else dict(starts=1, passes=10)), **quiet)
    L = hand_average(m, f, new, 2, **how)
    assert np.allclose(log_density(f, new, model=m), logsumexp(L, axis=(0, 2)) - np.log(len(L)), atol=1e-8)
    p = np.exp(L - logsumexp(L, axis=2, keepdims=True)).mean(0)
    assert np.allclose(predict(f, new, model=m), p, atol=1e-6)
    f.to_netcdf(tmp_path/"fit.nc")
    back = xr.open_datatree(tmp_path/"fit.nc")
    assert np.allclose(log_density(back, new, model=m), log_density(f, new, model=m))
    more = fit(m, method, draws=20, seed=0, **(dict(chains=1) if method == "gibbs" else dict(passes=10)), resume=back, **quiet)
    assert more.posterior.sizes["draw"] == (40 if method == "gibbs" else 20)
    if method == "vb": assert more["optimisation"].elbo.values[0] >= f["optimisation"].elbo.values[-1] - 1e-6


def test_the_model_of_templates_comes_back_from_its_file(tmp_path):
    features, unit = toy(150, 3, 3, seed=1)
    f = fit(template_mixture(features, 4), "vb", draws=20, starts=1, seed=0, **quiet)
    assert (np.diff(f["optimisation"].elbo) >= -1e-6).all()
    f.to_netcdf(tmp_path/"fit.nc")
    back = xr.open_datatree(tmp_path/"fit.nc")
    x, post = features.values, f.posterior
    def at(t):
        mu, v, g, w = (post[k].values[0, t] for k in ("means", "noise_variance", "gain_variance", "weights"))
        return np.stack([np.log(w[k]) + stats.multivariate_normal(mu[k], v*np.eye(3) + g*np.outer(mu[k], mu[k])).logpdf(x) for k in range(4)], 1)
    assert np.allclose(log_density(back, features), logsumexp([at(t) for t in range(20)], axis=(0, 2)) - np.log(20), atol=1e-8)
    assert "gains" not in post


@pytest.mark.parametrize("method", ["vb", "gibbs"])
@pytest.mark.parametrize("how", [dict(noise="white"), dict(noise="diagonal")], ids=["closed", "derived"])
def test_a_model_on_a_few_spikes_is_fitted_to_many(method, how):
    x, unit, means, loadings = with_loadings(300)
    options = dict(draws=10, seed=3, **(dict(tune=10, chains=1) if method == "gibbs" else dict(starts=1, passes=10)), **quiet)
    whole, few = fit(factors(x, 3, **how), method, **options), fit(factors(x[:50], 3, **how), method, features=x, **options)
    assert few.posterior.sizes["spike"] == 300 and np.isfinite(few.posterior.mu).all()
    if method == "vb": assert all(np.allclose(few.posterior[k], whole.posterior[k], rtol=1e-6) for k in ("mu", "load"))     # Gibbs starts from other random numbers


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("how", [dict(noise="white"), dict(kind="gain", noise="wishart", width="variance"), pytest.param(dict(kind="columns", noise="shared"), marks=pytest.mark.slow)], ids=["white", "gain", "columns"])
def test_one_two_three_spikes(n, how):
    x = spikes_of(n)
    for method, options in (("vb", dict(starts=1)), ("gibbs", dict(tune=3, chains=1))):
        f = fit(factors(x, **how), method, draws=5, **options, **quiet)
        assert np.isfinite(f.posterior.mu).all() and "stopped" not in f.attrs


def other_way(x, which):
    n, d = x.shape
    with pm.Model() as m:
        w = pm.Dirichlet("w", np.ones(2))
        mu = pm.Normal("mu", 0., 3., shape=(2, d))
        var = pm.InverseGamma("var", 3., 2.)
        z = pm.Categorical("z", w, shape=n)
        if which == "level":
            level = pm.Normal("level", 0., 1., shape=n)
            g = pm.Normal("g", level, 1.)
        elif which == "covariate": g = pm.Normal("g", np.linspace(-1, 1, n), 1.)
        elif which == "sum": g = pm.Normal("g", 0., 1., shape=n) + 0.
        elif which == "student": g = pm.StudentT("g", nu=4, mu=0., sigma=1., shape=n)
        else: g = pm.Normal("g", 0., 1., shape=n)
        shape = {"squared": lambda: g**2, "exponential": lambda: pt.exp(g), "sum": lambda: g.sum() + pt.zeros(n)}.get(which, lambda: g)()
        pm.Normal("x", mu[z] + shape[:, None], pt.exp(g)[:, None] if which == "scale" else pt.sqrt(var), observed=x)
        if which == "potential": pm.Potential("more", -g**2)
        if which == "observed": pm.Normal("y", g, 1., observed=x[:, 0])
    return m

@pytest.mark.parametrize("which", ["squared", "exponential", "scale", "potential", "observed", "covariate", "sum", "level", "student"])
def test_what_is_not_a_score_is_not_absorbed(which):
    d = derive(other_way(spikes_of(20), which))
    assert not isinstance(d, Scored) and not getattr(d, "scores", None)
    assert {"g"} <= {*d.family, *d.others}


def test_a_normal_that_enters_two_terms_is_drawn_the_old_way():
    f = fit(other_way(spikes_of(20), "potential"), "gibbs", draws=10, tune=5, chains=1, **quiet)
    assert f.posterior["g"].shape == (1, 10, 20)


def test_loadings_that_start_at_zero_and_are_not_conjugate():
    x, unit, means, loadings = with_loadings(60)
    with pm.Model() as m:
        w = pm.Dirichlet("w", np.ones(3))
        mu, load, var = pm.Normal("mu", 0., 8., shape=(3, 4)), pm.Laplace("load", 0., 1., shape=(3, 4)), pm.InverseGamma("var", 3., 2.)
        z = pm.Categorical("z", w, shape=60)
        pm.Normal("x", mu[z] + load[z]*pm.Normal("score", 0., 1., shape=60)[:, None], pt.sqrt(var), observed=x)
    d = derive(m)
    assert isinstance(d, Scored) and set(d.others) == {"load"}
    p = d.initial(np.random.default_rng(0))
    p["load"] = np.random.default_rng(1).normal(size=(3, 4))
    want = np.stack([np.log(p["w"][k]) + stats.multivariate_normal(p["mu"][k], p["var"]*np.eye(4) + np.outer(p["load"][k], p["load"][k])).logpdf(x) for k in range(3)], 1)
    assert np.allclose(values_of(d.unit_quadratic(p), x), want, atol=1e-8)
    f = fit(m, "gibbs", draws=5, tune=5, chains=1, **quiet)
    assert np.isfinite(f.sample_stats.lp).all()


@pytest.mark.parametrize("how", [pytest.param(dict(kind="two", noise="wishart", mean=.4), marks=pytest.mark.slow), dict(kind="gain", noise="white", width="variance"), dict(kind="columns", noise="diagonal")], ids=["two", "gain", "columns"])
def test_the_marginal_model_of_nuts_has_no_scores(how):
    x = spikes_of(15)
    m = factors(x, **how)
    out = marginal(m)
    assert not {"score", "second", "gain", "z"} & set(out.named_vars)
    p = {k: v for k, v in derive(m).initial(np.random.default_rng(0)).items() if k != "z"}
    graph = pm.model.transform.conditioning.remove_value_transforms(out)
    got = graph.compile_fn(graph.potentiallogp)({k.name: p[k.name] for k in graph.value_vars})
    want = logsumexp(np.stack([np.log(p["w"][k]) + stats.multivariate_normal(a, C).logpdf(x) for k, (a, C) in enumerate(by_hand(p, 2, 3, **how))], 1), axis=1).sum()
    assert np.isclose(got, want, rtol=1e-9)


# ---- samplers against what they must sample from
def number(v): return np.asarray(v, float)

def generic_summaries(m, d):
    "Numbers that the joint distribution fixes, the same for either sign of loadings that only scores multiply."
    sizes = {k: d.family[k].name for k in d.parameters}
    def of(p, x):
        z, out = np.asarray(p[d.assignments]), []
        for k, kind in sizes.items():
            v = number(p[k])
            if kind in ("Normal", "MvNormal"):
                out += [(v**2).mean(), np.log1p(v**2).mean(), (v[:, 0]*v[:, 1]).mean(), (v[z]**2).mean(), ((x*v[z]).sum(1)**2).mean()**.5, ((v[0] - v[1])**2).mean()]
                if k == "mu": out += [v.mean(), v[z].mean(), (x*v[z]).mean()]
            elif kind in ("InverseGamma", "Gamma"): out += [np.log(v).mean(), (np.log(v)**2).mean(), (v**-.5).mean()]
            elif kind == "Wishart": out += [np.log(np.linalg.det(v)).mean(), v[..., 0, 1].mean(), np.trace(v, axis1=-2, axis2=-1).mean()**.5]
            else: out += [v[0], (v**2).sum()]
        c = np.bincount(z, minlength=d.n_units)/len(z)
        return np.array(out + [c[0], (c**2).sum(), np.log1p((x**2).sum(1)).mean()])
    return of

def joint_distribution_score(model, summaries, sweeps, seed=0):
    "Geweke's test: alternate data given everything but the scores (drawn by PyMC) and a sweep given data; every variable must keep its prior."
    d, rng, seen = closed_form(derive(model)), np.random.default_rng(seed + 2), derive(model).observed[0]
    assert isinstance(d, closed_forms._Factors)
    names = [v.name for v in model.free_RVs if v.name not in d.scores]
    prior = pm.draw([model[k] for k in [*names, seen]], sweeps, random_seed=seed)
    free = np.array([summaries(dict(zip(names, row)), row[-1]) for row in zip(*prior)])
    fixed = pm.do(model, {k: v[0] for k, v in zip(names, prior)})
    data = pm.compile([], fixed[seen], random_seed=seed + 1)
    point, out = {k: np.asarray(v[0]) for k, v in zip(names, prior)}, []
    for _ in range(sweeps):
        for k in names: fixed[k].set_value(np.asarray(point[k], fixed[k].dtype))
        x = data()
        joined = d.joined(point)
        s = hard_statistics(x, joined[d.assignments], d.n_states, True)
        after = gibbs_step(d, Spikes(x), Sweep(joined, s, np.nan), rng).point
        point = {**{k: v for k, v in after.items() if k != d.assignments}, **d.each(after[d.assignments])}
        out.append(summaries(point, x))
    chain = np.array(out)
    blocks = np.array([b.mean(0) for b in np.array_split(chain, 40)])
    return (chain.mean(0) - free.mean(0))/np.sqrt(blocks.var(0, ddof=1)/40 + free.var(0)/len(free))

geweke = [dict(noise="white"), dict(kind="two", noise="precision", mean=.5), dict(kind="gain", noise="white", width="variance"), dict(kind="columns", noise="wishart"), dict(noise="shared", width="precision"),
          dict(kind="gain", noise="diagonal")]

@pytest.mark.slow
@pytest.mark.parametrize("how", geweke, ids=["-".join(map(str, s.values())) for s in geweke])
def test_geweke(how):
    m = factors(spikes_of(12, 2), sd=1., **how)              # means that few spikes can move far: else sweeps hang together too long
    score = joint_distribution_score(m, generic_summaries(m, derive(m)), 4000)
    assert (np.abs(score) < 4.2).all() and np.mean(score**2) < 3, score

@pytest.mark.slow
@pytest.mark.parametrize("directions", [1, 2])
def test_geweke_of_collisions_with_directions(directions):
    x = np.random.default_rng(0).normal(size=(10, 2))*[2., 1.]
    dof = dict.fromkeys(("common_dof", "collision_dof", "kind_dof"), 8.)
    m = collisions(x, 2, kinds=2, directions=directions, priors=dict(mean=0., mean_sd=2., variance_scale=1., collision_odds=2., size_shape=5., direction_scale=.8, **dof))
    def summaries(p, x):
        z, c, out = np.asarray(p["assignments"]), np.asarray(p["collided"]), []
        for k in ("common_covariance", "precisions", "collision_precision", "kind_precisions"):
            out += [np.log(np.linalg.det(p[k])).mean(), p[k][..., 0, 1].mean(), np.trace(p[k], axis1=-2, axis2=-1).mean()**.5]
        for k in ("means", "displacements"): out += [p[k].mean(), (p[k]**2).mean()]
        for k in (f"loadings_{j}" for j in range(directions)):
            v = p[k]
            out += [(v**2).mean(), np.log1p(v**2).mean(), (v[:, 0]*v[:, 1]).mean(), (v[z]**2).mean(), (v[z]**2*(c > 0)[:, None]).mean(), ((x*v[z]).sum(1)**2).mean()**.5]
        out += [np.log(p["sizes"]).mean(), (np.log(p["sizes"])**2).mean(), (np.log(p["sizes"])*(p["means"]**2).mean(1)).mean(), p["collided_fraction"], (c > 0).mean(), (c == 1).mean(), (c == 2).mean(),
                p["kind_shares"][0], (p["kind_shares"]**2).sum(), p["weights"][0], (p["weights"]**2).sum(), ((np.bincount(z, minlength=2)/len(z))**2).sum(),
                p["means"][z].mean(), (p["means"][z]**2*(c > 0)[:, None]).mean(), np.log1p((x**2).sum(1)).mean()]
        return np.array(out, float)
    score = joint_distribution_score(m, summaries, 4000)
    assert (np.abs(score) < 4.2).all() and np.mean(score**2) < 3, score


# ---- a few points in one dimension, by enumeration and quadrature
def exact_scores(x, K, alpha=2., grid=120):
    "Posterior probabilities of the partitions, means integrated out by hand, loadings and the noise variance by quadrature; and the posterior mean of log variance."
    from test_inference_exact import partition
    from scipy.special import gammaln
    u = (np.arange(grid) + .5)/grid
    var, load = stats.invgamma.ppf(u, 3., scale=2.), stats.norm.ppf((np.arange(400) + .5)/400)
    def block(S):
        y, n = x[list(S)], len(S)
        own = load[None, :]**2 + var[:, None]                       # (var, load)
        total = own + n*9.
        quad = (y**2).sum()/own - 9.*y.sum()**2/(own*total)
        l = -.5*(n*np.log(2*np.pi) + (n - 1)*np.log(own) + np.log(total) + quad)
        return logsumexp(l, axis=1) - np.log(len(load))
    memory, out = {}, {}
    for z in itertools.product(range(K), repeat=len(x)):
        c = np.bincount(z, minlength=K)
        l = np.full(grid, (gammaln(alpha + c) - gammaln(alpha)).sum())
        for k in set(z):
            S = tuple(np.flatnonzero(np.equal(z, k)))
            if S not in memory: memory[S] = block(S)
            l = l + memory[S]
        out.setdefault(partition(z), []).append(l)
    L = {p: logsumexp(v, axis=0) for p, v in out.items()}
    all_ = logsumexp(list(L.values()), axis=0)
    p = {k: float(np.exp(logsumexp(v) - logsumexp(all_))) for k, v in L.items()}
    return p, float(np.exp(all_ - logsumexp(all_)) @ np.log(var))

@pytest.mark.slow
@pytest.mark.parametrize("method", ["gibbs", "nuts"])
def test_four_points_by_enumeration(method):
    from test_inference_exact import agree
    x = np.array([-2.5, -1., 1.2, 4.])
    exact, log_var = exact_scores(x, 2)
    assert abs(sum(exact.values()) - 1) < 1e-10 and len(exact) == 8
    how = dict(draws=6000, tune=100, chains=4) if method == "gibbs" else dict(draws=1500, tune=700, chains=2)
    post = fit(factors(x[:, None], noise="white"), method, seed=2, **how, **quiet).posterior
    assert agree(post.z.values, exact) < (.05 if method == "gibbs" else .08)
    blocks = np.array([b.mean() for chain in np.log(post["var"].values) for b in np.array_split(chain, 8)])
    assert abs(blocks.mean() - log_var) < 4.5*blocks.std(ddof=1)/np.sqrt(len(blocks))


@pytest.mark.parametrize("seed", [0, 1])
def test_gains_do_not_stay_at_the_scale_of_a_wrong_start(seed):
    rng = np.random.default_rng(3)
    templates, unit = np.array([[-34., -24, -2, -5], [3, 3, 27, -14], [-5, 26, 9, 8]]), rng.integers(3, size=400)
    x = rng.normal(1, .15, (400, 1))*templates[unit] + rng.normal(size=(400, 4))
    found = fit(template_mixture(x, 3), "vb", draws=50, seed=seed, progressbar=False)
    assert abs(found.posterior["gain_variance"].mean()/.15**2 - 1) < .3
    assert np.abs(np.sort(found.posterior["means"].mean(("chain", "draw")).values, 0) - np.sort(templates, 0)).max() < 1.5


def test_scores_around_zero_have_no_scale_to_return_to():
    x = toy(300, 4, 3, seed=1)[0]                                   # read to round-off, the scores' mean was 1e-16, and rows were multiplied by its inverse: singular matrices in one fit of six
    model = collisions(x, 3, kinds=2)
    d = closed_form(derive(model))
    assert "quadratic" in d._checked and not d._score_mean.any()
    assert d.rescaled({k: factor_near(d.family[k], v) for k, v in d.initial().items() if k in d.parameters}, None) is None
    for seed in (2, 10): assert np.isfinite(log_density(fit(model, "vb", draws=5, seed=seed, **quiet), x)).all()

@pytest.mark.parametrize("scale", [1e16, 1e200, np.nan, np.inf])
def test_a_rescaling_or_move_without_covariances_is_refused(scale, monkeypatch):
    x = spikes_of(120)
    d = closed_form(derive(factors(x, kind="gain")))
    local = variational.Subset(d, x, closed_forms.parts(d))
    state = local.passes(local.start(0), 3)
    broken = {k: (v[0], v[1]*scale) if k == "mu" else v for k, v in state.q.items()}
    d.rescaled = lambda q, s: broken
    with np.errstate(all="raise"): assert local.rescale(state) is state or local.rescale(state).elbo > state.elbo
    new = local._judge(state, state.R, broken)
    assert new is None or new.elbo > state.elbo
    def singular(*_, **__): raise np.linalg.LinAlgError("Matrix is not positive definite")
    monkeypatch.setattr(variational, "_settle", singular)
    assert local.rescale(state) is state and local._judge(state, state.R, state.q) is None
    assert local.merge(state, 0, 1) == (-np.inf, None) and local.split(state, 0, 1, "axis") == (-np.inf, None, None)
    order = np.argsort(local.sizes(state.s))                       # smallest first, so that there is something to sort
    R = state.R.copy(); R[:, local.states[[0, 1]]] = state.R[:, local.states[order]]
    assert local.sort(state._replace(R=R, s=local.statistics(R))) is None
    assert local._spare(state, 5) == (None, None)
