"""Every way a recording can be wrong ends in a message that says what to change."""
import warnings

import numpy as np
import pytest

from spike_ppl.recording import RecordingError, RecordingWarning, check_recording, demo_recording, hold, open_recording, read_geometry, standardise

RATE, XY = 20_000, [[0, 0], [30, 0], [60, 0], [90, 0]]


@pytest.fixture()
def samples():
    return np.random.default_rng(0).normal(0, 80, (RATE, 4)).round().astype("int16")


@pytest.fixture()
def flat(tmp_path, samples):
    "Write samples and a geometry; open with the right description unless told otherwise."
    def make(x=samples, xy=XY, **how):
        file, geometry = tmp_path / "r.bin", tmp_path / "g.txt"
        if x is not None: file.write_bytes(x if isinstance(x, bytes) else np.asarray(x).tobytes())
        if isinstance(xy, str): geometry.write_text(xy)
        else: np.savetxt(geometry, xy)
        return open_recording(file, **dict(sampling_rate=RATE, dtype="int16", geometry=geometry) | how)
    return make


def test_good_file(flat, samples):
    r = flat()
    assert (r.get_traces() == samples).all() and r.get_sampling_frequency() == RATE and r.get_channel_locations().tolist() == XY


@pytest.mark.parametrize("change, message", [
    (dict(x=None), "does not exist"),
    (dict(x=b""), "is empty"),
    (dict(x=b"\0" * 8001), "not a whole number of samples of 4 channels x 2 bytes"),
    (dict(dtype="int17"), "Unknown dtype 'int17'"),
    (dict(dtype="complex64"), "cannot hold voltages"),
    (dict(dtype="bool"), "cannot hold voltages"),
    (dict(dtype="float32"), "does not look like float32.*read like int16"),
    (dict(dtype="float64"), "does not look like float64.*read like int16"),
    (dict(dtype="int32"), "does not look like int32.*read like int16"),
    (dict(dtype="uint16"), "does not look like uint16.*read like int16"),
    (dict(sampling_rate=0), "sampling_rate=0"),
    (dict(sampling_rate=-20_000), "positive number of samples per second"),
    (dict(sampling_rate=float("nan")), "sampling_rate=nan"),
    (dict(sampling_rate="fast"), "sampling_rate='fast'"),
    (dict(sampling_rate=None), "does not say its sampling_rate"),
    (dict(n_channels=0), "n_channels=0; expected a positive whole number"),
    (dict(n_channels=-4), "n_channels=-4"),
    (dict(n_channels=2.5), "n_channels=2.5"),
    (dict(n_channels=4, channels=5), "disagree"),
    (dict(n_channels=5), "4 positions but n_channels=5"),
    (dict(channels=2), "4 positions but n_channels=2"),
    (dict(geometry=None), "does not say its n_channels"),
    (dict(time_axis=2), "time_axis=2"),
    (dict(offset=10**9), "leaves nothing"),
    (dict(xy="0 0\n30 0\n60 0\n60 0\n"), "channels 2, 3 share the position"),
    (dict(xy="0 0\n30 0\nnan 0\n90 0\n"), "non-finite positions for channels 2"),
    (dict(xy="0 0\n30 0\ninf 0\n90 0\n"), "non-finite positions for channels 2"),
    (dict(xy="a poem about electrodes\nand channels\n"), "is not a geometry"),
    (dict(xy="0 0 0\n30 0 0\n"), "is not a geometry"),
    (dict(xy=""), "holds no positions"),
    (dict(geometry="nowhere.txt"), "does not exist"),
    (dict(geometry=np.zeros((4, 3))), r"expected \(channel, 2\)"),
    (dict(x=np.zeros((RATE, 4), "int16")), "All 4 channels are constant"),
    (dict(x=np.full((RATE, 4), 7, "int16")), "All 4 channels are constant"),
    (dict(reader="nosuchformat"), "Unknown reader 'nosuchformat'. SpikeInterface has: .*spikeglx"),
])
def test_refused(flat, change, message):
    with pytest.raises(RecordingError, match=message): flat(**change)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("where", [0, 12_345, RATE - 1])
def test_non_finite_samples(flat, samples, value, dtype, where):
    x = samples.astype(dtype); x[where, 2] = value
    with pytest.raises(RecordingError, match=f"Channel 2 holds .* at sample {where}"): flat(x, dtype=dtype)


@pytest.mark.parametrize("real, said", [("float32", "int16"), ("float64", "int16"), ("float32", "int32")])
@pytest.mark.parametrize("scale", [1., 1e-6, .5])
def test_wrong_dtype_of_floats(flat, samples, real, said, scale):
    with pytest.raises(RecordingError, match=f"read like {real}"): flat((samples * scale).astype(real), dtype=said)


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "float32", "float64", ">i2"])
@pytest.mark.parametrize("offset", [0, 2048, 16384, 30000])
def test_right_dtype_is_accepted(flat, samples, dtype, offset):
    "No honest file is refused, whatever its type and offset."
    x = (samples.astype(float) + offset + (2**14 if dtype == "uint16" else 0)).astype(dtype)
    assert (flat(x, dtype=dtype).get_traces() == x).all()


def test_24_bit_samples_are_accepted(flat, samples): assert flat((samples.astype("int32") << 9), dtype="int32").get_num_samples() == RATE


def test_some_channels_constant(flat, samples):
    samples[:, 1] = 5
    with pytest.warns(RecordingWarning, match="Channels 1 are constant and are left out"): r = flat(samples)
    assert list(r.channel_ids) == [0, 2, 3] and r.get_channel_locations().tolist() == [XY[0], XY[2], XY[3]]


def test_quiet_start_is_not_constant(flat, samples):
    samples[:-200, 1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flat(samples).get_num_channels() == 4


def test_no_geometry_is_said(tmp_path, samples):
    samples.tofile(tmp_path / "r.bin")
    with pytest.warns(RecordingWarning, match="placed on a line"): r = open_recording(tmp_path / "r.bin", sampling_rate=RATE, n_channels=4)
    assert r.has_probe()


def test_header_and_time_axis(tmp_path, samples):
    (tmp_path / "r.dat").write_bytes(b"h" * 64 + np.ascontiguousarray(samples.T).tobytes())
    r = open_recording(tmp_path / "r.dat", sampling_rate=RATE, geometry=np.array(XY), time_axis=1, offset=64, gain=.195)
    assert (r.get_traces() == samples).all() and r.get_channel_gains().tolist() == [.195] * 4


@pytest.mark.parametrize("text", ["0,0\n30,0\n60,0\n90,0\n", "x y\n0 0\n30 0\n60 0\n90 0", "# probe\n0\t0\n\n30\t0 # second\n60\t0\n90\t0\n", "﻿0 0\r\n30 0\r\n60 0\r\n90 0\r\n"])
def test_geometry_dialects(tmp_path, text):
    (tmp_path / "g.txt").write_text(text)
    assert read_geometry(tmp_path / "g.txt").contact_positions.tolist() == XY


def test_probeinterface_file(tmp_path, flat):
    import probeinterface as pi
    pi.write_probeinterface(tmp_path / "p.json", read_geometry_of(XY))
    assert flat(geometry=tmp_path / "p.json").get_channel_locations().tolist() == XY
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(RecordingError, match="not readable by probeinterface|describes 0 probes"): flat(geometry=tmp_path / "broken.json")


def read_geometry_of(xy):
    from spike_ppl.recording import make_probe
    return make_probe(xy)


def test_formats_of_spikeinterface(tmp_path, flat, samples):
    r = flat()
    r.save(folder=tmp_path / "f", verbose=False, progress_bar=False)
    r.save(folder=tmp_path / "z.zarr", format="zarr", verbose=False, progress_bar=False)
    r.dump_to_json(tmp_path / "r.json", relative_to=tmp_path)
    for p in (tmp_path / "f", tmp_path / "z.zarr", tmp_path / "r.json"):
        again = open_recording(p)
        assert (again.get_traces() == samples).all() and again.get_channel_locations().tolist() == XY
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordingError, match="not one of the known formats"): open_recording(tmp_path / "empty")
    (tmp_path / "a.xyz").write_text("hello")
    with pytest.raises(RecordingError, match="format of .* is not known"): open_recording(tmp_path / "a.xyz")


def test_nwb(tmp_path, samples):
    pytest.importorskip("pynwb")
    from datetime import datetime, timezone
    from pynwb import NWBHDF5IO, NWBFile
    from pynwb.ecephys import ElectricalSeries
    nwb = NWBFile(session_description="test", identifier="x", session_start_time=datetime(2026, 1, 1, tzinfo=timezone.utc))
    device = nwb.create_device(name="d")
    group = nwb.create_electrode_group(name="g", description="d", location="retina", device=device)
    for x, y in XY: nwb.add_electrode(group=group, location="retina", rel_x=float(x), rel_y=float(y))
    nwb.add_acquisition(ElectricalSeries(name="raw", data=samples, electrodes=nwb.create_electrode_table_region(list(range(4)), "all"), rate=float(RATE), conversion=1e-6))
    with NWBHDF5IO(tmp_path / "r.nwb", "w") as io: io.write(nwb)
    r = open_recording(tmp_path / "r.nwb")
    assert (r.get_traces() == samples).all() and r.get_channel_locations().tolist() == XY


def test_broken_file_of_a_known_format(tmp_path):
    (tmp_path / "r.rhd").write_bytes(b"not intan" * 100)
    with pytest.raises(RecordingError, match="reader 'intan' cannot open"): open_recording(tmp_path / "r.rhd")


def test_segments_are_joined_and_said(samples):
    from spikeinterface.core import NumpyRecording
    r = NumpyRecording([samples, samples], RATE)
    with pytest.warns(RecordingWarning, match="2 segments"): joined = open_recording(r, geometry=np.array(XY))
    assert joined.get_num_segments() == 1 and joined.get_num_samples() == 2 * RATE
    assert not r.has_probe()   # the caller's recording is left alone


def test_standardise_refuses(samples):
    from spikeinterface.core import NumpyRecording
    r = NumpyRecording([samples], RATE)
    with pytest.raises(RecordingError, match="does not fit a sampling rate"): standardise(r, freq_min=3000, freq_max=300)
    with pytest.raises(RecordingError, match="does not fit a sampling rate"): standardise(NumpyRecording([samples], 2000))
    silent = samples.copy(); silent[100:, 0] = 0
    with pytest.raises(RecordingError, match="Channels 0 are silent"): standardise(NumpyRecording([silent], RATE))
    with pytest.raises(RecordingError, match="duration=0"): demo_recording(duration=0)
    with pytest.raises(RecordingError, match="no samples|empty"): check_recording(NumpyRecording([samples[:0]], RATE))


def test_chunks_of_any_size_read_the_same(samples):
    "The filter's margins are wide enough: reading in pieces changes nothing."
    r, _ = demo_recording(seed=3, duration=3)
    s = standardise(r)
    whole = s.get_traces()
    for size in (0.11, 0.5, 2.): assert np.abs(hold(s, chunk_duration=size).get_traces() - whole).max() < 1e-4
