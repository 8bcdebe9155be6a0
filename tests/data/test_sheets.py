"""Contact sheets: every frame shown is the store's, names of any kind survive, limits are said, and nothing is overwritten."""
import base64
import io
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import fsar.data.sheets
from fsar.core.basics import FsarError
from fsar.data.sheets import SheetWarning, contact_sheet, left_out, plan, readable, shorten, strip, write_sheet
from fsar.data.store import Store, prepare
from fsar.data.video import spread, write_video

CLASSES = {"a": ("train", 5), "b": ("train", 3), "c": ("test", 4)}  # class → split, videos


def film(k: int, frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    "uint8 (F, H, W, 3): soft colours that drift, different for each k."
    t, y, x = np.ogrid[:frames, :height, :width]
    return np.stack([127 + 100 * np.sin(0.1 * (x + y * c + t * (k + 1)) + k) for c in (0, 1, 2)], -1).astype(np.uint8)


def make_store(root: Path, videos: list[tuple[str, str, str]], short_side: int = 32) -> Store:
    "A store of (class, file stem, split); an empty file for a stem that starts with 'broken'."
    rows = []
    (root / "files").mkdir(parents=True)
    for k, (name, stem, split) in enumerate(videos):
        path = root / "files" / f"{k}.mp4"
        path.touch() if stem.startswith("broken") else write_video(path, film(k))
        rows.append((f"{name}/{stem}", str(path), name, split, stem))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare(pd.DataFrame(rows, columns=["video", "path", "class", "split", "source"]), root / "store", short_side=short_side, workers=1, progress=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    videos = [(name, f"{name}_{k}", split) for name, (split, count) in CLASSES.items() for k in range(count)]
    return make_store(tmp_path_factory.mktemp("sheets"), [*videos, ("b", "broken_1", "train"), ("d", "broken_2", "test")])


@pytest.fixture
def hostile(store) -> Store:
    "The store under names that attack a page or cannot be encoded."
    names = ["<script>alert(1)</script>", "caf\udce9\udcff", "動作 και emoji 🎬", "line\nbreak\x00\x1b[31m", 'quote"\' onload=x', "n" * 400, "\u202eright to left", "&amp;", "%s{0}{x}", " ", "..", "../up"]
    with pd.option_context("mode.string_storage", "python"):  # the strings of pyarrow refuse such names
        index = store.index.assign(video=[f"{c}/{n}" for c, n in zip(store.index["class"], names)])
        index["class"] = index["class"].replace({"a": "<script>alert(2)</script>", "b": "\udcff & 動 " + "long " * 60, "c": '"><img src=x onerror=y>'})
        changed = replace(store, index=index, quarantine=store.quarantine.assign(reason="<b>bad\udc80</b>", video="<i>v"))
    changed.__dict__["_keys"] = store._keys  # the frames stay where they are
    return changed


class Page(HTMLParser):
    "Tags with their attributes, all text, and whether every tag was closed in order."
    VOID = {"meta", "img", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data):
        if self.open and self.open[-1] != "style": self.words.append(data)

    @property
    def text(self) -> str: return " ".join(self.words)
    def all(self, tag: str) -> list[dict]: return [attrs for t, attrs in self.tags if t == tag]


def jpeg_of(uri: str) -> bytes:
    head, data = uri.split(",")
    assert head == "data:image/jpeg;base64"
    return base64.b64decode(data, validate=True)


def find(sheet: np.ndarray, frame: np.ndarray) -> list[tuple[int, int]]:
    "Every (row, column) at which `frame` stands in `sheet`, pixel for pixel."
    h, w = frame.shape[:2]
    same = np.all(sheet[:len(sheet) - h + 1, :sheet.shape[1] - w + 1] == frame[0, 0], -1)
    return [(y, x) for y, x in np.argwhere(same).tolist() if np.array_equal(sheet[y:y + h, x:x + w], frame)]


# the picture

@pytest.mark.parametrize("height", [32, 20, 50])
def test_every_frame_is_the_store_s(store, height):
    sheet = np.asarray(contact_sheet(store, videos=3, frames=4, height=height))
    places = {}
    for s in plan(store, videos=3).sections:
        assert len(s.rows) == 3
        for row in s.rows:
            frames = store.frames(row, spread(9, 4)).movedim(1, -1).numpy()
            scaled = [np.asarray(Image.fromarray(f).resize((round(height / 32 * 48), height), Image.Resampling.LANCZOS)) for f in frames]
            found = [find(sheet, f) for f in scaled]
            assert all(len(f) == 1 for f in found), f"video {row}"
            places[row] = [f[0] for f in found]
            ys, xs = zip(*places[row])
            assert len(set(ys)) == 1 and list(xs) == sorted(xs)  # one strip, in the order of time
    assert len({p[0] for p in places.values()}) == 9  # no strip covers another
    tops = {s.name: {places[r][0][0] for r in s.rows} for s in plan(store, videos=3).sections}
    assert max(tops["a"]) < min(tops["b"]) and max(tops["b"]) < min(tops["c"])


def test_strips_share_rows_and_wrap(store):
    sheet = np.asarray(contact_sheet(store, classes="a", frames=8, height=64))
    tops = [find(sheet, np.asarray(Image.fromarray(store.frames(r, [0])[0].movedim(0, -1).numpy()).resize((96, 64), Image.Resampling.LANCZOS)))[0] for r in range(5)]
    assert [y for y, _ in tops] == sorted(y for y, _ in tops) and len({y for y, _ in tops}) == 3  # 782 pixels a strip: two in a row, two, one
    assert sheet.shape[1] <= fsar.data.sheets.WIDTH + 2 * fsar.data.sheets.MARGIN


def test_one_frame_and_more_than_there_are(store):
    assert strip(store, 0, 1, 32).size == (48, 32)
    assert strip(store, 0, 99, 32).size == (9 * 50 - 2, 32)


def test_a_panorama_keeps_its_shape_and_does_not_burst_the_sheet(tmp_path):
    write_video(tmp_path / "wide.mp4", np.zeros((3, 32, 480, 3), np.uint8))
    wide = prepare(pd.DataFrame([("w/wide", str(tmp_path / "wide.mp4"), "w", "test", "wide")], columns=["video", "path", "class", "split", "source"]), tmp_path / "s", short_side=32, workers=1, progress=False)
    width, height = strip(wide, 0, 1, 72).size
    assert width == 180 and abs(width / height - 15) < 0.01 * 15


# what is chosen

def test_videos_are_spread_over_the_list_or_drawn(store):
    def chosen(**k): return plan(store, classes=["a"], videos=3, **k).sections[0].rows.tolist()
    assert chosen() == [0, 2, 4] == chosen()
    drawn = {tuple(chosen(seed=seed)) for seed in range(20)}
    assert len(drawn) > 3 and all(sorted(d) == list(d) and len(set(d)) == 3 for d in drawn)
    assert chosen(seed=7) == chosen(seed=7)


def test_a_single_class_shows_more_than_each_of_several(store, monkeypatch):
    monkeypatch.setattr(fsar.data.sheets, "FEW", 2)
    monkeypatch.setattr(fsar.data.sheets, "MANY", 3)
    assert [len(s.rows) for s in plan(store).sections] == [2, 2, 2]
    (one,) = plan(store, classes="a").sections
    assert one.facts == "train · 3 of 5 videos" and "3 of 5 videos" in plan(store, classes="a").notes()[0]
    assert [s.name for s in plan(store, split="train").sections] == ["a", "b"] and plan(store, split="test", classes=["c"]).sections[0].facts == "test · 3 of 4 videos"


@pytest.mark.parametrize("limit, shown", [(12, [5, 3, 4]), (11, [4, 3, 4]), (7, [2, 2, 2]), (3, [1, 1, 1]), (2, [1, 1]), (1, [1])])
def test_the_limit_holds_and_is_said(store, limit, shown):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sheet = plan(store, videos=5, limit=limit)
    assert [len(s.rows) for s in sheet.sections] == shown
    if limit == 12:
        assert not caught and not sheet.cut
        return
    (warning,) = caught
    text = str(warning.message)
    assert warning.category is SheetWarning and text == sheet.cut and text in sheet.notes()
    assert f"at most {limit} videos" in text and f"{sum(shown)} of 12 videos" in text and "raise the limit" in text
    assert ("of 3 classes" in text) == (len(shown) < 3)
    assert readable(text)[:40] in Page(sheet.page()).text


@pytest.mark.parametrize("asked, words", [
    ({"split": "validation"}, ["validation", "train", "test"]),
    ({"classes": "aa"}, ["no class 'aa'", "Did you mean 'a'?", "a, b, c"]),
    ({"classes": ["a", "nonsense"]}, ["no class 'nonsense'"]),
    ({"split": "test", "classes": "a"}, ["'a'", "in train", "not in test"]),
    ({"classes": "d"}, ["no video to show", "all 1 are left out", "d/broken_2"]),
    ({"videos": 0}, ["videos", "from 1", "not 0"]), ({"frames": 65}, ["frames", "64", "65"]), ({"height": 3.5}, ["height", "3.5"]), ({"limit": -1}, ["limit", "-1"])])
def test_errors_say_what_would_be_accepted(store, tmp_path, asked, words):
    for draw in (contact_sheet, lambda store, **k: write_sheet(store, tmp_path / "new", **k)):
        with pytest.raises(FsarError) as e: draw(store, **asked)
        assert all(w in str(e.value) for w in words), e.value
    assert not (tmp_path / "new").exists()


# what is left out

def test_quarantine_and_missing_are_listed(store):
    assert left_out(store).video.tolist() == ["b/broken_1", "d/broken_2"] and left_out(store, "test").video.tolist() == ["d/broken_2"]
    assert left_out(store, "train", ["a"]).empty
    more = replace(store, missing=pd.DataFrame([("c/gone", "c", "test", "seen as c/gone.txt"), ("a/lost", "a", "train", "")], columns=["video", "class", "split", "hint"]))
    assert left_out(more).reason.tolist()[2:] == ["not found: seen as c/gone.txt", "not found"]
    text = Page(plan(more).page()).text
    assert all(v in text for v in ("b/broken_1", "d/broken_2", "c/gone", "seen as", "4 videos")) and "a/lost" not in Page(plan(more, split="test").page()).text
    bare, listed = (contact_sheet(s, split="train", classes="a").height for s in (store, more))
    assert listed > bare


def test_long_lists_are_cut_with_a_word(store):
    many = replace(store, quarantine=pd.DataFrame([(f"a/v{k}", "/x", "a", "train", "bad") for k in range(1234)], columns=["video", "path", "class", "split", "reason"]))
    page = Page(plan(many).page())
    assert len(page.all("tr")) == 1001 and "234 more" in page.text
    assert contact_sheet(many).height < contact_sheet(store).height + 25 * 20


# names

def test_names_of_any_kind(hostile, tmp_path):
    sheet = plan(hostile, videos=9)
    picture, text = sheet.picture(), sheet.page()
    assert picture.width <= fsar.data.sheets.WIDTH + 2 * fsar.data.sheets.MARGIN
    text.encode("utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "nav", "b", "a", "label", "input", "main", "section", "div", "figure", "img", "figcaption", "small", "table", "tr", "th", "td"}
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs) and not page.open
    for words in ("<script>alert(1)</script>", "<script>alert(2)</script>", "caf\\xe9\\xff", "動作", "line\\nbreak\\x00\\x1b[31m", "&amp;", "%s{0}{x}", "\\u202eright", '"><img src=x onerror=y>', "<b>bad\\x80</b>"):
        assert words in page.text, words
    png, html = write_sheet(hostile, tmp_path, classes=['"><img src=x onerror=y>'])
    assert png.parent == tmp_path and html.suffix == ".html" and not set(png.name) & set('"<>/= ')


def test_readable_and_shorten():
    assert readable("ä b") == "ä b" and readable("\udc80\t") == "\\x80\\t"
    font = fsar.data.sheets._font(12)
    for width in (0, 5, 40, 200):
        short = shorten("beginning" + "-" * 300 + "end", width, font)
        assert short == "…" or font.getlength(short) <= width
    assert short.startswith("beginning") and short.endswith("end") and "…" in short


# the page

def test_page_shows_the_stored_bytes(store):
    sheet = plan(store, videos=3, frames=4)
    page = Page(sheet.page())
    rows = [r for s in sheet.sections for r in s.rows]
    assert not page.open and len(page.all("figure")) == len(rows) == 9
    uris = [attrs["src"] for attrs in page.all("img")]
    assert [jpeg_of(u) for u in uris] == [j for r in rows for j in store.jpegs(r, spread(9, 4))]
    shown = np.asarray(Image.open(io.BytesIO(jpeg_of(uris[5]))))
    assert np.array_equal(shown, store.frames(rows[1], [spread(9, 4)[1]])[0].movedim(0, -1))
    assert all("alt" in attrs for attrs in page.all("img")) and sum(bool(attrs["alt"]) for attrs in page.all("img")) == 9
    ids = {attrs.get("id") for _, attrs in page.tags}
    links = [attrs["href"] for attrs in page.all("a")]
    assert len(links) == 4 and all(link[0] == "#" and link[1:] in ids for link in links)
    assert not any(key in ("href", "src") and not value.startswith(("#", "data:")) for _, attrs in page.tags for key, value in attrs.items())
    for words in ("train · 3 of 5 videos", "9 frames, 0.4 s", "a_0", "d/broken_2"): assert words in page.text, words
    assert all(f"--n: {4};" in attrs["style"] for attrs in page.all("figure"))


def test_large_frames_are_scaled_for_the_page(tmp_path):
    large = make_store(tmp_path, [("a", "v", "test")], short_side=200)
    (jpeg,) = [jpeg_of(attrs["src"]) for attrs in Page(plan(large, frames=1, height=50).page()).all("img")]
    picture = Image.open(io.BytesIO(jpeg))
    assert picture.size == (150, 100)
    wanted = Image.fromarray(large.frames(0, [0])[0].movedim(0, -1).numpy()).resize((150, 100), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(wanted)).mean() < 3


def test_jpegs_refuse_what_is_not_there(store):
    for row, indices in ((99, [0]), (-1, [0]), (0, [9]), (0, [-1])):
        with pytest.raises(IndexError): store.jpegs(row, indices)
    lost = replace(store)
    lost.__dict__["_keys"] = [b"x" * 16] * len(store)
    with pytest.raises(FsarError, match="damaged"): lost.jpegs(0, [0])


# into a folder

def test_files_are_whole_named_and_never_replaced_unasked(store, tmp_path):
    png, html = write_sheet(store, tmp_path / "deep" / "folder", split="train", classes=["a"])
    assert (png.name, html.name) == ("store_train_a.png", "store_train_a.html")
    with Image.open(png) as image: assert np.array_equal(np.asarray(image), np.asarray(contact_sheet(store, split="train", classes=["a"])))
    assert html.read_text(encoding="utf-8") == plan(store, split="train", classes=["a"]).page()
    html.write_text("mine")
    png.unlink()
    with pytest.raises(FsarError, match="store_train_a.html exists already"): write_sheet(store, png.parent, split="train", classes="a")
    assert html.read_text() == "mine" and not png.exists()
    write_sheet(store, png.parent, split="train", classes="a", overwrite=True)
    assert png.exists() and html.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert {f.name for f in png.parent.iterdir()} == {png.name, html.name}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/x", "../x"])
def test_a_name_stays_in_the_folder(store, tmp_path, name):
    with pytest.raises(FsarError, match="plain file name"): write_sheet(store, tmp_path, name=name)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(store, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FsarError, match="cannot write .*file"): write_sheet(store, tmp_path / "file")


# real data

def test_real_clips(real_clips, tmp_path):
    files = sorted(real_clips.iterdir())
    table = pd.DataFrame([(f"clips/{f.stem}", str(f), "clips", "test", f.stem) for f in files], columns=["video", "path", "class", "split", "source"])
    clips = prepare(table, tmp_path / "clips", short_side=64, max_frames=8, workers=1, progress=False)
    png, html = write_sheet(clips, tmp_path / "sheet", frames=4)
    page = Page(html.read_text(encoding="utf-8"))
    assert len(page.all("figure")) == len(files) == 9 and all(f.stem in page.text for f in files)
    for attrs in page.all("img"): Image.open(io.BytesIO(jpeg_of(attrs["src"]))).load()
    with Image.open(png) as image: image.load()
