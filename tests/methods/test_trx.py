"""TRX against loops over classes, queries and tuples in float64, and its options."""
import itertools
import re

import pytest
import torch

from fsar.core.basics import FsarError, torch_seed
from fsar.methods.trx import TRX, TupleAttention, add_slots, parse_cardinalities, project_slots
from fsar.model.registry import create_model
from fsar.model.blocks import sinusoids
from fsar.model.base import translated
from test_methods import batch, pixels, rows


def make(**options): return create_model("trx", backbone="resnet_micro", classes=12, options={"width": 32, **options}, seed=1)


def embedded(model, videos: int, frames: int = 5):
    "A model in float64 at test, and its embeddings of frame features that stand for the backbone's."
    model.double().eval()
    with torch_seed(3): found = torch.randn(videos, frames, model.backbone.channels, dtype=torch.float64)
    model.feature_maps = lambda clips: found[..., None, None]
    with torch.no_grad(): return found, model.embed(None)


def head_distance(head: TupleAttention, q, examples) -> float:
    "D_ω of one query to one class, tuple by tuple: the concatenated frames through the layers as they stand."
    n, scale = head.cardinality, head.key.out_features ** -0.5
    def tuples(video): return [torch.cat([video[i] for i in p]) for p in itertools.combinations(range(len(video)), n)]
    def key(t): return head.norm(head.key(t))
    own = [t for video in examples for t in tuples(video)]
    total = 0.0
    for t in tuples(q):
        weights = torch.softmax(torch.stack([key(t) @ key(s) * scale for s in own]), 0)
        prototype = sum(w * head.value(s) for w, s in zip(weights, own))
        total += ((head.value(t) - prototype) ** 2).sum().item()
    return total / len(tuples(q))


@torch.no_grad()
def loop(model, frames, labels, queries, ways):
    placed = frames + model.positions.weight * sinusoids(*frames.shape[1:]).double()
    shots = {n: [placed[s] for s, label in enumerate(labels) if label == n] for n in range(ways)}
    return [[-model.scale * sum(head_distance(h, placed[q], shots[n]) for h in model.heads) / len(model.heads) for n in range(ways)] for q in queries]


@pytest.mark.parametrize("options", [{}, {"cardinalities": "1"}, {"cardinalities": "4"}, {"cardinalities": "1,2,3,4", "position_weight": 0.7}, {"scale": 0.05}], ids=str)
@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 1, 1, 0, -1]], ids=["one shot", "unequal shots"])
def test_logits_are_the_papers(options, labels):
    model = make(**options)
    with torch_seed(4), torch.no_grad():
        for head in model.heads: head.norm.weight.uniform_(0.5, 2); head.norm.bias.normal_()   # as after training
    shots = len(labels)
    frames, emb = embedded(model, shots + 2)
    with torch.no_grad(): logits = model.score(rows(emb, slice(shots)), torch.tensor(labels), rows(emb, slice(shots, None)), 2)
    expected = torch.tensor(loop(model, frames, labels, [shots, shots + 1], 2), dtype=torch.float64)
    assert torch.allclose(logits, expected, rtol=1e-8, atol=0)
    single = {k: x.float() for k, x in emb.items()}
    with torch.no_grad(): logits = model.float().score(rows(single, slice(shots)), torch.tensor(labels), rows(single, slice(shots, None)), 2)
    assert torch.allclose(logits.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("cardinality", [1, 2, 3, 4])
def test_tuples_are_added_up_from_frames_in_order(cardinality):
    with torch_seed(0): frames, weight = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(3, cardinality * 4, dtype=torch.float64)
    direct = [torch.cat([frames[:, i] for i in p], -1) @ weight.T for p in itertools.combinations(range(6), cardinality)]
    assert torch.allclose(add_slots(project_slots(frames, weight)), torch.stack(direct, 1), atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_chunks_change_no_number(chunk):
    model = make()
    _, emb = embedded(model, 7)
    labels, parts = torch.tensor([0, 1, 1, 0]), (rows(emb, slice(4)), rows(emb, slice(4, None)))
    whole = model.score(parts[0], labels, parts[1], 2)
    model.chunk = chunk
    assert torch.allclose(model.score(parts[0], labels, parts[1], 2), whole, rtol=1e-12)
    model.float().train()
    del model.feature_maps
    model(batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_bias_of_the_values_would_cancel():
    model = make()
    _, emb = embedded(model, 4)
    moved = {k: x + (5.0 if k.startswith("values") else 0.0) for k, x in emb.items()}
    def args(e): return rows(e, slice(2)), torch.tensor([0, 1]), rows(e, slice(2, None)), 2
    assert torch.allclose(model.score(*args(emb)), model.score(*args(moved)), rtol=1e-9)


def test_the_embedding_grows_with_frames_not_with_tuples():
    model = create_model("trx", backbone="resnet_micro").eval()
    four, eight = (model.embed(pixels(1, t)) for t in (4, 8))
    for name in four.keys() - {"sharp_2", "sharp_3"}: assert eight[name].numel() == 2 * four[name].numel(), name
    assert eight["sharp_2"].shape == (1, 28) and eight["sharp_3"].shape == (1, 56)             # one number a tuple, beside 1152 for each slot


def test_positions_dropout_and_the_parts_that_a_test_does_not_see():
    model = make(dropout=0.5, position_weight=0.0)
    with torch_seed(0): x = torch.randn(1, 8, 128)
    assert not torch.equal(model.positions.train()(x), x) and torch.equal(model.positions.eval()(x), x)


def test_the_released_loss_is_summed_over_queries():
    paper, released = (create_model("trx", backbone="resnet_micro", options={"variant": v, "dropout": 0.0, "class_loss": 0.0, "pixels": "backbone"}, seed=1).train() for v in ("paper", "released"))
    a, b = paper(batch()).loss, released(batch()).loss
    assert torch.allclose(6 * a, b, rtol=1e-5)
    assert create_model("trx", backbone="resnet_micro", classes=5, options={"variant": "released"}).classifier is None


@pytest.mark.parametrize("text", ["", "0", "5", "2,2", "2;3", "2,", "two", "1,2,3,4,5", "-1", "2.0"])
def test_other_cardinalities_are_refused(text):
    with pytest.raises(FsarError, match=re.escape(f"option 'cardinalities' of method 'trx' wants different numbers from 1 to 4 with commas between, such as 2,3; got {text!r}")):
        make(cardinalities=text)


def test_cardinalities_are_a_set_and_set_the_fewest_frames():
    assert parse_cardinalities("3, 2") == (2, 3)
    assert [make(cardinalities=c).least_frames for c in ("1", "2", "1,4")] == [1, 2, 4]
    with pytest.raises(FsarError, match="at least 4 frames, got 3"): make(cardinalities="4").embed(pixels(1, 3))


def theirs(model) -> dict[str, torch.Tensor]:
    "A state dict in the layout of the authors' checkpoints, with values of its own."
    children = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    found = {}
    for name, x in model.state_dict().items():
        part, *rest = name.split(".")
        if part == "backbone": name = f"resnet.module.{children[rest[1]]}.{'.'.join(rest[2:])}"
        for a, b in (("heads", "transformers"), (".key.", ".k_linear."), (".value.", ".v_linear."), (".norm.", ".norm_k.")): name = name.replace(a, b) if part == "heads" else name
        found[name] = torch.rand(x.shape) if x.is_floating_point() else x
    for i in range(2): found |= {f"transformers.{i}.{n}": torch.rand(3) for n in ("norm_v.weight", "norm_v.bias", "v_linear.bias", "pe.pe")}
    return found


def test_names_of_released_checkpoints_become_ours():
    model = create_model("trx", backbone="resnet18", options={"variant": "released"})
    state = {translated(k, TRX.released_layout): x for k, x in theirs(model).items()}
    state.pop("")
    model.load_state_dict(state)                                                              # every name and shape, none left over
    assert translated("module.resnet.module.7.1.conv2.weight", TRX.released_layout) == "backbone.body.layer4.1.conv2.weight"
    assert model.heads[1].key.weight.shape == (1152, 3 * 512)                                 # concatenated tuples, as in the checkpoint
