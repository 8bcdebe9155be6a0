"Reports made again: equal to the bit, what is found when they are not, what cannot be made here; and the index of all reports."
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

from fsar.cli import main as cli
from fsar.reports import rerun
from fsar.core.basics import FsarError
from fsar.core.files import read_json, write_json
from fsar.reports.rerun import index_text, same_figures

ROOT = Path(__file__).parents[2]


# two files held against each other

STORED = {"headline": "a on b: 61.0 %", "results": [{"accuracy": 0.61, "per_class": {"jump": 0.7, "wave": 0.5}, "confusion": [[7, 3], [5, 5]], "class_names": ["jump", "wave"]}], "reversed_pairs": None, "seeds": [0],
          "config": {"seed": 0, "lr": 0.001, "out": "reports/a", "store": "", "workers": 0}, "hashes": {"weights": "a" * 64, "configuration": "b" * 64}, "command": "fsar train --out reports/a",
          "device": "cpu, 2 cores, 1 threads", "versions": {"torch": "2"}, "git": {"commit": "c" * 40, "dirty": False}, "wall_time_s": 3.0, "peak_memory": {"process_MiB": 9}, "finished": "2026", "training": {"seconds": 2.0, "steps": 4}}


def changed(path, value):
    "A copy of STORED with one place replaced; `del` removes it."
    new = deepcopy(STORED)
    *way, last = path
    inner = new
    for step in way: inner = inner[step]
    if value == "del": del inner[last]
    else: inner[last] = value
    return new


@pytest.mark.parametrize("path, value", [(("wall_time_s",), 9.0), (("finished",), "2027"), (("device",), "cuda"), (("versions", "torch"), "3"), (("git",), None), (("peak_memory", "gpu_MiB"), 1), (("config", "out"), "x"), (("config", "workers"), 3),
                                         (("config", "store"), "x"), (("hashes", "configuration"), "d" * 64), (("command",), "fsar train --out x"), (("training", "seconds"), 8.0)])
def test_when_and_where_do_not_matter(path, value):
    assert same_figures(STORED, changed(path, value)).same and same_figures(changed(path, value), STORED).same


@pytest.mark.parametrize("path, value, said", [(("results", 0, "accuracy"), 0.6100000000000001, "results[0].accuracy"), (("results", 0, "per_class", "wave"), 0.25, "results[0].per_class.wave"), (("results", 0, "confusion", 1, 0), 6, "results[0].confusion[1][0]"),
                                               (("hashes", "weights"), "d" * 64, "hashes.weights"), (("config", "seed"), 1, "config.seed"), (("headline",), "a on b: 99.0 %", "headline"), (("reversed_pairs",), {}, "reversed_pairs"),
                                               (("results", 0, "per_class", "wave"), "del", "results[0].per_class.wave"), (("results",), [], "results"), (("seeds",), [0, 1], "seeds"), (("training", "steps"), True, "training.steps")])
def test_a_figure_that_differs_is_found_in_either_direction(path, value, said):
    for found in (same_figures(STORED, changed(path, value)), same_figures(changed(path, value), STORED)):
        assert not found.same and [c.path for c in found.changes] == [said] and said in str(found) and "NOT EQUAL: 1 differ" in str(found)


def test_the_largest_difference_is_named():
    found = same_figures(STORED, changed(("results", 0), {**STORED["results"][0], "accuracy": 0.62, "per_class": {"jump": 0.4, "wave": 0.5}}))
    assert found.largest.path == "results[0].per_class.jump" and found.largest.size == pytest.approx(0.3) and "largest difference of a number is 0.3, at results[0].per_class.jump" in str(found)


def test_a_field_of_a_later_version_is_no_difference_but_said():
    found = same_figures(STORED, STORED | {"listed": {"test": 24}})
    assert found.same and "earlier version: listed" in str(found)
    assert not same_figures(STORED | {"listed": 24}, STORED).same  # the other way about something has gone


def test_many_changes_are_cut_short():
    found = same_figures({"x": list(range(100))}, {"x": list(range(1, 101))})
    assert "and 88 more" in str(found) and len(str(found).splitlines()) == 14


def test_all_committed_reports_equal_themselves():
    for file in sorted((ROOT / "reports").glob("*/metrics.json")):
        found = same_figures(read_json(file), read_json(file))
        assert found.same and found.equal > 50 and not found.newer, file


# what it takes

def report_at(folder, command="fsar train --out reports/x", notebook="train.ipynb", **metrics):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / notebook).touch()
    write_json(folder / "metrics.json", {"headline": "some headline", **({"command": command} if command is not None else {}), **metrics})
    return folder


def test_what_is_no_report_or_says_no_command(tmp_path, capsys):
    for folder, words in ((tmp_path / "nothing", "holds no finished report: it has no metrics.json"), (report_at(tmp_path / "old", command=None), "its version stored no command"), (report_at(tmp_path / "new", notebook="dream.ipynb"), "no report of a known kind"),
                          (report_at(tmp_path / "odd", command="rm -r /"), "is not one of fsar"), (report_at(tmp_path / "bare", command="fsar"), "is not one of fsar")):
        assert cli.main(["rerun", str(folder)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1 and str(folder) in said
    assert not list(tmp_path.glob("*/rerun.json"))


@pytest.mark.parametrize("command, words", [
    ("fsar train --weights before/checkpoints/last --out x", "needs before/checkpoints/last, which is not in .*; make the report before first"),
    ("fsar train --weights made/checkpoints/last --out x", "make the report made first: fsar train --lr 0.5 --out made"),
    ("fsar compare --runs otam --weights made/checkpoints/last --out x", "make the report made first: fsar train --lr 0.5"),
    ("fsar claims --methods made --out x", "needs made/checkpoints, which is not in .*; make the report made first: fsar train --lr 0.5"),
    ("fsar claims --methods gone --out x", "needs gone, which is not in"), ("fsar groups --checkpoint made --out x", "needs made/checkpoints"), ("fsar groups --methods protonet --weights gone.pth --out x", "needs gone.pth"),
    ("fsar report made gone --out x", "needs gone, which is not in"), ("fsar train --dataset ucf101 --videos clips --out x", "needs clips, which is not in .*its command names it as seen from the folder where it was given"), ("fsar train --splits s.csv --out x", "needs s.csv")])
def test_what_is_missing_is_named_with_the_report_that_makes_it(command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report_at(tmp_path / "made", command="fsar train --lr 0.5 --out made")
    with pytest.raises(FsarError, match=words): rerun.rerun(report_at(tmp_path / "mine", command=command), "again")
    assert not (tmp_path / "again").exists()


def test_what_is_not_a_place_is_not_looked_for():
    for command in ("fsar train --weights imagenet --splits '' --out x", "fsar groups --methods protonet 'trx cardinalities=1' --out x", "fsar sizes --out x", "fsar compare --runs protonet --out x"):
        assert rerun.places_read(shlex.split(command)) == []


def test_it_is_never_made_over_anything(tmp_path):
    report = report_at(tmp_path / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    write_json(report_at(tmp_path / "attempt") / "rerun.json", {"report": "another", "command": "fsar train --out reports/x"})
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for out, words in ((report, "is the report itself"), (report / "inside", "is the report itself, or in it"), (tmp_path / "other", "is not empty, and no earlier attempt"), (tmp_path / "attempt", "is not empty"), (report / "metrics.json", "report itself, or in it")):
        with pytest.raises(FsarError, match=words): rerun.rerun(report, out)
    (tmp_path / "link").symlink_to(report)
    with pytest.raises(FsarError, match="is the report itself"): rerun.rerun(report, tmp_path / "link")
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_the_threads_are_those_of_the_report(monkeypatch, capsys):
    assert rerun.threads_of({"device": "cpu, 8 cores, 3 threads"}) == 3 and rerun.threads_of({"device": "NVIDIA H100 (cuda:0)"}) is None and rerun.threads_of({}) is None
    monkeypatch.setattr(rerun, "PROGRAM", "import os, torch; print('threads', torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])")
    rerun.run_words(["fsar", "train"], threads=2)
    assert capsys.readouterr().err == "threads 2 2\n"


def test_a_command_that_fails_is_an_error_with_its_last_words(monkeypatch, tmp_path, capsys):
    report = report_at(tmp_path / "mine", command="fsar train --method otan --out x")
    with pytest.raises(FsarError, match="ended with code 2: unknown method 'otan'. Did you mean"): rerun.rerun(report, tmp_path / "again")
    assert "fsar: error: unknown method" in capsys.readouterr().err
    monkeypatch.setattr(rerun, "PROGRAM", "import sys; print('half way'); sys.exit(9)")
    with pytest.raises(FsarError, match="ended with code 9: half way"): rerun.rerun(report, tmp_path / "again")  # the same folder: an earlier attempt at the same


def test_reasons_are_told():
    others = rerun.circumstances(STORED, STORED | {"device": "cpu, 2 cores, 2 threads", "git": {"commit": "e" * 40, "dirty": True}, "versions": {"torch": "3", "av": "1"}})
    assert others == ["torch 2 → 3", "device cpu, 2 cores, 1 threads → cpu, 2 cores, 2 threads", "code commit cccccccccc → commit eeeeeeeeee with uncommitted changes", "av none → 1"] and rerun.circumstances(STORED, STORED) == []


# the whole of it

@pytest.fixture(scope="module")
def made(tiny_motions, tmp_path_factory) -> Path:
    "A run of seconds: ProtoNet on the tiny folder."
    out = tmp_path_factory.mktemp("reports") / "mine"
    words = ["train", "--dataset", str(tiny_motions), "--method", "protonet", "--short-side", "32", "--size", "32", "--frames", "4", "--queries", "2", "--episodes", "40", "--validate-every", "20", "--val-episodes", "20",
             "--test-queries", "2", "--test-episodes", "40", "--test-shots", "1", "2", "--device", "cpu", "--out", str(out)]
    assert cli.main(words) == 0
    return out


@pytest.fixture(scope="module")
def stopped(made, tmp_path_factory):
    "A rerun that Ctrl-C stopped in the middle of training."
    out = tmp_path_factory.mktemp("stopped") / "again"
    process = subprocess.Popen([sys.executable, "-u", "-c", rerun.PROGRAM, "rerun", str(made), "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={k: v for k, v in os.environ.items() if k != "FSAR_QUIET"})
    said, sent = b"", False
    while chunk := os.read(process.stderr.fileno(), 4096):
        said += chunk
        if not sent and re.search(rb"training: +[1-9]\d?%.*loss=", said): process.send_signal(signal.SIGINT); sent = True
    return process.wait(timeout=60), said.decode(), process.stdout.read().decode(), out


def test_ctrl_c_reaches_the_run_and_says_how_to_go_on(stopped, made):
    code, said, printed, out = stopped
    assert code == 130 and "Traceback" not in said and printed == "" and f"to go on: fsar rerun {made} --out {out}" in said and said.count("fsar: stopped") == 2  # the run itself, and this program
    assert read_json(out / "run.json")["status"] == "running" and "with 1 thread:" in said


def test_a_report_made_again_is_equal_to_the_bit(stopped, made, capsys):
    "Interrupted and gone on with, too; the report itself is left as it was."
    before, out = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in made.rglob("*")}, stopped[3]
    assert cli.main(["rerun", str(made), "--out", str(out), "--json"]) == 0
    told = capsys.readouterr()
    result, metrics = json.loads(told.out), read_json(made / "metrics.json")
    assert result["sound"] and result["differences"] == [] and result["newer"] == [] and result["equal"] > 100 and result["text"].startswith("equal to the bit") and result["threads"] == 1 and result["kind"] == "train"
    assert "resuming the interrupted run" in told.err
    again = read_json(out / "metrics.json")
    assert again["hashes"] == metrics["hashes"] and again["results"] == metrics["results"] and again["command"] != metrics["command"]
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in made.rglob("*")} and (out / "report.html").exists()
    assert read_json(out / "rerun.json")["result"]["sound"] and "Next to published results" not in (out / "report.html").read_text()


def copy_of(made: Path, folder: Path, **changes) -> Path:
    "A report without its weights, as committed ones are, with some of its metrics replaced."
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("checkpoints", "run.json"))
    write_json(folder / "metrics.json", read_json(folder / "metrics.json") | changes)
    return folder


def test_a_changed_seed_and_a_tampered_figure_are_found(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path)); monkeypatch.setattr("tempfile.tempdir", None)
    metrics = read_json(made / "metrics.json")
    results = deepcopy(metrics["results"])
    results[0]["accuracy"] += 0.125
    report = copy_of(made, tmp_path / "tampered", results=results, command=f"{metrics['command']} --seed 1")
    assert cli.main(["rerun", str(report)]) == 1
    said = capsys.readouterr().out
    out = Path(re.match(rf"{re.escape(str(report))} made again in (\S+)\n", said)[1])
    assert out.parent.parent == tmp_path and out.parent.name.startswith("fsar-rerun-") and out.name == "tampered"  # a temporary folder, kept and named
    assert "NOT EQUAL" in said and said.splitlines()[2:4] == ["  config.seed: 0 → 1", "  seeds[0]: 0 → 1"] and said.rstrip().endswith("likely reasons: settings (config.seed, seeds[0])")
    paths = {c["path"] for c in read_json(out / "rerun.json")["result"]["differences"]}
    assert {"hashes.weights", "results[0].accuracy", "config.seed", "seeds[0]"} <= paths and not {p for p in paths if p.startswith("data.")}
    assert {"hashes.episodes 5-way 1-shot", "results[0].table_hash"}.isdisjoint(paths)  # test episodes do not follow from the training seed
    assert "look for a file that was changed by hand" in rerun.outcome(report, report, read_json(report / "metrics.json"), metrics)["text"]
    only = same_figures(read_json(report / "metrics.json"), metrics)
    assert [c.path for c in only.changes] == ["results[0].accuracy"] and only.largest.size == pytest.approx(0.125)


# the index

def test_the_index_lists_every_report_in_order(tmp_path):
    report_at(tmp_path / "r" / "b", headline="one | two\nthree", git={"commit": "a" * 40, "dirty": True}, finished="2026-11-25T01:00:00+00:00", wall_time_s=83.0)
    (report_at(tmp_path / "r" / "deep" / "a b", notebook="compare.ipynb", command="fsar compare --runs otam --out 'r/deep/a b'", git=None) / "report.html").touch()
    report_at(tmp_path / "r" / ".hidden")
    report_at(tmp_path / "r" / "a", command=None, notebook="side_by_side.ipynb")
    text = index_text(tmp_path / "r")
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["report", "kind", "what it found", "made", "code", "time"]
    assert rows[2:] == [["[deep/a b](deep/a%20b/report.html), [notebook](deep/a%20b/compare.ipynb)", "compare", "some headline", "–", "installed package", "–"],
                        ["[notebook](a/side_by_side.ipynb)", "side by side", "some headline", "–", "–", "–"],
                        ["[notebook](b/train.ipynb)", "train", "one \\| two three", "2026-11-25", "aaaaaaaaaa with uncommitted changes", "1 min 23 s"]]
    assert "3 reports" in text and "# deep/a b\nfsar compare --runs otam --out 'r/deep/a b'" in text and "# a\n# (of a version that stored no command" in text and "fsar rerun r/NAME" in text and ".hidden" not in text
    assert index_text(str(tmp_path / "r") + "/") == text


def test_the_index_is_written_again_but_never_over_another_text(tmp_path, capsys, monkeypatch):
    report_at(tmp_path / "reports" / "a")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "--index"]) == 0 and capsys.readouterr().out == f"{Path('reports/README.md')}: 1 report\n"
    report_at(tmp_path / "reports" / "b")
    assert cli.main(["report", "--index", "reports", "--json"]) == 0 and json.loads(capsys.readouterr().out) == {"index": str(Path("reports/README.md")), "reports": 2}
    (tmp_path / "reports" / "README.md").write_text("my notes")
    assert cli.main(["report", "--index"]) == 2 and "was not written by fsar report --index" in capsys.readouterr().err and (tmp_path / "reports" / "README.md").read_text() == "my notes"
    for words, message in ((["--index", "nowhere"], "nowhere holds no report"), (["--index", "a", "b"], "takes one folder"), (["--index", "--out", "x"], "takes one folder")):
        assert cli.main(["report", *words]) == 2 and message in capsys.readouterr().err


def test_the_committed_index_is_in_step_with_the_reports():
    assert (ROOT / "reports" / "README.md").read_text(encoding="utf-8") == index_text(ROOT / "reports")
    for target in re.findall(r"\]\(([^)]+)\)", index_text(ROOT / "reports")): assert (ROOT / "reports" / target).is_file(), target
