"""The docs site without Quarto, and the README: nbdev's processed notebooks through smalldocs.

    docs.py build [FOLDER]   build the site (default _docs) and check every link and anchor
    docs.py preview          build, then serve it on this machine
    docs.py readme           write README.md from nbs/index.ipynb
"""
import argparse
import ast
import fnmatch
import functools
import html
import http.server
import json
import os
import posixpath
import re
import shutil
import sys
import urllib.parse
import warnings
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
NUMBER = re.compile(r"^\d+[a-zA-Z0-9]*_")  # what nbdev drops from a notebook's name
FENCE = re.compile(r"^\s*(```|~~~)")


class BadDocs(Exception):
    "What is wrong with the site, one line each."


def page_name(path):
    "A notebook's page: nbdev drops the number, `01_recording.ipynb` is `recording.ipynb`."
    return path.with_name(NUMBER.sub("", path.name)) if path.suffix == ".ipynb" else path


# ------------------------------------------------------------------ before the renderer: the sources


def outside_code(text, change):
    "Change Markdown, but not what stands in fenced code."
    out, block, fenced = [], [], False
    def flush():
        if block:
            out.append(change("\n".join(block)))
            block.clear()
    for line in text.split("\n"):
        if FENCE.match(line):
            flush() if not fenced else None
            fenced = not fenced
            out.append(line)
        elif fenced:
            out.append(line)
        else:
            block.append(line)
    flush()
    return "\n".join(out)


def fix_links(text):
    "Links to a notebook name its page; a figure's reference is a link to it; no source links (there is no public repository)."
    text = re.sub(r"\[source\]\([^)]*\)(\{[^}]*\})?\n*", "", text)
    text = re.sub(r"(\]\()([^)\s]*?)([^/)\s]+\.ipynb)", lambda m: m[1] + m[2] + NUMBER.sub("", m[3]), text)
    return re.sub(r"(?<![\w`/.])@((?:fig|tbl|sec|eq)-[\w-]+)", lambda m: f"[{m[1].split('-', 1)[1].replace('-', ' ')}](#{m[1]})", text)


def joined(source):
    "A cell's text as one string."
    return "".join(source) if isinstance(source, list) else source


@functools.cache
def heads():
    "How classes that show as `*args, **kwargs` are written, by name: a named tuple with its fields and their comments, others with their bases."
    found = {}
    for path in sorted((ROOT / "spike_ppl").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                bases = ", ".join(ast.unparse(b) for b in node.bases)
                head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
                rows = [row for n in node.body if isinstance(n, ast.AnnAssign) for row in lines[n.lineno - 1:n.end_lineno]] if "NamedTuple" in head else []
                found[node.name] = "\n".join([head, *rows])
    return found


def complete(text):
    "An API block that says what a class is, and no types that nobody wrote: that of a default None is not the parameter's."
    text = re.sub(r"def (\w+)\(\n\s*\*args, \*\*kwargs\n\):", lambda m: heads().get(m[1], m[0]), text)
    return text.replace(":NoneType=None", "=None")


def stage_notebook(src, dst):
    "Write one processed notebook as smalldocs needs it."
    nb = json.loads(src.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        text = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            text = "\n".join(line for line in text.split("\n") if not line.startswith("#|"))
            text = outside_code(text, fix_links)
        elif cell["cell_type"] == "code":
            for out in cell.get("outputs", []):
                data = out.get("data", {})
                if "text/markdown" in data:
                    data["text/markdown"] = complete(outside_code(joined(data["text/markdown"]), fix_links)).replace("__main__.", "")  # where a cell ran says nothing
            text = re.sub(r"^((?:#\|[^\n]*\n)*)\n+", r"\1", text)  # where a magic stood
        cell["source"] = text.lstrip("\n")
    dst.parent.mkdir(parents=True, exist_ok=True)
    dst.write_text(json.dumps(nb, ensure_ascii=False), encoding="utf-8")


def known_pages(items, have):
    "The sidebar's entries whose source exists, by the names of the pages."
    out = []
    for item in items:
        if isinstance(item, str):
            page = page_name(Path(item)).as_posix()
            if page in have:
                out.append(page)
        elif isinstance(item, dict) and "auto" in item:  # in their section, not in one of their own
            out += sorted(page for page in have if fnmatch.fnmatch(page, item["auto"]))
        elif isinstance(item, dict):
            item = dict(item)
            if "contents" in item:
                item["contents"] = known_pages(item["contents"], have)
                if not item["contents"]:
                    continue
            if item.get("href"):
                page = page_name(Path(item["href"])).as_posix()
                if page.endswith((".ipynb", ".md")) and page not in have:
                    continue
                item["href"] = page
            out.append(item)
    return out


def only_definitions(cell):
    "Whether a cell can run without the example cells around it: exported code, imports alone, `show_doc`."
    if cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"} or "show_doc(" in cell.source:
        return True
    return all(isinstance(s, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Pass)) for s in cell.parsed_())


def stage(folder):
    "Process the notebooks with nbdev, then lay them out in `folder` as smalldocs reads them."
    os.chdir(ROOT)
    os.environ["IN_TEST"] = "1"  # the last cell of a notebook exports nothing
    from nbdev import processors
    from nbdev.serve_drv import exec_nb

    runs = processors._do_eval
    processors._do_eval = lambda cell: runs(cell) and only_definitions(cell)
    warnings.filterwarnings("ignore", message="Found cells containing imports")
    shutil.rmtree(folder, ignore_errors=True)
    wrong = []
    for src in sorted(NBS.rglob("*.ipynb")):
        name = src.relative_to(NBS)
        if any(p.startswith((".", "_")) for p in name.parts):
            continue
        made = folder / page_name(name)
        made.parent.mkdir(parents=True, exist_ok=True)
        try:
            exec_nb(src, made, processors.FilterDefaults)
        except Exception as e:  # a cell that does not run: say which, and go on with the other pages
            wrong.append(f"{name.as_posix()}: {' '.join(str(e).split())[-400:]}")
            made.unlink(missing_ok=True)
            continue
        stage_notebook(made, made)
    for src in sorted(NBS.rglob("*")):  # pictures, style sheets, Markdown
        name = src.relative_to(NBS)
        if src.is_file() and src.suffix != ".ipynb" and not any(p.startswith((".", "_")) for p in name.parts) and src.suffix != ".tmp":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(src, folder / name)
    llms = folder / "llms.txt"  # not a page: its links are not the renderer's business
    llms.write_text(re.sub(r"(?<=[\w)])\.ipynb(?=[)#])", ".html", fix_links(llms.read_text(encoding="utf-8"))), encoding="utf-8")
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    have = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in (".ipynb", ".md")}
    site = config["website"]
    for side in ("left", "right"):
        if side in site["navbar"]:
            site["navbar"][side] = known_pages(site["navbar"][side], have)
    site["sidebar"]["contents"] = known_pages(site["sidebar"]["contents"], have)
    config["format"]["html"].pop("html-math-method", None)  # done below
    (folder / "_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return wrong


# ------------------------------------------------------------------ after the renderer: the pages


MATH = re.compile(r'<span class="math (inline|display)">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</span>', re.S)
CDN = re.compile(r'<(?:link|script)\b[^>]*(?:href|src)="https?://[^"]*"[^>]*>(?:</script>)?')


def spaced(made):
    "The small spaces around log and exp, none inside bars, and primes of full size, as TeX sets them and the converter does not."
    thin, things = '<mspace width="0.167em"/>', "(?:i|n|sub|sup|subsup|row|style|frac|over)"
    made = re.sub(rf"(</m{things}>|&#x00029;</mo>)(?=(?:<msub>)?<mi>(?:log|exp)</mi>)", rf"\1{thin}", made)
    made = re.sub(rf"((?<!<msub>)<mi>(?:log|exp)</mi>|<msub><mi>log</mi><mn>\w+</mn></msub>)(?=<m{things}>|<mo>&#x0007C;)", rf"\1{thin}", made)
    made = re.sub(r"<msup>(<mi[^>]*>[^<]*</mi>)<mi>(&#x0203[2-4];)</mi></msup>", r'<mrow>\1<mo lspace="0" rspace="0">\2</mo></mrow>', made)
    return made.replace("<mo>&#x0007C;</mo>", '<mo lspace="0" rspace="0">&#x0007C;</mo>')


def mathml(page, text, wrong):
    "Typeset LaTeX as MathML, which browsers read without any script or network."
    from latex2mathml.converter import convert

    def one(m):
        latex = html.unescape(m[2]).strip()
        plain = re.sub(r"\\(arg|Pr)\b", r"\\operatorname{\1}", latex)  # what the converter does not know
        plain = re.sub(r"\\[bB]igg?[lr]?\s*(\\[lr]angle)", r"\1", plain)
        plain = re.sub(r"\\(begin|end)\{aligned\}", r"\\\1{align*}", plain)
        plain = re.sub(r"\\(?:text|mathrm|operatorname)\{[^{}]*\}", lambda n: n[0].replace("<", "\ue000").replace(">", "\ue001").replace("&", "\ue002"), plain)  # it escapes nothing
        try:
            made = convert(plain, display="block" if m[1] == "display" else "inline")
        except Exception as e:
            wrong.append(f"{page}: maths that cannot be typeset ({type(e).__name__}): {latex[:80]}")
            return m[0]
        made = made.replace("<mi>&#x0007E;</mi>", '<mo form="infix">&#x0223C;</mo>')  # "is distributed as" is a relation
        made = re.sub(r'<mrow>((?:<mi mathvariant="normal">\w</mi>){2,})</mrow>', lambda n: f"<mi>{re.sub('<[^>]*>', '', n[1])}</mi>", made)  # one word
        made = spaced(made)
        for mark, sign in (("\ue000", "&lt;"), ("\ue001", "&gt;"), ("\ue002", "&amp;")):
            made = made.replace(mark, sign)
        left = re.findall(r"<m\w+[^>]*>(\\[a-zA-Z]+|&)</m\w+>", made)
        if left:
            wrong.append(f"{page}: maths with unknown commands {', '.join(sorted(set(left)))}: {latex[:80]}")
        return made.replace("<math", f'<math alttext="{html.escape(latex, quote=True)}"', 1)
    return MATH.sub(one, text)


class Links(HTMLParser):
    "The links, anchors, pictures and outside resources of a page."

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.no_alt, self.outside, self.raw, self.code = set(), [], 0, [], [], 0

    def handle_data(self, data):
        if not self.code:
            self.raw += re.findall(r"\]\([^)\s]*(?:\.ipynb|\.html|#)[^)\s]*\)", data)

    def handle_endtag(self, tag):
        self.code -= tag in ("code", "pre", "script", "style")

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.code += tag in ("code", "pre", "script", "style")
        if a.get("id"):
            self.ids.add(a["id"])
        if tag == "a" and a.get("name"):
            self.ids.add(a["name"])
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "img" and not (a.get("alt") or "").strip():
            self.no_alt += 1
        url = a.get("src") or (a.get("href") if tag == "link" else None)
        if url and not url.startswith("data:"):
            (self.outside if re.match(r"(https?:)?//", url) else self.links).append(url)


def check_links(site):
    "Every internal link and anchor that leads nowhere, every picture without alternative text, everything from another host."
    pages = {}
    for f in sorted(site.rglob("*.html")):
        p = Links()
        p.feed(f.read_text(encoding="utf-8"))
        pages[f.relative_to(site).as_posix()] = p
    wrong = []
    for name, p in pages.items():
        wrong += [f"{name}: needs the network: {u}" for u in p.outside]
        wrong += [f"{name}: a link that is not one (backticks inside a link's text?): {r}" for r in p.raw]
        if p.no_alt:
            wrong.append(f"{name}: {p.no_alt} picture(s) without alternative text")
        for href in sorted(set(p.links)):
            if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", href):
                continue
            path, _, anchor = href.partition("#")
            path = urllib.parse.unquote(path.partition("?")[0])
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            if (site / target).is_dir():
                target = posixpath.normpath(posixpath.join(target, "index.html"))
            if not (site / target).is_file():
                wrong.append(f"{name}: broken link {href}")
            elif anchor and target in pages and urllib.parse.unquote(anchor) not in pages[target].ids:
                wrong.append(f"{name}: broken anchor {href}")
    return wrong


def loosen(site):
    "Names in backticks link to their API block; those that have none (private names, methods) link to their page."
    from importlib import import_module

    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    index = import_module(f"{cfg['DEFAULT']['lib_name']}._modidx").d["syms"]
    symbols = {link for names in index.values() for link, _ in names.values()}
    text = {f.relative_to(site).as_posix(): f.read_text(encoding="utf-8") for f in sorted(site.rglob("*.html"))}
    absent = {s for s in symbols if s.partition("#")[0] in text and f'id="{s.partition("#")[2]}"' not in text[s.partition("#")[0]]}
    for name, page in text.items():
        def one(m):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), m[1]))
            return f'href="{m[1]}"' if f"{target}#{m[2]}" in absent else m[0]
        (site / name).write_text(re.sub(r'href="([^"#:]+)#([^"]+)"', one, page), encoding="utf-8")


def build(out):
    "Build the site into a folder and check it; raises `BadDocs` with everything that is wrong."
    import ziamath
    from smalldocs.config import load
    from smalldocs.site import Site

    folder = ROOT / "_proc" / "site"
    wrong = stage(folder)
    site = Site(load(folder), quiet=True)
    n = site.build()
    # what the renderer does not read but nbdev writes, and the links that are checked below
    wrong += [w for w in site.warnings if "output-file is not read" not in w and "broken link" not in w]
    for f in sorted(site.out.rglob("*.html")):
        name = f.relative_to(site.out).as_posix()
        f.write_text(CDN.sub("", mathml(name, f.read_text(encoding="utf-8"), wrong)), encoding="utf-8")
    for f in site.out.rglob("*.css"):  # themes fetch their fonts; the system's serve as well
        text = f.read_text(encoding="utf-8")
        f.write_text(re.sub(r"@import\s+url\(['\"]?https?://[^)]*\);?", "", text), encoding="utf-8")
    font = next(Path(ziamath.__file__).parent.glob("fonts/STIXTwoMath*.ttf"))
    shutil.copy(font, site.out / "site_libs" / "stix-two-math.ttf")
    loosen(site.out)
    wrong += check_links(site.out)
    if out.exists():
        shutil.rmtree(out)
    shutil.move(site.out, out)
    print(f"  {n} pages in {os.path.relpath(out, ROOT)}")
    if wrong:
        raise BadDocs("\n".join(f"  {w}" for w in sorted(set(wrong))))


# ------------------------------------------------------------------ README and preview


def readme():
    "README.md as nbs/index.ipynb gives it: the Markdown cells, the code that is shown, and what it printed."
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    out = ["<!-- made from nbs/index.ipynb by `make readme`; edit that -->"]
    for cell in json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))["cells"]:
        text = joined(cell["source"]).strip()
        flags = [line[2:].strip() for line in text.split("\n") if line.startswith("#|")]
        hidden = {"hide"} if cell["cell_type"] == "markdown" else {"hide", "default_exp", "export"}
        if any(f.split(":")[0].strip() in hidden for f in flags) or not text:
            continue
        body = "\n".join(line for line in text.split("\n") if not line.startswith("#|")).strip()
        if cell["cell_type"] == "markdown":
            body = outside_code(body, lambda t: re.sub(r"\]\((?![a-z]+:|#|/)([^)\s]+)\)", r"](nbs/\1)", t))
            out.append(body)
        elif cell["cell_type"] == "code" and body and "echo: false" not in flags:
            out.append(f"```python\n{body}\n```")
            for o in cell.get("outputs", []):
                shown = joined(o.get("text", "")) if o["output_type"] == "stream" else joined(o.get("data", {}).get("text/plain", ""))
                if shown.strip() and not any(m.startswith("image/") for m in o.get("data", {})):
                    out.append("```text\n" + shown.strip("\n") + "\n```")
    return "\n\n".join(out) + "\n"


def preview(out, port=4200):
    "Build (showing what is wrong), then serve the site on this machine until Ctrl-C."
    try:
        build(out)
    except BadDocs as e:
        print(e, file=sys.stderr)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(out))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"the site is at http://127.0.0.1:{port}/ (Ctrl-C stops it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


def main():
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "preview", "readme"])
    parser.add_argument("folder", nargs="?", default=ROOT / "_docs", type=Path)
    args = parser.parse_args()
    if args.what == "readme":
        (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    elif args.what == "preview":
        preview(args.folder.resolve())
    else:
        try:
            build(args.folder.resolve())
        except BadDocs as e:
            print(f"the site has these faults:\n{e}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
