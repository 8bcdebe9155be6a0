"""The formats: what the store promises is measured, every format gives back what it was given, and what cannot be measured says so."""
import importlib.util

import numpy as np
import pandas as pd
import pytest

import fsar.bench.formats
from fsar.core.basics import FsarError
from fsar.bench.formats import (FORMATS, MEGABYTES, SPEED, YARDSTICK, draw_request, find_videos, first_clips, formats_figure, measure_formats, quality,
                          write_formats, write_stand_ins)

pytest.importorskip("decord", reason="the formats are measured against decord")
STORE = "fsar.data.store · its own reader"
SCALE = dict(short_side=64, size=56, frames=4)  # decord fails on widths that are no multiple of 32 where it need not scale


@pytest.fixture(scope="module")
def written(tiny_motions, tmp_path_factory):
    "Two small videos in every format that can be measured here."
    forms = [f for f in FORMATS.values() if not f.missing]
    return write_formats(find_videos(tiny_motions)[:2], tmp_path_factory.mktemp("formats"), forms, **SCALE)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_gives_back_what_it_was_given(written, name):
    form = FORMATS[name]
    if form.missing: pytest.skip(f"not installed: {form.missing}")
    clips = first_clips(written, form, 56, 4)
    assert clips.keys() == {film.name for film in written.films}
    assert all(clip.shape == (4, 3, 56, 56) and clip.dtype == np.uint8 for clip in clips.values())
    grade = quality(written, form, clips, None)["PSNR dB"]
    assert grade > 28  # an unlike frame or a square one pixel aside is below 26
    assert written.megabytes[form.stored] > 0
    if name.startswith("raw"): assert grade == float("inf")


def test_quality_costs_bytes(written):
    sizes = [written.megabytes[f"JPEG {q} 4:4:4"] for q in (75, 85, 90, 95)]
    assert sizes == sorted(sizes)
    assert written.megabytes["JPEG 90 4:2:0"] < written.megabytes["JPEG 90 4:4:4"] < written.megabytes["raw memory map"]


def test_a_square_is_inside_the_picture_and_not_in_its_last_column():
    for k in range(200):
        request = draw_request(9, 256, 341, 224, 8, np.random.default_rng(k))
        assert 0 <= request.top <= 32 and 0 <= request.left < 117 and max(request.indices) < 9


def test_the_store_keeps_its_promises(tmp_path):
    "At 224 pixels, in one run with decord on the original files; two processes at once see the same."
    table = measure_formats(write_stand_ins(tmp_path, count=2), rounds=5, formats=[STORE])
    print(table.loc[[YARDSTICK, STORE], ["MB", "clips/s", "× decord", "least ×"]].round(2).to_string())
    row = table.loc[STORE]
    assert row["× decord"] >= SPEED
    assert row["MB"] <= MEGABYTES
    assert row["equal"] and row["random"]


def test_the_promises_hold_on_real_clips(real_clips):
    table = measure_formats(real_clips, rounds=3, formats=[STORE])
    print(table.loc[[YARDSTICK, STORE], ["MB", "clips/s", "× decord", "least ×"]].round(2).to_string())
    row = table.loc[STORE]
    assert row["× decord"] >= SPEED and row["MB"] <= MEGABYTES and row["equal"]


def test_a_format_without_its_package_has_a_row_that_says_so(tiny_motions, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("pyarrow", "simplejpeg") else find(name, *rest))
    arrow = "JPEG 90 4:4:4 in Arrow · simplejpeg"
    table = measure_formats(find_videos(tiny_motions)[:1], rounds=1, formats=["raw memory map · NumPy", arrow], **SCALE)
    assert table.loc[arrow, "needs"] == "simplejpeg pyarrow" and pd.isna(table.loc[arrow, "MB"])
    assert table.loc["raw memory map · NumPy", "equal"]
    assert len(formats_figure(table).axes[0].texts) == 3  # two formats and the line of the promise


def test_messages(tmp_path, tiny_motions, monkeypatch):
    with pytest.raises(FsarError, match="holds no video"): find_videos(tmp_path)
    with pytest.raises(FsarError, match="size=48 must be smaller than short_side=48"): measure_formats(tiny_motions, short_side=48, size=48)
    with pytest.raises(FsarError, match="unknown format 'JPEG'"): measure_formats(tiny_motions, formats=["JPEG"])
    monkeypatch.setattr(fsar.bench.formats.importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(FsarError, match="pip install decord"): measure_formats(tiny_motions)
