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
