"""The public interface: what `from fsar import …` promises, lazily and with types."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fsar

ROOT = Path(__file__).parent.parent
INIT = ast.parse((ROOT / "fsar" / "__init__.py").read_text(encoding="utf-8"))


def typed_homes() -> dict[str, str]:
    "Return what the face imports for type checkers, as name → module:name."
    block = next(n for n in INIT.body if isinstance(n, ast.If))
    return {a.asname: f"fsar.{n.module}:{a.name}" for n in block.body for a in n.names}


def test_the_face_is_small_and_its_two_lists_agree():
    assert 10 <= len(fsar.__all__) <= 18 and len(set(fsar.__all__)) == len(fsar.__all__)
    assert set(fsar.__all__) == set(fsar._HOMES) == set(typed_homes())
    assert typed_homes() == fsar._HOMES


@pytest.mark.parametrize("name", fsar.__all__)
def test_every_name_is_there_and_documented(name):
    value = getattr(fsar, name)
    assert value is getattr(fsar, name)
    if name != "METHODS": assert (value.__doc__ or "").strip()


def test_methods_are_all_registered_when_the_registry_is_asked_for():
    code = "import fsar; print(len(fsar.METHODS))"
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) >= 9


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="its public names are FewShotRecognizer"): fsar.recogniser  # noqa: B018
    assert "create_model" in dir(fsar)


def test_import_fsar_does_not_load_torch():
    code = "import sys, fsar; fsar.Config; fsar.FsarError; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def snippets() -> dict[str, str]:
    "Return the Python of the README and of each tutorial, as programs."
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    programs = {f"README {i}": block for i, block in enumerate(readme)}
    for path in sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb")):
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        code = ["".join(c["source"]) for c in cells]
        programs[path.stem] = "\n".join(re.sub(r"^(\s*)[%!].*$", r"\1pass", c, flags=re.M) for c in code)
    return programs


def test_what_users_read_imports_from_the_face():
    "The README and the guides use public names wherever there is one."
    for where, program in snippets().items():
        for module, names in re.findall(r"^\s*from (fsar\.[\w.]+) import (.+)$", program, re.M):
            for name in names.split(","):
                full = f"{module}:{name.split('#')[0].split(' as ')[0].strip()}"
                assert full not in fsar._HOMES.values(), f"{where}: {full} is public, import it from fsar"


def test_types_of_what_users_read(tmp_path):
    "mypy --strict is content with the README's Python and the tutorials'."
    pytest.importorskip("mypy")
    folder = tmp_path / "programs"
    folder.mkdir()
    for i, program in enumerate(snippets().values()): (folder / f"program_{i}.py").write_text(program, encoding="utf-8")
    strict = ["--strict", "--ignore-missing-imports", "--follow-imports=silent", "--no-warn-unused-ignores", "--cache-dir", str(tmp_path / "cache")]
    loose = ["--allow-untyped-defs", "--allow-untyped-calls", "--allow-incomplete-defs", "--allow-any-generics"]  # notebooks leave their own functions untyped
    found = subprocess.run([sys.executable, "-m", "mypy", *strict, *loose, "--config-file", "", *map(str, sorted(folder.glob("*.py")))], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout[-4000:]
