"""Panels: every control changes the picture, and the picture is a pure function of the controls."""
import sys

import pytest

from fsar.core.config import Config
from fsar.core.basics import FsarError
from fsar.data.datasets import prepare_data
from fsar.experiments.protocol import clips_of, table_of
from fsar.predict.panels import Panel, alignment_picture, embed_episode, explore_alignment, explore_sampler, sampler_picture
from fsar.model.registry import create_model

pytest.importorskip("ipywidgets", reason='panels need ipywidgets: pip install "fsar[interactive]"')


@pytest.fixture(scope="module")
def asked(tiny_store):
    def make(method: str, sampler: str = ""):
        config = Config(dataset=str(tiny_store.path), short_side=48, size=32, frames=6, test_queries=2, method=method, sampler=sampler)
        model = create_model(method, backbone="resnet_micro", frames=6, sampler=sampler).eval()
        data = prepare_data(config, progress=False)
        table = table_of(config, data, "test", 1, 3)
        return model, clips_of(config, data, table.rows, model), table
    return make


def moved(panel: Panel, name: str, value) -> bool:
    "Whether a control changes the picture, and puts it back."
    before, first = panel.image.value, panel[name].value
    panel[name].value = value
    changed = panel.image.value != before
    panel[name].value = first
    assert panel.image.value == before
    return changed


def test_every_control_of_the_alignment_changes_the_picture(asked):
    panel = explore_alignment(*asked("otam"))
    assert set(panel.controls) == {"episode", "query", "way", "lam"}
    assert all(moved(panel, name, value) for name, value in dict(episode=1, query=3, way=2, lam=1.0).items())


def test_every_control_of_the_sampler_changes_the_picture(asked):
    panel = explore_sampler(*asked("protonet", "vim"))
    assert panel["frame"].max == 11 and panel["video"].max == 14  # twice the frames chosen; five supports and ten queries
    assert all(moved(panel, name, value) for name, value in dict(episode=1, video=6, frame=5).items())


def test_the_dots_of_the_alignment_spread_with_lambda(asked):
    from functools import partial
    from fsar.model.matching import alignment, frame_similarity, otam
    model, clips, table = asked("otam")
    episode = embed_episode(model, clips, table, 0)
    sim = frame_similarity(model.frame_tokens(episode.query)[:1], model.frame_tokens(episode.support)[:1])[0, 0]
    def cells(lam: float) -> float:
        part = alignment(partial(otam, lam=lam), sim).clamp(min=0).flatten()
        part = part / part.sum()
        return float(1 / part.square().sum())  # among how many cells the weight is shared
    assert cells(0.001) < cells(0.1) <= cells(3.0) + 1e-3
    assert alignment_picture(episode, model, 0, 0, 0.1).axes


def test_a_panel_is_a_picture_on_a_page_and_widgets_in_a_live_notebook(asked, monkeypatch):
    panel = explore_alignment(*asked("otam"))
    assert set(panel._repr_mimebundle_()) == {"text/plain", "image/png"}
    monkeypatch.delenv("FSAR_QUIET")
    assert "application/vnd.jupyter.widget-view+json" in panel._repr_mimebundle_()


def test_what_is_missing_is_named(asked, monkeypatch):
    model, clips, table = asked("otam")
    with pytest.raises(FsarError, match="no sampler in front of it.*vim"): sampler_picture(embed_episode(model, clips, table, 0), 0, 0)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(FsarError, match=r'pip install "fsar\[interactive\]"'): explore_alignment(model, clips, table)
