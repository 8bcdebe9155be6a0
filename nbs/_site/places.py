"""Map the repository to the site. A page keeps the path of its source: nbs/40_methods/molo.ipynb becomes nbs/40_methods/molo.html."""
import posixpath
import re
from configparser import ConfigParser
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXTS = {"README.md": "index.md", "nbs/index.ipynb": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "data_splits/README.md": "data_splits.md", "reports/README.md": "reports/index.md"}
CARRIED = ("report.html", "metrics.json", "results.csv")  # files that the site copies from a report's folder, next to its figures


@cache
def settings() -> dict[str, str]:
    "The one place where the metadata stands."
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def at_home(path: str) -> str:
    "The address of a file or folder of the repository at its host."
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{settings()['git_url']}/{kind}/{settings()['branch']}/{path}"


def notebooks() -> list[str]:
    "The library's notebooks, then the tutorials; by path in the repository."
    found = [*sorted((ROOT / "nbs").glob("[0-9]*/*.ipynb")), *sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))]
    return [p.relative_to(ROOT).as_posix() for p in found]


def report_notebooks() -> dict[str, str]:
    "Folder of every report → its notebook."
    found = sorted((ROOT / "reports").glob("*/*.ipynb"))
    return {p.parent.relative_to(ROOT).as_posix(): p.relative_to(ROOT).as_posix() for p in found}


def report_files() -> list[str]:
    "What the site takes over from the reports as it is."
    folders = [ROOT / folder for folder in report_notebooks()]
    found = [p for folder in folders for p in (*(folder / name for name in CARRIED), *sorted((folder / "figures").glob("*.png"))) if p.is_file()]
    return [p.relative_to(ROOT).as_posix() for p in found]


@cache
def places() -> dict[str, str]:
    "Path in the repository → path of the page (as .md) or file on the site."
    pages = {path: path.removesuffix(".ipynb") + ".md" for path in notebooks()}
    reports = {path: f"{folder}/index.md" for folder, notebook in report_notebooks().items() for path in (notebook, f"{folder}/report.html", folder)}
    return TEXTS | pages | {path: path for path in report_files()} | reports


def between(page: str, other: str) -> str:
    "The link from a page to another, both as .md."
    return posixpath.relpath(other, posixpath.dirname(page) or ".")


def target(path: str,  # of a file or folder, in the repository
           page: str,  # path of the page that links to it, as .md
           ) -> str:
    "A link from a page to a file of the repository: to its page where it has one, else to the repository's host."
    there = places().get(path)
    return between(page, there) if there else at_home(path)


LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])([^()\s#]+)(#[^()\s]*)?(?=\))")


def relinked(text: str,  # Markdown
             source: str,  # where it stands in the repository
             page: str) -> str:
    "Relative links of a text, made to fit its page. What is no file of the repository stays as it is, and the strict build refuses it."
    def moved(found: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        return target(path, page) + (found[2] or "") if (ROOT / path).exists() else found[0]
    return LINK.sub(moved, text)
