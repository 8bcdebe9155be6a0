"The parameters cells of the templates are those that the dataclasses give, and papermill finds every one of them."
import sys
from pathlib import Path

import papermill
import pytest

from fsar.core.files import resource
from fsar.reports.notebooks import REPORTS

sys.path.insert(0, str(Path(__file__).parents[1]))
import templates  # noqa: E402

CELLS = templates.cells()


def test_every_template_has_a_source():
    there = {path.stem for path in resource("templates").glob("*.ipynb")}
    assert set(CELLS) <= there and set(REPORTS) <= set(CELLS)


@pytest.mark.parametrize("name", sorted(CELLS))
def test_a_parameters_cell_is_up_to_date(name):
    cell = templates.cell_of(resource("templates") / f"{name}.ipynb")[1]
    assert cell.source == CELLS[name], "run: python tests/templates.py --write"


@pytest.mark.parametrize("name", sorted(CELLS))
def test_papermill_finds_every_parameter_with_its_default(name):
    values: dict = {}
    exec(CELLS[name], values)
    found = papermill.inspect_notebook(str(resource("templates") / f"{name}.ipynb"))
    assert {key: eval(about["default"]) for key, about in found.items()} == {key: values[key] for key in values["__annotations__"]}
    assert all(about["inferred_type_name"] != "None" for about in found.values())


def test_outdated_cells_are_named_and_written(tmp_path, monkeypatch, capsys):
    source = resource("templates") / "claims.ipynb"
    old = source.read_text(encoding="utf-8").replace("settings of the misalignment dial", "an old text")
    (tmp_path / "claims.ipynb").write_text(old, encoding="utf-8")
    monkeypatch.setattr(templates, "resource", lambda name: tmp_path)
    monkeypatch.setattr(templates, "cells", lambda: {"claims": CELLS["claims"]})
    assert templates.main(write=False) == 1 and "out of date" in capsys.readouterr().out
    assert templates.main(write=True) == 0 and templates.main(write=False) == 0
    assert (tmp_path / "claims.ipynb").read_text(encoding="utf-8") == source.read_text(encoding="utf-8")
