"Recordings that are harder than the simulated one in a single respect: artefacts, neurons that hardly pause."
import numpy as np
import pytest

from spike_ppl.recording import find_artefacts, hold, standardise
from spike_ppl.sort import compare, load_sort, sort


def columns(n_per_column, seed, seconds, n_units, **how):
    "Two columns of electrodes 25 µm apart, SpikeInterface's own simulation, and its truth."
    from probeinterface import generate_multi_columns_probe
    from spikeinterface.core import generate_ground_truth_recording
    probe = generate_multi_columns_probe(num_columns=2, num_contact_per_column=n_per_column, xpitch=25, ypitch=25)
    probe.set_device_channel_indices(np.arange(2 * n_per_column))
    return generate_ground_truth_recording(durations=[seconds], sampling_frequency=30_000., num_units=n_units, probe=probe, seed=seed, noise_kwargs=dict(noise_levels=5., strategy="on_the_fly"),
        generate_unit_locations_kwargs=dict(margin_um=10., minimum_z=5., maximum_z=30., minimum_distance=15., max_iteration=1000, distance_strict=False), **how)


def with_traces(recording, x):
    from spikeinterface.core import NumpyRecording
    out = NumpyRecording([x.astype("float32")], recording.get_sampling_frequency(), channel_ids=recording.channel_ids)
    out.set_probe(recording.get_probe())
    return out


def test_artefacts_are_left_out(tmp_path):
    recording, truth = columns(8, 18, 20., 8)
    x, rng = recording.get_traces().copy(), np.random.default_rng(2)
    starts = np.arange(20_000, len(x) - 20_000, 40_000)
    for t in starts: x[t:t + 90] += 800 * np.sin(np.arange(90) / 5)[:, None] * rng.uniform(.8, 1.2, x.shape[1])
    result = sort(with_traces(recording, x), progressbar=False)
    assert len(result.artefacts) == len(starts)
    against = compare(truth, result)
    assert against["mean_accuracy"] > .85 and against["false_units"] == 0      # .63 where artefacts are taken for spikes
    t = result.labels.sample_index.values
    assert not any(((t >= a) & (t < b)).any() for _, a, b in result.artefacts)
    back = load_sort(result.save(tmp_path/"kept"))
    assert (back.artefacts == result.artefacts).all()
    assert "left out as artefacts" in (tmp_path/"kept"/"report.html").read_text()


def test_an_artefact_on_a_small_probe_is_known_by_its_length():
    recording, _ = columns(4, 19, 10., 12)
    x = recording.get_traces().copy()
    assert not len(find_artefacts(hold(standardise(recording))))
    x[150_000:150_300] += 600 * np.sin(np.arange(300) / 5)[:, None]
    found = find_artefacts(hold(standardise(with_traces(recording, x))))
    assert len(found) == 1 and found["start_sample_index"][0] < 150_000 and found["end_sample_index"][0] > 150_300


def test_neurons_that_hardly_pause():
    "Six neurons of sixty spikes a second each: a window of six milliseconds nearly always holds a spike of another."
    recording, truth = columns(4, 20, 30., 6, generate_sorting_kwargs=dict(firing_rates=60., refractory_period_ms=4.))
    against = compare(truth, sort(recording, progressbar=False, waveforms=False))
    assert against["mean_accuracy"] > .8 and against["well_detected"] >= 5      # no unit at all where windows had to be as empty as noise
