"""What each spike has of its own, a gain, a shift, factor scores, is integrated out: against SciPy, brute force, enumeration and Geweke's test."""
import itertools
import numpy as np, pymc as pm, pytensor.tensor as pt, pytest, xarray as xr
from scipy import stats
from scipy.special import logsumexp
from spike_ppl import conjugate, inference
from spike_ppl.conjugate import Scored, derive
from spike_ppl.inference import Spikes, Statistics, Sweep, fit, gibbs_step, log_density, marginal, predict
from spike_ppl.models import collisions, template_mixture, toy

quiet = dict(progressbar=False)

def spikes_of(n=60, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (3, d))[rng.integers(3, size=n)] + rng.normal(size=(n, d))

def factors(x, K=2, kind="one", noise="wishart", width=None, mean=0.):
    "A mixture with scores: `kind` says how they enter, `noise` what they leave, `width` what their variance is."
    n, d = x.shape
    with pm.Model(coords=dict(spike=range(n), unit=range(K))) as m:
        w = pm.Dirichlet("w", np.full(K, 2.), dims="unit")
        mu = pm.Normal("mu", 0., 3., shape=(K, d))
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
        for used in (d, inference._fast(d)):
            got = values_of(used.unit_quadratic(p), rows)
            assert np.allclose(got, want, rtol=1e-8, atol=1e-8)
        z = np.random.default_rng(1).integers(2, size=len(x))
        prior = sum(float(np.sum(t)) for t in [pm.logp(d.model[k], p[k]).eval() for k in ("w", "mu")])
        own = np.stack([np.log(p["w"][k]) + stats.multivariate_normal(m, C).logpdf(x) for k, (m, C) in enumerate(by_hand(p, 2, 3, **how))], 1)[np.arange(len(x)), z].sum()
        s = inference._hard_statistics(x, z, 2, True)
        other = d.log_joint(p, inference._hard_statistics(x[:0], z[:0], 2, True))
        assert np.isclose(d.log_joint(p, s) - other, own) and np.isclose(inference._fast(d).log_joint(p, s), d.log_joint(p, s)) and np.isfinite(prior)


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
    d = inference._fast(derive(factors(spikes_of(), **how)))
    assert isinstance(d, inference._Factors) and d._checked >= {*d.parameters, "quadratic", "joint"}
    x, rng = spikes_of(90, 3, 4), np.random.default_rng(8)
    s = inference._hard_statistics(x, rng.integers(2, size=90), 2, True)
    q = {k: inference._around(d.family[k], v) for k, v in d.initial(rng).items() if k in d.parameters}
    for _ in range(3): q = {k: d.expected_natural(k, q, d.averaged(q, s)) for k in d.parameters}                       # factors of several widths
    slow, whole = d._d, d.averaged(q, s)
    near = lambda a, b: all(np.allclose(u, v, rtol=1e-7, atol=1e-9*np.abs(v).max()) for u, v in zip(a, b))
    assert near(whole, slow.averaged(q, s)) and near(d.expected_quadratic(q), slow.expected_quadratic(q)) and np.isclose(d.energy(q, s), slow.energy(q, s), rtol=1e-9)
    for k in d.parameters: assert near(d.expected_natural(k, q, whole), slow.expected_natural(k, q, whole)), k


@pytest.mark.parametrize("how", [dict(noise="diagonal"), dict(noise="known"), dict(kind="gain", noise="diagonal", width="precision")])
def test_other_noise_keeps_the_derived_functions(how):
    x = spikes_of()
    m = factors(x, **how)
    d = inference._fast(derive(m))
    assert not d._checked
    elbo = fit(m, "vb", draws=5, starts=1, passes=8, **quiet)["optimisation"].elbo.values
    assert np.isfinite(elbo).all() and (np.diff(elbo) > -1e-6).all()


def test_closed_forms_know_sizes():
    x = spikes_of(80, 3)
    d = inference._fast(derive(collisions(x, 3, kinds=2, directions=2)))
    assert d._checked >= {*d.parameters, "quadratic", "joint"} and set(d._sized) == {"means", "loadings_0", "loadings_1"}
    d = inference._fast(derive(collisions(x, 3, kinds=0, directions=1)))
    assert d._checked >= {*d.parameters, "quadratic", "joint"}
    d = inference._fast(derive(template_mixture(x, 3)))
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
    monkeypatch.setattr(conjugate, "_plans", [])                 # what was found before is forgotten
    d = derive(factors(spikes_of(), width="variance"))
    name, change, dropped = wrong[which]
    right = getattr(inference._Factors, name)
    monkeypatch.setattr(inference._Factors, name, lambda self, *a: change(self, right(self, *a), *a))
    assert inference._fast(d)._checked == (everything - dropped if dropped else frozenset())


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

@pytest.mark.parametrize("noise", ["white", "shared", "wishart"])
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
