"""Neighbourhoods, jobs that are killed, interrupted or run out of disk, and joining."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st

from spike_ppl.scale import Found, JobFailed, Neighbourhood, PartJob, coincidences, load_found, merge, neighbourhoods, portable, run_jobs, save_found, sort_in_parts

positions = st.integers(1, 60).flatmap(lambda n: st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=n, max_size=n, unique=True)).map(lambda p: np.array(p, float) * 20)


@settings(max_examples=60, deadline=None)
@given(xy=positions, radius=st.floats(0, 300), size=st.integers(1, 20))
def test_neighbourhoods_cover(xy, radius, size):
    parts = neighbourhoods(xy, radius, size)
    assert sorted(c for p in parts for c in p.own) == list(range(len(xy)))             # every channel is owned once
    assert [p.index for p in parts] == list(range(len(parts))) and parts == neighbourhoods(xy, radius, size)
    for p in parts:
        assert 1 <= len(p.own) <= size
        gap = np.linalg.norm(xy[:, None] - xy[None, list(p.own)], axis=-1).min(1)
        assert set(p.channels) == set(np.flatnonzero(gap <= radius + 1e-9).tolist())    # exactly what is within the radius
    if len(xy) > size: assert len(parts) <= 2 * -(-len(xy) // size)


@pytest.mark.parametrize("args, message", [((np.zeros((3, 1)),), "expected finite"), ((np.full((3, 2), np.nan),), "expected finite"), ((np.zeros((1, 2)), -1.), "radius=-1"), ((np.zeros((1, 2)), 1., 0), "size=0")])
def test_neighbourhoods_refuse(args, message):
    with pytest.raises(ValueError, match=message): neighbourhoods(*args)


# ---- jobs of no consequence, made inside functions so that they travel by value

def counting_job(folder, pause=0., die_at=None, times=1, how="kill"):
    "A job with a result that follows from its task alone; it leaves a mark each time it runs, and dies `times` times at task `die_at`."
    folder = str(folder)
    def job(part):
        import os, signal, time, uuid
        import numpy as np
        from spike_ppl.scale import Found
        marks = [f for f in os.listdir(folder) if f.startswith(f"run_{part.index}_")]
        open(os.path.join(folder, f"run_{part.index}_{uuid.uuid4().hex}"), "w").close()
        if part.index == die_at and len(marks) < times:
            if how == "kill": time.sleep(.3); os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("this job is wrong")
        time.sleep(pause)
        rng = np.random.default_rng(part.index)
        n = 200
        t = np.sort(rng.integers(0, 100_000, n))
        return Found(part, t, rng.integers(0, 2, n), rng.random(n), rng.random(n), np.full(n, part.own[0]), np.arange(2), rng.normal(size=(2, 41, len(part.channels))).astype("float32"), np.array([9, 9]), 20_000., 100_000, {})
    return job


def runs(folder): return sorted(int(p.name.split("_")[1]) for p in Path(folder).glob("run_*"))


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.neighbourhood == y.neighbourhood
        for k in ("sample_index", "unit", "probability", "entropy", "peak_channel", "units", "templates", "n_averaged"): assert np.array_equal(getattr(x, k), getattr(y, k)), k


@pytest.fixture()
def parts(): return neighbourhoods(np.c_[np.zeros(20), 25. * np.arange(20)], 50., 4)


@pytest.fixture()
def marks(tmp_path):
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def test_round_trip_and_resume(parts, marks, tmp_path):
    job, kept = counting_job(marks), tmp_path / "kept"
    first = run_jobs(job, parts, folder=kept, key="a", progressbar=False)
    assert runs(marks) == list(range(len(parts)))
    same(first, [load_found(kept / f"part_{i:05d}.npz") for i in range(len(parts))])
    (kept / "part_00002.npz").unlink()
    (kept / "part_00003.npz").write_bytes((kept / "part_00003.npz").read_bytes()[:1000])      # a file that is no result
    same(first, run_jobs(job, parts, folder=kept, key="a", progressbar=False))
    assert runs(marks) == sorted([*range(len(parts)), 2, 3])                                  # only what was missing was done again
    with pytest.raises(ValueError, match="parts of another run"): run_jobs(job, parts, folder=kept, key="b", progressbar=False)
    with pytest.raises(ValueError, match="expected 'serial'"): run_jobs(job, parts, "cluster", progressbar=False)


@pytest.mark.parametrize("where", ["threads", "processes"])
def test_same_result_wherever_it_runs(parts, marks, where):
    job = counting_job(marks)
    same(run_jobs(job, parts, progressbar=False), run_jobs(job, parts, where, n_workers=2, progressbar=False))


def test_a_wrong_job_is_not_repeated(parts, marks, tmp_path):
    with pytest.raises(RuntimeError, match="this job is wrong"): run_jobs(counting_job(marks, die_at=3, times=99, how="raise"), parts, folder=tmp_path / "k", progressbar=False)
    assert runs(marks).count(3) == 1


def test_a_killed_process_is_replaced(parts, marks):
    "SIGKILL in the middle of a job: it runs again, and the result is what it would have been."
    expected = run_jobs(counting_job(marks), parts, progressbar=False)
    for f in marks.iterdir(): f.unlink()
    again = run_jobs(counting_job(marks, die_at=2), parts, "processes", n_workers=2, progressbar=False)
    same(expected, again)
    assert runs(marks).count(2) == 2


def test_a_job_that_always_dies_ends(parts, marks, tmp_path):
    with pytest.raises(JobFailed, match="their worker died 2 times.*out of memory.*kept in"):
        run_jobs(counting_job(marks, die_at=1, times=99), parts, "processes", n_workers=2, folder=tmp_path / "k", retries=1, progressbar=False)
    assert not list((tmp_path / "k").glob(".*.part"))


def script(body, folder, **env):
    "Run Python in a process of its own, with the jobs of this file."
    code = "import sys; sys.path.insert(0, sys.argv[2])\nfrom test_scale import *\nfolder = Path(sys.argv[1])\nparts = neighbourhoods(np.c_[np.zeros(20), 25. * np.arange(20)], 50., 4)\n" + textwrap.dedent(body)
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(Path(__file__).parent)], stderr=subprocess.PIPE, text=True, env=os.environ | env)


def test_interrupted_and_resumed(parts, marks, tmp_path):
    "Ctrl-C after some neighbourhoods: they are not done again."
    kept = tmp_path / "kept"
    p = script("run_jobs(counting_job(folder / 'marks', pause=1.), parts, folder=folder / 'kept', progressbar=False)", tmp_path)
    for _ in range(600):
        if len(list(kept.glob("part_*.npz"))) >= 2: break
        time.sleep(.1)
    p.send_signal(signal.SIGINT)
    _, said = p.communicate(timeout=60)
    assert p.returncode != 0 and "KeyboardInterrupt" in said
    finished = sorted(int(f.name[5:10]) for f in kept.glob("part_*.npz"))
    assert 2 <= len(finished) < len(parts) and not list(kept.glob(".*.part"))
    before = runs(marks)
    result = run_jobs(counting_job(marks), parts, folder=kept, progressbar=False)
    same(result, run_jobs(counting_job(tmp_path), parts, progressbar=False))
    for i in finished: assert runs(marks).count(i) == before.count(i) == 1


def test_a_full_disk(parts, marks, tmp_path):
    "A limit on file size stops the writing: a message, nothing half-written, and the run goes on when there is room."
    p = script("""
        import resource
        big = counting_job(folder / 'marks')
        def job(part):
            f = big(part)
            return f._replace(templates=np.zeros((2, 41, 5000), 'float32')) if part.index == 2 else f
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        run_jobs(job, parts, folder=folder / 'kept', progressbar=False)
        """, tmp_path)
    _, said = p.communicate(timeout=120)
    assert p.returncode != 0 and "could not write" in said and "make room and run again" in said, said
    files = sorted(f.name for f in (tmp_path / "kept").iterdir())
    assert files == ["part_00000.npz", "part_00001.npz", "plan.json"], said
    same(run_jobs(counting_job(marks), parts, folder=tmp_path / "kept", progressbar=False), run_jobs(counting_job(tmp_path), parts, progressbar=False))


def test_no_room_for_the_plan(parts, marks, tmp_path):
    target = tmp_path / "file"
    target.write_text("")
    with pytest.raises(OSError): run_jobs(counting_job(marks), parts, folder=target, progressbar=False)
    assert runs(marks) == []


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    import dask
    with dask.config.set({"distributed.scheduler.allowed-failures": 1, "distributed.worker.daemon": False}):
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit="2GB", silence_logs=50) as c, distributed.Client(c) as client: yield client


@pytest.mark.filterwarnings("ignore")
def test_dask_cluster(parts, marks, cluster, tmp_path):
    "Any Client: the same result, kept where it was asked for; a killed worker costs one repetition; one that always dies ends the run with a message."
    expected = run_jobs(counting_job(marks), parts, progressbar=False)
    same(expected, run_jobs(counting_job(marks), parts, cluster, folder=tmp_path / "k", progressbar=False))
    assert len(list((tmp_path / "k").glob("part_*.npz"))) == len(parts)
    for f in marks.iterdir(): f.unlink()
    same(expected, run_jobs(counting_job(marks, die_at=2), parts, cluster, progressbar=False))
    assert runs(marks).count(2) == 2


# ---- joining

def unit_found(index, own, channels, trains, centres, n_samples=400_000, xy=None, seed=0, outliers=()):
    "A result whose units have these spike trains and round waveforms centred at these depths."
    rng = np.random.default_rng([seed, index])
    depth = np.array([xy[c][1] for c in channels])
    shape = -np.exp(-.5 * (np.arange(-20, 21) / 4)**2)
    templates = np.stack([15 * shape[:, None] * np.exp(-np.abs(depth - z)[None] / 30) + rng.normal(size=(41, len(channels))) / 15 for z in centres]) if len(centres) else np.zeros((0, 41, len(channels)))
    t = np.concatenate([*trains, np.array([o[0] for o in outliers])]).astype("int64")
    z = np.concatenate([np.full(len(x), k) for k, x in enumerate(trains)] + [np.full(len(outliers), -1)]).astype("int64")
    peaks = [channels[int(np.abs(depth - c).argmin())] for c in centres]
    c = np.array([peaks[k] for k in z[z >= 0]] + [o[1] for o in outliers], dtype=int)
    order = np.argsort(t, kind="stable")
    return Found(Neighbourhood(index, tuple(own), tuple(channels)), t[order], z[order], np.full(len(t), .9 + index / 100), np.full(len(t), .1), c[order], np.arange(len(trains)),
        templates.astype("float32"), np.full(len(trains), 225), 20_000., n_samples, {})


@pytest.fixture()
def column():
    xy = np.c_[np.zeros(12), 20. * np.arange(12)]
    return xy, neighbourhoods(xy, 60., 6)


def trains(n, seed=0):
    rng = np.random.default_rng(seed)
    return [np.sort(rng.integers(1000, 399_000, rng.integers(200, 400))) for _ in range(n)]


def test_a_neuron_at_the_border_is_one_unit(column):
    "Each job puts the main channel on its own side; jitter, missed and extra spikes included."
    xy, (a, b) = column
    border = (xy[list(a.own), 1].max() + xy[list(b.own), 1].min()) / 2
    up, down, mid = trains(3)
    rng = np.random.default_rng(1)
    seen = np.sort(mid + rng.integers(-3, 4, len(mid)))[rng.random(len(mid)) < .9]
    m = merge([unit_found(0, a.own, a.channels, [down, mid], [10., border - 2], xy=xy), unit_found(1, b.own, b.channels, [seen, up], [border + 2, 210.], xy=xy)], xy)
    assert m.units.sizes["unit"] == 3 and sorted(m.units.members.values) == [1, 1, 2]
    joint = int(m.units.unit[m.units.members == 2].item())
    assert (m.labels == joint).sum() in (len(mid), len(seen)) and m.units.log_odds[joint] > 5


def test_a_neuron_disowned_by_both_is_kept(column):
    xy, (a, b) = column
    border = (xy[list(a.own), 1].max() + xy[list(b.own), 1].min()) / 2
    mid, = trains(1)
    m = merge([unit_found(0, a.own, a.channels, [mid], [border + 3], xy=xy), unit_found(1, b.own, b.channels, [mid], [border - 3], xy=xy)], xy)
    assert m.units.sizes["unit"] == 1 and m.units.members.item() == 2


def test_different_neurons_of_one_shape_stay_apart(column):
    xy, (a, b) = column
    border = (xy[list(a.own), 1].max() + xy[list(b.own), 1].min()) / 2
    one, two = trains(2)
    m = merge([unit_found(0, a.own, a.channels, [one], [border - 2], xy=xy), unit_found(1, b.own, b.channels, [two], [border + 2], xy=xy)], xy)
    assert m.units.sizes["unit"] == 2 and set(m.labels.values.tolist()) == {0, 1}


def test_a_shadow_is_dropped_and_an_owner_is_not(column):
    "A unit whose main channel another job owns, and which that job knows under a larger template or not at all."
    xy, (a, b) = column
    deep, = trains(1)
    shadow = unit_found(0, a.own, a.channels, [deep], [xy[a.channels[-1]][1]], xy=xy)
    assert merge([shadow, unit_found(1, b.own, b.channels, [deep], [xy[a.channels[-1]][1]], xy=xy)], xy).units.sizes["unit"] == 1
    assert merge([shadow, unit_found(1, b.own, b.channels, [], [], xy=xy)], xy).units.sizes["unit"] == 0


def test_two_units_of_one_job_are_never_joined_through_the_other(column):
    "One job lumps two neurons, the other tells them apart: the two must not be pulled together."
    xy, (a, b) = column
    border = (xy[list(a.own), 1].max() + xy[list(b.own), 1].min()) / 2
    one, two = trains(2, seed=3)
    m = merge([unit_found(0, a.own, a.channels, [np.sort(np.r_[one, two])], [border + 5], xy=xy), unit_found(1, b.own, b.channels, [one, two], [border + 5, border + 5], xy=xy)], xy)
    assert m.units.sizes["unit"] == 2


def test_spikes_of_no_unit_come_from_the_owner_of_their_channel(column):
    xy, (a, b) = column
    mine, theirs = a.own[-1], b.own[0]
    f = unit_found(0, a.own, a.channels, [], [], xy=xy, outliers=[(500, mine), (900, theirs)])
    g = unit_found(1, b.own, b.channels, [], [], xy=xy, outliers=[(501, mine), (900, theirs)])
    m = merge([f, g], xy)
    assert m.labels.values.tolist() == [-1, -1] and m.labels.sample_index.values.tolist() == [500, 900] and m.labels.probability.values.tolist() == pytest.approx([.9, .91])


def test_merge_needs_every_part(column):
    xy, (a, b) = column
    with pytest.raises(ValueError, match="do not own every channel once.*missing"): merge([unit_found(0, a.own, a.channels, [], [], xy=xy)], xy)


@settings(max_examples=50, deadline=None)
@given(a=st.lists(st.integers(0, 200), max_size=12), b=st.lists(st.integers(0, 200), max_size=12), within=st.integers(0, 10))
def test_coincidences_are_a_largest_matching(a, b, within):
    from scipy.optimize import linear_sum_assignment
    a, b = sorted(a), sorted(b)
    best = 0
    if a and b:
        close = np.abs(np.subtract.outer(a, b)) <= within
        best = int(close[linear_sum_assignment(~close)].sum())
    assert coincidences(a, b, within) == coincidences(b, a, within) == best


# ---- the whole, on a recording

@pytest.fixture(scope="module")
def array():
    from spike_ppl.recording import demo_recording
    column = np.array([(0 if y % 80 else 20, y) for y in range(0, 12 * 40, 40)], float)
    return demo_recording(seed=3, duration=20, n_units=6, positions=column, pitch=45., snr=(10., 25.), rates=(5., 12.))


def detect_only(recording, seed, progressbar=True):
    "A sorting function without a model: every channel's peaks are a unit."
    from spike_ppl.recording import standardise
    from spike_ppl.scale import Labelled
    from spike_ppl.waveforms import find_spikes
    clean = standardise(recording, seed=seed)
    s = find_spikes(clean)
    n = s.sizes["spike"]
    return Labelled(xr.DataArray(s.channel_index.values, dims="spike", coords=dict(sample_index=("spike", s.sample_index.values), peak_channel=("spike", s.peak_channel.values),
        probability=("spike", np.ones(n)), entropy=("spike", np.zeros(n)))), clean)


def test_a_part_job_travels(array, tmp_path):
    "Pickled with a recording on disk, it gives the same in another process."
    recording, _ = array
    travels = portable(recording, tmp_path / "r")
    assert travels is not recording and portable(travels, tmp_path / "x") is travels
    parts = neighbourhoods(recording, 90., 6)
    here = run_jobs(PartJob(recording, detect_only), parts, progressbar=False)
    import pickle
    (tmp_path / "job.pkl").write_bytes(pickle.dumps(PartJob(travels, detect_only)))
    p = script("import pickle\njob = pickle.loads((folder / 'job.pkl').read_bytes())\nfor part in neighbourhoods(job.recording, 90., 6): save_found(job(part), folder / f'{part.index}.npz')", tmp_path)
    _, said = p.communicate(timeout=120)
    assert p.returncode == 0, said
    same(here, [load_found(tmp_path / f"{x.index}.npz") for x in parts])


def test_a_quiet_corner_is_no_failure(array):
    from spike_ppl.recording import RecordingError
    def quiet(recording, seed): raise RecordingError("No spikes found")
    def broken(recording, seed): raise RecordingError("the band does not fit")
    part = neighbourhoods(array[0], 90., 6)[0]
    f = PartJob(array[0], quiet)(part)
    assert len(f.sample_index) == len(f.units) == 0
    with pytest.raises(RecordingError, match="band"): PartJob(array[0], broken)(part)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_real_sorting_is_the_same_everywhere(array, cluster, tmp_path):
    "Serial, threads, processes and a cluster: identical labels; and good ones."
    recording, truth = array
    how = dict(size=6, radius=90., progressbar=False)
    serial = sort_in_parts(recording, **how)
    for where in ("threads", "processes", cluster): xr.testing.assert_identical(sort_in_parts(recording, where=where, n_workers=2, **how).labels, serial.labels)
    from spikeinterface.comparison import compare_sorter_to_ground_truth
    from spikeinterface.core import NumpySorting
    z = serial.labels.values
    found = NumpySorting.from_samples_and_labels([serial.labels.sample_index.values[z >= 0]], [z[z >= 0]], 20_000)
    assert compare_sorter_to_ground_truth(truth, found, delta_time=.4, exhaustive_gt=True).get_performance()["accuracy"].mean() > .8
