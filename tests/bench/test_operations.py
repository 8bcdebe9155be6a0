"""Hot paths do no more than they did, and what they do grows no faster than their formulas: by counts of operations, which know no noise."""
import warnings
from dataclasses import replace

import operations
import pytest
import torch

from fsar.core.files import read_json, write_json
from fsar.core.basics import torch_seed
from fsar.bench.growth import QUICK, Plan, answering_episodes, counts, exponents, growth, learning, own_terms, scoring, subject
from fsar.model.base import METHODS as REGISTRY, FewShotModel
from fsar.model.cost import Cost, Task
from fsar.model.matching import MATCHERS

METHODS = sorted(REGISTRY)
RECORDED = read_json(operations.BUDGETS)
methods = pytest.mark.parametrize("method", METHODS)


@pytest.mark.parametrize("name", operations.paths())
def test_a_path_keeps_to_its_budget(name):
    found, budget = operations.measured(name), RECORDED["paths"].get(name)
    if budget is None: return warnings.warn(operations.record(name, found), stacklevel=1)
    wrong = operations.objections(name, found, budget)
    assert not wrong, "\n".join([*wrong, f"(recorded with torch {RECORDED['torch']}, this is {torch.__version__})"])


def test_budgets_are_for_what_there_is():
    assert set(RECORDED["paths"]) <= set(operations.paths())


def test_a_new_path_gets_a_budget(tmp_path):
    budgets, found = tmp_path / "operations.json", {"multiply_adds": 3, "elements": 2, "calls": 1}
    write_json(budgets, RECORDED)
    assert "mine score: a new path" in operations.record("mine score", found, budgets)
    after = read_json(budgets)["paths"]
    assert after.pop("mine score") == found and after == RECORDED["paths"] and list(after) == list(RECORDED["paths"])


def test_a_budget_can_be_broken():
    budget = {"multiply_adds": 1000, "elements": 100, "calls": 100}
    def objections(**now): return " ".join(operations.objections("otam score", budget | now, budget))
    assert not objections() and not objections(calls=104, elements=96)               # what another version of torch may do
    for now in (dict(multiply_adds=1001), dict(calls=106), dict(elements=106)):
        name, value = next(iter(now.items()))
        assert f"otam score: {value:,} {name.replace('_', '-')}, the budget is {budget[name]:,}" in objections(**now) and "does more" in objections(**now)
    assert "so that it stays" in objections(multiply_adds=999) and "so that it stays" in objections(calls=90)


def calls_of(work, method: str, tasks: list[Task]) -> list[int]:
    "How many operators each task takes."
    with torch_seed(0): return [counts(work(subject(method, task.frames), task)).calls for task in tasks]


@methods
@pytest.mark.parametrize("work", [scoring, learning], ids=["score", "learn"])
def test_no_loop_over_ways_shots_or_queries(method, work):
    small = Task(frames=4, ways=3, shots=2, queries=2)
    tasks = [small, replace(small, ways=6), replace(small, shots=5), replace(small, queries=7)]
    found = calls_of(work, method, tasks)
    assert max(found) <= 1.05 * min(found)                                           # TRX chooses between two forms of a length, a few calls apart; a loop would double or triple them


@methods
def test_calls_do_not_grow_with_frames_but_for_a_sweep_over_them(method):
    found = calls_of(scoring, method, [Task(frames=T, ways=3) for T in (5, 8, 11, 14)])
    steps = {b - a for a, b in zip(found, found[1:])}
    assert len(steps) == 1 and (steps.pop() > 0) == (method == "otam")               # linear in T, or not at all


@pytest.mark.parametrize("name", sorted(MATCHERS))
def test_a_matcher_has_no_loop_over_pairs(name):
    found = [counts(lambda lead=lead: MATCHERS[name](torch.zeros(*lead, 6, 6))).calls for lead in ((1, 1), (7, 5), (4, 7, 5))]
    assert len(set(found)) == 1


@methods
def test_a_test_has_no_loop_within_a_batch(method):
    one = subject(method, 4)
    episodes = [counts(answering_episodes(one, Task(frames=4, ways=3, episodes=E), batch_size=16)).calls for E in (2, 9, 16)]
    videos = [counts(lambda V=V: torch.no_grad()(one.model.embed)(operations.noise((V, one.model.clip_frames, 3, 32, 32), torch.uint8))).calls for V in (2, 7)]
    assert len(set(episodes)) == 1 and len(set(videos)) == 1
    twice = counts(answering_episodes(one, Task(frames=4, ways=3, episodes=32), batch_size=16)).calls
    assert 1.5 < twice / episodes[0] <= 2                                            # two batches


def test_every_method_of_ours_has_a_formula():
    without = [name for name in METHODS if REGISTRY[name].cost is None]
    assert not without, f"declare how the work of {', '.join(without)} grows: cost = Cost(score=…), see nbs/30_model/03_cost.ipynb"


def test_a_method_without_a_formula_is_measured_but_not_judged(monkeypatch):
    class Plain(REGISTRY["protonet"]): cost = None
    class Declared(REGISTRY["protonet"]): cost = Cost(score="Q·N·T")
    assert FewShotModel.cost is None
    for entry in (Plain, Declared): monkeypatch.setitem(REGISTRY._entries, entry.__name__.lower(), entry)
    assert own_terms("plain", "score") is None and list(own_terms("declared", "score")) == ["S·T", "Q·T", "Q·N·T"]
    found = exponents(growth(["plain"], replace(QUICK, rounds=0), works=["score"]))
    assert found["judged"].isna().all() and found.loc[found["measure"] == "elements", "exponent"].notna().all()


LONG = Plan({"frames": (8, 16, 32), "ways": (3, 12), "shots": (4, 32), "queries": (2, 8), "videos": (4, 8), "episodes": (4, 8)}, backbone="resnet_micro", rounds=0, most=1e9, most_written=1e8)


@methods
def test_no_method_grows_faster_than_its_formula(method):
    found = exponents(growth([method], LONG))
    exact = found[found["measure"] != "seconds"]
    wrong = exact[exact["judged"].eq(False)]
    assert wrong.empty, wrong.to_string()
    assert exact[exact["measure"] == "elements"]["judged"].eq(True).all()            # nothing that was not judged


def test_work_that_grows_faster_is_noticed():
    table = growth(["protonet"], replace(QUICK, rounds=0), works=["score"])
    worse = table.assign(multiply_adds=table["multiply_adds"] * table["value"], elements=table["elements"] * table["value"] ** 2)
    found = exponents(worse).set_index(["dimension", "measure"])["judged"]
    assert not found["shots", "multiply_adds"] and not found["queries", "elements"]
    assert exponents(table)["judged"].ne(False).all()
