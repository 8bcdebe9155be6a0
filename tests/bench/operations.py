"""Budgets of operations: what every hot path does, counted without noise. A new path's budget is recorded when it is first seen.

`python tests/bench/operations.py` shows what has changed, `--write` records it as the new budgets."""
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fsar.core.files import read_json, write_json
from fsar.core.basics import torch_seed
from fsar.bench.growth import counts, learning, noise_batch, scoring, subject
from fsar.model.cost import Task
from fsar.model.matching import MATCHERS
from fsar.model.base import METHODS
from fsar.model.registry import create_model
from fsar.model.counting import noise

BUDGETS = Path(__file__).with_name("operations.json")
SLACK = {"multiply_adds": 0.0, "elements": 0.05, "calls": 0.05}  # versions of torch put some operators together otherwise; arithmetic is arithmetic
TASK = Task(frames=6, ways=3, shots=2, queries=2)
SIZE = 32  # pixels


def embedding(method: str) -> Callable[[], Any]:
    "Two videos through a method's embed, at test."
    model = create_model(method, backbone="resnet_micro", frames=TASK.frames, classes=12).eval()
    clips = noise((2, model.clip_frames, 3, SIZE, SIZE), torch.uint8)
    return lambda: torch.no_grad()(model.embed)(clips)


def step(method: str) -> Callable[[], Any]:
    "A training step, forward and backward."
    model = create_model(method, backbone="resnet_micro", frames=TASK.frames, classes=12).train()
    batch = noise_batch(model, TASK, SIZE)
    return lambda: model(batch).loss.backward()


def head(work: Callable[..., Callable[[], Any]], method: str) -> Callable[[], Any]:
    "What an episode costs beside its embedding: at test, or with losses and gradients."
    return work(subject(method, TASK.frames, size=SIZE), TASK)


def matching(name: str) -> Callable[[], Any]:
    "A matcher, two queries with three supports, forward and backward."
    similarities = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return lambda: MATCHERS[name](similarities).sum().backward()


def paths() -> dict[str, Callable[[], Callable[[], Any]]]:
    "Every hot path by name: what makes the call that is counted."
    works = {"embed": embedding, "score": partial(head, scoring), "learn": partial(head, learning), "step": step}
    return ({f"matcher {name}": partial(matching, name) for name in sorted(MATCHERS)}
            | {f"{method} {work}": partial(make, method) for method in sorted(METHODS) for work, make in works.items()})


def measured(name: str) -> dict[str, int]:
    "Multiply-adds, numbers written and operators of a path."
    with torch_seed(0): return vars(counts(paths()[name]()))


def record(name: str, found: dict[str, int], budgets: Path = BUDGETS) -> str:
    "Write the counts of a new path as its budget; return the line that says so."
    known = read_json(budgets)
    known["paths"] = dict(sorted((known["paths"] | {name: found}).items(), key=lambda item: order(item[0])))
    write_json(budgets, known)
    return f"{name}: a new path; its counts are recorded as its budget in {budgets.name}: commit them"


def order(name: str) -> tuple[bool, str, int]:
    "Matchers first, then methods, each with embed, score, learn, step."
    first, last = name.rsplit(" ", 1)
    if first == "matcher": return (False, last, 0)
    return (True, first, ("embed", "score", "learn", "step").index(last))


def objections(name: str, found: dict[str, int], budget: dict[str, int]) -> list[str]:
    "What is wrong with the counts of a path: beyond its budget, or so far below that the budget means nothing."
    def one(what: str) -> str | None:
        now, then = found[what], budget[what]
        text = f"{name}: {now:,} {what.replace('_', '-')}, the budget is {then:,} ({100 * (now - then) / max(then, 1):+.1f} %)"
        if now > then * (1 + SLACK[what]): return f"{text}. A hot path does more than it did. If it must: python tests/bench/operations.py --write"
        if now < then * (1 - SLACK[what]): return f"{text}. Well done; so that it stays: python tests/bench/operations.py --write"
    return [text for text in map(one, SLACK) if text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="record the counts of now as the budgets")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    known = read_json(BUDGETS)["paths"] if BUDGETS.exists() else {}
    found = {name: measured(name) for name in paths()}
    changes = [f"{name}: no budget yet" for name in found if name not in known]
    changes += [text for name, now in found.items() if name in known for text in objections(name, now, known[name])]
    changes += [f"{name}: a budget for what is no path any more" for name in known.keys() - found.keys()]
    print("\n".join(changes) or f"{len(found)} paths keep to their budgets")
    if write:
        write_json(BUDGETS, {"torch": torch.__version__, "paths": found})
        print(f"{len(found)} budgets written to {BUDGETS}")


if __name__ == "__main__": main()
