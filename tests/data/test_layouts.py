"Data sets as they lie on people's disks, under the real names of the split lists: found, counted, prepared end to end."
import contextlib
import hashlib
import io
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from fsar.cli import main as cli
from fsar.experiments import protocol, runs as experiments
from fsar.data import store as store_module
from fsar.engine.checkpoints import save_model
from fsar.core.config import Config
from fsar.core.basics import FsarError
from fsar.core.files import sha256_file
from fsar.engine.importers import _base_classes
from fsar.model.registry import create_model
from fsar.data.motions import PRESETS, render
from fsar.data.store import open_store, prepare
from fsar.data.video import write_video
from fsar.data.splits import BENCHMARKS, SPLITS, benchmark_manifest, benchmark_name, load_split, video_name

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


# prepared, end to end, through the command line

PER_CLASS = 7


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[bytes]:
    "Twelve different rendered clips, as bytes."
    folder, preset = tmp_path_factory.mktemp("clips"), PRESETS["motions-mini"]
    return [write_video(folder / f"{k}.mp4", render("rise" if k % 2 else "grow", k, preset)[:8]).read_bytes() for k in range(12)]


def some(benchmark: str) -> list[tuple[str, str, str]]:
    "The first videos of six classes of each side."
    rows = []
    for s in SPLITS:
        side = load_split(benchmark, s)
        for k in range(6): rows += [(side.videos[i], side.classes[k], s) for i in np.flatnonzero(side.labels == k)[:PER_CLASS]]
    return rows


@pytest.fixture(scope="module", params=ALL)
def benchmark_store(request, clips, tmp_path_factory):
    "A messy tree of a benchmark's real names, prepared by the command; with what it said."
    root = tmp_path_factory.mktemp(request.param)
    videos = some(request.param)
    broken = next(v for v, _, _ in videos if 0.1 < lot(v) < 0.5)

    def make(path: Path, video: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no video at all" if video == broken else clips[int(lot(video, "clip") * len(clips))])

    expected = messy(root / "videos", request.param, videos, make)
    before = {p: p.stat().st_mtime_ns for p in (root / "videos").rglob("*")}
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
        code = cli.main(["data", "prepare", request.param.replace("_", "-"), "--videos", str(root / "videos"), "--out", str(root / "store"), "--short-side", "32", "--processes", "1", "--json"])
    assert code == 0 and before == {p: p.stat().st_mtime_ns for p in (root / "videos").rglob("*")}  # nothing is written beside the originals
    return request.param, root, expected, os.path.splitext(broken)[0] if request.param == "kinetics100_molo" else broken, json.loads(said.getvalue())


def test_prepared_from_a_messy_tree(benchmark_store):
    benchmark, root, expected, broken, told = benchmark_store
    store = open_store(root / "store")
    assert set(store.index.video) == expected.keys() - {broken} and list(store.quarantine.video) == [broken]
    sides = {s: load_split(benchmark, s) for s in SPLITS}
    assert {s: store.listed(s) for s in SPLITS} == {s: len(side) for s, side in sides.items()}
    assert told["missing"] == sum(map(len, sides.values())) - len(expected) == len(store.missing)
    assert [row["videos"] for row in told["splits"]] == [f"{(store.index.split == s).sum()} of {len(sides[s]):,}" for s in SPLITS]
    assert told["unreadable"][0]["video"] == broken and told["unreadable"][0]["reason"].startswith("not a readable video")
    assert any("videos found" in note for note in told["notes"])
    lines = (root / "store" / "missing.csv").read_text().splitlines()
    assert len(lines) == told["missing"] + 1
    files = {v: sha256_file(root / "videos" / p) for v, p in expected.items()}
    records = store_module._records(store_module.open_frames(str(root / "store" / "frames.lmdb")), store.index.video)
    assert all(record["file"] == files[v] for v, record in zip(store.index.video, records))  # every video is the file of its own name


def test_prepared_again_and_checked(benchmark_store, capsys):
    benchmark, root, _, _, told = benchmark_store
    assert cli.main(["data", "check", str(root / "store"), "--sample", "4"]) == 0
    assert "sound" in capsys.readouterr().out
    assert cli.main(["data", "prepare", benchmark, "--videos", str(root / "videos"), "--out", str(root / "store"), "--short-side", "32"]) == 0
    out = capsys.readouterr().out
    assert f"{told['videos']:,} of {told['listed']:,} videos prepared in" in out and "next: fsar data show" in out


def test_episodes_of_an_incomplete_benchmark(benchmark_store, tmp_path, capsys):
    "A run on what is there: the report says of how many videos of how many."
    benchmark, root, _, _, told = benchmark_store
    if benchmark not in ("ucf101", "ssv2_small"): pytest.skip("one class-folder and one flat benchmark are enough for whole runs")
    words = ["--dataset", str(root / "store"), "--method", "protonet", "--short-side", "32", "--size", "32", "--frames", "4", "--queries", "1", "--episodes", "4", "--validate-every", "2",
             "--val-episodes", "4", "--test-queries", "1", "--test-episodes", "20", "--test-shots", "1", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main(["train", *words]) == 0
    there = told["splits"][2]["videos"]
    assert f"drawn from {there} videos" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count(f"{there} videos") >= 2 and benchmark in page


# weights that have seen the test

@pytest.fixture
def full_weights(tmp_path):
    "A model that says it was trained on SSv2-Full."
    model = create_model("protonet", backbone="resnet_micro", frames=4, classes=64, seed=0)
    save_model(tmp_path / "full", model, {"trained_on": _base_classes("ssv2-full")})
    return tmp_path / "full"


@pytest.fixture(scope="module")
def small_store(clips, tmp_path_factory):
    "SSv2-Small's test classes and a few of its base classes, two videos each."
    root = tmp_path_factory.mktemp("small")
    for name, classes in (("test", 24), ("train", 5)):
        side = load_split("ssv2_small", name)
        for i in [i for k in range(classes) for i in np.flatnonzero(side.labels == k)[:2]]:
            path = root / "videos" / f"{side.videos[i]}.webm"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(clips[i % len(clips)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare(benchmark_manifest("ssv2_small", root / "videos"), root / "store", short_side=32, workers=1, progress=False).path


def test_full_to_small_stops_and_is_labelled_when_told_to_go_on(full_weights, small_store, capsys):
    words = ["test", str(full_weights), "--dataset", str(small_store), "--short-side", "32", "--size", "32", "--test-shots", "1", "--test-queries", "1", "--test-episodes", "10", "--device", "cpu"]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "would not be few-shot: 7 of the 24 test classes of ssv2_small were trained on in ssv2_full" in said and "700 of their 700 videos" in said and "--allow-leak" in said
    assert cli.main([*words, "--allow-leak"]) == 0
    assert "NOT FEW-SHOT" in capsys.readouterr().out


def test_a_backbone_that_has_seen_the_test_classes_is_refused_before_training(full_weights, small_store, tmp_path):
    config = Config(dataset=str(small_store), short_side=32, size=32, frames=4, method="protonet", weights=str(full_weights), test_shots=(1,), test_queries=1)
    data = experiments.prepare_data(config)
    with pytest.raises(FsarError, match="7 of the 24 test classes"): protocol.model_for(config, data)
    assert protocol.model_for(config.replace(allow_leak=True), data) is not None
