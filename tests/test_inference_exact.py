"""Samplers against what they must sample from: enumeration, Geweke's joint-distribution test, simulation-based calibration, NUTS."""
import itertools, json
import arviz as az, numpy as np, pytest
import pymc as pm, pytensor.tensor as pt
from scipy.special import gammaln
from scipy.stats import beta, gamma, invgamma, kstest, norm
from spike_ppl.conjugate import derive
from spike_ppl.passes import Spikes, hard_statistics
from spike_ppl.closed_forms import closed_form
from spike_ppl.gibbs import Sweep, gibbs_step, SplitMerge
from spike_ppl.inference import fit

quiet = dict(progressbar=False)
alpha, m0, v0, a0, b0 = .7, 0., 1.5, 3., .6


def mixture(x, K=3):
    x = np.asarray(x, float).reshape(len(x), -1)
    with pm.Model() as m:
        w = pm.Dirichlet("w", np.full(K, alpha))
        mu = pm.Normal("mu", m0, np.sqrt(v0), shape=(K, x.shape[1]))
        var = pm.InverseGamma("var", a0, b0, shape=(K, x.shape[1]))
        z = pm.Categorical("z", w, shape=len(x))
        pm.Normal("x", mu[z], pt.sqrt(var)[z], observed=x)
    return m

def sticks(x, K=4):
    x = np.asarray(x, float).reshape(len(x), -1)
    with pm.Model() as m:
        c = pm.Gamma("c", 3., 2.)
        v = pm.Beta("v", 1., c, shape=K - 1)
        w = pm.Deterministic("w", pt.concatenate([v, pt.ones(1)])*pt.concatenate([pt.ones(1), pt.cumprod(1 - v)]))
        mu = pm.Normal("mu", m0, np.sqrt(v0), shape=(K, x.shape[1]))
        var = pm.InverseGamma("var", a0, b0, shape=(K, x.shape[1]))
        z = pm.Categorical("z", w, shape=len(x))
        pm.Normal("x", mu[z], pt.sqrt(var)[z], observed=x)
    return m


def partition(z):
    names = {}
    return tuple(names.setdefault(k, len(names)) for k in z)

def normal_block(y):
    "Log density of the points of one unit: the mean integrated out analytically, the variance by quadrature."
    v = invgamma.ppf((np.arange(4000) + .5)/4000, a0, scale=b0)
    precision, linear = 1/v0 + len(y)/v, m0/v0 + y.sum()/v
    return np.log(np.mean(np.exp(-.5*len(y)*np.log(2*np.pi*v) - .5*(y**2).sum()/v - .5*np.log(v0*precision) + .5*linear**2/precision - .5*m0**2/v0)))

def counts_block(y, a=1.5, b=.2):
    "Log probability of the counts of one unit, their rate integrated out."
    return a*np.log(b) - gammaln(a) + gammaln(a + y.sum()) - (a + y.sum())*np.log(b + len(y)) - gammaln(y + 1).sum()

def exact_partitions(x, K, density=normal_block):
    "Posterior probability of every partition of a few points, the weights integrated out."
    n, memory, out = len(x), {}, {}
    def block(S):
        if S not in memory: memory[S] = density(x[list(S)])
        return memory[S]
    for z in itertools.product(range(K), repeat=n):
        c = np.bincount(z, minlength=K)
        l = (gammaln(alpha + c) - gammaln(alpha)).sum() + sum(block(tuple(np.flatnonzero(np.equal(z, k)))) for k in set(z))
        out[partition(z)] = np.logaddexp(out.get(partition(z), -np.inf), l)
    p = np.exp(np.array(list(out.values())) - np.logaddexp.reduce(list(out.values())))
    return dict(zip(out, p))

def agree(z, exact, worst=4.5):
    "Frequencies of partitions, assignments (chain, draw, spike), against their probabilities, within Monte-Carlo error."
    top = sorted(exact, key=exact.get, reverse=True)[:25]
    index = {p: i for i, p in enumerate(exact)}
    blocks = np.array([np.bincount([index[partition(row)] for row in part], minlength=len(exact))/len(part)
                       for chain in z for part in np.array_split(chain, 8)])
    mean, error = blocks.mean(0), blocks.std(0, ddof=1)/np.sqrt(len(blocks))
    score = np.array([(mean[index[p]] - exact[p])/max(error[index[p]], 2e-4) for p in top])
    assert (np.abs(score) < worst).all() and np.mean(score**2) < 2.2, score
    return .5*np.abs(mean - np.array(list(exact.values()))).sum()

@pytest.mark.parametrize("moves", [pytest.param(False, marks=pytest.mark.slow), True])
def test_six_points_three_units_by_enumeration(moves):
    x = np.array([-1.2, -.8, .1, .3, 1.4, 2.])
    exact = exact_partitions(x, 3)
    assert abs(sum(exact.values()) - 1) < 1e-12 and len(exact) == 122     # partitions of 6 into at most 3
    f = fit(mixture(x), "gibbs", draws=4000, tune=100, chains=4, seed=2, moves=moves, **quiet)
    assert agree(f["posterior"].z.values, exact) < .05


@pytest.mark.parametrize("moves", [pytest.param(False, marks=pytest.mark.slow), True])
def test_six_counts_three_units_by_enumeration(moves):
    "Poisson components: no statistics of Gaussian units, every step from the enumerated graph."
    x = np.array([0, 1, 4, 7, 9, 16])
    exact = exact_partitions(x, 3, counts_block)
    with pm.Model() as m:
        w = pm.Dirichlet("w", np.full(3, alpha))
        rate = pm.Gamma("rate", 1.5, .2, shape=3)
        z = pm.Categorical("z", w, shape=6)
        pm.Poisson("n", rate[z], observed=x)
    f = fit(m, "gibbs", draws=2500, tune=50, chains=4, seed=3, moves=moves, **quiet)
    assert agree(f["posterior"].z.values, exact) < .06
    if moves: assert all(int(v.split()[0]) > 20 for v in json.loads(f.attrs["moves"]).values())


def collision_weights(x, K, near, far, odds):
    "Posterior probabilities of all (assignments, collided) of a few points: weights, fraction and means integrated out."
    from scipy.special import betaln
    n, memory, out = len(x), {}, {}
    def block(S, c):
        if (S, c) not in memory:
            v = np.where(np.array(c) == 1, far, near)
            y, C = x[list(S)], np.diag(v) + v0
            memory[S, c] = -.5*(len(S)*np.log(2*np.pi) + np.linalg.slogdet(C)[1] + y @ np.linalg.solve(C, y))
        return memory[S, c]
    for z in itertools.product(range(K), repeat=n):
        size = np.bincount(z, minlength=K)
        share = (gammaln(alpha + size) - gammaln(alpha)).sum()
        groups = [tuple(np.flatnonzero(np.equal(z, k))) for k in set(z)]
        for c in itertools.product(range(2), repeat=n):
            l = share + betaln(1 + sum(c), odds + n - sum(c)) + sum(block(S, tuple(c[i] for i in S)) for S in groups)
            key = partition(z), c
            out[key] = np.logaddexp(out.get(key, -np.inf), l)
    p = np.exp(np.array(list(out.values())) - np.logaddexp.reduce(list(out.values())))
    return dict(zip(out, p))

@pytest.mark.parametrize("method", ["gibbs", pytest.param("nuts", marks=pytest.mark.slow)])
def test_five_points_that_may_have_collided_by_enumeration(method):
    "Two discrete variables per point, drawn as one; NUTS sums both out."
    x, K, near, far, odds = np.array([-1.1, -.9, .2, 1.5, 4.5]), 2, .1, 4., 3.
    exact = collision_weights(x, K, near, far, odds)
    with pm.Model() as m:
        w = pm.Dirichlet("w", np.full(K, alpha))
        f = pm.Beta("f", 1., odds)
        mu = pm.Normal("mu", m0, np.sqrt(v0), shape=K)
        z = pm.Categorical("z", w, shape=5)
        c = pm.Bernoulli("c", f, shape=5)
        pm.Normal("x", mu[z], pt.sqrt(pt.as_tensor([near, far]))[c], observed=x)
    how = dict(draws=6000, tune=200) if method == "gibbs" else dict(draws=1500, tune=700)
    post = fit(m, method, chains=4, seed=4, **how, **quiet)["posterior"]
    together = {}
    for (p, hit), value in exact.items(): together[p] = together.get(p, 0) + value
    assert agree(post.z.values, together) < (.05 if method == "gibbs" else .1)
    alone = np.array([sum(v for (_, hit), v in exact.items() if hit[i]) for i in range(5)])
    assert np.abs(post.c.values.mean((0, 1)) - alone).max() < (.03 if method == "gibbs" else .05)


def geweke(build, prior, n, sweeps, moves, seed):
    "Alternate data given parameters and a sweep given data; the parameters must keep their prior."
    rng = np.random.default_rng(seed)
    d = closed_form(derive(build(rng.normal(size=(n, 1)))))
    w, x = None, rng.normal(size=(n, 1))
    point = prior(rng)
    z = point.pop("z")
    jump = SplitMerge(d, Spikes(x), scans=2)
    assert jump.reason is None
    full, out = False, []
    for t in range(sweeps):
        x = point["mu"][z] + np.sqrt(point["var"][z])*rng.normal(size=(n, 1))
        s = hard_statistics(x, z, d.n_units, full)
        state, jump.x = Sweep({**point, "z": z}, s, np.nan), x
        if moves: state = jump(state, rng)
        state = gibbs_step(d, Spikes(x), state, rng)
        if moves: state = jump.labels(jump(state, rng), rng)
        point = {k: v for k, v in state.point.items() if k != "z"}
        z = state.point["z"]
        out.append(summary(point, z, d))
    return np.array(out), jump

def summary(point, z, d):
    K = len(point["mu"])
    w = point["w"] if "w" in point else weights_of(point["v"]) if "v" in point else grown_weights(point["extra_units"], point["sticks"])
    c = np.bincount(z, minlength=K)
    out = [np.log(point["var"]).mean(), (np.log(point["var"])**2).mean(), point["mu"].mean(), (point["mu"]**2).mean(), (w**2).sum(), w[0], (c > 0).sum(),
           (c/len(z))@(c/len(z)), point["mu"][z].mean(), (point["mu"][z]**2).mean()]
    more = [point["extra_units"], point["extra_units"]**2, point["extra_units"] + 1 - (c > 0).sum()] if "extra_units" in point else []
    return out + more + ([point["c"], np.log(point["c"])] if "c" in point else [])

def weights_of(v): return np.r_[v, 1]*np.r_[1, np.cumprod(1 - v)]

def grown_weights(extra, sticks):
    "Weights when stick k is the share of unit k + 1 among the first k + 2, and units 0 .. extra exist."
    w = np.ones(1)
    for v in sticks[:int(extra)]: w = np.r_[w*(1 - v), v]
    return np.r_[w, np.zeros(len(sticks) - int(extra))]

many = np.array([.1, .2, .3, .4])                        # probabilities of 1 .. 4 units

def grown(x, K=4):
    from spike_ppl.models import _grown
    x = np.asarray(x, float).reshape(len(x), -1)
    with pm.Model(coords=dict(unit=range(K), stick=range(K - 1))) as m:
        w = _grown(dict(weight_concentration=alpha), K, many)
        mu = pm.Normal("mu", m0, np.sqrt(v0), shape=(K, x.shape[1]))
        var = pm.InverseGamma("var", a0, b0, shape=(K, x.shape[1]))
        z = pm.Categorical("z", w, shape=len(x))
        pm.Normal("x", mu[z], pt.sqrt(var)[z], observed=x)
    return m

def prior_grown(K, n):
    def draw(rng):
        extra, v = rng.choice(K, p=many), np.clip(rng.beta(alpha, alpha*np.arange(1, K)), 1e-12, 1 - 1e-12)
        return dict(extra_units=np.asarray(extra), sticks=v, mu=m0 + np.sqrt(v0)*rng.normal(size=(K, 1)), var=b0/rng.gamma(a0, size=(K, 1)),
                    z=rng.choice(K, n, p=grown_weights(extra, v)))
    return draw

def prior_mixture(K, n):
    def draw(rng):
        w = rng.dirichlet(np.full(K, alpha))
        return dict(w=w, mu=m0 + np.sqrt(v0)*rng.normal(size=(K, 1)), var=b0/rng.gamma(a0, size=(K, 1)), z=rng.choice(K, n, p=w))
    return draw

def prior_sticks(K, n):
    def draw(rng):
        c = rng.gamma(3.)/2
        v = rng.beta(1, c, K - 1)
        return dict(c=np.asarray(c), v=np.clip(v, 1e-12, 1 - 1e-12), mu=m0 + np.sqrt(v0)*rng.normal(size=(K, 1)), var=b0/rng.gamma(a0, size=(K, 1)), z=rng.choice(K, n, p=weights_of(v)))
    return draw

@pytest.mark.slow
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("build, prior, K", [(mixture, prior_mixture, 3), (sticks, prior_sticks, 4), (grown, prior_grown, 4)], ids=["gmm", "dpmm", "mfm"])
def test_geweke(build, prior, K, moves):
    n = 8
    chain, jump = geweke(lambda x: build(x, K), prior(K, n), n, 8000, moves, 11)
    rng, d = np.random.default_rng(5), None
    free = []
    for _ in range(8000):
        p = prior(K, n)(rng)
        z = p.pop("z")
        free.append(summary(p, z, d))
    free = np.array(free)
    blocks = np.array([b.mean(0) for b in np.array_split(chain, 40)])
    error = np.sqrt(blocks.var(0, ddof=1)/40 + free.var(0)/len(free))
    score = (chain.mean(0) - free.mean(0))/error
    assert (np.abs(score) < 4.).all() and np.mean(score**2) < 3, score
    if moves: assert (jump.accepted > 50).all(), (jump.accepted, jump.tried)


def calibration(method, rounds, keep, thin, n, **kwargs):
    "Ranks, jittered into (0, 1), of label-invariant truths among posterior draws: uniform if the sampler is right."
    K, ranks, rng = 2, [], np.random.default_rng(0)
    def invariant(w, mu, var): return [np.max(w, -1), np.sum(w*mu[..., 0], -1), np.sum(w*var[..., 0], -1), np.max(mu[..., 0], -1)]
    for r in range(rounds):
        p = prior_mixture(K, n)(rng)
        x = p["mu"][p["z"]] + np.sqrt(p["var"][p["z"]])*rng.normal(size=(n, 1))
        f = fit(mixture(x, K), method, draws=(keep - 1)*thin + 1, chains=1, seed=r, **kwargs, **quiet)["posterior"]
        draws = invariant(*(f[k].values[0, ::thin] for k in ("w", "mu", "var")))
        ranks.append([(d < t).sum() for d, t in zip(draws, invariant(p["w"], p["mu"], p["var"]))])
    return (np.array(ranks) + np.random.default_rng(1).random(np.shape(ranks)))/(keep + 1)

@pytest.mark.slow
@pytest.mark.parametrize("method, rounds, how", [("gibbs", 80, dict(keep=99, thin=4, n=30, tune=100)), ("nuts", 24, dict(keep=39, thin=5, n=15, tune=200))], ids=["gibbs", "nuts"])
def test_simulation_based_calibration(method, rounds, how):
    ranks = calibration(method, rounds, **how)
    for j in range(ranks.shape[1]):
        assert kstest(ranks[:, j], "uniform").pvalue > .002, j
        assert abs(((ranks[:, j] - .5)**2).mean() - 1/12) < 4*np.sqrt(1/180/rounds), j          # neither too narrow nor too wide


@pytest.mark.slow
def test_gibbs_and_nuts_agree_on_what_labels_do_not_change():
    rng = np.random.default_rng(3)
    x = np.r_[rng.normal(-1.5, .6, 25), rng.normal(1.5, .9, 35)]
    m = mixture(x, 2)
    g = fit(m, "gibbs", draws=3000, tune=200, chains=2, seed=1, **quiet)
    h = fit(m, "nuts", draws=800, tune=500, chains=2, seed=1, **quiet)
    def quantities(f):
        p = f["posterior"]
        z = p.z.values
        same = (z[..., 0] == z[..., -1]).astype(float)
        w, mu, var = p.w.values, p.mu.values[..., 0], p["var"].values[..., 0]
        return np.stack([np.max(w, -1), (w*mu).sum(-1), (w*(var + mu**2)).sum(-1), np.max(mu, -1), np.log(var).sum(-1), f["sample_stats"].lp.values, same], -1)
    a, b = quantities(g), quantities(h)
    def mean_error(v):
        blocks = np.array([c.mean(0) for chain in v for c in np.array_split(chain, 10)])
        return blocks.mean(0), blocks.std(0, ddof=1)/np.sqrt(len(blocks))
    (ma, ea), (mb, eb) = mean_error(a), mean_error(b)
    score = (ma - mb)/np.sqrt(ea**2 + eb**2)
    assert (np.abs(score) < 4.5).all(), score


@pytest.mark.slow
def test_nuts_is_calibrated_where_the_posterior_is_known():
    "One unit: the marginal model is a plain Normal; NUTS on it must give the conjugate answer."
    x = np.random.default_rng(0).normal(1., 1., (40, 1))
    with pm.Model() as m:
        w = pm.Dirichlet("w", np.ones(2))
        mu = pm.Normal("mu", 0., 2.)
        z = pm.Categorical("z", w, shape=40)
        pm.Normal("x", pt.stack([mu, mu])[z][:, None], 1., observed=x)
    f = fit(m, "nuts", draws=1000, tune=500, chains=2, seed=0, **quiet)
    precision = 1/4 + 40
    draws = f["posterior"].mu.values.ravel()
    assert abs(draws.mean() - x.sum()/precision) < .02 and abs(draws.std()*np.sqrt(precision) - 1) < .1


@pytest.mark.slow
def test_advi_is_a_baseline_that_runs():
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(-3, .5, 40), rng.normal(3, .5, 40)]
    f = fit(mixture(x, 2), "advi", draws=100, passes=5, seed=0, **quiet)
    assert f["posterior"].z.shape == (1, 100, 80) and np.isfinite(f["optimisation"].elbo.values[-1])


velocities = np.array([
    9172, 9350, 9483, 9558, 9775, 10227, 10406, 16084, 16170, 18419, 18552, 18600, 18927, 19052, 19070, 19330, 19343, 19349, 19440, 19473, 19529, 19541,
    19547, 19663, 19846, 19856, 19863, 19914, 19918, 19973, 19989, 20166, 20175, 20179, 20196, 20215, 20221, 20415, 20629, 20795, 20821, 20846, 20875,
    20986, 21137, 21492, 21701, 21814, 21921, 21960, 22185, 22209, 22242, 22249, 22314, 22374, 22495, 22746, 22747, 22888, 22914, 23206, 23241, 23263,
    23484, 23538, 23542, 23666, 23706, 23711, 24129, 24285, 24289, 24366, 24717, 24990, 25633, 26960, 26995, 32065, 32789, 34279])/1000
published = np.array([0, 0, .061, .128, .182, .199, .160, .109, .071, .040, .023, .013, .006, .003])      # of 1, 2, ... components

@pytest.mark.slow
def test_the_number_of_components_of_the_galaxies_is_the_published_one():
    "Richardson and Green (1997), Miller and Harrison (2018), on the velocities of Roeder (1990), through the public door."
    from spike_ppl.models import mfm
    R = np.ptp(velocities)
    model = mfm(velocities[:, None], max_units=30, units_prior=np.ones(30), learn_scale=True,
                priors=dict(mean=velocities.min() + R/2, mean_sd=R, variance_scale=.02*R**2, scale_shape=.2))
    K = fit(model, "gibbs", draws=10_000, tune=1000, chains=4, seed=1, **quiet)["posterior"].n_components.values
    assert float(az.rhat(K)) < 1.1 and float(az.ess(K)) > 60
    share = np.array([(block[:, None] == np.arange(1, 15)).mean(0) for chain in K for block in np.array_split(chain, 10)])
    error = np.sqrt(share.var(0, ddof=1)/len(share) + .002**2)                                          # of ours, and of the published one
    score = (share.mean(0) - published)/error
    assert np.abs(score).max() < 5 and .5*np.abs(share.mean(0) - published).sum() < .1, (share.mean(0).round(3), score.round(1))
