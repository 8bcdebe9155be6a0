"Figures and tables of a report: what they say follows from the metrics, and from nothing else."
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from fsar.reports import figures as reports
from fsar.core.basics import generator
from fsar.model.matching import MATCHERS


@pytest.fixture(autouse=True)
def closed_figures():
    reports.set_style()
    yield
    plt.close("all")


def result(**changes):
    names = ["grow", "shrink", "orbit"]
    return dict(task="5-way 1-shot", split="test", ways=5, shots=1, queries=5, episodes=2000, accuracy=0.6123, ci95=0.0041, chance=0.2,
                class_names=names, confusion=[[50, 40, 10], [30, 60, 10], [0, 5, 95]], per_class=dict(zip(names, [0.5, 0.6, 0.95]))) | changes


def metrics(**changes):
    return dict(selected_on="val", config=dict(method="molo", protocol="val"), data=dict(name="motions-mini", classes=dict(train=["a"] * 24, val=["b"], test=["c"] * 10), videos=dict(train=600, val=140, test=228), listed=dict(train=624, val=144, test=240)),
                results=[result(), result(task="5-way 5-shot", shots=5, accuracy=0.752)]) | changes


@pytest.mark.parametrize("accuracy, ci95, words", [(0.25, 0.04, "above chance"), (0.25, 0.06, "not distinguishable from chance"), (0.1, 0.02, "below chance")])
def test_verdict_compares_the_interval_with_chance(accuracy, ci95, words):
    assert reports.verdict(result(accuracy=accuracy, ci95=ci95)) == words


def test_headline_names_method_data_interval_chance_and_episodes():
    assert reports.headline(metrics()) == "molo on motions-mini, 5-way 1-shot: 61.2 ± 0.4 % (chance 20.0 %, 2,000 episodes of test classes, drawn from 228 of 240 videos)"


@pytest.mark.parametrize("make", [reports.headline, reports.banner, lambda m: reports.headline_table(m)["episodes"][0]])
def test_every_number_says_what_its_episodes_were_drawn_from(make):
    assert "drawn from 228 of 240 videos" in make(metrics()) or make(metrics()) == "2,000 from 228 of 240 videos"
    earlier = {k: v for k, v in metrics()["data"].items() if k != "listed"}
    assert "228 videos" in make(metrics(data=earlier))


@pytest.mark.parametrize("make", [reports.headline, reports.banner, lambda m: reports.headline_table(m)["reading"][0]])
def test_a_leak_is_labelled_wherever_the_number_appears(make):
    assert "NOT FEW-SHOT" in make(metrics(data=metrics()["data"] | {"leaks": ["7 of the 24 test classes"]})) and "NOT FEW-SHOT" not in make(metrics())


@pytest.mark.parametrize("make", [reports.headline, reports.banner, lambda m: reports.headline_table(m)["reading"][0]])
def test_selection_is_labelled_wherever_the_number_appears(make):
    assert "SELECTED on these test classes, protocol 'paper'" in make(metrics(selected_on="test", config=dict(method="molo", protocol="paper"))).replace("&#x27;", "'")
    assert "SELECTED on these val classes" in make(metrics(results=[result(split="val")]))
    assert "last weights, no selection" in make(metrics(selected_on=None))
    assert "selected" not in make(metrics()).lower() and "selected" not in make(metrics(selected_on="")).lower()


def test_question_counts_classes_and_examples():
    text = reports.question(metrics())
    assert "24 base classes" in text and "one example of each of 5 classes" in text and "drawn from 10" in text and "20.0 %" in text


def test_headline_table_has_a_row_per_test():
    table = reports.headline_table(metrics())
    assert table["accuracy (95 % CI)"].tolist() == ["61.2 ± 0.4 %", "75.2 ± 0.4 %"] and table["test"].tolist() == ["5-way 1-shot", "5-way 5-shot"]


def test_worst_pairs_are_the_largest_cells_off_the_diagonal():
    table = reports.worst_pairs(result(), 3, partners=[("shrink", "grow")])
    assert table[["shown", "taken for"]].values.tolist()[:2] == [["grow", "shrink"], ["shrink", "grow"]]
    assert table["part of its queries"].tolist() == ["40.0 %", "30.0 %", "10.0 %"]
    assert table["remark"].tolist() == ["the same motion, time reversed"] * 2 + [""]


def test_worst_pairs_of_a_perfect_model_are_none():
    assert reports.worst_pairs(result(confusion=(10 * np.eye(3, dtype=int)).tolist())).empty


def test_rates_of_a_class_that_never_came_are_zero():
    assert reports.rates([[0, 0], [1, 3]]).tolist() == [[0, 0], [0.25, 0.75]]


def test_confusion_figure_writes_percent_of_the_row():
    figure = reports.confusion_figure(result())
    assert [t.get_text() for t in figure.axes[0].texts] == ["50", "40", "10", "30", "60", "10", "0", "5", "95"]


def test_confusion_figure_of_many_classes_stays_readable():
    names = [f"class {k}" for k in range(40)]
    figure = reports.confusion_figure(result(class_names=names, confusion=np.eye(40).tolist()))
    assert not figure.axes[0].texts and len(figure.axes[0].get_yticklabels()) == 40


def test_class_figure_sorts_and_marks_chance():
    figure = reports.class_figure(result())
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["grow", "shrink", "orbit"]
    assert "chance" in [t.get_text() for t in figure.axes[0].texts]


def test_reversed_figure_states_mean_and_chance():
    figure = reports.reversed_figure(dict(accuracy=0.62, ci95=0.01, chance=0.5, pairs=[dict(a="grow", b="shrink", accuracy=0.7)]))
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["all pairs 62.0 ± 1.0 %", "chance 50 %"]


@pytest.mark.parametrize("accuracy, words", [(0.505, "does not show that it sees"), (0.52, "does not show that it sees"), (0.7, "sees the direction"), (0.3, "confuses motions with their reversals")])
def test_direction_says_whether_time_is_seen(accuracy, words):
    "0.52 ± 0.01 is above chance on these videos, but not beyond what 200 videos do by luck."
    assert words in reports.direction(result(accuracy=accuracy, ci95=0.01, chance=0.5, videos=200))


@pytest.mark.parametrize("validated", [True, False])
def test_training_figure_needs_no_validation(validated):
    n = 30
    history = pd.DataFrame({"episodes": np.arange(n), "loss": 1.0, "loss_episode": 0.7, "accuracy": 0.5, "val_accuracy": np.nan, "val_ci95": np.nan})
    if validated: history.loc[[9, 29], ["val_accuracy", "val_ci95"]] = 0.4, 0.02
    left, right = reports.training_figure(history, 0.2).axes
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["total", "episode"]
    assert ("validation, new classes" in [t.get_text() for t in right.get_legend().get_texts()]) == validated


def test_alignment_figure_draws_every_registered_matcher():
    similarity = generator(0).uniform(size=(2, 5, 7)).astype(np.float32)
    figure = reports.alignment_figure(list(similarity), ["own", "rival"], MATCHERS)
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_xlabel() == "support frame"]
    assert len(titles) == 2 * len(MATCHERS) and titles[0].startswith("own")


def test_best_matches_are_the_largest_dots():
    similarity = np.eye(4, dtype=np.float32)
    figure = reports.alignment_figure([similarity], ["own"], {"bimhm": MATCHERS["bimhm"]})
    sizes = figure.axes[0].collections[0].get_sizes().reshape(4, 4)
    assert (sizes.argmax(1) == np.arange(4)).all() and (sizes > 0).sum() == 4


def test_show_figure_writes_the_file_it_shows(tmp_path, capsys):
    figure, ax = plt.subplots(figsize=(2, 1))
    reports.show_figure(figure, tmp_path / "figures" / "a.png", "a caption")
    assert (tmp_path / "figures" / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min")])
def test_duration(seconds, text):
    assert reports.duration(seconds) == text


def test_origin_lists_every_hash_and_flags_uncommitted_changes():
    base = dict(finished="2026-11-21T12:00:00+00:00", wall_time_s=83, device="cpu", peak_memory=dict(process_MiB=900), versions=dict(torch="2.15"), hashes=dict(weights="ab"))
    rows = reports.origin(base | dict(git=dict(commit="c0ffee", dirty=True)))
    assert rows["code"] == "commit c0ffee, with uncommitted changes" and rows["hash: weights"] == "ab" and rows["peak memory"] == "process 900 MiB"
    assert reports.origin(base | dict(git=None))["code"] == "installed package"

