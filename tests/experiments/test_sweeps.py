"Many runs: grids, records, what is taken over, what is killed and goes on and the table of results. (On a cluster: test_cluster.py.)"
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas as pd
import pytest

from fsar.cli import main as cli
from fsar.experiments import protocol, sweeps
from fsar.core.config import Config
from fsar.core.basics import FsarError
from fsar.core.files import read_json, write_json
from fsar.data.datasets import prepare_data
from fsar.experiments.sweeps import Job, PreparedJob, Workers, grid, read_sweep, run_sweep, state, states

SMALL = dict(short_side=32, size=32, frames=4, ways=3, queries=1, episodes=6, precision="fp32", validate_every=0, protocol="last", test_queries=1, test_shots=(1,), test_episodes=20)


@pytest.fixture(scope="module")
def base(tiny_motions, tmp_path_factory):
    return Config(dataset=str(tiny_motions), store=str(tmp_path_factory.mktemp("sweeps") / "store"), **SMALL)


@pytest.fixture(scope="module")
def jobs(base): return grid(base, {"method": ["protonet", "otam"], "seed": [0, 1]})


@pytest.fixture(scope="module")
def done(jobs, tmp_path_factory):
    "The sweep once, in this process."
    out = tmp_path_factory.mktemp("done")
    return out, run_sweep(jobs, out, progress=False)


def toml(path: Path, base: Config, text: str) -> Path:
    "A sweep's file on the tiny data."
    lines = [f"{k} = {json.dumps(list(v) if isinstance(v, tuple) else v)}" for k, v in {**SMALL, "dataset": base.dataset, "store": base.store}.items()]
    path.write_text("[base]\n" + "\n".join(lines) + "\n" + textwrap.dedent(text))
    return path


def outcomes(out: Path) -> dict:
    "Answers and weights of all finished runs."
    records = {f.stem: read_json(f) for f in sorted((out / "results").glob("*.json"))}
    return {name: r.get("weights") or r.get("correct") for name, r in records.items() if r.get("status", "finished") == "finished"}


# grids

def test_a_grid_is_every_combination_once(base):
    jobs = grid(base, {"method": ["otam", "molo"], "frames": [2, 4], "seed": [0, 5]}, [{"method": "otam", "frames": 4}, {"label": "long", "episodes": 99}])
    assert [j.name for j in jobs] == [f"{m}-frames{t}-{s}" for m in ("otam", "molo") for t in (2, 4) for s in (0, 5)] + ["long-0"]   # the fifth otam is the third
    assert jobs[5].config == base.replace(method="molo", frames=2, seed=5) and jobs[-1].config.episodes == 99


def test_labels_are_file_names(base):
    jobs = grid(base, {"options": [["lam=0.1"], ["lam=0.5", "cosine_eps=0.01"]], "lr": [1e-3, 2e-3]})
    assert [j.label for j in jobs] == ["lam_0.1-lr0.001", "lam_0.1-lr0.002", "lam_0.5+cosine_eps_0.01-lr0.001", "lam_0.5+cosine_eps_0.01-lr0.002"]


@pytest.mark.parametrize("over, runs, words", [({"metod": ["otam"]}, (), "Did you mean 'method'"), ({"lr": 0.1}, (), "a list of values for 'lr'"), ({"lr": []}, (), "a list of values"), ({"method": "otam"}, (), "a list of values"),
                                               ({}, (), "at least one run"), ({}, [{"label": "a b"}], "cannot be a file's name"), ({}, [{"label": "a", "lr": 0.1}, {"label": "A"}], "two runs have the label"), ({"lr": [-1.0]}, (), "between")])
def test_wrong_grids(base, over, runs, words):
    with pytest.raises(FsarError, match=words): grid(base, over, runs)


@pytest.mark.parametrize("text, words", [("[gird]\nlr = [1]", "table 'gird'. Did you mean 'grid'"), ("[base", "is not valid TOML"), ("[base]\nwys = 3\n[grid]\nlr = [0.1]", "s.toml: unknown configuration key 'wys'"), ("", "at least one run")])
def test_wrong_files(tmp_path, text, words):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(FsarError, match=words): read_sweep(tmp_path / "s.toml")
    with pytest.raises(FsarError, match="no such sweep"): read_sweep(tmp_path / "other.toml")


# what is found before anything runs

@pytest.mark.parametrize("change, words", [(dict(test_ways=(21,)), "run x-0: split 'test' has 5 classes, 21-way episodes need 21"), (dict(method="otamm"), "run x-0: unknown method 'otamm'"), (dict(backbone="resnet19"), "run x-0: unknown backbone"),
                                           (dict(options=("lamb=1",)), "run x-0: .*no option 'lamb'"), (dict(test_shots=(50,)), "run x-0: .*50")])
def test_impossible_runs_are_named_first(base, jobs, tmp_path, change, words):
    with pytest.raises(FsarError, match=words): run_sweep([jobs[0], Job("x", base.replace(**change))], tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "results").exists()


def test_a_train_run_with_too_many_ways_stops_before_training(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fsar.engine.training.run_step", lambda *_: pytest.fail("it trained"))
    with pytest.raises(FsarError, match="21-way episodes need 21"): protocol.model_for(base.replace(test_ways=(3, 21)), prepare_data(base, progress=False))


@pytest.mark.parametrize("wrong, words", [(dict(processes=0), "must be at least 1"), (dict(cluster="auto", processes=2), "leave --processes out"), (dict(gpus=-1.0), "cannot ask for")])
def test_wrong_workers(wrong, words):
    with pytest.raises(FsarError, match=words): Workers(**wrong)


# several numbers of ways

def test_tests_with_several_ways(base):
    data = prepare_data(base, progress=False)
    asked = protocol.tables_of(base.replace(test_ways=(2, 5), test_shots=(1, 2)), data)
    assert [(t.info["ways"], t.info["shots"][0]) for t in asked.tables] == [(2, 1), (2, 2), (5, 1), (5, 2)] and set(sweeps.tables_by_name(asked)) >= {"test-2-way-1-shot", "test-5-way-2-shot"}
    assert protocol.tables_of(base.replace(test_ways=(3,)), data).tables[0].hash == protocol.tables_of(base, data).tables[0].hash
    with pytest.raises(FsarError, match="'test_ways' must be numbers from 1 up"): base.replace(test_ways=(0,))


# one sweep

def test_the_sweep_and_its_table(done, jobs):
    out, found = done
    table = pd.read_csv(out / "results.csv")
    assert found["states"] == {"finished": 4} and found["sound"] and list(states(out, jobs)["state"]) == ["finished"] * 4
    assert set(table["run"]) == {j.name for j in jobs} and set(table["test"]) == {"3-way 1-shot", "time-reversed pairs"} and len(table) == 8
    for line in table.to_dict("records"):
        test = "test-2-way-1-shot-reversed" if "pairs" in line["test"] else "test-3-way-1-shot"
        assert line["accuracy"] == pytest.approx(read_json(out / "results" / f"{line['run']}-{test}.json")["accuracy"]) and line["method"] == line["label"]
    assert "lr" not in table and not table.isna().drop(columns=["sampler", "options"]).any().any()       # constants stay out


def test_parquet_says_what_it_needs(done, jobs):
    try: import pyarrow  # noqa: F401
    except ImportError:
        with pytest.raises(FsarError, match="pip install pyarrow"): sweeps.write_results(done[0], jobs, parquet=True)
        assert not (done[0] / "results.parquet").exists()
    else: assert len(pd.read_parquet(sweeps.write_results(done[0], jobs, parquet=True))) == 8


def test_again_runs_nothing(done, jobs, monkeypatch):
    monkeypatch.setattr(sweeps, "run_job", lambda *_: pytest.fail("it ran"))
    assert run_sweep(jobs, done[0], progress=False)["states"] == {"finished": 4}


def test_a_report_is_no_place_for_a_sweep(done, jobs, tmp_path):
    write_json(tmp_path / "run.json", {})
    with pytest.raises(FsarError, match="holds a report"): run_sweep(jobs, tmp_path, progress=False)


def test_runs_on_different_data_are_one_sweep(base, tmp_path):
    jobs = grid(base, {"short_side": [32, 40]}, [{"label": "wide", "test_ways": [2, 3]}])
    jobs = [Job(j.label, j.config.replace(store=str(tmp_path / f"store{j.config.short_side}"))) for j in jobs]
    assert run_sweep(jobs, tmp_path / "out", progress=False)["sound"]
    data = {j.label: read_json(tmp_path / "out" / "results" / f"{j.name}.json")["data"] for j in jobs}
    assert data["short_side32"] == data["wide"] != data["short_side40"]


# what others have computed

def test_equal_runs_are_taken_over(done, jobs, base, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "run_job", lambda *_: pytest.fail("it ran"))
    renamed = [Job(f"my-{j.label}", j.config.replace(out="elsewhere")) for j in jobs]
    run_sweep(renamed, tmp_path / "new", reuse=[done[0]], progress=False)
    assert {k.removeprefix("my-"): v for k, v in outcomes(tmp_path / "new").items()} == outcomes(done[0])
    assert list(states(tmp_path / "new", renamed)["note"]) == [f"taken from {os.path.relpath(done[0], tmp_path / 'new')}"] * 4
    assert sweeps.weights_of(tmp_path / "new", renamed[0]).resolve() == (done[0] / "checkpoints" / jobs[0].name / "last").resolve()


def test_equal_trainings_are_tested_and_not_trained(done, jobs, tmp_path, monkeypatch):
    monkeypatch.setattr("fsar.engine.training.run_step", lambda *_: pytest.fail("it trained"))
    others = [Job(j.label, j.config.replace(test_shots=(2,))) for j in jobs[:2]]
    run_sweep(others, tmp_path / "new", reuse=[done[0]], progress=False)
    assert {n: o for n, o in outcomes(tmp_path / "new").items() if n in ("protonet-0", "protonet-1")} == {n: o for n, o in outcomes(done[0]).items() if n in ("protonet-0", "protonet-1")}   # weights


def test_what_differs_is_not_taken_over(done, jobs, base, tmp_path):
    data = prepare_data(base, progress=False)
    for changed in (base.replace(lr=0.5), base.replace(method="bimhm"), base.replace(seed=7)):
        task = PreparedJob(Job("protonet", changed), data, protocol.tables_of(changed, data), tmp_path / "checkpoints")
        assert sweeps.take_over(tmp_path, task, sweeps.finished_records([done[0]])) is task
    record = dict(sweeps.finished_records([done[0]])[0][1], data="other frames")
    task = PreparedJob(jobs[0], data, protocol.tables_of(base, data), tmp_path / "checkpoints")
    assert sweeps.take_over(tmp_path, task, [(tmp_path / "nowhere", record)]) is task
    with pytest.raises(FsarError, match="holds no runs to take over"): sweeps.finished_records([tmp_path])


def test_weights_that_are_gone_are_named(done, jobs, tmp_path):
    import shutil
    shutil.copytree(done[0] / "results", tmp_path / "results")
    with pytest.raises(FsarError, match="weights of the run protonet-0 are not in"): sweeps.weights_of(tmp_path, jobs[0])


# failures and ends

def test_one_fails_and_the_rest_go_on(base, tmp_path, capsys):
    file = toml(tmp_path / "s.toml", base, """
        [grid]
        method = ["protonet", "otam"]
        [[runs]]
        label = "hot"
        method = "bimhm"
        options = ["scale=1e39"]
        """)
    assert cli.main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "2 finished, 1 failed" in said and "not finite" in said and str(tmp_path / "out" / "results.csv") in said
    record = read_json(tmp_path / "out" / "results" / "hot-0.json")
    assert record["status"] == "failed" and "Traceback" in record["traceback"] and set(pd.read_csv(tmp_path / "out" / "results.csv")["label"]) == {"protonet", "otam"}
    assert cli.main(["sweep", str(file), "--out", str(tmp_path / "out"), "--status", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["states"] == {"finished": 2, "failed": 1}


def test_the_command_line_refuses(base, tmp_path, capsys):
    file = toml(tmp_path / "s.toml", base, "[grid]\nseed = [0]\n")
    for words, said in ((["sweep", str(tmp_path / "no.toml"), "--out", "x"], "no such sweep"), (["sweep", str(file), "--out", str(tmp_path / "o"), "--reuse", str(tmp_path)], "holds no runs to take over"),
                        (["sweep", str(file), "--out", str(tmp_path / "o"), "--cluster", "auto", "--processes", "2"], "leave --processes out")):
        assert cli.main(words) == 2 and said in capsys.readouterr().err


def test_a_dead_cluster_is_an_error(base, tmp_path, capsys):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'fsar[cluster]'")
    file = toml(tmp_path / "s.toml", base, "[grid]\nseed = [0]\n")
    assert cli.main(["sweep", str(file), "--out", str(tmp_path / "o"), "--cluster", "127.0.0.1:1"]) == 2
    assert "nothing answers at the address 127.0.0.1:1" in capsys.readouterr().err


def test_states_without_their_process(jobs, tmp_path):
    (tmp_path / "results").mkdir()
    assert state(tmp_path, jobs[0]) == "waiting"
    sweeps.record_start(jobs[0], tmp_path)
    assert state(tmp_path, jobs[0]) == "running"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    file = sweeps.record_file(tmp_path, jobs[0])
    write_json(file, read_json(file) | {"process": ended.pid})
    assert state(tmp_path, jobs[0]) == "stopped" and list(states(tmp_path, jobs[:1])["episodes"]) == ["0 of 6"]


def test_the_bar_counts_episodes(jobs, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("FSAR_QUIET", raising=False)
    for folder in ("results", f"checkpoints/{jobs[0].name}"): (tmp_path / folder).mkdir(parents=True)
    sweeps.record_start(jobs[0], tmp_path)
    (sweeps.checkpoints(tmp_path, jobs[0]) / "log.csv").write_text("step,episodes,loss\n1,2,0.5\n2,4,0.4\n")
    with sweeps.watch(tmp_path, jobs, True) as say: say("a line")
    said = capfd.readouterr().err
    assert "4/24" in said and "1 running, 3 waiting" in said and "a line" in said


@pytest.mark.timeout(300)
def test_killed_and_started_again_it_repeats_nothing(done, jobs, base, tmp_path):
    file = toml(tmp_path / "s.toml", base, '[grid]\nmethod = ["protonet", "otam"]\nseed = [0, 1]\n')
    out = tmp_path / "out"
    call = [sys.executable, "-m", "fsar", "sweep", str(file), "--out", str(out)]
    first = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    def finished(): return [j for j in jobs if sweeps.finished_record(out, j)]
    while len(finished()) < 2 and first.poll() is None: time.sleep(0.02)
    first.kill()
    first.wait()
    before = {p: p.stat().st_mtime_ns for j in finished() for p in out.rglob(f"{j.name}*") if p.is_file()}
    assert before
    assert subprocess.run(call, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before and outcomes(out) == outcomes(done[0])
