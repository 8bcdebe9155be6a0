"Several processes: the same episodes, losses, weights and answers as one, and a clean end. This file is also the program that the launchers start: `test_processes.py CASE FOLDER`."
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from fsar.core.basics import FsarError, generator
from fsar.core.machine import launched, unlaunched
from fsar.core.files import read_json
from fsar.data.episodes import EpisodeSampler, episode_table
from fsar.engine.evaluation import Evaluator, embed_videos, predict_episodes
from fsar.engine.processes import agree, main_first, leave, processes, world
from fsar.model.registry import create_model
from fsar.engine.run import prepare_run
from toy_training import CLASSES, METHOD_NAMES, Episodes, Poisoned, run, settings, tiny

torch.set_num_threads(1)
CASES = {}


def case(function): return CASES.setdefault(function.__name__, function)


# what is run by one process here, and by two under a launcher

class Videos:
    "The videos of another split: 6 classes of 8, grey levels that rise or fall."
    rows = np.arange(100, 148)
    row_to_position = np.where(np.arange(148) < 100, -1, np.arange(148) - 100)
    def __init__(self, frames=2, size=8, broken=None): self.frames, self.size, self.broken = frames, size, broken
    def __len__(self): return len(self.rows)
    def __getitem__(self, k):
        if k == self.broken: return torch.full((self.frames, 3, self.size, self.size), float("nan"))
        level = 40 * (k // 8) + 15 * (k // 8) * np.arange(self.frames)[:, None, None, None] / self.frames
        clip = torch.from_numpy((level + generator(3, k).normal(0, 60, (self.frames, 3, self.size, self.size))).clip(0, 255).astype("uint8"))
        return clip if self.broken is None else clip / 255


def table(episodes=60):
    index = pd.DataFrame([{"video": f"{k}", "class": f"{(k - 100) // 8:03}", "split": "test" if k >= 100 else "train", "source": f"{k}"} for k in range(148)])
    return episode_table(EpisodeSampler(index, "test", ways=3, shots=1, queries=2, seed=0), episodes)


def validator(): return Evaluator(Videos(), table(), batch_size=7)


@case
def training(out):
    "With validation, dropout and batch normalisation; says which episodes were asked for here."
    asked = []
    class Noted(Episodes):
        def __getitem__(self, index): asked.append(index); return super().__getitem__(index)
    result = run(out, settings(episodes=24, tasks_per_step=4, validate_every=8), tiny(), Noted(), validator())
    return {"asked": asked, "best": result.best_accuracy, "processes": result.processes}


@case
def methods(out):
    "Every method, and a sampler in front of one: two steps of two tasks."
    with processes("cpu"):
        plain = tiny()
        plain.backbone.body[1] = torch.nn.Identity()  # a model that keeps nothing of the tasks
        run(Path(out) / "plain", settings(episodes=4, tasks_per_step=2, validate_every=0), plain, validate=None)
        for name in (*METHOD_NAMES, "vim"):
            method, sampler = ("protonet", "vim") if name == "vim" else (name, "")
            model = create_model(method, backbone="resnet_micro", frames=3, classes=CLASSES, sampler=sampler)
            if sampler: model.sampler.draws.fill_(997)  # its noise falls at 1000, in the second task of the second step
            config = settings(method=method, sampler=sampler, frames=3, size=16, short_side=16, episodes=4, tasks_per_step=2, validate_every=0, optimizer="sgd", lr=0.05)
            run(Path(out) / name, config, model, Episodes(frames=model.clip_frames, size=16, ways=2, queries=1), None)


@case
def sparing(out):
    "Activations computed again, and frozen statistics with parts of an episode."
    weights = Path(out).with_suffix(f".{os.getpid()}.pth")
    with processes("cpu"):
        for name, changes in {"again": dict(recompute=True), "parts": dict(batch_norm="frozen", frames_at_once=2, weights=str(weights))}.items():
            model = create_model("protonet", backbone="resnet_micro", frames=3, classes=CLASSES)
            torch.save(model.backbone.body.state_dict(), weights)
            config = settings(frames=3, size=16, short_side=16, episodes=8, tasks_per_step=4, validate_every=0, optimizer="sgd", lr=0.05, **changes)
            run(Path(out) / name, config, model, Episodes(frames=3, size=16, ways=2, queries=1), None)


@case
def evaluation(out):
    "Videos and episodes that do not divide evenly, a single batch, pixels as embeddings (of a sampler), and what is not finite in the second share."
    model, sampled = tiny(), create_model("otam", backbone="resnet_micro", frames=2, sampler="vim")
    size = dict(frames=sampled.clip_frames, size=16)
    found = {}
    with processes("cpu"):
        embedded = embed_videos(model, Videos(), batch_size=7, progress=False)
        pixels = embed_videos(sampled, Videos(**size), batch_size=100, progress=False)  # one batch: a process has nothing to do
        found = {f"tiny {k}": x for k, x in embedded.items()} | {f"sampled {k}": x for k, x in pixels.items()}
        for step in (1, 7, 60, 1000): found[f"answers {step}"] = torch.from_numpy(predict_episodes(model, embedded, table(), row_to_position=Videos.row_to_position, batch_size=step))
        found["sampled"] = torch.from_numpy(predict_episodes(sampled, pixels, table(), row_to_position=Videos.row_to_position, batch_size=9))
        result = validator()(model)
        found["confusion"], found["correct"] = torch.from_numpy(result.confusion), torch.from_numpy(result.correct)
        try: embed_videos(model, Videos(broken=40), batch_size=7, progress=False)
        except FsarError as e: error = str(e)
        rank = world()[0]
    torch.save(found, out.with_name(f"{out.name}{rank}.pt"))
    return {"accuracy": result.accuracy.hex(), "ci95": result.ci95.hex(), "error": error, "training": model.training}


@case
def troubles(out):
    "Errors that all processes share, and one that only the first meets."
    found = {}
    def attempt(name, call):
        try: call()
        except FsarError as e: found[name] = str(e)
    def only_in_the_first():
        if world()[0] == 0: raise FsarError("the disk of the first is full")
    with processes("cpu"):
        attempt("first", lambda: main_first(only_in_the_first))
        attempt("agree", lambda: agree(world()[0], Path("runs/a")))
        attempt("uneven step", lambda: run(out / "a", settings(tasks_per_step=3, episodes=24)))
        attempt("uneven episodes", lambda: run(out / "b", settings(tasks_per_step=2, episodes=25)))
        attempt("other settings", lambda: (run(out / "c", settings(episodes=4)), run(out / "c", settings(episodes=4, lr=0.1))))
        attempt("not finite", lambda: run(out / "d", episodes=Poisoned(), validate=None))
    attempt("again", lambda: run(out / "e"))
    return found


@case
def interrupted(out):
    "Stopped in both processes after step 3, and on to the end."
    def stop(step, row):
        if step == 3: raise KeyboardInterrupt
    with processes("cpu"):
        try: run(out, on_step=stop, save_seconds=0)
        except KeyboardInterrupt: pass
        return {"steps": run(out).steps}


TOGETHER = ("training", "methods", "sparing", "evaluation", "interrupted")


@case
def together(out):
    "These cases one after another in one group, because starting two processes takes longer than most of them."
    with processes("cpu"): return {name: CASES[name](out / name) for name in TOGETHER}


@case
def small(out): return run(out, settings(episodes=4, validate_every=4), validate=validator()).steps


@case
def unknown_group(out):
    "A group that neither the environment nor Accelerate knows of."
    rank, store = out
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try: prepare_run(settings(), tiny())
    except FsarError as e: print(e, flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@case
def own_accelerator(out):
    "A program that sets Accelerate up before it trains, and not for the CPU."
    from accelerate import Accelerator
    Accelerator()
    try: run(out)
    except FsarError as e: return str(e)
    finally: torch.distributed.destroy_process_group()  # its own, and gloo's threads abort now and then in a program that ends with them


@case
def abandoned(out):
    "A group that an error leaves standing; what is said at the end is said after all of fsar's own farewells."
    import atexit
    atexit.register(lambda: os.write(1, f"STANDING {torch.distributed.is_initialized()}\n".encode()))
    try:
        with processes("cpu"): raise FsarError("all of them")
    except FsarError: return torch.distributed.is_initialized()


def launch(name, out, *, launcher=("torch.distributed.run", "--standalone", "--nproc_per_node=2"), timeout=150, **env):
    "What the processes of a case say, by rank."
    answer = started([sys.executable, "-m", *launcher, __file__, name, str(out)], timeout, **env)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return said(answer)


def started(command, timeout=150, **env):
    "The outcome of a command; ended with all its children when it takes too long."
    with unlaunched():
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    try: out, err = process.communicate(timeout=timeout)
    finally: process.terminate()  # torchrun takes its processes along
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


def said(answer): return {rank: value for rank, value in map(json.loads, re.findall(r"^SAID (.*)$", answer.stdout, re.M))}


def weights_differ(one, two):
    "The largest difference of two checkpoints, statistics included."
    a, b = (load_file(Path(p) / "model.safetensors") for p in (one, two))
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def logs_differ(one, two):
    "The largest difference of two logs, times aside."
    a, b = (pd.read_csv(Path(p) / "log.csv").drop(columns="seconds") for p in (one, two))
    assert list(a) == list(b) and len(a) == len(b) and a.isna().equals(b.isna())
    return (a - b).abs().max().max()


# the tests

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "What the case `training` gives in one process."
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, training(out)


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    "Where two processes have done the cases of TOGETHER, and what they say: name → rank → answer."
    out = tmp_path_factory.mktemp("in two")
    said_by = launch("together", out, timeout=400)
    return out, {name: {rank: said_by[rank][name] for rank in (0, 1)} for name in TOGETHER}


ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0")


@pytest.mark.timeout(500)
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_training_is_as_in_one_process(alone, in_two, tmp_path, launcher):
    "Rank r takes every second episode; log, weights and running statistics agree up to rounding, and so does the validation that selects."
    out, one = alone
    folder, two = in_two[0] / "training", in_two[1]["training"]
    if launcher != "torchrun":
        folder = tmp_path / "two"
        two = launch("training", folder, launcher=ACCELERATE)  # the training itself forms the group
    assert [two[rank]["asked"] for rank in (0, 1)] == [one["asked"][0::2], one["asked"][1::2]] and one["asked"] == list(range(24))
    assert [two[rank]["processes"] for rank in (0, 1)] == [2, 2] and one["processes"] == 1
    assert logs_differ(out, folder) < 1e-5 and two[0]["best"] == two[1]["best"] == one["best"]
    for name in ("last", "best"): assert weights_differ(out / name, folder / name) < 1e-5
    assert read_json(folder / "last/model.json")["training"]["progress"]["processes"] == 2


@pytest.mark.timeout(500)
def test_every_method_learns_the_same(in_two, tmp_path):
    "Statistics and counters included; all parameters take part in every process."
    methods(tmp_path)
    for name in (*METHOD_NAMES, "vim", "plain"):
        two = in_two[0] / "methods" / name
        assert weights_differ(tmp_path / name / "last", two / "last") < 1e-5, name
        assert logs_differ(tmp_path / name, two) < 1e-5, name


@pytest.mark.timeout(500)
def test_less_memory_learns_the_same(in_two, tmp_path):
    sparing(tmp_path / "one")
    for name in ("again", "parts"):
        two = in_two[0] / "sparing" / name
        assert weights_differ(tmp_path / "one" / name / "last", two / "last") < 1e-5, name
        assert logs_differ(tmp_path / "one" / name, two) < 1e-5, name


@pytest.mark.timeout(500)
def test_evaluation_is_the_same_to_the_bit(in_two, tmp_path):
    one, two = evaluation(tmp_path / "one"), in_two[1]["evaluation"]
    assert one == two[0] == two[1] and "not finite for row 140 of the store" in one["error"] and one["training"]
    first, *others = (torch.load(path) for path in (tmp_path / "one0.pt", in_two[0] / "evaluation0.pt", in_two[0] / "evaluation1.pt"))
    for other in others:
        assert list(other) == list(first)
        for name, x in first.items(): assert other[name].dtype == x.dtype and torch.equal(other[name], x), name


def test_errors_are_everyones(tmp_path):
    found = launch("troubles", tmp_path / "out")
    assert found[0] == found[1]
    expected = {"first": "the disk of the first is full", "agree": r"the processes do not find the same in runs/a \(0, 1\): it must be a folder that all machines share",
                "uneven step": r"2 processes share the episodes of a step: tasks_per_step \(3\) and episodes \(24\) must be multiples of 2",
                "uneven episodes": r"tasks_per_step \(2\) and episodes \(25\)", "other settings": r"holds a training with other settings \(lr: 0.005 there, 0.1 here\)",
                "not finite": r"training stopped at step 4: not finite in episode 9 .*Weights, clips and values are in", "again": "a launcher lets them meet once: write `with processes\\(\\):` around"}
    for name, words in expected.items(): assert re.search(words, found[0][name]), (name, found[0][name])
    assert sorted(p.name for p in (tmp_path / "out/d/nonfinite").iterdir()) == ["episode_9.safetensors", "model", "values.json"]


@pytest.mark.timeout(500)
def test_an_interrupted_training_goes_on(in_two, tmp_path):
    run(tmp_path / "one")
    two = in_two[0] / "interrupted"
    assert in_two[1]["interrupted"][1] == {"steps": 12}
    assert logs_differ(tmp_path / "one", two) < 1e-5 and weights_differ(tmp_path / "one/last", two / "last") < 1e-5


LAUNCHES = int(os.environ.get("FSAR_LAUNCHES", 3))  # 20 takes minutes


@pytest.mark.timeout(60 + 60 * LAUNCHES)
def test_clean_exits(tmp_path):
    "Launch after launch, no process aborts on its way out. FSAR_LAUNCHES=20 does twenty."
    answers = [started([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, "small", tmp_path / str(k)]) for k in range(LAUNCHES)]
    assert [(a.returncode, sorted(said(a).items())) for a in answers] == [(0, [(0, 2), (1, 2)])] * LAUNCHES
    assert not [a.stderr for a in answers if re.search("abort|terminate called|SIG", a.stderr)]


NOTEBOOK = """
import sys
sys.path.insert(0, {tests!r})
import torch
import test_processes as t
torch.set_num_threads(2)                                                  # as a notebook has them, and they do not survive a fork
torch.randn(600, 600) @ torch.randn(600, 600)
one = t.run({out!r} + "/one", validate=t.validator())                           # first alone, in this process
from accelerate import notebook_launcher
notebook_launcher(t.run, ({out!r} + "/two", t.settings(), t.tiny(), t.Episodes(), t.validator()), num_processes=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
two = t.run({out!r} + "/two", validate=t.validator())
print("FOUND", one.processes, two.processes, two.reused, one.best_accuracy == two.best_accuracy)
"""


def test_notebook_launcher(tmp_path):
    answer = started([sys.executable, "-c", NOTEBOOK.format(tests=str(Path(__file__).parent), out=str(tmp_path))])
    assert "FOUND 1 2 True True" in answer.stdout, answer.stderr[-3000:]
    assert logs_differ(tmp_path / "one", tmp_path / "two") < 1e-5 and weights_differ(tmp_path / "one/last", tmp_path / "two/last") < 1e-5


def test_two_machines(tmp_path):
    "Two launchers that meet, here on one machine, with a process each."
    import socket
    with socket.socket() as s: s.bind(("localhost", 0)); port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=1", __file__, "small", str(tmp_path / "run")]
    with unlaunched(): both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try: answers = [process.communicate(timeout=120) for process in both]
    finally: [process.terminate() for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert sorted(re.findall(r"SAID (.*)", answers[0][0] + answers[1][0])) == ["[0, 2]", "[1, 2]"]


# a world that is smaller than was asked for

def test_accelerate_that_starts_one_process_is_noticed(tmp_path):
    answer = started([sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", __file__, "small", tmp_path / "run"])
    assert answer.returncode and "accelerate launch was asked for several processes and started one" in answer.stderr and not (tmp_path / "run").exists()
    single = started([sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", __file__, "small", tmp_path / "run"])
    assert single.returncode == 0 and said(single) == {0: 2}


def test_an_accelerator_made_too_early_is_noticed(tmp_path):
    if torch.cuda.is_available(): pytest.skip("a machine with a GPU forms the group whatever the Accelerator was made for")
    found = launch("own_accelerator", tmp_path / "run")
    assert found[0] == found[1] and "there are 2 processes, but Accelerate works with 1: make no Accelerator before" in found[0]


def test_a_group_that_an_error_left_standing_is_taken_down_at_the_end(tmp_path):
    answer = started([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, "abandoned", tmp_path / "run"])
    assert answer.returncode == 0 and said(answer) == {0: True, 1: True} and answer.stdout.count("STANDING False") == 2


def test_a_group_without_a_launcher_is_noticed(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_processes as t; t.unknown_group((int(sys.argv[1]), {str(tmp_path / 'store')!r}))"
    with unlaunched(): both = [subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    try: assert all("there are 2 processes, but Accelerate works with 1" in process.communicate(timeout=100)[0] for process in both)
    finally: [process.terminate() for process in both]


@pytest.mark.parametrize("words", [["train"], ["sizes"]])
def test_the_command_line_notices_a_launch_of_one_process_for_several(words, monkeypatch, tmp_path, capsys):
    "As `accelerate launch --cpu --num_processes 2 -m fsar train` leaves the environment."
    from fsar.cli import main as cli
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}.items(): monkeypatch.setenv(name, value)
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2 and "asked for several processes and started one" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_more_processes_than_gpus(monkeypatch):
    leave()  # what other tests of this process have set up
    monkeypatch.setenv("WORLD_SIZE", "4"); monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(FsarError, match="4 processes were started on a machine with 2 GPUs"):
        with processes("cuda"): pass


def test_a_plain_mean_of_all_batches_is_refused():
    from fsar.engine.norms import Traces
    with pytest.raises(FsarError, match="momentum=None"): Traces(torch.nn.BatchNorm1d(3, momentum=None))
    frozen = torch.nn.BatchNorm1d(3, momentum=None).eval()  # it only reads its statistics
    assert not any(t is frozen.running_mean for t in Traces(frozen).tensors)


def test_alone_nothing_happens(tmp_path):
    assert world() == (0, 1) and launched() == 1 and main_first(lambda: 3) == 3
    agree(3, tmp_path)
    with processes(): assert world() == (0, 1)
    with pytest.raises(ZeroDivisionError):
        with processes(): raise ZeroDivisionError


def test_what_a_child_sees_of_a_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_CPU"): monkeypatch.setenv(name, "2")
    before = dict(os.environ)
    with unlaunched(): assert launched() == 1 and not [k for k in os.environ if k.startswith(("MASTER", "TORCHEL", "LOCAL_", "ACCELERATE"))]
    assert dict(os.environ) == before and launched() == 2


# the command line

@pytest.fixture(scope="module")
def flags(tiny_motions):
    values = dict(dataset=tiny_motions, method="protonet", short_side=32, size=32, frames=4, queries=2, episodes=12, tasks_per_step=2, validate_every=6, val_episodes=20,
                  test_queries=2, test_episodes=60, precision="fp32", device="cpu")
    return [w for name, value in values.items() for w in ("--" + name.replace("_", "-"), str(value))] + ["--test-shots", "1"]


@pytest.fixture(scope="module")
def reported(flags, tmp_path_factory):
    "`fsar train` by two processes."
    out = tmp_path_factory.mktemp("reported") / "two"
    return out, started([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "fsar", "train", *flags, "--out", out], 280)


@pytest.mark.timeout(300)
def test_the_command_line_trains_together_and_reports_once(reported):
    out, answer = reported
    assert answer.returncode == 0, answer.stderr[-3000:]
    metrics = read_json(out / "metrics.json")
    assert answer.stdout.splitlines() == [metrics["headline"], f"report: {out / 'report.html'}"]
    assert metrics["training"]["processes"] == 2 and metrics["training"]["steps"] == 6 and read_json(out / "run.json")["status"] == "finished"
    assert {p.name for p in out.iterdir()} == {"report.html", "train.ipynb", "metrics.json", "run.json", "results", "checkpoints", "figures"}
    assert "resuming the interrupted run" not in answer.stderr


@pytest.mark.timeout(300)
def test_the_command_line_gives_the_figures_of_one_process(reported, flags, tmp_path):
    out, _ = reported
    alone = started([sys.executable, "-m", "fsar", "train", *flags, "--out", tmp_path / "one"], 280)
    assert alone.returncode == 0, alone.stderr[-3000:]
    one, two = read_json(tmp_path / "one/metrics.json"), read_json(out / "metrics.json")
    assert one["results"] == two["results"] and one["training"]["processes"] == 1 and one["headline"] == two["headline"]
    assert one["training"]["validation"] == two["training"]["validation"]
    assert logs_differ(tmp_path / "one/checkpoints", out / "checkpoints") < 1e-5 and weights_differ(tmp_path / "one/checkpoints/best", out / "checkpoints/best") < 1e-5


@pytest.mark.timeout(300)
def test_the_command_line_tests_together(reported):
    out, _ = reported
    answer = started([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "fsar", "test", out, "--json"], 200)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert json.loads(answer.stdout)["results"] == read_json(out / "metrics.json")["results"]  # said once


@pytest.mark.timeout(300)
def test_a_finished_run_is_reused_and_another_refused(reported, flags):
    out, _ = reported
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "fsar", "train", *flags, "--out", out]
    again, other = started(command), started([*command, "--lr", "0.01"])
    assert again.returncode == 0 and again.stderr.count("nothing to run") == 1 and again.stdout.count("report: ") == 1
    assert other.returncode and "lr 0.001 → 0.01" in other.stderr


def test_commands_that_do_not_share_say_so(tmp_path, monkeypatch, capsys):
    from fsar.cli import main as cli
    from fsar.experiments import runs as experiments
    from fsar.core.config import Config
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["compare", "--runs", "otam", "--out", str(tmp_path)]) == 2
    assert "only fsar train and fsar test share their work" in capsys.readouterr().err
    with pytest.raises(FsarError, match="the template 'side' runs in one process"): experiments._train_together(tmp_path, Config(), "side", False, False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices (NCCL)")
def test_two_gpus_train_and_test_as_one(tmp_path):
    "The same episodes on two devices: losses agree as closely as the GPU's arithmetic does."
    config = settings(device="cuda", episodes=24, tasks_per_step=4, validate_every=8)
    run(tmp_path / "one", config, tiny(), Episodes(), validator())
    leave()
    assert launch("on_gpus", tmp_path / "two")[1]["processes"] == 2
    assert logs_differ(tmp_path / "one", tmp_path / "two") < 1e-3 and weights_differ(tmp_path / "one/last", tmp_path / "two/last") < 1e-3


@case
def on_gpus(out):
    return {"processes": run(out, settings(device="cuda", episodes=24, tasks_per_step=4, validate_every=8), tiny(), Episodes(), validator()).processes}


if __name__ == "__main__":
    rank = int(os.environ.get("RANK", 0))
    found = CASES[sys.argv[1]](Path(sys.argv[2]))
    os.write(1, f"SAID {json.dumps([rank, found])}\n".encode())  # in one piece: the other rank writes too
