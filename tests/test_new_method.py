"""A new method is one notebook: nothing outside of it names the method, and the tests over the registry include it."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "nbs" / "tutorials" / "write_a_method.ipynb"
IMPORTS = """from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fsar.backbones.base import Backbone
from fsar.model.base import METHODS, FewShotModel
from fsar.model.blocks import class_mean
from fsar.model.cost import Cost
from fsar.model.embedding import Embedding"""


def notebook() -> dict:
    "Return the notebook that the guide tells people to make: its class, its first cells, nothing else."
    cells = json.loads(TUTORIAL.read_text(encoding="utf-8"))["cells"]
    method = next("".join(c["source"]) for c in cells if '@METHODS.register("rankpool")' in "".join(c["source"]))
    sources = [("code", "#| default_exp methods.rankpool"), ("markdown", "# Rank pooling\n\n> Mean and drift of the frame features (after Bilen et al., CVPR 2016, §2)."),
               ("code", f"#| export\n{IMPORTS}"), ("code", f"#| export\n{method}")]
    made = [{"cell_type": kind, "id": f"{i:08x}", "metadata": {}, "source": text} | ({"outputs": [], "execution_count": None} if kind == "code" else {}) for i, (kind, text) in enumerate(sources)]
    return {"cells": made, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "A copy of the checkout with one notebook more, exported."
    folder = tmp_path_factory.mktemp("copy") / "fsar"
    folder.mkdir()
    for name in ("settings.ini", "pyproject.toml", "setup.py"): shutil.copy(ROOT / name, folder)
    for name in ("nbs", "fsar", "tests", "data_splits"): shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    (folder / "nbs" / "40_methods" / "rankpool.ipynb").write_text(json.dumps(notebook()), encoding="utf-8")
    run(folder, str(Path(sys.executable).parent / "nbdev-export"))
    return folder


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(words, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_the_registry_knows_it(copy):
    code = "import fsar; m = fsar.create_model('rankpool', backbone='resnet_micro', options=['order=2']); print(m.order, m.config['method'])"
    assert run(copy, sys.executable, "-c", code).split() == ["2.0", "rankpool"]


def test_the_tests_over_all_methods_include_it(copy):
    text = run(copy, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/methods/test_methods.py", "-k", "rankpool")
    assert int(text.split(" passed")[0].split()[-1]) >= 10


def test_its_operations_are_recorded_when_they_are_first_seen(copy):
    budgets = copy / "tests" / "bench" / "operations.json"
    assert "rankpool" not in budgets.read_text()
    run(copy, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/bench/test_operations.py", "-k", "rankpool or every")
    assert "rankpool" in budgets.read_text()


def test_nothing_else_had_to_change(copy):
    "What differs from the checkout: the notebook, what is exported from it, and the recorded operations."
    files = [p for folder in ("nbs", "fsar", "tests") for p in (copy / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    names = [p.relative_to(copy) for p in files]
    changed = {name.as_posix() for name in names if not (ROOT / name).is_file() or (ROOT / name).read_bytes() != (copy / name).read_bytes()}
    assert changed == {"nbs/40_methods/rankpool.ipynb", "fsar/methods/rankpool.py", "fsar/_modidx.py", "tests/bench/operations.json"}
