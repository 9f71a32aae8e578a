"""The rules of the house: what holds for the repository as a whole."""
import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import docs
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NUMBERED = re.compile(r"^(\d+[a-z]?)_(\w+)$")


def text(cell):
    "A cell's source."
    return "".join(cell["source"])


def requirements(settings):
    "Every requirement of settings.ini, extras too."
    return [Requirement(r) for key in settings if key.endswith("requirements") for r in settings[key].split()]


def tracked(root):
    "The files that git keeps, or would keep."
    out = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True).stdout
    return [root / line for line in out.splitlines() if (root / line).is_file() and not (root / line).is_symlink()]


def test_metadata_stands_once_or_agrees(root, settings):
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["project"]["name"] == settings["lib_name"]
    assert project["project"]["description"] == settings["description"]
    assert set(project["project"]) == {"name", "description", "dynamic"}, "everything else belongs in settings.ini"
    assert project["tool"]["nbdev"]["lib_path"] == settings["lib_name"]
    init = (root / settings["lib_name"] / "__init__.py").read_text()
    assert re.search(r'^__version__ = "(.+)"$', init, re.M)[1] == settings["version"]
    assert (root / ".python-version").read_text().strip() == settings["min_python"]
    citation = (root / "CITATION.cff").read_text()
    assert f"version: {settings['version']}\n" in citation and f"name: {settings['author']}\n" in citation
    assert f"license: {settings['license_name']}\n" in citation
    assert f"\n## {settings['version']} " in (root / "CHANGELOG.md").read_text()


def test_installed_metadata_is_that_of_settings(settings):
    from importlib.metadata import distribution

    dist = distribution(settings["lib_name"])
    assert dist.version == settings["version"]
    assert dist.metadata["Author"] == settings["author"]
    runtime = {canonicalize_name(Requirement(r).name) for r in dist.requires if "extra ==" not in r}
    assert runtime == {canonicalize_name(Requirement(r).name) for r in settings["requirements"].split()}
    assert any(e.name == "spike-ppl" and e.group == "console_scripts" for e in dist.entry_points)


def test_constraints_satisfy_settings(root, settings):
    lines = (root / "constraints.txt").read_text().splitlines()
    assert not any("://" in line or " @ " in line for line in lines), "constraints.txt names versions, never addresses"
    locked = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    assert all(len(list(r.specifier)) == 1 and next(iter(r.specifier)).operator == "==" for r in locked)
    for python in ("3.12", "3.13"):
        env = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux", "extra": ""}
        pins = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in locked if not r.marker or r.marker.evaluate(env)}
        for want in requirements(settings):
            if want.marker and not want.marker.evaluate(env):
                continue
            have = pins.get(canonicalize_name(want.name))
            assert have, f"{want.name} is not in constraints.txt: run `make lock`"
            assert have in want.specifier, f"{want.name} {have} is locked, settings.ini wants {want.specifier}: run `make lock`"


def test_every_room_has_a_title_and_a_subtitle(notebooks):
    assert notebooks
    for path, nb in notebooks.items():
        first = text(nb["cells"][0])
        assert nb["cells"][0]["cell_type"] == "markdown" and first.startswith("# "), f"{path}: the first cell is an H1 title"
        assert re.search(r"^> \S", first, re.M), f"{path}: a one-line `>` subtitle follows the title"
        others = [c for c in nb["cells"][1:] if c["cell_type"] == "markdown" and re.search(r"^# \S", docs_text(text(c)), re.M)]
        assert not others, f"{path}: one H1 in a notebook, also: {text(others[0])[:60]!r}"


def docs_text(markdown):
    "Markdown without fenced code, where # starts a comment."
    return re.sub(r"^```.*?^```", "", markdown, flags=re.S | re.M)


def test_imports_have_their_own_cells(notebooks):
    "The site's build runs every cell with an import in it (not the hidden one that exports)."
    wrong = []
    for path, nb in notebooks.items():
        for i, cell in enumerate(nb["cells"]):
            if cell["cell_type"] != "code" or "nbdev_export()" in text(cell):
                continue
            code = ast.parse("".join("\n" if line.startswith(("%", "!")) else line for line in text(cell).splitlines(keepends=True)))
            kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in code.body}
            if len(kinds) > 1:
                wrong.append(f"{path}, cell {i}")
    assert not wrong, "imports and other statements in one cell: " + "; ".join(wrong)


def test_cells_say_to_quarto_what_it_reads(notebooks):
    "Options of cells are YAML, and a cell that draws has alternative text."
    import yaml

    wrong = []
    for path, nb in notebooks.items():
        for i, cell in enumerate(nb["cells"]):
            lines = [line[2:].strip() for line in text(cell).splitlines() if line.startswith("#|") and ":" in line] if cell["cell_type"] == "code" else []
            try:
                options = {k: v for line in lines for k, v in yaml.safe_load(line).items()}
            except yaml.YAMLError:
                wrong.append(f"{path}, cell {i}: not YAML (quote a text with a colon): {lines}")
                continue
            if any(kind.startswith("image/") for out in cell.get("outputs", []) for kind in out.get("data", {})) and not options.get("fig-alt"):
                wrong.append(f"{path}, cell {i}: a picture without `#| fig-alt:`")
    assert not wrong, "\n".join(wrong)


def modules(notebooks):
    "Each exported module: its notebook's number (with its letter, if it has one) and path."
    found = {}
    for path, nb in notebooks.items():
        for cell in nb["cells"]:
            m = re.search(r"^#\|\s*default_exp\s+(\S+)", text(cell), re.M)
            if m and cell["cell_type"] == "code":
                number = NUMBERED.match(path.stem)
                assert number, f"{path}: a notebook that exports has a number"
                assert number[2] == m[1], f"{path}: the module is named as the notebook, not {m[1]}"
                found[m[1]] = (number[1], path)
    return found


def test_no_room_without_a_name(root, notebooks, settings):
    rooms = modules(notebooks)
    assert rooms
    assert not {"utils", "util", "helpers", "core", "common", "misc"} & set(rooms)
    numbers = [n for n, _ in rooms.values()]
    assert len(set(numbers)) == len(numbers), "two notebooks with one number"
    files = {p.stem for p in (root / settings["lib_name"]).glob("*.py") if not p.name.startswith("_")}
    assert files == set(rooms), "spike_ppl/ holds exactly what the notebooks export"


def test_data_flow_forward(root, notebooks, settings):
    "A chapter's code imports only from chapters before it."
    lib, rooms = settings["lib_name"], modules(notebooks)
    seen = 0
    for name, (number, _) in rooms.items():
        for node in ast.walk(ast.parse((root / lib / f"{name}.py").read_text())):
            wanted = []
            if isinstance(node, ast.Import):
                wanted = [a.name.split(".")[1] for a in node.names if a.name.startswith(f"{lib}.")]
            elif isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").split(".")[0] == lib):
                inner = node.module if node.level == 1 else ".".join((node.module or "").split(".")[1:])
                wanted = [inner.split(".")[0]] if inner else [a.name for a in node.names]
            for other in wanted:
                if other in rooms:
                    seen += 1
                    assert rooms[other][0] < number, f"{name} ({number}) imports {other} ({rooms[other][0]}): data flow forward only (line {node.lineno})"
    assert seen, "the chapters import one another"


def test_no_chapter_uses_the_inside_of_another(root, notebooks, settings):
    "What another chapter needs has a public name."
    lib, rooms = settings["lib_name"], modules(notebooks)
    for name in rooms:
        for node in ast.walk(ast.parse((root / lib / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").split(".")[0] == lib):
                inside = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
                assert not inside, f"{name} imports {', '.join(inside)} from {node.module} (line {node.lineno}): give it a public name, or do without"


def test_what_is_imported_is_required(root, settings):
    "A package that the code imports is in settings.ini: always, or in an extra when it is imported inside a function."
    from importlib.metadata import packages_distributions

    owners, lib = packages_distributions(), settings["lib_name"]
    always = {canonicalize_name(Requirement(r).name) for r in settings["requirements"].split()}
    extra = {canonicalize_name(r.name) for r in requirements(settings)}
    wrong = []
    for f in sorted((root / lib).glob("*.py")):
        tree = ast.parse(f.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {lib}:
                allowed = always if node in tree.body else extra
                if not {canonicalize_name(d) for d in owners.get(name, [name])} & allowed:
                    wrong.append(f"{f.name}:{node.lineno}: {name}")
    assert not wrong, "not in settings.ini: " + ", ".join(wrong)


MACHINE = re.compile(r"/work/|/root/|/tmp/bash_jobs|/home/[a-z]|\.pyenv/versions/\d|artifactory|files\.pythonhosted|pypi\.org|registry\.npmjs|deb\.debian")
PATTERNS_ARE_HERE = {"tests/test_house.py"}


def test_no_machine_in_the_files(root):
    "No path of the machine that made a file, and no registry's host, stands in it."
    wrong = []
    for f in tracked(root):
        name = f.relative_to(root).as_posix()
        if name in PATTERNS_ARE_HERE or f.suffix in {".png", ".npy", ".npz", ".ttf"}:
            continue
        for n, line in enumerate(f.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > 20000:  # a picture in a notebook
                continue
            m = MACHINE.search(line)
            if m:
                wrong.append(f"{name}:{n}: {line[max(0, m.start() - 30):m.end() + 30].strip()}")
    assert not wrong, "\n".join(wrong)


def test_top_level_is_tidy(root):
    allowed = {"nbs", "spike_ppl", "settings.ini", "setup.py", "_quarto.yml", "README.md", "pyproject.toml", "Makefile", "LICENSE",
               "CHANGELOG.md", "CITATION.cff", ".ci", ".gitignore", ".python-version", "constraints.txt", "tests"}
    have = {f.relative_to(root).parts[0] for f in tracked(root)}
    assert have <= allowed, f"not at the top level: {sorted(have - allowed)}"
    assert (root / "nbs/_quarto.yml").is_symlink() and (root / "nbs/_quarto.yml").resolve() == root / "_quarto.yml"


def test_readme_is_made_from_the_index(root):
    assert (root / "README.md").read_text(encoding="utf-8") == docs.readme(), "run `make readme`"


def test_sidebar_lists_every_page_once(root, notebooks):
    import yaml

    def walk(items):
        for item in items:
            if isinstance(item, str):
                yield item
            else:
                yield from [item["href"]] if "href" in item else []
                yield from sorted(p.relative_to(root / "nbs").as_posix() for p in (root / "nbs").glob(item["auto"])) if "auto" in item else []
                yield from walk(item.get("contents", []))
    listed = [p for p in walk(yaml.safe_load((root / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]) if p.endswith(".ipynb")]
    assert len(set(listed)) == len(listed)
    missing = {p.as_posix() for p in notebooks} - set(listed)
    assert not missing, f"pages that the sidebar of _quarto.yml does not list: {sorted(missing)}"
    chapters = [p for p in listed if NUMBERED.match(Path(p).stem) and "/" not in p]
    assert chapters == sorted(chapters), "reading order is dependency order"


def test_bibliography_is_the_page(root, notebooks):
    "references.bib and the page of references name the same works."
    page = " ".join("\n".join(text(c) for c in notebooks[Path("references.ipynb")]["cells"]).replace("\n  ", " ").split())
    works = re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", (root / "nbs/references.bib").read_text(encoding="utf-8"), re.S | re.M)
    assert len(works) == len(re.findall(r"\(\d{4}\)\. ", page)) and len({k for k, _ in works}) == len(works)
    for key, fields in works:
        title, year = re.search(r"title = \{\{(.+)\}\}", fields)[1], re.search(r"year = \{(\d+)\}", fields)[1]
        assert f"({year}). {title}." in page, f"{key} is in references.bib but not on the page with this title and year"


def test_help_is_quick(root, notebooks):
    "`spike-ppl --help` does not load PyMC (3 to 5 s)."
    if "sort" not in modules(notebooks):
        pytest.skip("the chapter 13_sort is not there yet")
    code = "import sys; sys.argv = ['spike-ppl', '--help']\nfrom spike_ppl.sort import main\ntry: main()\nexcept SystemExit as e: assert not e.code\n" \
           "heavy = sorted({'pymc', 'pytensor', 'torch', 'jax'} & set(sys.modules)); assert not heavy, heavy"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert r.returncode == 0, r.stderr[-2000:]
    assert "sort" in r.stdout and "demo" in r.stdout
