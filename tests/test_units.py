"""Units: invariants of templates, suggestions, curation (property tests), and every export opened by its real reader."""
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings as budget, strategies as st

from spike_ppl.units import (Clustering, Curation, closest, from_phy, merge_suggestions, similarity, split_suggestions, templates, to_analyzer, to_nwb, to_phy,
                             to_spikeinterface, unit_table)

RATE = 20_000.


def neurons(sizes=(400, 300, 200), channels=5, seconds=60., seed=0, refractory=2e-3, noise=1.):
    "Spikes of refractory neurons with templates far apart; truth as labels."
    rng = np.random.default_rng(seed)
    xy = np.c_[np.zeros(channels), 30. * np.arange(channels)]
    time = np.arange(-15, 16) / RATE * 1e3
    at, label = [], []
    for u, n in enumerate(sizes):
        gaps = rng.exponential(seconds / n - refractory, n) + refractory
        t = np.cumsum(gaps) * (seconds - .1) / max(gaps.sum(), seconds - .1)
        at.append(np.round((t + .02) * RATE).astype(int)); label.append(np.full(n, u))
    at, label = np.concatenate(at), np.concatenate(label)
    order = np.argsort(at, kind="stable"); at, label = at[order], label[order]
    shape = -np.exp(-(time / .15) ** 2) + .3 * np.exp(-((time - .35) / .2) ** 2)
    size = np.array([8 * np.exp(-((xy[:, 1] - 30. * (u % channels)) / 35.) ** 2) * (1 + .5 * (u // channels)) for u in range(len(sizes))])
    values = shape[None, :, None] * size[label][:, None] + rng.normal(size=(len(at), 31, channels)) * noise
    ids = [f"ch{i}" for i in range(channels)]
    waveforms = xr.DataArray(values, dims=("spike", "time", "channel"), attrs=dict(sampling_rate=RATE, units="noise sd"),
                             coords=dict(time=time, channel=ids, x=("channel", xy[:, 0]), y=("channel", xy[:, 1]), sample_index=("spike", at)))
    basis = np.linalg.svd(values.transpose(0, 2, 1).reshape(-1, 31), full_matrices=False)[2][:2]
    features = xr.DataArray(np.einsum("ntc,lt->ncl", values, basis).reshape(len(at), -1), dims=("spike", "feature"),
                            coords=dict(feature=[f"c{i}_l{k}" for i in range(channels) for k in range(2)], channel=("feature", np.repeat(ids, 2)), latent=("feature", np.tile([0, 1], channels)), sample_index=("spike", at)))
    labels = xr.DataArray(label, dims="spike", coords=dict(sample_index=("spike", at)), attrs=dict(sampling_rate=RATE))
    p = rng.uniform(.6, 1, len(at))
    return Clustering(labels, waveforms=waveforms, features=features, probability=p, entropy=-np.log2(p), duration=seconds)


@pytest.fixture(scope="module")
def three(): return neurons()


# --- templates and tables

def test_templates_are_means(three):
    t = templates(three)
    w, l = three.waveforms.values, three.labels.values
    for u in three.units:
        assert np.allclose(t["mean"].sel(unit=u), w[l == u].mean(0)) and np.allclose(t["sd"].sel(unit=u), w[l == u].std(0))
        assert np.allclose(t["sem"].sel(unit=u), w[l == u].std(0) / np.sqrt((l == u).sum()))


@given(seed=st.integers(0, 50), batch=st.integers(1, 50))
@budget(max_examples=25, deadline=None)
def test_soft_templates_in_any_batches(seed, batch):
    rng = np.random.default_rng(seed)
    w = xr.DataArray(rng.normal(size=(40, 6, 3)), dims=("spike", "time", "channel"))
    r = rng.dirichlet(np.ones(4), 40)
    t = templates(r, w, batch=batch)
    mean = np.einsum("nk,ntc->ktc", r, w.values) / r.sum(0)[:, None, None]
    spread = np.einsum("nk,nktc->ktc", r, (w.values[:, None] - mean[None]) ** 2) / r.sum(0)[:, None, None]
    sure = np.einsum("nk,nktc->ktc", r ** 2, (w.values[:, None] - mean[None]) ** 2) / r.sum(0)[:, None, None] ** 2
    assert np.allclose(t["mean"], mean) and np.allclose(t["sd"] ** 2, spread) and np.allclose(t["sem"] ** 2, sure)


def test_lazy_waveforms_give_the_same_templates(three):
    assert np.allclose(templates(three.labels.values, three.waveforms.chunk(spike=100))["mean"], templates(three)["mean"])


def test_similarity(three):
    t = templates(three)
    d = similarity(t, "squared")
    m = t["mean"].values
    assert np.allclose(d, ((m[:, None] - m[None]) ** 2).sum((2, 3)))
    shifted = t["mean"].copy(data=np.roll(m, 2, axis=1))
    both = xr.concat([t["mean"].isel(unit=[0]), shifted.isel(unit=[0]).assign_coords(unit=[9])], "unit")
    assert similarity(both, "cosine", max_shift=2).values[0, 1] > similarity(both, "cosine").values[0, 1] + .05
    assert closest(t, 0, 2) == closest(d, 0, 2) and len(closest(t, 0, 99)) == 2
    with pytest.raises(ValueError, match="'squared', 'cosine'"): similarity(t, "correlation")
    with pytest.raises(ValueError, match="not among"): closest(t, 77)


def test_table(three):
    t = unit_table(three)
    assert t.spikes.tolist() == [400, 300, 200] and np.allclose(t.rate, t.spikes / 60)
    assert (t.isi_violations == 0).all() and t.channel.tolist() == ["ch0", "ch1", "ch2"]
    assert np.allclose(t.y, [0, 30, 60], atol=12) and (t.snr > 5).all()
    assert set(t.columns) <= set(t.attrs["columns"]), "a column has no meaning given"
    bare = unit_table(np.array([0, 0, 1]))
    assert bare.spikes.tolist() == [2, 1] and "snr" not in bare


def test_labels_and_waveforms_are_lined_up_by_time(three):
    half = three.waveforms[::2]
    c = Clustering(three.labels, waveforms=half)
    t = three.sample_index
    expected = [three.labels.values[np.flatnonzero(t == s)[0]] for s in half.sample_index.values]
    assert (c.labels_of(half) == expected).mean() > .99       # equal up to spikes at one and the same sample
    stray = half.assign_coords(sample_index=("spike", half.sample_index.values + 10**7))
    assert (Clustering(three.labels, waveforms=stray).labels_of(stray) == -2).all()


# --- suggestions

def test_a_neuron_cut_in_two_is_suggested_first_and_different_ones_are_not(three):
    l = three.labels.values.copy()
    mine = np.flatnonzero(l == 0)
    l[mine[np.random.default_rng(0).random(len(mine)) < .5]] = 7
    s = merge_suggestions(Clustering(three.labels.copy(data=l), waveforms=three.waveforms, features=three.features, duration=60.))
    assert {s.unit[0], s.other[0]} == {0, 7} and s.probability[0] > .9
    assert (s.probability[1:] < .5).all()
    assert s.coincidences[0] == 0 and s.expected[0] > 0


def test_timing_alone_decides_between_twins():
    "Two neurons with the same template: only the coincidences can tell, and they do."
    rng = np.random.default_rng(1)
    c = neurons((3000, 3000), channels=1, seconds=60., seed=1)
    w = c.waveforms.copy(data=np.roll(c.waveforms.values, 0, 1))
    same = w.values.mean(0)[None] + rng.normal(size=w.shape)
    x = c.features.copy(data=rng.normal(size=c.features.shape))
    two = merge_suggestions(Clustering(c.labels, waveforms=w.copy(data=same), features=x, duration=60.), minimum=0)
    one = neurons((6000,), channels=1, seconds=60., seed=1)
    half = one.labels.copy(data=rng.integers(0, 2, 6000))
    cut = merge_suggestions(Clustering(half, waveforms=one.waveforms.copy(data=same), features=x, duration=60.), minimum=0)
    assert two.log_bf_time[0] < -20 and two.probability[0] < .01
    assert cut.log_bf_time[0] > 20 and cut.probability[0] > .99


def test_two_neurons_in_one_unit_are_cut_apart(three):
    l = three.labels.values.copy(); l[l == 2] = 1
    s = split_suggestions(Clustering(three.labels.copy(data=l), waveforms=three.waveforms, features=three.features, duration=60.))
    assert s.unit[0] == 1 and s.valley[0] < .3
    inside = three.labels.values[l == 1] == 2
    assert (s.part[0] == inside).mean() > .95 and not (s.unit[1:] == 1).any()
    whole = split_suggestions(three, minimum=0)
    assert (whole.valley > .7).all(), "a dip was seen in one neuron"


@given(n=st.integers(60, 400), seed=st.integers(0, 200))
@budget(max_examples=20, deadline=None)
def test_one_gaussian_is_not_split(n, seed):
    from spike_ppl.quality import _two_parts
    assert _two_parts(np.random.default_rng(seed).normal(size=(n, 5)) * [4, 2, 1, 1, 1], seed)[1] > .6


# --- curation

def play(curation, moves, rng):
    "Random decisions, whatever is possible at each point."
    for move in moves:
        units = curation.current_units
        if move == "merge" and len(units) > 1: curation.merge(*rng.choice(units, 2, replace=False))
        elif move == "split" and units:
            u = int(rng.choice(units)); n = int((curation.labels == u).sum())
            if n > 1: curation.split(u, rng.permutation(n)[:rng.integers(1, n)])
        elif move == "remove" and len(units) > 1: curation.remove(int(rng.choice(units)))
        elif move == "label" and units: curation.label(int(rng.choice(units)), str(rng.choice(Curation.LABELS)))
        elif move == "undo": curation.undo()
        elif move == "redo": curation.redo()


MOVES = st.lists(st.sampled_from(["merge", "split", "remove", "label", "undo", "redo"]), max_size=12)


@given(moves=MOVES, seed=st.integers(0, 10_000))
@budget(max_examples=80, deadline=None)
def test_undo_goes_all_the_way_back_and_redo_forward(moves, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 5, 60)
    c = Curation(labels)
    play(c, moves, rng)
    final, quality, done = np.asarray(c.labels).copy(), c.quality, len(c.decisions)
    while c.undo(): pass
    assert np.array_equal(c.labels, labels) and c.quality == {}
    for _ in range(done): c.redo()
    assert np.array_equal(c.labels, final) and c.quality == quality


@given(moves=MOVES, seed=st.integers(0, 10_000))
@budget(max_examples=60, deadline=None)
def test_saved_curation_does_the_same_here_and_in_spikeinterface(moves, seed, tmp_path_factory):
    from spikeinterface.curation.curation_model import Curation as Model, SequentialCuration
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(5), rng.integers(-1, 5, 55)])
    c = Curation(labels)
    play(c, moves, rng)
    said = json.loads(json.dumps(c.to_dict()))
    SequentialCuration(**said) if "curation_steps" in said else Model(**said)
    again = Curation.load(said, labels)
    assert np.array_equal(again.labels, c.labels)
    assert again.quality == c.quality
    times = np.sort(rng.choice(10**6, 60, replace=False))
    applied = Clustering.of(c.apply(to_spikeinterface(labels, sample_index=times, sampling_rate=RATE)))
    mine = {int(t): int(u) for t, u in zip(times, np.asarray(c.labels)) if u >= 0}
    assert {int(t): int(u) for t, u in zip(applied.sample_index, applied.labels.values)} == mine


def test_spikeinterface_reads_the_file(tmp_path, three):
    from spikeinterface.curation import apply_curation, load_curation
    c = Curation(three)
    c.merge(0, 2); c.label(0, "good"); c.label(1, "mua")
    path = c.save(tmp_path / "curation.json")
    new = apply_curation(to_spikeinterface(three), load_curation(path))
    assert {int(u): len(new.get_unit_spike_train(u)) for u in new.unit_ids} == {0: 600, 1: 300}
    assert dict(zip(new.unit_ids.tolist(), new.get_property("quality"))) == {0: "good", 1: "mua"}


@pytest.mark.parametrize("do, says", [
    (lambda c: c.merge(0, 99), "do not exist"), (lambda c: c.merge(0, 0), "two different"), (lambda c: c.split(0, []), "some but not all"),
    (lambda c: c.split(0, np.ones(400, bool)), "some but not all"), (lambda c: c.split(0, [10**6]), "some but not all"),
    (lambda c: c.label(0, "lovely"), "quality label"), (lambda c: c.remove(-1), "do not exist"),
    (lambda c: Curation.load({"format_version": "2", "unit_ids": [5]}, np.array([1, 2])), "the curation is of units"),
])
def test_impossible_decisions(three, do, says):
    c = Curation(three)
    with pytest.raises(ValueError, match=says): do(c)
    assert np.array_equal(c.labels, three.labels) and not c.decisions


# --- exports, each opened by its real reader

def test_spikeinterface_sorting_carries_the_posterior(tmp_path, three):
    from spikeinterface.core import load
    s = to_spikeinterface(three)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s.save(folder=tmp_path / "sorting")
    back = load(tmp_path / "sorting")
    v = back.to_spike_vector()
    assert np.allclose(v["probability"], three.probability) and np.allclose(back.get_property("snr"), unit_table(three).snr)
    assert len(back.remove_units([0]).to_spike_vector()["entropy"]) == 500
    again = Clustering.of(back)
    assert np.array_equal(again.labels, three.labels) and np.allclose(again.probability, three.probability)


def recording_of(c, seconds=60.):
    from probeinterface import Probe
    from spikeinterface.core import NumpyRecording
    rng = np.random.default_rng(0)
    x = rng.normal(size=(int(seconds * RATE), c.waveforms.sizes["channel"])).astype("float32")
    t = templates(c)["mean"].values
    for s, u in zip(c.sample_index, c.labels.values):
        if 15 <= s < len(x) - 16: x[s - 15:s + 16] += t[u]
    r = NumpyRecording(x, RATE, channel_ids=c.waveforms.channel.values)
    p = Probe(ndim=2, si_units="um"); p.set_contacts(np.c_[c.waveforms.x, c.waveforms.y], shapes="circle", shape_params={"radius": 5}); p.set_device_channel_indices(np.arange(len(t[0, 0])))
    made = r.set_probe(p)
    return r if made is None else made


def test_analyzer_extension_follows_selecting_merging_and_saving(tmp_path, three):
    from spikeinterface.core import load_sorting_analyzer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a = to_analyzer(three, recording=recording_of(three), extensions=("random_spikes", "waveforms", "templates"), folder=tmp_path / "a")
        assert np.allclose(a.get_extension("spike_ppl").get_data()["probability"], three.probability)
        assert len(a.select_units([1, 2]).get_extension("spike_ppl").get_data()["probability"]) == 500
        merged = a.merge_units([[0, 1]])
        assert len(merged.get_extension("spike_ppl").get_data()["entropy"]) == len(merged.sorting.to_spike_vector())
        back = load_sorting_analyzer(tmp_path / "a")
    assert np.allclose(back.get_extension("spike_ppl").get_data()["probability"], three.probability)
    assert np.abs(a.get_extension("templates").get_templates()).max() > 5


@pytest.mark.parametrize("case", ["plain", "one unit", "gaps", "no unit", "many channels"])
def test_phy_folder_is_read_by_phylib(tmp_path, three, case):
    from phylib.io.model import load_model
    from spikeinterface.extractors import read_phy
    c, limit = three, 32
    l = three.labels.values.copy()
    if case == "one unit": l[:] = 0
    if case == "gaps": l[l == 2] = 11
    if case == "no unit": l[:50] = -1
    if case == "many channels": c = neurons(channels=12); l, limit = c.labels.values, 6
    c = Clustering(c.labels.copy(data=l), waveforms=c.waveforms, features=c.features, probability=c.probability, entropy=c.entropy, duration=60.)
    path = to_phy(c, tmp_path / "phy", limit=limit)
    m = load_model(path)
    assert m.n_spikes == len(l) and m.sample_rate == RATE
    for u in c.units:
        assert np.array_equal(m.spike_samples[m.get_cluster_spikes(u)], np.sort(c.sample_index[l == u]))
        t = m.get_template(u)
        mean = templates(c)["mean"].sel(unit=u).values
        assert t.best_channel == np.ptp(mean, axis=0).argmax()
        assert np.allclose(t.template, mean[:, t.channel_ids], atol=1e-4)
    assert np.allclose(m.spike_attributes["probability"], c.probability) and np.allclose(m.spike_attributes["entropy"], c.entropy)
    assert m.similar_templates.shape == (m.n_templates,) * 2 and np.allclose(np.diag(m.similar_templates), 1)
    assert m.features.shape[0] == len(l) and m.get_features(np.arange(5), np.arange(3)).shape == (5, 3, 2)
    assert np.array_equal(from_phy(tmp_path / "phy"), l)
    sorting = read_phy(tmp_path / "phy")       # leaves the cluster labelled noise out: the spikes of no unit
    assert sorted(len(sorting.get_unit_spike_train(u)) for u in sorting.unit_ids) == sorted(np.unique(l[l >= 0], return_counts=True)[1])
    m.close()


def test_back_from_phy_after_merging_and_labelling_there(tmp_path, three):
    from phylib.io.model import load_model
    to_phy(three, tmp_path / "phy")
    m = load_model(tmp_path / "phy/params.py")
    clusters = m.spike_clusters.copy(); clusters[np.isin(clusters, [0, 2])] = 17      # what Phy does when 0 and 2 are merged
    m.save_spike_clusters(clusters); m.save_metadata("group", {17: "good", 1: "noise"}); m.close()
    back = from_phy(tmp_path / "phy")
    assert {int(u): int((back == u).sum()) for u in np.unique(back)} == {17: 600, -1: 300}
    assert back.attrs["quality"] == {17: "good"}


def test_phy_with_a_recording_shows_traces(tmp_path, three):
    from phylib.io.model import load_model
    r = recording_of(three, 61.)
    m = load_model(to_phy(three, tmp_path / "phy", recording=r))
    assert np.allclose(m.traces[1000:1100], r.get_traces(start_frame=1000, end_frame=1100))
    m.close()


def test_nwb_is_read_by_pynwb(tmp_path, three):
    import pynwb
    from datetime import datetime, timezone
    start = datetime(2020, 1, 2, tzinfo=timezone.utc)
    c = Curation(three); c.merge(0, 1); c.label(0, "good")
    path = to_nwb(three, tmp_path / "x.nwb", curation=c, session_start_time=start)
    with pynwb.NWBHDF5IO(str(path), "r") as io:
        f = io.read()
        assert f.session_start_time == start
        u = f.units.to_dataframe()
    assert u.index.tolist() == [0, 2] and u.quality.tolist() == ["good", ""]
    assert np.allclose(u.spike_times[2], np.sort(three.times(2)))
    mine = np.flatnonzero(three.labels.values == 2)
    assert np.allclose(u.spike_probability[2], three.probability[mine])
    assert np.allclose(u.waveform_mean[2], templates(three)["mean"].sel(unit=2))
    with pytest.raises(FileExistsError, match="overwrite"): to_nwb(three, path, session_start_time=start)
    with pytest.warns(UserWarning, match="session_start_time"): to_nwb(three, path, overwrite=True)


@pytest.mark.parametrize("do, says", [
    (lambda c, d: to_phy(c.labels, d / "p"), "give the waveforms"), (lambda c, d: to_spikeinterface(c.labels.values), "sampling_rate|sampling rate"),
    (lambda c, d: to_analyzer(c.labels), "recording"), (lambda c, d: from_phy(d), "not a Phy folder"),
    (lambda c, d: merge_suggestions(c.labels), "waveforms, features or a fit"), (lambda c, d: split_suggestions(c.labels), "features or waveforms"),
    (lambda c, d: templates(c.labels), "need waveforms"), (lambda c, d: Clustering(np.zeros(3)), "one integer per spike"),
    (lambda c, d: Clustering(c.labels, probability=np.ones(3)), "one per spike"),
])
def test_what_is_missing_is_said(three, tmp_path, do, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says): do(three, tmp_path)


def test_a_full_folder_is_not_overwritten(three, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"): to_phy(three, tmp_path)
    assert [p.name for p in Path(tmp_path).iterdir()] == ["kept"]
