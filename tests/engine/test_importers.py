"Checkpoints in the layouts of papers' authors: each tensor arrives where it belongs, nothing is lost in silence, nothing in a file is run."
import json
import math
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

from fsar.cli import main as cli
from fsar.backbones.base import BACKBONES, Backbone, read_weights
from fsar.engine.checkpoints import load_model, save_model
from fsar.core.basics import FsarError, torch_seed
from fsar.engine.importers import IncompleteImport, fill_released, import_checkpoint, match_entries
from fsar.model.base import METHODS
from fsar.model.registry import create_model

CLASSES = 7  # of the class-label head, where there is one
C = 64  # channels of the backbones below


def residual(blocks: int) -> Backbone:
    "A ResNet of few channels with torchvision's blocks and names."
    def stage(a: int, b: int) -> nn.Sequential:
        "Blocks from `a` channels to `b`; where they differ, the first halves the resolution."
        if a == b: return nn.Sequential(*(BasicBlock(b, b) for _ in range(blocks)))
        shortcut = nn.Sequential(nn.Conv2d(a, b, 1, 2, bias=False), nn.BatchNorm2d(b))
        return nn.Sequential(BasicBlock(a, b, 2, shortcut), *(BasicBlock(b, b) for _ in range(blocks - 1)))
    parts = dict(conv1=nn.Conv2d(3, 8, 7, 2, 3, bias=False), bn1=nn.BatchNorm2d(8), relu=nn.ReLU(), maxpool=nn.MaxPool2d(3, 2, 1),
                 layer1=stage(8, 8), layer2=stage(8, 16), layer3=stage(16, 32), layer4=stage(32, C))
    return Backbone(nn.Sequential(OrderedDict(parts)), C)


@pytest.fixture(scope="module", autouse=True)
def small_backbones():
    "Two backbones that only these tests know."
    for name, blocks in (("thin", 1), ("deep", 2)): BACKBONES.register(name)(partial(residual, blocks))
    yield
    for name in ("thin", "deep"): del BACKBONES._entries[name]


# --- the authors' layouts, written down by hand: our name → theirs ---------------------------------------------------------------------------

def numbered(body: nn.Module, prefix: str) -> dict[str, str]:
    "A ResNet of named stages, and the same as the nn.Sequential that the authors make of its children."
    return {f"backbone.body.{ours}": f"{prefix}{theirs}" for ours, theirs in zip(body.state_dict(), nn.Sequential(*body.children()).state_dict(), strict=True)}


def weight_and_bias(**names: str) -> dict[str, str]:
    return {f"{ours.replace('__', '.')}.{part}": f"{theirs}.{part}" for ours, theirs in names.items() for part in ("weight", "bias")}


BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def molo_names(body: nn.Module) -> dict[str, str]:
    names = numbered(body, "head.backbone.") | {
        "base_former.token": "head.class_token", "motion_former.token": "head.class_token_motion",
        "base_former.attention.norm.weight": "head.temporal_atte_before.layers.0.0.norm.weight",
        "base_former.attention.norm.bias": "head.temporal_atte_before.layers.0.0.norm.bias",
        "base_former.attention.to_qkv.weight": "head.temporal_atte_before.layers.0.0.fn.to_qkv.weight",
        "base_former.attention.to_out.0.weight": "head.temporal_atte_before.layers.0.0.fn.to_out.0.weight",
        "base_former.attention.to_out.0.bias": "head.temporal_atte_before.layers.0.0.fn.to_out.0.bias",
        "base_former.feed_forward.1.weight": "head.temporal_atte_before.layers.0.1.net.0.weight",
        "base_former.feed_forward.1.bias": "head.temporal_atte_before.layers.0.1.net.0.bias",
        "base_former.feed_forward.4.weight": "head.temporal_atte_before.layers.0.1.net.3.weight",
        "base_former.feed_forward.4.bias": "head.temporal_atte_before.layers.0.1.net.3.bias",
        "motion_former.attention.norm.weight": "head.temporal_atte_before_motion.layers.0.0.norm.weight",
        "motion_former.attention.norm.bias": "head.temporal_atte_before_motion.layers.0.0.norm.bias",
        "motion_former.attention.to_qkv.weight": "head.temporal_atte_before_motion.layers.0.0.fn.to_qkv.weight",
        "motion_former.attention.to_out.0.weight": "head.temporal_atte_before_motion.layers.0.0.fn.to_out.0.weight",
        "motion_former.attention.to_out.0.bias": "head.temporal_atte_before_motion.layers.0.0.fn.to_out.0.bias",
        "motion_former.feed_forward.1.weight": "head.temporal_atte_before_motion.layers.0.1.net.0.weight",
        "motion_former.feed_forward.1.bias": "head.temporal_atte_before_motion.layers.0.1.net.0.bias",
        "motion_former.feed_forward.4.weight": "head.temporal_atte_before_motion.layers.0.1.net.3.weight",
        "motion_former.feed_forward.4.bias": "head.temporal_atte_before_motion.layers.0.1.net.3.bias",
        "contrast_scale.base": "head.scale", "contrast_scale.motion": "head.scale_motion"}
    names |= weight_and_bias(difference__reduce="head.motion_reduce", difference__conv="head.motion_conv", motion_up__0="head.motion_up",
                             classifier="head.classification_layer", decoder__out="head.outc.conv")
    for stage, up in ((0, "up1"), (1, "up2"), (2, "up3")):
        names[f"decoder.stages.{stage}.conv.0.weight"] = f"head.{up}.conv.double_conv.0.weight"
        names |= {f"decoder.stages.{stage}.conv.1.{part}": f"head.{up}.conv.double_conv.1.{part}" for part in BATCH_NORM}
    return names


def molo_shapes(c: int, classes: int) -> dict[str, tuple[int, ...]]:
    "Shapes in the authors' files, the ResNet's left out."
    formers = {f"head.temporal_atte_before{suffix}.layers.0.{part}": shape for suffix in ("", "_motion") for part, shape in {
        "0.norm.weight": (c,), "0.norm.bias": (c,), "0.fn.to_qkv.weight": (3 * c, c), "0.fn.to_out.0.weight": (c, c), "0.fn.to_out.0.bias": (c,),
        "1.net.0.weight": (c, c), "1.net.0.bias": (c,), "1.net.3.weight": (c, c), "1.net.3.bias": (c,)}.items()}
    decoder = {f"head.up{k}.conv.double_conv.{part}": shape for k, a, b in ((1, c // 8, 128), (2, 128, 32), (3, 32, 16)) for part, shape in {
        "0.weight": (b, a, 3, 3), "1.weight": (b,), "1.bias": (b,), "1.running_mean": (b,), "1.running_var": (b,), "1.num_batches_tracked": ()}.items()}
    return formers | decoder | {
        "head.class_token": (1, 1, c), "head.class_token_motion": (1, 1, c), "head.motion_reduce.weight": (c // 8, c, 3, 3, 3), "head.motion_reduce.bias": (c // 8,),
        "head.motion_conv.weight": (c // 8, c // 8, 3, 3), "head.motion_conv.bias": (c // 8,), "head.motion_up.weight": (c, c // 8, 1, 1), "head.motion_up.bias": (c,),
        "head.classification_layer.weight": (classes, c), "head.classification_layer.bias": (classes,), "head.outc.conv.weight": (3, 16, 1, 1), "head.outc.conv.bias": (3,),
        "head.scale": (1,), "head.scale_motion": (1,)}


def hyrsm_names(body: nn.Module) -> dict[str, str]:
    names = numbered(body, "head.backbone.") | {
        "within.attention.norm.weight": "head.temporal_atte_before.norm.weight", "within.attention.norm.bias": "head.temporal_atte_before.norm.bias",
        "within.attention.to_qkv.weight": "head.temporal_atte_before.fn.to_qkv.weight",
        "within.attention.to_out.0.weight": "head.temporal_atte_before.fn.to_out.0.weight", "within.attention.to_out.0.bias": "head.temporal_atte_before.fn.to_out.0.bias",
        "across.to_q.weight": "head.temporal_atte.w_qs.weight", "across.to_k.weight": "head.temporal_atte.w_ks.weight", "across.to_v.weight": "head.temporal_atte.w_vs.weight"}
    return names | weight_and_bias(across__to_out="head.temporal_atte.fc", across__norm="head.temporal_atte.layer_norm", join="head.layer2.0",
                                   classifier="head.classification_layer")


def tuple_names(body: nn.Module, cardinalities: int) -> dict[str, str]:
    "The ResNet and the heads that TRX and STRM share."
    names = numbered(body, "resnet.")
    for i in range(cardinalities):
        names |= weight_and_bias(**{f"heads__{i}__key": f"transformers.{i}.k_linear", f"heads__{i}__norm": f"transformers.{i}.norm_k"})
        names[f"heads.{i}.value.weight"] = f"transformers.{i}.v_linear.weight"
    return names


def tuple_shapes(c: int, sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"transformers.{i}.{part}": shape for i, n in enumerate(sizes) for part, shape in {
        "k_linear.weight": (1152, n * c), "k_linear.bias": (1152,), "v_linear.weight": (1152, n * c), "norm_k.weight": (1152,), "norm_k.bias": (1152,)}.items()}


def tuple_extra(c: int, heads: int) -> dict[str, tuple[int, ...]]:
    "A bias that cancels between value and prototype, a norm that is not used, a table of sines."
    return {f"transformers.{i}.{part}": shape for i in range(heads) for part, shape in {
        "v_linear.bias": (1152,), "norm_v.weight": (1152,), "norm_v.bias": (1152,), "pe.pe": (1, 12, c)}.items()}


def strm_names(body: nn.Module) -> dict[str, str]:
    names = tuple_names(body, 1) | {"patch.gamma": "attn_pat.gamma", "patch.key.weight": "attn_pat.key_proj.weight"}
    return names | weight_and_bias(
        patch__query="attn_pat.query_proj", patch__value="attn_pat.value_conv", patch__mlp__0="attn_pat.Bot_MLP.inp_fc", patch__mlp__2="attn_pat.Bot_MLP.hid_fc",
        patch__mlp__4="attn_pat.Bot_MLP.out_fc", frame__over_time__0="fr_enrich.Tok_MLP.inp_fc", frame__over_time__2="fr_enrich.Tok_MLP.out_fc",
        frame__over_channels__0="fr_enrich.Bot_MLP.inp_fc", frame__over_channels__2="fr_enrich.Bot_MLP.out_fc")


def strm_shapes(c: int, frames: int = 8) -> dict[str, tuple[int, ...]]:
    return tuple_shapes(c, (2,)) | {"attn_pat.gamma": (1,), "attn_pat.Bot_MLP.inp_fc.weight": (c // 2, c), "attn_pat.Bot_MLP.hid_fc.weight": (c // 2, c // 2),
                                    "attn_pat.Bot_MLP.out_fc.weight": (c, c // 2), "fr_enrich.Tok_MLP.inp_fc.weight": (frames, frames), "fr_enrich.Bot_MLP.inp_fc.weight": (c, c)}


class Layout(NamedTuple):
    "What a method's authors' files hold."
    names: Callable[[nn.Module], dict[str, str]]  # from the backbone's body: our name → theirs
    shapes: Callable[[int], dict[str, tuple[int, ...]]]  # from C: theirs, where they are documented
    gone: str  # one of theirs, to be left out in a test
    extra: Callable[[int], dict[str, tuple[int, ...]]] = lambda c: {}  # from C: theirs that no logit depends on
    lacking: tuple[str, ...] = ()  # ours that their files do not have
    classes: int | None = CLASSES  # of the head that they have; None where they have none


LAYOUTS = {"molo": Layout(molo_names, lambda c: molo_shapes(c, CLASSES), "head.temporal_atte_before.layers.0.0.fn.to_qkv.weight",
                          extra=lambda c: {"head.pe.pe": (1, 200, c)}),
           "hyrsm": Layout(hyrsm_names, lambda c: {"head.layer2.0.weight": (c, 2 * c, 1), "head.temporal_atte.w_ks.weight": (c, c), "head.classification_layer.weight": (CLASSES, c)},
                           "head.temporal_atte.w_vs.weight", extra=lambda c: {"head.pe.pe": (1, 200, c)}),
           "trx": Layout(lambda body: tuple_names(body, 2), lambda c: tuple_shapes(c, (2, 3)), "transformers.1.v_linear.weight", lambda c: tuple_extra(c, 2), classes=None),
           "strm": Layout(strm_names, strm_shapes, "attn_pat.Bot_MLP.hid_fc.weight",
                          lambda c: tuple_extra(c, 1) | {"attn_pat.key_proj.bias": (c,), "attn_pat.pe.pe": (1, 16, c), "fr_enrich.pe.pe": (1, 8, c)},
                          ("query_class.weight",), classes=None)}
RELEASED = sorted(name for name, kind in METHODS.items() if kind.released_layout and kind.__module__.startswith("fsar."))
methods = pytest.mark.parametrize("method", RELEASED)


def test_every_layout_has_a_table_here():
    assert "molo" in RELEASED and set(RELEASED) <= set(LAYOUTS)


def source(method: str, backbone: str = "thin"):
    "A model whose every entry differs from that of a new one."
    model = create_model(method, backbone=backbone, classes=LAYOUTS[method].classes, options={"variant": "released"}, seed=5).eval()
    with torch_seed(9), torch.no_grad():
        for x in model.state_dict().values():
            if x.is_floating_point(): x.mul_(1 + 0.1 * torch.rand(x.shape)).add_(0.01 * torch.rand(x.shape))
            else: x.fill_(3)
    return model


@pytest.fixture(scope="module")
def sources():
    made = {}
    def get(method):
        if method not in made: made[method] = source(method)
        return made[method]
    return get


def released(model) -> dict[str, torch.Tensor]:
    "The model's tensors as the authors' program would have saved them."
    layout, own, c = LAYOUTS[model.config["method"]], model.state_dict(), model.backbone.channels
    found = {theirs: own[ours].reshape(layout.shapes(c).get(theirs, own[ours].shape)).clone() for ours, theirs in layout.names(model.backbone.body).items()}
    return found | {theirs: torch.full(shape, 9.0) for theirs, shape in layout.extra(c).items()}


def clips(videos: int = 6) -> torch.Tensor:
    return torch.randint(256, (videos, 8, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        found = model.embed(clips())
        support, query = ({k: x[part] for k, x in found.items()} for part in (slice(4), slice(4, None)))
        labels = torch.tensor([0, 0, 1, 1])
        support, query = model.adapt(support, labels, query)
        return model.score(support, labels, query, 2)


# --- what is in the file arrives -------------------------------------------------------------------------------------------------------------

@methods
def test_the_tables_cover_the_model_and_have_the_documented_shapes(method, sources):
    model, layout = sources(method), LAYOUTS[method]
    names, theirs = layout.names(model.backbone.body), released(model)
    assert set(names) == set(model.state_dict()) - set(layout.lacking) and len(theirs) == len(names) + len(layout.extra(C))
    assert layout.gone in theirs and all(tuple(theirs[name].shape) == shape for name, shape in layout.shapes(C).items())


@pytest.mark.parametrize("backbone, c", [("thin", C), ("resnet18", 512)])
@methods
def test_every_tensor_arrives_where_it_belongs(method, backbone, c, tmp_path):
    model, layout = source(method, backbone), LAYOUTS[method]
    torch.save({"model_state": released(model)}, tmp_path / "a.pyth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, report = import_checkpoint(tmp_path / "a.pyth", method, backbone=backbone, strict=True)
    (tmp_path / "a.pyth").unlink()
    own, wanted = found.state_dict(), model.state_dict()
    assert all(torch.equal(own[name], wanted[name]) for name in wanted if name not in layout.lacking)
    assert report.mapped == {theirs: ours for ours, theirs in layout.names(model.backbone.body).items()}
    assert report.missing == report.lacking == layout.lacking and report.unexpected == () and report.homeless == ()
    assert set(report.unused) == set(layout.extra(c)) and not [what for what in report.unused.values() if "has no" in what]
    assert not found.training and found.config == model.config and report.classes == layout.classes
    found.load_state_dict({name: wanted[name] for name in layout.lacking}, strict=False)
    assert torch.equal(logits(found), logits(model))


@methods
def test_what_the_file_lacks_is_as_at_the_start(method, sources, tmp_path):
    torch.save(released(sources(method)), tmp_path / "a.pth")
    found, report = import_checkpoint(tmp_path / "a.pth", method, backbone="thin")
    fresh = create_model(**found.config).state_dict()
    assert all(torch.equal(found.state_dict()[name], fresh[name]) for name in report.missing)


WRITERS = {"model_state": lambda s: {"epoch": 3, "model_state": s, "optimizer_state": {"state": {}}}, "model_state_dict": lambda s: {"iteration": 3, "model_state_dict": s},
           "state_dict": lambda s: {"state_dict": s}, "bare": lambda s: s, "nested": lambda s: {"state_dict": {"model_state": s, "step": 4}}}
PREFIXES = {"one process": lambda name: name, "in front": lambda name: f"module.{name}", "within": lambda name: ".".join([name.split(".")[0], "module", *name.split(".")[1:]])}


@pytest.mark.parametrize("wrap", WRITERS)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix, old", [(".pyth", False), (".tar", True)])
def test_wrappers_and_prefixes(wrap, prefix, suffix, old, sources, tmp_path):
    model = sources("molo")
    state = {PREFIXES[prefix](name): t for name, t in released(model).items()}
    content = WRITERS[wrap](state)
    torch.save(content, tmp_path / f"a{suffix}", _use_new_zipfile_serialization=not old)
    report = fill_released(empty := create_model(**model.config), read_weights(tmp_path / f"a{suffix}"), "a")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in empty.state_dict().items())
    beside = {"model_state": {"epoch", "optimizer_state"}, "model_state_dict": {"iteration"}, "nested": {"step"}}.get(wrap, set())
    assert set(report.mapped) == set(state) - {PREFIXES[prefix]("head.pe.pe")} and set(report.unused) == beside | {PREFIXES[prefix]("head.pe.pe")}


@methods
def test_safetensors(method, sources, tmp_path):
    save_file({f"module.{name}": t for name, t in released(sources(method)).items()}, tmp_path / "a.safetensors")
    found, report = import_checkpoint(tmp_path / "a.safetensors", method, backbone="thin", strict=True)
    assert set(report.unused) == {f"module.{name}" for name in LAYOUTS[method].extra(C)} and torch.equal(found.backbone.body.conv1.weight, sources(method).backbone.body.conv1.weight)


def test_molo_at_its_own_size_has_the_89_6_million_parameters():
    "Names and shapes alone, on no device."
    with torch.device("meta"):
        model = create_model("molo", backbone="resnet50", classes=64, options={"variant": "released"})
        theirs = {f"head.backbone.{name}": t for name, t in nn.Sequential(*list(models.resnet50().children())[:-2]).state_dict().items()}
        theirs |= {name: torch.empty(shape) for name, shape in molo_shapes(2048, 64).items()}
    own = model.state_dict()
    mapped, unused = match_entries(theirs, own, METHODS["molo"].released_layout)
    assert set(mapped.values()) == set(own) and len(mapped) == len(theirs) and not unused
    def squeezed(t): return [n for n in t.shape if n > 1]
    assert all(squeezed(theirs[name]) == squeezed(own[ours]) for name, ours in mapped.items())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 89.6
    assert round(sum(t.numel() for name, t in theirs.items() if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))) / 1e6, 1) == 89.6


# --- what does not fit is said ---------------------------------------------------------------------------------------------------------------

@methods
def test_strangers_are_listed(method, sources, tmp_path):
    state = released(sources(method)) | {"head.novelty.weight": torch.ones(2, 3), "transformers.9.pe.pe": torch.ones(1, 4, 5), "seed": 11}
    torch.save({"model_state": state, "best": 0.5}, tmp_path / "a.pth")
    _, report = import_checkpoint(tmp_path / "a.pth", method, backbone="thin", strict=True)
    assert {"head.novelty.weight": "(2, 3) float32", "seed": "int", "best": "float"}.items() <= report.unused.items() and "transformers.9.pe.pe" in report.unused
    assert set(report.mapped) | set(report.unused) == {*state, "best"}
    for words in ("head.novelty.weight: (2, 3) float32", "best: float", f"{len(report.mapped)} entries filled"): assert words in str(report)


@methods
def test_a_missing_entry_is_loud_and_with_strict_an_error(method, sources, tmp_path):
    state = released(sources(method))
    gone = LAYOUTS[method].gone
    ours = next(ours for ours, theirs in LAYOUTS[method].names(sources(method).backbone.body).items() if theirs == gone)
    torch.save({k: t for k, t in state.items() if k != gone}, tmp_path / "a.pth")
    with pytest.warns(IncompleteImport, match=f"a.pth lacks 1 entries of the model, first '{ours}'"): _, report = import_checkpoint(tmp_path / "a.pth", method, backbone="thin")
    assert report.unexpected == (ours,) and "MISSING in the file" in str(report) and ours in str(report)
    with pytest.raises(FsarError, match=f"a.pth lacks 1 entries of the model, first '{ours}'"): import_checkpoint(tmp_path / "a.pth", method, backbone="thin", strict=True)


def test_old_batch_norms_may_lack_their_count(sources, tmp_path):
    torch.save({k: t for k, t in released(sources("molo")).items() if "num_batches" not in k}, tmp_path / "a.pth")
    _, report = import_checkpoint(tmp_path / "a.pth", "molo", backbone="thin", strict=True)
    assert report.missing and report.missing == report.lacking and all(name.endswith("num_batches_tracked") for name in report.missing)


def test_a_file_without_a_classifier_makes_a_model_without_one(sources, tmp_path):
    torch.save({k: t for k, t in released(sources("molo")).items() if "classification" not in k}, tmp_path / "a.pth")
    found, report = import_checkpoint(tmp_path / "a.pth", "molo", backbone="thin", strict=True)
    assert found.classifier is None and report.classes is None and report.missing == ()


def test_a_larger_or_smaller_backbone_is_loud(sources, tmp_path):
    torch.save(released(sources("molo")), tmp_path / "small.pth")
    with pytest.warns(IncompleteImport, match="lacks 40 entries of the model, first 'backbone.body.layer1.1"): import_checkpoint(tmp_path / "small.pth", "molo", backbone="deep")
    torch.save(released(source("molo", "deep")), tmp_path / "large.pth")
    with pytest.warns(IncompleteImport, match="has 48 entries for which the model has no place, first 'head.backbone.4.1"): import_checkpoint(tmp_path / "large.pth", "molo", backbone="thin")
    with pytest.raises(FsarError, match="has no place"): import_checkpoint(tmp_path / "large.pth", "molo", backbone="thin", strict=True)


def test_half_precision_is_read_and_noted(sources, tmp_path):
    torch.save({k: t.half() if t.is_floating_point() else t for k, t in released(sources("molo")).items()}, tmp_path / "a.pth")
    found, report = import_checkpoint(tmp_path / "a.pth", "molo", backbone="thin")
    weight = sources("molo").backbone.body.conv1.weight
    assert torch.equal(found.backbone.body.conv1.weight, weight.half().float()) and not torch.equal(found.backbone.body.conv1.weight, weight)
    assert report.changed["backbone.body.conv1.weight"] == "(8, 3, 7, 7) float16 → (8, 3, 7, 7) float32"


def test_the_released_variant_is_the_default_and_options_win(sources, tmp_path):
    torch.save(released(sources("molo")), tmp_path / "a.pth")
    def make(**kw): return import_checkpoint(tmp_path / "a.pth", "molo", backbone="thin", **kw)[0].config["options"]
    assert make() == METHODS["molo"].variants["released"]
    assert make(options=["sums=false"])["sums"] is False and make(options={"motion_weight": 0.5})["motion_weight"] == 0.5
    with pytest.warns(IncompleteImport): assert make(variant="paper") == {} == make(options=["variant=paper"])


def test_pixels_are_normalised_as_the_authors_did(sources, tmp_path):
    torch.save(released(sources("molo")), tmp_path / "a.pth")
    found, _ = import_checkpoint(tmp_path / "a.pth", "molo", backbone="thin")
    grey = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)                    # 0.2
    save_model(tmp_path / "ours", found)
    for model in (found, load_model(tmp_path / "ours")): assert torch.allclose(model.backbone.normalise(grey), torch.tensor((0.2 - 0.45) / 0.225))


def test_positions_are_counted_as_the_authors_did(sources, tmp_path):
    torch.save(released(sources("molo")), tmp_path / "a.pth")
    former = import_checkpoint(tmp_path / "a.pth", "molo", backbone="thin")[0].motion_former
    wanted = [[(math.cos if c % 2 else math.sin)(t / 10_000 ** (2 * c / C)) for c in range(C)] for t in range(9)]
    assert torch.allclose(former.positions(9, C), torch.tensor(wanted), atol=1e-5) and former.gain == pytest.approx((C / 10) ** 0.5) and former.position_b == 1


# --- what is refused -------------------------------------------------------------------------------------------------------------------------

def refused(path, *, method="molo", backbone="thin", **kwargs) -> str:
    with pytest.raises(FsarError) as caught: import_checkpoint(path, method, backbone=backbone, **kwargs)
    said = str(caught.value)
    assert str(path) in said and "weights_only" not in said and "\n" not in said and caught.value.__cause__ is None and caught.value.__context__ is None
    return said


def test_shapes_that_differ_are_both_named(sources, tmp_path):
    state = released(sources("molo"))
    torch.save(state | {"head.motion_up.weight": torch.ones(64, 4, 1, 1)}, tmp_path / "a.pth")
    assert "'head.motion_up.weight' has shape (64, 4, 1, 1), its place 'motion_up.0.weight' (64, 8, 1, 1)" in refused(tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.pth")
    said = refused(tmp_path / "b.pth", backbone="resnet18")
    assert "has shape (8, 3, 7, 7), its place 'backbone.body.conv1.weight' (64, 3, 7, 7)" in said and "more differ" in said


def test_two_names_for_one_place(sources, tmp_path):
    torch.save(released(sources("molo")) | {"module.head.scale": torch.ones(1)}, tmp_path / "a.pth")
    assert "'head.scale' and 'module.head.scale' both mean 'contrast_scale.base'" in refused(tmp_path / "a.pth")


@methods
def test_a_file_without_a_backbone(method, tmp_path):
    torch.save(models.resnet18().state_dict(), tmp_path / "a.pth")
    assert f"is not a checkpoint of '{method}' as its authors' code writes it: none of its 122 entries belongs to the backbone 'thin'" in refused(tmp_path / "a.pth", method=method)
    torch.save({}, tmp_path / "b.pth")
    assert "none of its 0 entries" in refused(tmp_path / "b.pth", method=method)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), "text", 5, {1, 2}], ids=lambda c: type(c).__name__)
def test_no_mapping(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    assert f"holds a {type(content).__name__}; accepted: a mapping of names to tensors" in refused(tmp_path / "a.pth")


def test_methods_without_a_layout_are_told(tmp_path):
    with pytest.raises(FsarError, match="no layout of released checkpoints for the method 'protonet'. Methods with one: .*molo"): import_checkpoint(tmp_path / "a", "protonet")
    with pytest.raises(FsarError, match="unknown method 'mollo'. Did you mean 'molo'?"): import_checkpoint(tmp_path / "a", "mollo")
    with pytest.raises(FsarError, match="frames must be at least 1, got 0"): import_checkpoint(tmp_path / "a", "molo", frames=0)


@pytest.fixture(scope="module")
def little():
    return {"head.scale": torch.ones(1000), "head.backbone.0.weight": torch.ones(64, 3, 7, 7)}


@pytest.mark.parametrize("suffix, old", [(".pyth", False), (".tar", True), (".safetensors", False)])
@pytest.mark.parametrize("keep", [0, 0.01, 0.5, 0.99])
def test_truncated_files(suffix, old, keep, little, tmp_path):
    path = tmp_path / f"a{suffix}"
    save_file(little, path) if suffix == ".safetensors" else torch.save(little, path, _use_new_zipfile_serialization=not old)
    os.truncate(path, int(path.stat().st_size * keep))
    assert "cannot read weights from" in refused(path) and "accepted: a .safetensors file" in refused(path)


def test_other_files(tmp_path):
    (tmp_path / "a.pth").write_text("<!DOCTYPE html><title>Sign in</title>")
    (tmp_path / "b.pth").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "c.safetensors").write_bytes(pickle.dumps({"a": 1}))
    for name in ("a.pth", "b.pth", "c.safetensors"): assert "cannot read weights from" in refused(tmp_path / name)
    assert "no weights file" in refused(tmp_path / "absent.pth") and "no weights file" in refused(tmp_path)


class Trap:
    "A pickle that, when it is opened as Python would, makes a folder."
    def __init__(self, marker): self.marker = str(marker)
    def __reduce__(self): return os.mkdir, (self.marker,)


def trap_zip(path, marker): torch.save({"model_state": {"head.scale": torch.ones(1)}, "cfg": Trap(marker)}, path)
def trap_old(path, marker): torch.save({"head.scale": Trap(marker)}, path, _use_new_zipfile_serialization=False)
def trap_bare(path, marker): path.write_bytes(pickle.dumps(Trap(marker)))
def trap_protocol_2(path, marker): path.write_bytes(pickle.dumps(Trap(marker), protocol=2))
def trap_module(path, marker): torch.save(nn.Linear(2, 2), path)


@pytest.mark.parametrize("write", [trap_zip, trap_old, trap_bare, trap_protocol_2, trap_module])
@pytest.mark.parametrize("suffix", [".pyth", ".tar", ".safetensors"])
def test_nothing_in_a_file_is_run(write, suffix, tmp_path):
    path, marker = tmp_path / f"a{suffix}", tmp_path / "trapped"
    write(path, marker)
    said = refused(path)
    assert not marker.exists() and "cannot read weights from" in said and "unsafe" not in said
    if suffix != ".safetensors" and write in (trap_zip, trap_old): assert "reading it would call posix.mkdir, and no program in a file is ever run" in said
    if write in (trap_bare, trap_protocol_2):                                 # and the trap is one
        pickle.loads(path.read_bytes())
        assert marker.exists()


# --- the command line ------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def file(sources, tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "molo.pyth"
    torch.save({"epoch": 3, "model_state": {f"module.{name}": t for name, t in released(sources("molo")).items()}}, path)
    return path


def words(file, out, *more): return ["import", str(file), "--method", "molo", "--backbone", "thin", "--out", str(out), *more]


def test_the_program_imports_and_tests(file, sources, tiny_motions, tmp_path, capsys):
    assert cli.main(words(file, tmp_path / "ours", "--strict")) == 0
    said = capsys.readouterr()
    assert "entries filled, 0 missing, 2 unused; 7 base classes" in said.out and "epoch: int" in said.out and f"checkpoint: {tmp_path / 'ours'}" in said.out and said.err == ""
    assert torch.equal(logits(load_model(tmp_path / "ours", "molo")), logits(sources("molo")))
    record = json.loads((tmp_path / "ours" / "model.json").read_text())["metadata"]["imported"]
    assert record["file"] == str(file) and set(record["unused"]) == {"epoch", "module.head.pe.pe"} and len(record["sha256"]) == 64
    test = ["test", str(tmp_path / "ours"), "--dataset", str(tiny_motions), "--short-side", "48", "--size", "32", "--ways", "3", "--test-shots", "1", "--test-queries", "2",
            "--test-episodes", "5", "--json"]
    classes = sorted(p.name for p in tiny_motions.iterdir() if p.is_dir())[:4]
    assert cli.main([*test, "--test-classes", *classes]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["config"]["size"] == 32 and told["results"]


def test_the_program_tells_programs(file, tmp_path, capsys):
    assert cli.main(words(file, tmp_path / "ours", "--options", "motion=false", "motion_weight=0.5", "--json")) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["checkpoint"] == str(tmp_path / "ours") and told["unused"]["epoch"] == "int" and told["mapped"]["module.head.backbone.0.weight"] == "backbone.body.conv1.weight"
    assert said.err.startswith("fsar: warning: ") and "entries for which the model has no place" in said.err and said.err.count("\n") == 1
    assert load_model(tmp_path / "ours").config["options"]["motion_weight"] == 0.5


def test_the_program_replaces_only_checkpoints_and_only_when_told(file, tmp_path, capsys):
    out = tmp_path / "ours"
    for more, code, message in (((), 0, ""), ((), 2, f"{out} exists: name another folder with --out, or replace the checkpoint in it with --overwrite"), (("--overwrite",), 0, "")):
        assert cli.main(words(file, out, *more)) == code
        assert message in capsys.readouterr().err
    other = tmp_path / "videos"
    other.mkdir()
    (other / "precious.mp4").write_text("…")
    for more, message in (((), "exists"), (("--overwrite",), "holds something other than a checkpoint and is not replaced")):
        assert cli.main(words(file, other, *more)) == 2
        assert message in capsys.readouterr().err and (other / "precious.mp4").exists()
    (tmp_path / "empty").mkdir()
    assert cli.main(words(file, tmp_path / "empty", "--overwrite")) == 0


@pytest.mark.parametrize("change, message", [
    (["--method", "mollo"], "unknown method 'mollo'. Did you mean 'molo'?"), (["--method", "otam"], "no layout of released checkpoints for the method 'otam'"),
    (["--backbone", "resnet19"], "unknown backbone 'resnet19'"), (["--options", "matchr=otam"], "Did you mean 'matcher'"), (["--frames", "0"], "frames must be at least 1"),
    (["--backbone", "deep", "--strict"], "lacks 40 entries of the model"), (["--backbone", "resnet18"], "has shape"),
])
def test_errors_are_one_line(change, message, file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words(file, "ours", *change)) == 2
    said = capsys.readouterr().err
    assert said.startswith("fsar: error: ") and message in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help(capsys):
    with pytest.raises(SystemExit) as end: cli.main(["import", "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and not [w for w in ("FILE", "--method", "--out", "--strict", "--overwrite", "default: resnet50") if w not in said]
