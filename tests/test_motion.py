"Units in a moving tissue: what is joined, what is not, and when motion is looked for at all; templates freed of noise."
import numpy as np
import pytest
from scipy.stats import chi2

from spike_ppl.detection import Peaks, _equally_rare
from spike_ppl.drift import Drift, estimate_drift, join_moved
from spike_ppl.matching import Matched, make_bank
from spike_ppl.sort import Sort, load_sort
from spike_ppl.templates import mean_template, template_distances

RATE, SECONDS, CHANNELS, WIDTH = 20_000., 20., 12, 41


def template(depth, spread=20., size=12.):
    "A spike (time, channel) of a neuron at some depth beside a column of electrodes 20 µm apart."
    shape = -np.exp(-.5 * (np.arange(-20, 21) / 3)**2)
    return (size * shape[:, None] * np.exp(-.5 * ((np.arange(CHANNELS) * 20. - depth) / spread)**2)).astype("float32")


def recording_of(spikes, seed=0):
    "White noise with spikes (sample, template) added."
    import probeinterface
    from spikeinterface.core import NumpyRecording
    x = np.random.default_rng(seed).normal(size=(int(SECONDS * RATE), CHANNELS)).astype("float32")
    for start, s in spikes: x[start:start + WIDTH] += s
    recording = NumpyRecording([x], RATE)
    probe = probeinterface.generate_linear_probe(CHANNELS, ypitch=20.)
    probe.set_device_channel_indices(np.arange(CHANNELS))
    recording.set_probe(probe)
    return recording


def joined(where, turns, templates):
    "Units of two templates whose spikes are at given displacements in the first or second half of the time, or in both."
    rng = np.random.default_rng(1)
    start = np.sort(rng.choice(np.arange(1000, int(SECONDS * RATE) - 1000, 200), 200, replace=False))
    drift = Drift(np.array([0, int(SECONDS * RATE)]), np.array([-5., 5.]), 1)
    late = drift.at(start) > 0
    which = late.astype(int) if turns else rng.integers(0, 2, len(start))
    spikes = [(t, template(where[k] + .5 * d)) if templates is None else (t, templates[k]) for t, k, d in zip(start, which, drift.at(start))]
    mean = np.stack([np.mean([s for (_, s), k in zip(spikes, which) if k == j], 0) for j in (0, 1)])
    bank = make_bank(mean, WIDTH // 2, 1e-3)
    n = len(start)
    matched = Matched(dict(start=start, template=which, step=np.full(n, 4), gain=np.ones(n, "float32"), score=np.ones(n), probability=np.ones(n), entropy=np.zeros(n), second=np.full(n, -1)), 2)
    return len(np.unique(join_moved(recording_of(spikes), matched, bank, drift)))


def test_a_neuron_that_moves_is_one_unit():
    assert joined((100., 100.), turns=True, templates=None) == 1


def test_two_neurons_that_are_both_there_stay_two():
    assert joined((100., 112.), turns=False, templates=None) == 2


def test_two_neurons_that_take_turns_but_differ_stay_two():
    assert joined(None, turns=True, templates=[template(100.), template(135.)]) == 2


@pytest.mark.parametrize("freedom", [3., 9., 30., 90.])
def test_areas_of_all_sizes_are_exceeded_equally_rarely(freedom):
    threshold = _equally_rare(8., 30., np.array([freedom]))[0]
    rare = chi2.logsf(30 + 8 * np.sqrt(60), 30)
    assert abs(chi2.logsf(freedom + threshold * np.sqrt(2 * freedom), freedom) - rare) < .15 * abs(rare)
    if freedom == 30: assert threshold == pytest.approx(8.)


def test_the_mean_of_few_spikes_is_freed_of_noise():
    small = template(100., size=2.)
    windows = small + np.random.default_rng(4).normal(size=(100, *small.shape)).astype("float32")
    off = [float(np.linalg.norm(m - small)) for m in (windows.mean(0), mean_template(windows))]
    assert off[1] < .6 * off[0]
    halves = np.stack([mean_template(w, np.inf) for w in (windows[::2], windows[1::2])])
    assert template_distances(halves, np.array([50, 50]))[0][0, 1] < 1
    other = np.stack([halves[0], template(130., size=2.)])
    assert template_distances(other, np.array([50, 50]))[0][0, 1] > 3


def test_motion_is_not_looked_for_where_it_cannot_be_seen():
    from spike_ppl.recording import demo_recording
    recording, _ = demo_recording(seed=0, duration=21., n_units=3)      # seven electrodes
    peaks = Peaks(np.arange(1000, 400_000, 1000), np.zeros(399), np.zeros(399, int), np.ones(399))
    assert estimate_drift(recording, peaks) is None


def test_a_tissue_that_stands_still_has_no_drift():
    rng = np.random.default_rng(2)
    start = np.sort(rng.choice(np.arange(1000, int(SECONDS * RATE) - 1000, 100), 1000, replace=False))
    spikes = [(t, template(d)) for t, d in zip(start, rng.choice([40., 95., 130., 180.], len(start)))]
    n = len(start)
    assert estimate_drift(recording_of(spikes), Peaks(start + WIDTH // 2, np.zeros(n), np.zeros(n, int), np.ones(n))) is None
    moving = [(t, template(d + 15 * np.sin(2 * np.pi * t / RATE / 20))) for t, d in zip(start, rng.choice([40., 95., 130., 180.], n))]
    drift = estimate_drift(recording_of(moving), Peaks(start + WIDTH // 2, np.zeros(n), np.zeros(n, int), np.ones(n)))
    assert drift is not None and np.corrcoef(drift.depth, np.sin(2 * np.pi * drift.sample_index / RATE / 20))[0, 1] > .9


@pytest.mark.parametrize("speed", [0., 12.])
def test_few_spikes_of_few_neurons_tell_a_slow_slip_from_none(speed):
    rng = np.random.default_rng(3)
    n = 260
    start = np.sort(rng.choice(np.arange(1000, int(SECONDS * RATE) - 1000, 100), n, replace=False))
    moving = [(t, template(d + speed * t / RATE / SECONDS, size=7.)) for t, d in zip(start, rng.choice([40., 95., 130., 180.], n))]
    drift = estimate_drift(recording_of(moving), Peaks(start + WIDTH // 2, np.zeros(n), np.zeros(n, int), np.ones(n)))
    if speed: assert drift is not None and np.corrcoef(drift.depth, drift.sample_index)[0, 1] > .9 and 4 < drift.range < 16
    else: assert drift is None


def test_the_drift_comes_back_from_a_folder(tmp_path):
    import xarray as xr
    one = np.array([5])
    labels = xr.DataArray([0], dims="spike", attrs=dict(sampling_rate=RATE), coords={k: ("spike", v) for k, v in dict(sample_index=one, probability=np.ones(1), entropy=np.zeros(1), peak_channel=np.array(["0"])).items()})
    drift = Drift(np.array([10, 30]), np.array([-1.5, 2.]), 1)
    folder = Sort(labels, drift=drift).save(tmp_path/"sorted")
    back = load_sort(folder).drift
    assert back.axis == 1 and (back.sample_index == drift.sample_index).all() and (back.depth == drift.depth).all()
    assert "moved along the probe" in (folder/"report.html").read_text()
    assert load_sort(Sort(labels).save(tmp_path/"still")).drift is None
