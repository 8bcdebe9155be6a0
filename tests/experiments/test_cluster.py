"""Sweeps on Ray: two nodes on this machine, workers and nodes that die, work that raises, and everything that is refused before a start.

All tests of this file share one cluster, the sweep of whole runs at the end included: to start one takes longer than most of them.
Ray's processes inherit an environment variable with a value of this run's own, so whatever is left of them at the end is found.
"""
import functools
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from fsar.core.basics import FsarError
from fsar.core.config import Config
from fsar.core.files import read_json
from fsar.experiments import cluster, sweeps
from fsar.experiments.cluster import check_address, on_ray
from fsar.experiments.sweeps import Workers, grid, run_sweep

try:
    import ray
    from ray import cluster_utils
except ImportError: ray = None
needs_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed: pip install 'fsar[cluster]'")


def marked(mark: str) -> list[int]:
    "Living processes, other than this one, with the mark in their environment."
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and mark.encode() in (process / "environ").read_bytes(): found.append(int(process.name))
        except OSError: pass  # it ended meanwhile, or is another user's
    return found


def until(condition, seconds: float = 200) -> None:
    "Wait for something to become true."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    "Whether a process runs; one that ended and waits for its parent does not."
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


class Nodes:
    "Two nodes with a CPU each; more can come and go."

    def __init__(self, mark: str) -> None:
        self.cluster, self.mark = cluster_utils.Cluster(), mark
        self.start(include_dashboard=False, include_log_monitor=False, no_monitor=True, _system_config={"health_check_period_ms": 1000, "health_check_failure_threshold": 3})
        self.add()
        self.address = self.cluster.address

    def start(self, cpus: int = 1, **options):
        return self.cluster.add_node(num_cpus=cpus, object_store_memory=80 * 2**20, **options)

    def add(self, cpus: int = 1): return patiently(lambda: self.start(cpus), self.mark)


def patiently(start, mark: str):
    "Ray's processes wait 15 seconds for each other and then give up, which a busy machine can exceed: what a start has left is ended, and it is tried again."
    for left in (2, 1, 0):
        before = set(marked(mark))
        try: return start()
        except Exception:
            for pid in set(marked(mark)) - before: os.kill(pid, signal.SIGKILL)
            if not left: raise


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    "The cluster of this file, of which nothing is left afterwards; functions of this file travel to its workers by value."
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with tempfile.TemporaryDirectory(prefix="fsar-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in {**cluster.SETTINGS, "RAY_worker_niceness": "0", "RAY_TMPDIR": folder, "FSAR_TEST": (mark := uuid.uuid4().hex)}.items(): patch.setenv(name, value)
        (Path(folder) / "ray").mkdir()
        nodes = patiently(lambda: Nodes(mark), mark)
        yield nodes
        ray.shutdown()
        nodes.cluster.shutdown()
        until(lambda: not marked(mark), 30)


@pytest.fixture
def unasked(monkeypatch):
    "The question whether there is a Ray cluster, which takes a process, is left out where others have asked it."
    monkeypatch.setattr(cluster, "check_address", cluster._check_port)


# work: each start leaves a line with its process and node

def started(out: Path, n: int) -> list[tuple[int, str]]:
    "Process and node of every start of item n."
    file = out / f"{n}.starts"
    return [(int(pid), node) for pid, node in map(str.split, file.read_text().splitlines())] if file.exists() else []


def note(out: Path, n: int) -> int:  # how often it has been started, this time included
    "Write down a start."
    with open(out / f"{n}.starts", "a") as file: file.write(f"{os.getpid()} {ray.get_runtime_context().get_node_id()}\n")
    return len(started(out, n))


def square(n: int, out: Path) -> None:
    "Item 2 waits for its end the first time; item 4 raises."
    if note(out, n) == 1 and n == 2: time.sleep(120)
    if n == 4: raise ValueError("four is not wanted")
    (out / f"{n}.txt").write_text(str(n * n))


def wait_for_go(n: int, out: Path) -> None:
    note(out, n)
    until((out / "go").exists, 400)
    (out / f"{n}.txt").write_text("done")


def deadly(n: int, out: Path) -> None:
    note(out, n)
    if n: os.kill(os.getpid(), signal.SIGKILL)


def slow(n: int, out: Path) -> None:
    note(out, n)
    if n: time.sleep(120)


# at work

@needs_ray
def test_a_killed_worker_is_replaced_and_an_item_that_raises_ends_alone(nodes, tmp_path):
    def kill() -> None:
        until(lambda: started(tmp_path, 2), 400)
        os.kill(started(tmp_path, 2)[0][0], signal.SIGKILL)
    killer = threading.Thread(target=kill)
    killer.start()
    ended = dict(on_ray(functools.partial(square, out=tmp_path), range(6), address=nodes.address, folder=tmp_path))
    killer.join()
    assert ended == {n: "ValueError: four is not wanted" if n == 4 else "" for n in range(6)}
    assert {n: int((tmp_path / f"{n}.txt").read_text()) for n in range(6) if n != 4} == {n: n * n for n in range(6) if n != 4}
    assert {n: len(started(tmp_path, n)) for n in range(6)} == {n: 2 if n == 2 else 1 for n in range(6)}
    assert len({node for n in range(6) for _, node in started(tmp_path, n)}) == 2, "both nodes have worked"
    assert len({pid for n in range(6) for pid, _ in started(tmp_path, n)}) == 7, "each start has a process of its own"
    assert not list(tmp_path.glob(".*")), "the token is gone"


@needs_ray
def test_an_item_that_always_dies_ends_with_a_reason(nodes, tmp_path):
    ended = dict(on_ray(functools.partial(deadly, out=tmp_path), [0, 1], address="auto", folder=tmp_path, attempts=2))
    assert ended[0] == "" and "started 2 times and died each time" in ended[1] and "killed" in ended[1] and "\n" not in ended[1]
    assert len(started(tmp_path, 1)) == 2


@needs_ray
def test_a_node_that_dies_gives_its_item_to_another(nodes, unasked, capfd, tmp_path):
    third = nodes.add()
    capfd.readouterr()

    def remove() -> None:
        until(lambda: all(started(tmp_path, n) for n in range(3)), 400)
        nodes.cluster.remove_node(third, allow_graceful=False)
        (tmp_path / "go").touch()
    remover = threading.Thread(target=remove)
    remover.start()
    ended = dict(on_ray(functools.partial(wait_for_go, out=tmp_path), range(3), address=nodes.address, folder=tmp_path))
    remover.join()
    assert ended == {0: "", 1: "", 2: ""} and capfd.readouterr() == ("", ""), "and nothing of Ray's in the terminal"
    again = [n for n in range(3) if len(started(tmp_path, n)) == 2]
    assert len(again) == 1 and started(tmp_path, again[0])[0][1] == third.node_id != started(tmp_path, again[0])[1][1]


@needs_ray
def test_when_the_caller_stops_asking_what_is_under_way_ends_and_the_cluster_stays(nodes, unasked, tmp_path):
    running = on_ray(functools.partial(slow, out=tmp_path), [0, 1, 2, 3], address=nodes.address, folder=tmp_path)
    assert next(running) == (0, "")
    until(lambda: started(tmp_path, 1))
    with pytest.raises(FsarError, match="connected to a Ray cluster already"): next(on_ray(print, [1], address=nodes.address, folder=tmp_path))
    running.close()
    pids = [pid for n in (1, 2, 3) for pid, _ in started(tmp_path, n)]
    until(lambda: not any(map(alive, pids)), 10)
    assert not ray.is_initialized() and len(started(tmp_path, 3)) == 0, "what was waiting has never started"
    assert sum(n["Alive"] for n in nodes.cluster.global_state.node_table()) == 2


@needs_ray
def test_without_a_node_that_can_run_it_an_item_ends(nodes, unasked, tmp_path):
    large = nodes.add(cpus=2)
    running = on_ray(functools.partial(wait_for_go, out=tmp_path), [0], address=nodes.address, folder=tmp_path, cpus=2)
    remover = threading.Thread(target=lambda: (until(lambda: started(tmp_path, 0), 400), nodes.cluster.remove_node(large, allow_graceful=False)))
    remover.start()
    (item, reason), = running
    remover.join()
    assert item == 0 and reason.startswith("it never ended: no node of the cluster has the 2 CPUs") and len(started(tmp_path, 0)) == 1


@needs_ray
def test_a_node_that_died_a_moment_ago_is_not_waited_for(nodes, unasked, tmp_path):
    nodes.cluster.remove_node(nodes.add(), allow_graceful=False)  # the list of nodes has it for a while yet
    assert dict(on_ray(functools.partial(square, out=tmp_path), [1, 2], address=nodes.address, folder=tmp_path)) == {1: "", 2: ""}


# whole runs

SMALL = dict(short_side=32, size=32, frames=4, ways=3, queries=1, episodes=6, precision="fp32", validate_every=0, protocol="last", test_queries=1, test_shots=(1,), test_episodes=20)


def outcomes(out: Path) -> dict:
    "Answers and weights of all finished runs."
    records = {f.stem: read_json(f) for f in sorted((out / "results").glob("*.json"))}
    return {name: r.get("weights") or r.get("correct") for name, r in records.items() if r.get("status", "finished") == "finished"}


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_on_two_nodes_gives_the_same_as_here(nodes, unasked, tiny_motions, tmp_path):
    "Four runs on two nodes, one worker killed in the middle, one more run made to fail: the others finish, and equal those of this process."
    base = Config(dataset=str(tiny_motions), store=str(tmp_path / "store"), **SMALL)
    jobs = grid(base, {"method": ["protonet", "otam"], "seed": [0, 1]}, [{"label": "hot", "method": "bimhm", "options": ["scale=1e39"]}])
    assert len(jobs) == 5
    killed: list[str] = []
    def strike() -> None:
        "SIGKILL to the worker of the first run that has begun to train."
        while not killed:
            for job in jobs:
                record = sweeps.record_file(tmp_path / "ray", job)
                if record.exists() and (r := read_json(record))["status"] == "running" and sweeps.episodes_done(tmp_path / "ray", job):
                    os.kill(r["process"], signal.SIGKILL)
                    killed.append(job.name)
                    return
            time.sleep(0.005)
    threading.Thread(target=strike, daemon=True).start()
    try: found = run_sweep(jobs, tmp_path / "ray", workers=Workers(cluster=nodes.address), progress=False)
    finally: killed.append("")
    assert killed[0] and found["states"] == {"finished": 4, "failed": 1} and "not finite" in read_json(tmp_path / "ray" / "results" / "hot-0.json")["reason"]
    run_sweep(jobs, tmp_path / "here", progress=False)
    assert outcomes(tmp_path / "ray") == outcomes(tmp_path / "here") and len(outcomes(tmp_path / "ray")) == 12


# refused before anything is started

@needs_ray
@pytest.mark.parametrize("asked, said", [({"cpus": 2}, "no node of the cluster has the 2 CPUs and 0 GPUs that each run asks for (nodes: 2 with 1 CPU and 0 GPUs)"),
                                         ({"gpus": 1}, "the 1 CPU and 1 GPU that each run asks for")])
def test_more_than_any_node_has(nodes, unasked, tmp_path, asked, said):
    with pytest.raises(FsarError) as refused: next(on_ray(functools.partial(square, out=tmp_path), [1], address=nodes.address, folder=tmp_path, **asked))
    assert said in str(refused.value) and not list(tmp_path.iterdir())


@needs_ray
def test_work_that_cannot_travel(tmp_path):
    with pytest.raises(FsarError, match="the work cannot be sent to another process: TypeError"):
        next(on_ray(functools.partial(print, threading.Lock()), [1], folder=tmp_path))


@needs_ray
def test_a_node_that_does_not_see_the_folder(nodes, unasked, tmp_path):
    "The node lives in a mount namespace of its own, where an empty file system hides the folder."
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode: pytest.skip("no mount namespaces for this user")
    start = f"mount -t tmpfs none {tmp_path} && exec {sys.executable} -m ray.scripts.scripts start --address={nodes.address} --num-cpus=1 --object-store-memory={80 * 2**20} --block"
    count = sum(n["Alive"] for n in nodes.cluster.global_state.node_table())
    other = subprocess.Popen(["unshare", "-rm", "sh", "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: sum(n["Alive"] for n in nodes.cluster.global_state.node_table()) == count + 1)
        with pytest.raises(FsarError, match=r"the node .+ \(.+, node [0-9a-f]{8}\) does not see the results' folder .+ \(it has another one of that name\)"):
            next(on_ray(functools.partial(square, out=tmp_path), [1], address=nodes.address, folder=tmp_path))
        assert not list(tmp_path.iterdir())
    finally:
        other.terminate()
        other.wait()
        until(lambda: sum(n["Alive"] for n in nodes.cluster.global_state.node_table()) == count)


def test_ray_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FsarError, match=r"pip install 'fsar\[cluster\]'"): next(on_ray(print, [1], folder=tmp_path))


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nowhere.invalid:6379", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:123456"])
def test_an_address_where_nobody_answers(address, tmp_path):
    begun = time.monotonic()
    with pytest.raises(FsarError) as refused: next(on_ray(print, [1], address=address, folder=tmp_path))
    assert address in str(refused.value) and "ray start --head" in str(refused.value) and "\n" not in str(refused.value)
    assert time.monotonic() - begun < 15


@needs_ray
def test_an_address_where_something_else_answers():
    import socket
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address, begun = f"127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        with pytest.raises(FsarError, match=f"no Ray cluster answered at the address {address} within 4 seconds.+ray start --head"): check_address(address, 4)
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize("asked, said", [({"cpus": 0}, "at least some CPU"), ({"gpus": -1}, "-1 GPUs"), ({"gpus": 1.5}, "whole numbers"), ({"threads": 0}, "threads"), ({"attempts": 0}, "attempts")])
def test_numbers_without_a_meaning(asked, said, tmp_path):
    with pytest.raises(FsarError, match=said): next(on_ray(print, [1], folder=tmp_path, **asked))


def test_nothing_to_do(tmp_path): assert list(on_ray(print, [], folder=tmp_path)) == []


# a cluster of our own

@needs_ray
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_ctrl_c_ends_a_cluster_of_our_own_and_it_leaves_nothing_behind(tmp_path):
    script = """
        import functools, os, sys, time
        from pathlib import Path
        from fsar.experiments.cluster import on_ray

        def work(n, out):
            if not n: import torch
            Path(out, f"{n}.txt").write_text(f"{n or torch.get_num_threads()} {os.getcwd()}")  # `out` is relative
            if n: time.sleep(120)

        if __name__ == "__main__":
            for item, reason in on_ray(functools.partial(work, out="results"), [0, 1], folder=Path("results"), threads=2): print(item, repr(reason), flush=True)
    """
    home, place = tmp_path / "home", tmp_path / "place"
    for folder in (home, place): folder.mkdir()
    (place / "script.py").write_text(textwrap.dedent(script))
    paths = [str(Path(cluster.__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # some may be set for the cluster above
    environment = {**others, "HOME": str(home), "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(tmp_path), "FSAR_TEST": (mark := uuid.uuid4().hex)}
    driver = subprocess.Popen([sys.executable, "script.py"], cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert driver.stdout.readline() == "0 ''\n"
        until(lambda: (place / "results" / "1.txt").exists())
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to everyone in the foreground
        out, error = driver.communicate(timeout=60)
    finally: driver.kill()
    assert out == "" and error.startswith("Traceback") and error.endswith("KeyboardInterrupt\n") and "[20" not in error, "none of Ray's own lines"
    assert (place / "results" / "0.txt").read_text() == f"2 {place}"
    until(lambda: not marked(mark), 30)
    assert not list(home.iterdir()) and {p.name for p in tmp_path.iterdir()} == {"home", "place"} and {p.name for p in (place / "results").iterdir()} == {"0.txt", "1.txt"}


def test_a_start_that_fails_is_cleared_away_and_tried_again(tmp_path):
    class Failing:
        "Ray on a machine that is too busy: a process has been started when the rest gives up."
        def __init__(self): self.children = []
        def shutdown(self): pass
        def init(self, _temp_dir, **others):
            self.children.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)", f"--temp-dir={_temp_dir}"]))
            raise RuntimeError("timed out during startup\nand many lines more")
    failing = Failing()
    with pytest.raises(FsarError, match="^Ray did not start on this machine in 3 tries: RuntimeError: timed out during startup$"): cluster._start(failing, 1, str(tmp_path))
    assert [child.wait(10) for child in failing.children] == [-signal.SIGKILL] * 3
