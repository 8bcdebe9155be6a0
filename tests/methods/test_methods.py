"""Properties of every registered method, so that a new one is tested for free; and each equation against a naive loop in float64."""
import math

import pytest
import torch

from fsar.core.basics import FsarError, torch_seed
from fsar.data.episodes import EpisodeBatch
from fsar.methods.molo import MotionDecoder, long_short_loss
from fsar.model.base import METHODS, SAMPLERS
from fsar.model.blocks import class_mean
from fsar.model.registry import create_model, parse_options

ALL = sorted(METHODS)
FORMS = [(m, v, "") for m in ALL for v in METHODS[m].variants] + [(m, "paper", s) for m in ALL for s in SAMPLERS if not issubclass(METHODS[m], SAMPLERS[s])]  # every method, and every sampler in front of it
pytestmark = pytest.mark.filterwarnings("ignore:.*lazy modules.*")
forms = pytest.mark.parametrize("method, variant, sampler", FORMS, ids=["-".join(filter(None, (s, m, v))) for m, v, s in FORMS])


def make(method: str, variant: str = "paper", sampler: str = "", frames: int = 8, **options):
    model = create_model(method, backbone="resnet_micro", frames=frames, classes=12, options={"variant": variant, **options}, sampler=sampler, seed=1)
    return model


def pixels(videos: int, frames: int = 8, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    with torch_seed(seed, videos, frames): return torch.randint(0, 256, (videos, frames, 3, height, width), dtype=torch.uint8)


def batch(model=None, ways: int = 3, shots: int = 2, queries: int = 2, **kw) -> EpisodeBatch:
    if model is not None: kw["frames"] = model.clip_frames
    clips = pixels(ways * (shots + queries), **kw)
    return EpisodeBatch(support=clips[:ways * shots], support_labels=torch.arange(ways).repeat_interleave(shots), query=clips[ways * shots:],
                        query_labels=torch.arange(ways).repeat_interleave(queries), class_ids=torch.arange(ways) + 4, index=0)


def embedded(model, videos: int, double: bool = False, **kw) -> dict[str, torch.Tensor]:
    "Embeddings of random videos at test; with `double`, model and floats in float64."
    with torch.inference_mode(): found = {k: x.clone() for k, x in model.eval().embed(pixels(videos, model.clip_frames, **kw)).items()}
    if double: model.double()
    return {k: x.double() if double and x.is_floating_point() else x for k, x in found.items()}


def rows(embedding, index): return {k: x[index] for k, x in embedding.items()}


def logits_of(model, support, labels, query, ways):
    "The task-adaptive step, then the score."
    with torch.no_grad():
        support, query = model.adapt(support, labels, query)
        return model.score(support, labels, query, ways)


def without_gradient(model) -> set[str]:
    return {n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()}


@forms
def test_every_parameter_gets_a_gradient(method, variant, sampler):
    model = make(method, variant, sampler).train()
    out = model(batch(model))
    out.loss.backward()
    assert out.loss.isfinite() and without_gradient(model) == set(model.silent_at_start)      # those that a method declares, and really those
    assert torch.isclose(out.loss, sum(w * v for w, v in out.losses.values()))
    if not model.silent_at_start: return
    torch.optim.Adam(model.parameters(), 1e-3).step()                                         # one step opens the gate
    model.zero_grad()
    model(batch(model)).loss.backward()
    assert not without_gradient(model)


@forms
def test_permuting_the_episode_permutes_the_logits(method, variant, sampler):
    model = make(method, variant, sampler)
    emb = embedded(model, 12, double=True)
    labels, support, query = torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6), torch.arange(6, 12)
    plain = logits_of(model, rows(emb, support), labels, rows(emb, query), 3)
    with torch_seed(5): shots, queries, ways = torch.randperm(6), torch.randperm(6), torch.tensor([2, 0, 1])
    assert torch.allclose(logits_of(model, rows(emb, support[shots]), labels[shots], rows(emb, query[queries]), 3), plain[queries], atol=1e-8)
    assert torch.allclose(logits_of(model, rows(emb, support), ways[labels], rows(emb, query), 3)[:, ways], plain, atol=1e-8)


@forms
def test_unequal_shots_ignore_padding(method, variant, sampler):
    model = make(method, variant, sampler)
    emb = embedded(model, 9, double=True)
    labels, query = torch.tensor([0, 1, 1, 1, 2, -1]), rows(emb, torch.arange(6, 9))
    logits = logits_of(model, rows(emb, torch.arange(6)), labels, query, 3)
    assert torch.allclose(logits, logits_of(model, rows(emb, torch.arange(5)), labels[:5], query, 3), rtol=1e-9)
    if model.relational: return
    for n in range(3):                                        # one class at a time, without the others
        own = torch.arange(6)[labels == n]
        alone = logits_of(model, rows(emb, own), torch.zeros(len(own), dtype=torch.long), query, 1)
        assert torch.allclose(logits[:, n], alone[:, 0], rtol=1e-9)


@forms
def test_a_relational_method_says_so(method, variant, sampler):
    model = make(method, variant, sampler)
    emb = embedded(model, 9, double=True)
    query = rows(emb, torch.arange(6, 9))
    full = logits_of(model, rows(emb, torch.arange(3)), torch.arange(3), query, 3)
    fewer = logits_of(model, rows(emb, torch.arange(2)), torch.arange(2), query, 2)
    assert torch.allclose(full[:, :2], fewer, rtol=1e-9) == (not model.relational)


@forms
def test_leading_episode_axis_equals_a_loop(method, variant, sampler):
    model = make(method, variant, sampler)
    emb = embedded(model, 14, double=True)
    with torch_seed(7): index = torch.stack([torch.randperm(14)[:7] for _ in range(4)])
    labels = torch.tensor([[0, 1, 2, 2]]).repeat(4, 1)
    together = logits_of(model, rows(emb, index[:, :4]), labels, rows(emb, index[:, 4:]), 3)
    assert together.shape == (4, 3, 3)
    for e in range(4):
        assert torch.allclose(together[e], logits_of(model, rows(emb, index[e, :4]), labels[e], rows(emb, index[e, 4:]), 3), atol=1e-8)


@forms
def test_a_video_is_embedded_alike_whatever_stands_beside_it(method, variant, sampler):
    model = make(method, variant, sampler).eval()
    clips = pixels(5, model.clip_frames)
    with torch.inference_mode(): together, alone = model.embed(clips), model.embed(clips[2:3])
    for k in together: assert torch.allclose(together[k][2:3].double(), alone[k].double(), atol=1e-4), k


@forms
@pytest.mark.parametrize("ways, shots, queries, frames, height, width", [(1, 1, 1, 8, 32, 32), (2, 1, 1, 2, 33, 47), (2, 2, 1, 13, 24, 40), (3, 1, 2, 5, 64, 16)])
def test_any_episode_frame_count_and_input_size(method, variant, sampler, ways, shots, queries, frames, height, width):
    model = make(method, variant, sampler, frames=max(frames, make(method, variant).least_frames)).train()
    out = model(batch(model, ways, shots, queries, height=height, width=width))
    assert out.logits.shape == (ways * queries, ways) and out.loss.isfinite()


@forms
def test_too_few_frames_are_refused_and_the_fewest_serve(method, variant, sampler):
    least = make(method, variant, sampler).least_frames
    model = make(method, variant, sampler, frames=least)
    assert model.train()(batch(model)).loss.isfinite()
    if least > 1:
        with pytest.raises(FsarError, match=f"at least {least} frames"): make(method, variant, frames=least - 1).embed(pixels(2, least - 1))


@forms
def test_bfloat16_autocast_stays_near_float32(method, variant, sampler):
    model = make(method, variant, sampler, class_loss=0).eval()
    episode = batch(model)
    with torch.no_grad():
        full = model(episode).logits
        with torch.autocast("cpu", torch.bfloat16): half = model(episode).logits
    assert half.dtype == torch.float32 and half.isfinite().all()
    if not sampler: assert (half - full).abs().max() < 0.05 * full.abs().max() + 0.05  # rounding may make a sampler pick other frames


@pytest.mark.parametrize("method, sampler", sorted({(m, s) for m, _, s in FORMS}))
def test_the_same_seed_gives_the_same_model_and_config_rebuilds_it(method, sampler):
    a = make(method, sampler=sampler)
    b = create_model(**a.config, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), create_model(**a.config, seed=2).parameters()))


@pytest.mark.parametrize("method", ALL)
def test_wrong_clips_are_named(method):
    with pytest.raises(FsarError, match=r"clips must have shape \(V, T, 3, H, W\), got \(2, 8, 1, 32, 32\)"): make(method).embed(torch.zeros(2, 8, 1, 32, 32))


def test_option_errors_name_the_nearest():
    with pytest.raises(FsarError, match="unknown method 'mollo'. Did you mean 'molo'?"): parse_options("mollo")
    with pytest.raises(FsarError, match="method 'molo' has no option 'matchr'. Did you mean 'matcher'?"): parse_options("molo", ["matchr=otam"])
    with pytest.raises(FsarError, match="option 'matcher' of method 'molo' wants one of bimhm, otam, got 'dtw'"): parse_options("molo", ["matcher=dtw"])
    with pytest.raises(FsarError, match="method 'molo' has no variant 'realeased'. Did you mean 'released'?"): parse_options("molo", ["variant=realeased"])
    assert parse_options("molo", ["variant=released", "sums=false"])["sums"] is False


def test_an_episode_without_support_for_a_class_is_refused():
    with pytest.raises(FsarError, match="class 1 has none"): class_mean(torch.zeros(2, 3), torch.tensor([0, 2]), 3)


# --- MoLo's equations, written again as loops in float64 -----------------------------------------------------------------------------------

def cosine(x, y): return sum(a * b for a, b in zip(x, y)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def long_short_loop(q_token, q_frames, p_token, p_frames, labels, tau):
    def s(x, y): return math.exp(cosine(x, y) / tau)
    total = 0.0
    for q, label in enumerate(labels):
        pos = sum(s(q_token[q], f) for f in p_frames[label])
        neg = sum(s(q_token[q], f) for j in range(len(p_token)) if j != label for f in p_frames[j])
        total -= math.log(pos / (pos + neg))
        pos = sum(s(f, p_token[label]) for f in q_frames[q])
        neg = sum(s(f, p_token[label]) for j, other in enumerate(labels) if other != label for f in q_frames[j])
        total -= math.log(pos / (pos + neg))
    return total / len(labels)


@pytest.mark.parametrize("tau", [0.07, 0.1, 1.0])
def test_long_short_loss_is_the_papers(tau):
    with torch_seed(0): x = [torch.randn(*shape, dtype=torch.float64) for shape in [(6, 5), (6, 4, 5), (3, 5), (3, 4, 5)]]
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    expected = long_short_loop(*(t.tolist() for t in x), labels.tolist(), tau)
    assert long_short_loss(*x, labels, tau).item() == pytest.approx(expected, rel=1e-10)
    assert long_short_loss(*(t.float() for t in x), labels, tau).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("matcher", ["bimhm", "otam"])
def test_molo_logits_add_both_branches(matcher):
    from fsar.model.matching import MATCHERS
    model = make("molo", matcher=matcher)
    emb = embedded(model, 7, double=True)
    labels = torch.tensor([0, 0, 1, 1])
    logits = model.score(rows(emb, torch.arange(4)), labels, rows(emb, torch.arange(4, 7)), 2)
    scale = {"bimhm": 8.0, "otam": 1.0}[matcher]
    for q in range(3):
        for n in range(2):
            distance = 0.0
            for branch, weight in (("base", 1.0), ("motion", 0.3)):
                prototype = emb[f"{branch}_frames"][:4][labels == n].mean(0).tolist()
                sim = torch.tensor([[cosine(x, y) for y in prototype] for x in emb[f"{branch}_frames"][4 + q].tolist()], dtype=torch.float64)
                distance += weight * MATCHERS[matcher](sim).item()
            assert logits[q, n].item() == pytest.approx(-scale * distance, rel=1e-9)


def test_molo_difference_and_reconstruction_are_the_papers():
    model = make("molo", dropout=0.0).train()
    with torch_seed(2): maps = torch.randn(2, 4, 128, 6, 6)
    reduced = model.difference.reduce(maps.transpose(1, 2)).transpose(1, 2)
    found = model.difference(maps)
    for j in range(3): assert torch.allclose(found[:, j], model.difference.conv(reduced[:, j + 1]) - reduced[:, j], atol=1e-5)
    episode = batch(frames=4)
    out = model(episode)
    weight, loss = out.losses["reconstruction"]
    clips = (episode.clips.double() / 255 - 0.45) / 0.225
    drawn = model.embed(episode.clips)["reconstruction"].double()
    expected = sum((drawn[v, t] - (clips[v, t + 1] - clips[v, t])).square().mean() for v in range(len(clips)) for t in range(3)) / (3 * len(clips))
    assert weight == 0.1 and loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_molo_never_redraws_at_test(monkeypatch):
    monkeypatch.setattr(MotionDecoder, "forward", lambda *a: pytest.fail("the decoder ran at test"))
    make("molo").eval().embed(pixels(2))


@pytest.mark.parametrize("options", [dict(motion=False), dict(base=False), dict(autodecoder=False), dict(long_short=False), dict(matcher="otam"), dict(redraw=4),
                                     dict(motion=False, autodecoder=False, long_short=False), dict(base=False, autodecoder=False, long_short=False)], ids=str)
def test_molo_parts_switch_off(options):
    model = make("molo", **options).train()
    out = model(batch())
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert ("reconstruction" in out.losses) == options.get("autodecoder", True)
    assert any(name.startswith("contrast") for name in out.losses) == options.get("long_short", True)


def test_molo_needs_two_frames_for_motion():
    with pytest.raises(FsarError, match="at least 2 frames"): make("molo").embed(pixels(1, frames=1))
    assert make("molo", frames=1, motion=False, autodecoder=False).train()(batch(frames=1)).loss.isfinite()
