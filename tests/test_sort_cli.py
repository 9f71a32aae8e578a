"""The command: bad input is refused in plain words with nothing left behind, good input gives the promised folder, the same for any number of workers."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import hears_interrupts
from spike_ppl.sort import free_folder, load_sort, main, sort

RATE = 20_000


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A short simulated recording as a flat file with its geometry, and its truth."
    from spike_ppl.recording import demo_recording

    folder = tmp_path_factory.mktemp("demo")
    recording, truth = demo_recording(seed=3, duration=20.0, n_units=5)
    recording.get_traces().astype("<i2").tofile(folder / "rec.bin")
    np.savetxt(folder / "geometry.txt", recording.get_channel_locations())
    return folder, recording, truth


@pytest.fixture(scope="module")
def sorted_folder(demo):
    "The folder that the command leaves for it."
    folder, *_ = demo
    out = folder / "out"
    assert main(["sort", str(folder / "rec.bin"), "--sampling-rate", str(RATE), "--geometry", str(folder / "geometry.txt"), "-o", str(out), "--quiet"]) == 0
    return out


def noise(n, c=4, seed=0):
    return (np.random.default_rng(seed).standard_normal((n, c)) * 50).astype("<i2")


def lines(n, change=None):
    xy = [[0.0, 30.0 * i] for i in range(n)]
    for i, v in (change or {}).items():
        xy[i] = v
    return "\n".join(f"{a} {b}" for a, b in xy)


BAD = {
    "missing file": (lambda d: None, [], "does not exist"),
    "empty file": (lambda d: (d / "r.bin").write_bytes(b""), ["--channels", "4"], "empty"),
    "not a multiple": (lambda d: (d / "r.bin").write_bytes(b"\0" * 4001), ["--channels", "4"], "whole number"),
    "NaN": (lambda d: np.where(np.arange(80_000).reshape(-1, 4) == 777, np.nan, noise(20_000)).astype("<f4").tofile(d / "r.bin"), ["--channels", "4", "--dtype", "float32"], "finite"),
    "Inf": (lambda d: np.where(np.arange(80_000).reshape(-1, 4) == 777, np.inf, noise(20_000)).astype("<f4").tofile(d / "r.bin"), ["--channels", "4", "--dtype", "float32"], "finite"),
    "wrong dtype": (lambda d: noise(20_000).tofile(d / "r.bin"), ["--channels", "4", "--dtype", "float32"], "dtype"),
    "unknown dtype": (lambda d: noise(20_000).tofile(d / "r.bin"), ["--channels", "4", "--dtype", "int17"], "int17"),
    "all constant": (lambda d: np.full((20_000, 4), 7, "<i2").tofile(d / "r.bin"), ["--channels", "4"], "constant"),
    "no channels": (lambda d: noise(20_000).tofile(d / "r.bin"), ["--channels", "0"], "positive"),
    "negative channels": (lambda d: noise(20_000).tofile(d / "r.bin"), ["--channels", "-4"], "positive"),
    "no spikes": (lambda d: noise(100_000).tofile(d / "r.bin"), ["--channels", "4"], "found"),
    "one sample": (lambda d: noise(1).tofile(d / "r.bin"), ["--channels", "4"], ""),
    "unknown model": (lambda d: noise(20_000).tofile(d / "r.bin"), ["--channels", "4", "--model", "magic"], "dpmm"),
    "unknown method": (lambda d: noise(20_000).tofile(d / "r.bin"), ["--channels", "4", "--method", "magic"], "gibbs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recording_is_refused(name, tmp_path, capsys):
    make, flags, says = BAD[name]
    make(tmp_path)
    code = main(["sort", str(tmp_path / "r.bin"), "--sampling-rate", str(RATE), *flags, "-o", str(tmp_path / "out"), "--quiet"])
    said = capsys.readouterr().err
    assert code != 0 and says in said and said.startswith("spike-ppl:"), said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("rate", ["0", "-5", "nan"])
def test_bad_rate(rate, tmp_path, capsys):
    noise(20_000).tofile(tmp_path / "r.bin")
    assert main(["sort", str(tmp_path / "r.bin"), f"--sampling-rate={rate}", "--channels", "4", "-o", str(tmp_path / "out"), "--quiet"]) != 0
    assert "sampling_rate" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text,says",
    [
        (lines(3), "positions"),
        (lines(4, {1: ["nan", 3.0]}), "non-finite"),
        (lines(4, {1: [0.0, 0.0]}), "share"),
        ("this is\nno geometry at all", "geometry"),
        ("", "no positions"),
        (None, "does not exist"),
    ],
)
def test_bad_geometry(text, says, tmp_path, capsys):
    noise(20_000).tofile(tmp_path / "r.bin")
    if text is not None:
        (tmp_path / "g.txt").write_text(text)
    flags = ["--channels", "4"] if text == lines(3) else []
    assert main(["sort", str(tmp_path / "r.bin"), "--sampling-rate", str(RATE), *flags, "--geometry", str(tmp_path / "g.txt"), "-o", str(tmp_path / "out"), "--quiet"]) != 0
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_existing_folder_is_kept(tmp_path, capsys):
    noise(20_000).tofile(tmp_path / "r.bin")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    arguments = ["sort", str(tmp_path / "r.bin"), "--sampling-rate", str(RATE), "--channels", "4", "-o", str(out), "--quiet"]
    assert main(arguments) != 0 and "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) != 0 and "not the result of an earlier sort" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "precious"


def test_unwritable_folder(tmp_path, capsys):
    noise(20_000).tofile(tmp_path / "r.bin")
    assert main(["sort", str(tmp_path / "r.bin"), "--sampling-rate", str(RATE), "--channels", "4", "-o", str(tmp_path / "r.bin" / "out"), "--quiet"]) != 0
    assert "spike-ppl:" in capsys.readouterr().err


def test_what_the_folder_holds(sorted_folder, demo):
    import arviz as az

    with np.load(sorted_folder / "sorting.npz") as s:
        n = len(s["unit"])
        assert s["sample_index"].dtype == np.int64 and s["unit"].dtype == np.int64 and s["probability"].dtype == s["entropy"].dtype == np.float64
        assert all(len(s[k]) == n for k in ("sample_index", "probability", "entropy"))
        assert (np.diff(s["sample_index"]) >= 0).all() and (s["unit"] >= -1).all()
        assert np.isfinite(s["probability"]).all() and np.isfinite(s["entropy"]).all()
        assert s["probability"].min() >= 0 and s["probability"].max() <= 1 and s["entropy"].min() >= 0
    fit = az.from_netcdf(sorted_folder / "fit.nc")
    assert "posterior" in fit.children and "weights" in fit["posterior"]
    report = (sorted_folder / "report.html").read_text()
    assert "data:image/png;base64" in report and "could not" not in report and "://" not in report
    run = json.loads((sorted_folder / "run.json").read_text())
    assert run["status"] == "done" and run["arguments"]["seed"] == 0 and "pymc" in run["versions"] and run["timings"]["match"]["wall"] > 0
    back = load_sort(sorted_folder)
    assert back.waveforms.sizes["channel"] == 7 and back.sorting.get_num_units() == run["units"] and back.recording is not None
    assert not list(sorted_folder.glob("*.part*")) and not (sorted_folder / "progress").exists()


def test_it_finds_the_units(sorted_folder, demo):
    from spike_ppl.sort import compare

    c = compare(demo[2], load_sort(sorted_folder))
    assert c["mean_accuracy"] > 0.9 and c["false_units"] == 0


def test_same_seed_same_result_on_any_number_of_workers(sorted_folder, demo):
    folder, *_ = demo
    out = folder / "again"
    assert main(["sort", str(folder / "rec.bin"), "--sampling-rate", str(RATE), "--geometry", str(folder / "geometry.txt"), "-o", str(out), "--quiet", "--jobs", "2"]) == 0
    with np.load(sorted_folder / "sorting.npz") as a, np.load(out / "sorting.npz") as b:
        for k in ("sample_index", "unit", "probability", "entropy"):
            assert np.array_equal(a[k], b[k]), k


def test_some_constant_channels_are_left_out(demo, tmp_path, capsys):
    folder, recording, _ = demo
    x = recording.get_traces().copy()
    x[:, 1] = 3
    x.astype("<i2").tofile(tmp_path / "r.bin")
    assert main(["sort", str(tmp_path / "r.bin"), "--sampling-rate", str(RATE), "--geometry", str(folder / "geometry.txt"), "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert "constant" in capsys.readouterr().err
    assert load_sort(tmp_path / "out").waveforms.sizes["channel"] == 6


def test_overwrite_replaces_an_earlier_result(tmp_path):
    out = free_folder(tmp_path / "out")
    (out / "run.json").write_text("{}")
    (out / "old").write_text("")
    assert not list(free_folder(out, overwrite=True).iterdir())


@pytest.mark.parametrize("kind", ["binary", "zarr"])
def test_sorts_through_spikeinterface(demo, tmp_path, kind):
    "A recording that SpikeInterface saved, sorted by its call, analysed by its analyzer, the posterior of each spike included."
    import spike_ppl.sort  # noqa: F401
    from spikeinterface.sorters import get_default_sorter_params, get_sorter_params_description, run_sorter

    assert set(get_default_sorter_params("spike_ppl")) == set(get_sorter_params_description("spike_ppl"))
    recording, truth = demo[1:]
    from spikeinterface import load

    recording.save(folder=tmp_path / ("saved.zarr" if kind == "zarr" else "saved"), format=kind, verbose=False)
    saved = load(tmp_path / ("saved.zarr" if kind == "zarr" else "saved"))
    parts = dict(in_parts=True, size=4) if kind == "zarr" else {}
    s = run_sorter("spike_ppl", saved, folder=tmp_path / "out", verbose=False, **parts)
    assert ("last pass" in json.loads((tmp_path / "out" / "sorter_output" / "run.json").read_text())["timings"]) == bool(parts)
    from spike_ppl.sort import compare
    from spike_ppl.units import to_analyzer

    assert compare(truth, s)["mean_accuracy"] > 0.9
    to_analyzer(s, recording=saved, extensions=("random_spikes", "waveforms", "templates"), folder=tmp_path / "analyzer")
    from spikeinterface import load_sorting_analyzer

    analyzer = load_sorting_analyzer(tmp_path / "analyzer")
    p = analyzer.get_extension("spike_ppl").get_data()["probability"]
    assert len(p) == len(s.to_spike_vector()) and ((p > 0) & (p <= 1)).all() and p.mean() > 0.9


@pytest.mark.parametrize("kind", ["memory", "zarr"])
def test_clusters_given_peaks_through_spikeinterface(demo, tmp_path, kind):
    import spike_ppl.sort  # noqa: F401
    from spikeinterface.sortingcomponents.clustering import find_clusters_from_peaks

    recording, truth = demo[1:]
    if kind == "zarr":
        recording = recording.save(folder=tmp_path / "saved.zarr", format="zarr", verbose=False)
    v = truth.to_spike_vector()
    peaks = np.zeros(len(v), dtype=[("sample_index", "int64"), ("channel_index", "int64"), ("amplitude", "float64"), ("segment_index", "int64")])
    peaks["sample_index"] = v["sample_index"]
    units, labels = find_clusters_from_peaks(recording, peaks, method="spike-ppl", method_kwargs=dict(seed=0))
    assert len(labels) == len(v) and set(units) == set(labels[labels >= 0])
    same = [np.bincount(labels[(v["unit_index"] == u) & (labels >= 0)]).max() / (v["unit_index"] == u).sum() for u in range(truth.get_num_units())]
    assert np.mean(same) > 0.9


@pytest.mark.slow
def test_interrupt_leaves_a_folder_and_resume_finishes(demo, sorted_folder, tmp_path):
    folder, *_ = demo
    out = tmp_path / "out"
    command = [str(Path(sys.executable).with_name("spike-ppl")), "sort", str(folder / "rec.bin"), "--sampling-rate", str(RATE), "--geometry", str(folder / "geometry.txt"), "-o", str(out)]
    p = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hears_interrupts)
    for _ in range(3000):
        if (out / "progress" / "find.pkl").is_file():
            break
        time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=300)[1]
    assert p.returncode == 130, said
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    with np.load(out / "sorting.npz") as s:
        assert len(s["unit"]) and (s["unit"] == -1).all() and np.isfinite(s["probability"]).all()
    assert subprocess.run([*command, "--resume"], capture_output=True).returncode == 0
    with np.load(out / "sorting.npz") as a, np.load(sorted_folder / "sorting.npz") as b:
        assert np.array_equal(a["unit"], b["unit"])


@pytest.mark.parametrize("flags, wanted", [([], True), (["--no-motion"], False)])
def test_the_command_can_leave_motion_alone(demo, tmp_path, monkeypatch, flags, wanted):
    folder, *_ = demo
    told = []

    def stand_in(recording, **how):
        told.append(how["motion"])
        raise ValueError("told")

    monkeypatch.setattr("spike_ppl.sort.sort", stand_in)
    where = ["--sampling-rate", str(RATE), "--geometry", str(folder / "geometry.txt"), "-o", str(tmp_path / "out"), "--quiet"]
    assert main(["sort", str(folder / "rec.bin"), *where, *flags]) == 2 and told == [wanted]
