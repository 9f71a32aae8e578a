"""The steps of `make test`, in order; each says its name, and a failing one names itself."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import Queue

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CACHE = ROOT / ".venv" / "cache"
NOT_TESTED = {"benchmarks"}  # folders of nbs/ whose notebooks need data or peers that a clone has not


class Failed(Exception):
    "A step that did not pass, with what to do about it."


def settings():
    "The metadata of settings.ini."
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def environment(tmp, slot=0):
    "The environment of a test process: its own compile cache, nothing of the user's, one thread for each worker."
    cache = CACHE / f"worker{slot}"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON", "PYTEST"))}
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        env[name] = str(Path(tmp) / f"{name.lower()}{slot}")
        os.makedirs(env[name], exist_ok=True)
    env["PATH"] = f"{BIN}{os.pathsep}{env.get('PATH', '')}"
    env["PYTENSOR_FLAGS"] = f"base_compiledir={cache / 'pytensor'}"
    env["NUMBA_CACHE_DIR"] = str(cache / "numba")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        env.setdefault(name, "1")
    env["PYTHONHASHSEED"] = "0"
    return env


def run(cmd, **kw):
    "Run a command in the repository; its output goes to ours."
    return subprocess.run([str(c) for c in cmd], cwd=kw.pop("cwd", ROOT), **kw)


# ------------------------------------------------------------------ the steps


def step_versions(tmp):
    "the installed versions are those that settings.ini asks for and constraints.txt names"
    cfg, wrong = settings(), []
    locked = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            req = Requirement(line)
            if req.marker is None or req.marker.evaluate():
                locked[req.name.lower()] = req
    for text in cfg["requirements"].split() + cfg["dev_requirements"].split():
        req = Requirement(text)
        if req.marker is not None and not req.marker.evaluate():
            continue
        try:
            have = version(req.name)
        except PackageNotFoundError:
            wrong.append(f"{req.name} is not installed (wanted {req.specifier})")
            continue
        if have not in req.specifier:
            wrong.append(f"{req.name} {have} is installed, settings.ini wants {req.specifier}")
        elif req.name.lower() in locked and have not in locked[req.name.lower()].specifier:
            wrong.append(f"{req.name} {have} is installed, constraints.txt wants {locked[req.name.lower()].specifier}")
    if wrong:
        raise Failed("; ".join(wrong) + ". Remove .venv and run make again.")
    print("  " + ", ".join(f"{n} {version(n)}" for n in ("pymc", "pytensor", "arviz", "spikeinterface", "xarray", "zarr", "numba", "numpy", "nbdev")))


def copy_of_notebooks(folder):
    "A clean copy of what the export reads, with no exported module in it."
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_*", "*.tmp"))
    lib = folder / settings()["lib_name"]
    lib.mkdir()
    init = [line for line in (ROOT / lib.name / "__init__.py").read_text().splitlines() if line.startswith("__version__")]
    (lib / "__init__.py").write_text("\n".join(init) + "\n")
    return lib


def differences(a, b, suffix=""):
    "Files that are not the same in two folders."
    def files(d):
        return {p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.name.endswith(suffix)}
    x, y = files(a), files(b)
    return sorted(str(n) for n in x.keys() | y.keys() if x.get(n) != y.get(n))


def step_export(tmp):
    "spike_ppl/ is exactly what the notebooks export"
    folder = Path(tmp) / "export"
    folder.mkdir()
    lib = copy_of_notebooks(folder)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    r = run([BIN / "nbdev-export"], cwd=folder, env=env, capture_output=True, text=True)
    if r.returncode:
        raise Failed(f"nbdev-export failed: {r.stdout[-2000:]}{r.stderr[-2000:]}")
    wrong = differences(ROOT / lib.name, lib)
    for name in wrong:
        ours, made = ROOT / lib.name / name, lib / name
        run(["diff", "-u", "--label", f"committed/{name}", "--label", f"exported/{name}", ours if ours.exists() else os.devnull, made if made.exists() else os.devnull])
    ours, made = ROOT / "nbs/llms.txt", folder / "nbs/llms.txt"
    if (ours.read_bytes() if ours.exists() else b"") != (made.read_bytes() if made.exists() else b""):
        wrong.append("nbs/llms.txt")
    if wrong:
        raise Failed(f"not what the notebooks export: {', '.join(wrong)}. Run `make export` and commit.")
    print(f"  {len(list(lib.glob('*.py')))} files")


def step_clean(tmp):
    "the notebooks are clean (no execution metadata)"
    folder = Path(tmp) / "clean"
    folder.mkdir()
    copy_of_notebooks(folder)
    r = run([BIN / "nbdev-clean"], cwd=folder, capture_output=True, text=True)
    if r.returncode:
        raise Failed(f"nbdev-clean failed: {r.stdout[-2000:]}{r.stderr[-2000:]}")
    wrong = [n for n in differences(ROOT / "nbs", folder / "nbs", ".ipynb") if ".ipynb_checkpoints" not in n and not Path(n).name.startswith("_")]
    if wrong:
        raise Failed(f"not clean: {', '.join(wrong)}. Run `make export` (it cleans too) and commit.")
    print(f"  {len(notebooks())} notebooks")


def notebooks():
    "The notebooks that the tests run."
    found = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))
    return [p for p in found if not NOT_TESTED & set(p.relative_to(ROOT / "nbs").parts[:-1])]


def test_notebooks(tmp, flags=(), only=None, workers=2):
    "Run notebooks as tests, longest first, two at a time, each in a process of its own."
    times_file = CACHE / "times.json"
    times = json.loads(times_file.read_text()) if times_file.exists() else {}
    todo = sorted(only if only is not None else notebooks(), key=lambda p: -times.get(p.stem, p.stat().st_size / 1e9))
    slots, failed, took = Queue(), [], {}
    for i in range(workers):
        slots.put(i)

    def one(path):
        slot = slots.get()
        start = time.monotonic()
        try:
            cmd = [BIN / "nbdev-test", path, *(["--flags", " ".join(flags)] if flags else []), "--cell-timing-min", "20"]
            try:
                r = run(cmd, env=environment(tmp, slot), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800)
                code, out = r.returncode, r.stdout + r.stderr
            except subprocess.TimeoutExpired as e:
                code, out = 1, f"{(e.stdout or b'')[-4000:]!r} stopped after {e.timeout:.0f} s"
            except OSError as e:
                code, out = 1, str(e)
        finally:
            slots.put(slot)
        s = time.monotonic() - start
        name = path.relative_to(ROOT).as_posix()
        print(f"  {'ok    ' if code == 0 else 'FAILED'} {s:6.1f} s  {name}", flush=True)
        if code:
            print("    " + "\n    ".join(out.strip()[-6000:].splitlines()), flush=True)
            failed.append(name)
        else:
            took[path.stem] = s

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, todo))
    CACHE.mkdir(parents=True, exist_ok=True)
    times_file.write_text(json.dumps(times | took))
    if failed:
        raise Failed(f"notebooks: {', '.join(sorted(failed))}")
    print(f"  {len(todo)} notebooks passed")


def step_notebooks(tmp):
    "every notebook runs as a test"
    test_notebooks(tmp)


def step_notebooks_slow(tmp):
    "every notebook with cells marked slow runs whole"
    def slow(path):
        return any("slow" in line.split() for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"
                   for line in "".join(c["source"]).splitlines() if line.startswith("#|"))
    test_notebooks(tmp, flags=["slow"], only=[p for p in notebooks() if slow(p)])


def step_docs(tmp):
    "the site builds, with no broken link or anchor"
    if run([sys.executable, ROOT / ".ci/docs.py", "build"], env=environment(tmp), stdin=subprocess.DEVNULL).returncode:
        raise Failed("the site did not build, or has broken links (listed above). Run `make docs`.")


def step_pytest(tmp, marks="not slow"):
    "the tests of tests/"
    cmd = [sys.executable, "-m", "pytest", "tests", "-m", marks, "-n", "2", "--dist", "loadfile", "-q", "-p", "no:cacheprovider", "--durations", "5", "--continue-on-collection-errors"]
    if run(cmd, env=environment(tmp), stdin=subprocess.DEVNULL).returncode not in (0,):
        raise Failed("pytest (see above)")


def step_pytest_slow(tmp):
    "the tests of tests/ that are marked slow"
    step_pytest(tmp, "slow")


STEPS = {
    "test": [step_versions, step_export, step_clean, step_notebooks, step_docs, step_pytest],
    "slow": [step_notebooks_slow, step_pytest_slow],
}


def lock():
    "Resolve constraints.txt from settings.ini, keeping the versions it has where they still do."
    cfg = settings()
    wanted = [r for key in cfg if key.endswith("requirements") for r in cfg[key].split()]
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "requirements.in").write_text("\n".join(wanted) + "\n")
        cmd = [BIN / "uv", "pip", "compile", "--universal", "--python-version", cfg["min_python"], "--no-annotate", "--no-header",
               "-q", f"{tmp}/requirements.in", "-o", "constraints.txt"]
        return run(cmd).returncode


def main():
    "Run the steps; stop at none, so that one run tells everything; exit 1 when one failed."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=[*STEPS, "lock"])
    parser.add_argument("--only", nargs="*", default=None, help="names of steps, without step_")
    args = parser.parse_args()
    if args.what == "lock":
        return lock()
    failed, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="spike_ppl-") as tmp:
        for step in STEPS[args.what]:
            name = step.__name__.removeprefix("step_")
            if args.only is not None and name not in args.only:
                continue
            print(f"== {name}: {step.__doc__}", flush=True)
            start = time.monotonic()
            try:
                step(tmp)
            except Failed as e:
                failed.append(name)
                print(f"== {name} FAILED: {e}", flush=True)
            else:
                print(f"== {name} passed in {time.monotonic() - start:.0f} s", flush=True)
    print(f"== {'FAILED: ' + ', '.join(failed) if failed else 'all passed'} ({time.monotonic() - began:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
