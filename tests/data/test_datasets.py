"From a name or a folder to a prepared data set: what is there, what it says, whether it is still as it was."
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

import fsar.data.store
from fsar.cli import main as cli
from fsar.data import datasets
from fsar.core.config import Config
from fsar.core.basics import FsarError
from fsar.data.datasets import check_store, class_table, open_data, prepare_and_summarise, prepare_data, remarks, split_table
from fsar.data.motions import PRESETS, render, render_dataset, split_classes
from fsar.data.splits import load_split, video_name
from fsar.data.store import open_store
from fsar.data.video import write_video

SIZES = dict(short_side=32, size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "Two classes of four videos each."
    root = tmp_path_factory.mktemp("videos") / "my clips"
    for name in ("grow", "rise"):
        (root / name).mkdir(parents=True)
        for k in range(4): write_video(root / name / f"{name}_{k}.mp4", render(name, k, PRESETS["motions-mini"])[:10])
    return root


def config(root: Path, **changes) -> Config:
    return Config(dataset=str(root), train_classes=("rise",), test_classes=("grow",), **SIZES, **changes)


@pytest.fixture
def data(folder, tmp_path):
    return prepare_data(config(shutil.copytree(folder, tmp_path / "my clips"), store=str(tmp_path / "store")), progress=False)


# a prepared store is a data set of its own

def test_a_store_stands_for_its_videos(data):
    shutil.rmtree(data.store.path.parent / "my clips")
    again = prepare_data(Config(dataset=str(data.store.path), **SIZES))
    assert again.name == "my clips" and again.store.hash == data.store.hash and again.partners == ()


def test_a_rendered_store_keeps_its_pairs(tmp_path):
    preset = dataclasses.replace(PRESETS["motions-mini"], name="pairs", size=32, frames=8, videos_per_class=2, classes=tuple(split_classes("test")))
    root = render_dataset(tmp_path / "pairs", preset, workers=1, progress=False)
    made = prepare_data(Config(dataset=str(root), store=str(tmp_path / "store"), **SIZES), progress=False)
    again = open_data(Config(dataset=str(tmp_path / "store"), **SIZES))
    assert made.partners and again.partners == made.partners and again.name == "pairs"


CONTRADICTIONS = {
    "short side": (dict(short_side=72, size=64), "short side of 32 pixels, the configuration says 72: add --short-side 32"),
    "classes": (dict(test_classes=("grow",)), "--test-classes has no meaning with the prepared store"),
    "videos": (dict(videos="somewhere"), "--videos has no meaning"),
    "a place": (dict(store="elsewhere"), "--store has no meaning"),
    "sources": (dict(source=r"(.+)_\d"), "--source has no meaning"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_a_store_is_an_error(case, data):
    changes, message = CONTRADICTIONS[case]
    with pytest.raises(FsarError, match=message): prepare_data(Config(dataset=str(data.store.path), **{**SIZES, **changes}))


def test_an_unfinished_store_says_so(data):
    (data.store.path / "store.json").unlink()
    with pytest.raises(FsarError, match="is unfinished: prepare it again"): prepare_data(Config(dataset=str(data.store.path), **SIZES))


def test_a_benchmark_without_videos_says_how_to_get_them():
    with pytest.raises(FsarError, match="needs the folder of its videos: --videos FOLDER; how to get them: fsar data about UCF101"): prepare_data(Config(dataset="UCF101"))


# how many of how many

def test_tables_count_every_listed_video(folder, tmp_path):
    videos = load_split("hmdb51", "test").videos[:3]
    for k, video in enumerate(videos):
        (tmp_path / "tree").mkdir(exist_ok=True)
        shutil.copy(folder / "rise" / f"rise_{k}.mp4", tmp_path / "tree" / f"{video_name(video)}.avi")
    (tmp_path / "tree" / f"{video_name(videos[0])}.avi").write_bytes(b"")
    found = prepare_and_summarise(Config(dataset="hmdb51", videos=str(tmp_path / "tree"), store=str(tmp_path / "store"), **SIZES), progress=False)
    table = pd.read_csv(tmp_path / "store" / "classes.csv")
    sides = {s: load_split("hmdb51", s) for s in ("train", "val", "test")}
    assert (table.usable + table.missing + table.unreadable == table.listed).all()
    assert table.groupby("split").listed.sum().to_dict() == {s: len(side) for s, side in sides.items()}
    assert {s: list(part["class"]) for s, part in table.groupby("split")}.keys() == sides.keys() and len(table) == 51
    assert table.usable.sum() == 2 == found["videos"] and table.unreadable.sum() == 1 and found["missing"] == 6766 - 3
    assert [row["videos"] for row in found["splits"]] == ["0 of 4,280", "0 of 1,194", "2 of 1,292"]
    text = datasets.prepared_text(found)
    assert "2 of 6,766 videos prepared" in text and "missing: 6,763 videos, listed in" in text and "the file is empty" in text and "51 classes lack videos" in text
    json.dumps(found, allow_nan=False)


def test_a_complete_folder_has_no_complaints(data):
    assert (class_table(data.store).usable == class_table(data.store).listed).all() and remarks(data.store) == []
    assert split_table(data.store).videos.tolist() == ["4 of 4", "4 of 4"]


def test_untrimmed_kinetics_videos_are_remarked():
    index = pd.DataFrame({"video": ["a", "b"], "class": ["x", "x"], "split": ["test"] * 2, "decoded": [300, 4500], "fps": [30.0, 30.0], "frames": [64, 64]})
    nothing = pd.DataFrame(columns=["video", "class", "split"])
    store = SimpleNamespace(settings={"benchmark": "kinetics100"}, index=index, missing=nothing, quarantine=nothing)
    text, = remarks(store)
    assert text.startswith("1 videos last over 20 s, e.g. b")
    store.settings = {"benchmark": "ucf101"}
    assert remarks(store) == []


# still as it was?

def test_sound(data):
    found = check_store(data.store, progress=False)
    assert found.sound and (found.videos, found.decoded, found.gone, found.rewritten) == (8, 8, 0, 0)


def test_originals_gone_and_edited_are_told_apart(data):
    root = data.store.path.parent / "my clips"
    (root / "rise" / "rise_0.mp4").unlink()
    write_video(root / "rise" / "rise_1.mp4", render("grow", 9, PRESETS["motions-mini"])[:6])
    found = check_store(data.store, progress=False)
    assert found.sound and found.gone == 1 and found.changed == ("rise/rise_1",) and found.decoded == 6
    assert "--update takes them in" in str(found)


def test_frames_that_are_not_the_original_s(data):
    "The file was exchanged, and its record says that this is the file."
    path = data.store.path.parent / "my clips" / "rise" / "rise_1.mp4"
    write_video(path, render("grow", 9, PRESETS["motions-mini"])[:10])
    key = fsar.data.store._key("rise/rise_1") + b"r"
    with fsar.data.store._writer(data.store.path) as env, env.begin(write=True) as transaction:
        record = json.loads(transaction.get(key)) | fsar.data.store.file_stamp(str(path))
        transaction.put(key, json.dumps(record).encode())
    found = check_store(open_store(data.store.path), progress=False)
    assert not found.sound and found.different == ("rise/rise_1",) and not found.damaged


def test_same_pictures_in_other_bytes_are_sound(data):
    other = dataclasses.replace(data.store, settings=data.store.settings | {"quality": data.store.settings["quality"] - 3})  # as another JPEG encoder would
    found = check_store(other, progress=False)
    assert found.sound and found.rewritten == 8


def test_surplus_blocks_are_found(data):
    with fsar.data.store._writer(data.store.path) as env, env.begin(write=True) as transaction: transaction.put(fsar.data.store._key("nobody's") + b"f", b"x")
    found = check_store(open_store(data.store.path), sample=0, progress=False)
    assert not found.sound and found.surplus == 1 and found.decoded == 0


# the command

def test_check_ends_with_one_when_something_is_wrong(data, capsys):
    assert cli.main(["data", "check", str(data.store.path), "--sample", "2"]) == 0
    assert ": sound" in capsys.readouterr().out
    frames = data.store.path / "frames.lmdb"
    content = bytearray(frames.read_bytes())
    place = content.index(b"\xff\xd8\xff", len(content) // 2)
    content[place + 100:place + 200] = bytes(100)
    frames.unlink(), frames.write_bytes(content)
    assert cli.main(["data", "check", str(data.store.path), "--sample", "0", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["damaged"]


def test_prepare_chooses_the_short_side_by_kind(folder, tmp_path, capsys):
    assert cli.main(["data", "prepare", str(folder), "--train-classes", "rise", "--test-classes", "grow", "--out", str(tmp_path / "store"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["short_side"] == 256
    assert cli.main(["data", "prepare", str(tmp_path / "store")]) == 2
    assert "is a prepared store: look at it with fsar data check" in capsys.readouterr().err


def test_videos_that_came_later_are_taken_in(folder, tmp_path, capsys):
    root = shutil.copytree(folder, tmp_path / "in")
    late = [root / "rise" / "rise_3.mp4", root / "grow" / "grow_0.mp4"]
    for path in late: path.rename(tmp_path / path.name)
    words = ["data", "prepare", str(root), "--train-classes", "rise", "--test-classes", "grow", "--short-side", "32", "--out", str(tmp_path / "store"), "--json"]
    assert cli.main(words) == 0 and json.loads(capsys.readouterr().out)["videos"] == 6
    for path in late: (tmp_path / path.name).rename(path)
    assert cli.main(words) == 2 and "--update" in capsys.readouterr().err
    assert cli.main([*words, "--update"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["videos"] == 8 and told["hash"] == prepare_data(config(root, store=str(tmp_path / "whole")), progress=False).store.hash


# real clips

def test_real_clips_as_partial_benchmarks(real_clips, tmp_path, capsys):
    "Nine clips of the public benchmarks in trees as they lie on disks; the three of Kinetics under names of Kinetics-100's list."
    names = {"kinetics100": [f"val_256/{v.replace(' ', '_')}.mp4" for v in load_split("kinetics100", "test").videos[:3]],
             "ucf101": [f"SoccerJuggling/{p.name}" for p in sorted(real_clips.glob("v_*.avi"))],
             "hmdb51": [f"{'wave' if 'wave' in p.name else 'cartwheel'}/{p.name.removeprefix('hmdb51_')}" for p in sorted(real_clips.glob("*_np*.avi"))]}
    files = {"kinetics100": sorted(real_clips.glob("*.mp4")), "ucf101": sorted(real_clips.glob("v_*.avi")), "hmdb51": sorted(real_clips.glob("*_np*.avi"))}
    assert {k: len(v) for k, v in files.items()} == {"kinetics100": 3, "ucf101": 2, "hmdb51": 4} == {k: len(v) for k, v in names.items()}
    for benchmark in names:
        for name, path in zip(names[benchmark], files[benchmark]):
            (tmp_path / benchmark / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / benchmark / name)
        assert cli.main(["data", "prepare", benchmark, "--videos", str(tmp_path / benchmark), "--out", str(tmp_path / f"{benchmark}.store"), "--short-side", "128", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["videos"] == len(files[benchmark]) and told["unreadable"] == [] and not any("Kinetics has 10 s" in note for note in told["notes"])
        assert cli.main(["data", "check", str(tmp_path / f"{benchmark}.store")]) == 0
        assert f"{len(files[benchmark])} originals decoded again, 0 of them to other pictures" in capsys.readouterr().out
        store = open_store(tmp_path / f"{benchmark}.store")
        assert (store.index.decoded > 40).all() and (store.index.height.where(store.index.height < store.index.width, store.index.width) == 128).all()


# the other commands of the family

def test_unpack_prepare_show_from_an_archive(folder, tmp_path, capsys):
    shutil.make_archive(str(tmp_path / "clips"), "gztar", folder.parent, folder.name)
    assert cli.main(["data", "unpack", str(tmp_path / "clips.tar.gz"), "--out", str(tmp_path / "videos")]) == 0
    assert "unpacked, 8 files" in capsys.readouterr().out
    assert cli.main(["data", "prepare", str(tmp_path / "videos" / folder.name), "--train-classes", "rise", "--test-classes", "grow", "--short-side", "32", "--out", str(tmp_path / "store")]) == 0
    capsys.readouterr()
    words = ["data", "show", str(tmp_path / "store"), "--class", "grow", "--out", str(tmp_path / "sheets")]
    assert cli.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert Path(told["picture"]).read_bytes()[:4] == b"\x89PNG" and "grow_3" in Path(told["page"]).read_text() and "rise_0" not in Path(told["page"]).read_text()
    assert cli.main(words) == 2 and "exists already" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0


def test_unpack_refuses_and_writes_nothing(tmp_path, capsys):
    import zipfile
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive: archive.writestr("../../outside.mp4", b"x")
    assert cli.main(["data", "unpack", str(tmp_path / "bad.zip"), "--out", str(tmp_path / "deep" / "out")]) == 2
    assert "outside.mp4" in capsys.readouterr().err and [p.name for p in tmp_path.rglob("*")] == ["bad.zip"]


@pytest.mark.parametrize("name", ["ucf101", "hmdb51", "ssv2-full", "ssv2-small", "kinetics100"])
def test_about_names_source_licence_and_commands(name, capsys):
    assert cli.main(["data", "about", name]) == 0
    text = capsys.readouterr().out
    assert all(w in text for w in ("official page:", "licence:", "disk:", f"fsar data prepare {name.replace('-', '_')}" if f"prepare {name}" not in text else f"prepare {name}", "--videos"))


def test_real_word_clips_prepared_checked_drawn(shared_dir, tmp_path, capsys):
    root = shared_dir / "realdata" / "grid_words"
    if not root.is_dir(): pytest.skip("the word clips are not at hand (../shared/realdata/grid_words)")
    words = ["data", "prepare", str(root), "--train-classes", "letter_*", "command_*", "prep_*", "--val-classes", "color_*", "--test-classes", "adverb_*", "--source", r"(.+)_\d+$"]
    assert cli.main([*words, "--short-side", "64", "--out", str(tmp_path / "store"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["videos"] == told["listed"] == 1960 and not told["unreadable"] and [row["classes"] for row in told["splits"]] == ["33 of 33", "4 of 4", "4 of 4"]
    assert cli.main(["data", "check", str(tmp_path / "store")]) == 0
    assert cli.main(["data", "show", str(tmp_path / "store"), "--out", str(tmp_path / "sheets"), "--json"]) == 0
    assert Path(json.loads(capsys.readouterr().out.splitlines()[-1])["picture"]).stat().st_size > 100_000
