"""Archives: what they hold comes out; a bad one of each kind, for each rule, leaves everything as it was."""
import contextlib
import gzip
import io
import itertools
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import rarfile

from fsar.data import archives
from fsar.data.archives import STAGE, find_archives, unpack
from fsar.core.basics import FsarError

# ---- writers: zip and RAR by hand, so that every field can lie ----


@dataclass(frozen=True)
class M:
    "A member to write; what is None follows from the data."
    name: str
    data: bytes = b""
    kind: str = "file"           # file, folder, symlink, hardlink, device, fifo
    target: str = "../../x"      # of a link
    size: int | None = None      # announced
    crc: int | None = None
    encrypted: bool = False
    method: int = 0              # 0 stored; zip: 8 deflate; rar: 1..5, then the data are taken as they are
    mode: int = 0o644

    @property
    def announced(self) -> int: return len(self.data) if self.size is None else self.size
    @property
    def checksum(self) -> int: return zlib.crc32(self.data) if self.crc is None else self.crc
    @property
    def unix(self) -> int: return {"symlink": stat.S_IFLNK, "device": stat.S_IFCHR, "fifo": stat.S_IFIFO, "folder": stat.S_IFDIR}.get(self.kind, stat.S_IFREG) | self.mode


def make_zip(path: Path, members: list[M]) -> Path:
    body, central = b"", b""
    for m in members:
        name = m.name.encode("utf-8", "surrogateescape")
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        data = deflate.compress(m.data) + deflate.flush() if m.method == 8 else m.data
        fixed = struct.pack("<HHHHHIIIHH", 20, 0x800 | m.encrypted, m.method, 0, 0x21, m.checksum, len(data), m.announced, len(name), 0)
        central += b"PK\x01\x02" + struct.pack("<H", 3 << 8 | 20) + fixed + struct.pack("<HHHII", 0, 0, 0, m.unix << 16, len(body)) + name
        body += b"PK\x03\x04" + fixed + name + data
    path.write_bytes(body + central + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(central), len(body), 0))
    return path


def make_tar(path: Path, members: list[M], mode: str = "w") -> Path:
    kinds = {"file": tarfile.REGTYPE, "folder": tarfile.DIRTYPE, "symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "fifo": tarfile.FIFOTYPE}
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
        for m in members:
            info = tarfile.TarInfo(m.name)
            info.type, info.mode, info.linkname = kinds[m.kind], m.mode, m.target if "link" in m.kind else ""
            if "\0" in m.name: info.pax_headers = {"path": m.name}  # in the plain header it would end the name
            if m.kind == "file": info.size = m.announced
            archive.addfile(info, io.BytesIO(m.data) if m.kind == "file" else None)
    return path


def number(n: int) -> bytes: return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + number(n >> 7)


def block5(kind: int, flags: int, fields: bytes, data: bytes = b"", extra: bytes = b"") -> bytes:
    "A RAR 5 block: CRC-32, length, type, flags, sizes of extra and data, fields, extra; then the data."
    body = number(kind) + number(flags) + (number(len(extra)) if flags & 1 else b"") + (number(len(data)) if flags & 2 else b"") + fields + extra
    return struct.pack("<I", zlib.crc32(number(len(body)) + body)) + number(len(body)) + body + data


def record5(kind: int, data: bytes) -> bytes: return number(len(number(kind) + data)) + number(kind) + data


def make_rar5(path: Path, members: list[M], redirection: int = 1, file_flags: int = 0, more: bytes = b"", main: bytes = block5(1, 0, number(0)), end: bytes = block5(5, 0, number(0))) -> Path:
    blocks = []
    for m in members:
        name, extra = m.name.encode("utf-8", "surrogateescape"), more
        if m.kind in ("symlink", "hardlink"): extra += record5(5, number(4 if m.kind == "hardlink" else redirection) + number(0) + number(len(m.target)) + m.target.encode())
        if m.encrypted: extra += record5(1, number(0) + number(0) + bytes([15]) + bytes(32))
        fields = (number(4 | file_flags | (m.kind == "folder")) + number(m.announced) + number(m.unix) + struct.pack("<I", m.checksum) + number(m.method << 7) + number(1) + number(len(name)) + name)
        blocks.append(block5(2, 2 | bool(extra), fields, m.data, extra))
    path.write_bytes(b"Rar!\x1a\x07\x01\x00" + main + b"".join(blocks) + end)
    return path


def block4(kind: int, flags: int, fields: bytes, data: bytes = b"") -> bytes:
    "A RAR 3 and 4 block: 16 bits of CRC-32, type, flags, length of the header, fields; then the data."
    header = struct.pack("<BHH", kind, flags, 7 + len(fields)) + fields
    return struct.pack("<H", zlib.crc32(header) & 0xFFFF) + header + data


END4 = block4(0x7B, 0x4000, b"")


def make_rar4(path: Path, members: list[M], main_flags: int = 0, file_flags: int = 0, end: bytes = END4) -> Path:
    blocks = [block4(0x73, main_flags, bytes(6))]
    for m in members:
        name = m.name.encode("utf-8", "surrogateescape")
        data = m.target.encode() if m.kind == "symlink" else m.data
        flags = 0x8000 | 0x200 | file_flags | (4 if m.encrypted else 0) | (0xE0 if m.kind == "folder" else 0)  # a length follows, the name is UTF-8
        large = b""
        if m.announced >> 32: flags, large = flags | 0x100, struct.pack("<II", 0, m.announced >> 32)
        size = len(data) if m.size is None else m.size & 0xFFFFFFFF
        crc = zlib.crc32(data) if m.crc is None else m.crc
        blocks.append(block4(0x74, flags, struct.pack("<IIBIIBBHI", len(data), size, 3, crc, 0x21 << 16, 29, 0x30 + m.method, len(name), m.unix) + large + name, data))
    path.write_bytes(b"Rar!\x1a\x07\x00" + b"".join(blocks) + end)
    return path


MAKERS = {"zip": make_zip, "tar": make_tar, "tar.gz": lambda p, m: make_tar(p, m, "w:gz"), "tar.bz2": lambda p, m: make_tar(p, m, "w:bz2"),
          "tar.xz": lambda p, m: make_tar(p, m, "w:xz"), "rar4": make_rar4, "rar5": make_rar5}
KINDS = ["zip", "tar", "tar.gz", "rar4", "rar5"]  # those with a reader of their own

GOOD = [M("wave/!()#[]&+;~@.avi", b"a" * 3000), M("wave/-dash first.avi", b"b" * 10), M("wave/Ünïcødé 手.avi", b"c" * 77), M("wave/..dots..avi", b"d"), M("--/ .avi", b"e"),
        M("empty.avi", b"")]

# ---- the world around ----


def snapshot(folder: Path) -> dict[str, tuple]:
    "Everything below a folder: kind, mode, content, time of change of files."
    def what(p: Path) -> tuple:
        s = p.lstat()
        if stat.S_ISLNK(s.st_mode): return "link", os.readlink(p)
        return ("folder", s.st_mode) if stat.S_ISDIR(s.st_mode) else ("file", s.st_mode, p.read_bytes(), s.st_mtime_ns)
    return {str(p.relative_to(folder)): what(p) for p in sorted(folder.rglob("*"))}


def tree(folder: Path) -> dict[str, bytes | None]:
    return {p.relative_to(folder).as_posix(): None if p.is_dir() else p.read_bytes() for p in folder.rglob("*")}


def contents(members: list[M]) -> dict[str, bytes | None]:
    "The tree that members make."
    paths = {m.name.strip("/"): None if m.kind == "folder" else m.data for m in members}
    return paths | {p.as_posix(): None for path in paths for p in Path(path).parents if p.as_posix() != "."}


@pytest.fixture
def world(tmp_path, monkeypatch):
    "A folder with something beside the target, and no program for RAR, whatever the machine has."
    for name in ("in", "beside"): (tmp_path / name).mkdir()
    (tmp_path / "beside" / "sentinel").write_text("mine")
    (tmp_path / "x").write_text("mine too")
    (tmp_path / "no programs").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    return tmp_path


@contextlib.contextmanager
def nothing_written(early: bool):
    "With `early`, it is an error even to make the folder set apart."
    with pytest.MonkeyPatch.context() as patch:
        if early: patch.setattr(archives, "_staging", lambda out: pytest.fail("it came to writing"))
        yield


def refused(world: Path, archive, match: str | None = None, named: bool = True, early: bool = True, **options) -> None:
    "Refused with the target absent, and with one that holds something; nothing changes at all, and (early) it does not even come to writing."
    for out in ("new/deep/out", "out"):
        if out == "out":
            (world / out).mkdir(exist_ok=True)
            (world / out / "mine.avi").write_text("mine")
        before = snapshot(world)
        with pytest.raises(FsarError, match=match) as e, nothing_written(early): unpack(archive, world / out, progress=False, **options)
        assert str((archive if isinstance(archive, Path) else archive[0]) if named else world / out) in str(e.value)
        assert snapshot(world) == before


def refused_late(*args, **options) -> None: refused(*args, early=False, **options)


def first(world: Path, kind: str, members: list[M], **options) -> Path:
    "An archive whose first member is harmless: it must not be written either."
    return MAKERS[kind](world / "in" / f"bad.{kind}", [M("first.avi", b"first"), *members], **options)

# ---- what comes out ----


@pytest.mark.parametrize("kind", MAKERS)
def test_round_trip(kind, world):
    archive = MAKERS[kind](world / "in" / "misnamed.txt", [*GOOD, M("empty folder/", kind="folder"), M("./dot//path.avi", b"f")])
    table = unpack(archive, world / "out", progress=False)
    assert tree(world / "out") == contents([*GOOD, M("empty folder", kind="folder"), M("dot/path.avi", b"f")])
    assert table.to_dict("records") == [{"archive": str(archive), "outcome": "unpacked", "files": 7, "bytes": 3090, "example": "wave/!()#[]&+;~@.avi"}]
    assert not (world / "out" / STAGE).exists() and (world / "beside" / "sentinel").read_text() == "mine"


def test_the_writers_are_understood_by_the_libraries(world):
    assert zipfile.ZipFile(make_zip(world / "a", [replace(m, method=8) for m in GOOD])).testzip() is None
    for make in (make_rar4, make_rar5):
        with rarfile.RarFile(make(world / "b", [*GOOD, M("f", kind="folder"), M("s", kind="symlink", target="here")]), errors="strict") as archive:
            archive.testrar()
            assert {i.filename: archive.read(i) for i in archive.infolist() if i.is_file()} == {m.name: m.data for m in GOOD}
            assert archive.getinfo("f").is_dir() and archive.getinfo("s").is_symlink() and archive.read("s") == b"here"


def test_deflated_members_and_a_text_encoding_that_is_not_utf8(world):
    unpack(make_zip(world / "in" / "a.zip", [replace(m, method=8) for m in GOOD]), world / "out", progress=False)
    assert tree(world / "out") == contents(GOOD)
    unpack(make_tar(world / "in" / "a.tar", [M("\udce9t\udce9.avi", b"x")]), world / "latin", progress=False)
    assert os.listdir(os.fsencode(world / "latin")) == [b"\xe9t\xe9.avi"]


@pytest.mark.parametrize("kind", KINDS)
def test_modes_are_plain(kind, world):
    old = os.umask(0o027)
    try: unpack(MAKERS[kind](world / "in" / "a", [M("d", kind="folder", mode=0o7777), M("d/x.sh", b"x", mode=0o6777)]), world / "out", progress=False)
    finally: os.umask(old)
    assert stat.S_IMODE((world / "out" / "d").stat().st_mode) == 0o750 and stat.S_IMODE((world / "out" / "d" / "x.sh").stat().st_mode) == 0o640


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_parts_of_one_stream(mode, world):
    whole = make_tar(world / "in" / "whole", [replace(m, data=random.Random(k).randbytes(4000)) for k, m in enumerate(GOOD)], mode).read_bytes()
    cuts = [0, 1000, 1001, 9000, 20000, len(whole)]
    parts = []
    for k, (a, b) in enumerate(itertools.pairwise(cuts)):
        parts.append(world / "in" / f"20bn-something-something-v2-{k:02}")
        parts[-1].write_bytes(whole[a:b])
    unpack(parts, world / "out", progress=False)
    assert len(tree(world / "out")) == 8 and (world / "out" / GOOD[0].name).stat().st_size == 4000
    for wrong in (parts[:-1], parts[:2] + parts[3:], [parts[0], parts[2], parts[1], *parts[3:]], [*parts, parts[-2]]): refused(world, wrong)
    with pytest.raises(FsarError, match="is no archive"): unpack(parts[1:], world / "new", progress=False)


def test_several_archives_of_different_kinds(world):
    some = [MAKERS[kind](world / "in" / kind, [M(f"{kind}/x.avi", kind.encode())]) for kind in MAKERS]
    assert list(unpack(some, world / "out", progress=False).files) == [1] * len(MAKERS)
    assert tree(world / "out") == contents([M(f"{kind}/x.avi", kind.encode()) for kind in MAKERS])


def test_what_is_no_archive(world):
    (world / "in" / "notes.zip").write_text("text")
    (world / "in" / "x.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    (world / "in" / "empty").write_bytes(b"")
    (world / "in" / "text.gz").write_bytes(gzip.compress(b"no tar" * 1000))
    os.mkfifo(world / "in" / "pipe")
    for name, match in (("notes.zip", "is no archive: zip, tar"), ("x.7z", "is a 7-Zip archive"), ("empty", "is no archive"), ("absent", "is missing"), ("pipe", "name the archive file"),
                        ("text.gz", "cannot be read"), ("", "is a folder")):
        with pytest.raises(FsarError, match=match): unpack(world / "in" / name, world / "out", progress=False)
    with pytest.raises(FsarError, match="no archive is named"): unpack([], world / "out", progress=False)
    assert not (world / "out").exists()


def test_macos_files_are_left_out_and_counted(world):
    table = unpack(first(world, "zip", [M("__MACOSX/a/x.avi", b"1"), M("a/._y.avi", b"2"), M("a/.DS_Store", b"3")]), world / "out", progress=False)
    assert tree(world / "out") == {"first.avi": b"first"} and list(table.files) == [1, 3] and "macOS" in table.outcome[1]
    refused(world, first(world, "zip", [M("__MACOSX/../../x", b"1")]), r"'\.\.' in its path")


def test_an_archive_without_files(world):
    assert unpack(make_zip(world / "in" / "a.zip", []), world / "out", progress=False).outcome.tolist() == ["holds no file"]

# ---- what is refused before anything is written ----

NAMES = {"absolute": ("/tmp/x", "absolute path"), "drive": ("C:/x", "absolute path"), "drive without slash": ("C:x", "absolute path"), "UNC": (r"\\host\share\x", "absolute path"),
         "UNC with slashes": ("//host/share/x", "absolute path"), "backslash": (r"a\..\..\x", r"backslash|'\.\.'"), "up": ("../x", r"'\.\.' in"), "up later": ("a/../../x", r"'\.\.' in"),
         "up inside": ("a/../x", r"'\.\.' in"), "only up": ("..", r"'\.\.' in"), "newline": ("a\nb", "control character"), "escape": ("a\x1b[2Jb", "control character"),
         "long step": ("x" * 256, "too long"), "long": ("/".join(["x" * 200] * 6), "too long"), "the stage": (f"{STAGE}/1", "fsar needs itself"), "the stage's other case": (STAGE.upper(), "fsar needs itself")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_names(kind, name, world):
    refused(world, first(world, kind, [M(NAMES[name][0], b"evil")]), "nothing was unpacked" if kind == "rar4" and name == "backslash" else NAMES[name][1])
    if name not in ("long step", "long"): refused(world, first(world, kind, [M(NAMES[name][0], kind="folder")]), NAMES[name][1])


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_nul_in_a_name(kind, world): refused(world, first(world, kind, [M("a\0/../../x", b"evil")]), "control character")


@pytest.mark.parametrize("kind", ["rar4", "rar5"])
def test_a_nul_ends_a_name_in_rar(kind, world):
    unpack(MAKERS[kind](world / "in" / "a.rar", [M("a\0/../../x", b"x")]), world / "out", progress=False)  # rarfile cuts the name; what is left is judged
    assert tree(world / "out") == {"a": b"x"}


@pytest.mark.parametrize("kind, what", [(k, w) for k in KINDS for w in ("symlink", "hardlink", "device", "fifo") if w != "hardlink" or k not in ("zip", "rar4")])  # those have no hard links
def test_only_files_and_folders(kind, what, world):
    for target in ("/etc/passwd", "../x", "first.avi"):
        refused(world, first(world, kind, [M("a", kind=what, target=target)]), "links are never made" if "link" in what else "is a (device|named pipe)")
        refused(world, first(world, kind, [M("a", kind=what, target=target), M("a/b.avi", b"through the link")]))


@pytest.mark.parametrize("redirection", [1, 2, 3, 4, 5])
def test_every_redirection_of_rar5(redirection, world): refused(world, first(world, "rar5", [M("a", kind="symlink", target="first.avi")], redirection=redirection), "links are never made")


def test_sparse_and_unknown_members_of_tar(world):
    for kind, match in ((b"S", "sparse|cannot be read"), (b"Z", "unknown type"), (b"V", "unknown type")):
        archive = make_tar(world / "in" / "a.tar", [M("first.avi", b"x"), M("a.avi", b"y")])
        raw = bytearray(archive.read_bytes())
        raw[1024 + 156:1024 + 157] = kind
        archive.write_bytes(checksums(raw, [1024]))
        refused(world, archive, match)
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("a.avi")
        info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1000000"}
        file.addfile(info)
    refused(world, archive, "sparse")


@pytest.mark.parametrize("kind", KINDS)
def test_two_members_in_one_place(kind, world):
    refused(world, first(world, kind, [M("a/x.avi", b"1"), M("a/x.avi", b"2")]), "same place")
    refused(world, first(world, kind, [M("a/x.avi", b"1"), M("./a//x.avi", b"1")]), "same place")
    refused(world, first(world, kind, [M("a", b"1"), M("a/x.avi", b"2")]), "needs a folder where there is a file")
    refused(world, first(world, kind, [M("a/b/x.avi", b"1"), M("a", b"2")]), "has the place of a folder that is needed by")
    refused(world, first(world, kind, [M("a", kind="folder"), M("a", b"2")]), "has the place of a folder|needs a folder|same place")


def test_two_archives_with_one_place(world):
    pair = [make_zip(world / "in" / "a.zip", [M("x.avi", b"1")]), make_tar(world / "in" / "b.tar", [M("x.avi", b"2")])]
    before = snapshot(world)
    with pytest.raises(FsarError, match=r"b\.tar is refused.*a\.zip.*folder of its own"): unpack(pair, world / "out", progress=False)
    assert snapshot(world) == before


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_differ_in_case_only(kind, world, monkeypatch):
    archive = MAKERS[kind](world / "in" / "a", [M("a/X.avi", b"1"), M("a/x.avi", b"2"), M("a/é.avi", b"3"), M("a/e\u0301.avi", b"4")])
    unpack(archive, world / "two", progress=False)  # this disk tells them apart
    assert len(tree(world / "two")) == 5
    monkeypatch.setattr(archives, "_folds_case", lambda out: True)
    refused(world, archive, "same place")
    refused(world, MAKERS[kind](world / "in" / "a", [M("A/1.avi", b"1"), M("a/2.avi", b"2")]), "cannot tell")


def test_case_is_found_out_without_writing(world, monkeypatch):
    assert not archives._folds_case(world / "new" / "out")
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "samefile", lambda self, other: True)
    assert archives._folds_case(world / "new" / "out")


def test_encrypted(world):
    for kind in ("zip", "rar4", "rar5"): refused(world, first(world, kind, [M("a.avi", b"secret", encrypted=True)]), "is encrypted: unpack it by hand")
    refused(world, make_rar4(world / "in" / "a", [M("a.avi", b"x")], main_flags=0x80), "is encrypted")  # the headers too
    refused(world, make_rar5(world / "in" / "a", [M("a.avi", b"x")], main=block5(4, 0, number(0) + number(0) + bytes([15]) + bytes(16))), "is encrypted")


def test_other_things_that_rar_can_hold(world):
    refused(world, make_rar4(world / "in" / "a", [M("a.avi", b"x")], main_flags=1), "one of several volumes")
    refused(world, make_rar4(world / "in" / "a", [M("a.avi;1", b"x")], file_flags=0x800), "older version")
    refused(world, make_rar5(world / "in" / "a", [M("a.avi", b"x")], more=record5(4, number(0) + number(1))), "older version")
    refused(world, make_rar5(world / "in" / "a", [M("a.avi", b"x")], file_flags=8), "does not announce its size")
    refused(world, first(world, "rar5", [M("a.avi", b"x" * 10, size=9)]), "announces 9 bytes and holds 10")
    refused(world, first(world, "rar4", [M("a.avi", b"x" * 10, size=11)]), "announces 11 bytes and holds 10")


def test_a_zip_method_python_has_not(world): refused(world, first(world, "zip", [M("a.avi", b"x", method=9)]), "compressed by method 9")


@pytest.mark.parametrize("kind", KINDS)
def test_bounds(kind, world):
    archive = first(world, kind, [M(f"{k}.avi", b"x" * 100) for k in range(9)])
    refused(world, archive, r"'8\.avi' brings the sum over max_bytes=904", max_bytes=904)
    refused(world, archive, r"'8\.avi' brings the number of members over max_files=9", max_files=9)
    unpack(archive, world / "fits", max_bytes=905, max_files=10, progress=False)
    for name in ("max_bytes", "max_files"):
        with pytest.raises(FsarError, match=f"{name} is a positive number, not 0"): unpack(archive, world / "out", **{name: 0})


def test_bombs(world):
    refused(world, first(world, "zip", [M("a.avi", bytes(70 << 20), method=8)]), "200 times its size")
    refused(world, first(world, "tar.gz", [M("a.avi", bytes(70 << 20))]), "200 times its size")
    for kind in ("rar4", "rar5"):
        (world / "no programs" / "unrar").write_text("#!/bin/sh\nexit 0\n")
        (world / "no programs" / "unrar").chmod(0o755)
        refused(world, first(world, kind, [M("a.avi", b"x", size=1 << 40, method=3)]), "200 times its size", max_bytes=1 << 50)


def test_a_bomb_in_the_headers_of_tar(world, monkeypatch):
    "A pax header of 200 MB of zeros, and thousands of members without content: stopped before memory or time are spent."
    monkeypatch.setattr(archives, "SMALL", 4 << 20)
    monkeypatch.setattr(archives, "RATIO", 50)
    header = tarfile.TarInfo("p")
    header.type, header.size = tarfile.XHDTYPE, 200 << 20
    (world / "in" / "a.tgz").write_bytes(gzip.compress(header.tobuf() + bytes(200 << 20), 1))
    started = time.monotonic()
    refused(world, world / "in" / "a.tgz", "cannot be read")
    (world / "in" / "b.tgz").write_bytes(gzip.compress(tarfile.TarInfo("x/").tobuf() * 30_000, 9))
    refused(world, world / "in" / "b.tgz", "max_files", max_files=2000)
    refused(world, world / "in" / "b.tgz", "50 times its size")
    assert time.monotonic() - started < 20


def test_the_stream_of_tar_only_goes_forward(world):
    stream = archives._Stream(find_archives(make_tar(world / "in" / "a.tar", GOOD))[0])
    stream.seek(1000)
    with pytest.raises(tarfile.ReadError, match="backwards"): stream.seek(999)
    for size in (-1, archives.PIECE + 1):
        with pytest.raises(tarfile.ReadError, match="header"): stream.read(size)
    stream.close()


@pytest.mark.parametrize("size, match", [(b"\xff" * 11 + b"\x00", "has a negative size"), (b"\xff" * 12, "has a negative size"), (b"\x80" + b"\xff" * 11, "200 times"), (b"77777777777\0", "200 times")])
def test_sizes_no_member_has(size, match, world):
    "Negative (which would send tarfile backwards for ever) and astronomic ones."
    archive = make_tar(world / "in" / "a.tar", [M("first.avi", b"x"), M("a.avi", b"y")])
    raw = bytearray(archive.read_bytes())
    raw[1024 + 124:1024 + 136] = size
    archive.write_bytes(checksums(raw, [1024]))
    refused(world, archive, match)


def checksums(raw: bytearray, offsets: list[int]) -> bytes:
    "Tar headers with their checksums made right again."
    for at in offsets:
        raw[at + 148:at + 156] = b" " * 8
        raw[at + 148:at + 156] = b"%06o\0 " % sum(raw[at:at + 512])
    return bytes(raw)


def test_no_room_on_the_disk(world, monkeypatch):
    archive = first(world, "zip", [M("a.avi", b"x" * 1000)])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 6, 10 ** 6 - 1004, 1004))
    refused(world, archive, "needs 0.00 GB", named=False)


def test_compressed_rar_without_a_program(world):
    for kind in ("rar4", "rar5"): refused(world, first(world, kind, [M("a.avi", b"squeezed", size=100, method=3)]), "install unrar, unar, 7-Zip")

# ---- what shows only while writing ----


@pytest.mark.parametrize("size", [900, 1100])
@pytest.mark.parametrize("method", [0, 8])
def test_a_zip_that_lies_about_a_length(size, method, world): refused(world, first(world, "zip", [M("a.avi", b"x" * 1000, size=size, method=method)]), early=False)


@pytest.mark.parametrize("kind", ["zip", "rar4", "rar5"])
def test_a_wrong_checksum(kind, world): refused(world, first(world, kind, [M("a.avi", b"x" * 1000, crc=1)]), "CRC|checksum", early=False)


@pytest.fixture
def unrar(world, monkeypatch):
    "A program that calls itself unrar and prints a file."
    script = world / "no programs" / "unrar"
    script.write_text(f"#!/bin/sh\nif [ \"$2\" = '-?' ]; then exit 0; fi\necho \"$@\" > '{world}/beside/called'\nexec 3<'{world}/beside/prints'\n/bin/cat <&3\nexit $(/bin/cat '{world}/beside/exit')\n")
    script.chmod(0o755)
    (world / "beside" / "called").write_text("")
    def prints(data: bytes, code: int = 0) -> None:
        (world / "beside" / "prints").write_bytes(data)
        (world / "beside" / "exit").write_text(str(code))
    return prints


@pytest.mark.parametrize("kind", ["rar4", "rar5"])
def test_compressed_rar_through_a_program(kind, world, unrar):
    packed = [M("a/1.avi", b"<1>", size=3000, method=3, crc=zlib.crc32(b"1" * 3000)), M("a", kind="folder"), M("a/2.avi", b"22"), M("a/3.avi", b"<3>", size=50, method=5, crc=zlib.crc32(b"3" * 50))]
    archive = MAKERS[kind](world / "in" / "a.rar", packed)
    unrar(b"1" * 3000 + b"22" + b"3" * 50)
    unpack(archive, world / "done", progress=False)
    assert tree(world / "done") == {"a": None, "a/1.avi": b"1" * 3000, "a/2.avi": b"22", "a/3.avi": b"3" * 50}
    assert (world / "beside" / "called").read_text().split() == ["p", "-inul", "-p-", str(archive)]
    (world / "done" / "a" / "1.avi").unlink()
    assert dict(unpack(archive, world / "done", progress=False)[["outcome", "files"]].to_numpy()) == {"unpacked": 1, "there already": 2}
    assert (world / "done" / "a" / "1.avi").read_bytes() == b"1" * 3000


@pytest.mark.parametrize("printed, code, match", [(b"x" * 101, 0, "more bytes than announced"), (b"x" * 99, 0, "announces 100 bytes and holds 99"), (b"", 0, "holds 0"),
                                                  (b"y" * 100, 0, "checksum"), (b"x" * 100, 3, "exit code 3"), (b"x" * 10 ** 7, 0, "more bytes")])
def test_a_program_that_gives_something_else(printed, code, match, world, unrar):
    unrar(b"" + printed, code)
    archive = make_rar5(world / "in" / "a.rar", [M("a.avi", b"squeezed", size=100, method=3, crc=zlib.crc32(b"x" * 100))])
    for out in ("new/out", "out"):
        with pytest.raises(FsarError, match=match): unpack(archive, world / out, progress=False)
        assert not (world / out).exists() and not (world / "new").exists()


def test_a_stream_without_end_is_left_at_the_announced_length():
    class Endless(io.RawIOBase):
        given = 0
        def read(self, size): self.given += size; return bytes(size)
    archive, stream = archives.Archive("a.zip", "zip", []), Endless()
    with pytest.raises(FsarError, match="announces 10 bytes and holds more"):
        list(archives._chunks(archives.Entry(archive, 0, archives.Member("x", 10), "x", 1), stream))
    assert stream.given <= archives.PIECE and stream.closed


def test_an_archive_that_changes_meanwhile(world, monkeypatch):
    archive = first(world, "tar", [M("a.avi", b"x")])
    room = archives._check_space
    def change(*args):
        room(*args)
        first(world, "tar", [M("../a.avi", b"x")])
    monkeypatch.setattr(archives, "_check_space", change)
    with pytest.raises(FsarError, match="changed while it was unpacked"): unpack(archive, world / "out", progress=False)
    assert not (world / "out").exists()


@pytest.mark.parametrize("kind", MAKERS)
def test_cut_short_anywhere(kind, world):
    whole = MAKERS[kind](world / "in" / "whole", [M("a.avi", random.Random(0).randbytes(700)), M("b.avi", random.Random(1).randbytes(300))]).read_bytes()
    needed = 512 * (1 + 2 + 1 + 1 + 1) if kind == "tar" else len(whole)  # tar pads with zeros
    (world / "in" / "whole").unlink()
    before = snapshot(world)
    for length in range(0, needed, 13):
        (world / "in" / "cut").write_bytes(whole[:length])
        with pytest.raises(FsarError): unpack(world / "in" / "cut", world / "out", progress=False)
    (world / "in" / "cut").unlink()
    assert snapshot(world) == before


@pytest.mark.parametrize("kind", ["rar4", "rar5"])
def test_rar_cut_between_members(kind, world):
    refused(world, MAKERS[kind](world / "in" / "a.rar", GOOD, end=b""))
    refused(world, MAKERS[kind](world / "in" / "a.rar", GOOD, end=block5(99, 0, b"") if kind == "rar5" else block4(0x74, 0, b"")))

# ---- what is there already ----


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_where_it_stopped(kind, world):
    archive = MAKERS[kind](world / "in" / "a", GOOD)
    (world / "out" / "wave").mkdir(parents=True)
    (world / "out" / GOOD[0].name).write_bytes(b"?" * 3000)  # the size is what counts
    (world / "out" / "other.avi").write_text("mine")
    table = unpack(archive, world / "out", progress=False)
    assert dict(table[["outcome", "files"]].to_numpy()) == {"there already": 1, "unpacked": 5}
    assert tree(world / "out") == contents(GOOD) | {GOOD[0].name: b"?" * 3000, "other.avi": b"mine"}
    before = snapshot(world)
    assert unpack(archive, world / "out", progress=False).outcome.tolist() == ["there already"] and snapshot(world) == before


def test_never_overwrites_and_follows_no_link(world):
    archive = make_zip(world / "in" / "a.zip", GOOD)
    def tried(prepare, match):
        (world / "out").mkdir()
        prepare(world / "out")
        before = snapshot(world)
        with pytest.raises(FsarError, match=match): unpack(archive, world / "out", progress=False)
        assert snapshot(world) == before
        shutil.rmtree(world / "out")
    tried(lambda out: (out / "empty.avi").write_text("mine"), "exists and is not the file of 0 bytes")
    tried(lambda out: (out / "empty.avi").mkdir(), "exists and is not")
    tried(lambda out: (out / "empty.avi").symlink_to(world / "x"), "exists and is not")
    tried(lambda out: (out / "empty.avi").symlink_to(world / "nowhere"), "exists and is not")
    tried(lambda out: (out / "wave").symlink_to(world / "beside"), "is a link or a file")
    tried(lambda out: (out / "wave").write_text("mine"), "is a link or a file")
    tried(lambda out: (out / STAGE).symlink_to(world / "beside"), "move it away")
    tried(lambda out: (out / STAGE).write_text("mine"), "move it away")
    (world / "out").write_text("mine")
    with pytest.raises(FsarError, match="is not a folder"): unpack(archive, world / "out", progress=False)
    (world / "real").mkdir()
    (world / "linked").symlink_to(world / "real")  # the target itself may be one
    unpack(archive, world / "linked", progress=False)
    assert tree(world / "real") == contents(GOOD)


def test_a_file_that_appears_meanwhile(world, monkeypatch):
    archive = make_zip(world / "in" / "a.zip", GOOD)
    extract = archives._extract
    def slow(*args):
        extract(*args)
        (world / "out" / "empty.avi").write_text("mine")  # the last member: the others have moved already
    monkeypatch.setattr(archives, "_extract", slow)
    with pytest.raises(FsarError, match="has come into being"): unpack(archive, world / "out", progress=False)
    assert tree(world / "out") == {"empty.avi": b"mine"}


def test_interrupted_by_hand(world, monkeypatch):
    archive = make_zip(world / "in" / "a.zip", GOOD)
    rename, count = os.rename, itertools.count()
    def interrupted(*args):
        if next(count) == 3: raise KeyboardInterrupt
        rename(*args)
    monkeypatch.setattr(os, "rename", interrupted)
    (world / "out" / "wave").mkdir(parents=True)
    before = snapshot(world)
    for out in ("out", "new/out"):
        count = itertools.count()
        with pytest.raises(KeyboardInterrupt): unpack(archive, world / out, progress=False)
        assert snapshot(world) == before


def test_bars(world, monkeypatch, capsys):
    monkeypatch.delenv("FSAR_QUIET")
    archive = first(world, "tar.gz", [M("d.zip", packed(world, "zip", [M("d/1.avi", b"1")]))])
    unpack(archive, world / "out")
    shown = capsys.readouterr().err
    assert "checking: 100%" in shown and "inner archives: 100%" in shown and "unpacking: 100%" in shown
    unpack(archive, world / "quiet", progress=False)
    assert capsys.readouterr().err == ""


def test_no_permission_to_write(world):
    if os.geteuid() == 0: pytest.skip("root may write anywhere")
    (world / "locked").mkdir(mode=0o500)
    with pytest.raises(FsarError, match="permission denied"): unpack(make_zip(world / "in" / "a.zip", GOOD), world / "locked" / "out", progress=False)


def test_one_at_a_time(world):
    import fcntl
    archive = make_zip(world / "in" / "a.zip", GOOD)
    (world / "out" / STAGE).mkdir(parents=True)
    with open(world / "out" / STAGE / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(FsarError, match="another process"): unpack(archive, world / "out", progress=False)
        assert (world / "out" / STAGE / ".lock").exists()
    (world / "out" / STAGE / "1").write_text("left by a killed run")
    (world / "out" / STAGE / "2").mkdir()
    (world / "out" / STAGE / "2" / "deeper").write_text("likewise")
    unpack(archive, world / "out", progress=False)
    assert tree(world / "out") == contents(GOOD)


KILLED = """
import sys
from pathlib import Path
from fsar.data.archives import unpack
print("ready", flush=True)
unpack(Path(sys.argv[1]), Path(sys.argv[2]), progress=False)
"""


def test_killed_at_any_moment_and_repeated(world):
    make_zip(world / "in" / "inner.zip", [M(f"in/{k}.avi", bytes([k]) * 20_000, method=8) for k in range(200)])
    members = [M(f"c{k % 7}/{k}.avi", random.Random(k).randbytes(20_000)) for k in range(500)]
    archive = make_tar(world / "in" / "a.tar", [*members[:250], M("inner.zip", (world / "in" / "inner.zip").read_bytes()), *members[250:]])
    started = time.monotonic()
    unpack(archive, world / "whole", progress=False)
    whole, took, draw, partial = tree(world / "whole"), time.monotonic() - started, random.Random(7), 0
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(archive), str(world / "out")], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0, 1.2 * took))
        process.kill()
        partial += process.wait() == -signal.SIGKILL and (world / "out").exists()
        unpack(archive, world / "out", progress=False)
        assert tree(world / "out") == whole
        shutil.rmtree(world / "out")
    assert partial >= 3  # some were killed in the middle of their work


def test_killed_while_files_move(world, monkeypatch):
    "As after a kill in the last step: half of the files in place, the folder set apart still there."
    archive = make_zip(world / "in" / "a.zip", GOOD)
    rename, count = os.rename, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *args: os._exit(9) if next(count) == 3 else rename(*args))
        if (child := os.fork()) == 0:
            try: unpack(archive, world / "out", progress=False)
            finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (world / "out" / STAGE).exists() and (world / "out" / GOOD[2].name).exists() and not (world / "out" / "empty.avi").exists()
    unpack(archive, world / "out", progress=False)
    assert tree(world / "out") == contents(GOOD)

# ---- archives within archives ----


def packed(world: Path, kind: str, members: list[M]) -> bytes:
    data = MAKERS[kind](world / "inner", members).read_bytes()
    (world / "inner").unlink()
    return data


@pytest.mark.parametrize("kind, inner", [("rar4", "rar4"), ("rar5", "rar5"), ("zip", "tar.gz"), ("tar", "zip"), ("tar.gz", "rar5")])
def test_hmdb51_like(kind, inner, world):
    classes = ("brush_hair", "-cartwheel", "wave !()#[]&+;~@")
    videos = {c: [M(f"{c}/{c}_{k}.avi", f"{c}{k}".encode() * 100) for k in range(3)] for c in classes}
    ending = {"rar4": "RAR", "rar5": "rar"}.get(inner, inner)
    outer = [M(f"{c}.{ending}", packed(world, inner, [M(c, kind="folder"), *videos[c]])) for c in classes]
    archive = MAKERS[kind](world / "in" / "hmdb51_org.rar", [*outer, M("readme.txt", b"read me")])
    table = unpack(archive, world / "out", progress=False)
    assert tree(world / "out") == contents([*sum(videos.values(), []), M("readme.txt", b"read me")])
    assert table.outcome.tolist() == ["opened in turn", "unpacked", "unpacked", "unpacked", "unpacked"] and table.files.tolist() == [3, 3, 3, 3, 1]
    assert unpack(archive, world / "out", progress=False).files[1:].sum() == 10
    unpack(archive, world / "flat", nested=False, progress=False)
    assert tree(world / "flat") == contents([*outer, M("readme.txt", b"read me")])


def test_inner_archives_do_not_stay_on_the_disk(world, monkeypatch):
    archive = make_zip(world / "in" / "a.zip", [M(f"{k}.zip", packed(world, "zip", [M(f"{k}/x.avi", bytes(5000))])) for k in range(3)])
    publish, sizes = archives._publish, []
    def looked_at(entries, stage, out):
        sizes.extend(f.stat().st_size for f in stage.iterdir() if f.name != ".lock")
        publish(entries, stage, out)
    monkeypatch.setattr(archives, "_publish", looked_at)
    unpack(archive, world / "out", progress=False)
    assert sizes == [5000] * 3


def test_where_inner_archives_go(world):
    flat = packed(world, "zip", [M("1.avi", b"1"), M("2.avi", b"2")])
    two = packed(world, "zip", [M("p/1.avi", b"1"), M("q/2.avi", b"2")])
    deep = packed(world, "zip", [M("d/more.zip", flat)])
    archive = make_zip(world / "in" / "a.zip", [M("x/flat.zip", flat), M("x/two.tar.gz", two), M("x/deep.zip", deep), M("features.npz", flat), M("text.zip", b"no archive"), M("._y.zip", flat)])
    table = unpack(archive, world / "out", progress=False).groupby("outcome").files.sum()
    assert dict(table) == {"opened in turn": 3, "unpacked": 6, "left out: macOS's own": 1, "unpacked, not opened: an archive in an inner one": 1}
    assert tree(world / "out") == contents([M("x/flat/1.avi", b"1"), M("x/flat/2.avi", b"2"), M("x/two/p/1.avi", b"1"), M("x/two/q/2.avi", b"2"), M("x/d/more.zip", flat),
                                            M("features.npz", flat), M("text.zip", b"no archive")])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", KINDS)
def test_a_bad_inner_archive(kind, inner, world):
    for evil in (M("../x", b"evil"), M("a", kind="symlink", target="../x"), M("first.avi", b"2")):
        data = packed(world, inner, [M("d/ok.avi", b"ok"), replace(evil, name=f"d/{evil.name}") if evil.name != "first.avi" else replace(evil, name="d/ok.avi")])
        refused_late(world, first(world, kind, [M("d.zip", data), M("last.avi", b"last")]))
    refused_late(world, first(world, kind, [M("d.zip", packed(world, inner, [M("d/ok.avi", b"ok")])[:-30] if inner != "tar" else bytes(3) + b"Rar!")]) if inner != "tar" else
            first(world, kind, [M("d.zip", packed(world, inner, [M("d/ok.avi", b"ok")])[:700])]))


@pytest.mark.parametrize("name", ["...zip", f"{STAGE}.zip", f"a/../{STAGE}.zip"])
def test_inner_archives_with_names_that_become_bad(name, world):
    refused_late(world, first(world, "tar", [M(name, packed(world, "zip", [M("1.avi", b"1"), M("2.avi", b"2")]))]))


def test_bounds_hold_for_the_sum(world):
    data = packed(world, "zip", [M(f"d/{k}.avi", b"x" * 1000, method=8) for k in range(5)])
    archive = first(world, "zip", [M("d.zip", data)])
    need = 5 + len(data) + 5000
    refused_late(world, archive, "max_bytes", max_bytes=need - 1)
    refused_late(world, archive, "max_files", max_files=6)
    unpack(archive, world / "fits", max_bytes=need, max_files=7, progress=False)
    refused_late(world, first(world, "zip", [M("d/1.avi", b"1"), M("d.zip", packed(world, "zip", [M("d/1.avi", b"1")]))]), "same place")
    refused_late(world, first(world, "zip", [M("b.zip", packed(world, "zip", [M("a.avi", bytes(70 << 20), method=8)]))]), "200 times its size")


def test_no_room_for_what_is_inside(world, monkeypatch):
    data = packed(world, "zip", [M(f"d/{k}.avi", b"x" * 10_000, method=8) for k in range(5)])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 6, 10 ** 6 - 40_000, 40_000))
    refused_late(world, first(world, "zip", [M("d.zip", data)]), "free on that disk", named=False)

# ---- random damage ----


def mutated(data: bytes, draw: random.Random, tar: bool) -> bytes:
    raw = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        at, how = draw.randrange(len(raw)), draw.randrange(5)
        if how == 0: raw[at] ^= 1 << draw.randrange(8)
        elif how == 1: raw[at:at + 4] = draw.randbytes(4)
        elif how == 2: raw[at:at + 8] = draw.choice([bytes(8), b"\xff" * 8, b"../../../", b"/etc/pas"])[:8]
        elif how == 3: raw[at:at] = raw[draw.randrange(len(raw)):][:draw.randint(1, 600)]
        else: del raw[at:at + draw.randint(1, 600)]
        if len(raw) < 1000: raw += data[-1000:]
    return checksums(raw, range(0, len(raw) - 511, 512)) if tar and draw.random() < 0.7 else bytes(raw)


@pytest.mark.parametrize("kind", ["rar4", "rar5"])
def test_random_headers_with_right_checksums(kind, world, monkeypatch):
    "Damage that the headers' checksums do not give away, as an attacker would do it."
    name, draw = {"rar4": "block4", "rar5": "block5"}[kind], random.Random(0)
    block, accepted = globals()[name], 0
    def shaken(number, flags, fields, *rest):
        raw = bytearray(fields)
        for _ in range(draw.choice([0, 0, 0, 1, 2])):
            if raw: raw[draw.randrange(len(raw))] = draw.choice([0, 1, 0x2E, 0x2F, 0x5C, 0x7F, 0x80, 0xFF, draw.randrange(256)])
        return block(number, flags ^ (1 << draw.randrange(16) if draw.random() < 0.1 else 0) if kind == "rar4" else flags, bytes(raw), *rest)
    monkeypatch.setitem(globals(), name, shaken)
    for _ in range(200):
        MAKERS[kind](world / "in" / "a", [*GOOD, M("d", kind="folder"), M("l", kind=draw.choice(["file", "symlink"]), data=b"l")])
        before, started = snapshot(world), time.monotonic()
        try: unpack(world / "in" / "a", world / "out", progress=False)
        except FsarError: assert not (world / "out").exists()
        else: accepted += 1
        assert time.monotonic() - started < 10 and not any(p.is_symlink() for p in (world / "out").rglob("*"))
        shutil.rmtree(world / "out", ignore_errors=True)
        assert snapshot(world) == before
    assert 0 < accepted < 150


@pytest.mark.parametrize("kind", MAKERS)
def test_random_damage(kind, world):
    members = [*GOOD, M("d", kind="folder"), M("in.zip", packed(world, "zip", [M("d/1.avi", b"1" * 50, method=8), M("d/2.avi", b"2" * 50)])), M("in.rar", packed(world, "rar5", [M("d/3.avi", b"3" * 50)]))]
    whole = MAKERS[kind](world / "in" / "a", members).read_bytes()
    outcomes = {True: 0, False: 0}
    for seed in range(60):
        draw = random.Random(seed)
        (world / "in" / "a").write_bytes(mutated(whole, draw, kind == "tar"))
        before, started = snapshot(world), time.monotonic()
        try: unpack(world / "in" / "a", world / "out", progress=False)
        except FsarError: assert not (world / "out").exists()
        assert time.monotonic() - started < 10
        outcomes[(world / "out").exists()] += 1
        if (world / "out").exists(): assert not any(p.is_symlink() for p in (world / "out").rglob("*"))
        shutil.rmtree(world / "out", ignore_errors=True)
        assert snapshot(world) == before
    assert outcomes[False] >= 20  # most damage is noticed
