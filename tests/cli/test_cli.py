"The command line: help, every error a user can meet first, and one whole run from a folder of videos to a report."
import html
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from fsar.cli import main as cli
from fsar.core.config import Config
from fsar.core.basics import FsarError
from fsar.core.files import read_json
from fsar.reports.figures import percent


def fsar(*words, **env):
    "Run the program as a user does."
    return subprocess.run([sys.executable, "-c", "import sys; from fsar.cli.main import main; sys.exit(main())", *map(str, words)],
                          capture_output=True, text=True, env={**os.environ, **env}, timeout=300)


# help

@pytest.mark.parametrize("command, words", [((), ["data", "train", "test", "report", "one or a few examples"]), (("train",), ["--method", "--test-episodes", "--overwrite", "default: molo"]),
                                            (("data",), ["prepare", "check"]), (("data", "prepare"), ["--train-classes", "root/<class>/<video>", "--update"]), (("test",), ["CHECKPOINT", "--test-shots INT", "as in training"]), (("report",), ["FOLDER"])])
def test_help_explains(command, words):
    answer = fsar(*command, "--help", COLUMNS="200")
    assert answer.returncode == 0 and not [w for w in words if w not in answer.stdout]


def test_help_lists_every_field_of_the_configuration():
    text = fsar("train", "--help").stdout
    assert not [name for name in Config.__dataclass_fields__ if "--" + name.replace("_", "-") not in text]


def test_help_comes_at_once_and_without_torch():
    code = "import sys; from fsar.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules, 'pandas' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True)  # compile first
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.splitlines()[-1] == "False False"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1  # seconds of computing, whatever else the machine does


# words that cannot be understood

@pytest.mark.parametrize("words, message", [
    (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
    (["train", "--way", "3"], "unknown flag '--way' after fsar train. Did you mean '--ways'?"),
    (["train", "--dateset=motions"], "unknown flag '--dateset=motions' after fsar train. Did you mean '--dataset'?"),
    (["train", "--ways", "five"], "--ways"),
    (["train", "--optimizer", "adm"], "invalid choice 'adm' for argument '--optimizer'. Expected one of ('adam', 'adamw', 'sgd')"),
    (["data", "prepare", "motions", "mini"], "unknown word 'mini' after fsar data prepare"),
    (["data", "motions-mini"], "unknown command 'motions-mini' after fsar data. Commands: about, unpack, prepare, check, show"),
    (["test"], "CHECKPOINT"),
    ([], "Expected one of"),
])
def test_wrong_words_name_the_right_ones(words, message):
    with pytest.raises(FsarError) as e: cli.parse(words)
    assert message in str(e.value) and "\n" not in str(e.value) and "│" not in str(e.value)


def test_flags_become_the_configuration():
    command = cli.parse(["train", "--method", "otam", "--test-shots", "1", "3", "--no-flip", "--options", "lam=0.2", "--lr", "5e-4"])
    assert command.config() == Config(method="otam", test_shots=(1, 3), options=("lam=0.2",), lr=5e-4)
    assert cli.parse(["train"]).config() == Config()


# what cannot be done: one line, exit code 2, no traceback

@pytest.mark.parametrize("words, message", [
    (["data", "prepare", "motion-mini"], "Did you mean 'motions-mini'"),
    (["data", "prepare", "/no/such/folder"], "unknown data set '/no/such/folder'"),
    (["data", "prepare", "ucf101"], "--videos FOLDER"),
    (["train", "--ways", "0"], "configuration key 'ways' must be at least 1"),
    (["train", "--size", "100"], "larger than the stored frames"),
    (["train", "--method", "mollo"], "unknown method 'mollo'. Did you mean 'molo'?"),
    (["train", "--backbone", "resnet19"], "unknown backbone 'resnet19'"),
    (["train", "--options", "matchr=otam"], "Did you mean 'matcher'"),
    (["train", "--device", "cuda:77"], "device 'cuda:77' is not available here"),
    (["train", "--dataset", "motons"], "Did you mean 'motions'"),
    (["test", "/no/such/run"], "no such folder: /no/such/run"),
    (["report", "/no/such/run"], "/no/such/run holds no run"),
])
def test_errors_are_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("fsar: error: ") and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())  # and nothing is left behind


def test_an_empty_class_is_named(tiny_motions, tmp_path, capsys):
    for name in ("wave", "jump"): (tmp_path / "videos" / name).mkdir(parents=True)
    (tmp_path / "videos" / "wave" / "a.mp4").write_bytes(next(tiny_motions.glob("*/*.mp4")).read_bytes())
    assert cli.main(["data", "prepare", str(tmp_path / "videos"), "--train-classes", "wave", "--test-classes", "jump"]) == 2
    assert "'jump' is empty" in capsys.readouterr().err


def test_data_prepares_and_tells_programs(tiny_motions, tmp_path, capsys):
    assert cli.main(["data", "prepare", str(tiny_motions), "--short-side", "32", "--out", str(tmp_path / "store"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [s["split"] for s in told["splits"]] and told["unreadable"] == [] and Path(told["store"]) == tmp_path / "store"
    assert cli.main(["data", "prepare", str(tiny_motions), "--short-side", "32", "--out", str(tmp_path / "store")]) == 0
    assert "36 of 36" in capsys.readouterr().out


def test_data_reports_what_it_cannot_read(tiny_motions, tmp_path, capsys):
    (tmp_path / "videos" / "wave").mkdir(parents=True)
    good = next(tiny_motions.glob("*/*.mp4")).read_bytes()
    (tmp_path / "videos" / "wave" / "good.mp4").write_bytes(good)
    (tmp_path / "videos" / "wave" / "text.mp4").write_text("not a video")
    assert cli.main(["data", "prepare", str(tmp_path / "videos"), "--test-classes", "wave", "--out", str(tmp_path / "store")]) == 0
    said = capsys.readouterr().out
    assert "1 of 2" in said and re.search(r"unreadable: 1 videos.*\n  \S+text\.mp4: \w+", said)


# one whole run

@pytest.fixture(scope="module")
def flags(tiny_motions, tmp_path_factory):
    "A run of half a minute: ProtoNet on the tiny folder."
    out = tmp_path_factory.mktemp("reports") / "first"
    values = dict(dataset=tiny_motions, method="protonet", short_side=32, size=32, frames=4, queries=2, episodes=60, validate_every=30, val_episodes=20, test_queries=2, test_episodes=60, out=out)
    return [w for name, value in values.items() for w in ("--" + name.replace("_", "-"), str(value))] + ["--test-shots", "1", "2"]


@pytest.fixture(scope="module")
def own_store(tmp_path_factory):
    "A cache of its own: another file's tests may have prepared the same videos."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def stopped(flags, own_store):
    "The run, stopped by Ctrl-C in the middle of training."
    process = subprocess.Popen([sys.executable, "-u", "-c", "import sys; from fsar.cli.main import main; sys.exit(main())", "train", *flags],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={k: v for k, v in os.environ.items() if k != "FSAR_QUIET"})
    said = b""
    while chunk := os.read(process.stderr.fileno(), 4096):
        before, said = said, said + chunk
        if not _under_way(before) and _under_way(said): process.send_signal(signal.SIGINT)
    return process.wait(timeout=60), said.decode(), read_json(Path(flags[flags.index("--out") + 1]) / "run.json")["status"]


def _under_way(said):
    return re.search(rb"training: +[1-9]\d?%.*loss=", said)


@pytest.fixture(scope="module")
def finished(flags, stopped):
    "The same command again, to the end."
    answer = fsar("train", *flags)
    assert answer.returncode == 0, answer.stderr
    return Path(flags[flags.index("--out") + 1]), answer


def test_ctrl_c_stops_without_a_traceback(stopped):
    code, said, status = stopped
    assert code == 130 and "Traceback" not in said and said.splitlines()[-1].startswith("fsar: stopped") and status == "running"


def test_bars_reach_the_terminal_while_the_run_goes_on(stopped):
    assert re.search(r"preparing: +\d+%", stopped[1]) and re.search(r"training: +\d+%.*loss=", stopped[1])


def test_the_same_command_goes_on_and_ends_with_the_headline(finished):
    out, answer = finished
    assert "resuming the interrupted run" in answer.stderr
    metrics = read_json(out / "metrics.json")
    assert answer.stdout.splitlines() == [metrics["headline"], f"report: {out / 'report.html'}"]
    log = (out / "checkpoints" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in log[1:]] == [str(k) for k in range(1, 61)]  # every step once


def test_every_file_of_a_report_is_there_and_small(finished):
    out = finished[0]
    figures = {p.name for p in (out / "figures").iterdir()}
    assert figures >= {"training.png", "classes.png", "confusion.png", "episode.png", "alignment.png"}
    assert {p.name for p in out.iterdir()} >= {"report.html", "train.ipynb", "metrics.json", "run.json", "results", "checkpoints"}
    assert (out / "report.html").stat().st_size < 3_000_000 and all(p.stat().st_size < 600_000 for p in (out / "figures").iterdir())


def test_the_page_says_what_metrics_say(finished):
    out = finished[0]
    metrics = read_json(out / "metrics.json")
    text = html.unescape(re.sub("<[^>]+>", " ", (out / "report.html").read_text()))
    results = metrics["results"] + ([metrics["reversed_pairs"]] if metrics["reversed_pairs"] else [])
    known = {percent(r["accuracy"], r["ci95"]) for r in results}
    assert set(re.findall(r"\d+\.\d ± \d+\.\d %", text)) == known
    assert all(percent(r["chance"]) in text for r in results) and metrics["command"] in text
    assert f"drawn from {metrics['data']['videos']['test']} of {metrics['data']['listed']['test']} videos" in text
    assert all(digest in text for digest in metrics["hashes"].values()) and all(version in text for version in metrics["versions"].values())


def test_metrics_hold_what_makes_the_run_again(finished, flags, says_its_origin):
    metrics = read_json(finished[0] / "metrics.json")
    says_its_origin(metrics, finished[0], "configuration", "videos and split", "prepared frames", "weights", "episodes")
    assert cli.parse(shlex.split(metrics["command"])[1:]).config().hash == cli.parse(["train", *flags]).config().hash and metrics["seeds"] == [0]
    config = cli.parse(["train", *flags]).config()
    assert Config.from_dict(metrics["config"]) == config and metrics["hashes"]["configuration"] == config.hash
    assert {"configuration", "videos and split", "prepared frames", "weights", "episodes 5-way 1-shot", "episodes 5-way 2-shot"} == set(metrics["hashes"])
    first = metrics["results"][0]
    assert (first["task"], first["episodes"], first["chance"]) == ("5-way 1-shot", 60, 0.2) and len(first["confusion"]) == len(first["class_names"]) == 5
    assert metrics["training"]["steps"] == 60 and metrics["peak_memory"]["process_MiB"] > 50 and metrics["wall_time_s"] > 0
    assert metrics["git"] is None or set(metrics["git"]) == {"commit", "dirty"}


def test_single_episodes_are_kept_for_paired_comparisons(finished):
    from fsar.data.episodes import EpisodeTable
    from fsar.engine.results import Result, compare
    out = finished[0]
    result = Result.from_dict(read_json(out / "results" / "test-5-way-1-shot.json"))
    table = EpisodeTable.load(out / "results" / "test-5-way-1-shot.episodes.safetensors")
    assert len(result.correct) == 60 and result.table_hash == table.hash == read_json(out / "metrics.json")["results"][0]["table_hash"]
    assert compare(result, result).difference == 0


def test_the_stored_notebook_has_no_carriage_returns(finished):
    cells = nbformat.read(finished[0] / "train.ipynb", 4).cells
    streams = [o.text for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream"]
    assert not [t for t in streams if "\r" in t] and not [o for c in cells for o in c.get("outputs", []) if o.output_type == "error"]


def test_a_finished_run_is_reused_at_once(finished, flags, capsys):
    before = (finished[0] / "report.html").stat().st_mtime_ns
    assert cli.main(["train", *flags, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["headline"] == read_json(finished[0] / "metrics.json")["headline"]
    assert "holds a finished run of this configuration" in told.err and (finished[0] / "report.html").stat().st_mtime_ns == before


def test_another_configuration_does_not_touch_it(finished, flags, capsys):
    assert cli.main(["train", *flags, "--lr", "0.01"]) == 2
    assert "lr 0.001 → 0.01" in capsys.readouterr().err


def test_testing_the_run_again_gives_its_numbers(finished, capsys):
    out = finished[0]
    assert cli.main(["test", str(out), "--test-shots", "1", "--json"]) == 0
    told, metrics = json.loads(capsys.readouterr().out), read_json(out / "metrics.json")
    assert told["results"][0]["accuracy"] == metrics["results"][0]["accuracy"] and told["results"][0]["table_hash"] == metrics["results"][0]["table_hash"]
    assert cli.main(["test", str(out / "checkpoints" / "last"), "--test-split", "val", "--ways", "3"]) == 0
    assert re.fullmatch(r"protonet on tiny, 3-way 1-shot: .* of val classes, drawn from \d+ of \d+ videos; last weights, no selection\)", capsys.readouterr().out.splitlines()[0])


def test_report_renders_again(finished, capsys):
    out = finished[0]
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert cli.main(["report", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(out / "report.html") and (out / "report.html").read_text() == page


def test_runs_are_set_side_by_side(finished, tmp_path, capsys, says_its_origin):
    import shutil
    out, other = finished[0], tmp_path / "second"
    shutil.copytree(out, other, ignore=shutil.ignore_patterns("checkpoints"))
    file = other / "results" / "test-5-way-1-shot.json"
    answers = read_json(file)
    answers["correct"] = [max(0.0, c - 0.1) for c in answers["correct"]]  # a run that does worse in every episode
    file.write_text(json.dumps(answers))
    assert cli.main(["report", str(out), str(other), "--out", str(tmp_path / "both")]) == 0
    said = capsys.readouterr().out
    assert f"{out.name} − second: " in said and f"{out.name} is better on these videos" in said and "inside the noise" in said
    page, metrics = (tmp_path / "both" / "report.html").read_text(), read_json(tmp_path / "both" / "metrics.json")
    says_its_origin(metrics, tmp_path / "both", f"{out.name}: weights", "second: weights", "episodes")
    assert metrics["command"] in html.unescape(page) and cli.parse(shlex.split(metrics["command"])[1:]).folders == (str(out), str(other)) and metrics["seeds"] == [0, 0]
    assert all(text in page for text in ("The direction of time", "second", "data:image/png")) and (tmp_path / "both" / "figures" / "reversed.png").exists()


def test_runs_on_other_episodes_are_not_compared(finished, tmp_path, capsys):
    import shutil
    other = tmp_path / "second"
    shutil.copytree(finished[0], other, ignore=shutil.ignore_patterns("checkpoints"))
    file = other / "results" / "test-5-way-1-shot.json"
    file.write_text(json.dumps({**read_json(file), "table_hash": "0" * 64}))
    assert cli.main(["report", str(finished[0]), str(other), "--out", str(tmp_path / "both")]) == 2
    assert f"second and {finished[0].name} answered different test episodes" in capsys.readouterr().err and not (tmp_path / "both").exists()
