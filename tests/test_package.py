"""The wheel, used outside the checkout: code, types, split lists, templates, the console script; and the repository's own order."""
import ast
import configparser
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building writes beside the sources
    subprocess.run(["git", "-C", str(ROOT), "checkout-index", "--all", "--prefix", f"{source}/"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run_python(code: str, site: Path, cwd: Path) -> str:
    "Run code against the unpacked wheel, from a folder that is no checkout."
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env={**os.environ, "PYTHONPATH": str(site)}, check=True, capture_output=True, text=True).stdout


def test_wheel_finds_its_split_lists_and_templates(installed, tmp_path):
    code = """
import fsar, json
from fsar.core.files import resource
from fsar.data.splits import BENCHMARKS, load_split
print(json.dumps([fsar.__file__, str(resource("data_splits")), sorted(p.name for p in resource("templates").iterdir()),
                  {b: len(load_split(b, "test").videos) for b in BENCHMARKS}]))"""
    package, lists, templates, tests = json.loads(run_python(code, installed, tmp_path))
    assert Path(package).is_relative_to(installed) and Path(lists).is_relative_to(installed) and {"train.ipynb", "published.csv"} <= set(templates)
    assert tests == {"kinetics100": 2400, "kinetics100_molo": 2400, "ssv2_full": 2857, "ssv2_small": 2400, "ucf101": 2745, "hmdb51": 1292}


def test_wheel_carries_a_trained_model(installed, tmp_path):
    code = "from fsar.predict.hub import load_pretrained, shipped; print(*map(str, shipped().values())); print(load_pretrained('molo-motions-mini').model.config['method'])"
    places, method = run_python(code, installed, tmp_path).splitlines()
    assert Path(places).is_relative_to(installed) and method == "molo"
    assert "Provides-Extra: hub" in (next(installed.glob("fsar-*.dist-info")) / "METADATA").read_text()


def test_wheel_carries_types_licence_and_console_script(installed):
    assert (installed / "fsar" / "py.typed").exists() and not (installed / "tests").exists()
    info = next(installed.glob("fsar-*.dist-info"))
    assert "fsar = fsar.cli.main:main" in (info / "entry_points.txt").read_text()
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata and "Provides-Extra: dev" in metadata
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.M)
    assert {"torch", "torchvision", "papermill", "einops", "seaborn", "decord"} <= set(required) and not {"nbdev", "pytest"} & set(required)


def test_readme_python_runs_as_it_stands(installed, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    ends = {"logits": "assert logits.shape == (3, 2)", "answer": "assert answer.label == 'roll_left'"}  # what a block's last name must hold
    for block in blocks: run_python(block + "\n" + next(check for name, check in ends.items() if f"{name} =" in block), installed, tmp_path)


def test_help_does_not_import_torch():
    code = "import sys; sys.argv = ['fsar', '--help']\nfrom fsar.cli.main import main\ntry: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules, file=sys.stderr)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.strip() == "False"


def test_a_notebook_imports_only_lower_numbers():
    order = {}
    for notebook in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        source = ["".join(c["source"]) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
        name = next(re.search(r"#\| default_exp (\S+)", s)[1] for s in source if "default_exp" in s)
        exported = "\n".join(s for s in source if s.startswith("#| export"))
        order[name] = (notebook.name, {m for m in re.findall(r"^\s*from fsar\.([\w.]+) import", exported, re.M)})
    place = {name: i for i, name in enumerate(order)}
    wrong = [f"{file} imports fsar.{other}" for name, (file, imports) in order.items() for other in imports if place.get(other, -1) >= place[name]]
    assert len(order) > 15 and not wrong


def test_a_name_with_an_underscore_stays_in_its_module():
    nodes = {file.name: ast.walk(ast.parse(file.read_text(encoding="utf-8"))) for file in (ROOT / "fsar").rglob("*.py")}
    assert not [f"{file}: {a.name}" for file, found in nodes.items() for node in found if isinstance(node, ast.ImportFrom) and node.level for a in node.names if re.match("_[a-z]", a.name)]


def test_every_runtime_import_is_a_declared_requirement():
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini")
    declared = {re.match(r"[\w-]+", r)[0] for r in (parser["DEFAULT"]["requirements"] + " " + parser["DEFAULT"]["conditional_requirements"]).split() if r[0].isalpha()}
    known = {"PIL": "pillow", "IPython": "ipykernel", "matplotlib": "seaborn", "nbformat": "papermill", "nbclient": "papermill", "jupyter_client": "ipykernel", "traitlets": "ipykernel", "psutil": "accelerate"}
    optional = {"tensorboard", "pyarrow", "webdataset", "ray", "huggingface_hub", "ipywidgets", "gradio"}  # used where they are installed: a log, formats to compare the store with and Parquet, clusters, the hub, panels, the page
    missing = set()
    for file in (ROOT / "fsar").rglob("*.py"):
        if file.name == "_modidx.py": continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"fsar"} - optional:
                if known.get(top, top) not in declared: missing.add(f"{file.name}: {top}")
    assert not missing


def test_nothing_speaks_of_a_machine_of_ours():
    files = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout.split("\n")
    found = [f for f in files if f.endswith((".py", ".ipynb", ".md", ".ini", ".toml", ".json", ".cff")) and (ROOT / f).is_file()
             and re.search(r"/root/|/home/\w|/work/", (ROOT / f).read_text(encoding="utf-8"))]
    assert found in ([], ["tests/test_package.py"])
