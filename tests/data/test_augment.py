"""Clip transforms: one change per clip, a function of the generator alone."""
import time

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from fsar.data.augment import TestTransform, TrainTransform, crop_box
from fsar.core.basics import FsarError, generator


def clip(frames=8, height=64, width=80, key=0):
    return torch.from_numpy(generator(key).integers(0, 256, (frames, 3, height, width), dtype=np.uint8))


TRANSFORMS = {"crop": TrainTransform(48), "flip": TrainTransform(48, flip=True), "colours": TrainTransform(48, flip=True, jitter=0.4)}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("height, width", [(64, 80), (80, 64), (20, 30), (48, 48), (1, 1), (200, 12)])
def test_any_size_gives_the_size_asked_for(name, height, width):
    for frames in (1, 8):
        out = TRANSFORMS[name](clip(frames, height, width), generator(1))
        assert out.shape == (frames, 3, 48, 48) and out.dtype == torch.uint8 and out.is_contiguous()
    assert TestTransform(48)(clip(2, height, width)).shape == (2, 3, 48, 48)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_all_frames_change_alike(name):
    still = clip(1).expand(8, -1, -1, -1)
    for key in range(20):
        out = TRANSFORMS[name](still, generator(key))
        assert (out == out[:1]).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_generator_decides_and_nothing_else(name):
    x, transform = clip(), TRANSFORMS[name]
    kept, state, before = x.clone(), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    torch.manual_seed(1); a = transform(x, generator(5))
    torch.manual_seed(2); b = transform(x, generator(5))
    assert torch.equal(a, b) and torch.equal(x, kept)
    assert not torch.equal(a, transform(x, generator(6)))
    assert np.array_equal(before, np.random.get_state()[1])
    torch.random.set_rng_state(state)
    transform(x, generator(5))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_always_eight_draws(name):
    g, reference = generator(3), generator(3)
    TRANSFORMS[name](clip(), g)
    reference.random(8)
    assert g.random() == reference.random()


def test_flip_is_the_mirrored_crop_and_comes_half_the_time():
    flips = 0
    for key in range(200):
        plain, flipped = (TrainTransform(32, flip=flip)(clip(1), generator(key)) for flip in (False, True))
        assert torch.equal(flipped, plain) or torch.equal(flipped, F.horizontal_flip(plain))
        flips += not torch.equal(flipped, plain)
    assert 70 < flips < 130


@pytest.mark.parametrize("height, width", [(64, 80), (7, 300), (1, 1)])
def test_boxes_lie_inside(height, width):
    top, left, h, w = np.array([crop_box(generator(k).random(4), height, width, (0.3, 1.0), 2.0) for k in range(500)]).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_whole_picture_at_its_size_is_left_alone():
    x = clip(4, 48, 48)
    assert torch.equal(TrainTransform(48, scale=(1, 1), ratio=1)(x, generator(0)), x)
    assert torch.equal(TestTransform(48)(x), x)


def test_centre():
    x = clip(4, 48, 80)
    assert torch.equal(TestTransform(48)(x), x[..., 16:64])


@pytest.mark.parametrize("wrong", [clip().float(), clip()[0], clip()[:, :1], clip()[:0], clip().numpy(), None])
def test_wrong_clips(wrong):
    for transform in (TestTransform(8), lambda c: TrainTransform(8)(c, generator(0))):
        with pytest.raises(FsarError, match="a clip is a torch.uint8 tensor"): transform(wrong)


@pytest.mark.parametrize("wrong", [dict(size=0), dict(size=8, scale=(0, 1)), dict(size=8, scale=(1, 0.5)), dict(size=8, scale=(0.5, 1.5)),
                                   dict(size=8, ratio=0.5), dict(size=8, jitter=1.0), dict(size=8, jitter=-0.1)])
def test_wrong_settings(wrong):
    with pytest.raises(FsarError): TrainTransform(**wrong)


def test_cost():
    "30 clips of 8×80×80, a training step, should take under 60 ms of one core; the bound here forgives a slow machine."
    x, transform, threads = clip(8, 80, 80), TrainTransform(80, flip=True, jitter=0.4), torch.get_num_threads()
    torch.set_num_threads(1)
    def seconds():
        start = time.process_time()
        for k in range(30): transform(x, generator(k))
        return time.process_time() - start
    try: assert min(seconds() for _ in range(5)) < 0.3
    finally: torch.set_num_threads(threads)
