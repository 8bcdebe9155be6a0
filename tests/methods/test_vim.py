"""VIM: sampler and alignment are the parts they claim to be, and the mutual-information terms are their loops."""
import math

import pytest
import torch

from fsar.core.basics import torch_seed
from fsar.methods.sampler import SampledModel
from fsar.methods.ta2n import TA2N
from fsar.methods.vim import info_nce
from fsar.model.blocks import class_to_query
from fsar.model.registry import create_model, method_options
from test_methods import batch, cosine, make


def test_it_is_the_sampler_around_ta2n():
    model = make("vim", dense=24, amplify=False, rearrange=False)
    assert isinstance(model, SampledModel) and isinstance(model.model, TA2N)
    assert model.clip_frames == 24 and not model.sampler.amplify and model.model.rearrangement is None
    twin = create_model("ta2n", backbone="resnet_micro", classes=12, options={"rearrange": False, "sampler.amplify": False}, sampler="vim", seed=1)
    assert set(twin.state_dict()) == set(model.state_dict())           # off by default: the terms have no weights
    assert {"intra", "inter", "dense", "sigma", "transform", "class_loss"} <= set(method_options("vim"))


def test_both_ways_to_build_it_give_the_same_logits():
    a, b = make("vim"), make("ta2n", sampler="vim")
    b.load_state_dict(a.state_dict())
    episode = batch(a)
    with torch.no_grad(): assert torch.equal(a.eval()(episode).logits, b.eval()(episode).logits)


def test_info_nce_is_its_loop():
    with torch_seed(0): a, b = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    s = [[cosine(x, y) / 0.2 for y in b.tolist()] for x in a.tolist()]
    expected = 0.0
    for i in range(5):
        expected -= s[i][i] - math.log(sum(math.exp(v) for v in s[i]))
        expected -= s[i][i] - math.log(sum(math.exp(s[k][i]) for k in range(5)))
    assert info_nce(a, b, 0.2).item() == pytest.approx(expected / 10, rel=1e-10)


def test_class_to_query_is_its_loop():
    with torch_seed(1): logits = torch.randn(6, 3, dtype=torch.float64)
    labels = [0, 1, 2, 0, 1, 1]
    expected = 0.0
    for q, n in enumerate(labels):
        rivals = sum(math.exp(logits[j, n]) for j, other in enumerate(labels) if other != n)
        expected -= math.log(math.exp(logits[q, n]) / (math.exp(logits[q, n]) + rivals))
    assert class_to_query(logits, torch.tensor(labels)).item() == pytest.approx(expected / 6, rel=1e-10)


@pytest.mark.parametrize("options", [dict(intra=0.1), dict(inter=0.1), dict(intra=0.2, inter=0.3)], ids=str)
def test_the_terms_switch_on_reach_the_sampler_and_every_weight(options):
    model = make("vim", **options).train()
    with torch_seed(2): out = model(batch(model))
    assert {k: w for k, (w, _) in out.losses.items() if k in ("intra", "inter")} == options
    for name in options:
        model.zero_grad()
        out.losses[name][1].backward(retain_graph=True)
        assert model.sampler.first.weight.grad.any()                   # the choice of frames feels the term
    model.zero_grad()
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
