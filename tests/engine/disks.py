"A file system that is full after a few bytes, or read-only."
import contextlib
import subprocess
import sys

import pytest


@contextlib.contextmanager
def small_disk(folder, size):
    "A real file system of its own at `folder`, mounted with the given options; skipped where mounting is not allowed."
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, text=True) if sys.platform == "linux" else None
    if done is None or done.returncode: pytest.skip("this test mounts a small file system, which is not allowed here")
    try: yield folder
    finally: subprocess.run(["umount", "-l", str(folder)], check=True)
