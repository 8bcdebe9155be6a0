"""The task-adaptive sampler: its gradient against finite differences and exact expectations, its resampling against NumPy, its promises at test."""
import numpy as np
import pytest
import torch

from fsar.core.basics import FsarError, torch_seed
from fsar.methods.sampler import (PerturbedTopK, SampledModel, TaskLearner, amplify, inverse_transform, perturbed_top_frames, picked, profiles, related,
                                  rescale_01, top_frames)
from fsar.model.base import METHODS
from fsar.model.registry import create_model
from fsar.model.blocks import interpolation, sinusoids
from test_methods import batch, logits_of, pixels, rows


def make(method="protonet", **options): return create_model(method, backbone="resnet_micro", classes=12, sampler="vim", options={f"sampler.{k}": v for k, v in options.items()})


# ---- the choice

def test_top_frames_against_a_sort():
    with torch_seed(0): scores = torch.randn(20, 16)
    for row, found in zip(scores, top_frames(scores, 8)):
        assert found.tolist() == sorted(sorted(range(16), key=lambda i: -row[i])[:8])


def test_expected_choice_and_gradient_by_integration():
    "Two frames, one of them chosen: P(first) = Φ((a − b)/(σ√2)), a closed form for value and gradient."
    sigma, gap = 0.05, 0.03
    scores = torch.tensor([[0.5 + gap, 0.5]], dtype=torch.float64, requires_grad=True)
    with torch_seed(1): soft = perturbed_top_frames(scores, 1, samples=400_000, sigma=sigma)
    soft[0, 0, 0].backward()
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), sigma * 2 ** 0.5)
    assert soft[0, 0, 0].item() == pytest.approx(normal.cdf(torch.tensor(gap)).item(), abs=3e-3)
    density = normal.log_prob(torch.tensor(gap)).exp().item()
    assert scores.grad[0].tolist() == pytest.approx([density, -density], rel=0.02)


def test_gradient_against_finite_differences_of_hard_choices():
    with torch_seed(2):
        scores, noise, weight = torch.rand(3, 6, dtype=torch.float64) * 0.3, torch.randn(60_000, 3, 6, dtype=torch.float64), torch.randn(3, 2, 6, dtype=torch.float64)
    def mean(s):
        hard = torch.nn.functional.one_hot(top_frames(s + 0.1 * noise, 2), 6).double().mean(0)
        return (hard * weight).sum()
    x = scores.clone().requires_grad_()
    (PerturbedTopK.apply(x, noise, 2, 0.1) * weight).sum().backward()
    step, numeric = 0.02, torch.zeros_like(scores)
    for i in range(3):
        for j in range(6):
            e = torch.zeros_like(scores); e[i, j] = step
            numeric[i, j] = (mean(scores + e) - mean(scores - e)) / (2 * step)
    assert (x.grad - numeric).norm() < 0.05 * numeric.norm()


def test_gradient_is_the_papers_estimator_without_its_mean():
    "E[onehot · noiseᵀ]/σ from a loop over draws; subtracting the mean choice changes it by (mean noise)·(mean choice) only."
    with torch_seed(3): scores, noise, out = torch.rand(1, 5, dtype=torch.float64), torch.randn(300, 1, 5, dtype=torch.float64), torch.randn(1, 2, 5, dtype=torch.float64)
    x = scores.clone().requires_grad_()
    (PerturbedTopK.apply(x, noise, 2, 0.2) * out).sum().backward()
    draws = []
    for z in noise[:, 0]:
        hard = torch.zeros(2, 5, dtype=torch.float64)
        shaken = (scores[0] + 0.2 * z).tolist()
        for place, frame in enumerate(sorted(sorted(range(5), key=lambda i: -shaken[i])[:2])): hard[place, frame] = 1
        draws.append(hard)
    mean = sum(draws) / 300
    expected = sum(((h - mean) * out[0]).sum() * z for h, z in zip(draws, noise[:, 0])) / (299 * 0.2)
    assert torch.allclose(x.grad[0], expected, rtol=1e-9)


def test_soft_choice_becomes_the_hard_one_as_the_noise_vanishes():
    with torch_seed(4):
        scores = torch.randn(4, 16)
        soft = perturbed_top_frames(scores, 8, samples=50, sigma=1e-6)
    assert torch.equal(soft.argmax(-1), top_frames(scores, 8)) and torch.allclose(soft.amax(-1), torch.ones(4, 8))


# ---- the amplifier

def test_interpolation_is_numpys():
    with torch_seed(5): positions, signal = torch.rand(7, dtype=torch.float64) * 12 - 1, torch.randn(11, dtype=torch.float64)
    assert np.allclose(interpolation(positions, 11) @ signal, np.interp(positions, np.arange(11), signal))


@pytest.mark.parametrize("length", [5, 16, 40])
def test_inverse_transform_by_bisection(length):
    with torch_seed(6): profile = torch.rand(3, 9, dtype=torch.float64) + 0.01
    found = inverse_transform(profile, length)
    for p, row in zip(profile.numpy(), found):
        edges = np.concatenate([[0], np.cumsum(p / p.sum())])
        expected = np.interp((np.arange(length) + 0.5) / length, edges, np.arange(10)) - 0.5     # F is piecewise linear, so is its inverse
        assert np.allclose(row, expected)
        assert (row.diff() > 0).all()


def test_inverse_transform_gradient_is_numerical():
    with torch_seed(7): profile = (torch.rand(2, 6, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: inverse_transform(p, 7), profile)


def test_amplify_reads_each_pixel_from_where_the_inverse_distribution_says():
    with torch_seed(8): frame, saliency = torch.rand(3, 10, 12, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64)
    level = (saliency - saliency.min()) / (saliency.max() - saliency.min()) + 0.2
    reads = []
    for axis, length in ((1, 10), (0, 12)):
        coarse = [max((level[k] if axis == 1 else level[:, k]).tolist()) for k in range(4)]
        fine = np.interp((np.arange(length) + 0.5) * 4 / length - 0.5, np.arange(4), coarse)
        edges = np.concatenate([[0], np.cumsum(fine / fine.sum())])
        reads.append(np.clip(np.interp((np.arange(length) + 0.5) / length, edges, np.arange(length + 1)) - 0.5, 0, length - 1))
    found = amplify(frame, saliency, 0.2)
    for c in range(3):
        for i, y in enumerate(reads[0]):
            for j, x in enumerate(reads[1]):
                (a, fa), (b, fb) = (divmod(v, 1) for v in (y, x))
                a, b = int(a), int(b)
                def corner(row, column, channel=c): return frame[channel, min(row, 9), min(column, 11)].item()
                expected = (1 - fa) * ((1 - fb) * corner(a, b) + fb * corner(a, b + 1)) + fa * ((1 - fb) * corner(a + 1, b) + fb * corner(a + 1, b + 1))
                assert found[c, i, j].item() == pytest.approx(expected, rel=1e-9)


def test_what_is_salient_becomes_larger():
    frame, saliency = torch.zeros(3, 32, 32), torch.zeros(8, 8)
    frame[:, 8:12, 20:24] = 1; saliency[2, 5] = 1
    assert amplify(frame, saliency, 0.2)[0].sum() > 2.5 * frame[0].sum()
    rows_, columns = profiles(saliency, (32, 32), 0.2)
    assert rows_.argmax() in range(8, 12) and columns.argmax() in range(20, 24)


def test_related_features_and_saliency_as_loops():
    with torch_seed(9): f, w = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for i in range(4):
        primed = sum((f[i] * f[j]).sum() / 6 ** 0.5 * f[j] for j in range(4))
        expected += w[i] * primed / 4
    assert torch.allclose(torch.einsum("chw,c->hw", related(f), w) / 4, expected, rtol=1e-10)


def test_rescale_01_values():
    x = torch.tensor([[1.0, 3, 2], [5, 5, 5]])
    assert torch.equal(rescale_01(x, 1), torch.tensor([[0, 1, 0.5], [0, 0, 0]]))


# ---- the task

def test_task_weights_use_the_mean_over_real_supports_and_training_draws():
    with torch_seed(10): learner, summary = TaskLearner(5, (3, 4), width=6).double().eval(), torch.randn(4, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, -1, 1])
    task = (summary[0] + summary[1] + summary[3]) / 3
    mean, log_variance = (learner.statistics.weight @ task + learner.statistics.bias).split(6)
    for found, head in zip(learner(summary, labels), learner.heads):
        raw = head.weight @ mean + head.bias
        assert torch.allclose(found, raw / raw.norm(), rtol=1e-10)
    with torch_seed(11): drawn = learner.train()(summary, labels)[0]
    with torch_seed(11): noise = torch.randn(6, dtype=torch.float64)
    raw = learner.heads[0].weight @ (mean + noise * (log_variance / 2).exp()) + learner.heads[0].bias
    assert torch.allclose(drawn, raw / raw.norm(), rtol=1e-10)


def test_scores_are_the_papers():
    model = make(amplify=False).double().eval()
    clips = pixels(3, 16).double() / 255
    emb = model.embed(clips)
    s, summary = model.sampler, emb["summary"]
    w2 = s.learner(summary[:2], torch.tensor([0, 1]))[0]
    maps = s.scan(model.backbone.normalise(clips).flatten(0, 1)).unflatten(0, (3, 16))
    position = sinusoids(16, 96).double()
    for v in range(3):
        g = maps[v].mean(0)
        raw = torch.stack([w2 @ torch.relu(s.first(torch.cat([maps[v, i], g]).mean((-2, -1)) + position[i])) for i in range(16)])
        level = (raw - raw.min()) / (raw.max() - raw.min())
        chosen = s.choice(emb["hidden"], w2)[v].argmax(-1)
        assert chosen.tolist() == sorted(sorted(range(16), key=lambda i: -level[i])[:8])


# ---- promises

@pytest.mark.parametrize("options", [dict(amplify=False), dict(select=False), dict(adaptive=False), dict(select=False, adaptive=False), dict(amplify=False, adaptive=False)], ids=str)
def test_parts_switch_off_and_what_is_left_learns(options):
    model = make(**options).train()
    model(batch(model)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_deterministic_at_test_and_bytes_stay_bytes_without_the_amplifier():
    model, clips = make(amplify=False).eval(), pixels(4, 16)
    with torch.no_grad():
        emb = model.embed(clips)
        once, again = (model.adapt(rows(emb, slice(0, 2)), torch.tensor([0, 1]), rows(emb, slice(2, 4)))[1] for _ in range(2))
    assert all(torch.equal(once[k], again[k]) for k in once)
    assert once["clips"].dtype == torch.uint8
    for v in range(2): assert torch.equal(once["clips"][v], clips[2 + v, once["chosen"][v].argmax(-1)])


def test_without_selector_and_weights_of_its_own_evenly_spread_frames():
    model = make(select=False, dense=24).eval()
    with torch.no_grad():
        emb = model.embed(pixels(2, 24))
        _, query = model.adapt(rows(emb, slice(0, 1)), torch.tensor([0]), rows(emb, slice(1, 2)))
    assert query["chosen"][0].argmax(-1).tolist() == [1, 4, 7, 10, 13, 16, 19, 22]


def test_the_query_is_seen_with_its_tasks_eyes():
    model, clips = make().eval(), pixels(5, 16)
    with torch.no_grad():
        emb = model.embed(clips)
        seen = [model.adapt(rows(emb, [a, b]), torch.tensor([0, 1]), rows(emb, [4]))[1]["clips"] for a, b in ((0, 1), (2, 3), (1, 0))]
    assert not torch.equal(seen[0], seen[1]) and torch.allclose(seen[0], seen[2], atol=1e-6)      # another task, another view; the order of supports is no matter


def test_one_frames_weights_do_not_depend_on_the_query():
    model, clips = make().eval(), pixels(4, 16)
    with torch.no_grad():
        emb = model.embed(clips)
        a, b = (model.adapt(rows(emb, [0, 1]), torch.tensor([0, 1]), rows(emb, q))[0]["clips"] for q in ([2], [3]))
    assert torch.equal(a, b)


def test_noise_falls_with_the_episodes_seen():
    sampler = make().sampler
    for draws, sigma in ((0, 0.05), (999, 0.05), (1000, 0.04), (2500, 0.032), (50_000, 0.01)):
        sampler.draws.fill_(draws)
        assert sampler.noise() == pytest.approx(sigma)
    model = make().train()
    model(batch(model)); model(batch(model))
    assert int(model.sampler.draws) == 2
    model.eval()(batch(model))
    assert int(model.sampler.draws) == 2


def test_molo_behind_a_sampler_reconstructs_what_it_saw():
    model = create_model("molo", backbone="resnet_micro", classes=12, sampler="vim", options={"redraw": 4}).train()
    out = model(batch(model))
    assert out.losses["reconstruction"][1].isfinite() and out.logits.shape == (6, 3)


def test_refusals():
    with pytest.raises(FsarError, match="dense=4 frames, but has to choose 8"): make(dense=4)
    with pytest.raises(FsarError, match="leave select or amplify on"): make(select=False, amplify=False)
    with pytest.raises(FsarError, match="stride is 8, 16 or 32 pixels, not 4"): make(scan_stride=4)
    with pytest.raises(FsarError, match="scans 16 frames of a video, got clips of 8"): make().embed(pixels(1, 8))
    with pytest.raises(FsarError, match="sampler 'vim' has no option 'dens'. Did you mean 'dense'"): make(dens=20)
    with pytest.raises(FsarError, match="unknown sampler 'vin'. Did you mean 'vim'"): create_model("protonet", backbone="resnet_micro", sampler="vin")
    for name, method in METHODS.items():
        if issubclass(method, SampledModel):
            with pytest.raises(FsarError, match="samples already"): create_model(name, backbone="resnet_micro", sampler="vim")


def test_training_repeats_to_the_bit():
    grads = []
    for _ in range(2):
        model = make(samples=50).train()
        with torch_seed(12): model(batch(model)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_picked_softly_and_hard_agree_on_a_one_hot_choice():
    with torch_seed(13): x = torch.randn(2, 5, 3, 4)
    one = torch.nn.functional.one_hot(torch.tensor([[0, 3], [1, 4]]), 5)
    assert torch.allclose(picked(x, one.float(), soft=True), picked(x, one, soft=False))


def test_logits_are_the_inner_methods_on_the_chosen_clips():
    model, clips = make().eval(), pixels(5, 16)
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        emb = model.embed(clips)
        support, query = model.adapt(rows(emb, slice(0, 3)), labels, rows(emb, slice(3, 5)))
        inner = model.model.score(model.model.embed(support["clips"]), labels, model.model.embed(query["clips"]), 3)
    assert torch.allclose(logits_of(model, rows(emb, slice(0, 3)), labels, rows(emb, slice(3, 5)), 3), inner, atol=1e-5)
