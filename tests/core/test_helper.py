"Helper processes: answers whatever is printed, errors, deadlines, and an end in every case."
import os
import signal
import subprocess
import sys
import time

import pytest

from fsar.core.basics import FsarError
from fsar.core.helper import Helper, HelperDied, HelperLate, python_command, python_environment

TOY = """
import os, signal, subprocess, sys, time
from fsar.core.helper import Helper

def nested(folder):
    def call():
        with Helper() as inner: inner.call("toy:rest", {"folder": folder})
    return call

def rest(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(60)

def rest_with_a_child(folder):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(os.path.join(folder, str(child.pid)), "w").close()
    time.sleep(60)

def talking(): return lambda: print("noise on standard output") or {"pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS"), "own": os.environ.get("TOY")}
def dying(): return lambda: os.kill(os.getpid(), signal.SIGKILL)
def leaving(): sys.exit("that is all")
def folders(): return sys.path
def block(size): return {"size": size}, b"\\n" * size
def object_of_python(): return object()
def echo(**arguments): return arguments
"""


@pytest.fixture()
def toys(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try: state = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError): return True
        if state == "Z": return True  # dead; nobody has asked how it ended
        time.sleep(0.1)
    return False


def first_file(folder) -> int:
    deadline = time.monotonic() + 60
    while not (found := os.listdir(folder)) and time.monotonic() < deadline: time.sleep(0.1)
    return int(found[0])


def test_it_answers_whatever_is_printed(toys):
    with Helper(toys | {"TOY": "1"}) as helper:
        call = helper.make("toy:talking")
        first, second = call(), call()
        assert first == second and first["pid"] == helper.process.pid != os.getpid() and first["own"] == "1" and first["threads"] == os.environ.get("OMP_NUM_THREADS")
        assert helper.call("toy:block", {"size": 100_000}) == ({"size": 100_000}, b"\n" * 100_000)
        assert helper.call("toy:echo", {"text": "ä\n" * 100_000, "function": 1}) == {"text": "ä\n" * 100_000, "function": 1}
    with pytest.raises(ProcessLookupError): os.kill(first["pid"], 0)


def test_several_work_at_the_same_time(toys):
    with Helper(toys) as one, Helper(toys) as other:
        for helper in (one, other): helper.send("time:monotonic")
        first, second = one.receive(), other.receive()
        assert isinstance(first, float) and isinstance(second, float)


def test_errors(toys):
    with Helper(toys) as helper:
        with pytest.raises(FsarError, match="^nowhere:at_all: ModuleNotFoundError: No module named 'nowhere'$"): helper.make("nowhere:at_all")
        with pytest.raises(FsarError, match="^toy:object_of_python: TypeError: Object of type object is not JSON serializable$"): helper.call("toy:object_of_python")
        call = helper.make("toy:dying")
        with pytest.raises(HelperDied, match=r"^toy:dying: the process ended \(SIGKILL, which the system sends when memory is full\) and said: nothing$"): call()
        with pytest.raises(HelperDied): call()
        assert helper.close() == "SIGKILL"
    with Helper(toys) as helper, pytest.raises(HelperDied, match=r"^toy:leaving: the process ended \(exit code 1\) and said: that is all$"): helper.call("toy:leaving")


def test_a_deadline_kills_it_and_its_children(toys, tmp_path):
    (tmp_path / "pids").mkdir()
    with Helper(toys) as helper:
        helper.call("toy:echo")
        with pytest.raises(HelperLate, match=r"^toy:rest_with_a_child: no answer after 2 s; the process was killed$"):
            helper.call("toy:rest_with_a_child", {"folder": str(tmp_path / "pids")}, timeout=2)
        assert helper.ending() == "SIGKILL" and is_gone(first_file(tmp_path / "pids"))


@pytest.mark.parametrize("word", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_its_parent_and_so_do_its_own_helpers(toys, tmp_path, word):
    program = f"from fsar.core.helper import Helper\nwith Helper() as helper: helper.make('toy:nested', {{'folder': {str(tmp_path / 'pids')!r}}})()"
    (tmp_path / "pids").mkdir()
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, **toys}, stderr=subprocess.PIPE)
    innermost = first_file(tmp_path / "pids")
    process.send_signal(word)
    assert (b"KeyboardInterrupt" in process.communicate(timeout=30)[1]) == (word == signal.SIGINT)
    assert is_gone(innermost)


def test_the_working_folder_is_not_imported(toys, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "queue.py").write_text("raise SystemExit('the wrong queue')")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PYTHONPATH", os.pathsep + os.environ.get("PYTHONPATH", ""))  # an empty entry is the working folder too
    with Helper() as helper: assert helper.call("os:getcwd") == str(tmp_path / "work")
    shown = subprocess.run(python_command("import queue, sys; print('torch' in sys.modules)"), env=python_environment(), capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_a_helper_does_not_load_torch():
    shown = subprocess.run(python_command("import sys, fsar.core.helper; print('torch' in sys.modules)"), env=python_environment(), capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
