"""A network instead of a backbone's name, and embeddings as dictionaries."""
import copy
import pickle

import pytest
import torch
from torch import nn

from fsar.core.basics import FsarError
from fsar.model.embedding import Embedding
from fsar.model.registry import create_model


class Tower(nn.Module):
    "Frames to maps, as a library of networks would have it."
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.BatchNorm2d(16))

    def forward(self, frames): return self.layer(frames)


@pytest.mark.parametrize("method", ["protonet", "molo"])
def test_a_network_is_a_backbone(method):
    tower = Tower()
    state = copy.deepcopy(tower.state_dict())
    model = create_model(method, backbone=tower, frames=4, classes=3)
    assert model.backbone.body is tower and model.backbone.channels == 16 and tower.training
    assert all(torch.equal(state[name], x) for name, x in tower.state_dict().items())   # the trial changed nothing
    assert Embedding(model.embed(torch.rand(2, 4, 3, 32, 32))).videos == 2


def test_a_configuration_cannot_make_a_network_again():
    config = create_model("protonet", backbone=Tower()).config
    with pytest.raises(FsarError, match="a network of its own .Tower., which a configuration cannot hold"): create_model(**config)


@pytest.mark.parametrize("module, words", [(nn.Flatten(), "must give feature maps .F, C, h, w.* got shape .1, 12288."),
                                           (nn.Linear(5, 2), "it fails on frames of shape")])
def test_what_gives_no_maps_is_refused(module, words):
    with pytest.raises(FsarError, match=words): create_model("protonet", backbone=module)


def test_an_embedding_is_a_dict():
    e = Embedding(frames=torch.rand(3, 2), pixels=torch.zeros(3, 4, dtype=torch.uint8))
    assert isinstance(e, dict) and type(pickle.loads(pickle.dumps(e))) is Embedding and type(e | {"x": e["frames"]}) is Embedding
    support, query = e.split(1)
    assert support.videos == 1 and all(torch.equal((support + query)[name], e[name]) for name in e)
    episodes = e.rows(torch.tensor([[0, 1], [2, 2]]))
    assert episodes["pixels"].shape == (2, 2, 4) and torch.equal(episodes["frames"][1, 0], e["frames"][2])
    collated = torch.utils.data.default_collate([e, e])
    assert collated["frames"].shape == (2, 3, 2)
