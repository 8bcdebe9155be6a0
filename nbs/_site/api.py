"""The reference: a page for each module, from its source alone. A signature is shown as the notebook has it, since the shapes stand in its comments."""
import ast
import re
import tokenize
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path

from markdown.extensions.toc import slugify, unique
from notebooks import Page, cells, fenced
from places import ROOT, relinked, target

WIDE = 100  # characters of a line of arguments


@dataclass
class Entry:
    "A public name."
    name: str
    node: ast.stmt
    cell: str  # id of the notebook's cell
    members: list["Entry"] = field(default_factory=list)


@dataclass
class Module:
    "A module of the package, read from its source."
    name: str  # e.g. fsar.methods.molo
    source: str
    notebook: str = ""  # path in the repository
    entries: list[Entry] = field(default_factory=list)

    @property
    def page(self) -> str: return f"api/{self.name.removeprefix('fsar.')}.md"


def names_of(node: ast.stmt) -> list[str]:
    "What a statement defines."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t]) if isinstance(n, ast.Name)]


def is_public(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and not node.name.startswith("_")


def read(path: Path) -> Module:
    "Return a module's public names, in the order of its notebook."
    source = path.read_text(encoding="utf-8")
    tree, name = ast.parse(source), ".".join(path.relative_to(ROOT).with_suffix("").parts)
    marks = [(i, *found) for i, line in enumerate(source.split("\n"), 1) for found in re.findall(r"^# %% \S*?(nbs/\S+) #(\w+)", line)]
    module = Module(name, source, marks[0][1] if marks else "")
    public = next((ast.literal_eval(n.value) for n in tree.body if "__all__" in names_of(n)), [])
    for node in tree.body:
        cell = ([m[2] for m in marks if m[0] <= node.lineno] or [""])[-1]
        for name in names_of(node):
            if name not in public: continue
            inside = [Entry(m.name, m, cell) for m in node.body if is_public(m)] if isinstance(node, ast.ClassDef) else []
            module.entries.append(Entry(name, node, cell, inside))
    return module


@cache
def modules() -> list[Module]:
    "All modules with public names, in the order of their notebooks."
    found = [read(p) for p in sorted((ROOT / "fsar").rglob("*.py")) if not p.name.startswith("_")]
    return sorted((m for m in found if m.entries), key=lambda m: m.notebook)


def arguments(source: str, node: ast.FunctionDef) -> tuple[list[str], str]:
    "The argument lines of a function as its source has them, and its result with the comment behind it."
    lines = source.split("\n")[node.lineno - 1:node.end_lineno]
    depth, opened = 0, None
    for token in tokenize.generate_tokens(StringIO("\n".join(lines)).readline):
        if token.type != tokenize.OP: continue
        if token.string in "([{":
            depth += 1
            opened = opened or token.end
        elif token.string in ")]}":
            depth -= 1
            if depth == 0: break
    closed, end = token.start, token.end
    inside = lines[opened[0] - 1:closed[0]]
    inside[-1] = inside[-1][:closed[1]]
    inside[0] = inside[0][opened[1]:]
    result = f"-> {ast.unparse(node.returns)}" if node.returns else ""
    row = node.returns.end_lineno - node.lineno if node.returns else end[0] - 1
    column = len(lines[row].encode()[:node.returns.end_col_offset].decode()) if node.returns else end[1]
    comment = re.fullmatch(r"\s*:\s*#\s*(.*)", lines[row][column:])
    return [line.strip() for line in inside if line.strip()], f" {result}".rstrip() + (f"  # {comment[1]}" if comment else "")


def signature(source: str, entry: Entry, name: str) -> str:
    "Name, arguments with their comments, and result; one line where it is short."
    lines, after = arguments(source, entry.node)
    if len(lines) <= 1 and "#" not in "".join(lines) and len(name + "".join(lines) + after) < WIDE: return f"{name}({''.join(lines)}){after}"
    return "\n".join([f"{name}(", *("    " + piece for line in lines for piece in broken(line)), f"){after}"])


def broken(line: str) -> list[str]:
    "A line of arguments in pieces that are not too wide, cut after commas between arguments; the comment stays with the last."
    code, mark, comment = line.partition("  # ")
    if len(code) <= WIDE: return [line]
    pieces, depth, start = [], 0, 0
    for i, letter in enumerate(code):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0: pieces.append(code[start:i + 1].strip()); start = i + 1
    pieces.append(code[start:].strip())
    rows = [""]
    for piece in filter(None, pieces):
        if rows[-1] and len(rows[-1]) + len(piece) > WIDE: rows.append("")
        rows[-1] = f"{rows[-1]} {piece}".strip()
    return [*rows[:-1], rows[-1] + mark + comment]


def lines_of(source: str, node: ast.stmt) -> list[str]:
    return source.split("\n")[node.lineno - 1:node.end_lineno]


def fields(source: str, node: ast.ClassDef) -> list[str]:
    "The annotated fields of a class as its source has them, comments included."
    found = [n for n in node.body if isinstance(n, ast.AnnAssign) or isinstance(n, ast.Assign) and not names_of(n)[0].startswith("_")]
    return [line.strip() for n in found for line in lines_of(source, n)]


def documented(node: ast.stmt, module: Module) -> str:
    "A docstring, with the module's names in it as links."
    text = (ast.get_docstring(node) or "").strip()
    known = {e.name for e in module.entries if isinstance(e.node, (ast.FunctionDef, ast.ClassDef))} - {getattr(node, "name", "")}
    return re.sub(r"`(\w+)`", lambda m: f"[`{m[1]}`](#{m[1]})" if m[1] in known else m[0], text)


def is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(d) in ("property", "cached_property", "functools.cached_property") for d in node.decorator_list)


def of_class(entry: Entry, module: Module) -> list[str]:
    "A class: how it is made, its fields, its members."
    node, source = entry.node, module.source
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    decorators = [f"@{ast.unparse(d)}" for d in node.decorator_list]
    head = f"class {entry.name}" + (f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else "")
    making = [without_self(signature(source, Entry("", init, ""), entry.name))] if init else []
    blocks = [fenced("\n".join([*decorators, head, *("    " + line for line in fields(source, node))]), "python", "signature"), documented(node, module),
              *(fenced(line, "python", "signature") for line in making)]
    for m in entry.members:
        shown = f"{m.name}{' ' + ast.unparse(m.node.returns).join(('-> ', '')) if m.node.returns else ''}  # property" if is_property(m.node) else without_self(signature(source, m, m.name))
        blocks += [f"### `{entry.name}.{m.name}` {{ #{entry.name}.{m.name} }}", fenced(shown, "python", "signature"), documented(m.node, module)]
    return blocks


def without_self(text: str) -> str:
    return re.sub(r"(\(\s*)(?:self|cls)(?:: \w+)?(?:,\s*|(?=\)))", r"\1", text, count=1)


def of_value(entry: Entry, module: Module) -> list[str]:
    "A constant or a type: its source where that is short."
    text = lines_of(module.source, entry.node)
    return [fenced("\n".join(text if len(text) <= 12 else [*text[:10], "    …"]), "python", "signature")]


@cache
def sections(notebook: str) -> dict[str, tuple[str, str]]:
    "Id of a notebook's cell → the heading it stands under and that heading's anchor on the page."
    used: set[str] = set()
    found, last = {}, ("", "")
    for cell in cells(notebook):
        if cell["cell_type"] == "markdown":
            for title in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", cell["source"], flags=re.S), re.M):
                words = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)|\$", r"\1", title).strip()
                last = words, unique(slugify(words, "-"), used)
        found[cell["id"]] = last
    return found


@cache
def summary(notebook: str) -> str:
    "The summary below a notebook's title."
    text = next(c["source"] for c in cells(notebook) if c["cell_type"] == "markdown" and c["source"].startswith("# "))
    return " ".join(line[1:].strip() for line in text.split("\n") if line.startswith(">"))


def origin(entry: Entry, module: Module) -> str:
    "A link to the section of the notebook that defines a name."
    title, anchor = sections(module.notebook)[entry.cell]
    return f"At work: [{title}]({target(module.notebook, module.page)}#{anchor})\n{{ .about }}"


def page_of(module: Module) -> Page:
    "The page of a module."
    parts = [f"# {module.name}", f"> {relinked(summary(module.notebook), module.notebook, module.page)}", f"Notebook: [{Path(module.notebook).stem}]({target(module.notebook, module.page)})\n{{ .about }}"]
    for e in module.entries:
        parts.append(f"## `{e.name}` {{ #{e.name} }}")
        if isinstance(e.node, ast.ClassDef): parts += of_class(e, module)
        elif isinstance(e.node, ast.FunctionDef): parts += [fenced(signature(module.source, e, e.name), "python", "signature"), documented(e.node, module)]
        else: parts += of_value(e, module)
        parts.append(origin(e, module))
    return Page(module.page, "\n\n".join(filter(None, parts)) + "\n")


def overview() -> Page:
    "All modules with what they are for."
    rows = [f"| [{m.name}]({m.page.removeprefix('api/')}) | {relinked(summary(m.notebook), m.notebook, 'api/index.md').replace('|', chr(92) + '|')} | [{Path(m.notebook).stem}]({target(m.notebook, 'api/index.md')}) |" for m in modules()]
    text = ("# API\n\n> Every public name of the package, with its types; shapes stand in the comments, in einops letters.\n\n`E` episodes, `V` videos, `N` ways, `K` shots, `Q` queries, `S` supports, "
            "`T` frames, `C` channels, `H W` pixels. Each name links to the section of the notebook that defines it and shows it at work.\n\n| module | what it holds | notebook |\n|---|---|---|\n")
    return Page("api/index.md", text + "\n".join(rows) + "\n")
