"""The explorers in JupyterLab (and units in Notebook 7) in a real browser: run a notebook, drag a slider, pick a unit, accept a merge, and see figures and the saved curation change."""
import base64
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed (pip install jupyterlab)")

MADE = '''
import numpy as np, xarray as xr
from spike_ppl.units import Clustering
def made(n=900, channels=7, seed=0):
    rng = np.random.default_rng(seed)
    angle = np.arange(6)*np.pi/3
    xy = np.r_[[[0., 0.]], 60*np.c_[np.cos(angle), np.sin(angle)]]
    time = np.arange(-15, 16)/20
    true = rng.integers(0, 3, n)
    size = 12*np.exp(-((xy[[0, 1, 3]][:, None] - xy[None])**2).sum(-1)/4000)
    values = -np.exp(-(time/.2)**2)[None, :, None]*size[true][:, None] + rng.normal(size=(n, 31, channels))
    sample = np.sort(rng.choice(np.arange(100, 1_199_000, 100), n, replace=False))
    for u in range(3):       # refractory
        mine = np.flatnonzero(true == u); close = mine[1:][np.diff(sample[mine]) < 60]; true[close] = -1
    labels = true.copy()
    half = np.flatnonzero(true == 0); labels[half[rng.random(len(half)) < .5]] = 3      # neuron 0 cut in two
    w = xr.DataArray(values, dims=("spike", "time", "channel"), attrs=dict(sampling_rate=20_000., units="noise sd"),
        coords=dict(time=time, channel=[str(i) for i in range(channels)], x=("channel", xy[:, 0]), y=("channel", xy[:, 1]), sample_index=("spike", sample)))
    f = xr.DataArray(values[:, 12:19:3].transpose(0, 2, 1).reshape(n, -1), dims=("spike", "feature"), coords=dict(feature=[f"c{c}_l{l}" for c in range(channels) for l in range(3)], sample_index=("spike", sample)))
    return Clustering(xr.DataArray(labels, dims="spike", coords=dict(sample_index=("spike", sample)), attrs=dict(sampling_rate=20_000.)), waveforms=w, features=f, probability=rng.beta(1.5, 1, n), duration=60.)
'''


def served(tmp_path_factory, app, where):
    "A Jupyter server of its own: address, path of its notebooks, token and folder; nothing of the user's settings is read or written."
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("home")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    token = secrets.token_hex(16)
    env = os.environ | {k: str(home / k.lower()) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")} | dict(IN_TEST="1")
    log = open(home / "log", "w")
    server = subprocess.Popen([sys.executable, "-m", app, "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}", "--expose-app-in-browser", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
        env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        if server.poll() is not None: pytest.fail(f"{app} ended at once:\n" + (home / "log").read_text()[-2000:])
        try: urllib.request.urlopen(f"{address}/api?token={token}", timeout=2); break
        except OSError: time.sleep(.5)
    else: pytest.fail(f"{app} did not answer within two minutes")
    yield address, where, token, folder
    server.terminate()
    try: server.wait(20)
    except subprocess.TimeoutExpired: server.kill()
    log.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory): yield from served(tmp_path_factory, "jupyterlab", "lab/tree")


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    pytest.importorskip("notebook", reason="Notebook is not installed (pip install notebook)")
    yield from served(tmp_path_factory, "notebook", "notebooks")


@pytest.fixture
def opened(screen, request):
    "A function that writes a notebook of some cells, opens it in Lab or Notebook, runs it, and gives the page."
    def open_(name, *cells, dark=False, server="lab"):
        import nbformat
        address, where, token, folder = request.getfixturevalue(server)
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")))
        nbformat.write(nb, folder / f"{name}.ipynb")
        page = screen(address, width=1400, height=1300)
        page.goto(f"{address}/{where}/{name}.ipynb?token={token}&reset", timeout=120_000)
        page.wait_for_function("window.jupyterapp && window.jupyterapp.shell.currentWidget && window.jupyterapp.shell.currentWidget.sessionContext", timeout=120_000)
        page.evaluate("async () => { const c = window.jupyterapp.shell.currentWidget.sessionContext; await c.ready; }")
        page.wait_for_function("""() => { const c = window.jupyterapp.shell.currentWidget.sessionContext;
            return c.isReady && c.session && c.session.kernel && c.session.kernel.connectionStatus === 'connected' && c.session.kernel.status === 'idle'; }""", timeout=120_000)
        page.evaluate("async theme => { await window.jupyterapp.commands.execute('apputils:change-theme', {theme}); }", f"JupyterLab {'Dark' if dark else 'Light'}")
        page.evaluate("() => { const a = window.jupyterapp; if (!a.shell.leftCollapsed) a.shell.collapseLeft(); void a.commands.execute('notebook:run-all-cells'); }")
        return page

    return open_


def pictures(page):
    "The explorer's pictures, as the browser shows them."
    return page.evaluate("() => [...document.querySelectorAll('.widget-image')].map(i => i.src)")


def bits(page, i):
    "The bytes of one picture."
    return page.evaluate("""async i => { const r = await fetch([...document.querySelectorAll('.widget-image')][i].src); const b = new Uint8Array(await r.arrayBuffer());
        let s = ''; for (const x of b) s += String.fromCharCode(x); return btoa(s); }""", i)


def changed(page, i, before, timeout=30):
    "Wait until a picture is another one."
    end = time.time() + timeout
    while time.time() < end:
        now = bits(page, i)
        if now != before: return now
        page.wait_for_timeout(100)
    raise AssertionError(f"picture {i} did not change within {timeout} s")


def shot(page, name):
    "Keep a picture of the explorer where SPIKE_PPL_SHOTS says (the site's are made with `SPIKE_PPL_SHOTS=nbs/figures`)."
    if os.environ.get("SPIKE_PPL_SHOTS"):
        Path(os.environ["SPIKE_PPL_SHOTS"]).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(500)
        page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'", timeout=60_000)
        page.wait_for_timeout(500)
        from PIL import Image, ImageChops
        path = Path(os.environ["SPIKE_PPL_SHOTS"]) / f"explore_{name}.png"
        page.locator(".jp-OutputArea-output .widget-vbox").first.screenshot(path=str(path))
        picture = Image.open(path).convert("RGB")
        right = ImageChops.difference(picture, Image.new("RGB", picture.size, picture.getpixel((picture.width - 1, 0)))).getbbox()[2]
        picture.crop((0, 0, min(right + 8, picture.width), picture.height)).quantize(128).save(path, optimize=True)      # nothing is to the right


def no_error(page):
    text = page.evaluate("() => [...document.querySelectorAll('.jp-RenderedText[data-mime-type=\"application/vnd.jupyter.stderr\"], .jp-OutputArea-output[data-mime-type*=error]')].map(e => e.innerText).join('\\n')")
    assert "Traceback" not in text and "Error" not in text, text[-2000:]


def test_units_are_picked_merged_undone_and_saved(opened, lab):
    folder = lab[-1]
    page = opened("units", MADE, "from spike_ppl.explore import UnitExplorer\nexplorer = UnitExplorer(made(), path='curation.json')\nexplorer")
    page.wait_for_function("document.querySelectorAll('.widget-image').length == 4", timeout=120_000)
    no_error(page)
    page.wait_for_timeout(500)
    first = [bits(page, i) for i in range(4)]
    assert all(base64.b64decode(b)[:4] == b"\x89PNG" for b in first)

    # drag the threshold: the scatter, the template and the intervals change, the evidence does not
    handle = page.locator(".noUi-handle").first
    handle.focus()
    for _ in range(15): page.keyboard.press("ArrowRight")
    page.wait_for_function("/at P ≥ 0\\.30/.test(document.body.innerText)", timeout=60_000)
    for i in range(3): changed(page, i, first[i])
    assert bits(page, 3) == first[3]
    for _ in range(15): page.keyboard.press("ArrowLeft")
    page.wait_for_function("!/at P ≥/.test(document.body.innerText)", timeout=60_000)

    # pick another unit
    before = bits(page, 0)
    page.locator(".widget-dropdown select").first.select_option(index=2)
    changed(page, 0, before)
    page.wait_for_function("document.body.innerText.includes('unit 2')", timeout=30_000)

    # pick the first suggestion (the cut neuron), accept it, undo, redo
    suggestion = page.locator(".widget-select select").first
    assert "merge" in suggestion.locator("option").first.inner_text()
    before = bits(page, 3)
    suggestion.select_option(index=0)
    changed(page, 3, before)
    shot(page, "units")
    n = page.locator(".widget-dropdown select").first.locator("option").count()
    page.get_by_role("button", name="Accept").click()
    page.wait_for_function("document.body.innerText.includes('merged 0 and 3')", timeout=30_000)
    assert page.locator(".widget-dropdown select").first.locator("option").count() == n - 1
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function("document.body.innerText.includes('undone')", timeout=30_000)
    assert page.locator(".widget-dropdown select").first.locator("option").count() == n
    page.get_by_role("button", name="Redo").click()
    page.wait_for_function("document.body.innerText.includes('done again')", timeout=30_000)

    # label it and save: the file on disk says what was done
    page.get_by_role("button", name="good").click()
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Save", exact=True).click()
    page.wait_for_function("document.body.innerText.includes('saved')", timeout=30_000)
    said = json.loads((folder / "curation.json").read_text())
    assert said["merges"] == [{"unit_ids": [0, 3], "new_unit_id": 0}]
    assert [m["labels"]["quality"] for m in said["manual_labels"]] == [["good"], ["good"]]
    no_error(page)


def test_a_unit_is_picked_in_notebook_7(opened):
    page = opened("picked", MADE, "from spike_ppl.explore import UnitExplorer\nexplorer = UnitExplorer(made(), suggestions=False)\nexplorer", server="notebook")
    page.wait_for_function("document.querySelectorAll('.widget-image').length == 4", timeout=120_000)
    page.wait_for_timeout(500)
    before = [bits(page, i) for i in range(4)]
    page.locator(".widget-dropdown select").first.select_option(index=2)
    for i in range(4): changed(page, i, before[i])
    page.wait_for_function("document.body.innerText.includes('unit 2')", timeout=30_000)
    shot(page, "notebook")
    no_error(page)


def test_recording_is_scrolled_and_channels_are_clicked(opened):
    page = opened("recording", "from spike_ppl.recording import demo_recording\nfrom spike_ppl.explore import RecordingExplorer\nrecording, truth = demo_recording(seed=0, duration=5.)",
                  "explorer = RecordingExplorer(recording, truth, duration=.2)\nexplorer", dark=True)
    page.wait_for_function("document.querySelectorAll('.widget-image').length == 1", timeout=180_000)
    page.wait_for_timeout(500)
    before = bits(page, 0)
    handle = page.locator(".noUi-handle").first
    handle.focus()
    for _ in range(10): page.keyboard.press("ArrowRight")
    before = changed(page, 0, before)
    page.get_by_role("button", name="raw").click()
    before = changed(page, 0, before)
    page.locator(".widget-toggle-button", has_text=re.compile(r"^3$")).click()
    before = changed(page, 0, before)
    page.get_by_role("button", name="spike ▶").click()
    page.wait_for_function("/spike [0-9,]+ of/.test(document.body.innerText)", timeout=30_000)
    changed(page, 0, before)
    shot(page, "recording")
    no_error(page)


def test_priors_are_moved_and_the_partition_follows(opened):
    page = opened("model", "from spike_ppl.explore import ModelExplorer\nexplorer = ModelExplorer(n_units=6)\nexplorer")
    page.wait_for_function("document.querySelectorAll('.widget-image').length == 3", timeout=240_000)
    page.wait_for_timeout(500)
    before = bits(page, 0)
    handle = page.locator(".noUi-handle").nth(1)      # concentration
    handle.focus()
    for _ in range(6): page.keyboard.press("ArrowRight")
    changed(page, 0, before, 120)
    page.wait_for_function("document.body.innerText.includes('in another unit than before')", timeout=120_000)
    shot(page, "model")
    no_error(page)


def test_fits_are_chosen(opened):
    page = opened("fits", "from spike_ppl.models import gmm, toy\nfrom spike_ppl.inference import fit\nfrom spike_ppl.explore import FitExplorer\nfeatures, truth = toy(200, 3, 2, seed=0)\n"
                  "store = {f'gmm {k}': fit(gmm(features, k), method='gibbs', draws=60, tune=40, chains=2, seed=0, progressbar=False) for k in (2, 3)}", "explorer = FitExplorer(store)\nexplorer")
    page.wait_for_function("document.querySelectorAll('.widget-image').length == 4", timeout=240_000)
    page.wait_for_timeout(500)
    before = [bits(page, i) for i in range(4)]
    page.locator(".widget-select-multiple select").first.select_option(index=[0, 1])
    changed(page, 2, before[2])
    page.locator(".widget-dropdown select").first.select_option(label="means")
    changed(page, 0, before[0])
    shot(page, "fits")
    no_error(page)
