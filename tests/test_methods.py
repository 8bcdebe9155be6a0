"""Properties of every registered method, so that a new one is tested for free; and each equation against a naive loop in float64."""
import math

import pytest
import torch

from fsar.core import FsarError, torch_seed
from fsar.episodes import EpisodeBatch
from fsar.methods.molo import MotionDecoder, long_short_loss
from fsar.model import METHODS, class_mean, create_model, load_methods, method_options, parse_options

load_methods()
ALL = sorted(METHODS)
FORMS = [(m, v) for m in ALL for v in METHODS[m].variants]
pytestmark = pytest.mark.filterwarnings("ignore:.*lazy modules.*")


def make(method: str, variant: str = "paper", frames: int = 8, **options):
    return create_model(method, backbone="resnet_micro", frames=frames, classes=12, options={"variant": variant, **options}, seed=1)


def pixels(videos: int, frames: int = 8, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    with torch_seed(seed, videos, frames): return torch.randint(0, 256, (videos, frames, 3, height, width), dtype=torch.uint8)


def batch(ways: int = 3, shots: int = 2, queries: int = 2, **kw) -> EpisodeBatch:
    clips = pixels(ways * (shots + queries), **kw)
    return EpisodeBatch(support=clips[:ways * shots], support_labels=torch.arange(ways).repeat_interleave(shots), query=clips[ways * shots:],
                        query_labels=torch.arange(ways).repeat_interleave(queries), class_ids=torch.arange(ways) + 4, index=0)


def embedded(model, videos: int, **kw) -> dict[str, torch.Tensor]:
    with torch.inference_mode(): return {k: x.clone() for k, x in model.eval().embed(pixels(videos, **kw)).items()}


def rows(embedding, index): return {k: x[index] for k, x in embedding.items()}


@pytest.mark.parametrize("method, variant", FORMS)
def test_every_parameter_gets_a_gradient(method, variant):
    model = make(method, variant).train()
    out = model(batch())
    out.loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert out.loss.isfinite() and not without
    assert torch.isclose(out.loss, sum(w * v for w, v in out.losses.values()))


@pytest.mark.parametrize("method, variant", FORMS)
def test_permuting_the_episode_permutes_the_logits(method, variant):
    model = make(method, variant)
    emb = embedded(model, 12)
    labels, support, query = torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6), torch.arange(6, 12)
    plain = model.score(rows(emb, support), labels, rows(emb, query), 3)
    with torch_seed(5): shots, queries, ways = torch.randperm(6), torch.randperm(6), torch.tensor([2, 0, 1])
    assert torch.allclose(model.score(rows(emb, support[shots]), labels[shots], rows(emb, query[queries]), 3), plain[queries], atol=1e-5)
    assert torch.allclose(model.score(rows(emb, support), ways[labels], rows(emb, query), 3)[:, ways], plain, atol=1e-5)


@pytest.mark.parametrize("method, variant", FORMS)
def test_unequal_shots_ignore_padding_and_equal_one_class_at_a_time(method, variant):
    model = make(method, variant).double()
    emb = {k: x.double() for k, x in embedded(model, 9).items()}
    labels, query = torch.tensor([0, 1, 1, 1, 2, -1]), rows(emb, torch.arange(6, 9))
    logits = model.score(rows(emb, torch.arange(6)), labels, query, 3)
    for n in range(3):
        own = torch.arange(6)[labels == n]
        alone = model.score(rows(emb, own), torch.zeros(len(own), dtype=torch.long), query, 1)
        assert torch.allclose(logits[:, n], alone[:, 0], rtol=1e-9)


@pytest.mark.parametrize("method, variant", FORMS)
def test_leading_episode_axis_equals_a_loop(method, variant):
    model = make(method, variant)
    emb = embedded(model, 14)
    with torch_seed(7): index = torch.stack([torch.randperm(14)[:7] for _ in range(4)])
    labels = torch.tensor([[0, 1, 2, 2]]).repeat(4, 1)
    together = model.score(rows(emb, index[:, :4]), labels, rows(emb, index[:, 4:]), 3)
    assert together.shape == (4, 3, 3)
    for e in range(4):
        assert torch.allclose(together[e], model.score(rows(emb, index[e, :4]), labels[e], rows(emb, index[e, 4:]), 3), atol=1e-5)


@pytest.mark.parametrize("method, variant", FORMS)
def test_a_video_is_embedded_alike_whatever_stands_beside_it(method, variant):
    model, clips = make(method, variant).eval(), pixels(5)
    with torch.inference_mode(): together, alone = model.embed(clips), model.embed(clips[2:3])
    for k in together: assert torch.allclose(together[k][2:3], alone[k], atol=1e-4), k


@pytest.mark.parametrize("method, variant", FORMS)
@pytest.mark.parametrize("ways, shots, queries, frames, height, width", [(1, 1, 1, 8, 32, 32), (2, 1, 1, 2, 33, 47), (2, 2, 1, 13, 24, 40), (3, 1, 2, 5, 64, 16)])
def test_any_episode_frame_count_and_input_size(method, variant, ways, shots, queries, frames, height, width):
    model = make(method, variant, frames=frames).train()
    out = model(batch(ways, shots, queries, frames=frames, height=height, width=width))
    assert out.logits.shape == (ways * queries, ways) and out.loss.isfinite()


@pytest.mark.parametrize("method, variant", FORMS)
def test_one_frame(method, variant):
    options = {"motion": False, "autodecoder": False} if "motion" in method_options(method) else {}
    model = make(method, variant, frames=1, **options)
    assert model.train()(batch(frames=1)).loss.isfinite()


@pytest.mark.parametrize("method, variant", FORMS)
def test_bfloat16_autocast_stays_near_float32(method, variant):
    model, episode = make(method, variant, class_loss=0).eval(), batch()
    with torch.no_grad():
        full = model(episode).logits
        with torch.autocast("cpu", torch.bfloat16): half = model(episode).logits
    assert half.dtype == torch.float32 and half.isfinite().all()
    assert (half - full).abs().max() < 0.05 * full.abs().max() + 0.05


@pytest.mark.parametrize("method", ALL)
def test_the_same_seed_gives_the_same_model_and_config_rebuilds_it(method):
    a = make(method)
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
    s = lambda x, y: math.exp(cosine(x, y) / tau)
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
    from fsar.matching import MATCHERS
    model = make("molo", matcher=matcher).double()
    emb = {k: x.double() for k, x in embedded(model, 7).items()}
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
