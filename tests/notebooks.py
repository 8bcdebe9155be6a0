"""Run every notebook in a kernel of its own, as a reader would, two at a time: `python tests/notebooks.py [NOTEBOOK …]`. Nothing is written into the notebooks.

nbdev-test runs cells outside the main thread and several notebooks in one process. Ours need both: they interrupt themselves, start other processes, and register methods."""
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
WORKERS, TIMEOUT = 2, 600  # notebooks at a time; seconds for a cell


def notebooks() -> list[Path]:
    "Return the notebooks of the wings, the guides and the index; templates need parameters and run in the tests of reports."
    nbs = ROOT / "nbs"
    return [*sorted(nbs.glob("[0-9]*/*.ipynb")), *sorted((nbs / "tutorials").glob("*.ipynb")), nbs / "index.ipynb"]


def run(path: Path) -> tuple[str, float, str]:
    "Return a notebook's name, its seconds, and what went wrong (nothing if it ran)."
    started, error = time.monotonic(), ""
    notebook = nbformat.read(path, 4)
    try: NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    except CellExecutionError as e: error = str(e)
    except Exception as e: error = f"{type(e).__name__}: {e}"  # a dead kernel, a cell that ran out of time
    return path.relative_to(ROOT).as_posix(), time.monotonic() - started, error


def main(names: list[str]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "FSAR_QUIET": "1"}
    paths = [Path(name).resolve() for name in names] or notebooks()
    failed, total = [], 0.0
    with ThreadPoolExecutor(WORKERS) as pool:
        for name, seconds, error in pool.map(run, paths):
            total += seconds
            print(f"{seconds:6.1f} s  {name}{'  FAILED' if error else ''}", flush=True)
            if error: failed.append(f"{name}\n{error}")
    if failed: sys.exit("\n\n".join(failed))
    print(f"{len(paths)} notebooks ran, {total:.0f} seconds of {WORKERS} at a time")


if __name__ == "__main__": main(sys.argv[1:])
