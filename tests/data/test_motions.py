"motions: exact reversal, blindness of means, the same bytes everywhere, files that are whole and resumable."
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from fsar.core.basics import FsarError
from fsar.core.files import read_json, sha256_arrays, sha256_file
from fsar.data.motions import BACKGROUNDS, CLASSES, PRESETS, MotionsConfig, clip, contact_sheet, film, pairs, render, render_dataset, schedule, split_classes, value_noise, videos
from fsar.data.drawing import Draws, cos_sin
from fsar.data.pictures import film_strip, picture_rows, side_by_side, strip
from fsar.data.video import decode_all, segment_indices

MINI = PRESETS["motions-mini"]
TINY = replace(MINI, name="tiny", size=32, frames=8, videos_per_class=2, classes=("rise", "fall", "orbit_clockwise"))
GOLDEN = "6b66a480f21474f5b6a79ad4baae36dd22ef40edf4bafff07cbd0317c775386e"  # of the frames in `_sample`, on every machine


def _sample() -> str:
    return sha256_arrays(*(render(name, 3, config) for config in (replace(MINI, size=48), replace(PRESETS["motions"], frames=10)) for name in sorted(CLASSES)))


# ---- the classes

def test_the_classes_are_as_many_as_promised_and_disjoint():
    counts = {split: len(split_classes(split)) for split in ("train", "val", "test")}
    assert counts["train"] >= 24 and counts["val"] >= 6 and counts["test"] >= 10 and sum(counts.values()) == len(CLASSES)
    assert PRESETS["motions"].videos_per_class >= 40 and set(PRESETS["motions"].classes) == set(CLASSES)


def test_partners_know_one_another_and_share_a_split():
    for a, b in pairs():
        assert CLASSES[a].partner == b and CLASSES[b].partner == a and CLASSES[a].split == CLASSES[b].split
        assert CLASSES[b].backwards and not CLASSES[a].backwards
    assert sum(a in split_classes("test") for a, _ in pairs()) >= 3


@pytest.mark.parametrize("name", CLASSES)
def test_the_action_is_visible(name):
    config = replace(MINI, shake=0, distractors=0, background="plain")
    change = [np.ptp(render(name, k, config).astype(int), axis=0).max(-1) for k in range(4)]
    assert np.mean([(c > 40).mean() for c in change]) > 0.03  # of all pixels


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_moves_but_the_action(name):
    still = replace(MINI, shake=0, distractors=0, background="texture", misalignment=1, frames=60)
    late = next(k for k in range(99) if (u := schedule(60, still, _stream(name, k, "schedule")))[12] == 0 and u[-1] == 1)
    clip = render(name, late, still)[::-1 if CLASSES[name].backwards else 1]
    assert (clip[:12] == clip[0]).all()


def _stream(name, index, purpose):
    from zlib import crc32
    return Draws(0, crc32(name.encode()), index, crc32(purpose.encode()))


# ---- time

@pytest.mark.parametrize("pair", pairs(), ids="-".join)
def test_a_partner_is_the_reversed_film(pair):
    a, b = (film(CLASSES[name], (1, 2, 3), MINI) for name in pair)
    assert (a == b[::-1]).all() and (a != b).any()
    assert (render(pair[0], 0) != render(pair[1], 0)[::-1]).any()  # in the data set they are no copies


@pytest.mark.parametrize("pair", pairs(), ids="-".join)
def test_means_over_frames_do_not_tell_partners_apart(pair):
    "A nearest-mean classifier on mean frames stays at chance; 60 new videos a class, 4 standard errors."
    config = replace(MINI, size=24, frames=12)
    def mean(name, k): return np.array(render(name, k, config).mean(0).mean(-1)).reshape(6, 4, 6, 4).mean((1, 3)).ravel()
    a, b = (np.stack([mean(name, k) for k in range(120)]) for name in pair)
    centre_a, centre_b = a[:60].mean(0), b[:60].mean(0)
    def nearer_a(x): return ((x - centre_a) ** 2).sum(-1) < ((x - centre_b) ** 2).sum(-1)
    accuracy = np.concatenate([nearer_a(a[60:]), ~nearer_a(b[60:])]).mean()
    assert abs(accuracy - 0.5) < 4 * np.sqrt(0.25 / 120)


def test_order_tells_partners_apart():
    "The same statistic with time in it (last third minus first third, upper half minus lower half) is far above chance."
    config = replace(MINI, size=24, frames=12, distractors=0, background="plain", shake=0)

    def upward(name, k):
        clip = render(name, k, config).astype(float).mean(-1)
        body = np.abs(clip - np.median(clip))
        height = (body * np.arange(24)[::-1, None]).sum((1, 2)) / body.sum((1, 2))
        return height[-4:].mean() > height[:4].mean()
    assert np.mean([upward("rise", k) for k in range(20)] + [not upward("fall", k) for k in range(20)]) > 0.9


def test_waiting_is_as_long_after_as_before():
    curves = np.stack([schedule(24, MINI, Draws(k)) for k in range(2000)])
    before, after = (curves == 0).sum(1), (curves == 1).sum(1)
    assert abs(before.mean() - after.mean()) < 0.3
    assert np.allclose(curves.mean(0), 1 - curves.mean(0)[::-1], atol=0.02)  # tempo too
    assert (np.diff(curves) >= 0).all()


# ---- the same frames everywhere

def test_frames_are_those_of_every_other_machine():
    assert _sample() == GOLDEN


def test_frames_do_not_depend_on_the_processor():
    "With numpy's code for newer processors switched off the same bytes come out."
    core = getattr(np, "_core", None) or np.core  # its name before numpy 2
    __cpu_dispatch__, __cpu_features__ = core._multiarray_umath.__cpu_dispatch__, core._multiarray_umath.__cpu_features__
    off = " ".join(f for f in __cpu_dispatch__ if __cpu_features__.get(f))
    code = f"import sys; sys.path[:0] = {[os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]}; import test_motions; print(test_motions._sample())"
    out = subprocess.run([sys.executable, "-c", code], env=os.environ | {"NPY_DISABLE_CPU_FEATURES": off}, capture_output=True, text=True)
    assert out.stdout.strip() == GOLDEN, out.stderr


def test_rendering_neither_reads_nor_moves_global_random_state():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    a = render("swap", 5)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    render("grow", 1)
    assert (render("swap", 5) == a).all()


def test_seed_class_and_index_all_matter():
    clips = [render("rise", 0), render("rise", 1), render("fall", 0), render("rise", 0, replace(MINI, seed=1))]
    assert len({c.tobytes() for c in clips}) == 4


def test_cosine_and_sine():
    t = np.linspace(-3, 3, 5001)
    c, s = cos_sin(t)
    np.testing.assert_allclose(c, np.cos(2 * np.pi * t), atol=1e-6)
    np.testing.assert_allclose(s, np.sin(2 * np.pi * t), atol=1e-6)
    assert cos_sin(0)[1] == 0 and cos_sin(0.25)[1] == 1.0 - (1.0 - cos_sin(0.25)[1])


def test_draws_are_uniform():
    x = Draws(0).uniforms(20000, -1, 3)
    assert x.min() >= -1 and x.max() < 3 and abs(x.mean() - 1) < 0.05
    assert {Draws(k).choice("abc") for k in range(50)} == set("abc")


# ---- dials

@pytest.mark.parametrize("kind", BACKGROUNDS)
def test_backgrounds(kind):
    clip = render("grow", 1, replace(MINI, background=kind, distractors=0, shake=0))
    corner = clip[:, :12, :12].astype(int)
    assert np.ptp(corner, axis=0).any() == (kind == "noise")
    assert bool(np.ptp(corner[0].reshape(-1, 3), axis=0).any()) == (kind != "plain")


def test_noise_is_smooth_and_bounded():
    x = value_noise(5, 64, Draws(4))
    assert x.shape == (64, 64) and abs(x).max() <= 1 and abs(np.diff(x, axis=0)).max() < 0.3


def test_without_misalignment_the_action_fills_the_clip():
    u = schedule(24, replace(MINI, misalignment=0, tempo=0), Draws(1))
    np.testing.assert_allclose(u, np.linspace(0, 1, 24))


def test_a_dial_leaves_the_rest_as_it_was():
    calm = replace(MINI, distractors=0)
    busy = replace(MINI, distractors=6)
    differ = (render("rise", 2, calm) != render("rise", 2, busy)).any(-1).mean()
    assert 0 < differ < 0.4  # only where the distractors are


def test_odd_settings_render():
    for changes in (dict(size=16), dict(frames=2), dict(radius=(0.25, 0.25)), dict(shake=0.2, place=0.5), dict(misalignment=1, tempo=1, contrast=1, distractors=9)):
        config = replace(MINI, **changes)
        for name in ("push", "gather", "shrink", "orbit_clockwise"): assert render(name, 0, config).shape == (config.frames, config.size, config.size, 3)


@pytest.mark.parametrize("field, value, accepted", [
    ("size", 81, "even"), ("frames", 1, "at least 2"), ("misalignment", 2, "0 to 1"), ("background", "beach", "gradient"), ("radius", (0.3, 0.2), "ascending"),
    ("distractors", -1, "0 or more"), ("takes", 0, "at least 1"), ("videos_per_class", 0, "at least 1"), ("classes", ("grow", "move_rigth"), "Did you mean 'move_right'?")])
def test_wrong_settings_are_named(field, value, accepted):
    with pytest.raises(FsarError) as e: MotionsConfig(name="mine", **{field: value})
    assert accepted in str(e.value) and (field in str(e.value) or field == "classes")


def test_an_unknown_class_is_named():
    with pytest.raises(FsarError, match="no class 'spilt'. Did you mean 'split'"): render("spilt", 0)


# ---- takes

TAKES = replace(MINI, takes=3)


@pytest.mark.parametrize("name", ["fetch", "roll_left", "swap"])
def test_takes_share_all_that_is_looked_at_and_differ_in_time(name):
    calm = replace(TAKES, shake=0, misalignment=1, frames=60)
    clips = [render(name, k, calm)[::-1 if CLASSES[name].backwards else 1] for k in range(6)]
    fixed = CLASSES[name].name != "swap"                               # its side is each take's own, seen once it moves
    for a, b, together in ((0, 1, True), (1, 2, True), (2, 3, False), (0, 5, False)):
        assert (clips[a][0] == clips[b][0]).all() == together          # nothing has begun
        assert (clips[a] != clips[b]).any()
    assert all((clips[0][-1] == clips[k][-1]).all() for k in (1, 2)) or not fixed


def test_the_first_take_is_the_video_of_that_number_without_takes():
    assert all((render("push", k, TAKES) == render("push", k)).all() == (k % 3 == 0) for k in range(7))


def test_a_shaking_camera_leaves_the_background_as_it_is():
    "Takes see the same picture through windows a few pixels apart."
    config = replace(TAKES, shake=0.05, background="texture", contrast=0.5, distractors=0, radius=(0.01, 0.01))
    a, b = (render("grow", k, config)[0, :, :, 0].astype(int) for k in (0, 1))
    shifts = [(y, x) for y in range(-12, 13) for x in range(-12, 13)]
    def middle(picture, y=0, x=0): return picture[14 + y:32 + y, 14 + x:66 + x]  # above the body
    assert min(np.abs(middle(a) - middle(b, y, x)).max() for y, x in shifts) <= 1
    other = render("grow", 3, config)[0, :, :, 0].astype(int)
    assert min(np.abs(middle(a) - middle(other, y, x)).max() for y, x in shifts) > 10


def test_files_of_takes_tell_the_recording(tmp_path):
    from fsar.data.motions import RECORDING
    from fsar.data.splits import folder_manifest
    config = replace(TINY, videos_per_class=5, takes=2)
    root = render_dataset(tmp_path / "takes", config, workers=1, progress=False)
    assert sorted(p.name for p in (root / "rise").iterdir()) == [f"rise_g{g:02d}_c{c:02d}.mp4" for g, c in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))]
    manifest = folder_manifest(root, source=RECORDING)
    assert manifest[manifest["class"] == "rise"]["source"].str[-3:].tolist() == ["g01", "g01", "g02", "g02", "g03"] and manifest["source"].nunique() == 9
    with pytest.raises(FsarError, match="takes=2 there, None wanted"): render_dataset(root, replace(config, takes=1), progress=False)


def test_a_single_take_leaves_no_trace_in_what_is_hashed_and_stored(tiny):
    assert "takes" not in read_json(tiny / "motions.json")["config"] and "takes" not in MINI.to_dict() and replace(MINI, takes=2).to_dict()["takes"] == 2
    assert set(MINI.to_dict()) | {"takes"} == set(MINI.__dataclass_fields__)


# ---- files

def _files(root): return {p.relative_to(root).as_posix(): sha256_file(p) for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory): return render_dataset(tmp_path_factory.mktemp("motions") / "tiny", TINY, workers=1, progress=False)


def test_the_files_hold_the_frames(tiny):
    assert sorted(p.name for p in (tiny / "rise").iterdir()) == ["rise_0000.mp4", "rise_0001.mp4"]
    assert (tiny / "splits.csv").read_text() == "class,split\nrise,train\nfall,train\norbit_clockwise,test\n"
    frames, info = decode_all(tiny / "rise" / "rise_0001.mp4")
    source = render("rise", 1, TINY)
    assert frames.shape == source.shape and info.fps == TINY.fps
    assert np.abs(frames.astype(int) - source).mean() < 8


def test_any_number_of_workers_makes_the_same_files(tiny, tmp_path):
    assert _files(render_dataset(tmp_path / "two", TINY, workers=2, progress=False)) == _files(tiny)


def test_a_finished_data_set_is_reused_and_says_so(tiny, capsys):
    before = {p: p.stat().st_mtime_ns for p in tiny.rglob("*")}
    render_dataset(tiny, TINY)
    assert "reusing 6 videos" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in tiny.rglob("*")} == before


def test_what_is_missing_is_rendered_again(tmp_path, capsys):
    root = render_dataset(tmp_path / "m", TINY, workers=1, progress=False)
    whole = _files(root)
    (root / "fall" / "fall_0001.mp4").unlink()
    render_dataset(root, TINY, workers=1)
    assert "5 of 6 videos" in capsys.readouterr().err and _files(root) == whole


def test_killed_and_started_again(tiny, tmp_path):
    "kill -9 in the middle, workers included: nothing half-written under a video's name, and the second run completes it."
    config = replace(TINY, videos_per_class=60)
    root = tmp_path / "killed"
    code = f"""
from fsar.data.motions import *
from dataclasses import replace
if __name__ == "__main__": render_dataset({str(root)!r}, MotionsConfig(**{dict(vars(config))!r}), workers=2, progress=False)
"""
    (tmp_path / "script.py").write_text(code)
    process = subprocess.Popen([sys.executable, tmp_path / "script.py"])
    limit = time.monotonic() + 60
    while len(list(root.glob("*/[!.]*.mp4"))) < 20 and time.monotonic() < limit: time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # the workers notice
    there = list(root.glob("*/[!.]*.mp4"))
    assert 20 <= len(there) < len(videos(config)) and not read_json(root / "motions.json")["complete"]
    assert all(len(decode_all(p)[0]) == config.frames for p in there[::9])
    time.sleep(1)
    assert len(list(root.glob("*/[!.]*.mp4"))) == len(there), "workers outlived their parent"
    render_dataset(root, config, workers=1, progress=False)
    again = read_json(root / "motions.json")
    assert again["complete"] and all((root / name / f"{name}_{k:04d}.mp4").exists() for name, k in videos(config))
    assert _files(root)["rise/rise_0001.mp4"] == _files(tiny)["rise/rise_0001.mp4"]


def test_another_configuration_is_refused(tiny):
    with pytest.raises(FsarError, match="shake=0.01 there, 0.0 wanted"): render_dataset(tiny, replace(TINY, shake=0.0))


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FsarError, match="not empty and holds no motions.json"): render_dataset(tmp_path, TINY)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FsarError, match="cannot write .*file/m: a part of the path is not a folder"): render_dataset(tmp_path / "file" / "m", TINY, progress=False)


# ---- pictures

def test_strip_and_sheet():
    assert film_strip(render("rise", 0), 8).shape == (80, 8 * 82 - 2, 3)
    assert film_strip(render("rise", 0), 4, gap=0).shape == (80, 320, 3)
    titles = [a.get_title(loc="left") for a in contact_sheet(("rise", "fall")).axes]
    assert titles[:2] == ["rise (train)", "fall (train)"]


def test_a_clip_is_the_video_as_a_model_reads_it():
    late = replace(MINI, misalignment=1.0)
    for frames, config in ((8, MINI), (16, late)):
        video, read = render("rise", 3, config), clip("rise", 3, frames, config)
        assert read.shape == (frames, 3, 80, 80) and str(read.dtype) == "torch.uint8"
        assert (read.permute(0, 2, 3, 1).numpy() == video[segment_indices(24, frames)]).all()


def test_a_strip_shows_every_frame_and_marks_those_asked_for():
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots()
    frames = clip("rise", 0)
    strip(axes, frames, "rise", marks=(2, 5))
    picture = axes.images[0].get_array()
    assert (picture == side_by_side(frames.permute(0, 2, 3, 1).numpy())).all() and axes.get_title(loc="left") == "rise"
    assert [p.get_x() for p in axes.patches] == [2 * 82, 5 * 82] and {(p.get_width(), p.get_height()) for p in axes.patches} == {(79, 79)}
    strip(axes, frames.float() * 1.5)  # what resampling has left: out of range, and no integers
    assert axes.images[1].get_array().max() == 255
    plt.close(figure)
    rows = picture_rows([film_strip(render("rise", k)) for k in range(2)], ["first"])
    assert len(rows.axes) == 2 and [a.get_title(loc="left") for a in rows.axes] == ["first", ""]
