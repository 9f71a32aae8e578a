"""Explorers in process: set values, press buttons, look at the axes; bounds, what is missing, how much is drawn again, how long it takes."""
import base64

import numpy as np
import pytest
import traitlets
import xarray as xr

from spike_ppl.explore import Explorer, FitExplorer, ModelExplorer, Panel, RecordingExplorer, UnitExplorer
from spike_ppl.units import Clustering, Curation


def made(n=900, channels=7, units=4, seed=0):
    "Separate neurons; neuron 0 is cut in two by the toss of a coin (its other half has the highest number)."
    rng = np.random.default_rng(seed)
    xy = np.c_[np.tile([0., 30.], channels)[:channels], np.repeat(25. * np.arange(channels), 2)[:channels]]
    t = np.arange(-15, 16) / 20
    centre = xy[np.linspace(0, channels - 1, units).astype(int)]
    size = rng.uniform(10, 16, units)[:, None] * np.exp(-((centre[:, None] - xy[None]) ** 2).sum(-1) / 2000)
    true = rng.integers(0, units, n)
    w = (-np.exp(-(t / .2) ** 2)[None, :, None] * size[true][:, None] + rng.normal(size=(n, 31, channels))).astype("float32")
    sample = np.sort(rng.choice(np.arange(100, max(1_199_000, 60 * n), 50), n, replace=False))
    for u in range(units):
        mine = np.flatnonzero(true == u); true[mine[1:][np.diff(sample[mine]) < 60]] = -1
    labels = true.copy()
    half = np.flatnonzero(true == 0); labels[half[rng.random(len(half)) < .5]] = units
    coords = dict(time=t, channel=[str(i) for i in range(channels)], x=("channel", xy[:, 0]), y=("channel", xy[:, 1]), sample_index=("spike", sample))
    waveforms = xr.DataArray(w, dims=("spike", "time", "channel"), coords=coords, attrs=dict(sampling_rate=20_000., units="noise sd"))
    features = xr.DataArray(w[:, 12:19:3].transpose(0, 2, 1).reshape(n, -1), dims=("spike", "feature"), coords=dict(feature=[f"c{c}_l{l}" for c in range(channels) for l in range(3)], sample_index=("spike", sample)))
    return Clustering(xr.DataArray(labels, dims="spike", coords=dict(sample_index=("spike", sample)), attrs=dict(sampling_rate=20_000.)), waveforms=waveforms, features=features, probability=rng.beta(2, 1, n), duration=60.)


@pytest.fixture
def units(): return UnitExplorer(made())


def drawn(e): return {k: p.drawn for k, p in e.panels.items()}


def redrawn(e, before): return {k for k, p in e.panels.items() if p.drawn > before[k]}


# --- units

@pytest.mark.parametrize("change, panels", [
    (dict(threshold=.5), {"scatter", "templates", "intervals"}), (dict(method="pca"), {"scatter"}), (dict(neighbours=3), {"scatter", "templates"}),
    (dict(unit=2), {"scatter", "templates", "intervals", "evidence"}),
])
def test_only_what_changed_is_drawn_again(units, change, panels):
    before = drawn(units)
    for k, v in change.items(): setattr(units, k, v)
    assert redrawn(units, before) == panels


def test_controls_and_state_are_one(units):
    units._unit.value = 2
    assert units.unit == 2
    units.unit = 1
    assert units._unit.value == 1
    units.step(); units.step(-1)
    assert units.unit == 1
    units._threshold.value = .3
    assert units.threshold == .3
    units._other.value = units._other.options[-1][1]
    assert units.other == units._other.options[-1][1]


def test_the_threshold_leaves_out_the_unsure(units):
    u = units.unit
    units.threshold = .7
    p = units.clustering.probability
    expected = np.flatnonzero((units.labels == u) & (p >= .7))
    assert np.array_equal(units.certain(u), expected)
    w = units.clustering.waveforms.values[expected].mean(0)
    assert np.allclose(units.shown_templates["mean"].sel(unit=u), w, atol=1e-4)
    text = next(t.get_text() for t in units.panels["intervals"].ax.texts if t.get_gid() == "violations")
    assert f"of {len(expected) - 1:,}" in text


def test_the_scatter_shows_the_unit_and_its_neighbours(units):
    shown = {c.get_gid() for c in units.panels["scatter"].ax.collections}
    assert {f"unit {u}" for u in [units.unit] + units.nearest(units.unit, 2)} <= shown


def test_accept_undo_redo_reject_label_save(units, tmp_path):
    first = units.suggestions[0]
    assert first["do"] == "merge" and {first["unit"], first["other"]} == {0, 4}
    assert units.buttons["accept"].disabled
    units.pick(0)
    assert not units.buttons["accept"].disabled and (units.unit, units.other) == (0, 4)
    n = int(np.isin(units.labels, [0, 4]).sum())
    units.buttons["accept"].click()
    assert 4 not in units.units and len(units.members[0]) == n and units._unit.options[0][0].startswith(f"0  ({n})")
    assert np.allclose(units._templates["mean"].sel(unit=0), units.clustering.waveforms.values[units.labels == 0].mean(0), atol=1e-4)
    assert not [s for s in units.suggestions if 4 in (s["unit"], s.get("other"))]
    units.buttons["undo"].click()
    assert 4 in units.units and units.suggestions[0] is first and not units.curation.decisions
    units.buttons["redo"].click()
    assert 4 not in units.units
    units._label.value = "good"
    assert units.curation.quality == {0: "good"} and "good" in units._unit.options[0][0]
    units._path.value = str(tmp_path / "c.json")
    units.buttons["save"].click()
    assert np.array_equal(Curation.load(tmp_path / "c.json", units.clustering.labels).labels, units.labels)
    for _ in range(4): units.buttons["undo"].click()
    assert np.array_equal(units.labels, units.clustering.labels)
    units.pick(0); units.buttons["reject"].click()
    assert all(s is not first for s in units.suggestions)
    units.buttons["undo"].click()
    assert units.suggestions[0] is first


def test_any_two_units_can_be_merged_and_a_unit_split(units):
    units.unit = 1
    units.merge(1, 3)
    assert 3 not in units.units and units.unit == 1
    s = dict(do="split", unit=1, part=np.arange(len(units.members[1])) % 2 == 0, part_spikes=1, spikes=2, probability=.9, valley=.2)
    units.suggestions = [s]; units._refresh_list(); units.pick(0)
    assert len(units.panels["evidence"].axes) == 2
    units.accept()
    assert 1 not in units.units and len(units.units) == 5


@pytest.mark.parametrize("trait, value, says", [("unit", 99, "does not exist"), ("threshold", 1.5, "0 to 1"), ("method", "umap", "method")])
def test_what_cannot_be_is_refused(units, trait, value, says):
    before = getattr(units, trait)
    with pytest.raises(traitlets.TraitError, match=says): setattr(units, trait, value)
    assert getattr(units, trait) == before


def test_it_says_what_is_missing():
    c = made()
    bare = UnitExplorer(c.labels.values)
    text = " ".join(t.get_text() for p in bare.panels.values() for t in p.ax.texts)
    assert "features=" in text and "waveforms=" in text and "sampling_rate" in text
    some = UnitExplorer(c.labels, waveforms=c.waveforms)
    assert "features=" in some.panels["scatter"].ax.texts[0].get_text() and some.panels["templates"].ax.lines
    with pytest.raises(ValueError, match="no unit"): UnitExplorer(np.full(5, -1))
    assert UnitExplorer(c, path="/nowhere/at/all.json").save() is None


def test_a_failed_save_is_said(units):
    units._path.value = "/proc/nowhere/c.json"
    units.buttons["save"].click()
    assert "not saved" in units.status.value


def test_static_picture_and_widget_both(units):
    data = units._repr_mimebundle_()
    data = data[0] if isinstance(data, tuple) else data
    assert "application/vnd.jupyter.widget-view+json" in data and base64.b64decode(data["image/png"])[:4] == b"\x89PNG"
    assert repr(units)      # no name of ours hides one of the widget's


def test_nothing_is_left_with_pyplot(units):
    from matplotlib import pyplot
    units.step()
    assert not pyplot.get_fignums()


def test_only_what_changed_is_drawn_again_on_20000_spikes_of_32_channels():
    e = UnitExplorer(made(20_000, 32, 20), suggestions=False)
    def drawn(trait, value):
        before = {k: p.drawn for k, p in e.panels.items()}
        setattr(e, trait, value)
        return {k for k, p in e.panels.items() if p.drawn != before[k]}
    assert drawn("unit", 3) == set(e.panels)
    assert drawn("threshold", .4) == set(e.panels) - {"evidence"}
    assert drawn("other", e._other.options[2][1]) == {"evidence"}


# --- recording

@pytest.fixture(scope="module")
def demo():
    from spike_ppl.recording import demo_recording
    return demo_recording(seed=0, duration=5.)


def test_recording_scrolls_zooms_and_jumps(demo):
    recording, truth = demo
    e = RecordingExplorer(recording, truth, duration=.1, view="raw")
    ax = lambda: e.panels["traces"].ax
    assert np.allclose(ax().get_xlim(), [0, 100], atol=.1)
    e.scroll(1); assert np.isclose(e.start, .1) and np.isclose(ax().get_xlim()[0], 100, atol=.1)
    e.scroll(-5); assert e.start == 0
    e._zoom.value = .2; assert np.isclose(np.diff(ax().get_xlim())[0], 200, atol=1)
    e.unit = 1; e.start = 0.
    spikes = truth.get_unit_spike_train(truth.unit_ids[1]) / 20_000
    e.jump(1); first = e.start + e.duration / 2
    e.jump(1); second = e.start + e.duration / 2
    assert np.abs(spikes - first).min() < 1e-3 and np.abs(spikes - second).min() < 1e-3 and second > first
    e.jump(-1); assert np.isclose(e.start + e.duration / 2, first, atol=1e-3)
    assert {line.get_gid() for line in ax().lines} >= {"unit 1"} and "unit 2" not in {line.get_gid() for line in ax().lines}


def test_a_browsers_rounding_of_a_slider_is_not_a_move(demo, units):
    e = RecordingExplorer(*demo, duration=.2, view="raw")
    e.jump(1)
    start, before = e.start, drawn(e)
    e._slider.value = round(start / e._slider.step) * e._slider.step      # what noUiSlider sends back
    e._zoom.value = .1995
    assert (e.start, e.duration) == (start, .2) and not redrawn(e, before)
    e._slider.value += e._slider.step                                   # an arrow key
    assert e.start > start and redrawn(e, before)
    units.threshold = .25; units._threshold.value = .26
    assert units.threshold == .25


def test_messages_of_a_browser_take_turns(demo):
    "JupyterLab sends messages of widgets to two threads of the kernel; drawn at once, a figure is taken apart while it is drawn."
    import threading
    e = RecordingExplorer(*demo, duration=.2, view="raw")
    failed, drawing, most = [], set(), []
    traces = e.panels["traces"]
    show = traces.show

    def watched(*args):
        drawing.add(threading.get_ident()); most.append(len(drawing))
        try: show(*args)
        except Exception as error: failed.append(error)
        drawing.discard(threading.get_ident())

    def message(control, **state): control.comm.handle_msg(dict(content=dict(data=dict(method="update", state=state, buffer_paths=[])), buffers=[], metadata={}))
    traces.show = watched
    threads = [threading.Thread(target=lambda c=c, values=values: [message(c, value=v) for v in values]) for c, values in
               ((e._slider, np.linspace(.1, 4, 8)), (e._zoom, np.tile([.1, .4], 4)))]
    for t in threads: t.start()
    for i in range(8): e.view = ("standardised", "raw")[i % 2]
    for t in threads: t.join()
    assert not failed and max(most) == 1 and len(most) == 24
    assert (e.start, e.duration) == (4., .4)


def test_recording_channels_by_name_and_by_site(demo):
    e = RecordingExplorer(demo[0], view="raw")
    names = list(demo[0].channel_ids)
    e.site_buttons[names[2]].value = False
    assert names[2] not in e.channels and len(e.panels["traces"].ax.get_yticks()) == 6
    e.channels = (names[0],)
    assert e.site_buttons[names[0]].value and not e.site_buttons[names[1]].value and e._names.value == (names[0],)
    e.channels = ()
    assert "No channel" in e.panels["traces"].ax.texts[0].get_text()


@pytest.mark.parametrize("trait, value, says", [("start", -1., "start is 0 to"), ("start", 1e9, "start is 0 to"), ("duration", 0., "positive"), ("channels", ("nope",), "not in the recording"), ("view", "whitened", "view")])
def test_recording_bounds(demo, trait, value, says):
    e = RecordingExplorer(demo[0], view="raw")
    with pytest.raises(traitlets.TraitError, match=says): setattr(e, trait, value)


def test_recording_without_spikes_or_without_a_recording(demo):
    e = RecordingExplorer(demo[0], view="raw")
    e.jump(); assert "No sorting" in e.status.value
    with pytest.raises(TypeError, match="SpikeInterface recording"): RecordingExplorer("file.bin")


def test_recording_of_384_channels():
    from spikeinterface.core import generate_recording
    r = generate_recording(num_channels=384, durations=[.5], sampling_frequency=20_000., seed=0)
    e = RecordingExplorer(r, view="raw")
    assert len(e.channels) == 32 and len(e.site_buttons) == 384
    e.channels = tuple(r.channel_ids)
    assert len(e.panels["traces"].ax.images) == 1


# --- fits and models

@pytest.fixture(scope="module")
def fits():
    from spike_ppl.inference import fit
    from spike_ppl.models import gmm, toy
    x, _ = toy(200, 3, 2, seed=0)
    return {f"gmm {k}": fit(gmm(x, k), method="gibbs", draws=40, tune=30, chains=2, seed=0, progressbar=False) for k in (2, 3)} | {"vb": fit(gmm(x, 3), method="vb", draws=40, seed=0, progressbar=False)}


def test_fits_are_chosen_and_compared(fits):
    e = FitExplorer(fits)
    assert e.chosen == ("gmm 2",)
    before = drawn(e)
    e.chosen = ("gmm 3", "vb")
    assert {line.get_gid() for line in e.panels["units"].ax.lines} == {"gmm 3", "vb"} and redrawn(e, before) == set(before)
    before = drawn(e); e.variable = "means"
    assert redrawn(e, before) == {"trace"} and "means" in e.panels["trace"].ax.get_ylabel()
    e.chosen = ("vb",)
    e.variable = "path elbo"
    assert "ELBO" in e.panels["trace"].ax.get_ylabel()
    e.compare(); assert "two fits" in e.status.value
    e.chosen = ("gmm 2", "gmm 3")
    out = e.compare()
    assert out.index[0] == "gmm 3" and all(n in e._table.value for n in e.chosen), "three units made the data"
    e.feature = e._feature.options[1]; e.variable = "means"
    assert e._feature.value == e.feature and e.feature in e.panels["trace"].ax.get_ylabel()
    with pytest.raises(traitlets.TraitError, match="no fit named"): e.chosen = ("none such",)
    assert "holds no fit" in FitExplorer({}).panels["trace"].ax.texts[0].get_text()


def test_the_partition_follows_the_prior():
    e = ModelExplorer(n_units=6)
    assert len(np.unique(e.labels)) == 4
    colours = e.labels.copy()
    e.concentration = 100.
    assert len(np.unique(e.labels)) > 4 and "in another unit than before" in e.status.value
    e.concentration = .1
    assert (e.labels == colours).mean() > .95, "units changed their colours on the way"
    with pytest.raises(traitlets.TraitError, match="n_units"): e.n_units = 99


@pytest.mark.parametrize("model", ["gmm", "dpmm"])
def test_another_prior_is_not_derived_again(model, monkeypatch):
    "What makes a refit quick: the derived inference of one structure serves every value of the priors."
    from spike_ppl import plan
    e = ModelExplorer(model=model, n_units=5)
    made = []
    init = plan.Plan.__init__
    monkeypatch.setattr(plan.Plan, "__init__", lambda self, *a, **k: (made.append(1), init(self, *a, **k))[1])
    before = e.result["unit_probability"]["unit_probability"].values
    e.concentration = 10.; e.spread = 2.
    assert not made and not np.array_equal(before, e.result["unit_probability"]["unit_probability"].values)
    assert e.result.attrs["model"] == model
    monkeypatch.setattr(plan, "_plans", [])     # an earlier test may have derived the next one
    e.n_units = 4
    assert made, "another structure is"


def test_panel_draws_again_in_its_axes():
    "Ticks are kept, nothing of the figure before is: limits, scale, legend, labels, hidden axes, colour bars."
    def rich(ax):
        ax.plot([1, 100], [5, 7], label="a"); ax.scatter([1], [2]); ax.bar([1], [1]); ax.text(0, 0, "t"); ax.legend(title="old")
        ax.set(xscale="log", xlabel="old", ylabel="old", title="old", xticks=[1, 10], yticks=[]); ax.set_aspect("equal"); ax.invert_yaxis()
    def poor(ax): ax.plot([0, 2], [0, 3])
    p, fresh = Panel(3, 2), Panel(3, 2)
    p.show(rich); kept = p.figure
    p.say("words"); p.show(poor); fresh.show(poor)
    assert p.figure is kept and bytes(p.image.value) == bytes(fresh.image.value)
    p.show(lambda ax: ax.figure.colorbar(ax.imshow([[0, 1]]), ax=ax))
    p.show(poor)
    assert len(p.figure.axes) == 1 and bytes(p.image.value) == bytes(fresh.image.value)


def test_panel_is_a_widget_with_a_picture():
    p = Panel(2, 2)
    p.show(lambda ax: ax.plot([0, 1]))
    assert bytes(p.image.value)[:4] == b"\x89PNG" and p.drawn == 1 and issubclass(UnitExplorer, Explorer)
