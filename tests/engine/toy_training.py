"A training that takes a second: random grey clips, a model of a few hundred weights, and a validation of three episodes."
import os
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from fsar.backbones.base import Backbone
from fsar.core.basics import generator, torch_seed
from fsar.core.config import Config
from fsar.core.files import sha256_file
from fsar.data.episodes import EpisodeBatch
from fsar.engine.checkpoints import CheckpointWarning
from fsar.engine.training import train
from fsar.model.base import METHODS

METHOD_NAMES = sorted(name for name, method in METHODS.items() if method.__module__.startswith("fsar."))
CLASSES = 6


class Episodes:
    "Item i is a function of i: classes are grey levels that rise or fall over time, with noise."

    def __init__(self, frames=2, size=8, ways=3, queries=2): self.frames, self.size, self.ways, self.queries = frames, size, ways, queries

    def __getitem__(self, index):
        rng = generator(5, index)
        classes = rng.permutation(CLASSES)[:self.ways]
        labels = torch.arange(self.ways)
        query_labels = labels.repeat_interleave(self.queries)
        def clip(c):
            level = 40 * c + 15 * c * torch.arange(self.frames).reshape(-1, 1, 1, 1).numpy() / self.frames
            noise = rng.normal(0, 120, (self.frames, 3, self.size, self.size))
            return torch.from_numpy((level + noise).clip(0, 255).astype("uint8"))
        support, query = (torch.stack([clip(classes[y]) for y in ways]) for ways in (labels, query_labels))
        return EpisodeBatch(support, labels, query, query_labels, torch.from_numpy(classes), index)


def tiny(seed=0):
    "A model of a few hundred weights, with batch normalisation and dropout: enough to be wrong about."
    with torch_seed(seed):
        body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Conv2d(8, 8, 3, 1, 1))
        model = METHODS["protonet"](Backbone(body, 8), frames=2, classes=CLASSES)
    model.config = {"method": "protonet", "backbone": "tiny of the tests"}
    return model


def settings(**changes):
    return Config(**{**dict(method="protonet", frames=2, size=8, short_side=8, ways=3, queries=2, episodes=24, tasks_per_step=2, lr=5e-3, validate_every=8,
                            precision="fp32", device="cpu"), **changes})


def accuracy(model):
    "Validation on three fixed episodes; all that training asks of a result is these two numbers."
    model.eval()
    with torch.no_grad(): right = torch.cat([(model(e).logits.argmax(-1) == e.query_labels).float() for e in map(Episodes().__getitem__, (1001, 1002, 1003))])
    model.train()
    return SimpleNamespace(accuracy=right.mean().item(), ci95=right.std().item())


def run(out, config=None, model=None, episodes=None, validate=accuracy, **kwargs):
    return train(config or settings(), model or tiny(), episodes or Episodes(), validate, out, progress=False, **kwargs)


def weights(out, name="last"): return sha256_file(Path(out) / name / "model.safetensors")


def ctrl_c(*steps):
    def on_step(step, row):
        if step in steps: signal.raise_signal(signal.SIGINT)
    return on_step


class Poisoned(Episodes):
    "Episode 9 holds pixels that are not numbers."
    def __getitem__(self, index):
        episode = super().__getitem__(index)
        if index == 9: episode.query, episode.support = episode.query / torch.tensor(0.0), episode.support / 255
        return episode


# trainings that get killed: here, because a child that starts must import what it runs

LONG = settings(episodes=240, tasks_per_step=2, validate_every=16)


def child(out, ready=None):
    "The training that gets killed, in a process of its own."
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")
    warnings.simplefilter("ignore", CheckpointWarning)
    if ready: ready.set()
    run(out, LONG, save_seconds=0)


def killed_at(out, count):
    "The same, ended by SIGKILL right before file operation number `count` inside the output folder."
    left = iter(range(count))

    def watch(event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") and (str(out) in str(args[0]) or event in ("os.rmdir", "os.remove")):
            if next(left, None) is None: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    child(out)
