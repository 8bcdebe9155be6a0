"""The site: built without a warning, every link and anchor leads somewhere, nothing is asked of another place; and how the tutorials open."""
import ast
import configparser
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))


@pytest.fixture(scope="session")
def settings() -> dict[str, str]:
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini")
    return dict(parser["DEFAULT"])


# --- how the tutorials open

def sources(notebook: Path, kind: str) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


@pytest.fixture(params=TUTORIALS, ids=lambda p: p.stem)
def tutorial(request) -> Path: return request.param


def test_a_tutorial_opens_with_a_link_to_colab_that_the_settings_name(tutorial, settings):
    address = f"https://colab.research.google.com/github/{settings['git_url'].removeprefix('https://github.com/')}/blob/{settings['branch']}/nbs/tutorials/{tutorial.name}"
    title, summary, link = sources(tutorial, "markdown")[0].split("\n\n")[:3]
    assert title.startswith("# ") and summary.startswith("> ") and link == f"[Open in Colab]({address})"


def opening(tutorial: Path, monkeypatch, installed: bool) -> list[str]:
    "What the first code cell of a tutorial gives to pip, run by IPython with fsar there or not."
    from IPython.core.interactiveshell import InteractiveShell
    shell, given = InteractiveShell(), []
    shell.register_magic_function(given.append, "line", "pip")
    if not installed: monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fsar" else pytest.fail(name))
    shell.run_cell(sources(tutorial, "code")[0], store_history=False).raise_error()
    return given


def test_its_first_cell_installs_the_package_where_it_is_missing(tutorial, settings, monkeypatch):
    assert opening(tutorial, monkeypatch, installed=False) == [f"install --quiet git+{settings['git_url']}"]


def test_its_first_cell_does_nothing_where_the_package_is_installed(tutorial, monkeypatch):
    assert opening(tutorial, monkeypatch, installed=True) == []


def test_every_other_download_of_a_tutorial_stands_behind_a_question(tutorial, settings):
    "A line that leaves the machine is inside an `if`, and asks the repository of the settings only."
    for line in "\n".join(sources(tutorial, "code")).split("\n"):
        if re.match(r"\s*[!%](pip|git|wget|curl)", line): assert line.startswith("    ") and settings["git_url"] in line


# --- the site

@dataclass
class Page(HTMLParser):
    "What a page links to, asks for and shows."
    path: Path
    links: list[str] = field(default_factory=list)  # places to go
    parts: list[str] = field(default_factory=list)  # scripts, styles, fonts, pictures that it loads
    anchors: set[str] = field(default_factory=set)
    pictures: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.text = self.path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes) -> None:
        a = {k: v or "" for k, v in attributes}
        self.anchors |= {a[k] for k in ("id", "name") if k in a}
        if tag == "a" and "href" in a: self.links.append(a["href"])
        if tag == "link" and a.get("rel") not in ("canonical", "prev", "next"): self.parts.append(a["href"])
        if tag in ("script", "img", "iframe", "source", "video", "embed") and a.get("src"): self.parts.append(a["src"])
        if tag == "img": self.pictures.append(a)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("material", reason='the site needs its extra: pip install "fsar[docs]"')
    pytest.importorskip("latex2mathml", reason='the site needs its extra: pip install "fsar[docs]"')
    folder = tmp_path_factory.mktemp("docs") / "site"
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # nothing from the network
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "nbs/_site/mkdocs.yml", "--site-dir", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def pages(site) -> dict[Path, Page]:
    found = {p: Page(p) for p in sorted(site.rglob("*.html"))}
    assert len(found) > 100
    return found


def test_every_notebook_tutorial_module_and_report_has_a_page(site):
    for notebook in [*(ROOT / "nbs").glob("[0-9]*/*.ipynb"), *TUTORIALS]: assert (site / notebook.relative_to(ROOT).with_suffix(".html")).is_file(), notebook
    for metrics in (ROOT / "reports").glob("*/metrics.json"):
        folder = site / "reports" / metrics.parent.name
        assert (folder / "index.html").is_file() and (folder / "report.html").read_bytes() == (metrics.parent / "report.html").read_bytes()
    assert (site / "index.html").is_file() and (site / "contributing.html").is_file() and (site / "data_splits.html").is_file()


def test_every_link_and_anchor_leads_somewhere(site, pages, settings):
    base, lost = f"{settings['doc_baseurl']}/", []
    for path, page in pages.items():
        for link in {*page.links, *page.parts}:
            parts = urlsplit(unescape(link))
            if parts.scheme or parts.netloc or link.startswith(("data:", "javascript:")): continue
            place = unquote(parts.path)
            file = site / place.removeprefix(base) if place.startswith("/") else (path.parent / place if place else path)   # the page of errors knows no folder
            file = (file / "index.html" if file.is_dir() else file).resolve()
            if not file.is_file() or parts.fragment and file.suffix == ".html" and unquote(parts.fragment) not in pages[file].anchors: lost.append(f"{path.relative_to(site)}: {link}")
    assert not lost


def test_links_to_the_repository_name_files_that_are_there(pages, settings):
    address = re.compile(re.escape(settings["git_url"]) + r"/(blob|tree)/" + settings["branch"] + r"/([^#]+)")
    named = {found[2] for page in pages.values() for link in page.links if (found := address.fullmatch(link))}
    assert len(named) > 50 and not [path for path in named if not (ROOT / unquote(path)).exists()]


def test_nothing_is_asked_of_another_place(site, pages):
    asked = {(str(p.relative_to(site)), part) for p, page in pages.items() for part in page.parts if urlsplit(part).scheme not in ("", "data") or part.startswith("//")}
    assert not asked
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", text), style
    for page in pages.values():  # what the theme's script does for these, it asks of GitHub and of a script's host
        assert 'data-md-component="source"' not in page.text and 'class="mermaid"' not in page.text


def test_every_picture_has_words(pages):
    silent = [f"{p.name}: {a.get('src', '')[:60]}" for p, page in pages.items() if p.name != "report.html" for a in page.pictures if len(a.get("alt", "")) < 8]
    assert sum(len(page.pictures) for page in pages.values()) > 100 and not silent


def test_formulas_are_drawn_without_a_script(site, pages):
    assert "<math" in (site / "nbs" / "40_methods" / "otam.html").read_text(encoding="utf-8")
    for path, page in pages.items():
        outside = re.sub(r"<(code|pre|script)[\s>].*?</\1>", "", page.text, flags=re.S)
        assert "arithmatex" not in page.text and not re.search(r"\\\(|\\\[|\$\$", outside), path


def test_the_search_knows_pages_and_names(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    assert any(d["location"] == "api/model.matching.html#frame_similarity" for d in index) and any(d["location"].startswith("nbs/tutorials/start.html") for d in index)
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = ")
    assert 'src="iframe-worker.js"' in (site / "index.html").read_text(encoding="utf-8") and (site / "iframe-worker.js").is_file()   # searches without a server


def test_a_reports_page_shows_its_numbers(site):
    for file in (ROOT / "reports").glob("*/metrics.json"):
        metrics, text = json.loads(file.read_text()), (site / "reports" / file.parent.name / "index.html").read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
        for r in metrics.get("results", []): assert f"{100 * r['accuracy']:.1f} ± {100 * r['ci95']:.1f} %" in text


# --- the reference

def plain(html: str) -> str: return unescape(re.sub(r"<[^>]+>", "", html))


def test_the_reference_has_every_public_name_with_its_arguments(site):
    checked = 0
    for file in sorted((ROOT / "fsar").rglob("*.py")):
        if file.name.startswith("_"): continue
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        module, page = importlib.import_module(name), (site / "api" / f"{name.removeprefix('fsar.')}.html").read_text(encoding="utf-8")
        names = {n.id for s in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(s, ast.Assign) for t in s.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        for public in module.__all__:
            value = getattr(module, public)
            mine = getattr(value, "__module__", name) == name or public in names
            if not mine: continue
            anchor = re.search(rf'id="({public})"', page)
            assert anchor, f"{name}.{public}"
            if not inspect.isfunction(value): continue
            section = plain(page.split(anchor[0], 1)[1].split("<h2", 1)[0])
            wanted = list(inspect.signature(value).parameters)
            places = [re.search(rf"(?<!\w){p}\b", section[section.index("(") :]) for p in wanted]
            assert all(places), f"{name}.{public}: {wanted}"
            checked += 1
    assert checked > 300


def test_the_reference_keeps_shapes_and_links_to_where_a_name_is_shown(site):
    page = (site / "api" / "model.matching.html").read_text(encoding="utf-8")
    section = page.split('id="frame_similarity"', 1)[1].split("<h2", 1)[0]
    shown = " ".join(plain(section).split())
    assert "query: Tensor, # (..., Q, Tq, C) support: Tensor, # (..., S, Ts, C) eps: float = 0.0, # added to |x||y|; released code: 0.01 ) -> Tensor # (..., Q, S, Tq, Ts)" in shown
    assert "Return the cosine similarity of all pairs of frames" in shown and 'href="../nbs/30_model/00_matching.html#frame-similarity"' in section
    members = (site / "api" / "model.base.html").read_text(encoding="utf-8")
    assert 'id="FewShotModel.embed"' in members and 'id="FewShotModel.score"' in members and "self" not in plain(members.split('id="FewShotModel.embed"', 1)[1].split("<h", 1)[0])
