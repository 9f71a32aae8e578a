"""Properties of cutting: times, alignment, labels, stores."""
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings, strategies as st

from spike_ppl.recording import demo_recording, hold, make_probe, standardise
from spike_ppl.waveforms import clear_spikes, cut, find_spikes, load_waveforms, noise_covariance, read_yass, save_waveforms

RATE = 20_000
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def recording_of(traces, ids=None, rate=RATE):
    from spikeinterface.core import NumpyRecording
    r = NumpyRecording([np.asarray(traces, "float32")], rate, channel_ids=ids)
    r.set_probe(make_probe(np.c_[40. * np.arange(traces.shape[1]), np.zeros(traces.shape[1])]))
    return r


def pulse(t, width=3.):
    "A smooth trough and a later, lower crest; band-limited well below half the sampling rate. Minimum at 0 exactly on a symmetric core."
    return -np.exp(-.5 * (t / width)**2)


@pytest.fixture(scope="module")
def demo():
    recording, truth = demo_recording(seed=5, duration=12)
    clean = hold(standardise(recording))
    return recording, clean, find_spikes(clean), truth


@quick
@given(delta=st.floats(-.5, .5), size=st.floats(1., 1000.), peak=st.integers(0, 2), at=st.integers(60, 940), width=st.floats(2., 6.))
def test_true_subsample_shift_is_recovered(delta, size, peak, at, width):
    t = np.arange(1000)
    x = np.stack([size * (1. if c == peak else .4) * pulse(t - at - delta, width) for c in range(3)], 1)
    w = cut(recording_of(x), [at], clear=False)
    assert w.peak_channel.item() == peak
    assert abs(w.subsample_shift.item() - delta) <= .055          # half a step of the grid of tenths, and the interpolation's own error
    assert abs(w.amplitude.item() / -size - 1) < .01
    # after alignment the window shows the pulse as if it had been sampled at its trough
    expected = np.stack([size * (1. if c == peak else .4) * pulse(np.arange(-15, 16) + w.subsample_shift.item() - delta, width) for c in range(3)], 1)
    assert np.abs(w.values[0] - expected).max() < .004 * size


@quick
@given(offset=st.integers(-2, 2), at=st.integers(60, 940))
def test_a_time_beside_the_trough_is_corrected(offset, at):
    x = pulse(np.arange(1000) - at)[:, None] * 50
    w = cut(recording_of(x), [at + offset], clear=False)
    assert w.sample_index.item() == at + offset and abs(w.subsample_shift.item() + offset) < .051
    assert w.time.values[w.values[0, :, 0].argmin()] == 0


@quick
@given(seed=st.integers(0, 10**6), before=st.integers(0, 20), after=st.integers(1, 20), n=st.integers(1, 40))
def test_without_alignment_samples_are_those_of_the_recording(seed, before, after, n):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, 2)).astype("float32")
    times = rng.integers(-5, 305, n)
    w = cut(recording_of(x, ids=["a", "b"]), times, before=before, after=after, align=False, clear=False)
    inside = times[(times >= before) & (times + after < 300)]
    assert w.sample_index.values.tolist() == inside.tolist()                       # order and duplicates kept, nothing padded
    assert w.attrs["n_dropped_at_edges"] == len(times) - len(inside)
    for i, t in enumerate(inside): assert (w.values[i] == x[t - before:t + after + 1]).all()
    assert (w.subsample_shift == 0).all()


@pytest.mark.parametrize("rate, samples", [(10_000, 17), (20_000, 31), (30_000, 45), (32_000, 49)])
def test_window_scales_with_the_rate(rate, samples):
    w = cut(recording_of(np.random.default_rng(0).normal(size=(1000, 1)), rate=rate), [500], clear=False)
    assert w.sizes["time"] == samples and w.time.values[w.attrs["sample_before"]] == 0


@pytest.mark.parametrize("sign, factor", [("pos", -1), ("both", -1), ("both", 1), ("neg", 1)])
@pytest.mark.parametrize("align", ["trough", "neighbours"])
def test_peaks_of_either_sign(sign, factor, align):
    x = factor * pulse(np.arange(1000) - 500.3)[:, None] * np.array([[50., 20.]])
    w = cut(recording_of(x), [500], sign=sign, align=align, clear=False)
    assert abs(w.subsample_shift.item() - .3) < .051 and w.peak_channel.item() == 0


def test_zero_time_shift_through_the_whole_chain():
    "Symmetric pulses at known samples come out of filter, detection and cutting where they went in."
    rng = np.random.default_rng(0)
    at = np.arange(400, 59_000, 613) + rng.integers(0, 100, len(np.arange(400, 59_000, 613)))
    x = rng.normal(size=(60_000, 3))
    for t in at: x[t - 20:t + 21] += 60 * pulse(np.arange(-20, 21), 2.)[:, None] * [1, .5, .2]
    clean = standardise(recording_of(x))
    spikes = find_spikes(clean, threshold=8)
    w = cut(clean, spikes)
    assert len(spikes.spike) == len(at) and np.abs(spikes.sample_index.values - at).max() <= 1
    error = w.sample_index.values + w.subsample_shift.values - at
    assert abs(error.mean()) < .05 and np.abs(error).max() < .5


def test_results_do_not_depend_on_how_it_is_read(demo, tmp_path):
    _, clean, spikes, _ = demo
    w = cut(clean, spikes)
    for other in (cut(clean, spikes, n_jobs=2), cut(clean, spikes, chunk_duration=.7), cut(clean, spikes, store=tmp_path / "a.zarr", n_jobs=2).load()):
        xr.testing.assert_identical(w.drop_attrs(), other.drop_attrs())
    lazily = cut(standardise(demo[0]), spikes)
    assert np.abs(lazily - w).max() < 1e-4
    assert find_spikes(clean, n_jobs=2).identical(spikes) and find_spikes(clean, chunk_duration=.37).identical(spikes)


def test_unsorted_times_keep_their_order(demo, tmp_path):
    _, clean, spikes, _ = demo
    w = cut(clean, spikes)
    order = np.random.default_rng(0).permutation(w.sizes["spike"])
    mixed = cut(clean, spikes.isel(spike=order))
    xr.testing.assert_identical(mixed, w.isel(spike=order))
    xr.testing.assert_identical(cut(clean, spikes.isel(spike=order), store=tmp_path / "m.zarr").load(), mixed)


@quick
@given(seed=st.integers(0, 10**6), n=st.integers(0, 30), channels=st.integers(1, 5), text=st.booleans(), lazy=st.booleans())
def test_store_round_trip(tmp_path_factory, seed, n, channels, text, lazy):
    rng = np.random.default_rng(seed)
    r = recording_of(rng.normal(size=(500, channels)), ids=[f"AP{c}" for c in range(channels)] if text else None)
    w = cut(r, rng.integers(40, 460, n))
    path = tmp_path_factory.mktemp("w") / "w.zarr"
    save_waveforms(w.chunk(spike=7) if lazy and n else w, path)
    again = load_waveforms(path)
    xr.testing.assert_identical(again, w)
    assert again.dtype == w.dtype and again.clear.dtype == bool and again.sample_index.dtype == np.int64
    save_waveforms(again, path, overwrite=True)
    xr.testing.assert_identical(load_waveforms(path, lazy=True).compute(), w)
    assert [p.name for p in path.parent.iterdir()] == ["w.zarr"]


def test_failed_write_leaves_nothing(demo, tmp_path):
    _, clean, spikes, _ = demo
    w = cut(clean, spikes)
    save_waveforms(w, tmp_path / "w.zarr")
    import dask.array as da
    def fail(block): raise OSError("no space left on device")
    broken = w.copy(data=da.from_array(w.values, chunks=(100, -1, -1)).map_blocks(fail, dtype="f4", meta=np.zeros((0, 0, 0), "f4")))
    with pytest.raises(OSError, match="no space"): save_waveforms(broken, tmp_path / "new.zarr")
    with pytest.raises(OSError, match="no space"): save_waveforms(broken, tmp_path / "w.zarr", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["w.zarr"]
    xr.testing.assert_identical(load_waveforms(tmp_path / "w.zarr"), w)


def test_clear_is_about_neighbours_and_time(demo):
    _, clean, spikes, truth = demo
    w = cut(clean, spikes)
    t, c = w.sample_index.values, w.peak_channel.values
    xy = np.c_[w.x, w.y][c]
    for i in np.flatnonzero(w.clear.values):
        others = (np.abs(t - t[i]) <= 15) & (np.linalg.norm(xy - xy[i], axis=1) <= 90)
        assert others.sum() == 1
    v = truth.to_spike_vector(); gap = np.diff(v["sample_index"], prepend=-99, append=10**9)
    collided = v["sample_index"][(gap[:-1] < 10) | (gap[1:] < 10)]; lone = v["sample_index"][(gap[:-1] > 40) & (gap[1:] > 40)]
    near = lambda a: np.array([np.abs(a - x).min() <= 4 for x in t])
    assert w.clear.values[near(lone)].mean() > .9 and w.clear.values[near(collided)].mean() < .6


def test_a_rare_unit_stays_clear():
    "A unit with a thirtieth of the spikes is no collection of outliers."
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400_000, 2)) * 2.5
    at = np.arange(200, 399_000, 200)
    rare = rng.random(len(at)) < .03
    for t, r in zip(at, rare): x[t - 20:t + 21] += (60 if r else 25) * pulse(np.arange(-20, 21), 2. if r else 4.)[:, None] * ([1, .9] if r else [1, .2])
    clean = standardise(recording_of(x))
    w = cut(clean, find_spikes(clean, threshold=6))
    distance = np.abs(at[:, None] - w.sample_index.values[None])
    found, row = distance.min(1) < 5, distance.argmin(1)
    assert (rare & found).sum() > 50 and w.clear.values[row[rare & found]].mean() > .7 and w.clear.values[row[~rare & found]].mean() > .95


def test_noise_covariance_is_that_of_the_noise(demo):
    _, clean, spikes, _ = demo
    white = recording_of(np.random.default_rng(0).normal(size=(200_000, 3)) * [1., 2., .5])
    k = noise_covariance(white, np.arange(1000, 199_000, 500), shrinkage=0.)
    m = k.values.reshape(93, 93)
    assert np.allclose(m, m.T) and np.linalg.eigvalsh(m).min() > 0
    assert np.allclose(np.diag(m).reshape(31, 3), [1, 4, .25], rtol=.06) and np.abs(m - np.diag(np.diag(m))).max() < .1
    part = noise_covariance(clean, spikes, channels=clean.channel_ids[[1, 3]])
    full = noise_covariance(clean, spikes)
    assert part.sizes["channel"] == 2
    assert np.allclose(part.values, full.sel(channel=part.channel.values, channel_bis=part.channel.values).values, atol=.05)
    with pytest.raises(ValueError, match="lie between spikes"): noise_covariance(clean, np.arange(0, clean.get_num_samples(), 20))


@pytest.mark.parametrize("how, message", [
    (dict(sample_index=[[100, 200]]), "expected one time"), (dict(sample_index=[.5]), "whole numbers"), (dict(sample_index=[100], before=-1), "at least two samples"),
    (dict(sample_index=[100], peak_channel=[0, 1]), "one channel id per spike"), (dict(sample_index=[100], sign="up"), "expected 'neg'"),
    (dict(sample_index=[100], align="peak"), "expected 'trough'"), (dict(sample_index=[100] * 50, memory=100), "Give store=PATH")])
def test_cut_refuses(how, message):
    with pytest.raises(ValueError, match=message): cut(recording_of(np.random.default_rng(0).normal(size=(300, 2))), **how)


def test_no_spikes_at_all():
    r = recording_of(np.random.default_rng(0).normal(size=(3000, 2)))
    none = find_spikes(r, threshold=50)
    w = cut(r, none)
    assert none.sizes["spike"] == 0 and w.shape == (0, 31, 2) and clear_spikes(w).shape == (0,)


def test_yass_buffer_sign(tmp_path):
    np.save(tmp_path / "spike_train.npy", np.array([[100, 0], [250, 1]]))
    assert read_yass(tmp_path, buffer=40).sample_index.values.tolist() == [60, 210]
    assert read_yass(tmp_path).unit.values.tolist() == [0, 1]
    np.save(tmp_path / "clear_index.npy", np.array([7])); np.save(tmp_path / "spike_times.npy", np.array([100, 250]))
    with pytest.raises(ValueError, match="belong to different runs"): read_yass(tmp_path)
