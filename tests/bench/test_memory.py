"What a training step keeps in memory: activations computed again, frozen statistics, parts of an episode. The numbers stay."
import os
import shutil
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

from fsar.bench import costs
from fsar.engine import devices, evaluation
from fsar.backbones.base import BACKBONES, Backbone, channels_last, segments
from fsar.core.config import NEUTRAL, Config, differing
from fsar.core.basics import FsarError, torch_seed
from fsar.data.episodes import EpisodeBatch, episode_loader
from fsar.model.base import METHODS
from fsar.model.registry import create_model
from fsar.engine.training import batches_from, train, training_settings
from fsar.engine.devices import choose_precision
from fsar.engine.run import prepare_run
from test_methods import batch, forms, make
from toy_training import CLASSES, Episodes, ctrl_c, run, settings, tiny, weights

backbones = pytest.mark.parametrize("name", sorted(BACKBONES))


def seeded(name):
    "A backbone with statistics that are not those of a fresh one."
    with torch_seed(1):
        backbone = BACKBONES[name]()
        for m in backbone.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(); m.running_var.uniform_(0.5, 2)
    return backbone


def step(backbone, frames, autocast=False):
    "Maps, gradients and buffers after a forward and a backward pass in training mode."
    with torch_seed(2), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        maps = backbone.train()(frames)
        maps.float().square().mean().backward()
    return [maps, frames.grad, *(p.grad for p in backbone.parameters()), *backbone.buffers()]


def pixels(videos=5, size=48, dtype=torch.float32, grad=False):
    with torch_seed(3): return torch.randn(videos, 3, size, size, dtype=dtype).requires_grad_(grad)


def apart(a, b):
    "The distance of two tensors, as a part of the first."
    return ((a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-300)).item()


def kept(call, others):
    "Bytes that a call keeps for the backward pass beside what is there already."
    known, found = {x.data_ptr() for x in others}, {}
    def see(x):
        if x.data_ptr() not in known: found[x.data_ptr()] = x
        return x
    with torch.autograd.graph.saved_tensors_hooks(see, lambda x: x): call()
    return sum(x.nbytes for x in found.values())


# computed again

@backbones
def test_segments_are_the_body(name):
    backbone = seeded(name).eval()
    parts, x = segments(backbone.body), pixels()
    maps = x
    for part in parts: maps = part(maps)
    assert torch.equal(maps, backbone.body(x)) and len(parts) > 3
    ours = [id(m) for part in parts for m in part.modules() if not list(m.children())]
    assert ours == [id(m) for m in backbone.body.modules() if not list(m.children())]                            # every layer once, in order


def test_layers_that_change_their_input_in_place_stay_behind_what_made_it():
    body = nn.Sequential(Conv2dNormActivation(3, 4, activation_layer=None), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Sequential(nn.Conv2d(4, 5, 1), nn.ReLU()))
    assert [[type(m).__name__ for m in part] for part in segments(body)] == [["Conv2dNormActivation", "ReLU"], ["Conv2d", "ReLU"], ["Conv2d", "ReLU"]]
    plain, other = Backbone(body, 5), Backbone(deepcopy(body), 5)
    other.recompute = True
    assert all(map(torch.equal, step(plain, pixels(grad=True)), step(other, pixels(grad=True))))


@backbones
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_recomputing_changes_no_bit(name, autocast):
    plain = seeded(name)
    other = deepcopy(plain)
    other.recompute = True
    usual, again = (step(b, pixels(grad=True), autocast) for b in (plain, other))
    assert all(map(torch.equal, usual, again)) and usual[1] is not None
    frames = pixels()
    usual, less = (kept(partial(b, frames), [*b.parameters(), *b.buffers()]) for b in (plain, other))
    assert less < 0.45 * usual


@forms
def test_recomputing_changes_no_bit_of_any_method(method, variant, sampler):
    "Dropout, class-label loss and whatever stands before and behind the backbone included."
    found = []
    for recompute in (False, True):
        model = make(method, variant, sampler).train()
        model.backbone.recompute = recompute
        with torch_seed(4): (out := model(batch(model))).loss.backward()
        found.append([out.logits, out.loss, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()])
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


def test_a_graph_may_be_run_through_twice():
    plain, other = seeded("resnet_micro"), seeded("resnet_micro")
    other.recompute = True
    for b in (plain, other):
        loss = b.train()(pixels()).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    for p, q in zip(plain.parameters(), other.parameters()): assert torch.equal(p.grad, q.grad)
    assert all(map(torch.equal, plain.buffers(), other.buffers())) and int(other.body[0][1].num_batches_tracked) == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients_nothing_is_computed_again(mode, monkeypatch):
    backbone = seeded("resnet_micro").eval()
    expected = backbone(pixels()).detach()
    backbone.recompute, backbone.at_once = True, 2
    monkeypatch.setattr("fsar.backbones.base.checkpoint", None)                                                        # calling it would fail
    with mode(): assert torch.equal(backbone(pixels()), expected)


def test_a_training_learns_the_same_bytes(tmp_path):
    "And may change its mind on the way: it is no other training."
    assert "recompute" in NEUTRAL and differing(settings().to_dict(), settings(recompute=True)) == [] and settings().hash == settings(recompute=True).hash
    run(tmp_path / "plain")
    assert run(tmp_path / "again", settings(recompute=True)).steps == 12
    with pytest.raises(KeyboardInterrupt): run(tmp_path / "both", on_step=ctrl_c(5), save_seconds=0)
    run(tmp_path / "both", settings(recompute=True))
    assert weights(tmp_path / "plain") == weights(tmp_path / "again") == weights(tmp_path / "both")
    assert run(tmp_path / "plain", settings(recompute=True)).reused


# compiled

def plain_body(): return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 1, 1))


needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")


@needs_compiler
def test_a_compiled_backbone_learns_the_same_up_to_rounding(tmp_path, monkeypatch):
    "Programs lie in the project's cache, weights keep their names, and without gradients the body runs as it is."
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("FSAR_CACHE", str(tmp_path / "cache"))
    models = {}
    for name in ("plain", "compiled"):
        with torch_seed(0): models[name] = METHODS["protonet"](Backbone(plain_body(), 8), frames=2, classes=CLASSES)
        models[name].config = {"method": "protonet", "backbone": "plain_body of the tests"}
        run(tmp_path / name, settings(compile=name == "compiled", episodes=12), models[name])
        assert models[name].backbone.compiled == (name == "compiled")
    states = [m.state_dict() for m in models.values()]
    assert list(states[0]) == list(states[1])
    for key in states[0]: torch.testing.assert_close(states[1][key], states[0][key], rtol=1e-3, atol=1e-5, msg=key)
    assert [f for f in (tmp_path / "cache" / "compiled").rglob("*") if f.is_file()], "programs were written, and there"
    models["compiled"].backbone.set_compiled(False)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(models["compiled"].backbone.eval()(x), models["compiled"].backbone.body(x))


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FsarError, match="needs a C\\+\\+ compiler, and there is no 'no-such-compiler'"): prepare_run(settings(compile=True), tiny())


# frozen statistics, and parts

@backbones
@pytest.mark.parametrize("recompute", [False, True])
def test_parts_of_an_episode_give_its_gradients(name, recompute):
    "In float64: seven frames as a whole, and as 3 + 3 + 1."
    plain = seeded(name).double()
    plain.frozen = True
    parts = deepcopy(plain)
    parts.at_once, parts.recompute = 3, recompute
    before = [b.clone() for b in plain.buffers()]
    whole, found = (step(b, pixels(7, dtype=torch.double, grad=True)) for b in (plain, parts))
    for a, b in zip(whole, found): assert apart(a, b) <= 1e-10
    assert all(map(torch.equal, before, parts.buffers())) and all(map(torch.equal, before, plain.buffers()))      # statistics and counters stay
    assert all(p.grad is not None and p.grad.any() for p in parts.parameters())                                   # scale and shift of the norms learn too


def test_parts_of_an_episode_in_single_precision():
    plain = seeded("resnet18")
    plain.frozen = True
    parts = deepcopy(plain)
    parts.at_once = 4
    for a, b in zip(step(plain, pixels(10, grad=True)), step(parts, pixels(10, grad=True))): assert apart(a, b) <= 1e-5
    frames = pixels(64, size=32)
    def held(b, n): return kept(lambda: b(frames[:n]), [*b.parameters(), *b.buffers()])
    assert held(parts, 64) < 0.05 * held(plain, 64) and held(parts, 4) == pytest.approx(held(plain, 4))           # a single part is kept as it is


def test_parts_with_statistics_of_their_own_are_refused():
    backbone = seeded("resnet_micro")
    backbone.at_once = 2
    with pytest.raises(FsarError, match="only if it is frozen"): backbone.train()(pixels())
    assert torch.equal(backbone(pixels(2)), seeded("resnet_micro").train()(pixels(2)))                            # a single part is the whole


def test_frozen_norms_stay_frozen_through_validation_and_the_others_train():
    model = make("molo").train()
    model.backbone.frozen = True
    def norms(m): return [n.training for n in m.modules() if isinstance(n, nn.modules.batchnorm._BatchNorm)]
    assert all(norms(model.backbone))                                                                             # from the next train() on
    model.train()
    assert model.backbone.training and not any(norms(model.backbone)) and any(norms(model))
    with evaluation.testing(model): assert not any(norms(model))
    assert not any(norms(model.backbone)) and any(norms(model)) and not any(norms(model.eval().train().backbone))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    file = tmp_path_factory.mktemp("pretrained") / "micro.pth"
    torch.save(seeded("resnet_micro").body.state_dict(), file)
    return dict(weights=str(file), backbone="resnet_micro", frames=3, size=16, short_side=16, ways=2, queries=1, episodes=6, validate_every=0, optimizer="sgd")


def trained(out, method="otam", sampler="", **changes):
    config = settings(method=method, sampler=sampler, **changes)
    model = create_model(method, backbone="resnet_micro", frames=3, classes=6, weights=config.weights, sampler=sampler)
    run(out, config, model, Episodes(frames=model.clip_frames, size=16, ways=2, queries=1), None)
    return model


@pytest.mark.parametrize("method, sampler", [("otam", ""), ("otam", "vim"), ("molo", ""), ("vim", "")])
def test_the_settings_reach_the_backbone_of_every_method(method, sampler, pretrained, tmp_path):
    whole, parts = (trained(tmp_path / str(n), method, sampler, batch_norm="frozen", frames_at_once=n, **pretrained) for n in (0, 4))
    assert (whole.backbone.frozen, whole.backbone.at_once) == (True, 0) and (parts.backbone.frozen, parts.backbone.at_once) == (True, 4)
    for a, b in zip(whole.parameters(), parts.parameters()): assert apart(a, b) <= 1e-4 or a.norm() < 1e-8
    start = seeded("resnet_micro").body.state_dict()
    for name, x in parts.backbone.body.state_dict().items(): assert torch.equal(x, start[name]) == ("running" in name or "num_batches" in name), name


@pytest.mark.parametrize("changes, words", [(dict(batch_norm="frozen"), "'batch_norm' can be 'frozen' only with 'weights'"), (dict(frames_at_once=8, weights="imagenet"), "'frames_at_once' needs 'batch_norm' 'frozen'"),
                                            (dict(compile=True, recompute=True), "'compile' cannot be used with 'recompute'"), (dict(compile=True, frames_at_once=8, batch_norm="frozen", weights="imagenet"), "'compile' cannot be used with 'frames_at_once'"),
                                            (dict(frames_at_once=-1), "'frames_at_once' must be at least 0"), (dict(batch_norm="eval"), "'batch_norm' must be one of 'train', 'frozen'")])
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(FsarError, match=words): Config(**changes)


def test_trainings_from_before_these_settings_are_still_their_own():
    ours = Config(method="otam", seed=3)
    older = {k: v for k, v in ours.to_dict().items() if k not in ("batch_norm", "recompute", "compile", "frames_at_once")}
    assert differing(older, ours) == [] and Config.from_dict(older) == ours
    frozen = ours.replace(batch_norm="frozen", weights="imagenet", frames_at_once=8)
    assert differing(older, frozen) == ["weights", "batch_norm", "frames_at_once"] and {"batch_norm", "frames_at_once"} < training_settings(frozen, None).keys()


# layout and precision

def test_all_convolutions_over_pictures_are_laid_out_for_speed():
    "Those outside the backbone too, and without another number."
    model = make("molo").eval()
    clips = batch(model)
    with torch.inference_mode(): before = model(clips).logits
    assert channels_last(model) is model
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) > len([m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)])
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    with torch.inference_mode(): assert torch.allclose(model(clips).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("backbone, sampler, faster", [("resnet_micro", "", True), ("resnet50", "", True), ("mobilenet_v2", "", False), ("resnet_micro", "vim", True)])
def test_auto_takes_bf16_where_the_backbone_is_faster_in_it(backbone, sampler, faster, instructions, monkeypatch):
    "Grouped convolutions are not; the few of the sampler's scan weigh less than the rest."
    monkeypatch.setattr(devices, "_cpu_multiplies_bf16", lambda: instructions)
    model, cpu = create_model("otam", backbone=backbone, sampler=sampler), torch.device("cpu")
    assert choose_precision("auto", cpu, model) == ("bf16" if faster and instructions else "fp32")
    assert [choose_precision(name, cpu, model) for name in ("fp32", "bf16")] == ["fp32", "bf16"] and choose_precision("auto", torch.device("mps"), model) == "fp32"
    assert prepare_run(Config(method="otam", device="cpu"), model).precision == choose_precision("auto", cpu, model)


# what a step costs

def test_a_cost_is_that_of_the_training(pretrained):
    config = settings(method="otam", **pretrained | dict(size=64, short_side=64, queries=8))
    found = {name: costs.step_cost(config.replace(**changes)) for name, changes in {"plain": {}, "sparing": dict(batch_norm="frozen", frames_at_once=4)}.items()}
    assert all(c.peak > c.before > 10**8 and 0 < c.seconds < 100 and c.precision == "fp32" for c in found.values())
    assert found["sparing"].peak - found["sparing"].before < 0.7 * (found["plain"].peak - found["plain"].before)


def test_a_cost_that_cannot_be_measured_says_why(pretrained, tmp_path):
    with pytest.raises(FsarError, match="the step could not be measured: no weights file .*absent.pth; accepted"): costs.step_cost(settings(**pretrained | dict(weights=str(tmp_path / "absent.pth"))))


# from memory to a GPU

def test_an_episode_is_pinned_whole(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: (pinned.append(x), x.clone())[1])
    episode = Episodes()[3]
    other = episode.pin_memory()
    assert isinstance(other, EpisodeBatch) and other.index == 3 and sum(isinstance(x, torch.Tensor) for x in vars(episode).values()) == 5
    assert torch.equal(pinned[0], episode.clips) and all(a is b for a, b in zip(pinned[1:], (episode.support_labels, episode.query_labels, episode.class_ids))) and len(pinned) == 4
    assert other.clips.data_ptr() == other.support.data_ptr(), "the clips went together and lie side by side"
    assert all(torch.equal(x, getattr(other, name)) for name, x in vars(episode).items() if isinstance(x, torch.Tensor))


def test_only_for_a_gpu_episodes_are_pinned():
    run_ = prepare_run(settings(), tiny())
    loaders = []
    class Seen(torch.utils.data.DataLoader):
        def __init__(self, *args, pin_memory=False, **kwargs): loaders.append(pin_memory); super().__init__(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fsar.data.episodes.DataLoader", Seen)
        assert [b.index for b in batches_from(run_, Episodes(), 10)] == [20, 21, 22, 23]
        run_.device = torch.device("cuda")
        assert [b.index for b in batches_from(run_, Episodes(), 10)] == [20, 21, 22, 23]
    assert loaders == [False, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory is memory that a GPU may read: there is no GPU here")
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_episodes_are_the_same_in_the_same_order(workers):
    usual, pinned = (list(episode_loader(Episodes(), 3, 9, workers=workers, pin=pin)) for pin in (False, True))
    assert [b.index for b in pinned] == [b.index for b in usual] == list(range(3, 9)) and all(b.clips.shape == a.clips.shape and b.support.is_pinned() and b.class_ids.is_pinned() for a, b in zip(usual, pinned))
    assert all(torch.equal(a.clips, b.clips) and torch.equal(a.clips, b.to("cuda").clips.cpu()) for a, b in zip(usual, pinned))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_gpu_recomputing_keeps_less_and_learns_the_same(tmp_path):
    peaks = []
    for recompute in (False, True):
        config = Config(method="otam", backbone="resnet18", size=112, short_side=112, precision="fp32", device="cuda", recompute=recompute, episodes=2, validate_every=0)
        model = create_model("otam", backbone="resnet18", classes=5)
        torch.cuda.reset_peak_memory_stats()
        episode = costs.noise(config, 8)
        train(config, model, {0: episode, 1: episode}, None, tmp_path / str(recompute), progress=False)
        peaks.append((torch.cuda.max_memory_allocated(), model.cpu()))
    assert peaks[1][0] < 0.7 * peaks[0][0]
    for a, b in zip(peaks[0][1].parameters(), peaks[1][1].parameters()): assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
