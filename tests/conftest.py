"""Shared by all tests: one torch thread per worker, a tiny rendered data set, and the real clips where they are at hand."""
import os
import signal

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that; several tests are about Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FSAR_QUIET", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from dataclasses import replace
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
SHARED = Path(__file__).parent.parent.parent / "shared"  # research data beside the checkout, never part of it


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    "Nothing a test prepares lands in the user's cache."
    os.environ["FSAR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_motions(tmp_path_factory) -> Path:
    "A rendered folder data set: 6 base, 5 validation and 5 novel classes, six videos of 12 frames each, 48 pixels."
    from fsar.data import motions
    classes = [name for split, count in (("train", 6), ("val", 5), ("test", 5)) for name in list(motions.split_classes(split))[:count]]
    config = replace(motions.PRESETS["motions-mini"], name="tiny", size=48, frames=12, videos_per_class=6, classes=tuple(classes))
    return motions.render_dataset(tmp_path_factory.mktemp("motions") / "tiny", config, workers=1, progress=False)


@pytest.fixture(scope="session")
def tiny_store(tiny_motions, tmp_path_factory):
    "The prepared store of `tiny_motions`."
    from fsar.data.splits import folder_manifest
    from fsar.data.store import prepare
    return prepare(folder_manifest(tiny_motions), tmp_path_factory.mktemp("store") / "tiny", short_side=48, workers=1, progress=False)


@pytest.fixture(scope="session")
def says_its_origin():
    "A check that a report's metrics.json says where its numbers come from, and that its command is one of ours with that --out."
    import shlex
    from fsar.cli.main import parse

    def check(metrics: dict, out: Path, *hashed: str) -> None:
        wanted = {"command": str, "seeds": list, "hashes": dict, "versions": dict, "device": str, "peak_memory": dict, "wall_time_s": float, "finished": str, "headline": str}
        for name, kind in wanted.items(): assert isinstance(metrics[name], kind), name
        assert metrics["git"] is None or len(metrics["git"]["commit"]) == 40 and isinstance(metrics["git"]["dirty"], bool)
        assert metrics["versions"]["torch"] == torch.__version__ or torch.__version__.startswith(metrics["versions"]["torch"])
        assert metrics["device"].endswith("threads") and metrics["peak_memory"]["process_MiB"] > 50 and metrics["wall_time_s"] >= 0 and metrics["finished"].endswith("+00:00")
        assert all(len(digest) == 64 for digest in metrics["hashes"].values()) and not [h for h in hashed if not any(h in name for name in metrics["hashes"])]
        words = shlex.split(metrics["command"])
        assert words[0] == "fsar" and words[words.index("--out") + 1] == str(out)
        parse(words[1:])  # an FsarError here: a command that nobody can give
    return check


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    if not SHARED.is_dir(): pytest.skip("research data is not beside the checkout (../shared)")
    return SHARED


@pytest.fixture(scope="session")
def real_clips(shared_dir) -> Path:
    "Nine clips of the public benchmarks, as they come."
    clips = shared_dir / "realdata" / "clips"
    if not clips.is_dir(): pytest.skip("the real clips are not at hand (../shared/realdata/clips)")
    return clips
