"""A notebook with its stored outputs as a page in Markdown and its pictures as files. Markdown, so that the strict build checks every link and anchor of it."""
import json
import re
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from places import ROOT, relinked

PICTURES = {"image/png": "png", "image/jpeg": "jpg"}
Cell = dict[str, Any]


@dataclass
class Page:
    "A page of the site."
    path: str  # as .md
    text: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # path → content


def joined(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def cells(path: str) -> list[Cell]:
    "A notebook's cells, sources and tags in one form."
    found = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": joined(cell["source"]), "tags": cell["metadata"].get("tags", [])} for cell in found]


def headings(path: str) -> Iterator[tuple[Cell, str]]:
    "Every cell with the last heading at or above it; a heading inside a cell counts for what follows it."
    last = ""
    for cell in cells(path):
        yield cell, last
        if cell["cell_type"] == "markdown": last = (re.findall(r"^#+ (.+)$", cell["source"], re.M) or [last])[-1]


def fenced(text: str, *classes: str) -> str:
    "A block of code or output; its fence is longer than any inside."
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{{ {' '.join('.' + c for c in classes)} }}\n{text.rstrip()}\n{fence}"


def code(cell: Cell) -> str:
    "A code cell's input without the directives for nbdev; empty where there is nothing to read."
    lines = cell["source"].split("\n")
    words = {word for line in lines if line.startswith("#|") for word in line.split()[1:2]}
    text = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
    if not text or "hide" in words or "hide-input" in cell["tags"]: return ""
    return fenced(text, "python", *(["exported"] if words & {"export", "exporti"} else []))


def table(html: str) -> str:
    "HTML of an output; tables lose their own looks."
    html = re.sub(r"<style.*?</style>", "", html, flags=re.S)
    html = re.sub(r"<thead>(\s|</?tr[^>]*>|<th[^>]*>\s*</th>)*</thead>", "", html)  # a heading without a word
    return unbroken(re.sub(r' (border="\d+"|class="dataframe")', "", html).strip())


def unbroken(text: str) -> str:
    "A number stays on one line with its interval and its unit."
    return re.sub(r"(?<=\d) (?=[±%])|(?<=±) (?=\d)", "\N{NO-BREAK SPACE}", text)


def shown(context: str) -> str:
    "What a picture without a caption shows, from the words before it: the first sentence."
    plain = re.sub(r"[`*$]|\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"^(#.*|```.*?```|\|.*|>.*)$", "", context, flags=re.M | re.S if "```" in context else re.M))
    words = re.split(r"(?<=[.:!?])\s", " ".join(plain.split()))[0]
    return words.rstrip(":")


def output(out: dict[str, Any], name: str, alt: str, page: Page, source: str) -> str:
    "One output in Markdown: the richest of its forms that a page can hold. What goes to stderr is for whoever runs the notebook."
    if out["output_type"] == "stream": return "" if out["name"] == "stderr" else fenced(plain(joined(out["text"])), "text", "output")
    if out["output_type"] == "error": return fenced(plain("\n".join(out["traceback"])), "text", "output")
    data = out["data"]
    if kind := next((k for k in PICTURES if k in data), None):
        about = out.get("metadata", {}).get(kind, {})
        file, folder = f"{name}.{PICTURES[kind]}", page.path.removesuffix(".md")
        page.files[f"{folder}/{file}"] = b64decode(joined(data[kind]))
        text = re.sub(r"[\[\]\n]", " ", about.get("alt") or alt)
        return f"![{text}]({folder.split('/')[-1]}/{file}){{ loading=lazy {'width=' + str(about['width']) if 'width' in about else ''}}}"
    if "text/markdown" in data: return relinked(unbroken(joined(data["text/markdown"])), source, page.path)
    if "text/html" in data: return table(joined(data["text/html"]))
    return fenced(plain(joined(data.get("text/plain", ""))), "text", "output")


def plain(text: str) -> str:
    "Without the colours of a terminal."
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def page_of(source: str,  # path of the notebook in the repository
            path: str,  # of its page, as .md
            *, inputs: bool = True,  # show code
            below_title: str = "",  # Markdown that follows title and summary
            ) -> Page:
    "The page of a notebook. Cells tagged `template` are for the machinery that runs it."
    page, parts, context = Page(path), [], ""
    for cell, heading in headings(source):
        if "template" in cell["tags"]: continue
        if cell["cell_type"] == "markdown":
            context = cell["source"]
            parts.append(relinked(re.sub(r"^\$\$.*?\$\$$", r"\n\g<0>\n", context, flags=re.M | re.S), source, path))  # a formula on lines of its own is a paragraph
        elif cell["cell_type"] == "code":
            if inputs: parts.append(code(cell))
            alt = ": ".join(filter(None, (heading, shown(context)))) or path
            outputs = [] if "#| hide\n" in cell["source"] + "\n" else cell["outputs"]
            parts += [output(out, f"{cell['id']}-{k}", alt, page, source) for k, out in enumerate(outputs)]
    page.text = opened("\n\n".join(filter(None, parts)) + "\n", below_title)
    return page


def opened(text: str, line: str) -> str:
    "A page with a line put below its title and its one-line summary."
    before, title, summary, rest = re.match(r"(.*?)(^# [^\n]*\n+)((?:>[^\n]*\n*)*)(.*)", text, re.S | re.M).groups()
    return "\n\n".join(filter(None, (before.strip(), title.strip(), summary.strip(), line, rest)))
