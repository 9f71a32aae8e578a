"""What the tests of the whole repository share."""
import json
import os
import shutil
import signal
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

CHROMIUM_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                  "--disable-component-update", "--disable-sync"]
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci"))


def hears_interrupts():
    "For `preexec_fn`: Ctrl-C reaches the new process also where the tests run in the background, whose children ignore it."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def root():
    "The repository."
    return ROOT


@pytest.fixture(scope="session")
def settings():
    "The metadata of settings.ini."
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="session")
def notebooks():
    "Every notebook: its path below nbs/, and its contents."
    found = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(s.startswith((".", "_")) for s in p.relative_to(ROOT).parts))
    return {p.relative_to(ROOT / "nbs"): json.loads(p.read_text(encoding="utf-8")) for p in found}


@pytest.fixture(scope="module")
def chromium():
    "A headless Chromium: Debian's, or the one that CHROMIUM names. It closes after the module, because its event loop would be in the way of others."
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium; or set CHROMIUM to one)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def screen(chromium):
    "Open a browser tab that reaches one address only; `tab.faults` keeps what went wrong in it."
    opened = []

    def new(address, width=1280, height=900, dark=False):
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        opened.append(context)
        page = context.new_page()
        page.faults = []
        page.on("console", lambda m: page.faults.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: page.faults.append(str(e)))
        page.on("response", lambda r: page.faults.append(f"{r.status} {r.url}") if r.status >= 400 and not r.url.endswith("favicon.ico") else None)

        def local(route):
            if route.request.url.startswith((address, "data:", "blob:")):
                route.continue_()
            else:
                page.faults.append(f"asked the network for {route.request.url}")
                route.abort()
        page.route("**/*", local)
        return page

    yield new
    for context in opened:
        context.close()
