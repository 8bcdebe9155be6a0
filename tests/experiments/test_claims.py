"""Claims: the dial turns time and nothing else, the amplifier's measure is what it says, and the report is made from a finished comparison."""
import dataclasses
import shlex

import numpy as np
import pytest
import torch

from fsar.experiments import claims
from fsar.cli import main as cli
from fsar.core.config import Config
from fsar.core.basics import FsarError
from fsar.core.files import read_json
from fsar.methods.sampler import amplify
from fsar.model.registry import create_model
from fsar.data.motions import PRESETS, render, split_classes


@pytest.fixture(scope="module")
def variants():
    return {level: claims.rendered_variant(misalignment=level, videos_per_class=3) for level in (0.0, 1.0)}


def test_the_dial_renders_the_novel_classes_with_that_setting(variants):
    for level, data in variants.items():
        assert set(data.store.classes("test")) == set(split_classes("test")) and len(data.store.index) == 30
        config = dataclasses.replace(PRESETS["motions-mini"], misalignment=level)
        row = int(np.flatnonzero(data.store.index["class"] == "merge")[1])
        frames = data.store.frames(row, np.arange(24)).float()
        ours = torch.from_numpy(render("merge", 1, config)).permute(0, 3, 1, 2).float()
        small = torch.nn.functional.interpolate(ours, frames.shape[-2:], mode="area")
        assert (frames - small).abs().mean() < 8                       # the same film, encoded and scaled


def test_turning_the_dial_moves_the_action_in_time_only():
    "The first frame of an action that has not begun is that of one that is about to: place and looks are drawn alike."
    a, b = (render("split", 2, dataclasses.replace(PRESETS["motions-mini"], misalignment=m, tempo=0.0)) for m in (0.0, 1.0))
    assert np.array_equal(a[0], b[0]) and not np.array_equal(a[12], b[12])


def test_change_is_the_mean_difference_to_both_neighbours():
    clips = torch.zeros(1, 3, 3, 2, 2, dtype=torch.uint8)
    clips[0, 1] = 51
    assert torch.allclose(claims.frame_change(clips)[0, :, 0, 0, 0], torch.tensor([0.2, 0.2, 0.2]))
    clips[0, 2] = 51                                                   # the last frame is its neighbour's equal
    assert torch.allclose(claims.frame_change(clips)[0, :, 0, 0, 0], torch.tensor([0.2, 0.1, 0.0]))


def test_enlargement_is_above_one_exactly_where_the_saliency_follows_the_mover(variants, monkeypatch):
    model = create_model("protonet", backbone="resnet_micro", sampler="vim", seed=3).eval()
    store = variants[0.0].store
    clips = torch.stack([store.frames(r, np.arange(16)) for r in range(0, 8)])
    energy = claims.frame_change(clips)                                      # (V, M, 1, H, W)
    measured = {}
    for name, saliency in (("mover", energy[:, :, 0]), ("elsewhere", -energy[:, :, 0])):
        coarse = torch.nn.functional.adaptive_avg_pool2d(saliency, 8)
        monkeypatch.setattr(type(model.sampler), "forward", lambda self, videos, summary, labels, coarse=coarse: (amplify(videos["pixels"][:, ::2].float(), coarse[:, ::2], 0.2), _every_second(len(coarse))))
        measured[name] = claims.enlargement(model, clips[:5], torch.arange(5), clips[5:])
    assert (measured["mover"] > 1.3).all() and (measured["elsewhere"] < 1).all() and measured["mover"].shape == (3,)


def _every_second(videos): return torch.nn.functional.one_hot(torch.arange(0, 16, 2), 16).expand(videos, -1, -1)


def test_by_branch_leaves_the_model_as_it_was_and_asks_the_same_episodes(variants):
    model, data = create_model("molo", backbone="resnet_micro").eval(), variants[0.0]
    pairs = [p for p in data.partners if set(p) <= set(data.store.classes("test"))]
    config = Config(test_queries=1)
    found = claims.by_branch(model, config, data, pairs, episodes=20)
    assert list(found) == ["base", "motion", "both"] and model.branches == ["base", "motion"] and len({r.table_hash for r in found.values()}) == 1
    motion = claims.with_branches(model, ["motion"])
    assert model.branches == ["base", "motion"] and np.array_equal(claims.evaluate_on(motion, config, data, episodes=20, pairs=pairs).correct, found["motion"].correct)


def test_a_gain_counts_seeds_and_says_so(variants):
    config = Config(test_queries=1)
    a, b = ({s: claims.evaluate_on(create_model(m, backbone="resnet_micro", seed=s).eval(), config, variants[1.0], episodes=30) for s in (0, 1)} for m in ("otam", "protonet"))
    found = claims.gain(a, b, ("otam", "protonet"))
    assert found["difference"] == pytest.approx(np.mean([a[s].accuracy - b[s].accuracy for s in (0, 1)])) and found["seeds"] == 2
    assert ("inside the noise" in found["words"]) == (abs(found["difference"]) < found["noise"] or found["difference"] == 0)
    same = claims.gain(a, a, ("otam", "otam"))
    assert same["difference"] == 0 and "inside the noise" in same["words"]


def test_refusals(tmp_path, capsys):
    assert cli.main(["claims", "--methods", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "metrics.json").write_text('{"rows": {"protonet": {}}, "seeds": [0], "config": {}}')
    with pytest.raises(FsarError, match="has no row 'trx'; the claims need the rows"): claims.load_models(tmp_path)
    (tmp_path / "metrics.json").write_text('{"results": []}')
    with pytest.raises(FsarError, match="holds no comparison: make one with fsar compare"): claims.load_models(tmp_path)
    with pytest.raises(FsarError, match="two or more settings of the dial from 0 to 1"): claims.claims_report(tmp_path, tmp_path / "out", levels=[2.0, 0.0])
    with pytest.raises(FsarError, match="episodes=1: at least 2"): claims.claims_report(tmp_path, tmp_path / "out", episodes=1)
    with pytest.raises(FsarError, match="no rendered benchmark 'motion'"): claims.rendered_variant("motion")


def test_the_whole_report_from_a_small_comparison(tmp_path, says_its_origin):
    "Untrained enough to be quick; every figure, table and sentence of the template is made."
    from fsar.experiments.comparison import compare_methods
    rows = ["protonet", "trx", "trx-single: trx cardinalities=1", "strm", "molo redraw=4", "ta2n", "ta2n-ordered: ta2n rearrange=false", "ta2n-plain: ta2n transform=false rearrange=false coordinate=false",
            "sampler-protonet: protonet sampler=vim", "vim"]
    base = Config(episodes=1, queries=1, size=32, short_side=36, frames=4, validate_every=0, protocol="last", precision="fp32", test_episodes=2, test_queries=1, test_shots=(1,), out=str(tmp_path / "methods"))
    compare_methods(base, rows, seeds=[0], progress=False)
    metrics = claims.claims_report(tmp_path / "methods", tmp_path / "claims", levels=[0.0, 1.0], episodes=2, progress=False)
    says_its_origin(metrics, tmp_path / "claims", "videos and split", "prepared frames", "weights molo-0", "weights vim-0")
    command, made = cli.parse(shlex.split(metrics["command"])[1:]), read_json(tmp_path / "methods" / "metrics.json")
    assert (command.methods, command.levels, command.episodes) == (str(tmp_path / "methods"), (0.0, 1.0), 2) and metrics["seeds"] == [0]
    assert metrics["hashes"]["weights molo-0"] == made["trainings"]["molo-0"]["weights"]  # protocol last: the same file
    assert set(metrics["gains"]) == {"TA2N's alignment", "TA2N without its rearrangement", "the sampler before ProtoNet", "sampler and alignment (VIM)"} and set(metrics["dial"]) == {"ta2n", "ta2n-ordered", "ta2n-plain", "sampler-protonet", "protonet", "vim"}
    assert {p.name for p in (tmp_path / "claims" / "figures").iterdir()} == {"misalignment.png", "sampler.png", "order.png"}
    page = (tmp_path / "claims" / "report.html").read_text()
    assert "What this does not show" in page and "fsar study claims --methods" in page and read_json(tmp_path / "claims" / "run.json")["status"] == "finished"
