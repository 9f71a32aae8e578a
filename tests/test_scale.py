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

from conftest import hears_interrupts
from spike_ppl import scale
from spike_ppl.scale import (Found, JobFailed, MissingParts, Neighbourhood, PartJob, after_last_pass, coincidences, last_tasks, load_found, merge, missing_parts, neighbourhoods, part_seed, portable, run_jobs, save_found,
    share_of, sort_in_parts)

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


def test_what_a_neighbourhood_has_learned_is_kept_and_handed_on(column, tmp_path):
    "Its own templates of a joined unit go to it, under the unit's new number; another neighbourhood's do not."
    xy, (a, b) = column
    border = (xy[list(a.own), 1].max() + xy[list(b.own), 1].min()) / 2
    up, down, mid = trains(3)
    rows = lambda *units: dict(unit=np.array(units), template=np.arange(len(units) * 6., dtype="float32").reshape(-1, 3, 2), n_spikes=np.arange(len(units)))
    found = [unit_found(0, a.own, a.channels, [down, mid], [10., border - 2], xy=xy)._replace(learned=rows(1, 0, 1)), unit_found(1, b.own, b.channels, [mid, up], [border + 2, 210.], xy=xy)._replace(learned=rows(0, 1))]
    for f in found: save_found(f, tmp_path / f"{f.neighbourhood.index}.npz")
    kept = [load_found(tmp_path / f"{i}.npz") for i in range(2)]
    for f, k in zip(found, kept): assert f.learned.keys() == k.learned.keys() and all(np.array_equal(f.learned[n], k.learned[n]) for n in f.learned)
    merged = merge(kept, xy)
    joint = int(merged.units.unit[merged.units.members == 2].item())
    assert merged.members[joint] == [(0, 1), (1, 0)] and sorted(len(m) for m in merged.members) == [1, 1, 2]
    for task, f in zip(last_tasks(merged, [a, b], found=kept), found):
        for u, learned in zip(task.units.tolist(), task.learned, strict=True):
            here = [unit for part, unit in merged.members[u] if part == task.index]
            if not here: assert learned == {}; continue
            for name in ("template", "n_spikes"): assert np.array_equal(learned[name], f.learned[name][f.learned["unit"] == here[0]])
    assert all(not any(t.learned) for t in last_tasks(merged, [a, b]))                        # nothing learned, nothing handed on


def test_progress_of_the_whole_is_shown(parts, marks, capsys):
    run_jobs(counting_job(marks), parts, progressbar=True, name="last pass")
    said = capsys.readouterr().err
    assert "last pass" in said and f"0/{len(parts)}" in said
    run_jobs(counting_job(marks), parts, progressbar=False)
    assert capsys.readouterr().err == ""


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
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(Path(__file__).parent)], stderr=subprocess.PIPE, text=True, env=os.environ | env,
        preexec_fn=hears_interrupts)


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
    same(expected, run_jobs(counting_job(marks), parts, cluster, folder=tmp_path / "k", progressbar=False, name="last pass"))
    assert len(list((tmp_path / "k").glob("part_*.npz"))) == len(parts)
    assert "last pass" in cluster.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.task_prefixes))      # the name under which the dashboard shows them
    for f in marks.iterdir(): f.unlink()
    same(expected, run_jobs(counting_job(marks, die_at=2), parts, cluster, progressbar=False))
    assert runs(marks).count(2) == 2


@pytest.mark.filterwarnings("ignore")
def test_all_workers_of_a_cluster_die(parts, marks, cluster, tmp_path):
    "Nothing that a job needs lives on the workers alone: when all of them go at once, the jobs run on those that come instead."
    inner, folder = counting_job(marks), str(tmp_path)
    def job(part):
        import os, signal, time
        once = os.path.join(folder, f"died_{part.index}")
        if part.index in (0, 1) and not os.path.exists(once):
            open(once, "w").close()
            time.sleep(.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(part)
    again = run_jobs(job, parts, cluster, progressbar=False)
    assert (tmp_path / "died_0").exists() and (tmp_path / "died_1").exists()
    same(run_jobs(counting_job(tmp_path), parts, progressbar=False), again)


# ---- shares

@given(n=st.integers(0, 40), of=st.integers(1, 50))
def test_shares_are_a_division(n, of):
    "Every neighbourhood is in one share, whatever the number of shares, and no share has two more than another."
    shares = [share_of(range(n), i, of) for i in range(of)]
    assert sorted(x for s in shares for x in s) == list(range(n)) and max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("index, of, says", [(3, 3, "from 0 to 2"), (-1, 3, "from 0 to 2"), (0, 0, "of=0"), (.5, 2, "share 0.5")])
def test_no_such_share(index, of, says):
    with pytest.raises(ValueError, match=says): share_of(range(9), index, of)


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


HOW = dict(size=6, radius=90.)


@pytest.fixture(scope="module")
def flat(array, tmp_path_factory):
    "The array's recording as a flat file, and the arguments of the command that open it."
    folder = tmp_path_factory.mktemp("flat")
    array[0].get_traces().astype("<i2").tofile(folder / "rec.bin")
    np.savetxt(folder / "geometry.txt", array[0].get_channel_locations())
    return folder, [str(folder / "rec.bin"), "--sampling-rate", "20000", "--geometry", str(folder / "geometry.txt"), "--size", "6", "--radius", "90", "--quiet"]


@pytest.fixture(scope="module")
def counted(flat):
    "Sorted in one go, one neighbourhood after the other, with the derivations and compiled functions that each of them made."
    from spike_ppl.plan import Plan
    from spike_ppl.recording import open_recording
    from spike_ppl.sort import sort, sort_by_neighbourhoods
    recording = open_recording(flat[0] / "rec.bin", sampling_rate=20_000, geometry=flat[0] / "geometry.txt")
    made, job = [], PartJob.__call__
    init, function = Plan.__init__, Plan.function
    def derived(self, *a, **k): made[-1]["derivations"] += 1; return init(self, *a, **k)
    def compiled(self, key, build, mode):
        made[-1]["compilations"] += (key, mode) not in self.compiled
        made[-1]["calls"] += 1
        return function(self, key, build, mode)
    def one(self, part): made.append(dict(derivations=0, compilations=0, calls=0)); return job(self, part)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Plan, "__init__", derived); m.setattr(Plan, "function", compiled); m.setattr(PartJob, "__call__", one)
        result = sort_by_neighbourhoods(recording, **HOW, progressbar=False)
    return recording, result, made


def test_one_compiled_function_serves_all_neighbourhoods(counted):
    "What is derived and compiled for the first neighbourhood is used by all."
    made = counted[2]
    assert len(made) > 1 and all(m["calls"] > 0 for m in made)
    assert [m["derivations"] for m in made[1:]] == [m["compilations"] for m in made[1:]] == [0] * (len(made) - 1), made


def test_few_spikes_need_no_derivation_of_their_own(monkeypatch):
    "A quiet neighbourhood uses what was derived for a busy one."
    from spike_ppl.plan import Plan
    from spike_ppl.clustering import fit_features
    rng, made = np.random.default_rng(0), []
    init = Plan.__init__
    def derived(self, *a, **k): made.append(1); return init(self, *a, **k)
    monkeypatch.setattr(Plan, "__init__", derived)
    few, many = (np.concatenate([rng.normal(8 * (i == np.arange(10)), 1., (n, 10)) for i in range(2)]) for n in (30, 300))
    fit_features(many, None, "vb", 0, 20); made.clear()
    _, z = fit_features(few, None, "vb", 0, 20)
    assert not made and len(set(z[:30])) == len(set(z[30:])) == 1 and z[0] != z[-1]


def test_it_is_right_and_says_where_the_time_went(counted, array):
    from spike_ppl.sort import compare, make_report
    _, result, made = counted
    c = compare(array[1], result)
    assert c["mean_accuracy"] > .9 and c["false_units"] == 0
    assert [i["neighbourhood"] for i in result.neighbourhoods] == list(range(len(made)))
    assert result.timings["neighbourhoods"]["cpu"] == pytest.approx(sum(i["cpu"] for i in result.neighbourhoods), abs=.01)
    for stage in ("neighbourhoods: cluster", "joining", "last pass", "last pass: match"): assert result.timings[stage]["cpu"] > 0, stage
    report = make_report(result)
    assert "<h2>Neighbourhoods</h2>" in report and "last pass: match" in report and "could not" not in report


def test_the_last_pass_knows_every_unit_once(counted):
    recording, result, made = counted
    parts = neighbourhoods(recording, HOW["radius"], HOW["size"])
    z = result.labels
    xy = dict(zip(recording.channel_ids.tolist(), recording.get_channel_locations()))
    from spike_ppl.scale import Merged
    main = [z.peak_channel.values[z.values == u][0] for u in result.units]
    units = xr.Dataset(dict(main_channel=("unit", main), neighbourhood=("unit", [next(p.index for p in parts if c in p.own) for c in main])), coords=dict(unit=result.units))
    templates = [xr.DataArray(10 * np.exp(-np.array([np.linalg.norm(xy[c] - xy[m]) for c in xy]) / 30)[None], dims=("time", "channel"), coords=dict(channel=list(xy))) for m in main]
    tasks = last_tasks(Merged(z, units, templates, []), parts, most=50)
    assert sorted(u for t in tasks for u in t.units[t.own]) == result.units
    assert sum(len(t.units) for t in tasks) > len(result.units)                      # those near a border are known on both sides
    for t in tasks:
        for u, n, times in zip(t.units, t.n_spikes, t.sample_index, strict=True):
            assert n == (z.values == u).sum() and len(times) == min(50, n) and set(times.tolist()) <= set(z.sample_index.values[z.values == u].tolist())


def test_threads_with_a_real_fit(counted):
    from spike_ppl.sort import sort_by_neighbourhoods
    recording, result, _ = counted
    again = sort_by_neighbourhoods(recording, **HOW, where="threads", n_workers=2, waveforms=False, progressbar=False)
    xr.testing.assert_identical(again.labels, result.labels)


def test_shares_and_merge(counted, flat, tmp_path, capsys):
    "Two jobs of an array and one command that joins them: what is missing is named with the command that makes it; the result is that of one go, and nothing else stays."
    import shlex
    from spike_ppl.sort import load_sort, main
    out = tmp_path / "out"
    command = ["sort", *flat[1], "-o", str(out)]
    assert main([*command, "--neighbourhood", "1", "--of", "2"]) == 0
    assert main(["merge", str(out)]) == 2
    said = capsys.readouterr().err
    missing = shlex.split(said.strip().splitlines()[-1])
    assert "are not in" in said and missing[:2] == ["spike-ppl", "sort"] and missing[missing.index("--neighbourhood"):][:4] == ["--neighbourhood", "0", "--of", "2"]
    assert main([*command, "--neighbourhood", "0", "--of", "2", "--seed", "1"]) == 2 and "all shares need the same" in capsys.readouterr().err
    assert main([*command, "--neighbourhood", "7", "--of", "9"]) == 0 and "nothing to do" in capsys.readouterr().out
    assert main([*missing[1:], "--quiet"]) == 0 and f"spike-ppl merge {out}" in capsys.readouterr().out
    assert main(["merge", str(out), "--quiet"]) == 0
    back = load_sort(out)
    for k in ("sample_index", "probability", "entropy"): assert np.array_equal(back.labels[k].values, counted[1].labels[k].values), k
    assert np.array_equal(back.labels.values, counted[1].labels.values)
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "done" and run["units"] == len(back.units) and run["timings"]["last pass"]["wall"] > 0 and len(run["neighbourhoods"]) == len(counted[2])
    assert sorted(p.name for p in out.iterdir()) == ["fits", "report.html", "run.json", "sorting.npz", "waveforms.zarr"]
    assert back.fit is None and len(back.fits) == len(run["neighbourhoods"]) and "fits/part_00000.nc" in (out / "report.html").read_text()
    for fit, job in zip(back.fits, run["neighbourhoods"], strict=True):      # each with the features that it was fitted to
        x = fit["observed_data"]["features"]
        assert 0 < x.sizes["spike"] <= job["spikes"] and x.sizes["spike"] == fit["unit_probability"].sizes["spike"] and "means" in fit["posterior"]
    assert main(["merge", str(out)]) == 2 and "finished" in capsys.readouterr().err
    assert main([*command, "--neighbourhood", "0", "--of", "2"]) == 2 and "finished" in capsys.readouterr().err


@pytest.mark.parametrize("flags, says", [(["--neighbourhood", "0"], "belong together"), (["--neighbourhood", "2", "--of", "2"], "from 0 to 1"), (["--neighbourhood", "0", "--of", "2", "--overwrite"], "does not go with"),
    (["--size", "0"], "size=0"), (["--radius", "nan"], "--radius"), (["--memory", "0"], "memory=0")])
def test_bad_shares_are_refused(flat, flags, says, tmp_path, capsys):
    from spike_ppl.sort import main
    assert main(["sort", *flat[1], "-o", str(tmp_path / "out"), *flags]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_folders_that_are_no_shares(flat, tmp_path, capsys):
    from spike_ppl.sort import main
    (tmp_path / "mine").mkdir(); (tmp_path / "mine" / "notes.txt").write_text("precious")
    assert main(["sort", *flat[1], "-o", str(tmp_path / "mine"), "--neighbourhood", "0", "--of", "2"]) == 2 and "not the folder of other shares" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "mine")]) == 2 and "run.json" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("end", ["well", pytest.param("wrong", marks=pytest.mark.slow), pytest.param("killed", marks=pytest.mark.slow)])
def test_nothing_temporary_stays(array, tmp_path, monkeypatch, end):
    "Neither after a run that ends well, nor after one whose job fails, nor after one whose worker dies."
    import tempfile
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path)); monkeypatch.setenv("TMPDIR", str(tmp_path))
    def wrong(recording, seed): raise RuntimeError("this job is wrong")
    def killed(recording, seed):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    run = lambda sort: sort_in_parts(array[0], sort, **HOW, where="processes", n_workers=2, retries=0, progressbar=False)
    if end == "well": assert run(detect_only).units.sizes["unit"] > 0
    else:
        with pytest.raises(RuntimeError if end == "wrong" else JobFailed): run(dict(wrong=wrong, killed=killed)[end])
    assert not list(tmp_path.iterdir())


def test_two_neurons_of_one_shape_and_different_size():
    "Two neurons next to one electrode of the border neighbourhood, whose waveforms differ in size (10.9 and 17.3 noise sd) and hardly in shape: both are found."
    from spike_ppl.recording import demo_recording
    from spike_ppl.sort import sort
    column = np.array([(0 if y % 80 else 20, y) for y in range(0, 16 * 40, 40)], float)
    recording, truth = demo_recording(seed=3, duration=40, n_units=10, positions=column, pitch=45., snr=(8., 25.))
    f = PartJob(recording, sort)(neighbourhoods(recording, 90., 6)[2])
    for u in (0, 5):
        t = np.sort(truth.get_unit_spike_train(truth.unit_ids[u]))
        scores = [(k := coincidences(np.sort(f.sample_index[f.unit == v]), t, 8)) / ((f.unit == v).sum() + len(t) - k) for v in f.units]
        assert max(scores) > .95, (u, scores)


# ---- the whole, interrupted, elsewhere, bounded

def command(flat, out, *more, limit=None):
    "The command in a process of its own, at most `limit` bytes in a file."
    code = "import sys, resource\nfrom spike_ppl.sort import main\n" + (f"import spike_ppl.inference, spike_ppl.models, spike_ppl.plots, spike_ppl.units\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" if limit else "") + "sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, "sort", *flat[1], "--in-parts", "yes", "-o", str(out), *more], stderr=subprocess.PIPE, text=True, preexec_fn=hears_interrupts)


def agrees(out, result):
    with np.load(out / "sorting.npz") as s: return all(np.array_equal(s[k], v) for k, v in dict(unit=result.labels.values, sample_index=result.labels.sample_index.values, probability=result.probability.values).items())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_the_command_is_stopped_and_resumed(counted, flat, tmp_path, how):
    "Stopped in the middle; what was finished is taken as it is, and the result is that of an undisturbed run."
    out = tmp_path / "out"
    p = command(flat, out)
    for _ in range(3000):
        if (out / "progress" / "part_00000.npz").is_file() or p.poll() is not None: break
        time.sleep(.05)
    p.send_signal(getattr(signal, how))
    _, said = p.communicate(timeout=300)
    assert p.returncode == (130 if how == "SIGINT" else -9), said
    kept = sorted((out / "progress").glob("part_*.npz"))
    assert 1 <= len(kept) < len(counted[2]) and not list((out / "progress").glob("last_pass/part_*"))
    if how == "SIGINT": assert json.loads((out / "run.json").read_text())["status"] == "interrupted" and "--resume" in said
    for f in kept:                                                       # a mark that only a result taken as it is can carry on
        found = load_found(f)
        save_found(found._replace(info=found.info | dict(mark=1)), f)
    p = command(flat, out, "--resume")
    _, said = p.communicate(timeout=300)
    assert p.returncode == 0 and agrees(out, counted[1]), said
    infos = json.loads((out / "run.json").read_text())["neighbourhoods"]
    assert [i["neighbourhood"] for i in infos if i.get("mark")] == [int(f.stem[5:]) for f in kept] and not (out / "progress").exists()


@pytest.mark.slow
def test_the_command_meets_a_full_disk(counted, flat, tmp_path):
    "A file that may not grow: one line of message, nothing half-written, and --resume goes on from there."
    out = tmp_path / "out"
    p = command(flat, out, limit=100_000)
    _, said = p.communicate(timeout=300)
    assert p.returncode == 2 and "Traceback" not in said and "--resume" in said, said
    assert not list(out.rglob("*.part*")) and not (out / "sorting.npz").exists()
    for f in (out / "progress").rglob("part_*.npz"): load_found(f)
    p = command(flat, out, "--resume")
    _, said = p.communicate(timeout=300)
    assert p.returncode == 0 and agrees(out, counted[1]), said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["processes", "cluster"])
def test_real_sorting_is_the_same_everywhere(counted, cluster, where):
    "Processes and a cluster give what one process gives, to the last digit."
    from spike_ppl.sort import sort_by_neighbourhoods
    recording, result, _ = counted
    again = sort_by_neighbourhoods(recording, **HOW, where=cluster if where == "cluster" else where, n_workers=2, waveforms=False, progressbar=False)
    xr.testing.assert_identical(again.labels, result.labels)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_recording(tmp_path):
    "Eight times the recording, with the same memory=: the worker's largest memory grows by less than a fourth of what the longer recording's traces take."
    program = """
        import sys, warnings
        warnings.simplefilter("ignore")
        from spike_ppl.recording import open_recording
        from spike_ppl.scale import PartJob, _peak_memory, neighbourhoods
        from spike_ppl.sort import sort
        folder, seconds, memory = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
        recording = open_recording(f"{folder}/rec.bin", sampling_rate=20_000, geometry=f"{folder}/g.txt").frame_slice(0, seconds * 20_000)
        PartJob(recording, sort, memory=memory)(neighbourhoods(recording)[0])
        print(_peak_memory())          # `ru_maxrss` would begin with what the tests' own process has taken
        """
    from spike_ppl.recording import demo_recording
    recording, _ = demo_recording(seed=1, duration=240, n_units=6)
    recording.get_traces().astype("<i2").tofile(tmp_path / "rec.bin"); np.savetxt(tmp_path / "g.txt", recording.get_channel_locations())
    run = lambda seconds: int(subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(seconds), "2e7"], check=True, capture_output=True, text=True).stdout)
    short, long = run(30), run(240)
    traces = 2 * 4 * 7 * 20_000 * (240 - 30)   # two copies, standardised and whitened
    assert long - short < traces / 4, (short, long, traces)


def test_a_fit_is_written_where_a_dask_client_is_about(tmp_path):
    "xarray asks the client for a lock by the file's name, and bytes in memory have none."
    from dask.distributed import Client
    fit = xr.DataTree.from_dict({"posterior": xr.Dataset({"means": ("unit", np.arange(3.))})})
    with Client(n_workers=1, threads_per_worker=1, processes=False, protocol="tcp://", dashboard_address=None):
        path = scale._write_whole(tmp_path / "fits" / "part_00000.nc", lambda f: f.write(scale._netcdf(fit)))
    with xr.open_datatree(path, engine="h5netcdf") as back: assert np.array_equal(back["posterior"]["means"], np.arange(3.))
