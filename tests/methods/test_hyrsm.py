"""HyRSM's equations written again as loops in float64, its switches, its errors, and the names of the authors' checkpoints."""
import math

import pytest
import torch
from torchvision import models

from fsar.core.basics import FsarError, torch_seed
from fsar.data.episodes import EpisodeBatch
from fsar.model.matching import MATCHERS
from fsar.methods.hyrsm import FrameRelation, HyRSM, TaskRelation, coherence, shifted_self_similarity, shifted_similarity
from fsar.model.registry import create_model, parse_options
from fsar.model.blocks import sinusoids, steep_sinusoids
from fsar.model.base import translated


def make(variant="paper", classes=12, backbone="resnet_micro", **options) -> HyRSM:
    return create_model("hyrsm", backbone=backbone, classes=classes, options={"variant": variant, **options}, seed=1)


def episode(frames=5, ways=3, shots=2, queries=2) -> EpisodeBatch:
    with torch_seed(3): clips = torch.randint(0, 256, (ways * (shots + queries), frames, 3, 32, 32), dtype=torch.uint8)
    return EpisodeBatch(support=clips[:ways * shots], support_labels=torch.arange(ways).repeat_interleave(shots), query=clips[ways * shots:],
                        query_labels=torch.arange(ways).repeat_interleave(queries), class_ids=torch.arange(ways) + 4, index=0)


def frames_of(videos, frames=4, channels=128, seed=0):
    with torch_seed(seed): return torch.randn(videos, frames, channels, dtype=torch.float64)


# --- the equations, one number at a time ---------------------------------------------------------------------------------------------------

def softmax(row):
    top = max(row)
    total = sum(math.exp(x - top) for x in row)
    return [math.exp(x - top) / total for x in row]


def heads_loop(q, k, v, heads):
    "Multi-head attention of one sequence (L, C), head by head and row by row."
    width, found = q.shape[1] // heads, torch.zeros_like(q)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for i in range(len(q)):
            weights = softmax([(q[i, part] @ k[j, part]).item() / math.sqrt(width) for j in range(len(k))])
            found[i, part] = sum(w * v[j, part] for j, w in enumerate(weights))
    return found


def normalised(x, norm):
    centred = x - x.mean()
    return centred / torch.sqrt((centred ** 2).mean() + norm.eps) * norm.weight + norm.bias


def task_tokens_loop(m: TaskRelation, means):
    "Tokens of one sequence of video means (L, C)."
    q, k, v = means @ m.to_q.weight.T, means @ m.to_k.weight.T, means @ m.to_v.weight.T
    out = heads_loop(q, k, v, m.heads) @ m.to_out.weight.T + m.to_out.bias + means
    return torch.stack([normalised(row, m.norm) for row in out])


def logits_loop(model, support, labels, query, ways):
    "Logits query by query, support by support; every joined frame is spelled out from the concatenation."
    bend = (lambda x: x.clamp(min=0)) if isinstance(model.rectify, torch.nn.ReLU) else (lambda x: x)
    support, labels = support[labels >= 0], labels[labels >= 0]
    if model.shots == "mean": support, labels = torch.stack([support[labels == n].mean(0) for n in range(ways)]), torch.arange(ways)
    weight, bias = model.join.weight[:, :, 0], model.join.bias
    sums, logits = model.matching.matcher.keywords.get("sums", False), torch.zeros(len(query), ways, dtype=torch.float64)
    for q, asked in enumerate(query):
        tokens = bend(task_tokens_loop(model.across, torch.stack([*support.mean(1), asked.mean(0)])))
        def join(video, token): return [weight @ torch.cat([frame, token]) + bias for frame in video]
        x, distances = join(asked, tokens[-1]), []
        for s, video in enumerate(support):
            d = [[1 - (a @ b / (a.norm() * b.norm() + model.matching.cosine_eps)).item() for b in join(video, tokens[s])] for a in x]
            rows, columns = [min(row) for row in d], [min(column) for column in zip(*d)]
            distances.append(sum(rows) + sum(columns) if sums else sum(rows) / len(rows) + sum(columns) / len(columns))
        for n in range(ways):
            own = [distance for distance, label in zip(distances, labels) if label == n]
            logits[q, n] = -model.matching.scale * sum(own) / len(own)
    return logits


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, dict(shots="mean"), dict(variant="released"), dict(variant="released", shots="each"), dict(cosine_eps=0.01, rectify=True)], ids=str)
def test_logits_are_the_papers(options):
    model = make(**options).double().eval()
    x, labels = frames_of(7), torch.tensor([0, 1, 1, -1, 2])                          # unequal shots, one row of padding
    found = model.score({"frames": x[:5]}, labels, {"frames": x[5:]}, 3)
    assert torch.allclose(found, logits_loop(model, x[:5], labels, x[5:], 3), rtol=1e-8, atol=1e-10)
    single = model.float().score({"frames": x[:5].float()}, labels, {"frames": x[5:].float()}, 3)
    assert torch.allclose(single.double(), found, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions, position_a", [("sinusoids", 0.0), ("steep", 10.0)])
def test_the_relation_within_a_video_is_attention_with_positions(positions, position_a):
    with torch_seed(0): m = FrameRelation(16, heads=4, positions=positions, position_a=position_a, position_b=0.5).double().eval()
    with torch_seed(1): video = torch.randn(5, 16, dtype=torch.float64)
    x = torch.zeros_like(video)
    for t in range(5):
        for c in range(16):
            turn = t / 10_000 ** ((2 * c if positions == "steep" else c - c % 2) / 16)
            x[t, c] = video[t, c] * (math.sqrt(16 / position_a) if position_a else 1) + 0.5 * (math.cos(turn) if c % 2 else math.sin(turn))
    q, k, v = (torch.stack([normalised(row, m.attention.norm) for row in x]) @ m.attention.to_qkv.weight.T).chunk(3, 1)
    expected = x + heads_loop(q, k, v, 4) @ m.attention.to_out[0].weight.T + m.attention.to_out[0].bias
    assert torch.allclose(m(video[None])[0], expected, atol=1e-6)                     # positions are made in float32


def test_steep_positions_are_another_count():
    assert torch.allclose(steep_sinusoids(6, 12)[:, :1], sinusoids(6, 12)[:, :1]) and not torch.allclose(steep_sinusoids(6, 12), sinusoids(6, 12), atol=0.1)


@torch.no_grad()
def test_shifted_frames_need_not_be_spelled_out():
    with torch_seed(4): query, frames, shift = (torch.randn(*s, dtype=torch.float64) for s in [(2, 3, 4, 16), (2, 5, 6, 16), (2, 3, 5, 16)])
    moved = frames[:, None] + shift[:, :, :, None]                                    # (E, Q, S, T, C)
    expected = torch.einsum("eqtc,eqsuc->eqstu", query / query.norm(dim=-1, keepdim=True), moved / moved.norm(dim=-1, keepdim=True))
    assert torch.allclose(shifted_similarity(query, frames, shift), expected, rtol=1e-10)
    unit = moved / moved.norm(dim=-1, keepdim=True)
    assert torch.allclose(shifted_self_similarity(frames, shift), unit @ unit.mT, rtol=1e-10)


def test_shifts_that_cancel_a_frame_stay_finite():
    with torch_seed(5): query, frames = torch.randn(1, 2, 8), torch.randn(1, 1, 8)
    shift = (-frames[:, 0]).expand(2, 1, 8).clone().requires_grad_()                   # |a + u| = 0
    sim = shifted_similarity(query, frames, shift)
    sim.sum().backward()
    assert sim.isfinite().all() and shift.grad.isfinite().all()


# --- losses ------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("window, sigma", [(1, 51.0), (2, 5.0)])
def test_coherence_is_the_papers(window, sigma):
    with torch_seed(2): x = torch.randn(3, 6, 10, dtype=torch.float64)
    total = 0.0
    for video in x:
        for i in range(6):
            for j in range(6):
                d, step = 1 - (video[i] @ video[j] / (video[i].norm() * video[j].norm())).item(), abs(i - j)
                total += d / (step ** 2 + 1) if step <= window else max(0.0, 1 - math.exp(-(step - window) ** 2 / sigma) - d)
    unit = x / x.norm(dim=-1, keepdim=True)
    assert coherence(unit @ unit.mT, window, sigma).item() == pytest.approx(total / (3 * 36), rel=1e-10)


def test_every_frame_is_classified():
    model, task = make(dropout=0.0, task_dropout=0.0).train(), episode()
    out = model(task)
    frames = model.embed(task.clips)["frames"].double()
    labels = task.class_ids[torch.cat([task.support_labels, task.query_labels])]
    weight, bias = model.classifier.weight.double(), model.classifier.bias.double()
    expected = -sum((frames[v, t] @ weight.T + bias).log_softmax(0)[labels[v]] for v in range(len(labels)) for t in range(5)) / (5 * len(labels))
    share, loss = out.losses["class"]
    assert share == 0.5 and loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, dict(shots="mean"), dict(across=False)], ids=str)
def test_coherence_is_of_the_frames_that_are_matched(options):
    model, task = make(dropout=0.0, task_dropout=0.0, temporal_coherence=0.3, **options).train(), episode()
    out = model(task)
    x, s, total = model.embed(task.clips)["frames"], len(task.support), []
    shown, labels = model.representatives({"frames": x[:s]}, task.support_labels, 3)
    if options.get("across", True):
        own, shift, asked = model.relate(shown, labels >= 0, x[s:])
        moved = own + shift[:, :, None]
    else: moved, asked = shown, x[s:]
    for frames in (moved, asked):
        unit = frames / frames.norm(dim=-1, keepdim=True)
        total.append(coherence(unit @ unit.mT))
    share, loss = out.losses["coherence"]
    assert share == 0.3 and loss.item() == pytest.approx(sum(total).item(), rel=1e-4)


@pytest.mark.parametrize("options", [dict(within=False), dict(across=False), dict(matcher="otam"), dict(shots="mean"), dict(rectify=True), dict(temporal_coherence=0.3),
                                     dict(temporal_coherence=0.3, across=False, within=False), dict(class_loss=0.0), dict(positions="steep")], ids=str)
def test_parts_switch_off(options):
    model = make(**options).train()
    out = model(episode())
    out.loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    assert out.loss.isfinite() and not without
    assert ("coherence" in out.losses) == bool(options.get("temporal_coherence")) and ("class" in out.losses) == options.get("class_loss", True)


@torch.no_grad()
@pytest.mark.parametrize("matcher", ["bimhm", "otam"])
def test_without_relations_it_is_its_matcher(matcher):
    model, x, labels = make(matcher=matcher, within=False, across=False).eval(), frames_of(6).float(), torch.tensor([0, 0, 1])
    plain = create_model(matcher, backbone="resnet_micro", options={"scale": model.matching.scale}).eval()
    assert torch.allclose(model.score({"frames": x[:3]}, labels, {"frames": x[3:]}, 2), plain.score({"frames": x[:3]}, labels, {"frames": x[3:]}, 2), rtol=1e-5)
    assert not model.relational and make().relational


@torch.no_grad()
def test_other_queries_change_nothing():
    model, x, labels = make().double().eval(), frames_of(8), torch.tensor([0, 1, 2])
    together = model.score({"frames": x[:3]}, labels, {"frames": x[3:]}, 3)
    for q in range(5): assert torch.allclose(together[q], model.score({"frames": x[:3]}, labels, {"frames": x[3 + q:4 + q]}, 3)[0], rtol=1e-10)


@torch.no_grad()
def test_one_shot_does_not_tell_the_two_forms_of_shots_apart():
    each, mean, x = make().eval(), make(shots="mean").eval(), frames_of(5).float()
    args = {"frames": x[:3]}, torch.tensor([2, 0, 1]), {"frames": x[3:]}, 3
    assert torch.allclose(each.score(*args), mean.score(*args), atol=1e-5)


@torch.no_grad()
def test_otam_is_the_matchers():
    model, x, labels = make(matcher="otam").double().eval(), frames_of(5), torch.tensor([0, 1, 2])
    sim = model.similarity(x[:3], labels >= 0, x[3:])
    assert torch.allclose(model.score({"frames": x[:3]}, labels, {"frames": x[3:]}, 3), -MATCHERS["otam"](sim), rtol=1e-10)


# --- errors and the authors' names ---------------------------------------------------------------------------------------------------------

def test_wrong_options_are_named():
    with pytest.raises(FsarError, match="option 'shots' of method 'hyrsm' wants one of each, mean, got 'sum'"): parse_options("hyrsm", ["shots=sum"])
    with pytest.raises(FsarError, match="method 'hyrsm' has no option 'temporal_coherance'. Did you mean 'temporal_coherence'"): parse_options("hyrsm", ["temporal_coherance=1"])
    for options in (dict(), dict(within=False)):
        with pytest.raises(FsarError, match="7 attention heads do not divide 128 channels"): make(heads=7, **options)
    with pytest.raises(FsarError, match="class 1 has none"): make(shots="mean").score({"frames": frames_of(2)}, torch.tensor([0, 2]), {"frames": frames_of(1)}, 3)


def test_released_names_become_ours():
    body = torch.nn.Sequential(*list(models.resnet18().children())[:-1]).state_dict()
    C, theirs = 512, {f"backbone.{k}": v.shape for k, v in body.items()}
    theirs |= {"temporal_atte_before.norm.weight": (C,), "temporal_atte_before.norm.bias": (C,), "temporal_atte_before.fn.to_qkv.weight": (3 * C, C),
               "temporal_atte_before.fn.to_out.0.weight": (C, C), "temporal_atte_before.fn.to_out.0.bias": (C,), "temporal_atte.w_qs.weight": (C, C),
               "temporal_atte.w_ks.weight": (C, C), "temporal_atte.w_vs.weight": (C, C), "temporal_atte.layer_norm.weight": (C,), "temporal_atte.layer_norm.bias": (C,),
               "temporal_atte.fc.weight": (C, C), "temporal_atte.fc.bias": (C,), "layer2.0.weight": (C, 2 * C, 1), "layer2.0.bias": (C,),
               "classification_layer.weight": (12, C), "classification_layer.bias": (12,)}
    model, found = make("released", backbone="resnet18"), {}
    for prefix in ("head.", "module.head.", ""):
        for name, shape in theirs.items():
            found[translated(prefix + name, HyRSM.released_layout)] = tuple(shape)
        assert found == {k: tuple(v.shape) for k, v in model.state_dict().items()}
