"""What mkdocs calls while it builds: the site's pages come from the notebooks, its reference from the package, its reports from `reports/`. Nothing is kept twice."""
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one

import api
import formulas
import notebooks
from mkdocs.structure.files import File, Files
from places import ROOT, TEXTS, at_home, between, report_files, report_notebooks, relinked, settings
from places import notebooks as sources

GUIDES = ["own_data", "choose", "write_a_method", "reproduce", "cluster", "numbers", "interactive"]
WINGS = {"00_core": "Core", "10_data": "Data", "20_backbones": "Backbones", "30_model": "Model", "50_engine": "Engine", "60_reports": "Reports",
         "70_experiments": "Experiments", "80_predict": "Predict", "90_bench": "Benchmark", "99_cli": "Command line"}  # the methods have a tab of their own

WIDE = "---\nhide: [toc]\n---\n"  # a page that needs the width


def on_config(config: Any) -> Any:
    "What settings.ini says, and the order of the pages."
    own = settings()
    config["site_name"], config["site_description"], config["site_author"] = own["title"], own["description"], own["author"]
    config["site_url"], config["repo_url"], config["repo_name"] = f"{own['doc_host']}{own['doc_baseurl']}/", own["git_url"], f"{own['user']}/{own['repo']}"
    config["copyright"], config["edit_uri"] = f"{own['copyright']}. Licence: Apache-2.0.", None
    config["nav"] = navigation()
    return config


def navigation() -> list[dict[str, Any]]:
    "Return the order of the pages. A new notebook finds its place by its wing and its number."
    pages = {source: source.replace(".ipynb", ".md") for source in sources()}
    tutorials = {Path(s).stem: page for s, page in pages.items() if "/tutorials/" in s}
    wing = {folder: [page for s, page in pages.items() if f"nbs/{folder}/" in s] for folder in [*WINGS, "40_methods"]}
    wing["10_data"].append(TEXTS["data_splits/README.md"])
    reports = [{Path(folder).name: f"{folder}/index.md"} for folder in report_notebooks()]
    return [
        {"Start": ["index.md", tutorials["start"]]},
        {"Guides": [*[tutorials[n] for n in GUIDES if n in tutorials], TEXTS["CONTRIBUTING.md"], TEXTS["CHANGELOG.md"]]},
        {"Methods": wing["40_methods"]},
        {"Library": [{name: wing[folder]} for folder, name in WINGS.items()]},
        {"API": ["api/index.md", *({m.name: m.page} for m in api.modules())]},
        {"Reports": [TEXTS["reports/README.md"], *reports]},
    ]


def pages() -> list[notebooks.Page]:
    "All pages of the site."
    found = [notebooks.page_of("nbs/index.ipynb", "index.md"), api.overview(), *map(api.page_of, api.modules())]
    found += [with_source(notebooks.page_of(s, s.replace(".ipynb", ".md"), below_title="" if "tutorials/" in s else about(s)), s) for s in sources()]
    found += [notebooks.page_of(s, f"{folder}/index.md", inputs=False, below_title=about_report(folder, s)) for folder, s in report_notebooks().items()]
    return found + [text_page(s) for s in TEXTS if s.endswith(".md") and s != "README.md"]


def text_page(source: str) -> notebooks.Page:
    "The page of a text that is Markdown already. In the table of reports the notebook is the page itself."
    text = (ROOT / source).read_text(encoding="utf-8")
    return notebooks.Page(TEXTS[source], WIDE * (source == "reports/README.md") + relinked(re.sub(r", \[notebook\]\([^)]*\)", "", text), source, TEXTS[source]))


def about(source: str) -> str:
    "Where a notebook lies, what it makes, and where its code can be seen in one piece."
    page, module = source.replace(".ipynb", ".md"), next((m for m in api.modules() if m.notebook == source), None)
    made = [f"the cells with a bar are the module [{module.name}]({between(page, module.page)})"] if module else []
    return ", ".join([f"[{Path(source).name}]({at_home(source)})", *made]) + "\n{ .about }"


def with_source(page: notebooks.Page, source: str) -> notebooks.Page:
    "A tutorial's page with its notebook beside the link to Colab."
    page.text = re.sub(r"^\[Open in Colab\]\(\S+\)$", lambda found: f"{found[0]}, [{Path(source).name}]({at_home(source)})\n{{ .about }}", page.text, count=1, flags=re.M)
    return page


def about_report(folder: str, source: str) -> str:
    "The files of a report."
    taken = {Path(f).name for f in report_files() if f.startswith(f"{folder}/")}
    said = {"report.html": " as the command wrote it", "metrics.json": "", "results.csv": ""}
    return ", ".join([*(f"[{name}]({name}){words}" for name, words in said.items() if name in taken), f"[{Path(source).name}]({at_home(source)})"]) + "\n{ .about }"


def on_files(files: Files, config: Any) -> Files:
    "Everything that the site is made of, without a copy on the disk."
    for page in pages():
        files.append(File.generated(config, page.path, content=page.text))
        for path, content in page.files.items(): files.append(File.generated(config, path, content=content))
    for path in report_files(): files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_content(html: str, **_: Any) -> str:
    return formulas.drawn(html)
