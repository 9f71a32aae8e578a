"""The docs site in a real browser: every page, light and dark, wide and on a phone, without the network."""
import functools
import http.server
import threading

import docs
import pytest

@pytest.fixture(scope="session")
def site(root):
    "The built site: the folder and its pages."
    folder = root / "_docs"
    if not (folder / "index.html").is_file():
        pytest.skip("the site is not built: run `make docs` first (`make test` does)")
    return folder, sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.html"))


@pytest.fixture(scope="session")
def address(site):
    "The site served on this machine."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site[0])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture
def tab(screen, address):
    "Open a tab on the site, of a given width and theme."
    return functools.partial(screen, address)


def test_every_page_loads_without_faults_or_network(tab, site, address):
    page = tab()
    for name in site[1]:
        page.goto(address + name, wait_until="load")
        assert page.locator("h1").count() >= 1, f"{name}: no title"
        assert len(page.inner_text("main")) > 200, f"{name}: an empty page"
        assert not page.faults, f"{name}: {page.faults}"


def test_links_anchors_and_alternative_text(site):
    assert not docs.check_links(site[0])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_fit_a_phone_and_can_be_read(tab, site, address, dark):
    "At 390 px nothing makes the page scroll sideways, and text stands out from its background."
    page = tab(width=390, dark=dark)
    for name in site[1]:
        page.goto(address + name)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 392, f"{name}: {wide} px wide on a phone: " + str(page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 395).slice(0, 3).map(e => e.outerHTML.slice(0, 150))"))
        shades = page.evaluate("""() => { const p = document.querySelector('main p') || document.querySelector('main li');
            const lum = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number); return .299 * r + .587 * g + .114 * b; };
            return [lum(getComputedStyle(p).color), lum(getComputedStyle(document.body).backgroundColor)]; }""")
        assert abs(shades[0] - shades[1]) > 90, f"{name}: text {shades[0]:.0f} on {shades[1]:.0f}"
        assert (shades[1] < 90) == dark, f"{name}: the theme does not follow the system's"


def test_maths_is_typeset_and_no_markup_is_left(tab, site, address):
    "Every formula is drawn and holds nothing but maths; no directive, fence or table row stands in the text as it was written."
    page, seen = tab(), 0
    for name in site[1]:
        page.goto(address + name)
        boxes = page.evaluate("[...document.querySelectorAll('math')].filter(e => e.checkVisibility()).map(e => [e.getAttribute('alttext'), e.getBoundingClientRect().width, e.getBoundingClientRect().height])")
        for latex, w, h in boxes:
            assert w > 2 and h > 2, f"{name}: nothing is drawn for {latex}"
        seen += len(boxes)
        left = page.evaluate("document.querySelectorAll('span.math').length")
        assert left == 0, f"{name}: {left} pieces of maths are not typeset"
        strange = page.evaluate("[...document.querySelectorAll('math *')].filter(e => !/^(m[a-z]+|semantics|annotation)$/.test(e.localName)).map(e => e.outerHTML.slice(0, 80)).slice(0, 3)")
        assert not strange, f"{name}: in a formula: {strange}"
        raw = page.evaluate("[...document.querySelectorAll('main p, main li, main td')].filter(e => !e.closest('pre, .cell-output')).map(e => { const c = e.cloneNode(true); c.querySelectorAll('code').forEach(x => x.remove()); return c.textContent.trim(); }).filter(t => /^(\\||#\\||:::|```|> )|\\$\\$|\\*\\*/.test(t)).slice(0, 3)")
        assert not raw, f"{name}: markup in the text: {raw}"
    assert seen > 50


def test_search_finds_a_function(tab, address):
    page = tab()
    page.goto(address)
    page.locator("input[type=search], .aa-Input, #quarto-search input, input[placeholder*=Search]").first.click()
    page.keyboard.type("demo_recording", delay=20)
    hit = page.locator("a[href*='recording.html']", has_text="demo_recording").first
    hit.wait_for(state="visible", timeout=10000)
    hit.click()
    page.wait_for_url("**/recording.html*")
    assert not page.faults


def test_the_theme_can_be_changed_and_stays(tab, address):
    page = tab()
    page.goto(address)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator(".quarto-color-scheme-toggle").first.click()
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before != after
    page.goto(address + "glossary.html")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == after
