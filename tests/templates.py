"The parameters cells of the templates follow from dataclasses: check them, or write them with --write."
import dataclasses
import sys
import typing
from pathlib import Path

import nbformat

import fsar.bench.benchmark  # each of these registers its reports
import fsar.bench.sizes
import fsar.experiments.claims
import fsar.experiments.recordings
import fsar.experiments.runs  # noqa: F401
from fsar.cli.experiments import Compare, Study
from fsar.cli.flags import Where
from fsar.core.config import Config
from fsar.core.files import resource
from fsar.experiments.rows import BY_ROW
from fsar.experiments.studies import STUDIES, base_of
from fsar.reports.notebooks import REPORTS, parameters_cell, setting


def flags_of(command: type, *names: str) -> type:
    "Return some flags of a command as a dataclass with help texts."
    kinds, noted = typing.get_type_hints(command), typing.get_type_hints(command, include_extras=True)
    defaults = {field.name: field.default for field in dataclasses.fields(command)}
    fields = []
    for name in names or defaults:
        help = next(about.help for about in noted[name].__metadata__ if getattr(about, "help", None))
        fields.append((name, kinds[name], setting(defaults[name], help)))
    return dataclasses.make_dataclass(command.__name__, fields)


def comparison_cell(command: type, base: Config, own: typing.Mapping[str, typing.Any] = {}, **defaults: typing.Any) -> str:
    "Return the cell of a comparison: what its rows share, then the flags of its command."
    parts = [parameters_cell(Config, base.to_dict(), without=BY_ROW),
             parameters_cell(flags_of(command, "runs", "seeds", "reference"), defaults),
             parameters_cell(flags_of(Where)),
             parameters_cell(flags_of(command, "overwrite"))]
    if own: parts.append(parameters_cell(flags_of(command, *own), own))
    return "\n".join(parts)


def cells() -> dict[str, str]:
    "Return the text of each template's parameters cell."
    found = {"train": parameters_cell(Config), "compare": comparison_cell(Compare, Config(out="reports/methods"))}
    for name, study in STUDIES.items():
        found[name] = comparison_cell(Study, base_of(name), study.own, reference=study.reference)
    for kind, report in REPORTS.items():
        own = report(out="").parameters()
        hidden = [field.name for field in dataclasses.fields(report) if field.name not in own]
        found[kind] = parameters_cell(report, without=hidden)
    return found


def cell_of(path: Path) -> tuple[nbformat.NotebookNode, nbformat.NotebookNode]:
    "Return a template and its parameters cell."
    notebook = nbformat.read(path, 4)
    return notebook, next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))


def main(write: bool) -> int:
    "Check or write all cells; return 1 if any is out of date."
    outdated = []
    for name, text in cells().items():
        path = resource("templates") / f"{name}.ipynb"
        notebook, cell = cell_of(path)
        if cell.source == text: continue
        outdated.append(name)
        if not write: continue
        cell.source = text
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    if outdated: print(f"parameters cells {'written' if write else 'out of date (python tests/templates.py --write)'}: {', '.join(outdated)}")
    return 1 if outdated and not write else 0


if __name__ == "__main__": sys.exit(main("--write" in sys.argv))
