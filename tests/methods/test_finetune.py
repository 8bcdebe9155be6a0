"""The fitted classifier against a loop over episodes with autograd and torch's own optimiser in float64; what is masked, what is trained, what is refused."""
import pytest
import torch
from torch.nn import functional as F

from fsar.core.basics import FsarError, torch_seed
from fsar.data.episodes import EpisodeBatch
from fsar.methods.finetune import CosineClassifier, begin, classify, fit, gradients, pooled, shares
from fsar.model.registry import create_model, parse_options

forms = pytest.mark.parametrize("head, tune", [(h, t) for h in ("cosine", "linear") for t in ("probe", "full")])
FIT = dict(steps=17, rate=0.02, momentum=0.8, decay=0.01, scale=7.0, stretches=2)


def make(classes=12, **options): return create_model("finetune", backbone="resnet_micro", classes=classes, options=options, seed=1)


def frames_of(*shape, seed=0):
    "Frames around a common direction, as features behind a ReLU are."
    with torch_seed(seed): return torch.randn(*shape, 3, 16, dtype=torch.float64) + 1


def batch(ways=3, shots=2, queries=2, frames=4):
    with torch_seed(3): clips = torch.randint(0, 256, (ways * (shots + queries), frames, 3, 32, 32), dtype=torch.uint8)
    return EpisodeBatch(support=clips[:ways * shots], support_labels=torch.arange(ways).repeat_interleave(shots), query=clips[ways * shots:],
                        query_labels=torch.arange(ways).repeat_interleave(queries), class_ids=torch.arange(ways) + 4, index=0)


def unit(x): return x / x.norm(dim=-1, keepdim=True)


def stretched(frames, parts):
    "Videos (V, T, C) as (V, P·C): every frame cut into P pieces, which are dealt out to the stretches in order."
    pieces = frames.repeat_interleave(parts, 1)
    return torch.cat([pieces[:, p * frames.shape[1]:(p + 1) * frames.shape[1]].mean(1) for p in range(parts)], 1)


def loop(support, labels, query, ways, head, tune, stretches, steps, rate, momentum, decay, scale):
    "One episode, fitted by torch.optim.SGD."
    x, asked = unit(stretched(support[labels >= 0], stretches)), unit(stretched(query, stretches))
    labels = labels[labels >= 0]
    start = [torch.stack([x[labels == n].mean(0) for n in range(ways)])]
    start += [-(start[0] ** 2).sum(1) / 2, torch.ones(x.shape[1]).to(x), torch.zeros(x.shape[1]).to(x)]
    weight, bias, gain, shift = fitted = [s.clone().requires_grad_() for s in start]
    free = [weight, *([bias] if head == "linear" else []), *([gain, shift] if tune == "full" else [])]
    optimiser = torch.optim.SGD(free, rate, momentum=momentum)
    def answer(v):
        z = v * gain + shift
        return scale * (z @ weight.T + bias if head == "linear" else unit(z) @ unit(weight).T)
    for _ in range(steps):
        loss = F.cross_entropy(answer(x), labels) + decay / 2 * sum((p - s).square().sum() for p, s in zip(fitted, start))
        optimiser.zero_grad(); loss.backward(); optimiser.step()
    return answer(asked).detach()


@forms
def test_all_episodes_at_once_equal_a_loop_with_autograd(head, tune):
    support, query = frames_of(4, 6), frames_of(4, 5, seed=1)
    labels = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 0, 1, 1, -1, -1], [-1, 0, 1, 2, -1, -1], [0, 0, 0, 0, 1, 2]])
    model = make(head=head, tune=tune, **FIT).double().eval()
    with torch.inference_mode(): found = model.score({"frames": support}, labels, {"frames": query}, 3)
    assert found.shape == (4, 5, 3) and not found.requires_grad
    for e in range(4):
        expected = loop(support[e], labels[e], query[e], 3, head, tune, **FIT)
        assert torch.allclose(found[e], expected, rtol=1e-8, atol=1e-8)
        start = loop(support[e], labels[e], query[e], 3, head, tune, **{**FIT, "steps": 0})
        assert (expected - start).abs().max() > 1e-2                                   # fitting does something
    single = model.float().score({"frames": support.float()}, labels, {"frames": query.float()}, 3)
    assert torch.allclose(single.double(), found, atol=1e-4)


@forms
def test_gradients_are_autograds(head, tune):
    x, labels = unit(pooled(frames_of(2, 5), 2)), torch.tensor([[0, 1, 2, 2, -1], [2, 1, 0, 0, 1]])
    target, share = (labels[..., None] == torch.arange(3)).double(), (labels >= 0).double() / (labels >= 0).sum(-1, keepdim=True)
    with torch_seed(2): found = {name: (p + 0.1 * torch.randn(p.shape, dtype=p.dtype)).requires_grad_() for name, p in begin(x, labels, 3, head=head, tune=tune).items()}
    loss = -(share * (classify(found, x, 5.0).log_softmax(-1) * target).sum(-1)).sum()
    expected = torch.autograd.grad(loss, list(found.values()))
    ours = gradients(found, x, target, share, 5.0)
    assert ours.keys() == found.keys()
    for name, want in zip(found, expected): assert torch.allclose(ours[name], want, rtol=1e-10, atol=1e-12), name


@forms
def test_fitting_lowers_the_loss_of_the_supports(head, tune):
    x, labels = unit(pooled(frames_of(6))), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    fit(begin(x, labels, 3, head=head, tune=tune), x, labels, watch=lambda step, found: losses.append(F.cross_entropy(classify(found, x), labels).item()))
    assert len(losses) == 101 and losses[100] < losses[10] < losses[0]


@torch.no_grad()
@forms
def test_zero_steps_are_the_nearest_prototype(head, tune):
    support, query, labels = frames_of(7), frames_of(9, seed=1), torch.tensor([0, 1, 2, 0, 1, 2, -1])
    logits = make(head=head, tune=tune, steps=0, stretches=4).double().eval().score({"frames": support}, labels, {"frames": query}, 3)
    x, asked = unit(stretched(support, 4)), unit(stretched(query, 4))
    prototypes = torch.stack([x[labels == n].mean(0) for n in range(3)])
    wanted = asked @ unit(prototypes).T if head == "cosine" else -(asked[:, None] - prototypes).square().sum(-1) / 2
    assert (logits.argmax(1) == wanted.argmax(1)).all()
    assert torch.allclose(logits - logits[:, :1], 10 * (wanted - wanted[:, :1]), rtol=1e-8, atol=1e-10)


@torch.no_grad()
@forms
def test_padding_is_ignored(head, tune):
    model, support, query, labels = make(head=head, tune=tune).double().eval(), frames_of(5), frames_of(4, seed=1), torch.tensor([0, -1, 1, 1, 2])
    plain = model.score({"frames": support[labels >= 0]}, labels[labels >= 0], {"frames": query}, 3)
    support[1] = 1e3
    assert torch.allclose(model.score({"frames": support}, labels, {"frames": query}, 3), plain, rtol=1e-10)


@torch.no_grad()
def test_training_shows_the_classifier_before_fitting():
    support, query, labels = {"frames": frames_of(3)}, {"frames": frames_of(5, seed=1)}, torch.tensor([0, 1, 2])
    model, unfitted = make().double(), make(steps=0).double().eval()
    assert torch.equal(model.train().score(support, labels, query, 3), unfitted.score(support, labels, query, 3))
    assert not torch.allclose(model.eval().score(support, labels, query, 3), unfitted.score(support, labels, query, 3), atol=1e-2)


@pytest.mark.parametrize("options, classes, part", [({}, 12, "class"), (dict(head="linear"), 12, "class"), ({}, None, "episode"), (dict(class_loss=0.0), 12, "episode")])
def test_one_loss_only_and_every_parameter_learns(options, classes, part):
    model, task = make(classes, **options).train(), batch()
    out = model(task)
    out.loss.backward()
    assert list(out.losses) == [part] and out.losses[part][0] == 1.0
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    if part == "episode": assert out.loss.item() == pytest.approx(F.cross_entropy(out.logits, task.query_labels).item())
    assert isinstance(model.classifier, {"class": CosineClassifier if not options else torch.nn.Linear, "episode": type(None)}[part])


def test_the_class_loss_is_of_scaled_cosines():
    model, task = make(scale=4.0, stretches=4).train(), batch()
    out = model(task)
    x, w = stretched(model.embed(task.clips)["frames"].double(), 4), model.classifier.weight.double()
    labels = task.class_ids[torch.cat([task.support_labels, task.query_labels])]
    logits = torch.tensor([[4 * (v @ c / (v.norm() * c.norm())).item() for c in w] for v in x])
    assert out.loss.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


@torch.no_grad()
def test_one_way_and_a_vanishing_video_stay_finite():
    model = make(tune="full").double().eval()
    assert model.score({"frames": frames_of(2)}, torch.tensor([0, 0]), {"frames": frames_of(3)}, 1).isfinite().all()
    support = frames_of(3); support[1] = 0
    assert model.score({"frames": support}, torch.tensor([0, 1, 2]), {"frames": frames_of(3)}, 3).isfinite().all()


@pytest.mark.parametrize("frames, stretches", [(8, 1), (8, 4), (5, 3), (3, 5), (1, 4), (7, 7)])
def test_a_clip_is_pooled_in_equal_stretches(frames, stretches):
    with torch_seed(6): x = torch.randn(4, frames, 6, dtype=torch.float64)
    assert torch.allclose(pooled(x, stretches), stretched(x, stretches), rtol=1e-10, atol=1e-12)
    assert torch.allclose(shares(frames, stretches).sum(1), torch.ones(stretches, dtype=torch.float64))
    assert torch.allclose(pooled(x, stretches).unflatten(-1, (stretches, -1)).mean(1), x.mean(1))


@torch.no_grad()
def test_stretches_see_order_and_one_does_not():
    support, labels = frames_of(3), torch.tensor([0, 1, 2])
    for stretches in (1, 3):
        model = make(stretches=stretches).double().eval()
        forwards, backwards = (model.score({"frames": support}, labels, {"frames": q}, 3) for q in (support, support.flip(1)))
        assert torch.allclose(forwards, backwards, rtol=1e-8) == (stretches == 1)


def test_wrong_options_are_named():
    with pytest.raises(FsarError, match="option 'stretches' of method 'finetune' must be at least 1, got 0"): make(stretches=0)
    with pytest.raises(FsarError, match="option 'head' of method 'finetune' wants one of cosine, linear, got 'mlp'"): parse_options("finetune", ["head=mlp"])
    with pytest.raises(FsarError, match="option 'steps' of method 'finetune' must be at least 0, got -1"): make(steps=-1)
    with pytest.raises(FsarError, match="class 1 has none"): make().eval().score({"frames": frames_of(2)}, torch.tensor([0, 2]), {"frames": frames_of(1)}, 3)
