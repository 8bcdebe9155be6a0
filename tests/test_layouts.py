"Data sets as they lie on people's disks, under the real names of the split lists: found, counted, prepared end to end."
import hashlib
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from fsar.core import FsarError
from fsar.splits import BENCHMARKS, SPLITS, SplitWarning, benchmark_manifest, benchmark_name, load_split, video_name

ALL = sorted(BENCHMARKS)


def lot(video: str, salt: str = "") -> float:
    "A number in [0, 1) that follows from a name."
    return int.from_bytes(hashlib.sha256((salt + video).encode()).digest()[:6], "little") / 2**48


def listed(benchmark: str) -> list[tuple[str, str, str]]:
    "(video, class, split) of every line of a benchmark's lists."
    sides = [load_split(benchmark, s) for s in SPLITS]
    return [(v, side.classes[k], side.name) for side in sides for v, k in zip(side.videos, side.labels)]


def home(benchmark: str, video: str, class_name: str, split: str) -> str:
    "The folder where a benchmark's real archives have a video."
    if benchmark.startswith("ssv2"): return "20bn-something-something-v2"
    if benchmark.startswith("kinetics"):
        spelled = class_name.replace(" ", "_") if lot(class_name) < 0.5 else class_name.replace("_", " ")
        return f"{'train' if split == 'train' else 'val'}_256/{spelled}"
    return f"UCF-101/{class_name}" if benchmark == "ucf101" else class_name


EXTENSIONS = {"hmdb51": [".avi"], "ucf101": [".avi"], "ssv2_full": [".webm"], "ssv2_small": [".webm", ".mp4"],
              "kinetics100": [".mp4", ".mkv", ".webm"], "kinetics100_molo": [".mp4", ".mkv", ".webm"]}


def messy(root: Path, benchmark: str, videos: list[tuple[str, str, str]], make) -> dict[str, str]:
    """A tree with a benchmark's real names: 5 % missing (a third of them as broken downloads), capital and doubled extensions, ids without times, videos that are
    there twice. `make(path, video)` writes a file. Returns what must be found: video → path, relative."""
    expected = {}
    for video, class_name, split in videos:
        name, chance = video_name(video), lot(video)
        kinds = EXTENSIONS[benchmark]
        place, ext = home(benchmark, video, class_name, split), kinds[int(lot(video, "ext") * len(kinds))]
        if chance < 0.05:
            if chance < 0.0167: make(root / place / f"{name}{ext}.part", video)
            continue
        if benchmark == "kinetics100" and chance < 0.25: name = name[:11]
        if benchmark == "kinetics100" and 0.25 <= chance < 0.3: name = "_".join([name[:11], *(str(int(t)) for t in name[12:].split("_"))])
        if 0.5 <= chance < 0.55: ext = ext.upper()
        if 0.55 <= chance < 0.58: ext += ".mp4"
        if 0.58 <= chance < 0.6: make(root / "a copy elsewhere" / f"{name}{ext}", video)
        if benchmark in ("hmdb51", "ucf101") and 0.6 <= chance < 0.62: name = name.swapcase()
        path = root / place / f"{name}{ext}"
        make(path, video)
        expected[os.path.splitext(video)[0] if benchmark == "kinetics100_molo" else video] = os.path.relpath(path, root)
    return expected


def touch(path: Path, video: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def found(benchmark: str, root: Path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manifest = benchmark_manifest(benchmark, root)
    return manifest, [str(w.message) for w in caught]


@pytest.mark.parametrize("benchmark", ALL)
def test_every_listed_name_is_found_in_a_messy_tree(benchmark, tmp_path):
    videos = listed(benchmark)
    expected = messy(tmp_path, benchmark, videos, touch)
    manifest, said = found(benchmark, tmp_path)
    got = {v: os.path.relpath(p, tmp_path) for v, p in zip(manifest.video, manifest.path)}
    # swapped case: where two listed names have the same letters and digits the file is rightly left alone
    doubtful = {v for v in expected.keys() - got.keys() if lot(v) >= 0.6}
    assert {v: p for v, p in expected.items() if v not in doubtful} == got and len(doubtful) <= 3
    missing = manifest.attrs["missing"]
    assert len(missing) + len(manifest) == len(videos)
    assert {m[0] for m in missing} == {os.path.splitext(v)[0] if benchmark == "kinetics100_molo" else v for v, _, _ in videos} - got.keys()
    hinted = [m for m in missing if ".part" in m[3]]
    assert len(hinted) == sum(lot(v) < 0.0167 for v, _, _ in videos) > 0
    assert any("videos found" in s for s in said) and any("more than once" in s for s in said)
    assert 0.03 < len(missing) / len(videos) < 0.07


@pytest.mark.parametrize("name, key", [("ssv2-full", "ssv2_full"), ("SSv2-Small", "ssv2_small"), ("UCF101", "ucf101"), ("kinetics100-molo", "kinetics100_molo"), ("motions", None), ("./ucf101", None)])
def test_names_people_write(name, key): assert benchmark_name(name) == key


def test_another_clip_of_the_same_video_is_no_match(tmp_path):
    name = video_name(load_split("kinetics100", "test").videos[0])
    touch(tmp_path / f"{name[:11]}_000777_000787.mp4", "")
    other = load_split("kinetics100", "test").videos[1]
    touch(tmp_path / f"{video_name(other)}.mp4", "")
    manifest, _ = found("kinetics100", tmp_path)
    assert list(manifest.video) == [other]
    hint, = [m[3] for m in manifest.attrs["missing"] if m[3]]
    assert "000777_000787.mp4, another clip" in hint


def test_a_bare_name_in_the_list_takes_the_only_clip_of_that_video(tmp_path):
    bare = [v for v in load_split("kinetics100_molo", "test").videos if len(video_name(v)) == 11][:2]
    touch(tmp_path / f"{video_name(bare[0])}_000012_000022.mp4", "")
    for start in (3, 40): touch(tmp_path / f"{video_name(bare[1])}_{start:06d}_{start + 10:06d}.mp4", "")
    manifest, _ = found("kinetics100_molo", tmp_path)
    assert [os.path.basename(p) for p in manifest.path] == [f"{video_name(bare[0])}_000012_000022.mp4"]  # of two clips nobody knows which


def test_letters_and_digits_never_take_another_class_s_file(tmp_path):
    a, b = [v for v in load_split("ucf101", "train").videos if v.startswith(("Archery/", "BabyCrawling/"))][:1], load_split("ucf101", "train").classes
    touch(tmp_path / b[5] / (video_name(a[0]).swapcase() + ".avi"), "")
    with pytest.raises(FsarError, match="no video of ucf101"): benchmark_manifest("ucf101", tmp_path)
    touch(tmp_path / "anything" / (video_name(a[0]).swapcase() + ".avi"), "")
    manifest, said = found("ucf101", tmp_path)
    assert list(manifest.video) == a and any("letters and digits only: 1" in s for s in said)


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    video = load_split("ucf101", "test").videos[0]
    touch(tmp_path / "disk 2" / "UCF-101" / f"{video}.avi", "")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "part").symlink_to(tmp_path / "disk 2")
    (tmp_path / "disk 2" / "back").symlink_to(tmp_path / "videos")
    manifest, said = found("ucf101", tmp_path / "videos")
    assert list(manifest.video) == [video] and not any("more than once" in s for s in said)


def test_empty_files_come_last(tmp_path):
    video = load_split("ucf101", "test").videos[0]
    (tmp_path / os.path.dirname(video)).mkdir()
    (tmp_path / f"{video}.avi").touch()
    (tmp_path / f"{video}.mp4").write_bytes(b"x")
    manifest, _ = found("ucf101", tmp_path)
    assert manifest.path[0].endswith(".mp4")


def test_no_extension_at_all(tmp_path):
    video = load_split("ssv2_small", "test").videos[0]
    touch(tmp_path / video, "")
    assert list(found("ssv2_small", tmp_path)[0].video) == [video]


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_said(tmp_path):
    video = load_split("ucf101", "test").videos[0]
    touch(tmp_path / f"{video}.avi", "")
    (tmp_path / "locked").mkdir(mode=0)
    assert any("cannot be read" in s for s in found("ucf101", tmp_path)[1])
