"""The store: what goes in comes out, bad media are set aside, a run may be killed anywhere, and the messages a user reads."""
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fsar.data.store
from fsar.core.basics import FsarError, generator
from fsar.data.decoding import Worker, decode_many
from fsar.data.splits import folder_manifest
from fsar.data.store import QuarantineWarning, Store, open_store, prepare
from fsar.data.video import decode_all, spread, write_video

SETTINGS = dict(short_side=32, workers=1, progress=False)


def picture(k: int, frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    "uint8 (F, H, W, 3): soft colours that drift, different for each k."
    t, y, x = np.ogrid[:frames, :height, :width]
    return np.stack([127 + 100 * np.sin(0.1 * (x + y * c + t * (k + 1))) for c in (0, 1, 2)], -1).astype(np.uint8)


def make_videos(root: Path, per_class: int = 3, classes: tuple[str, ...] = ("a", "b", "c")) -> Path:
    for i, c in enumerate(classes):
        (root / c).mkdir(parents=True)
        for k in range(per_class):
            write_video(root / c / f"{c}_{k}.mp4", picture(per_class * i + k, frames=6 + 2 * k))
    return root


def manifest_of(root: Path) -> pd.DataFrame:
    return folder_manifest(root, patterns={"train": ["a", "b"], "test": "c"})


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def store(videos, tmp_path_factory) -> Store:
    return prepare(manifest_of(videos), tmp_path_factory.mktemp("store"), **SETTINGS)


@pytest.fixture
def copy(store, tmp_path) -> Path:
    return shutil.copytree(store.path, tmp_path / "copy")


def decoders() -> list[int]:
    "Ids of this process's decoding workers."
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and b"fsar.core.helper" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


# what goes in comes out

def test_frames_are_those_of_the_files(store, videos):
    assert len(store) == 9 and not len(store.quarantine)
    for row in range(len(store)):
        original, info = decode_all(videos / f"{store.index.video[row]}.mp4", short_side=32)
        stored = store.frames(row, range(len(original))).movedim(1, -1).numpy()
        assert stored.shape == original.shape == (store.index.frames[row], 32, 43, 3) and info.frames == store.index.decoded[row]
        assert np.square(stored.astype(float) - original).mean() < 20  # above 35 dB


def test_any_order_and_repetition(store):
    everything = store.frames(3, range(store.index.frames[3]))
    wanted = [4, 0, 0, 5, 2]
    assert torch.equal(store.frames(3, wanted), everything[wanted]) and store.frames(np.int64(3), np.array([1])).shape[0] == 1


@pytest.mark.parametrize("row, indices", [(9, [0]), (-1, [0]), (0, [6]), (0, [-1]), (0, [])])
def test_out_of_range(store, row, indices):
    with pytest.raises(IndexError):
        store.frames(row, indices)


def test_splits_and_classes(store):
    assert store.classes("train") == ("a", "b") and store.classes("test") == ("c",)
    assert sorted([*store.split("train"), *store.split("test")]) == list(range(9))
    assert store.summary().loc["train", "videos"] == "6 of 6"
    with pytest.raises(FsarError, match="no 'val' videos; its splits: train, test"):
        store.split("val")


def test_at_most_max_frames_evenly_spread(videos, tmp_path, store):
    few = prepare(manifest_of(videos), tmp_path / "few", **SETTINGS, max_frames=4)
    every = prepare(manifest_of(videos), tmp_path / "every", **SETTINGS, max_frames=None)
    assert list(few.index.frames.unique()) == [4] and list(few.index.decoded) == list(every.index.frames)
    row = int(few.index.decoded.argmax())
    assert torch.equal(few.frames(row, range(4)), every.frames(row, spread(every.index.frames[row], 4)))


def test_same_store_for_any_number_of_workers(videos, tmp_path, store):
    again = prepare(manifest_of(videos), tmp_path / "again", **{**SETTINGS, "workers": 2})
    assert again.hash == store.hash and again.index.equals(store.index)
    again.check()
    other = prepare(manifest_of(videos).assign(split="train"), tmp_path / "other", **SETTINGS)
    assert other.hash != store.hash


def test_strange_names(tmp_path):
    name = "x" * 240 + " #[1]&+;~@!()é"
    (tmp_path / "in" / ("ü" * 100)).mkdir(parents=True)
    write_video(tmp_path / "v.mp4", picture(0, 4))
    shutil.copy(tmp_path / "v.mp4", tmp_path / "in" / ("ü" * 100) / f"{name[-60:]}.mp4")
    shutil.copy(tmp_path / "v.mp4", tmp_path / "in" / ("ü" * 100) / "NA.mp4")
    shutil.copy(tmp_path / "v.mp4", tmp_path / "in" / ("ü" * 100) / '"quoted", and more.mp4')
    manifest = folder_manifest(tmp_path / "in", patterns={"train": "*"})
    made = prepare(manifest, tmp_path / "out", **SETTINGS)
    assert list(open_store(made.path).index.video) == list(manifest.video) and made.frames(0, [3]).shape == (1, 3, 32, 43)


# bad media

def sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)


def spoil(folder: Path) -> set[str]:
    "Add every kind of bad file to a folder; the names added."
    before = {f.name for f in folder.iterdir()}
    whole = next(folder.glob("*.mp4")).read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("I am no video")
    (folder / "truncated.mp4").write_bytes(whole[:len(whole) // 2])
    (folder / "noise.avi").write_bytes(np.random.default_rng(0).bytes(5000))
    sound(folder / "sound.mp4")
    return {f.stem for f in folder.iterdir() if f.name not in before}


def test_bad_media_are_quarantined(tmp_path):
    root = make_videos(tmp_path / "in")
    bad = spoil(root / "b")
    manifest = manifest_of(root)
    missing = manifest.iloc[[0]].assign(video="b/missing", path=str(root / "b" / "missing.mp4"))
    os.mkfifo(root / "b" / "pipe.mp4")  # opening it blocks for ever
    pipe = manifest.iloc[[0]].assign(video="b/pipe", path=str(root / "b" / "pipe.mp4"))
    began = time.monotonic()
    with pytest.warns(QuarantineWarning, match=r"7 of 16 videos cannot be used, see .*quarantine.csv:\n .*b/.*: "):
        store = prepare(pd.concat([manifest, missing, pipe]), tmp_path / "out", **SETTINGS)
    assert time.monotonic() - began < 30
    table = store.quarantine.set_index("video")
    assert {v.split("/")[1] for v in table.index} == bad | {"missing", "pipe"}
    assert table.path["b/text"] == str(root / "b" / "text.mp4") and table.split.eq("train").all()
    assert "empty" in table.reason["b/empty"] and "no video" in table.reason["b/sound"] and "no such file" in table.reason["b/missing"]
    assert (table.reason.str.len() > 5).all() and len(store) == 9 and store.summary().loc["train", "videos"] == "6 of 13"


def test_all_bad_is_an_error(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    for k in range(2):
        (tmp_path / "in" / "a" / f"{k}.mp4").write_text("no")
    manifest = folder_manifest(tmp_path / "in", patterns={"train": "a"})
    with pytest.raises(FsarError, match=r"not one of 2 videos can be used, e.g. .*a/0.mp4: "):
        prepare(manifest, tmp_path / "out", **SETTINGS)
    with pytest.raises(FsarError, match="unfinished"):
        open_store(tmp_path / "out")


def requests_for(videos: Path) -> list:
    return [(p.stem, dict(path=str(p), short_side=32, max_frames=None, quality=90, timeout=0.5)) for p in sorted(videos.rglob("*.mp4"))]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker in /proc")
def test_a_decoder_that_hangs_costs_one_video(videos, monkeypatch):
    monkeypatch.setattr(Worker.__init__, "__defaults__", (1.5,))
    answers = {}
    for name, record, _ in decode_many(requests_for(videos), 1):
        answers[name] = record
        if len(answers) == 1:
            for pid in decoders():
                os.kill(pid, signal.SIGSTOP)
    lost = {n: r["reason"] for n, r in answers.items() if "reason" in r}
    assert len(answers) == 9 and len(lost) <= 1 and all("hung for 2 s and was killed" in r for r in lost.values())
    assert not decoders()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker in /proc")
def test_a_decoder_that_crashes_gets_a_second_chance(videos):
    count = 0
    for _, record, _ in decode_many(requests_for(videos), 1):
        count += "reason" not in record
        if count == 2:
            for pid in decoders():
                os.kill(pid, signal.SIGSEGV)
    assert count == 9


def test_a_crash_is_reported(videos, monkeypatch):
    worker, (_, request) = Worker(), requests_for(videos)[0]
    start = Worker.start

    def start_doomed(self):
        start(self)
        os.kill(self.process.pid, signal.SIGSEGV)
    monkeypatch.setattr(Worker, "start", start_doomed)
    assert worker({**request, "timeout": 20})[0]["reason"] == "its decoder crashed twice (SIGSEGV)"


def test_worker_that_cannot_start_says_why(videos, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(FsarError, match="a decoding process does not start"):
        list(decode_many(requests_for(videos), 1))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker in /proc")
def test_stopping_early_leaves_no_process(videos):
    answers = decode_many(requests_for(videos), 2)
    next(answers)
    assert decoders()
    answers.close()
    assert not decoders()


# killed anywhere

def test_killed_anywhere_and_resumed_is_the_same(tmp_path):
    manifest = manifest_of(make_videos(tmp_path / "in", per_class=12))
    whole = prepare(manifest, tmp_path / "whole", **SETTINGS)
    started = time.monotonic()
    timed = multiprocessing.get_context("fork").Process(target=impatient, args=(manifest, tmp_path / "timed"))
    timed.start(); timed.join()
    longest, delays, kills = 0.9 * (time.monotonic() - started), random.Random(0), 0  # moments within a run, however fast the machine is
    for _ in range(150):
        process = multiprocessing.get_context("fork").Process(target=impatient, args=(manifest, tmp_path / "out"))
        process.start()
        process.join(delays.uniform(0, longest) if kills < 10 else 60)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0 and kills >= 10:
            break
        if process.exitcode == 0:  # finished too early: begin again, keep counting
            shutil.rmtree(tmp_path / "out")
    resumed = open_store(tmp_path / "out")
    assert kills >= 10 and resumed.hash == whole.hash and resumed.index.equals(whole.index)
    assert sorted(f.name for f in resumed.path.iterdir()) == sorted(f.name for f in whole.path.iterdir())
    resumed.check()
    assert entries(resumed) == entries(whole)


def impatient(manifest, out):
    fsar.data.store.COMMIT = 0.02
    prepare(manifest, out, **SETTINGS)
    os._exit(0)


def test_resuming_decodes_only_what_is_missing(videos, tmp_path, store, capfd, monkeypatch):
    monkeypatch.delenv("FSAR_QUIET", raising=False)
    out = shutil.copytree(store.path, tmp_path / "out")
    (out / "store.json").unlink()
    with fsar.data.store._writer(out) as env, env.begin(write=True) as transaction:
        transaction.delete(fsar.data.store._key("a/a_1") + b"r")
    resumed = prepare(manifest_of(videos), out, **{**SETTINGS, "progress": True})
    assert resumed.hash == store.hash and "8 of 9 done before" in capfd.readouterr().err


def test_changed_while_unfinished_is_decoded_again(tmp_path):
    root = make_videos(tmp_path / "in")
    first = prepare(manifest_of(root), tmp_path / "out", **SETTINGS)
    before = first.frames(0, [3])
    (first.path / "store.json").unlink()
    write_video(root / "a" / "a_0.mp4", picture(50, 9))
    second = prepare(manifest_of(root), tmp_path / "out", **SETTINGS)
    assert second.index.frames[0] == 9 and not torch.equal(second.frames(0, [3]), before) and second.hash != first.hash


def test_half_made_frames_file(videos, tmp_path, store):
    out = tmp_path / "out"
    fsar.data.store._claim(out, store.settings)
    (out / "frames.lmdb").write_bytes(b"\0" * 4096)
    (out / ".index.csv.abc.csv").write_text("left by a killed run")
    assert prepare(manifest_of(videos), out, **SETTINGS).hash == store.hash
    assert not list(out.glob(".index*"))


# reuse, and what is refused

def test_finished_store_is_reused(videos, copy, store):
    stamp = (copy / "frames.lmdb").stat().st_mtime_ns
    began = time.monotonic()
    assert prepare(manifest_of(videos), copy, **SETTINGS).hash == store.hash
    assert (copy / "frames.lmdb").stat().st_mtime_ns == stamp and time.monotonic() - began < 2


def test_copied_data_set_is_the_same_and_a_changed_one_is_not(tmp_path):
    root = make_videos(tmp_path / "in")
    (root / "a" / "text.mp4").write_text("no")
    with pytest.warns(QuarantineWarning):
        store = prepare(manifest_of(root), tmp_path / "out", **SETTINGS)
    for file in root.rglob("*.mp4"):
        os.utime(file, (1, 1))
    with pytest.warns(QuarantineWarning):
        assert prepare(manifest_of(root), store.path, **SETTINGS).hash == store.hash
    write_video(root / "c" / "c_1.mp4", picture(9, 5))
    with pytest.raises(FsarError, match="1 videos have changed since .*c_1.mp4: update it with --update"):
        prepare(manifest_of(root), store.path, **SETTINGS)


def test_nothing_is_written_beside_the_videos(tmp_path):
    root = make_videos(tmp_path / "in")
    def look(): return {p: p.stat().st_mtime_ns for p in [root, *root.rglob("*")]}
    before = look()
    prepare(manifest_of(root), tmp_path / "out", **SETTINGS)
    assert look() == before


def test_made_again_in_the_same_place(tmp_path):
    root, out = make_videos(tmp_path / "in"), tmp_path / "out"
    first = prepare(manifest_of(root), out, **SETTINGS)
    first.frames(0, [0])
    shutil.rmtree(out)
    write_video(root / "a" / "a_0.mp4", picture(50, 9))
    second = prepare(manifest_of(root), out, **SETTINGS)
    assert second.index.frames[0] == 9 and second.frames(0, [8]).shape == (1, 3, 32, 43)


WRONG = {
    "other settings": (lambda m, s, t: prepare(m, s, **{**SETTINGS, "short_side": 40}), r"holds a store with short_side=32 \(asked: 40\): choose another"),
    "other quality": (lambda m, s, t: prepare(m, s, **SETTINGS, quality=80), r"quality=90 \(asked: 80\)"),
    "other videos": (lambda m, s, t: prepare(m.head(4), s, **SETTINGS), r"another list of videos \(9 there, 4 asked"),
    "someone's files": (lambda m, s, t: ((t / "mine.txt").touch(), prepare(m, t, **SETTINGS)), r"holds other files \(e.g. mine.txt\)"),
    "the videos' folder": (lambda m, s, t: prepare(m, Path(m.path[0]).parents[1], **SETTINGS), r"holds other files \(e.g. a\)"),
    "a file": (lambda m, s, t: prepare(m, m.path[0], **SETTINGS), "it is a file, a store is a folder"),
    "below a file": (lambda m, s, t: prepare(m, m.path[0] + "/store", **SETTINGS), "cannot write .*not a folder"),
    "not writable": (lambda m, s, t: prepare(m, "/proc/store", **SETTINGS), "cannot write /proc/store"),
    "no manifest": (lambda m, s, t: prepare(m.drop(columns="split"), t, **SETTINGS), "no column 'split'"),
    "nothing to do": (lambda m, s, t: prepare(m.head(0), t, **SETTINGS), "manifest is empty"),
    "listed twice": (lambda m, s, t: prepare(pd.concat([m, m]), t, **SETTINGS), "lists the video 'a/a_0' twice"),
    "short side": (lambda m, s, t: prepare(m, t, **{**SETTINGS, "short_side": 2}), "short_side is an integer from 8 to 4096, not 2"),
    "max_frames": (lambda m, s, t: prepare(m, t, **SETTINGS, max_frames=0), "max_frames is an integer .* or None, not 0"),
    "quality": (lambda m, s, t: prepare(m, t, **SETTINGS, quality=101), "quality is an integer from 1 to 100, not 101"),
    "no folder": (lambda m, s, t: open_store(t / "x"), "there is no store at .*x: no such folder"),
    "no store": (lambda m, s, t: open_store(t), "there is no store at"),
    "unfinished": (lambda m, s, t: ((s / "store.json").unlink(), open_store(s)), "is unfinished: prepare it again"),
    "mark damaged": (lambda m, s, t: ((s / "store.json").write_text("{"), open_store(s)), "store.json is not valid JSON"),
    "mark of nothing": (lambda m, s, t: ((s / "store.json").write_text("[]"), open_store(s)), "store.json is damaged"),
    "index edited": (lambda m, s, t: ((s / "index.csv").write_text("video\n"), open_store(s)), "index.csv is missing or damaged"),
    "quarantine gone": (lambda m, s, t: ((s / "quarantine.csv").unlink(), open_store(s)), "quarantine.csv is missing or damaged"),
    "frames cut short": (lambda m, s, t: (os.truncate(s / "frames.lmdb", 8192), open_store(s)), "frames.lmdb is missing or cut short"),
}


@pytest.mark.parametrize("case", WRONG)
def test_messages(case, videos, copy, tmp_path):
    act, message = WRONG[case]
    (tmp_path / "new").mkdir()
    with pytest.raises(FsarError, match=message):
        act(manifest_of(videos), copy, tmp_path / "new")


def test_two_at_once(videos, tmp_path):
    (tmp_path / "out").mkdir()
    with fsar.data.store._locked(tmp_path / "out"), pytest.raises(FsarError, match="is being prepared by another process"):
        prepare(manifest_of(videos), tmp_path / "out", **SETTINGS)


def test_damaged_frames_are_found(copy):
    data = bytearray((copy / "frames.lmdb").read_bytes())
    start = data.index(b"\xff\xd8\xff", len(data) // 2)
    data[start:start + 2000] = bytes(2000)
    (copy / "frames.lmdb").write_bytes(data)
    with pytest.raises(FsarError, match="the frames of '.*' are damaged: delete the folder"):
        open_store(copy).check()


def limited(manifest, out):
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    try:
        prepare(manifest, out, **SETTINGS)
    except FsarError as e:
        (Path(out) / "message").write_text(str(e)[:300]) if Path(out).is_dir() else None
        os._exit(7)
    os._exit(0)


def test_full_disk(videos, tmp_path, store):
    process = multiprocessing.get_context("fork").Process(target=limited, args=(manifest_of(videos), tmp_path / "out"))
    process.start(), process.join(60)
    assert process.exitcode == 7
    message = (tmp_path / "out" / "message").read_text()
    (tmp_path / "out" / "message").unlink()
    assert message.startswith("cannot write ") and "frames.lmdb: " in message and "MB free on that disk" in message
    assert prepare(manifest_of(videos), tmp_path / "out", **SETTINGS).hash == store.hash  # with room again, it goes on


# updated when the list or the files change

def entries(store: Store) -> dict[bytes, bytes]:
    with fsar.data.store.open_frames(str(store.path / "frames.lmdb")).begin() as transaction:
        return {k: v for k, v in transaction.cursor() if k.endswith(b"f")}


def test_update_decodes_what_is_new_and_forgets_what_is_gone(tmp_path, capfd, monkeypatch):
    root = make_videos(tmp_path / "in", per_class=4)
    full = manifest_of(root)
    grown = prepare(full.drop(index=[1, 5]).reset_index(drop=True), tmp_path / "out", **SETTINGS)
    with pytest.raises(FsarError, match="another list of videos .*update it with --update"): prepare(full, tmp_path / "out", **SETTINGS)
    monkeypatch.delenv("FSAR_QUIET", raising=False)
    updated = prepare(full, tmp_path / "out", update=True, **{**SETTINGS, "progress": True})
    assert "10 of 12 done before" in capfd.readouterr().err
    whole = prepare(full, tmp_path / "whole", **SETTINGS)
    assert updated.hash == whole.hash != grown.hash and updated.index.equals(whole.index) and entries(updated) == entries(whole)
    fewer = prepare(full.head(8), tmp_path / "out", update=True, **SETTINGS)
    assert len(fewer) == 8 and len(entries(fewer)) == 8 and fewer.hash == prepare(full.head(8), tmp_path / "eight", **SETTINGS).hash


def test_update_takes_in_a_file_that_was_mended(tmp_path):
    root = make_videos(tmp_path / "in")
    whole = (root / "a" / "a_1.mp4").read_bytes()
    (root / "a" / "a_1.mp4").write_bytes(whole[:200])
    with pytest.warns(QuarantineWarning): assert len(prepare(manifest_of(root), tmp_path / "out", **SETTINGS).quarantine) == 1
    (root / "a" / "a_1.mp4").write_bytes(whole)
    mended = prepare(manifest_of(root), tmp_path / "out", update=True, **SETTINGS)
    assert not len(mended.quarantine) and mended.hash == prepare(manifest_of(root), tmp_path / "fresh", **SETTINGS).hash


def test_names_that_are_not_utf8(tmp_path):
    root = make_videos(tmp_path / "in")
    odd = os.fsdecode(os.fsencode(root / "a") + b"/caf\xe9.mp4")
    shutil.copy(root / "a" / "a_0.mp4", odd)
    Path(os.fsdecode(os.fsencode(root / "c") + b"/\xff.mp4")).write_text("no video")
    with pytest.warns(QuarantineWarning): store = prepare(manifest_of(root), tmp_path / "out", **SETTINGS)
    again = open_store(tmp_path / "out")
    assert len(again) == 10 and os.fsdecode(b"a/caf\xe9") in list(again.index.video) and list(again.quarantine.video) == [os.fsdecode(b"c/\xff")]
    again.check()
    assert torch.equal(again.frames(list(again.index.video).index(os.fsdecode(b"a/caf\xe9")), [0]), store.frames(list(again.index.video).index("a/a_0"), [0]))


def test_update_of_other_settings_is_refused(videos, copy):
    with pytest.raises(FsarError, match=r"short_side=32 \(asked: 40\)"): prepare(manifest_of(videos), copy, update=True, **{**SETTINGS, "short_side": 40})


def test_update_with_nothing_to_do_leaves_the_store(videos, copy, store):
    stamp = (copy / "store.json").stat().st_mtime_ns
    assert prepare(manifest_of(videos), copy, update=True, **SETTINGS).hash == store.hash and (copy / "store.json").stat().st_mtime_ns == stamp


# what a public benchmark lacks, and the room on the disk

def test_missing_videos_are_kept_and_counted(videos, tmp_path):
    manifest = manifest_of(videos)
    manifest.attrs |= {"benchmark": "ucf101", "train_size": 9154, "missing": (("a/x, y", "a", "train", ""), ("q/1", "q", "val", "there is q/1.part, …"))}
    store = prepare(manifest, tmp_path / "out", **SETTINGS)
    assert store.missing.to_numpy().tolist() == [list(m) for m in manifest.attrs["missing"]]
    assert store.settings["benchmark"] == "ucf101" and store.summary().loc["train", "videos"] == "6 of 7" and store.listed("val") == 1
    (store.path / "missing.csv").write_text("video,class,split,hint\n")
    with pytest.raises(FsarError, match="missing.csv is missing or damaged"): open_store(store.path)


def test_a_store_of_an_earlier_version_opens(copy):
    mark = fsar.data.store.read_json(copy / "store.json")
    mark.pop("missing"), (copy / "missing.csv").unlink()
    fsar.data.store.write_json(copy / "store.json", mark)
    assert len(open_store(copy).missing) == 0 and open_store(copy).listed("train") == 6


def test_no_room_is_seen_after_a_sample(tmp_path, monkeypatch):
    root = make_videos(tmp_path / "in", per_class=16)
    whole = prepare(manifest_of(root), tmp_path / "whole", **SETTINGS)
    free = sum(map(len, entries(whole).values())) // 2 + fsar.data.store.RESERVE  # half of what it takes
    monkeypatch.setattr(fsar.data.store.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, free))
    with pytest.raises(FsarError, match=r"out needs about \S+ MB more for 42 videos \(\S+ kB each\)"): prepare(manifest_of(root), tmp_path / "out", **SETTINGS)
    with fsar.data.store._writer(tmp_path / "out") as env: done = [r for r in fsar.data.store._records(env, manifest_of(root).video) if r]
    assert len(done) == 6 and {r["path"].split("/")[-2] for r in done} == {"a", "b", "c"}  # the sample, from all over the list, is not lost
    monkeypatch.undo()
    assert prepare(manifest_of(root), tmp_path / "out", **SETTINGS).hash == whole.hash


def test_the_estimate_is_near_the_truth(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("FSAR_QUIET", raising=False)
    said = []
    real = fsar.data.store._room
    monkeypatch.setattr(fsar.data.store, "_room", lambda out, sizes, rest: said.append((real(out, sizes, rest), sum(sizes), rest)) or real(out, sizes, rest))
    root = make_videos(tmp_path / "in", per_class=16)
    store = prepare(manifest_of(root), tmp_path / "out", **SETTINGS)
    (need, sample, rest), = said
    assert rest == 42 and abs(need / (sum(map(len, entries(store).values())) - sample) - 1) < 0.5


# read by many

class FirstFrames(Dataset):
    def __init__(self, store): self.store = store
    def __len__(self): return len(self.store)
    def __getitem__(self, row): return self.store.frames(row, [0, 3])


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_data_loading_workers(store, how):
    expected = torch.stack([store.frames(row, [0, 3]) for row in range(len(store))])
    loader = DataLoader(FirstFrames(store), batch_size=3, num_workers=2 if how == "fork" else 1, multiprocessing_context=how)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_pickles_small(store):
    clone = pickle.loads(pickle.dumps(store))
    assert torch.equal(clone.frames(2, [1]), store.frames(2, [1])) and clone.hash == store.hash


def test_reading_is_fast(store):
    rng = generator(0)
    times = []
    for _ in range(100):
        began = time.process_time()
        store.frames(int(rng.integers(9)), rng.integers(0, 6, 8))
        times.append(time.process_time() - began)
    assert np.median(times) < 0.002


# the real thing

def test_real_clips(real_clips, tmp_path):
    files = sorted(Path(real_clips).glob("*.*"))
    files = [f for f in files if f.suffix in (".mp4", ".avi")]
    manifest = pd.DataFrame({"video": [f.stem for f in files], "path": [str(f) for f in files], "class": "any", "split": "test", "source": [f.stem for f in files]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = prepare(manifest, tmp_path / "out", short_side=112, progress=False)
    assert len(store) == len(files) == 9 and store.index.frames.max() == 64 and (store.index[["height", "width"]].min(axis=1) == 112).all()
    decoded = dict(zip(store.index.video, store.index.decoded))
    assert sorted(n for v, n in decoded.items() if "wave" in v or "cartwheel" in v) == [48, 72, 74, 83]  # the headers promise one more
    assert all(store.frames(row, [0, store.index.frames[row] - 1]).float().std() > 1 for row in range(9))
