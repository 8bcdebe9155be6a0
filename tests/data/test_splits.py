"""Split lists and manifests: hashes, disjointness, leaks, folders, source rules, and the messages a user reads."""
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import fsar.data.splits as splits
from fsar.core.basics import FsarError
from fsar.core.files import resource
from fsar.data.splits import (BENCHMARKS, LeakWarning, SplitWarning, benchmark_manifest, folder_manifest, leaks, load_split, sources, verify,
                         video_name, warn_leaks)

SIZES = {"kinetics100": (64, 12, 24, 6400, 1200, 2400), "kinetics100_molo": (64, 12, 24, 6400, 1200, 2400), "ssv2_small": (64, 12, 24, 6400, 1200, 2400),
         "ssv2_full": (64, 12, 24, 77500, 1926, 2857), "ucf101": (70, 10, 21, 9154, 1421, 2745), "hmdb51": (31, 10, 10, 4280, 1194, 1292)}


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_published_sizes_and_disjoint(benchmark):
    table = verify(benchmark)
    assert (*table.classes, *table.videos) == SIZES[benchmark]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("split", splits.SPLITS)
def test_labels_index_classes(benchmark, split):
    side = load_split(benchmark, split)
    assert len(side.videos) == len(side.labels) and set(side.labels) == set(range(len(side.classes)))
    if benchmark == "ucf101":
        assert all(v.split("/")[0] == side.classes[k] for v, k in zip(side.videos, side.labels))


def test_ssv2_full_in_both_sizes():
    short, long = load_split("ssv2_full", "train"), load_split("ssv2_full", "train", train_size=77500)
    assert len(short) == 67013 and short.videos == long.videos[:67013]
    with pytest.raises(FsarError, match="67013 or 77500"):
        load_split("ssv2_full", "train", train_size=70000)
    with pytest.raises(FsarError, match="ucf101 has no training list of 70000"):
        load_split("ucf101", "train", train_size=70000)


@pytest.mark.parametrize("benchmark", ["ucf101", "hmdb51"])
def test_every_video_has_a_source(benchmark):
    side = load_split(benchmark, "test")
    assert None not in side.sources and 2 < len(side) / len(set(side.sources)) < 8


def test_edited_or_missing_list_is_refused(tmp_path, monkeypatch):
    copy = shutil.copytree(resource("data_splits"), tmp_path / "data_splits")
    monkeypatch.setattr(splits, "resource", lambda name: copy)
    file = copy / "ucf101" / "test.csv"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(FsarError, match=r"ucf101/test.csv is not the published one"):
        load_split("ucf101", "test")
    file.unlink()
    with pytest.raises(FsarError, match=r"ucf101/test.csv is missing"):
        load_split("ucf101", "test")


def test_leaks_across_benchmarks():
    found = {leak.split: leak for leak in leaks("ssv2_full", "ssv2_small", train_size=77500)}
    assert (len(found["test"].classes), found["test"].videos, len(found["val"].classes), found["val"].videos) == (7, 700, 2, 200)
    with pytest.warns(LeakWarning, match="2 of the val classes"), pytest.warns(LeakWarning, match="7 of the test classes of ssv2_small"):
        warn_leaks("ssv2_full", "ssv2_small", train_size=77500)
    for benchmark in BENCHMARKS:
        assert leaks(benchmark, benchmark) == []


def test_folder_with_patterns_and_sources(tmp_path):
    root = touch(tmp_path, "wave/ann_1.mp4", "wave/ann_2.MP4", "walk/bob_1.avi", "jump/ann_3.mkv", "sit/x.mp4", "wave/.hidden.mp4", "readme.txt")
    with pytest.warns(SplitWarning, match="left out 1 of 4 classes, which are in no split: sit"):
        manifest = folder_manifest(root, patterns={"train": ["wa*"], "val": "jump"}, source=r"(.+)_\d$")
    assert list(manifest.columns) == ["video", "path", "class", "split", "source"]
    assert list(manifest.video) == ["jump/ann_3", "walk/bob_1", "wave/ann_1", "wave/ann_2"]
    assert list(manifest.source) == ["ann", "bob", "ann", "ann"] and list(manifest.split) == ["val", "train", "train", "train"]
    assert all(Path(p).is_file() and Path(p).is_absolute() for p in manifest.path)


def test_folder_with_split_file(tmp_path):
    root = touch(tmp_path / "data", "a b/1.mp4", "ü/[2]!.mp4")
    (root / "splits.csv").write_text("class,split\na b,train\nü,test\n")
    manifest = folder_manifest(root)
    assert dict(zip(manifest["class"], manifest.split)) == {"a b": "train", "ü": "test"}
    assert list(manifest.source) == list(manifest.video) == ["a b/1", "ü/[2]!"]
    other = tmp_path / "other.csv"
    other.write_text("split,class\nval,a b\ntest,ü\n")
    assert list(folder_manifest(root, splits=other).split) == ["val", "test"]


ROOT = ("wave/ann_1.mp4", "walk/bob_1.mp4")
WRONG = {
    "no such folder": (lambda r: folder_manifest(r / "missing"), r"no such folder: .*missing. Expected"),
    "root is a file": (lambda r: folder_manifest(r / "wave/ann_1.mp4"), "no such folder"),
    "no videos": (lambda r: folder_manifest(touch(r / "new", "c/notes.txt")), r"no videos in .*\.mp4"),
    "no rule": (lambda r: folder_manifest(r), "which classes of .*splits.csv"),
    "both rules": (lambda r: folder_manifest(r, splits="x.csv", patterns={"train": "w*"}), "not both"),
    "empty class": (lambda r: (touch(r, "idle/x.txt").joinpath("idle/x.txt").unlink(), folder_manifest(r, patterns={"train": "*"})), r"class 'idle' is empty: no videos in .*idle"),
    "pattern without class": (lambda r: folder_manifest(r, patterns={"train": ["wav"]}), "'wav' matches no class. Did you mean 'wave'"),
    "unknown side": (lambda r: folder_manifest(r, patterns={"trian": ["*"]}), "'trian'. Did you mean 'train'"),
    "two sides": (lambda r: folder_manifest(r, patterns={"train": "*", "test": "walk"}), "'walk' is in two splits, train and test"),
    "no csv": (lambda r: folder_manifest(r, splits=r / "s.csv"), "no such split file: .*s.csv"),
    "bad regex": (lambda r: folder_manifest(r, patterns={"train": "*"}, source="(a"), "not a regular expression"),
    "no group": (lambda r: folder_manifest(r, patterns={"train": "*"}, source=".*"), "has no group"),
    "rule misses": (lambda r: folder_manifest(r, patterns={"train": "*"}, source="(ann)"), "does not match 1 of 2 video names, e.g. 'bob_1'"),
    "two files of a name": (lambda r: folder_manifest(touch(r, "wave/ann_1.avi"), patterns={"train": "*"}), "two files of one name"),
    "unknown benchmark": (lambda r: load_split("hmdb", "test"), "'hmdb'. Did you mean 'hmdb51'"),
    "unknown split": (lambda r: load_split("hmdb51", "tests"), "'tests'. Did you mean 'test'"),
    "nothing of it here": (lambda r: benchmark_manifest("hmdb51", r), "no video of hmdb51 below .*look like 'brush_hair/"),
    "no videos folder": (lambda r: benchmark_manifest("hmdb51", r / "missing"), "no such folder: .*missing"),
}


@pytest.mark.filterwarnings("ignore::fsar.data.splits.SplitWarning")
@pytest.mark.parametrize("case", WRONG)
def test_messages(case, tmp_path):
    act, message = WRONG[case]
    root = touch(tmp_path, *ROOT)
    with pytest.raises(FsarError, match=message):
        act(root)


@pytest.mark.parametrize("text, message", [("name,split\nwave,train\n", "expected class,split"), ("class,split\nwave,training\n", "unknown split 'training'. Did you mean 'train'\\? Accepted: train, val, test"),
                                           ("class,split\nwaves,train\n", "no class folder 'waves'. Did you mean 'wave'"),
                                           ("class,split\nwave,train\nwave,val\n", "in two splits, train and val")])
def test_bad_split_files(text, message, tmp_path):
    root = touch(tmp_path, *ROOT)
    (root / "splits.csv").write_text(text)
    with pytest.raises(FsarError, match=message):
        folder_manifest(root)


def test_benchmark_manifest_finds_by_name(tmp_path):
    names = load_split("kinetics100", "test").videos[:3]
    bare = video_name(names[1]).rsplit("_", 2)[0]
    touch(tmp_path, f"some where/{video_name(names[0])}.mp4", f"{bare}.webm", f"other/{video_name(names[2])}.mkv", f"{names[2].split('/')[0].replace(' ', '_')}/{video_name(names[2])}.mp4")
    with pytest.warns(SplitWarning, match="train 0 of 6,400, val 0 of 1,200, test 3 of 2,400"):
        manifest = benchmark_manifest("kinetics100", tmp_path)
    assert tuple(manifest.video) == names and len(manifest.attrs["missing"]) == 10000 - 3
    assert manifest.path.iloc[2].endswith(".mp4")  # of two files of one name, the one in its class's folder


def test_complete_benchmark_is_silent(tmp_path):
    for side in ("train", "val", "test"):
        touch(tmp_path, *(f"{v}.avi" for v in load_split("hmdb51", side).videos))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manifest = benchmark_manifest("hmdb51", tmp_path)
    assert len(manifest) == 4280 + 1194 + 1292 and manifest.attrs["missing"] == ()
    expected = np.concatenate([load_split("hmdb51", s).sources for s in splits.SPLITS])
    assert (manifest.source.to_numpy() == expected).all()


def test_real_word_clips(shared_dir):
    root = shared_dir / "realdata" / "grid_words"
    manifest = folder_manifest(root, patterns={"train": ["letter_*", "command_*", "prep_*"], "val": ["color_*", "adverb_*"]}, source=r"(.+)_\d+$")
    assert len(manifest) == 1960 and manifest.groupby("split")["class"].nunique().to_dict() == {"train": 33, "val": 8}
    assert manifest.source.value_counts().max() <= 6


def test_rule_is_searched_anywhere():
    assert sources(["v_Run_g01_c02", "v_Run_g11_c01"], r"g(\d+)_c") == ["01", "11"]
