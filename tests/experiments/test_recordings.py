"Recordings: exact shares against naive counts, the bound, intervals, and the report end to end, on rendered recordings and on a run."
import dataclasses
import itertools
import shlex
from dataclasses import replace
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest

from fsar.cli import main as cli
from fsar.experiments import protocol, recordings, runs as experiments
from fsar.reports import figures as reports
from fsar.core.config import Config
from fsar.core.basics import FsarError, generator
from fsar.core.files import read_json, resource
from fsar.data.datasets import Data
from fsar.data.episodes import EpisodeSampler, episode_table
from fsar.data.motions import PRESETS, RECORDING, render_dataset, split_classes
from fsar.data.splits import BENCHMARKS, load_split


# ---- how often

def naive(sizes, shots, queries):
    "Over every choice of supports and queries: how often no query is from a support's recording."
    source = np.repeat(np.arange(len(sizes)), sizes)
    outcomes = [not set(source[list(s)]) & set(source[list(q)]) for s in itertools.combinations(range(len(source)), shots)
                for q in itertools.combinations(sorted(set(range(len(source))) - set(s)), queries)]
    return np.mean(outcomes)


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1, 1], [6], [3, 2, 1], [4, 4], [2, 2, 2, 1]])
@pytest.mark.parametrize("shots, queries", [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_a_class_agrees_with_trying_everything(sizes, shots, queries):
    assert np.isclose(recordings.clear_probability(sizes, shots, queries), naive(sizes, shots, queries))


def test_large_classes_stay_exact():
    assert np.isclose(recordings.clear_probability([1] * 600, 5, 5), 1) and np.isclose(recordings.clear_probability([300, 300], 1, 1), 300 / 599)
    with pytest.raises(FsarError, match="5 shots and 5 queries need 10 videos of a class, this one has 9"): recordings.clear_probability([4, 5], 5, 5)


@pytest.mark.parametrize("name, side", [("ucf101", "test"), ("hmdb51", "val")])
def test_the_benchmarks_shares_agree_with_drawn_episodes_counted_by_hand(name, side):
    split = load_split(name, side)
    table = pd.DataFrame({"video": split.videos, "class": np.array(split.classes)[split.labels], "split": side, "source": split.sources})
    source, found = np.array(split.sources, dtype=object), recordings.benchmark_shares(shots=(1, 3), queries=2)
    for shots in (1, 3):
        sampler = EpisodeSampler(table, side, ways=5, shots=shots, queries=2, seed=1, apart=False)
        drawn = [sampler(i) for i in range(1500)]
        met = np.array([[any(source[q] == source[s] for s in e.support[e.support_labels == way]) for q, way in zip(e.query, e.query_labels)] for e in drawn])
        row = found[(found.benchmark == name) & (found.side == side) & (found.shots == shots)].iloc[0]
        for value, rate, count in ((row.queries, met.mean(), met.size), (row.episodes, met.any(1).mean(), len(met))):
            assert abs(value - rate) < 5 * np.sqrt(value * (1 - value) / count) + 1e-9


def test_every_list_that_tells_recordings_is_counted():
    found = recordings.benchmark_shares()
    assert set(found.benchmark) == {"ucf101", "hmdb51"} and len(found) == 2 * 3 * 2
    assert (found.episodes > found.queries).all() and found[found.shots == 5].queries.min() > found[found.shots == 1].queries.max()
    assert found.groupby("benchmark").videos.unique().map(sum).to_dict() == {"ucf101": 13320, "hmdb51": 6766}
    with pytest.raises(FsarError, match="kinetics100 do not say what a clip was cut from; those of ucf101, hmdb51 do"): recordings.recording_sizes(load_split("kinetics100", "val"))


def test_shared_looks_at_a_querys_own_class_and_not_at_padding():
    table = pd.DataFrame([{"video": f"{c}{v}", "class": c, "split": "test", "source": f"film {v % 3}"} for c in "abc" for v in range(9)])  # films are in all classes
    episodes = episode_table(EpisodeSampler(table, "test", ways=3, shots=(1, 2), queries=3, seed=0, apart=False), 60)
    marked, source = recordings.shared_queries(episodes, table["source"]), table["source"].to_numpy()
    for e, row in zip((episodes[i] for i in range(60)), marked):
        assert row.tolist() == [source[q] in source[e.support[e.support_labels == way]] for q, way in zip(e.query, e.query_labels)]
    assert 0 < marked.mean() < 1 and (episodes.support == -1).any()


def test_no_model_is_lifted_beyond_the_bound():
    rng = generator(5)
    for share, own, other in rng.uniform(0, 1, (200, 3)) * [0.9, 1, 1]:
        blind = share * own + (1 - share) * other
        assert blind - other <= recordings.largest_lift(share, blind) + 1e-12
    assert np.isclose(recordings.largest_lift(0.2, 0.2 + 0.8 * 0.6), 0.2 * (1 - 0.6))   # all that meet their recording are right


# ---- what it does

def test_ratios_are_those_of_the_queries_and_their_error_counts_episodes():
    correct, same = generator(1).integers(0, 2, (50, 6)).astype(float), generator(2).random((50, 6)) < 0.3
    found = recordings.by_recording(correct, same)
    assert np.isclose(found["own"]["mean"], correct[same].mean()) and np.isclose(found["other"]["mean"], correct[~same].mean())
    assert np.isclose(found["gap"]["mean"], correct[same].mean() - correct[~same].mean())
    twice = recordings.by_recording(np.repeat(correct, 3, 1), np.repeat(same, 3, 1))       # the same answers three times tell no more
    assert np.isclose(twice["gap"]["ci95"], found["gap"]["ci95"])
    resampled = [np.subtract(*(recordings.ratio(correct[k], m[k])[0] for m in (same, ~same))) for k in generator(3).integers(0, 50, (3000, 50))]
    assert 0.85 < found["gap"]["ci95"] / (1.96 * np.std(resampled)) < 1.15
    with pytest.raises(FsarError, match="none of 300 queries is of that kind"): recordings.by_recording(correct, np.zeros_like(same))


@pytest.mark.parametrize("dataset, asked, apart", [("motions-mini", False, True), ("somewhere/clips", False, True), ("somewhere/clips", True, True), ("ucf101", False, False), ("ucf101", True, True),
                                                   ("hmdb51", False, False), ("kinetics100", False, True), ("ssv2_full", False, True)])
def test_recordings_are_kept_apart_where_nothing_speaks_against_it(dataset, asked, apart):
    assert protocol.keeps_recordings_apart(Config(groups=asked), Data("", SimpleNamespace(settings={"benchmark": dataset} if dataset in BENCHMARKS else {}))) == apart


def test_groups_are_refused_where_there_are_none():
    with pytest.raises(FsarError, match="ssv2_small has no groups.*ucf101, hmdb51"): protocol.check_names(Config(dataset="ssv2_small", groups=True))


def test_tables_follow_the_flag(tiny_store):
    listed = dataclasses.replace(tiny_store, settings=tiny_store.settings | {"benchmark": "ucf101"})
    def table(store, **kw): return protocol.table_of(Config(test_queries=2, **kw), Data("tiny", store), "test", 1, 20)
    assert table(listed).info["apart"] is False and "apart" not in table(listed, groups=True).info and table(listed, groups=True).hash == table(tiny_store).hash


def test_the_set_up_says_it_where_the_lists_tell_recordings():
    assert reports.recordings_row({"data": {"benchmark": "ucf101"}, "config": {"groups": False}}) == {"query and support from different recordings": "no, as in the literature"}
    assert reports.recordings_row({"data": {"benchmark": "hmdb51"}, "config": {"groups": True}}) == {"query and support from different recordings": "yes"}
    assert not any(reports.recordings_row({"data": {"benchmark": d}, "config": {"groups": False}}) for d in (None, *(k for k, b in BENCHMARKS.items() if not b.source)))


# ---- the report

TEMPLATE = resource("templates") / "groups.ipynb"


def test_the_command_has_the_templates_parameters_and_defaults():
    command = cli.parse(["groups"])
    known = papermill.inspect_notebook(str(TEMPLATE))
    assert set(known) == set(vars(command)) - {"json"} and all(p["help"] for p in known.values())
    values: dict = {}
    exec(next(c for c in nbformat.read(TEMPLATE, 4).cells if "parameters" in c.metadata.get("tags", ())).source, values)
    assert all(values[name] == (list(v) if isinstance(v, tuple) else v) for name, v in vars(command).items() if name != "json")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("groups") / "report"
    tiny = dict(methods=["protonet"], seeds=[0], recordings=6, takes=2, train_episodes=2, episodes=60)
    return out, recordings.recordings_report(out, **tiny, progress=False)


def test_the_whole_report_from_small_settings(report, says_its_origin):
    out, metrics = report
    says_its_origin(metrics, out, "videos and split", "prepared frames", "weights protonet-0")
    command = cli.parse(shlex.split(metrics["command"])[1:])
    assert (command.methods, command.seeds, command.recordings, command.takes, command.train_episodes, command.episodes) == (("protonet",), (0,), 6, 2, 2, 60) and metrics["seeds"] == [0]
    assert metrics["data"] | {"name": "", "hash": ""} == {"name": "", "hash": "", "split": "test", "classes": 10, "videos": 120, "listed": 120, "recordings": 60}
    for e in metrics["effects"]["protonet"]:
        assert e["episodes"] == 60 and np.isclose(e["difference"]["mean"], e["blind"]["mean"] - e["apart"]["mean"])
        assert np.isclose(e["share"], recordings.shares([[2] * 6] * 10, shots=e["shots"])["queries"], atol=0.05)
        assert np.isclose(e["blind"]["mean"], e["share"] * e["own"]["mean"] + (1 - e["share"]) * e["other"]["mean"])
        assert e["own"]["mean"] > e["other"]["mean"]                   # even hardly trained, the same look is recognised
    page = (out / "report.html").read_text()
    assert {p.name for p in (out / "figures").iterdir()} == {"shares.png", "recordings.png", "effect.png"}
    assert "What this does not show" in page and "fsar study recordings --methods protonet --seeds 0 --recordings 6 --takes 2 --train-episodes 2 --episodes 60" in page
    assert read_json(out / "run.json")["status"] == "finished" and "UCF101, test" in page


def test_another_kind_of_report_is_not_replaced(report, tmp_path):
    (tmp_path / "metrics.json").write_text('{"gains": {}}')
    with pytest.raises(FsarError, match="another kind of report"): recordings.recordings_report(tmp_path)
    for wrong, words in ((dict(takes=1), "takes=1: at least 2"), (dict(episodes=1), "episodes=1: at least 2"), (dict(seeds=[]), "at least one seed"), (dict(methods=["otan"]), "unknown method 'otan'")):
        with pytest.raises(FsarError, match=words): recordings.recordings_report(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_a_run_of_ones_own_is_asked(tmp_path, says_its_origin):
    "With a source rule the two recordings of three takes are told apart; without one there is nothing to keep apart."
    classes = split_classes("train")[:5] + split_classes("test")[:5]
    folder = render_dataset(tmp_path / "clips", replace(PRESETS["motions-mini"], name="clips", size=48, frames=12, takes=3, videos_per_class=6, classes=classes), workers=1, progress=False)
    base = Config(dataset=str(folder), method="protonet", short_side=48, size=32, frames=4, episodes=1, queries=1, validate_every=0, protocol="last", precision="fp32", test_shots=(1,), test_queries=1, test_episodes=2)
    for name, source in (("told", RECORDING), ("not told", "")): experiments.run(base.replace(source=source, out=str(tmp_path / name)), progress=False)
    metrics = recordings.recordings_report(tmp_path / "report", checkpoint=str(tmp_path / "told"), episodes=80, progress=False)
    [effect] = metrics["effects"]["protonet"]
    assert metrics["data"]["recordings"] == 10 and abs(effect["share"] - 2 / 5) < 0.1 and effect["episodes"] == 80
    says_its_origin(metrics, tmp_path / "report", "weights protonet-0")
    assert metrics["hashes"]["weights protonet-0"] == read_json(tmp_path / "told" / "metrics.json")["hashes"]["weights"]
    assert f"fsar study recordings --checkpoint {tmp_path / 'told'} --episodes 80" in (tmp_path / "report" / "report.html").read_text()
    with pytest.raises(FsarError, match="every test video of clips is a recording of its own"): recordings.load_checkpoint_run(tmp_path / "not told")
