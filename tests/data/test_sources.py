"""Where the benchmarks come from: every one has a record, its addresses are well-formed, its example names are of the lists, its layouts are found."""
import re
import shutil
import subprocess
import warnings
import zipfile
from dataclasses import FrozenInstanceError
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fsar.core.basics import FsarError
from fsar.data.video import VIDEO_EXTENSIONS
from fsar.data.sources import ORIGINS, STORE_MB, commands, disk, facts, how_to_get, listed, tree, wanted
from fsar.data.splits import BENCHMARKS, SPLITS, SplitWarning, benchmark_manifest, load_split, verify, video_name

LAYOUTS = [pytest.param(b, paths, id=f"{b}-{k}") for b, origin in ORIGINS.items() for k, (_, paths) in enumerate(origin.layouts)]
EVERY = pytest.mark.parametrize("benchmark", BENCHMARKS)


def names(benchmark: str) -> dict[str, str]:
    "Listed video → its class; the long training list where there are two."
    size = max(BENCHMARKS[benchmark].train_sizes, default=None)
    sides = [load_split(benchmark, s, train_size=size if s == "train" else None) for s in SPLITS]
    return {video_name(v): side.classes[k] for side in sides for v, k in zip(side.videos, side.labels)}


def letters(text: str) -> str: return re.sub(r"[\W_]", "", text).lower()


def leaves(drawing: str) -> list[str]:
    "The files of a drawn tree."
    entries = [line.split("── ")[1] for line in drawing.splitlines() if "── " in line]
    return [e for e in entries if not e.endswith("/") and e != "…"]


def make(root: Path, paths: tuple[str, ...]) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def test_every_benchmark_has_an_origin():
    assert set(ORIGINS) == set(BENCHMARKS)
    with pytest.raises(FrozenInstanceError):
        ORIGINS["ucf101"].licence = "none"


@EVERY
def test_a_record_is_complete(benchmark):
    origin = ORIGINS[benchmark]
    texts = [origin.title, origin.makers, origin.licence, origin.sizes, origin.frames, origin.folder, *origin.archives, *origin.steps, *origin.notes,
             *(c for c, _ in origin.layouts)]
    assert all(t == t.strip() and t and "  " not in t for t in texts)
    assert origin.layouts and origin.notes and origin.archives and re.search(r"\b(19|20)\d\d\b", origin.makers)
    assert 0 < origin.unpacked_gb and 0 < origin.download_gb and listed(benchmark) <= origin.videos


@EVERY
def test_addresses_are_https_and_well_formed(benchmark):
    origin = ORIGINS[benchmark]
    found = re.findall(r"\w+://[^\s\"',)]+", " ".join([origin.address, *(a for _, a in origin.copies), *origin.steps, *origin.notes]))
    assert origin.address in found and all(a in found for _, a in origin.copies)
    for address in found:
        parts = urlsplit(address)
        assert parts.scheme == "https" and re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.hostname) and parts.path.startswith("/"), address


@pytest.mark.parametrize("benchmark, paths", LAYOUTS)
def test_example_names_are_of_the_lists(benchmark, paths):
    files = leaves(tree(paths, ORIGINS[benchmark].folder))
    assert len(files) == len(paths) > 0
    for file, path in zip(sorted(files), sorted(p.rsplit("/", 1)[-1] for p in paths)):
        assert file == path and Path(file).suffix.lower() in VIDEO_EXTENSIONS
    known = {(n[:11] if BENCHMARKS[benchmark].clips else letters(n)): c for n, c in names(benchmark).items()}
    classes = {letters(c) for c in names(benchmark).values()}
    for path in paths:
        stem, folder = Path(path).stem, letters(Path(path).parent.name)
        key = stem[:11] if BENCHMARKS[benchmark].clips else letters(stem)
        assert key in known, f"{path} is in no list of {benchmark}"
        assert folder == letters(known[key]) or folder not in classes, f"{path} lies in another class's folder"


@pytest.mark.parametrize("benchmark, paths", LAYOUTS)
def test_layouts_are_found_by_the_matching(benchmark, paths, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SplitWarning)  # nearly all of the list is missing
        found = benchmark_manifest(benchmark, make(tmp_path, paths))
    assert sorted(found.path) == sorted(str(tmp_path / p) for p in paths)


def test_replaced_kinetics_videos_come_first(tmp_path):
    "The folders of the commands: a replacement is taken before the corrupted file of the same name."
    clip = "-VtLx-mcPds_000012_000022.mp4"
    folders = {Path(f) for step in ORIGINS["kinetics100"].steps for f in re.findall(r"(?:-C|--out) (\S+)", step)}
    broken, replacement = sorted(folders, key=lambda f: f.name == "replacement")
    root = make(tmp_path, (f"{broken}/{clip}", f"{replacement}/replacement_for_corrupted_k400/{clip}"))
    with pytest.warns(SplitWarning) as caught:
        found = benchmark_manifest("kinetics100", root)
    assert "replacement_for_corrupted_k400" in found.path.item() and any("more than once" in str(w.message) for w in caught)


def test_tree():
    drawing = tree(["a/x.mp4", "a/y.mp4", "b/c/z.mp4"], "root")
    assert drawing.splitlines() == ["root", "├── a/", "│   ├── x.mp4", "│   ├── y.mp4", "│   └── …", "├── b/", "│   └── c/", "│       ├── z.mp4", "│       └── …", "└── …"]
    assert tree(["x.mp4"]).splitlines() == ["├── x.mp4", "└── …"]


@EVERY
def test_text_for_the_terminal(benchmark):
    text, origin = how_to_get(benchmark), ORIGINS[benchmark]
    flat = " ".join(text.split())
    assert all(" ".join(t.split()) in flat for t in (*facts(benchmark).values(), *commands(benchmark), *origin.notes, origin.address, origin.licence))
    assert all(tree([p]).splitlines()[-2].split("── ")[1] in text for _, paths in origin.layouts for p in paths)
    assert how_to_get(benchmark.replace("_", "-").upper()) == text
    assert f"{verify(benchmark).videos.sum():,}" in text


@EVERY
def test_commands_are_shell(benchmark):
    for command in commands(benchmark):
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0 and "{" not in command
    prepare, train = commands(benchmark)[-2:]
    assert prepare == f"fsar data prepare {benchmark} --videos {ORIGINS[benchmark].folder} --out stores/{benchmark}" and f"stores/{benchmark} " in train
    outs = [words[words.index("--out") + 1] for words in map(str.split, ORIGINS[benchmark].steps) if "--out" in words]
    assert any(out.strip(";").startswith(ORIGINS[benchmark].folder) for out in outs)


def test_unknown_names_get_the_nearest():
    for call in (how_to_get, commands, facts, disk, wanted, listed):
        with pytest.raises(FsarError, match=r"unknown benchmark 'kinetics400'\. Did you mean 'kinetics100'\? Known: ucf101, hmdb51"):
            call("kinetics400")
    with pytest.raises(FsarError, match="Did you mean 'ssv2_small'"):
        how_to_get("ssv2-smal")
    with pytest.raises(FsarError, match=r"unknown benchmark 'zzz'\. Known"):
        how_to_get("zzz")


@EVERY
def test_disk_is_in_proportion(benchmark):
    need, origin = disk(benchmark), ORIGINS[benchmark]
    assert need["listed videos"] == pytest.approx(origin.unpacked_gb * listed(benchmark) / origin.videos)
    assert need["listed videos"] <= need["all videos"] == origin.unpacked_gb
    assert need["store"] == pytest.approx(STORE_MB * 1e6 * listed(benchmark) / 1e9)


@EVERY
def test_patterns_find_the_listed_videos_and_no_other(benchmark):
    patterns = wanted(benchmark)
    assert len(set(patterns)) == len(patterns) == listed(benchmark)
    assert all(f"./somewhere/{n}.mp4".count(p) == 1 for n, p in zip(names(benchmark), patterns))
    strangers = ("./1519580.webm", "./v_Archery_g01_c011.avi", "./x-VtLx-mcPds_000012_000022.mp4", "./a_wave_f_nm_np1_fr_goo_37.avi")
    assert not any(p in path for p in patterns for path in strangers)


@pytest.mark.parametrize("benchmark, member", [("kinetics100", "-VtLx-mcPds_000012_000022.mp4"), ("kinetics100_molo", "-514AQUrSow_000058_000068.mp4")])
def test_loop_over_archives_takes_the_listed_only(benchmark, member, tmp_path):
    "Also from an archive without a listed video, where tar's empty list would mean everything."
    for folder, files in (("train", [member, "stranger123_000000_000010.mp4"]), ("val", ["stranger456_000000_000010.mp4"])):
        make(tmp_path / "in" / folder, tuple(files))
        (tmp_path / folder).mkdir()
        subprocess.run(["tar", "-czf", tmp_path / folder / "part_0.tar.gz", "-C", tmp_path / "in" / folder, "."], check=True)
    (tmp_path / "videos/kinetics/train").mkdir(parents=True)
    (tmp_path / "wanted.txt").write_text("\n".join(wanted(benchmark)) + "\n")
    loop, = [c for c in commands(benchmark) if c.startswith("for part in")]
    subprocess.run(["bash", "-c", loop], cwd=tmp_path)
    assert [f.name for f in (tmp_path / "videos").rglob("*.mp4")] == [member]


def test_joining_the_zips_gives_the_archive(tmp_path):
    if not shutil.which("unzip"): pytest.skip("there is no unzip here")
    whole = bytes(range(256)) * 40
    for k, part in enumerate((whole[:5000], whole[5000:])):
        with zipfile.ZipFile(tmp_path / f"20bn-something-something-v2-{k:02}.zip", "w") as z: z.writestr(f"20bn-something-something-v2-{k:02}", part)
    subprocess.run(["bash", "-c", commands("ssv2_full")[0]], cwd=tmp_path, check=True)
    assert (tmp_path / "ssv2.tar.gz").read_bytes() == whole
