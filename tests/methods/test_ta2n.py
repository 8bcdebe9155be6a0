"""TA2N's equations, written again as loops in float64; its parts switched off; its start and its gradients."""
import itertools, math

import numpy as np
import pytest
import torch
from torch import nn

from fsar.core.basics import torch_seed
from fsar.data.episodes import EpisodeBatch
from fsar.methods.ta2n import OffsetNetwork, Rearrangement, TemporalTransform, box_mask, resampling_matrix
from fsar.model.registry import create_model

SWITCHES = [dict(zip(("transform", "rearrange", "coordinate"), on)) for on in itertools.product((True, False), repeat=3)]
switches = pytest.mark.parametrize("options", SWITCHES, ids=lambda o: "+".join(k for k, on in o.items() if on) or "none")


def make(frames=8, **options): return create_model("ta2n", backbone="resnet_micro", frames=frames, classes=12, options=options, seed=1)


def pixels(videos, frames=8, size=32):
    with torch_seed(0, videos, frames): return torch.randint(0, 256, (videos, frames, 3, size, size), dtype=torch.uint8)


def episode(support_labels=(0, 0, 1, 1), query_labels=(0, 1), frames=8, size=32):
    shots, clips = len(support_labels), pixels(len(support_labels) + len(query_labels), frames, size)
    return EpisodeBatch(support=clips[:shots], support_labels=torch.tensor(support_labels), query=clips[shots:], query_labels=torch.tensor(query_labels),
                        class_ids=torch.arange(max(support_labels) + 1), index=0)


def grown(model):
    "The model in float64, its small last layers enlarged, so that φ and the offsets are far from where they start."
    model = model.eval().double()
    with torch_seed(3):
        if model.transform is not None: nn.init.normal_(model.transform.head[2].weight, std=4.0)
        if model.offsets is not None: nn.init.normal_(model.offsets.head.weight, std=10.0)
        if model.rearrangement is not None:
            for layer in (model.rearrangement.key, model.rearrangement.query, model.rearrangement.value): nn.init.normal_(layer.weight, std=3.0)
    return model


def embedded(model, videos, frames=8, size=32):
    with torch.no_grad(): return model.embed(pixels(videos, frames, size).double() / 255)


def rows(embedding, index): return {k: x[index] for k, x in embedding.items()}


def close(found, expected, rel=1e-8): assert (found - expected).abs().max() <= rel * expected.abs().max()


# --- the first stage -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("frames", [1, 2, 5, 8, 13])
def test_resampling_is_linear_interpolation(frames):
    with torch_seed(4): phi, signal = torch.randn(6, 2, dtype=torch.float64), torch.randn(frames, 3, dtype=torch.float64)
    found = resampling_matrix(phi, frames) @ signal
    time = np.linspace(-1, 1, frames) if frames > 1 else np.zeros(1)
    for v, (a, b) in enumerate(phi.tolist()):
        for c in range(3):
            expected = np.interp(a * time + b, time, signal[:, c].numpy())
            assert np.allclose(found[v, :, c], expected, rtol=1e-10, atol=1e-12)


def test_resampling_gradient_is_the_slope():
    phi = torch.tensor([[0.83, 0.11], [1.4, -0.37]], dtype=torch.float64, requires_grad=True)
    with torch_seed(4): signal = torch.randn(8, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: resampling_matrix(p, 8) @ signal, phi)


def test_phi_is_read_from_the_maps_and_the_maps_are_warped():
    transform = TemporalTransform(16).double().eval()
    with torch_seed(5):
        nn.init.normal_(transform.head[2].weight); maps = torch.randn(3, 6, 16, 4, 5, dtype=torch.float64)
        for bn in (transform.blocks[0][1], transform.blocks[1][1]): bn.running_mean.normal_(); bn.running_var.uniform_(0.5, 2)
    for v in range(3):
        x = maps[v].permute(1, 0, 2, 3)[None]                                                 # C T h w
        for conv, bn, _ in transform.blocks:
            x = nn.functional.conv3d(x, conv.weight, padding=1)
            x = (x - bn.running_mean[:, None, None, None]) / (bn.running_var + bn.eps)[:, None, None, None].sqrt()
            x = (x * bn.weight[:, None, None, None] + bn.bias[:, None, None, None]).clamp(min=0)
        h = x.flatten(2).mean(-1)[0]
        hidden = (transform.head[0].weight @ h + transform.head[0].bias).clamp(min=0)
        delta = torch.tanh(transform.head[2].weight @ hidden + transform.head[2].bias)
        a, b = 1 + delta[0].item(), delta[1].item()
        assert transform.phi(maps)[v].tolist() == pytest.approx([a, b], rel=1e-8)
        warped = transform(maps)[v]
        for t in range(6):
            place = min(max((a * (2 * t / 5 - 1) + b + 1) / 2 * 5, 0), 5)
            low = min(int(place), 4)
            close(warped[t], (low + 1 - place) * maps[v, low] + (place - low) * maps[v, low + 1])


def test_the_start_is_the_identity_and_yet_phi_learns():
    model, plain = make(rearrange=False, coordinate=False), make(transform=False, rearrange=False, coordinate=False)
    plain.backbone.load_state_dict(model.backbone.state_dict())
    clips = pixels(3)
    with torch.no_grad(): warped, frames = model.eval().embed(clips)["frames"], plain.eval().embed(clips)["frames"]
    assert 0 < (warped - frames).abs().max() < 1e-2 * frames.abs().max()
    model.train()(episode()).logits.square().sum().backward()                                 # the logits alone, no class labels
    assert all(p.grad.any() for p in model.transform.parameters())


# --- the second stage ----------------------------------------------------------------------------------------------------------------------

def test_rearrangement_is_the_papers():
    with torch_seed(6): layer, support, query = Rearrangement(7, 4).double(), *torch.randn(2, 3, 5, 7, dtype=torch.float64)
    order = layer.attention(layer.key(support), layer.query(query))
    W_k, W_q = layer.key.weight, layer.query.weight
    for q, s, t in itertools.product(range(3), range(3), range(5)):
        e = [math.exp(((W_k @ support[s, t]) @ (W_q @ query[q, u])).item() / math.sqrt(4)) for u in range(5)]
        assert order[q, s, t].tolist() == pytest.approx([x / sum(e) for x in e], rel=1e-9)


def box_loop(cx, cy, h, w, half, soft):
    def sigmoid(x): return 1 / (1 + math.exp(-x))
    def within(i, cells, centre): return sigmoid((half - abs((2 * i + 1) / cells - 1 - centre)) / soft)
    inside = [[within(i, h, cy) * within(j, w, cx) for j in range(w)] for i in range(h)]
    area = sum(map(sum, inside))
    return torch.tensor(inside, dtype=torch.float64) / area


@pytest.mark.parametrize("perturb", [0.0, 0.2])
@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.75, -0.3), (-0.5, 0.6)])
def test_box_is_normalised_and_perturbations_average(offset, perturb):
    found = box_mask(torch.tensor(offset, dtype=torch.float64), (4, 7), 0.8, 0.15, perturb)
    moves = [(dx, dy) for dx in (-perturb, 0, perturb) for dy in (-perturb, 0, perturb)]
    close(found, sum(box_loop(offset[0] + dx, offset[1] + dy, 4, 7, 0.8, 0.15) for dx, dy in moves) / 9)
    assert found.sum().item() == pytest.approx(1)


def test_split_convolution_is_that_of_the_joined_maps():
    with torch_seed(7): network, (support, query) = OffsetNetwork(6, 5, 1).double(), torch.randn(2, 2, 3, 6, 4, 5, dtype=torch.float64)
    joined = nn.Conv3d(12, 5, (1, 3, 3), padding=(0, 1, 1), bias=False).double()
    joined.weight.data = torch.cat([network.halves.weight[:5], network.halves.weight[5:]], 1)[:, :, None]
    expected = joined(torch.cat([support, query], 2).transpose(1, 2))
    close(network.embed(support)["support_half"] + network.embed(query)["query_half"], expected)


def group_norm_loop(norm, x):  # (d, T, h, w)
    parts = [(g - g.mean()) / (g.var(unbiased=False) + norm.eps).sqrt() for g in x.split(len(x) // norm.num_groups)]
    return torch.cat(parts) * norm.weight[:, None, None, None] + norm.bias[:, None, None, None]


def offsets_loop(network, support_maps, query_maps):
    "(T, 2) from the maps of one pair, frames of the query already in the support's order."
    width = network.conv.in_channels
    weight = torch.cat([network.halves.weight[:width], network.halves.weight[width:]], 1)
    first = torch.stack([nn.functional.conv2d(torch.cat([s, q])[None], weight, padding=1)[0] for s, q in zip(support_maps, query_maps)], 1)
    x = group_norm_loop(network.norms[0], first).clamp(min=0)                                 # d T h w
    x = group_norm_loop(network.norms[1], nn.functional.conv3d(x[None], network.conv.weight, padding=1)[0]).clamp(min=0)
    T, h, w = x.shape[1:]
    cells = [(i, j, (2 * j + 1) / w - 1, (2 * i + 1) / h - 1) for i in range(h) for j in range(w)]
    read = [torch.cat([sum(x[:, t, i, j] * f(a, b) for i, j, a, b in cells) / (h * w) for f in (lambda a, b: a, lambda a, b: b)]) for t in range(T)]
    return torch.stack([0.75 * torch.tanh(network.head.weight @ r) for r in read])


def score_loop(model, clips, labels, shots, ways):
    "Logits of the queries behind the first `shots` clips, one pair, frame and cell at a time."
    maps = model.feature_maps(clips)
    T = maps.shape[1]
    if model.transform is not None:
        maps = torch.stack([torch.einsum("ut,tchw->uchw", resampling_matrix(phi, T), m) for phi, m in zip(model.transform.phi(maps), maps)])
    G, r = maps.mean((-1, -2)), model.rearrangement
    W_v = torch.eye(maps.shape[2], dtype=maps.dtype) if r is None else r.value.weight
    logits = torch.zeros(len(clips) - shots, ways, dtype=maps.dtype)
    for q, n in itertools.product(range(len(logits)), range(ways)):
        distances = []
        for s in [s for s in range(shots) if labels[s] == n]:
            query, support = maps[shots + q], maps[s]
            M = torch.eye(T, dtype=maps.dtype)
            if r is not None: M = torch.stack([torch.stack([(r.key.weight @ G[s, t]) @ (r.query.weight @ G[shots + q, u]) for u in range(T)]) for t in range(T)])
            if r is not None: M = torch.softmax(M / math.sqrt(r.key.weight.shape[0]), -1)
            query = torch.stack([sum(M[t, u] * query[u] for u in range(T)) for t in range(T)])
            offset = torch.zeros(T, 2) if model.offsets is None else offsets_loop(model.offsets, support, query)
            total = 0.0
            for t in range(T):
                ox, oy = offset[t].tolist()
                def pool(m, x, y):
                    if model.offsets is None: return m.mean((-1, -2))
                    return (m * box_loop(x, y, *m.shape[-2:], model.box, model.soft)).sum((-1, -2))
                x, y = W_v @ pool(query[t], -ox, -oy), W_v @ pool(support[t], ox, oy)
                total += 1 - (x @ y) / (x.norm() * y.norm())
            distances.append(total / T)
        logits[q, n] = -model.scale * sum(distances) / len(distances)
    return logits


@switches
@pytest.mark.parametrize("frames", [8, 5])
def test_logits_are_the_papers(options, frames):
    model = grown(make(frames, **options, dim=6))
    labels, clips = torch.tensor([0, 1, 1]), pixels(5, frames, 40).double() / 255              # unequal shots
    with torch.no_grad():
        embedding = model.embed(clips)
        found = model.score(rows(embedding, slice(3)), labels, rows(embedding, slice(3, None)), 2)
        close(found, score_loop(model, clips, labels.tolist(), 3, 2))


def test_what_the_loop_compares_is_far_from_the_start():
    model = grown(make(dim=6))
    with torch.no_grad():
        emb = embedded(model, 4)
        phi = model.transform.phi(model.feature_maps(pixels(4).double() / 255))
        order = model.order(emb, emb)
        offset = model.offsets(emb["support_half"][None] + emb["query_half"][:, None])
    assert (phi - model.transform.identity).abs().max() > 0.05 and offset.abs().max() > 0.1 and (order - 1 / 8).abs().max() > 0.05


def test_perturbations_only_in_training():
    model = make()
    with torch.no_grad():
        emb = model.eval().embed(pixels(3))
        order = model.order(emb, emb)
        calm = model.masks(emb, emb, order)
        model.perturb = 0.0
        assert all(torch.equal(x, y) for x, y in zip(calm, model.masks(emb, emb, order)))
        still = model.train().masks(emb, emb, order)
        model.perturb = 0.2
        moved = model.masks(emb, emb, order)
    assert all(torch.equal(x, y) for x, y in zip(calm, still)) and all((x - y).abs().max() > 1e-3 for x, y in zip(moved, calm))


def test_the_same_video_in_two_places_is_cut_where_it_is_the_same():
    with torch_seed(8): wide = torch.randn(1, 5, 6, 4, 12, dtype=torch.float64)
    left, right = wide[..., :8], wide[..., 4:]                                                 # four cells apart: one half frame
    def pooled(maps, offset):
        mask = box_mask(torch.tensor([offset, 0.0], dtype=torch.float64), (4, 8), soft=0.001)
        return torch.einsum("hw,vtchw->vtc", mask, maps)
    def apart(offset): return (pooled(left, offset) - pooled(right, -offset)).abs().max()
    close(pooled(left, 1.0), pooled(right, -1.0))
    assert apart(0.0) > 0.1 and apart(-1.0) > 0.1                                             # no offset, and the wrong sign


# --- the whole -----------------------------------------------------------------------------------------------------------------------------

@switches
def test_every_switch_trains(options):
    model = make(**options).train()
    out = model(episode((0, 1, 1), frames=5))
    out.loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    head = {n.split(".")[0] for n, _ in model.named_parameters()} - {"backbone", "classifier"}
    assert head == {name for name, on in zip(("transform", "rearrangement", "offsets"), options.values()) if on}


def test_gradients_reach_the_alignment_from_the_logits_alone():
    model = make().train()
    model(episode()).logits[0, 0].backward()
    for part in (model.transform.head, model.offsets.head, model.offsets.halves, model.rearrangement):
        assert all(p.grad.isfinite().all() and p.grad.any() for p in part.parameters())


def test_nothing_on_is_the_diagonal_baseline():
    from fsar.model.matching import MATCHERS, frame_similarity
    model = make(transform=False, rearrange=False, coordinate=False).eval().double()
    emb = embedded(model, 5)
    logits = model.score(rows(emb, slice(3)), torch.tensor([0, 1, 2]), rows(emb, slice(3, None)), 3)
    close(logits, -8 * MATCHERS["diagonal"](frame_similarity(emb["frames"][3:], emb["frames"][:3])))


@pytest.mark.parametrize("options", [dict(), dict(coordinate=False)], ids=str)
def test_a_prototype_is_the_mean_video_and_equals_one_shot(options):
    plain, proto = (grown(make(prototype=p, **options)) for p in (False, True))
    emb, labels = embedded(plain, 5), torch.tensor([0, 1, 1])
    support, query = rows(emb, slice(3)), rows(emb, slice(3, None))
    with torch.no_grad():
        found = proto.score(support, labels, query, 2)
        mean = {k: torch.stack([x[0], x[1:3].mean(0)]) for k, x in emb.items()}
        close(found, plain.score(mean, torch.tensor([0, 1]), query, 2))
        assert torch.allclose(found[:, 0], plain.score(support, labels, query, 2)[:, 0]) and not torch.allclose(found[:, 1], plain.score(support, labels, query, 2)[:, 1])


def test_a_training_step_repeats_bit_for_bit():
    def step():
        model = make().train()
        optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
        with torch_seed(9):
            for _ in range(2): optimiser.zero_grad(); model(episode()).loss.backward(); optimiser.step()
        return model.state_dict()
    assert all(torch.equal(x, y) for x, y in zip(step().values(), step().values(), strict=True))


def test_pixels_get_a_gradient():
    model = make().train()
    clips = (pixels(4).float() / 255).requires_grad_()
    emb = model.embed(clips)
    model.score(rows(emb, slice(2)), torch.tensor([0, 1]), rows(emb, slice(2, None)), 2).square().sum().backward()
    assert clips.grad.isfinite().all() and clips.grad.flatten(1).any(1).all()


def test_frame_tokens_are_frames():
    for options in SWITCHES:
        model = make(**options).eval()
        with torch.no_grad(): emb = model.embed(pixels(2, 5))
        assert model.frame_tokens(emb).shape == (2, 5, 128) and model.class_features(emb).shape == (2, 128)
        assert model.frame_tokens({k: x[None] for k, x in emb.items()}).shape == (1, 2, 5, 128)
