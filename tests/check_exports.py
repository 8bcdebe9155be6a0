"""Notebooks and package in step: exporting and cleaning the notebooks must change nothing. Works on a copy, so it never touches the checkout."""
import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from readme import readme

ROOT = Path(__file__).parent.parent


def copy_of_checkout(folder: Path) -> Path:
    "The notebooks, the package and their configuration, copied."
    for name in ("settings.ini", "pyproject.toml", "setup.py", "README.md"):
        if (ROOT / name).exists(): shutil.copy(ROOT / name, folder / name)
    for name in ("nbs", "fsar"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return folder


def relative_files(folder: Path, pattern: str) -> set[Path]:
    return {p.relative_to(folder) for p in folder.rglob(pattern) if ".ipynb_checkpoints" not in p.parts}


def cells_without_id(folder: Path) -> list[str]:
    "Notebooks that hold a cell without an id: their export is not stable."
    notebooks = {p: json.loads((folder / p).read_text(encoding="utf-8")) for p in sorted(relative_files(folder, "*.ipynb"))}
    return [f"nbs/{p}" for p, notebook in notebooks.items() if any("id" not in cell for cell in notebook["cells"])]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        copy = copy_of_checkout(Path(temporary))
        for tool in ("nbdev-export", "nbdev-clean"):
            subprocess.run([str(Path(sys.executable).parent / tool)], cwd=copy, check=True)
        wrong = [f"{p}: the notebook has a cell without an id" for p in cells_without_id(ROOT / "nbs")]
        for folder, pattern in (("fsar", "*.py"), ("nbs", "*.ipynb")):
            ours, fresh = relative_files(ROOT / folder, pattern), relative_files(copy / folder, pattern)
            for p in sorted(ours | fresh):
                if p not in ours or p not in fresh or not filecmp.cmp(ROOT / folder / p, copy / folder / p, shallow=False):
                    wrong.append(f"{folder}/{p}: not what its notebook exports (run nbdev-export, then nbdev-clean)")
        if (ROOT / "README.md").read_text(encoding="utf-8") != readme(): wrong.append("README.md: not what nbs/index.ipynb gives (run make readme)")
        if wrong: sys.exit("out of step:\n  " + "\n  ".join(wrong))
    print("in step: nbdev-export and nbdev-clean change nothing, README.md is the index")


if __name__ == "__main__": main()
