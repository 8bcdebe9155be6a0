"Methods side by side, on a few episodes of the tiny data set: the table against its files, what is reused, resumed, refused; and the sizes of methods."
import dataclasses
import json
import shlex
import typing
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from torch import nn

from fsar.experiments import comparison, protocol, rows as experiments_rows, sweeps
from fsar.engine import results
from fsar.reports import notebooks, side_by_side
from fsar.bench import sizes
from fsar.model import counting
from fsar.engine.results import Difference, Result, difference
from fsar.experiments.rows import Row, parse_row, parse_rows
from fsar.experiments.sweeps import Workers
from fsar.core.config import Config
from fsar.core.basics import FsarError
from fsar.core.files import read_json, resource, write_json
from fsar.data.datasets import prepare_data

TEMPLATE = resource("templates") / "compare.ipynb"
ROWS, SEEDS = ["protonet", "set: bimhm scale=4"], [0, 1]


# rows

@pytest.mark.parametrize("text, row", [("protonet", Row("protonet", "protonet")), ("  molo   redraw=4 ", Row("molo", "molo", ("redraw=4",))),
                                       ("b1: bimhm sums=true scale=1", Row("b1", "bimhm", ("sums=true", "scale=1"))),
                                       ("protonet sampler=vim sampler.dense=16", Row("vim-protonet", "protonet", ("sampler.dense=16",), "vim")),
                                       ("molo path=a:b", Row("molo", "molo", ("path=a:b",)))])
def test_a_row_is_read(text, row): assert parse_row(text) == row


@pytest.mark.parametrize("rows, words", [(["protonett"], "Did you mean 'protonet'"), (["molo redrw=4"], "no option 'redrw'. Did you mean 'redraw'"), (["molo redraw=four"], "whole number"),
                                         (["molo redraw"], "must be written key=value"), (["protonet sampler=vom"], "unknown sampler 'vom'"), (["protonet sampler.a=1"], "needs a sampler"),
                                         (["otam", "otam lam=1"], "two rows have the label 'otam'"), (["A: otam", "a: bimhm"], "two rows have the label 'a'"), (["a b: otam"], "cannot be a file's name"),
                                         (["../a: otam"], "cannot be a file's name"), (["lam=1"], "names no method"), (["x:"], "names no method"), (["otam sampler=a sampler=b"], "two samplers"), ([], "at least one row")])
def test_wrong_rows_are_refused_before_anything_runs(rows, words, tmp_path):
    with pytest.raises(FsarError, match=words): comparison.compare_methods(Config(out=str(tmp_path / "out")), rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extra, words", [(dict(seeds=[0, 0]), "is given twice"), (dict(seeds=[]), "at least one seed"), (dict(seeds=[-1]), "'seed' must be at least 0"), (dict(reference="otm"), "Did you mean 'otam'"),
                                          (dict(processes=0), "must be at least 1"), (dict(threads=0), "must be at least 1")])
def test_wrong_settings_are_refused_before_anything_runs(extra, words, tmp_path):
    with pytest.raises(FsarError, match=words): comparison.compare_methods(Config(out=str(tmp_path / "out")), ["otam", "bimhm"], **extra)
    assert not list(tmp_path.iterdir())


# the template

def test_the_parameters_cell_is_the_base_and_what_only_a_comparison_has():
    extra = dict(runs=[], seeds=[0, 1, 2], reference="", **experiments_rows.HOW, overwrite=False)
    notebooks.check_template(TEMPLATE, comparison.parameters(Config(), **extra))
    cell = next(c for c in nbformat.read(TEMPLATE, 4).cells if "parameters" in c.metadata.get("tags", ()))
    values: dict = {}
    exec(cell.source, values)
    defaults = {**Config().to_dict(), **extra, "out": "reports/methods"}
    hints = typing.get_type_hints(Config)
    for name in [*experiments_rows.BASE, *extra]:
        assert values[name] == defaults[name], name
        if name in hints: assert values["__annotations__"][name] == {tuple: list}.get(typing.get_origin(hints[name]), str if typing.get_origin(hints[name]) is typing.Literal else hints[name]) or typing.get_origin(values["__annotations__"][name]) is list, name
    assert all(p["help"] for p in papermill.inspect_notebook(str(TEMPLATE)).values())
    first = nbformat.read(TEMPLATE, 4).cells[0].source
    assert "skip_exec: true" in first and "skip_exec: true" in nbformat.read(resource("templates") / "sizes.ipynb", 4).cells[0].source


def test_the_command_makes_the_comparison_again():
    from fsar.cli.main import parse
    base = Config(dataset="motions", episodes=7, protocol="last", flip=True, out="reports/my methods")
    rows = parse_rows(["protonet", "plain molo".replace(" ", "-") + ": molo redraw=4 motion=false", "otam"])
    text = comparison.command(base, rows, [3, 4], reference="otam", processes=2, threads=3)
    made = parse(shlex.split(text)[1:])
    assert made.config(out=made.out) == base and parse_rows(made.runs) == rows
    assert (made.seeds, made.reference, made.computing.processes, made.computing.threads, made.overwrite) == ((3, 4), "otam", 2, 3, False)


# numbers, by hand

def result(correct, table="t", seed=0):
    correct = np.array(correct, float)
    return Result(float(correct.mean()), 0.0, correct, {}, np.zeros((1, 1), np.int64), ("a",), "test", len(correct), 2, 1, 4, seed, table)


@pytest.mark.parametrize("freedom, quantile", [(1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (9, 2.2621572), (30, 2.0422725)])
def test_quantiles_of_t(freedom, quantile): assert results.t_quantile(freedom) == pytest.approx(quantile, rel=1e-6)


def test_a_difference_by_hand():
    a, b = {0: result([1, 1, 0.5]), 1: result([1, 0.5, 0.5]), 7: result([0, 0, 0])}, {1: result([0.5, 0.5, 0]), 0: result([0.5, 0.25, 0.5]), 8: result([1, 1, 1])}
    d = difference(a, b, ("a", "b"))                      # seeds 0 and 1, whatever their order: d = [[.5, .75, 0], [.5, 0, .5]]
    episodes, seeds = np.array([0.5, 0.375, 0.25]), np.array([1.25 / 3, 1 / 3])
    assert (d.seeds, d.episodes) == (2, 3) and d.difference == pytest.approx(0.375)
    assert d.ci95_episodes == pytest.approx(1.96 * episodes.std(ddof=1) / 3 ** 0.5) and d.ci95_seeds == pytest.approx(12.7062047 * seeds.std(ddof=1) / 2 ** 0.5)
    assert difference(a, {8: b[8]}, ("a", "b")) is None
    with pytest.raises(FsarError, match="different episodes"): difference({0: a[0]}, {0: result([1, 1, 1], "u")}, ("a", "b"))


@pytest.mark.parametrize("value, episodes, seeds, differs", [(0.02, 0.01, 0.015, True), (0.02, 0.01, 0.03, False), (0.02, 0.03, 0.01, False), (-0.02, 0.01, 0.01, True), (0.02, 0.01, None, True), (0.0, 0.0, 0.0, False)])
def test_the_larger_interval_decides(value, episodes, seeds, differs):
    d = Difference(("new", "old"), value, episodes, seeds, 1 if seeds is None else 3, 100)
    assert d.differs is differs and ("inside the noise" in str(d)) is not differs
    if differs: assert f"{'new' if value > 0 else 'old'} is better on these videos" in str(d) and ("one training" in str(d)) is (seeds is None)


def test_rows_of_other_episodes_have_no_mean():
    with pytest.raises(FsarError, match="different episodes"): results.summarise_seeds([result([1, 0]), result([1, 0], "u")])
    assert results.summarise_seeds([result([1, 0])])["std"] is None


# one comparison

@pytest.fixture(scope="module")
def base(tiny_motions, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    return Config(dataset=str(tiny_motions), store=str(out / "store"), short_side=32, size=32, frames=4, queries=1, episodes=6, precision="fp32", validate_every=0, protocol="last", test_queries=2,
                  test_shots=(1, 2), test_episodes=40, out=str(out / "methods"))


@pytest.fixture(scope="module")
def data(base): return prepare_data(base, progress=False)


@pytest.fixture(scope="module")
def asked(base, data): return protocol.tables_of(base, data)


@pytest.fixture(scope="module")
def flags(base):
    words = ["compare", "--runs", *ROWS, "--seeds", "0", "1"]
    for name, value in base.to_dict().items():
        if name in experiments_rows.BASE and value != Config().to_dict()[name]: words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    return words


@pytest.fixture(scope="module")
def made(base, flags):
    "The whole of it once, from the command line."
    from fsar.cli import main as cli
    assert cli.main(flags) == 0
    return Path(base.out)


def copied(made, tmp_path, base):
    import shutil
    shutil.copytree(made, tmp_path / "out")
    return base.replace(out=str(tmp_path / "out"))


def times(out): return {p.relative_to(out): p.stat().st_mtime_ns for folder in ("results", "checkpoints") for p in (out / folder).rglob("*") if p.is_file()}


def test_the_report_is_whole(made, flags, says_its_origin):
    from fsar.cli.main import parse
    page, metrics = (made / "report.html").read_text(), read_json(made / "metrics.json")
    assert {p.name for p in (made / "figures").iterdir()} == {"methods.png", "reversed.png", "differences.png"}
    assert all(words in page for words in ("What this shows and what it does not", "The direction of time", "Differences to protonet", "never met", metrics["differences"][0]["verdict"]))
    assert "Traceback" not in page and str(made) not in page.replace(metrics["command"].split("--out ")[1], "").replace(metrics["config"]["out"], "")
    says_its_origin(metrics, made, "videos and split", "prepared frames", "episodes")
    command = parse(shlex.split(metrics["command"])[1:])
    assert command.config(out=command.out).hash == parse(flags).config(out=str(made)).hash and parse_rows(command.runs) == parse_rows(ROWS)
    assert set(metrics["trainings"]) == {"protonet-0", "protonet-1", "set-0", "set-1"} and metrics["versions"]["torch"] in torch.__version__
    for name, run in metrics["trainings"].items():
        from fsar.core.files import sha256_file
        assert run["weights"] == sha256_file(made / "checkpoints" / name / "last" / "model.safetensors")


def test_the_table_is_its_files(made):
    metrics = read_json(made / "metrics.json")
    def read(label, test): return np.array([read_json(made / "results" / f"{label}-{seed}-{test}.json")["correct"] for seed in SEEDS])
    for label in ("protonet", "set"):
        row = metrics["rows"][label]
        for r, test in zip([*row["results"], row["reversed_pairs"]], ("test-5-way-1-shot", "test-5-way-2-shot", "test-2-way-1-shot-reversed")):
            correct = read(label, test)
            assert correct.shape == (2, 40) and r["accuracy"] == pytest.approx(correct.mean()) and r["std"] == pytest.approx(correct.mean(1).std(ddof=1))
            assert r["ci95"] == pytest.approx(1.96 * correct.mean(0).std(ddof=1) / 40 ** 0.5) and r["per_seed"] == pytest.approx(correct.mean(1).tolist())
        state = [read_json(made / "checkpoints" / f"{label}-{seed}" / "last" / "model.json")["training"]["progress"]["seconds"] for seed in SEEDS]
        assert row["training_seconds"] == pytest.approx(np.mean(state), abs=0.06) and row["seeds"] == SEEDS and not row["failed"]
    for d, test in zip(metrics["differences"], ("test-5-way-1-shot", "test-5-way-2-shot", "test-2-way-1-shot-reversed")):
        gap = read("set", test) - read("protonet", test)
        assert d["names"] == ["set", "protonet"] and d["difference"] == pytest.approx(gap.mean()) and d["ci95_episodes"] == pytest.approx(1.96 * gap.mean(0).std(ddof=1) / 40 ** 0.5)
        assert d["ci95_seeds"] == pytest.approx(12.7062047 * gap.mean(1).std(ddof=1) / 2 ** 0.5)
    assert metrics["reference"] == "protonet" and len(metrics["differences"]) == 3


def test_all_answered_the_same_episodes(made, asked):
    hashes = {name: table.hash for name, table in sweeps.tables_by_name(asked).items()}
    assert all(read_json(made / "results" / f"{name}.json")["episodes"] == hashes for name in read_json(made / "metrics.json")["trainings"])


def test_the_same_command_reuses_everything(made, flags, capsys):
    from fsar.cli import main as cli
    before, page = times(made), (made / "report.html").stat().st_mtime_ns
    assert cli.main([*flags, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["headline"] == read_json(made / "metrics.json")["headline"] and "nothing to run" in told.err
    assert times(made) == before and (made / "report.html").stat().st_mtime_ns == page


def test_more_seeds_and_rows_run_only_what_is_missing(made, tmp_path, base, data, asked):
    grown = copied(made, tmp_path, base)
    rows, out = parse_rows([*ROWS, "otam"]), Path(grown.out)
    before = times(out)
    assert not comparison.is_finished(out, grown, experiments_rows.jobs_of(grown, rows, [0]), {"runs": [*ROWS, "otam"], "seeds": [0], "reference": ""})
    sweeps.run_jobs(experiments_rows.jobs_of(grown, rows, [0]), data, asked, out, progress=False)
    after = times(out)
    assert {k: v for k, v in after.items() if k in before} == before and {k.parts[1] for k in after if k not in before and k.parts[0] == "checkpoints"} == {"otam-0"}


def test_a_finished_training_is_only_tested(made, tmp_path, base, data, asked, monkeypatch):
    again, job = copied(made, tmp_path, base), None
    out = Path(again.out)
    for file in (out / "results").iterdir(): file.unlink()
    monkeypatch.setattr("fsar.engine.training.run_step", lambda *_: pytest.fail("it trained"))
    jobs = experiments_rows.jobs_of(again, parse_rows(ROWS), SEEDS)
    sweeps.run_jobs(jobs, data, asked, out, progress=False)
    for job in jobs:
        for name in sweeps.tables_by_name(asked): assert read_json(out / "results" / f"{job.name}-{name}.json") == read_json(made / "results" / f"{job.name}-{name}.json")


def test_two_processes_give_the_same_numbers(made, tmp_path, base, data, asked, capfd):
    both = base.replace(out=str(tmp_path / "both"))
    jobs = experiments_rows.jobs_of(both, parse_rows(ROWS), [1])
    sweeps.run_jobs(jobs, data, asked, both.out, workers=Workers(processes=2))
    for job in jobs:
        for name in sweeps.tables_by_name(asked): assert read_json(tmp_path / "both" / "results" / f"{job.name}-{name}.json") == read_json(made / "results" / f"{job.name}-{name}.json")
        assert read_json(tmp_path / "both" / "results" / f"{job.name}.json")["weights"] == read_json(made / "results" / f"{job.name}.json")["weights"]
    said = capfd.readouterr().err
    assert all(f"{job.name}: 5-way 1-shot " in said for job in jobs)


def test_an_interrupted_training_goes_on_to_the_same_numbers(made, tmp_path, base, data, asked, monkeypatch):
    from fsar.engine import training
    cut = base.replace(out=str(tmp_path / "cut"))
    out, jobs, steps, whole = tmp_path / "cut", experiments_rows.jobs_of(cut, parse_rows(ROWS[:1]), [0]), [], training.run_step
    def step(run, batches, number):
        steps.append(number)
        if number == 3 and steps.count(3) == 1: raise KeyboardInterrupt
        return whole(run, batches, number)
    monkeypatch.setattr(training, "run_step", step)
    monkeypatch.setattr(training, "is_due", lambda *_: False)
    monkeypatch.setattr(training.time, "monotonic", iter(range(0, 10**6, 40)).__next__)   # a save after every step
    with pytest.raises(KeyboardInterrupt): sweeps.run_jobs(jobs, data, asked, out, progress=False)
    assert sweeps.state(out, jobs[0]) == "running" and not sweeps.finished_record(out, jobs[0])
    sweeps.run_jobs(jobs, data, asked, out, progress=False)
    assert steps == [0, 1, 2, 3, 3, 4, 5]
    assert read_json(out / "results" / "protonet-0.json")["weights"] == read_json(made / "results" / "protonet-0.json")["weights"]


def test_a_failing_row_is_named_and_the_rest_finish(tmp_path, base, data, asked):
    some = base.replace(out=str(tmp_path / "some"), episodes=2)
    rows = parse_rows(["protonet", "hot: bimhm scale=1e39"])
    jobs, out = experiments_rows.jobs_of(some, rows, [0]), tmp_path / "some"
    sweeps.run_jobs(jobs, data, asked, out, progress=False)
    record = read_json(out / "results" / "hot-0.json")
    assert record["status"] == "failed" and record["reason"].startswith("training stopped at step 0: not finite") and str(tmp_path) not in json.dumps(record["reason"])
    metrics = comparison.comparison_metrics(some, rows, [0], data)
    assert metrics["rows"]["hot"]["failed"] == [{"seed": 0, "reason": record["reason"]}] and metrics["rows"]["protonet"]["seeds"] == [0]
    assert "1 of 2 runs FAILED" in metrics["headline"] and metrics["differences"] == [] and "hot, seed 0, did not finish" in side_by_side.failures(metrics)[0]
    assert list(side_by_side.answer_table(metrics)["seeds"]) == ["1", "0 of 1"]
    side_by_side.methods_figure(metrics), side_by_side.pairs_figure(metrics), side_by_side.limits(metrics), side_by_side.findings(metrics), side_by_side.question(metrics)
    assert comparison.comparison_metrics(some, rows, [0], data, reference="hot")["differences"] == []
    with pytest.raises(FsarError, match="none of the 1 runs finished; hot-0: training stopped"): comparison.comparison_metrics(some, rows[1:], [0], data)


def test_an_error_of_ours_is_kept_with_its_last_line(tmp_path, base, data, asked, monkeypatch):
    monkeypatch.setattr(sweeps, "run_job", lambda *_: {}["no such key"])
    out = tmp_path / "out"
    sweeps.run_jobs(experiments_rows.jobs_of(base, parse_rows(ROWS), [0]), data, asked, out, progress=False)
    record = read_json(out / "results" / "set-0.json")
    assert record["reason"] == "KeyError: 'no such key'" and "run_job" in record["traceback"]


def test_a_process_that_is_killed_is_one_failed_run(tmp_path, base, data, asked, monkeypatch):
    monkeypatch.setattr(sweeps, "in_processes", lambda work, tasks, processes, threads: iter([(tasks[0], sweeps.exit_text(-9))]))
    job = experiments_rows.jobs_of(base, parse_rows(ROWS[:1]), [0])
    sweeps.run_jobs(job, data, asked, tmp_path, workers=Workers(processes=2), progress=False)
    assert "ended with code -9: killed, perhaps for lack of memory" in read_json(tmp_path / "results" / "protonet-0.json")["reason"]


def test_processes_end_with_whoever_asked():
    import time
    started, asking = time.monotonic(), sweeps.in_processes(time.sleep, [0, 300], 2)
    assert next(asking) == (0, "")
    asking.close()
    assert time.monotonic() - started < 100


# whose is what lies there

def test_what_belongs_to_another_configuration_is_named_and_kept(made, base, flags, capsys):
    from fsar.cli import main as cli
    before = times(made)
    assert cli.main([*flags, "--lr", "0.01"]) == 2
    assert f"{made} holds a comparison under another configuration (lr differ): choose another --out" in capsys.readouterr().err
    jobs = experiments_rows.jobs_of(base.replace(lr=0.01), parse_rows(ROWS), SEEDS)
    with pytest.raises(FsarError, match=r"protonet-0.json belongs to another configuration \(lr differ\)"): sweeps.check_places(made, jobs)
    with pytest.raises(FsarError, match=r"set-0.json belongs to another configuration \(options differ\)"): sweeps.check_places(made, experiments_rows.jobs_of(base, parse_rows(["protonet", "set: bimhm scale=5"]), [0]))
    assert times(made) == before


def test_other_episodes_and_other_trainings_are_no_results(made, tmp_path, base, data, asked):
    moved = copied(made, tmp_path, base)
    out, jobs = Path(moved.out), experiments_rows.jobs_of(moved, parse_rows(ROWS), SEEDS)
    fewer = dataclasses.replace(asked, tables=tuple(t.head(5) for t in asked.tables))
    with pytest.raises(FsarError, match=r"protonet-0.json belongs to another configuration \(test episodes differ\)"): sweeps.check_places(out, jobs, data, fewer)
    (out / "results" / "protonet-0.json").unlink()
    other = experiments_rows.jobs_of(moved.replace(lr=0.01), parse_rows(ROWS[:1]), [0])
    with pytest.raises(FsarError, match=r"checkpoints/protonet-0 belongs to another configuration \(lr differ\)"): sweeps.check_places(out, other, data, asked)
    sweeps.check_places(out, other, data, asked, overwrite=True)
    assert not (out / "checkpoints" / "protonet-0").exists() and (out / "checkpoints" / "protonet-1").exists()
    sweeps.check_places(out, experiments_rows.jobs_of(moved.replace(test_episodes=50), parse_rows(ROWS[1:]), [1]), overwrite=True)   # other tests, the same training
    assert not (out / "results" / "set-1.json").exists() and (out / "checkpoints" / "set-1").exists()


def test_a_training_of_an_earlier_version_is_still_the_same(made, tmp_path, base, data, asked):
    moved = copied(made, tmp_path, base)
    file = Path(moved.out) / "checkpoints" / "protonet-0" / "last" / "model.json"
    record = read_json(file)
    for name in ("groups", "train_size", "sampler"): record["training"]["settings"].pop(name)  # fields that it did not know yet
    write_json(file, record)
    jobs = experiments_rows.jobs_of(moved, parse_rows(ROWS[:1]), [0])
    sweeps.check_places(Path(moved.out), jobs, data, asked)
    record["training"]["settings"]["groups"] = True
    write_json(file, record)
    with pytest.raises(FsarError, match=r"protonet-0 belongs to another configuration \(groups differ\)"): sweeps.check_places(Path(moved.out), jobs, data, asked)


def test_a_result_that_is_not_its_records_is_refused(made, tmp_path, base):
    moved = copied(made, tmp_path, base)
    file = Path(moved.out) / "results" / "set-0-test-5-way-1-shot.json"
    write_json(file, {**read_json(file), "table_hash": "0" * 64})
    with pytest.raises(FsarError, match="set-0-test-5-way-1-shot.json holds answers to other episodes"): comparison.collect(Path(moved.out), experiments_rows.jobs_of(moved, parse_rows(ROWS), SEEDS))


def test_kinds_of_reports_do_not_mix(made, tmp_path, base, capsys):
    from fsar.cli import main as cli
    assert cli.main(["train", "--out", str(made)]) == 2 and "another kind of report" in capsys.readouterr().err
    assert cli.main(["sizes", "--out", str(made)]) == 2 and "another kind of report" in capsys.readouterr().err
    assert cli.main(["test", str(made)]) == 2 and "holds no single training" in capsys.readouterr().err
    assert cli.main(["report", str(made), str(made), "--out", str(tmp_path / "x")]) == 2 and "another kind than a run's" in capsys.readouterr().err
    write_json(tmp_path / "metrics.json", {"training": {}})
    with pytest.raises(FsarError, match="another kind of report"): comparison.compare_methods(base.replace(out=str(tmp_path)), ROWS)
    assert cli.main(["report", str(made), "--json"]) == 0


# sizes

def test_convolutions_and_attention_are_counted_by_hand():
    def counted(module, x): return counting.count(lambda: module(x))[1]
    assert counted(nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.zeros(2, 3, 10, 12)) == 2 * 8 * 5 * 6 * 3 * 9
    assert counted(nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.zeros(1, 8, 6, 6)) == 8 * 36 * 9
    assert counted(nn.Conv3d(4, 2, 3, padding=1), torch.zeros(1, 4, 5, 6, 7)) == 2 * 5 * 6 * 7 * 4 * 27
    assert counted(nn.Linear(7, 5), torch.zeros(3, 7)) == 3 * 5 * 7
    q = torch.zeros(2, 8, 9, 16)
    assert counting.count(lambda: nn.functional.scaled_dot_product_attention(q, q, q))[1] == 2 * 2 * 8 * 9 * 9 * 16
    assert counted(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Softmax(1)), torch.zeros(1, 3, 4, 4)) == 0


def test_protonet_by_hand():
    found = sizes.model_size("protonet", backbone="resnet_micro", size=32, frames=4, ways=3, shots=(2,), queries=7)
    widths = [(3, 32, 16, 9)] + [(32, 32, 16, 9)] * 2 + [(32, 32, 16, 1)] * 0                       # input, output, side, kernel: the stem and an equal block
    widths += [(32, 64, 8, 9), (64, 64, 8, 9), (32, 64, 8, 1), (64, 128, 4, 9), (128, 128, 4, 9), (64, 128, 4, 1), (128, 128, 4, 9), (128, 128, 4, 9)]
    assert found["embed"] == 4 * sum(a * b * side**2 * kernel for a, b, side, kernel in widths)
    assert found["parameters"] == sum(a * b * kernel + 2 * b for a, b, side, kernel in widths)      # and a batch norm behind each
    assert found["score"] == {"2": 3 * 6 * 128 + 7 * 128 * 3} and found["adapt"] == {"2": 0}


@pytest.mark.parametrize("method, sampler", sizes.forms())
def test_shapes_alone_count_what_computing_counts(method, sampler, monkeypatch):
    settings = dict(sampler=sampler, backbone="resnet_micro", size=32, frames=4, ways=2, shots=(1,), queries=3)
    fake = sizes.model_size(method, **settings)
    monkeypatch.setattr(counting, "count_verb", lambda model, verb: counting.count(lambda: verb(model, False)))
    assert sizes.model_size(method, **settings) == fake and fake["embed"] > 0 and fake["score"]["1"] > 0


def test_a_method_that_looks_at_values_is_computed():
    def verb(model, fake):
        x = counting.noise((2, 3), torch.float32, fake)
        return x @ x.mT if x.sum() > 0 else x
    assert counting.count_verb(nn.Identity(), verb)[1] == 2 * 3 * 2


def test_every_form_has_a_row(tmp_path, says_its_origin):
    from fsar.cli import main as cli
    assert cli.main(["sizes", "--backbone", "resnet_micro", "--size", "32", "--frames", "4", "--out", str(tmp_path / "sizes")]) == 0
    metrics, page = read_json(tmp_path / "sizes" / "metrics.json"), (tmp_path / "sizes" / "report.html").read_text()
    says_its_origin(metrics, tmp_path / "sizes")
    assert [(row["method"], row["sampler"]) for row in metrics["sizes"]] == sizes.forms() and (tmp_path / "sizes" / "figures" / "sizes.png").exists()
    for row in metrics["sizes"]: assert counting.amount(row["embed"]) in page and counting.amount(row["score"]["5"]) in page
    write_json(tmp_path / "metrics.json", {"training": {}})
    with pytest.raises(FsarError, match="another kind of report"): sizes.size_report(tmp_path)


@pytest.mark.parametrize("number, text", [(0, "–"), (7, "7"), (999, "999"), (1000, "1.00 k"), (12_345, "12.3 k"), (4_090_000_000, "4.09 G"), (5e15, "5000 T")])
def test_amounts(number, text): assert counting.amount(number) == text


def test_the_published_comparison_beats_chance_by_far_in_every_row():
    "The committed report: every row of it at least 1.75 times chance with one example, three seeds, the same episodes."
    metrics = json.loads((Path(__file__).parents[2] / "reports" / "methods" / "metrics.json").read_text())
    first = {label: row["results"][0] for label, row in metrics["rows"].items()}
    assert {"protonet", "finetune", "otam", "bimhm", "trx", "strm", "molo", "ta2n", "vim", "hyrsm"} <= {row["method"] for row in metrics["rows"].values()}
    assert metrics["seeds"] == [0, 1, 2] and len({r["table_hash"] for r in first.values()}) == 1 and not any(row["failed"] for row in metrics["rows"].values())
    assert {label: r["accuracy"] for label, r in first.items() if min(r["per_seed"]) < 1.75 * r["chance"]} == {}
