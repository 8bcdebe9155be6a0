"""Matchers against naive loops in float64, their properties over the whole registry, and their numerics."""
import itertools
import math

import pytest
import torch

from fsar.core.basics import torch_seed
from fsar.model.matching import MATCHERS, alignment, bimhm, frame_similarity, otam

LENGTHS = [(1, 1), (1, 5), (5, 1), (2, 2), (2, 3), (8, 8), (8, 7), (7, 12), (33, 20), (64, 64)]


def similarity(tq: int, ts: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    with torch_seed(seed, tq, ts): return torch.rand(batch, tq, ts, dtype=torch.float64) * 2 - 1


def otam_loop(d: list[list[float]], lam: float) -> float:
    "One direction, cell by cell, in Python floats: zero columns left and right, row 0 cumulative, soft minimum elsewhere."
    rows = [[0.0, *row, 0.0] for row in d]
    width = len(rows[0])
    gamma = [[0.0] * width for _ in rows]
    for m in range(1, width): gamma[0][m] = gamma[0][m - 1] + rows[0][m]
    for row in range(1, len(rows)):
        for m in range(1, width):
            before = [gamma[row - 1][m - 1], gamma[row][m - 1]]
            if m == 1 or m == width - 1: before.append(gamma[row - 1][m])
            low = min(before)
            soft = low - lam * math.log(sum(math.exp(-(b - low) / lam) for b in before))
            gamma[row][m] = rows[row][m] + soft
    return gamma[-1][-1]


def naive(name: str, sim: torch.Tensor) -> float:
    "Each matcher from its definition, with Python loops over one similarity matrix."
    d = [[1 - x for x in row] for row in sim.tolist()]
    columns = [list(c) for c in zip(*d)]
    tq, ts = len(d), len(columns)
    query = sum(min(row) for row in d) / tq
    support = sum(min(c) for c in columns) / ts
    steps = max(tq, ts)
    return {"mean": lambda: sum(map(sum, d)) / (tq * ts),
            "diagonal": lambda: sum(d[i * tq // steps][i * ts // steps] for i in range(steps)) / steps,
            "bimhm": lambda: query + support, "chamfer": lambda: (query + support) / 2,
            "chamfer_query": lambda: query, "chamfer_support": lambda: support,
            "otam": lambda: otam_loop(d, 0.1) + otam_loop(columns, 0.1)}[name]()


@pytest.mark.parametrize("name, lengths", list(itertools.product(MATCHERS, LENGTHS)), ids=str)
def test_equals_the_loop_in_float64(name, lengths):
    sim = similarity(*lengths)
    expected = torch.tensor([naive(name, s) for s in sim], dtype=torch.float64)
    assert torch.allclose(MATCHERS[name](sim), expected, rtol=1e-10, atol=1e-10)
    assert torch.allclose(MATCHERS[name](sim.float()).double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("lam", [0.01, 0.1, 1.0])
def test_otam_at_other_temperatures(lam):
    sim = similarity(9, 6, batch=1)
    d = (1 - sim[0]).tolist()
    assert otam(sim, lam).item() == pytest.approx(otam_loop(d, lam) + otam_loop([list(c) for c in zip(*d)], lam), rel=1e-10)


@pytest.mark.parametrize("name", MATCHERS)
def test_leading_dimensions_are_a_loop(name):
    sim = torch.stack([similarity(4, 6, batch=3, seed=s) for s in range(2)])
    assert torch.equal(MATCHERS[name](sim), torch.stack([torch.stack([MATCHERS[name](s) for s in row]) for row in sim]))


@pytest.mark.parametrize("name", sorted(set(MATCHERS) - {"chamfer_query", "chamfer_support"}))
def test_symmetric(name):
    sim = similarity(5, 8)
    assert torch.allclose(MATCHERS[name](sim), MATCHERS[name](sim.mT), rtol=1e-12)


@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finite_with_finite_gradients_at_64_frames(name, dtype):
    for fill in (similarity(64, 64), torch.ones(1, 64, 64), -torch.ones(1, 64, 64)):
        sim = fill.to(dtype).requires_grad_()
        out = MATCHERS[name](sim)
        out.sum().backward()
        assert out.dtype == torch.float32 and out.isfinite().all() and sim.grad.isfinite().all()


@pytest.mark.parametrize("name", MATCHERS)
def test_gradients_are_the_finite_differences(name):
    sim = similarity(4, 5, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(MATCHERS[name], (sim,), eps=1e-6, atol=1e-6)


def test_only_order_aware_matchers_see_a_reversal():
    with torch_seed(3): video = torch.randn(1, 8, 16).cumsum(1)
    forward, backward = frame_similarity(video, video), frame_similarity(video, video.flip(1))
    for name in ("mean", "bimhm", "chamfer"): assert torch.allclose(MATCHERS[name](forward), MATCHERS[name](backward), atol=1e-6)
    for name in ("diagonal", "otam"): assert MATCHERS[name](forward) < MATCHERS[name](backward) - 0.1


def test_bimhm_sums_are_frames_times_means():
    sim = similarity(8, 8)
    assert torch.allclose(bimhm(sim, sums=True), 8 * bimhm(sim))


def test_similarity_stays_in_float32_under_autocast():
    with torch_seed(0): q, s = torch.randn(2, 3, 16), torch.randn(4, 5, 16)
    plain = frame_similarity(q, s)
    with torch.autocast("cpu", torch.bfloat16): cast = frame_similarity(q, s)
    assert cast.dtype == torch.float32 and torch.equal(plain, cast) and plain.shape == (2, 4, 3, 5)
    assert frame_similarity(q.half(), s.half()).dtype == torch.float32
    expected = (q[1, 2] @ s[3, 4]) / (q[1, 2].norm() * s[3, 4].norm() + 0.01)
    assert torch.isclose(frame_similarity(q, s, 0.01)[1, 3, 2, 4], expected)


def test_alignment_weights_are_the_share_of_each_pair():
    sim = similarity(6, 6, batch=1)
    weights = alignment(bimhm, sim)
    assert torch.isclose(weights.sum(), torch.tensor(2.0)) and (weights >= 0).all()
    with torch.inference_mode(): assert (alignment(otam, sim) >= -1e-6).all()
