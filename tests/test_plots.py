"""Figures: every function on data from 7 to 384 channels, axes in and out, nothing global touched, legible on light and dark."""
import inspect

import matplotlib
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings as budget, strategies as st
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from spike_ppl import plots


def made(n=300, channels=7, units=4, seed=0):
    "Waveforms, features and labels of well separated units."
    rng = np.random.default_rng(seed)
    xy = np.c_[np.tile([0., 32.], channels)[:channels], np.repeat(np.arange(channels) * 20., 2)[:channels]]
    time = np.arange(-15, 16) / 20
    centre = xy[rng.choice(channels, units, replace=units > channels)]
    size = np.exp(-((centre[:, None] - xy[None]) ** 2).sum(-1) / 2000) * rng.uniform(5, 20, units)[:, None]
    labels = rng.integers(0, units, n)
    values = -np.exp(-(time / .2) ** 2)[None, :, None] * size[labels][:, None] + rng.normal(size=(n, 31, channels))
    sample = np.sort(rng.integers(100, 600_000, n))
    coords = dict(time=time, channel=[str(i) for i in range(channels)], x=("channel", xy[:, 0]), y=("channel", xy[:, 1]), sample_index=("spike", sample))
    waveforms = xr.DataArray(values, dims=("spike", "time", "channel"), coords=coords, attrs=dict(sampling_rate=20_000., units="noise sd"))
    features = xr.DataArray(values[:, 15], dims=("spike", "feature"), coords=dict(feature=[f"c{i}_l0" for i in range(channels)], sample_index=("spike", sample)), attrs=dict(sampling_rate=20_000.))
    return waveforms, features, labels


def fits(features, labels, units=4, draws=12):
    "A hand-made fit in the contract's form, so that this file tests figures and nothing else."
    rng = np.random.default_rng(0)
    n, d = features.shape
    z = np.where(rng.random((2, draws, n)) < .03, rng.integers(0, units, (2, draws, n)), labels)
    coords = dict(chain=[0, 1], draw=np.arange(draws), unit=np.arange(units), feature=features.feature.values)
    means = np.stack([features.values[labels == u].mean(0) for u in range(units)]) + rng.normal(size=(2, draws, units, d)) * .1
    weights = np.stack([[np.bincount(row, minlength=units) / n for row in chain] for chain in z])
    posterior = xr.Dataset(dict(assignments=(("chain", "draw", "spike"), z), weights=(("chain", "draw", "unit"), weights), means=(("chain", "draw", "unit", "feature"), means)), coords=coords)
    path = xr.Dataset(dict(elbo=("iteration", -1e3 / np.arange(1, 20)), weights=(("iteration", "unit"), np.tile(weights[0, :1], (19, 1)))), coords=dict(unit=np.arange(units)))
    tree = xr.DataTree.from_dict(dict(posterior=posterior, optimisation=path, observed_data=xr.Dataset(dict(features=features.reset_coords(drop=True)))))
    tree.attrs = dict(roles='{"assignments": "assignments", "weights": "weights", "observed": "features", "outlier_unit": null}', method="gibbs")
    return tree


def recording(channels, seconds=1.):
    from spikeinterface.core import generate_recording
    return generate_recording(num_channels=channels, durations=[seconds], sampling_frequency=20_000., seed=0, set_probe=True)


def drawings(channels=7):
    "name -> (function of ax, number of axes or None when one axes is divided)."
    w, f, l = made(channels=channels)
    fit = fits(f, l)
    rec = recording(channels)
    t = w.sample_index.values / 20_000.
    square = xr.DataArray(np.eye(4), dims=("unit", "unit_bis"), coords=dict(unit=range(4)))
    return dict(
        traces=lambda ax: plots.traces(rec, duration=.02, sorting=(np.array([50, 120]), np.array([0, -1])), ax=ax),
        probe=lambda ax: plots.probe(w, radius=50., units={0: (0., 0.), 1: (32., 20.)}, ax=ax),
        spike=lambda ax: plots.spike(w, 3, ax=ax),
        unit_waveforms=lambda ax: plots.unit_waveforms(w, l, 2, ax=ax),
        templates=lambda ax: plots.templates(w, l, ax=ax),
        overlay=lambda ax: plots.templates(w, l, overlay=True, ax=ax),
        similarity=lambda ax: plots.similarity(square, ax=ax),
        clusters=lambda ax: plots.clusters(f, l, ax=ax),
        neighbour_grid=lambda ax: plots.neighbour_grid(f, l, ax=ax),
        unit_composite=lambda ax: plots.unit_composite(f, w, l, 1, ax=ax),
        cluster_sizes=lambda ax: plots.cluster_sizes(fit, ax=ax),
        n_units=lambda ax: plots.n_units(np.array([0, .2, .5, .3]), truth=2, ax=ax),
        coclustering=lambda ax: plots.coclustering((l[:, None] == l[None]) * .9, l, ax=ax),
        parameters=lambda ax: plots.parameters(fit, "means", ax=ax),
        elbo=lambda ax: plots.elbo(fit, ax=ax),
        optimisation_path=lambda ax: plots.optimisation_path(fit, ax=ax),
        ppc=lambda ax: plots.ppc(f, f.values + np.zeros((3, 1, 1)), ax=ax),
        reliability=lambda ax: plots.reliability(np.linspace(0, 1, 50), np.arange(50) % 2 == 0, ax=ax),
        residuals=lambda ax: plots.residuals(np.random.default_rng(0).normal(size=f.shape), l, ax=ax),
        amplitude_over_time=lambda ax: plots.amplitude_over_time(w, l, ax=ax),
        correlograms=lambda ax: plots.correlograms((w.sample_index.values, l), sampling_rate=20_000., units=[0, 1], ax=ax),
        cross_correlogram=lambda ax: plots.cross_correlogram(t[l == 0], t[l == 1], unit=0, other=1, ax=ax),
        intervals=lambda ax: plots.intervals(t[l == 0], ax=ax),
        merge_evidence=lambda ax: plots.merge_evidence(f, w, l, 0, 1, ax=ax),
    )


FUNCTIONS = list(drawings())


@pytest.fixture(scope="module")
def seven(): return drawings(7)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_draws_on_new_axes_and_on_given_ones(seven, name):
    before = dict(matplotlib.rcParams)
    new = seven[name](None)
    first = np.ravel(np.asarray(new, dtype=object))[0]
    assert first.figure is not None and not pyplot.get_fignums()
    first.figure.savefig("/dev/null", format="png", dpi=30)
    fig = Figure(figsize=(9, 6))
    mine = fig.add_subplot(1, 2, 1)
    out = seven[name](mine)
    for ax in np.ravel(np.asarray(out, dtype=object)): assert ax.figure is fig
    if not isinstance(out, np.ndarray): assert out is mine
    fig.savefig("/dev/null", format="png", dpi=30)
    assert dict(matplotlib.rcParams) == before, "a figure changed the global style"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_axes_say_their_units(seven, name):
    "Every visible axes of one-panel figures is labelled, with units where the quantity has any."
    out = seven[name](None)
    if isinstance(out, np.ndarray):
        words = [a.get_xlabel() for a in out.ravel()] + [getattr(out.ravel()[0].figure._supxlabel, "get_text", str)()]
        assert any(words), "no panel and no figure label says what is across"
        return
    assert out.get_xlabel() and out.get_ylabel()
    for label in (out.get_xlabel(), out.get_ylabel()):
        if label.split()[0] in ("time", "lag", "interval", "x", "y", "amplitude", "ELBO", "residual"): assert "[" in label, label


@pytest.mark.parametrize("channels", [1, 32, 384])
@pytest.mark.parametrize("name", ["traces", "probe", "spike", "unit_waveforms", "templates", "overlay", "clusters", "neighbour_grid", "unit_composite"])
def test_any_number_of_channels(channels, name):
    out = drawings(channels)[name](None)
    ax = np.ravel(np.asarray(out, dtype=object))[0]
    ax.figure.savefig("/dev/null", format="png", dpi=30)
    if name in ("spike", "unit_waveforms", "templates") and channels == 384:
        sites = {line.get_gid(): np.isnan(line.get_ydata()).sum() for line in ax.lines}
        assert max(v for k, v in sites.items() if k in ("spike", "mean") or (k or "").startswith("unit")) <= 16, "too many channels in one panel"


def test_one_colour_per_unit(seven):
    w, f, l = made()
    a, b = plots.clusters(f, l), plots.templates(w, l, overlay=True)
    for u in range(4):
        dot = next(c for c in a.collections if c.get_gid() == f"unit {u}")
        line = next(c for c in b.lines if c.get_gid() == f"unit {u}")
        assert np.allclose(dot.get_facecolor()[0, :3], to_rgb(plots.unit_colour(u))) and line.get_color() == plots.unit_colour(u)
    subset = plots.clusters(f, l, units=[3])
    assert np.allclose(subset.collections[0].get_facecolor()[0, :3], to_rgb(plots.unit_colour(3))), "a unit's colour changed with the company it is in"


@given(st.integers(0, 10_000))
@budget(max_examples=60, deadline=None)
def test_colours_are_legible_on_light_and_dark(unit):
    rgb = np.array(to_rgb(plots.unit_colour(unit)))
    light = np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4) @ [.2126, .7152, .0722]
    assert 1.05 / (light + .05) > 1.5 and (light + .05) / (.0056 + .05) > 1.9
    assert plots.unit_colour(-1 - unit) == plots.unit_colour(-1)


@given(n=st.integers(2, 80), d=st.integers(1, 6), k=st.integers(1, 5), method=st.sampled_from(["lda", "pca"]), seed=st.integers(0, 99))
@budget(max_examples=60, deadline=None)
def test_plane_is_finite_and_repeatable(n, d, k, method, seed):
    rng = np.random.default_rng(seed)
    x, labels = rng.normal(size=(n, d)), rng.integers(0, k, n)
    p = plots.plane(x, labels, method=method)
    assert p.shape == (d, 2) if d > 1 else p.shape == (1, 2)
    assert np.isfinite(p).all() and np.array_equal(p, plots.plane(x, labels, method=method))


def test_plane_finds_the_separating_direction():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 500)
    x = rng.normal(size=(1000, 8)) * [9, 7, 5, 1, 1, 1, 1, 1]
    x[:, 6] += 6 * labels          # what separates is not what spreads
    w = plots.plane(x, labels)[:, 0]
    assert abs(w[6]) > .98 * np.linalg.norm(w)
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    ours, theirs = x @ w, LinearDiscriminantAnalysis().fit(x, labels).transform(x)[:, 0]
    assert abs(np.corrcoef(ours, theirs)[0, 1]) > .999


@given(times=st.lists(st.integers(0, 4000), min_size=0, max_size=60), other=st.lists(st.integers(0, 4000), min_size=0, max_size=60))
@budget(max_examples=80, deadline=None)
def test_correlogram_counts_every_pair_once(times, other):
    a, b = np.array(times, float) / 20_000, np.array(other, float) / 20_000
    edges, count = plots.correlogram(a, b, window=20., bin=1.)
    lag = (b[None] - a[:, None]) * 1e3
    inside = np.abs(lag) < 20 - 1e-6
    assert count.sum() == inside.sum()
    reverse = plots.correlogram(b, a, window=20., bin=1.)[1]
    zero = int((np.abs(lag) < 1e-9).sum())
    assert np.array_equal(np.delete(count[::-1], [19, 20]), np.delete(reverse, [19, 20])) and count[::-1][[19, 20]].sum() == reverse[[19, 20]].sum()
    auto = plots.correlogram(a, window=20., bin=1.)[1]
    distinct = np.unique(a)
    if len(distinct) == len(a): assert np.array_equal(auto, auto[::-1])
    assert zero >= 0


def test_a_spike_of_no_unit_is_grey_and_left_out_unless_asked():
    w, f, l = made()
    l = l.copy(); l[:30] = -1
    assert not [c for c in plots.clusters(f, l).collections if c.get_gid() == "unit -1"]
    grey = next(c for c in plots.clusters(f, l, outliers=True).collections if c.get_gid() == "unit -1")
    assert len(grey.get_offsets()) == 30


@pytest.mark.parametrize("call, says", [
    (lambda w, f, l: plots.clusters(f, l[:-1]), "labels for"),
    (lambda w, f, l: plots.clusters(f, l, units=[77]), "have no spikes"),
    (lambda w, f, l: plots.clusters(f, l.astype(float)), "one integer per spike"),
    (lambda w, f, l: plots.clusters(f, l, method="umap"), "'lda' or 'pca'"),
    (lambda w, f, l: plots.unit_waveforms(w, l, 99), "have no spikes"),
    (lambda w, f, l: plots.templates(w, l, units=[99]), "have no template"),
    (lambda w, f, l: plots.spike(w, 3, channels=["x"]), "not among"),
    (lambda w, f, l: plots.neighbour_grid(f, l, ax=[Figure().add_subplot()]), "4 panels"),
    (lambda w, f, l: plots.similarity(np.zeros((2, 3))), "square"),
    (lambda w, f, l: plots.reliability([.5], None), "outcomes"),
    (lambda w, f, l: plots.reliability([1.5], [1]), "in 0..1"),
    (lambda w, f, l: plots.parameters(fits(f, l), "nope"), "no variable 'nope'"),
    (lambda w, f, l: plots.ppc(f), "predicted"),
    (lambda w, f, l: plots.amplitude_over_time(np.ones(len(l)), l), "times in s"),
    (lambda w, f, l: plots.correlograms((w.sample_index.values, l)), "sampling_rate"),
])
def test_errors_say_what_to_do(call, says):
    w, f, l = made()
    with pytest.raises((ValueError, IndexError), match=says): call(w, f, l)


def test_every_figure_takes_ax_and_says_what_it_draws():
    for name in plots.__all__:
        f = getattr(plots, name)
        if not inspect.isfunction(f) or name in ("unit_colour", "plane", "correlogram", "plain"): continue
        assert "ax" in inspect.signature(f).parameters, f"{name} takes no ax"
        assert (f.__doc__ or "").startswith("Draw"), f"{name} does not say what it draws"
