"Studies: rows and recipes fit their templates, gains and curves against hand-made numbers, and small studies from the command line to the page."
import shlex

import nbformat
import numpy as np
import papermill
import pytest

from fsar.cli import main as cli
from fsar.experiments import comparison, rows as experiments_rows, studies
from fsar.reports import notebooks
from fsar.experiments.rows import parse_rows
from fsar.engine.results import Result, summarise_seeds
from fsar.core.basics import FsarError
from fsar.core.files import read_json, resource
from fsar.model.registry import create_model
from fsar.experiments.studies import STUDIES, base_of

PARTS = ["ablation_molo", "ablation_strm", "ablation_vim"]
TINY = ["--short-side", "32", "--size", "32", "--frames", "4", "--episodes", "2", "--queries", "1", "--test-episodes", "20", "--test-queries", "1", "--precision", "fp32", "--seeds", "0", "1"]


# every study

@pytest.mark.parametrize("name", sorted(STUDIES))
def test_rows_exist_and_the_template_has_the_studys_parameters(name):
    study, base, path = STUDIES[name], base_of(name), resource("templates") / f"{name}.ipynb"
    rows = parse_rows(study.rows)
    assert experiments_rows.reference_of(rows, study.reference) == (study.reference or rows[0].label)
    for job in experiments_rows.jobs_of(base, rows, [0]): create_model(job.config.method, backbone=job.config.backbone, frames=job.config.frames, options=job.config.options, sampler=job.config.sampler)
    given = comparison.parameters(base, runs=[], seeds=[0, 1, 2], reference=study.reference, overwrite=False, **study.own)
    notebooks.check_template(path, given)
    cell = next(c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", ()))
    values: dict = {}
    exec(cell.source, values)
    for key, value in given.items(): assert values[key] == (list(value) if isinstance(value, tuple) else value), key
    assert all(p["help"] for p in papermill.inspect_notebook(str(path)).values()) and "skip_exec: true" in nbformat.read(path, 4).cells[0].source


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_the_command_means_the_study(name):
    "Parsed again, a study's command gives its configuration."
    base, rows = base_of(name, lr=0.5, flip=True, test_shots=(1, 3), out="reports/my own"), parse_rows(STUDIES[name].rows)
    made = cli.parse(shlex.split(studies.study_command(name, base, rows, [4], reference=STUDIES[name].reference, processes=2, **STUDIES[name].own))[1:])
    given = {k: v for g in (made.data, made.episodes, made.model, made.training, made.testing) for k, v in vars(g).items() if v is not None}
    assert base_of(name, out=made.out, **given) == base and made.seeds == (4,) and made.computing.processes == 2 and made.runs == () and made.levels == ()


def test_molo_rows_have_the_parts_that_they_name():
    for row in parse_rows(STUDIES["ablation_molo"].rows):
        model = create_model(row.method, backbone="resnet_micro", options=row.options)
        assert studies.parts_of(row.label) == {p for p, on in (("B", "base" in model.branches), ("M", "motion" in model.branches), ("LG", model.long_short), ("AD", model.decoder is not None)) if on}


def test_strm_and_vim_rows_have_the_parts_that_they_name():
    for row in parse_rows(STUDIES["ablation_strm"].rows):
        model = create_model(row.method, backbone="resnet_micro", options=row.options)
        assert studies.parts_of(row.label) - {"TRM"} == {p for p, on in (("FLE", model.frame), ("PLE", model.patch), ("QC", model.query_class)) if on is not None}
    for row in parse_rows(STUDIES["ablation_vim"].rows):
        model = create_model(row.method, backbone="resnet_micro", options=row.options, sampler=row.sampler)
        sampler = getattr(model, "sampler", None)
        found = {p for p, on in (("TS", "select"), ("SA", "amplify")) if sampler is not None and getattr(sampler, on)} | ({"ada"} if sampler is not None and sampler.learner is not None else set())
        assert studies.parts_of(row.label) - {"align", "rearrange"} == found and ("align" in studies.parts_of(row.label)) == (row.method in ("ta2n", "vim"))


# numbers by hand

def result(correct, ways=5, shots=1):
    correct = np.array(correct, float)
    return Result(float(correct.mean()), 0.0, correct, {}, np.zeros((1, 1), np.int64), ("a",), "test", len(correct), ways, shots, 4, 0, f"{ways}-{shots}")


def test_gains_are_differences_of_rows_one_part_apart():
    assert studies.steps(["none", "A", "B", "A+B", "A+B+C+D"]) == [("A", "none", "A"), ("B", "none", "B"), ("B", "A", "A+B"), ("A", "B", "A+B")]
    found = {label: {s: ({}, {"test-5-way-1-shot": result(np.array(c) + 0.01 * s)}) for s in (0, 1)} for label, c in (("B", [0.2, 0.4, 0.3]), ("LG+B", [0.4, 0.6, 0.5]))}
    only, = studies.gains(found, "molo ablation")
    assert only["part"] == "LG" and only["difference"] == pytest.approx(0.2) and only["ci95_episodes"] == pytest.approx(0) and only["published"] == pytest.approx(0.076)
    assert studies.gains(found | {"LG+B": {}})== []
    assert "**LG**, 5-way 1-shot: +20.0 points, outside the noise; published: +7.6." == studies.part_sentences([only])[0]


def test_agreement_is_a_rank_correlation():
    printed = studies.printed_numbers("molo ablation")
    def metrics(value): return {"rows": {label: {"results": [{"task": "5-way 1-shot", "ways": 5, "shots": 1, "accuracy": value(p)}]} for (label, ways, shots), p in printed.items() if shots == 1}}
    assert studies.agreement(metrics(lambda p: p ** 3), "molo ablation")["5-way 1-shot"] == pytest.approx(1) and studies.agreement(metrics(lambda p: -p), "molo ablation")["5-way 1-shot"] == pytest.approx(-1)
    assert "The order agrees." in studies.agreement_sentence({"a": 0.9}) and "does not agree" in studies.agreement_sentence({"a": -0.2}) and "in part" in studies.agreement_sentence({"a": 0.9, "b": 0.2}) and studies.agreement_sentence({}) == ""


def test_curves_say_what_is_inside_the_noise():
    def at(x, *seeds): return studies.point("otam", x, "1-shot", summarise_seeds([result(s) for s in seeds]))
    flat = [at(5, [0.5, 0.6, 0.4], [0.6, 0.6, 0.4]), at(6, [0.5, 0.5, 0.4], [0.6, 0.6, 0.4])]
    steep = [at(5, [0.9, 0.9, 0.91], [0.9, 0.9, 0.91]), at(10, [0.2, 0.2, 0.21], [0.2, 0.2, 0.21])]
    assert "inside the noise" in studies.curve_sentences(flat, "ways")[0] and "−70.0, outside the noise" in studies.curve_sentences(steep, "ways")[0]
    table = studies.curve_table(steep, "N =")
    assert list(table.columns) == ["method", "N = 5", "N = 10"] and table.loc[0, "N = 10"].startswith("20.3")


@pytest.mark.parametrize("call, words", [(dict(name="ablation_mollo"), "Did you mean 'ablation_molo'"), (dict(name="n_way", own={"levels": [0, 1]}), "no setting 'levels'"), (dict(name="misalignment", dataset="hmdb51"), "is a dial of the rendered motions"),
                                         (dict(name="misalignment", own={"levels": [0, 2]}), "from 0 to 1"), (dict(name="frames", frame=4), "Did you mean 'frames'"), (dict(name="frames", runs=["otam config.ways=3"]), "cannot be a row's own"),
                                         (dict(name="frames", reference="otam"), "is not a row"), (dict(name="frames", how={"processes": 0}), "at least 1")])
def test_wrong_studies_are_refused_before_anything_runs(call, words, tmp_path):
    with pytest.raises(FsarError, match=words): studies.study(**{"out": str(tmp_path / "out"), **call})
    assert not list(tmp_path.iterdir())


# whole

@pytest.fixture(scope="module")
def flags(tiny_motions, tmp_path_factory): return [*TINY, "--dataset", str(tiny_motions), "--store", str(tmp_path_factory.mktemp("studies") / "store")]


def test_parts_from_the_command_line_to_the_page(flags, tmp_path, capsys):
    out = tmp_path / "strm"
    assert cli.main(["study", "ablation_strm", *flags, "--test-shots", "1", "2", "--out", str(out)]) == 0
    page, metrics = (out / "report.html").read_text(), read_json(out / "metrics.json")
    assert all(words in page for words in ("The question", "What each part adds", "What it does not show", "How to make it again", "inside the noise")) and "Traceback" not in page
    assert {p.name for p in (out / "figures").iterdir()} == {"rows.png", "gains.png", "reversed.png"} and metrics["study"] == "ablation_strm" and [g["part"] for g in metrics["gains"][::3]] == ["FLE", "PLE", "QC"]
    for g in metrics["gains"]:
        a, b = (metrics["rows"][name] for name in g["names"])
        assert g["difference"] == pytest.approx(_accuracy(a, g["task"]) - _accuracy(b, g["task"]))
    assert cli.main(shlex.split(metrics["command"])[1:]) == 0 and "nothing to run" in capsys.readouterr().err


def _accuracy(row, task):
    if "pairs" in task: return row["reversed_pairs"]["accuracy"]
    return next(r for r in row["results"] if r["task"] == task)["accuracy"]


def test_ways_on_the_page_with_the_published_curve(flags, tmp_path):
    out = tmp_path / "ways"
    assert cli.main(["study", "n_way", *flags, "--runs", "protonet", "otam", "--test-ways", "2", "5", "--out", str(out)]) == 0
    page, metrics = (out / "report.html").read_text(), read_json(out / "metrics.json")
    assert [r["ways"] for r in metrics["rows"]["otam"]["results"]] == [2, 5] and {"curve.png", "published.png"} <= {p.name for p in (out / "figures").iterdir()} and "from 2 to 5 ways" in page


def test_own_settings_of_rows_and_the_dial(flags, tmp_path):
    out = tmp_path / "frames"
    assert cli.main(["study", "frames", *flags, "--runs", "otam-T2: otam config.frames=2", "otam-T4: otam config.frames=4", "--reference", "otam-T4", "--out", str(out)]) == 0
    metrics = read_json(out / "metrics.json")
    assert [(p["x"], p["panel"]) for p in studies.points_over("frames", metrics)] == [(x, panel) for x in (2, 4) for panel in ("5-way 1-shot", "5-way 5-shot", "time-reversed pairs")] and metrics["rows"]["otam-T2"]["changes"] == {"frames": 2}
    out = tmp_path / "backbones"
    assert cli.main(["study", "backbones", *flags, "--runs", "small: otam", "mobilenet_v2: otam config.backbone=mobilenet_v2", "--reference", "small", "--seeds", "0", "--test-shots", "1", "--out", str(out)]) == 0
    assert "multiply-adds of a frame" in (out / "report.html").read_text() and "one seed" in (out / "report.html").read_text().lower()


@pytest.mark.slow
def test_the_dial_is_turned_for_every_run_and_kept(tmp_path, monkeypatch):
    flags = [*TINY, "--runs", "protonet", "otam", "--levels", "0", "1", "--test-shots", "1", "--out", str(tmp_path / "dial")]
    assert cli.main(["study", "misalignment", *flags]) == 0
    metrics, kept = read_json(tmp_path / "dial" / "metrics.json"), sorted((tmp_path / "dial" / "results").glob("*-misalignment-*.json"))
    assert len(kept) == 8 and {(p["line"], p["x"]) for p in metrics["points"]} == {(m, x) for m in ("protonet", "otam") for x in (0.0, 1.0)} and len(set(metrics["misalignment_episodes"].values())) == 1   # the same episodes of videos whose action moves
    times = [p.stat().st_mtime_ns for p in kept]
    monkeypatch.setattr(studies, "evaluate_on", lambda *_, **__: pytest.fail("tested again"))
    config = base_of("misalignment", **{k: v for k, v in metrics["config"].items()})
    studies.misaligned(tmp_path / "dial", experiments_rows.jobs_of(config, parse_rows(["protonet", "otam"]), [0, 1]), config, [0, 1], progress=False)
    assert [p.stat().st_mtime_ns for p in kept] == times
