"""The wheel, used outside the checkout: code, types, split lists, templates, the console script; and the repository's own order."""
import ast
import configparser
import importlib
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


WINGS = ("core", "data", "backbones", "model", "methods", "engine", "reports", "experiments", "predict", "bench", "cli")  # in the order of dependency


def imported(file: Path) -> set[str]:
    "Return the modules of fsar that a file imports anywhere in it, as paths below the package: model.base, data."
    found, package = set(), file.relative_to(ROOT / "fsar").parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found |= {a.name.removeprefix("fsar.") for a in node.names if a.name.startswith("fsar.")}
        if not isinstance(node, ast.ImportFrom): continue
        if not node.level and (node.module or "").split(".")[0] != "fsar": continue
        start = package[:len(package) - node.level + 1] if node.level else ()
        base = ".".join([*start, *(node.module or "").removeprefix("fsar").strip(".").split(".")]).strip(".")
        found |= {base} if "." in base else {f"{base}.{a.name}".strip(".") for a in node.names}
    return found


def modules() -> dict[str, set[str]]:
    "Return each module of the wings with the modules it imports."
    files = [p for wing in WINGS for p in sorted((ROOT / "fsar" / wing).glob("*.py")) if p.name != "__init__.py"]
    return {".".join(p.relative_to(ROOT / "fsar").with_suffix("").parts): imported(p) for p in files}


def test_the_package_is_its_wings():
    assert {p.name for p in (ROOT / "fsar").iterdir() if p.is_dir() and p.name != "__pycache__"} == set(WINGS)
    assert {p.stem for p in (ROOT / "fsar").glob("*.py")} == {"__init__", "__main__", "_modidx"}
    folders = sorted(p.name for p in (ROOT / "nbs").glob("[0-9]*"))
    assert [name.split("_", 1)[1] for name in folders] == list(WINGS)
    assert {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and p.name != "__pycache__"} <= set(WINGS)


def test_a_wing_imports_only_wings_before_it():
    place = {wing: i for i, wing in enumerate(WINGS)}
    found = modules()
    wrong = [f"{name} imports {other}" for name, others in found.items() for other in others if place.get(other.split(".")[0], -1) > place[name.split(".")[0]]]
    assert len(found) > 60 and not wrong


def test_no_module_imports_itself_by_a_detour():
    found, done = modules(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name in done: return
        for other in found.get(name, ()): visit(other, (*path, name))
        done.add(name)

    for name in found: visit(name, ())


def test_inside_a_wing_a_notebook_imports_lower_numbers():
    for wing in WINGS:
        order = {}
        for notebook in sorted((ROOT / "nbs").glob(f"[0-9]*_{wing}/[0-9]*.ipynb")):
            text = notebook.read_text(encoding="utf-8")
            order[re.search(r"#\| default_exp (\S+?)[\\\"]", text)[1]] = len(order)
        for name, place in order.items():
            wrong = [other for other in modules()[name] if order.get(other, -1) >= place]
            assert not wrong, f"{name} imports {wrong}"


def test_every_module_opens_with_a_sentence():
    for name in modules():
        text = ast.get_docstring(ast.parse((ROOT / "fsar" / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")))
        assert text and text.endswith((".", "?", ")")) and "TODO" not in text, f"{name}: {text}"


def test_names_in_strings_can_be_imported():
    "`module:function` and `fsar.module.name` in strings, which no import checks."
    for file in [*(ROOT / "fsar").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        if file.name == "_modidx.py": continue
        for module, name in re.findall(r"""["'](fsar(?:\.\w+)+):(\w+)["']""", file.read_text(encoding="utf-8")):
            assert hasattr(importlib.import_module(module), name), f"{file.name}: {module}:{name}"


def test_nbdev_and_setup_read_the_same_settings():
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini")
    nbdev = re.search(r"\[tool\.nbdev\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    own = dict(re.findall(r"^(\w+) = (.+?)(?:\s+#.*)?$", nbdev, re.M))
    plain = {key: re.sub(r'[\[\]"]', "", value).replace("true", "True").replace("false", "False") for key, value in own.items()}
    shared = set(plain) & set(parser["DEFAULT"])
    assert len(shared) >= 10 and not {key: (plain[key], parser["DEFAULT"][key]) for key in shared if plain[key] != parser["DEFAULT"][key]}


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
