"""STRM against loops over patches, classes, queries and tuples in float64, the released form, and its switches."""
import itertools
import re

import pytest
import torch
from torch.nn import functional as F

from fsar.core.basics import FsarError, torch_seed
from fsar.methods.strm import STRM, FrameEnrichment, PatchEnrichment, QueryClass, frame_patches
from fsar.model.registry import create_model
from fsar.model.blocks import sinusoids
from fsar.model.base import translated
from test_methods import batch, pixels, rows
from test_trx import head_distance


def make(variant: str = "paper", frames: int = 8, **options):
    small = {"variant": variant, "width": 32, "query_class_width": 24}
    return create_model("strm", backbone="resnet_micro", frames=frames, classes=12, options={**small, **options}, seed=1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    with torch_seed(seed, *shape): return torch.randn(*shape, dtype=torch.float64)


def shaken(module):
    "Float64, with every parameter moved: biases and gates away from zero, as after training."
    with torch_seed(9), torch.no_grad():
        for p in module.double().parameters(): p.add_(0.3 * torch.randn_like(p))
    return module.eval()


@torch.no_grad()
def patch_loop(ple: PatchEnrichment, x: torch.Tensor, root: bool, gamma: float) -> torch.Tensor:
    "α and f of one frame, patch by patch: x (16, D)."
    def applied(layer): return lambda v: layer.weight @ v + (0 if layer.bias is None else layer.bias)
    w1, w2, w3 = map(applied, (ple.query, ple.key, ple.value))
    f = []
    for i in range(len(x)):
        scores = torch.stack([w1(x[i]) @ w2(x[j]) for j in range(len(x))]) / (x.shape[1] ** 0.5 if root else 1.0)
        weights = scores.exp() / scores.exp().sum()
        a = gamma * sum(weights[j] * w3(x[j]) for j in range(len(x))) + x[i]
        hidden = a
        for k in (0, 2): hidden = (ple.mlp[k].weight @ hidden + ple.mlp[k].bias).clamp(min=0)
        f.append(ple.mlp[4].weight @ hidden + ple.mlp[4].bias + a)
    return torch.stack(f)


@pytest.mark.parametrize("gate", [False, True])
def test_patches_are_enriched_as_in_the_paper_and_as_released(gate):
    with torch_seed(1): ple = shaken(PatchEnrichment(6, scaled=not gate, gate=gate))
    x = 0.5 * noise(2, 3, 16, 6)
    expected = torch.stack([torch.stack([patch_loop(ple, frame, not gate, ple.gamma.item() if gate else 1.0) for frame in video]) for video in x])
    assert torch.allclose(ple(x), expected, rtol=1e-8, atol=1e-12)
    assert [layer.out_features for layer in ple.mlp if hasattr(layer, "out_features")] == [3, 3, 6]


def test_a_closed_gate_leaves_the_patches_to_the_mlp():
    ple = PatchEnrichment(6, gate=True).double()
    x = noise(2, 16, 6)
    assert ple.gamma.item() == 0 and torch.equal(ple(x), x + ple.mlp(x))


def test_biases_start_at_zero():
    assert all(not p.any() for m in (PatchEnrichment(6), FrameEnrichment(6, 4)) for n, p in m.named_parameters() if n.endswith("bias"))


def test_patches_are_maxima_over_a_grid():
    maps = noise(2, 3, 5, 8, 12)
    found = frame_patches(maps)
    for y, x in itertools.product(range(4), range(4)):
        assert torch.equal(found[:, :, 4 * y + x], maps[..., 2 * y:2 * y + 2, 3 * x:3 * x + 3].amax((-2, -1)))


@torch.no_grad()
def test_frames_are_enriched_as_in_the_paper():
    with torch_seed(1): fle = shaken(FrameEnrichment(5, 4))
    (t1, t2), (r1, r2) = ((mlp[0], mlp[2]) for mlp in (fle.over_time, fle.over_channels))
    h = noise(3, 4, 5)
    for video, found in zip(h, fle(h)):
        star = torch.stack([t2.weight @ (t1.weight @ column + t1.bias).clamp(min=0) + t2.bias + column for column in video.T])       # (D, T), H*
        expected = torch.stack([r2.weight @ (r1.weight @ row + r1.bias).clamp(min=0) + r2.bias + row for row in star.T])             # (T, D), E
        assert torch.allclose(found, expected, rtol=1e-8, atol=1e-12)
    assert t1.weight.shape == (4, 4) and r1.weight.shape == (5, 5)


@torch.no_grad()
def similarity_loop(part: QueryClass, q: torch.Tensor, examples: list[torch.Tensor]) -> float:
    "M of one query (T, D) and one class."
    def tuples(video):
        pairs = itertools.combinations(range(len(video)), 2)
        return [(part.weight @ torch.cat([video[i], video[j]])).clamp(min=0) for i, j in pairs]
    def phi(a, b): return (a @ b / (a.norm() * b.norm())).item() if part.similarity == "cosine" else -(a - b).norm().item()
    others = [z for video in examples for z in tuples(video)]
    return sum(max(phi(z, other) for other in others) for z in tuples(q)) / len(tuples(q))


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("labels", [[0, 1], [1, 0, 1, 1, -1]], ids=["one shot", "unequal shots"])
def test_query_class_similarity_is_the_papers(similarity, labels):
    with torch_seed(1): part = QueryClass(6, 20, similarity=similarity).double()
    h = noise(len(labels) + 2, 5, 6)
    projected = part.project(h)
    found = part(projected[len(labels):], projected[:len(labels)], torch.tensor(labels), 2)
    for q in range(2):
        for n in range(2):
            examples = [x for x, label in zip(h, labels) if label == n]
            assert found[q, n].item() == pytest.approx(similarity_loop(part, h[len(labels) + q], examples), rel=1e-8)


def embedded(model, videos: int):
    "A model in float64 at test, maps that stand for the backbone's, and their embeddings."
    shaken(model)
    maps = 0.3 * noise(videos, model.frames, model.backbone.channels, 4, 4)
    model.feature_maps = lambda clips: maps
    with torch.no_grad(): return maps, model.embed(None)


@pytest.mark.parametrize("variant, labels", [("paper", [0, 1]), ("released", [0, 1]), ("released", [0, 1, 1, -1])])
def test_logits_are_the_papers_and_the_released_codes(variant, labels):
    model, shots = make(variant, frames=4), len(labels)
    maps, emb = embedded(model, shots + 2)
    with torch.no_grad():
        logits = model.score(rows(emb, slice(shots)), torch.tensor(labels), rows(emb, slice(shots, None)), 2)
        h = model.patch(frame_patches(maps)).mean(2)
        placed = model.frame(h) + 0.1 * sinusoids(4, 128).double()
        for q, n in itertools.product(range(2), range(2)):
            members = [s for s, label in enumerate(labels) if label == n]
            expected = -head_distance(model.heads[0], placed[shots + q], [placed[s] for s in members])
            if variant == "released": expected += 0.1 * similarity_loop(model.query_class, h[shots + q], [h[s] for s in members])
            assert logits[q, n].item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_loss_adds_a_tenth_of_the_query_class_loss(variant):
    model, episode = make(variant, dropout=0.0).train(), batch()
    out = model(episode)
    with torch.no_grad(): emb = model.embed(episode.clips)
    shots, scale = len(episode.support), {"paper": 10.0, "released": 1.0}[variant]
    m = scale * model.query_class(emb["relation"][shots:], emb["relation"][:shots], episode.support_labels, 3)
    weight, value = out.losses["query_class"]
    assert weight == 0.1 and value.item() == pytest.approx(F.cross_entropy(m, episode.query_labels).item(), rel=1e-4)
    assert out.losses["episode"][1].item() == pytest.approx(F.cross_entropy(model.score(rows(emb, slice(shots)), episode.support_labels, rows(emb, slice(shots, None)), 3), episode.query_labels).item(), rel=1e-4)


def test_query_class_serves_a_test_in_the_released_form_alone():
    assert "relation" not in make().eval().embed(pixels(1)) and "relation" in make().train().embed(pixels(2))
    assert "relation" in make("released").eval().embed(pixels(1))
    assert "relation" not in make("released", query_class=False).eval().embed(pixels(1))


def test_w_cls_is_trained_in_the_paper_and_a_saved_constant_as_released():
    paper, released = make(), make("released")
    assert "query_class.weight" in dict(paper.named_parameters())
    assert "query_class.weight" in dict(released.named_buffers()) and "query_class.weight" in released.state_dict()
    assert released.query_class.weight.shape == (24, 256) and create_model("strm", backbone="resnet_micro").query_class.weight.shape == (1024, 256)
    before = released.query_class.weight.clone()
    out = released.train()(batch())
    out.loss.backward()
    torch.optim.SGD(released.parameters(), 0.1).step()
    assert torch.equal(before, released.query_class.weight)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("off", [c for n in (1, 2, 3) for c in itertools.combinations(("patch", "frame", "query_class"), n)], ids=" ".join)
def test_parts_switch_off(variant, off):
    model = make(variant, **{name: False for name in off}).train()
    assert not [n for n in model.state_dict() for part in off if n.startswith(part + ".")]
    out = model(batch())
    out.loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()} == set(model.silent_at_start)
    assert bool(model.silent_at_start) == (variant == "released" and "patch" not in off)
    assert ("query_class" in out.losses) == ("query_class" not in off)


def test_without_its_parts_it_is_trx_for_pairs():
    strm = make(patch=False, frame=False, query_class=False).eval()
    trx = create_model("trx", backbone="resnet_micro", classes=12, options={"cardinalities": "2", "width": 32}, seed=4).eval()
    strm.load_state_dict(trx.state_dict())
    with torch.no_grad(): assert torch.allclose(strm(batch()).logits, trx(batch()).logits, rtol=1e-5)


def test_chunks_change_no_number():
    whole, parts = make().eval(), make(chunk=5).eval()
    with torch.no_grad(): assert torch.allclose(whole(batch()).logits, parts(batch()).logits, rtol=1e-5)


def test_another_number_of_frames_is_refused_unless_frames_are_not_enriched():
    with pytest.raises(FsarError, match="built for 8 frames, got 5: build the model with frames=5"): make().embed(pixels(1, 5))
    assert make(frame=False).eval().embed(pixels(1, 5))["frames"].shape == (1, 5, 128)


def test_names_of_released_checkpoints_become_ours():
    model = create_model("strm", backbone="resnet18", options={"variant": "released"})
    theirs = {"resnet.module.0.weight": "backbone.body.conv1.weight", "resnet.module.1.running_var": "backbone.body.bn1.running_var",
              "resnet.5.1.bn2.num_batches_tracked": "backbone.body.layer2.1.bn2.num_batches_tracked",
              "attn_pat.module.query_proj.weight": "patch.query.weight", "attn_pat.module.key_proj.weight": "patch.key.weight", "attn_pat.value_conv.bias": "patch.value.bias",
              "attn_pat.module.gamma": "patch.gamma", "attn_pat.module.Bot_MLP.inp_fc.weight": "patch.mlp.0.weight", "attn_pat.Bot_MLP.hid_fc.bias": "patch.mlp.2.bias",
              "attn_pat.module.Bot_MLP.out_fc.weight": "patch.mlp.4.weight", "fr_enrich.module.Tok_MLP.inp_fc.weight": "frame.over_time.0.weight",
              "fr_enrich.module.Tok_MLP.out_fc.bias": "frame.over_time.2.bias", "fr_enrich.Bot_MLP.inp_fc.weight": "frame.over_channels.0.weight",
              "fr_enrich.module.Bot_MLP.out_fc.weight": "frame.over_channels.2.weight", "transformers.0.k_linear.weight": "heads.0.key.weight",
              "module.transformers.0.v_linear.weight": "heads.0.value.weight", "transformers.0.norm_k.bias": "heads.0.norm.bias"}
    own = model.state_dict()
    for name, expected in theirs.items():
        assert translated(name, STRM.released_layout) == expected and expected in own
    for name in ("attn_pat.module.pe.pe", "fr_enrich.module.pe.pe", "attn_pat.key_proj.bias", "transformers.0.pe.pe", "transformers.0.norm_v.weight", "transformers.0.v_linear.bias"):
        assert translated(name, STRM.released_layout) == ""
    reached = {re.sub(r"\.(weight|bias)$", "", name) for name in theirs.values()}
    missing = {n for n, _ in model.named_parameters() if re.sub(r"\.(weight|bias)$", "", n) not in reached and not n.startswith("backbone")}
    assert missing == set()                                                                    # W_cls, the one thing of ours that they lack, is a buffer here
    assert "query_class.weight" in own
