"Published results: the file against the research notes, which row is whose, and a run on a benchmark set beside them."
import dataclasses
import re

import numpy as np
import pytest

from fsar.cli import main as cli
from fsar.reports import published
from fsar.core.basics import FsarError
from fsar.core.files import read_json
from fsar.data.motions import PRESETS, render
from fsar.reports.published import compare_published, published_table, protocol_differences, row_for
from fsar.data.splits import SPLITS, benchmark_manifest, load_split
from fsar.data.store import prepare
from fsar.data.video import write_video


# the file

def test_every_number_is_typed_and_stands_once():
    table = published.published()
    assert (table.dtypes[["ways", "shots", "frames"]] == np.int64).all() and table["accuracy"].dtype == np.float64 and len(table) == 150
    assert not table.duplicated(["table", "row", "benchmark", "ways", "shots"]).any()
    assert set(table["backbone"]) == {"resnet50"} and set(table["weights"]) == {"imagenet"} and set(table["frames"]) == {8}


def test_every_row_is_a_model_of_this_library():
    for method, sampler, options in published.published()[["method", "sampler", "options"]].drop_duplicates().itertuples(index=False):
        published.settings_of(method, options.split(), sampler)


def test_all_tables_are_those_of_the_notes(shared_dir):
    "The notes' section, read here by other means than the file was made by."
    text = (shared_dir / "methods.md").read_text().split("## Published results to set beside ours")[1].split("\n## ")[0]
    wanted: dict[tuple, float] = {}
    grid = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    names = {"SSv2-Full": "ssv2-full", "Kinetics-100": "kinetics100", "UCF101": "ucf101", "HMDB51": "hmdb51", "SSv2-Small": "ssv2-small"}
    for line in grid[2:]:
        for title, cell in zip(grid[0][1:], line[1:]):
            for shots, number in zip((1, 5), re.findall(r"\d+\.\d", cell)): wanted["main", line[0].replace(" (nearest to VIM)", ""), names[title], 5, shots] = float(number)
    flat = " ".join(text.split())
    for table, pattern in (("molo ablation", r"MoLo ablation.*?motion head\):(.*?) Sampler ablation"), ("sampler ablation", r"task-adaptive\):(.*?) Dense frames")):
        for row, one, five in re.findall(r"([A-Za-z+]+) (\d+\.\d)/(\d+\.\d)", re.search(pattern, flat)[1]): wanted |= {(table, row, "ssv2-full", 5, 1): float(one), (table, row, "ssv2-full", 5, 5): float(five)}
    counts, numbers = re.search(r"Dense frames M = ([\d, ]+) \(SSv2 1-shot\): ([\d. ]+)", flat).groups()
    wanted |= {("dense frames", f"M = {m}", "ssv2-full", 5, 1): float(v) for m, v in zip(re.findall(r"\d+", counts), re.findall(r"\d+\.\d", numbers), strict=True)}
    for row, series in re.findall(r"(OTAM|TRX|HyRSM|MoLo) ((?:\d+\.\d ?){6})", flat.split("5…10-way:")[1]):
        wanted |= {("more ways", row, "ssv2-full", ways, 1): float(v) for ways, v in zip(range(5, 11), series.split(), strict=True)}
    ours = published.published().set_index(["table", "row", "benchmark", "ways", "shots"])["accuracy"].to_dict()
    assert len(wanted) == 150 and ours == wanted


def test_what_the_notes_say_of_selection_is_said():
    table = published.published()
    assert set(table.loc[table["selection"] != "", "method"]) == {"molo", "ta2n"} and set(table["selection"]) == {"", "released training code selects on the test split"}
    assert (table.loc[table["table"] == "molo ablation", "source"].str.endswith("table 3")).all()


@pytest.mark.parametrize("wrong, words", [(dict(benchmark="ufc101"), "unknown benchmark 'ufc101'. Did you mean 'ucf101'"), (dict(method="otan"), "unknown method 'otan'"), (dict(table="mane"), "Did you mean 'main'")])
def test_unknown_names_name_the_nearest(wrong, words):
    with pytest.raises(FsarError, match=words): published.published(**wrong)


@pytest.mark.parametrize("name", ["SSv2_Full", "ssv2-full"])
def test_spellings_of_a_benchmark(name): assert len(published.published(name, table="main")) == 18


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    file = published.resource("templates") / "published.csv"
    monkeypatch.setattr(published, "resource", lambda name: tmp_path)
    with pytest.raises(FsarError, match="is missing"): published.published()
    for text, words in ((file.read_text().replace(",42.8,", ",428,", 1), "line 2: not an accuracy in percent"), (file.read_text().replace(",42.8,", ",many,", 1), "not a number"), (file.read_text().replace("accuracy", "acc", 1), "other columns")):
        (tmp_path / "published.csv").write_text(text)
        with pytest.raises(FsarError, match=words): published.published()


# which row is whose

@pytest.mark.parametrize("method, options, sampler, row", [
    ("molo", [], "", "MoLo (Bi-MHM)"), ("molo", ["matcher=otam"], "", "MoLo (OTAM)"), ("molo", ["variant=released"], "", "MoLo (Bi-MHM)"), ("molo", ["base=false", "long_short=false"], "", "AD+M"), ("molo", ["redraw=4"], "", "MoLo (Bi-MHM)"),
    ("ta2n", [], "", "TA2N"), ("ta2n", [], "vim", "TA2N + sampler"), ("vim", [], "", "TA2N + sampler"), ("protonet", [], "", "none"), ("protonet", [], "vim", "all"), ("protonet", ["sampler.dense=24"], "vim", "M = 24"),
    ("protonet", ["sampler.select=false", "sampler.adaptive=false"], "vim", "SA"), ("finetune", [], "", None), ("otam", [], "vim", None), ("molo", ["matcher=otam", "motion=false"], "", None)])
def test_the_row_of_a_method(method, options, sampler, row):
    found = row_for(published.published("ssv2-full", ways=5, shots=1), method, options, sampler)
    assert (found.iloc[0]["row"] if len(found) else None) == row


def run_metrics(**changes):
    def result(task, shots, accuracy, split="test"): return dict(task=task, ways=5, shots=shots, split=split, accuracy=accuracy, ci95=0.004, chance=0.2)
    config = dict(method="molo", sampler="", options=[], backbone="resnet50", weights="imagenet", frames=8, size=224, episodes=96_000, tasks_per_step=16, shots=1, queries=6, groups=False, train_size=0, test_episodes=10_000, test_queries=1)
    lists = {s: load_split("ucf101", s) for s in SPLITS}
    data = dict(name="ucf101", benchmark="ucf101", videos={s: len(x) for s, x in lists.items()}, listed={s: len(x) for s, x in lists.items()}, classes={s: list(x.classes) for s, x in lists.items()}, leaks=[])
    metrics = dict(config=config, data=data, selected_on="val", results=[result("5-way 1-shot", 1, 0.85), result("5-way 5-shot", 5, 0.96)])
    return {**metrics, **{k: {**metrics[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}}


def test_a_run_beside_its_row():
    found = compare_published(run_metrics())
    assert list(found["row"]) == ["MoLo (Bi-MHM)"] * 2 and list(found["published"]) == [86.0, 95.5] and found["difference"].tolist() == pytest.approx([-1.0, 0.5]) and found["ci95"].tolist() == pytest.approx([0.4, 0.4])
    assert list(published_table(found)["ours − published"]) == ["-1.0 ± 0.4", "+0.5 ± 0.4"]


def test_a_comparison_beside_its_rows():
    results = run_metrics()["results"]
    rows = {"plain": dict(method="otam", sampler="", options=[], results=results), "tuned": dict(method="finetune", sampler="", options=[], results=results[:1]), "lost": dict(method="trx", sampler="", options=[], results=[])}
    found = compare_published({**{k: v for k, v in run_metrics().items() if k != "results"}, "rows": rows})
    assert list(found["ours"]) == ["plain", "plain", "tuned"] and found["published"].tolist()[:2] == [79.9, 88.9] and np.isnan(found["published"].iloc[2])
    assert list(published_table(found)["published"]) == ["79.9 %", "88.9 %", "–"]


@pytest.mark.parametrize("changes", [dict(data=dict(benchmark=None)), dict(data=dict(benchmark="mine"))])
def test_other_data_has_nothing_beside(changes):
    metrics = run_metrics(**changes)
    assert compare_published(metrics).empty and list(compare_published(metrics).columns) == list(published.FOUND) and protocol_differences(metrics) == [] and published_table(compare_published(metrics)).empty


def test_other_splits_ways_and_unequal_shots_are_not_compared():
    results = run_metrics()["results"]
    assert compare_published(run_metrics(results=[{**results[0], "split": "val"}])).empty
    assert compare_published(run_metrics(results=[{**results[0], "ways": 6}, {**results[0], "shots": [1, 5]}]))["published"].isna().all()


@pytest.mark.parametrize("changes, words", [
    (dict(config=dict(backbone="resnet18")), "Backbone: resnet18, weights imagenet"), (dict(config=dict(weights="")), "resnet50, from scratch"), (dict(config=dict(frames=4)), "Frames of a clip: 4"), (dict(config=dict(size=112)), "112×112"),
    (dict(config=dict(options=["redraw=4", "matcher=otam"])), "Options that the published rows do not have: molo: redraw=4."), (dict(config=dict(groups=True)), "never of one recording"), (dict(config=dict(test_episodes=500)), "Test episodes: 500"),
    (dict(data=dict(videos=dict(train=9000, test=2745))), "9,000 of 9,154 train videos in 70 of 70 classes."), (dict(data=dict(leaks=["x"])), "NOT FEW-SHOT")])
def test_each_difference_is_said_where_it_is(changes, words):
    assert words in " ".join(protocol_differences(run_metrics(**changes))) and words not in " ".join(protocol_differences(run_metrics()))


def test_selection_training_and_lists_are_always_said():
    said = protocol_differences(run_metrics())
    assert [text.split(":")[0] for text in said] == ["Training", "Weights", "Queries"] and "MoLo (Bi-MHM) 6,000, 16 episodes to a step" in said[0]
    assert "ours on validation classes; the released training code of MoLo (Bi-MHM) chooses on the test split" in said[1]
    assert "protocol 'paper'" in protocol_differences(run_metrics(selected_on="test"))[1] and "the last are taken" in protocol_differences(run_metrics(selected_on=None))[1]
    assert "how the published ones were chosen is not known here" in protocol_differences(run_metrics(config=dict(method="otam")))[1]
    full = {s: load_split("ssv2_full", s) for s in SPLITS}
    data = dict(benchmark="ssv2_full", videos={s: len(x) for s, x in full.items()}, classes={s: list(x.classes) for s, x in full.items()})
    assert any("Training list: 67,013 videos; papers use 67,013 or 77,500" in text for text in protocol_differences(run_metrics(data=data)))


# the whole of it: rendered clips under names of the real lists, prepared, trained, reported

@pytest.fixture(scope="module")
def ucf_store(tmp_path_factory):
    "Four videos of the first six classes of each side of UCF101."
    root, preset = tmp_path_factory.mktemp("ucf101"), dataclasses.replace(PRESETS["motions-mini"], size=48)
    for side in (load_split("ucf101", s) for s in SPLITS):
        for i in [i for k in range(6) for i in np.flatnonzero(side.labels == k)[:4]]:
            path = root / "videos" / f"{side.videos[i]}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, render("rise" if side.labels[i] % 2 else "grow", int(i), preset)[:8])
    with pytest.warns(UserWarning): manifest = benchmark_manifest("ucf101", root / "videos")
    return prepare(manifest, root / "store", short_side=32, workers=1, progress=False).path


SMALL = ["--short-side", "32", "--size", "32", "--frames", "4", "--queries", "1", "--episodes", "2", "--validate-every", "0", "--protocol", "last", "--test-queries", "1", "--test-episodes", "10", "--test-shots", "1", "2", "--device", "cpu"]


def test_a_report_on_a_benchmark_sets_the_published_row_beside(ucf_store, tmp_path, capsys):
    assert cli.main(["train", "--dataset", str(ucf_store), "--method", "molo", "--options", "matcher=otam", "redraw=4", *SMALL, "--out", str(tmp_path / "run")]) == 0
    page, metrics = (tmp_path / "run" / "report.html").read_text(), read_json(tmp_path / "run" / "metrics.json")
    assert metrics["data"]["benchmark"] == "ucf101" and "Next to published results" in page and "85.4 %" in page and "MoLo (OTAM)" in page and "no number in the tables" in page  # 5-way 2-shot
    assert f"{100 * metrics['results'][0]['accuracy'] - 85.4:+.1f} ± {100 * metrics['results'][0]['ci95']:.1f}" in page
    for text in ("Backbone: resnet_micro, from scratch", "24 of 9,154 train videos in 6 of 70 classes", "24 of 2,745 test videos in 6 of 21 classes", "Options that the published rows do not have: molo: redraw=4"): assert text in page


def test_a_comparison_on_a_benchmark_too(ucf_store, tmp_path, capsys):
    assert cli.main(["compare", "--runs", "protonet", "otam", "--seeds", "0", "--dataset", str(ucf_store), *SMALL, "--out", str(tmp_path / "methods")]) == 0
    page = (tmp_path / "methods" / "report.html").read_text()
    assert "Next to published results" in page and "79.9 %" in page and page.count("no number in the tables") == 3 and "released code of MoLo, TA2N and others chooses on the test split" in page
