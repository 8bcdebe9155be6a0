"""Video files as they really are: headers that lie, pictures on their side, cuts, damage; and both backends against each other."""
import os, pickle, struct, subprocess, sys, time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from fsar.data import video
from fsar.core.basics import FsarError, generator
from fsar.data.video import BACKENDS, VideoError, decode, decode_all, probe, segment_indices, spread, write_video

REAL = Path(__file__).parents[3] / "shared" / "realdata" / "clips"
ROTATIONS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}  # a, b, c, d of the display matrix


def moving(frames=30, height=64, width=96):
    "Every frame differs from every other, and left, right, top and bottom differ."
    t, y, x = np.ogrid[:frames, :height, :width]
    return np.stack([(2 * x + 6 * t + 0 * y) % 256, (3 * y + 3 * t + 0 * x) % 256, 200 * (x > width // 2) + 0 * (y + t)], -1).astype(np.uint8)


def encode(path, frames, codec="libx264", pixels="yuv420p", times=None, **options):
    "A file as other programs make them; `times`: when each frame is shown, in hundredths of a frame."
    base = Fraction(1, 2500 if times else 25)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.time_base = base
        for k, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = int(times[k]) if times is not None else k, base
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def turned(source, path, matrix):
    "A copy of an MP4 whose track header asks for another display matrix."
    data = bytearray(source.read_bytes())
    a, b, c, d = (65536 * v for v in matrix)
    struct.pack_into(">9i", data, data.find(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def silence(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for k in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * k
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Whole files by name."
    folder, frames = tmp_path_factory.mktemp("videos"), moving()
    made = {"plain": write_video(folder / "plain.mp4", frames),
            "groups": encode(folder / "groups.mp4", frames, g=7, bf=2),
            "mpeg4": encode(folder / "mpeg4.avi", frames, "mpeg4", g=10),
            "mpeg4_reordered": encode(folder / "mpeg4b.avi", frames, "mpeg4", g=10, bf=2),
            "vp9": encode(folder / "vp9.webm", frames, "libvpx-vp9", g=10),
            "vp8": encode(folder / "vp8.webm", frames, "libvpx", g=10),
            "mjpeg": encode(folder / "mjpeg.avi", frames, "mjpeg", "yuvj420p"),
            "hevc": encode(folder / "hevc.mp4", frames, "libx265", g=10, **{"x265-params": "log-level=none"}),
            "odd": encode(folder / "odd.mp4", moving(30, 63, 95), pixels="yuv444p"),
            "variable": encode(folder / "variable.mp4", frames, times=np.cumsum(generator(0).integers(20, 400, len(frames))).tolist()),
            "still": write_video(folder / "still.mp4", frames[:1].repeat(30, 0)),
            "ends_still": write_video(folder / "ends_still.mp4", np.concatenate([frames[:20], frames[19:20].repeat(10, 0)]))}
    return made | {f"turned_{angle}": turned(made["plain"], folder / f"turned_{angle}.mp4", m) for angle, m in ROTATIONS.items()}


BOTH = ["plain", "groups", "mpeg4", "mpeg4_reordered", "vp9", "vp8", "mjpeg", "hevc", "odd", "variable", "still", "ends_still", "turned_90", "turned_180", "turned_270"]
decord = pytest.mark.skipif(video._decord() is None, reason="decord is not installed")


@decord
@pytest.mark.parametrize("name", BOTH)
def test_backends_agree_on_every_frame(files, name):
    (a, of_a), (b, of_b) = (decode_all(files[name], backend=backend) for backend in BACKENDS)
    assert of_a.frames == of_b.frames == len(a) == 30
    assert a.shape == b.shape == (30, of_a.height, of_a.width, 3)
    assert np.abs(a.astype(int) - b).mean() < 0.01


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("name", BOTH)
def test_few_frames_are_those_of_the_whole(files, name, backend):
    if backend == "decord" and video._decord() is None: pytest.skip("decord is not installed")
    whole, _ = decode_all(files[name], backend="pyav")
    for key in range(3):
        indices = generator(key).choice(30, 6).tolist()  # unordered, perhaps repeated
        assert np.abs(decode(files[name], indices, backend=backend).astype(int) - whole[indices]).mean() < 0.01
    assert probe(files[name], backend=backend).frames == 30
    few, info = decode_all(files[name], max_frames=5, backend=backend)
    assert info.frames == 30 and np.abs(few.astype(int) - whole[spread(30, 5)]).mean() < 0.01


@pytest.mark.parametrize("angle", ROTATIONS)
def test_rotation_is_applied(files, angle):
    plain, _ = decode_all(files["plain"], backend="pyav")
    shown, info = decode_all(files[f"turned_{angle}"])
    assert info.rotation == angle and (info.height, info.width) == shown.shape[1:3]
    assert np.array_equal(shown, np.rot90(plain, -angle // 90, (1, 2)))


def test_mirrored_video_is_mirrored_and_left_to_pyav(files, tmp_path):
    plain, _ = decode_all(files["plain"], backend="pyav")
    path = turned(files["plain"], tmp_path / "mirrored.mp4", (-1, 0, 0, 1))
    shown, info = decode_all(path)
    assert info.backend == "pyav" and info.rotation == 0 and np.array_equal(shown, plain[:, :, ::-1])


@decord
def test_decord_by_name_is_used_or_refused(files, tmp_path):
    assert probe(files["plain"]).backend == probe(files["plain"], backend="decord").backend == "decord"
    with pytest.raises(VideoError, match="mirrored: use backend='pyav'"):
        probe(turned(files["plain"], tmp_path / "mirrored.mp4", (-1, 0, 0, 1)), backend="decord")


@pytest.mark.parametrize("name", ["hevc", "mpeg4_reordered"])
def test_where_decord_is_not_exact_pyav_reads(files, name):
    assert probe(files[name]).backend == "pyav"


def test_without_decord(files, monkeypatch):
    monkeypatch.setattr(video, "_decord", lambda: None)
    assert probe(files["plain"]).backend == "pyav"
    with pytest.raises(FsarError, match="pip install decord"): probe(files["plain"], backend="decord")


def test_fails_on_decord_then_pyav_is_named(files, monkeypatch):
    def broken(header, *rest): raise VideoError(header.path, "decord gave up")
    monkeypatch.setitem(BACKENDS, "decord", broken)
    assert probe(files["plain"]).backend == "pyav"
    monkeypatch.setattr(video, "_decord", lambda: av)  # installed, whatever it is
    with pytest.raises(VideoError, match="gave up"): probe(files["plain"], backend="decord")


def cut(source, path, first):
    "Drop the first packets without encoding again."
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for k, packet in enumerate(p for p in old.demux(stream) if p.size):
            if k < first: continue
            packet.stream = copy
            new.mux(packet)
    return path


def test_cut_between_key_frames(files, tmp_path):
    path = cut(files["groups"], tmp_path / "cut.mp4", 3)
    frames, info = decode_all(path)
    whole, _ = decode_all(files["groups"], backend="pyav")
    assert info.backend == "pyav" and 0 < info.frames < 28
    assert np.abs(frames[-1].astype(int) - whole[-1]).mean() < 0.01


def test_edit_list_hides_frames_without_being_taken_for_truncation(files, tmp_path):
    data = bytearray(files["groups"].read_bytes())
    at = data.find(b"elst") + 16
    start, = struct.unpack_from(">i", data, at)
    struct.pack_into(">i", data, at, start + 512 * 12)  # begin twelve frames later
    path = tmp_path / "edited.mp4"
    path.write_bytes(data)
    frames, info = decode_all(path)
    whole, _ = decode_all(files["groups"], backend="pyav")
    assert info.backend == "pyav" and info.frames == 18 and np.array_equal(frames, whole[12:])


def bad_files(folder, whole):
    "Files that must fail, with a piece of the reason."
    for name, content in {"empty.mp4": b"", "text.mp4": b"no video\n" * 99, "noise.avi": generator(0).bytes(20000),
                          "truncated.mp4": whole["plain"].read_bytes()[:1500], "truncated.avi": whole["mpeg4"].read_bytes()[:7000],
                          "truncated.webm": whole["vp9"].read_bytes()[:whole["vp9"].stat().st_size // 3]}.items():
        (folder / name).write_bytes(content)
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    (folder / "link.mp4").symlink_to(folder / "nowhere.mp4")
    silence(folder / "sound.mp4")
    return {"missing.mp4": "no such file", "empty.mp4": "empty", "text.mp4": "not a readable video", "noise.avi": "not a readable video",
            "truncated.mp4": "not a readable video", "truncated.avi": "truncated: \\d+ of 30 frames", "truncated.webm": "truncated: 0.\\d of 1.2 seconds",
            "folder.mp4": "folder", "pipe.mp4": "not a regular file", "link.mp4": "no such file", "sound.mp4": "no video, only audio"}


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_bad_files_say_why_at_once_and_quietly(files, tmp_path, backend, capfd):
    if backend == "decord" and video._decord() is None: pytest.skip("decord is not installed")
    for name, reason in bad_files(tmp_path, files).items():
        for read in (probe, decode_all, lambda path, **kw: decode(path, [0], **kw)):
            start = time.monotonic()
            with pytest.raises(VideoError, match=reason) as caught: read(tmp_path / name, backend=backend)
            assert time.monotonic() - start < 5
            assert caught.value.path == tmp_path / name and str(caught.value).startswith(f"{tmp_path / name}: ")
            assert str(tmp_path) not in caught.value.reason
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_damage_in_the_middle(tmp_path, backend, capfd):
    if backend == "decord" and video._decord() is None: pytest.skip("decord is not installed")
    path = encode(tmp_path / "damaged.mp4", generator(1).integers(0, 256, (30, 64, 96, 3), dtype=np.uint8), g=5)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle:middle + 9000] = bytes(9000)
    path.write_bytes(data)
    capfd.readouterr()
    with pytest.raises(VideoError): probe(path, backend=backend)
    assert capfd.readouterr() == ("", "")


def test_truncated_after_its_index(files, tmp_path):
    with av.open(str(files["groups"])) as old, av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.size: packet.stream = copy; new.mux(packet)
    data = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[:(len(data) + data.find(b"mdat")) // 2])
    assert probe(tmp_path / "fast.mp4").frames == 30
    with pytest.raises(VideoError, match="truncated: .* of 30 frames|damaged"): probe(tmp_path / "half.mp4")


def test_time_is_bounded(files):
    for backend in BACKENDS:
        with pytest.raises(VideoError, match="not decoded within 0 s"): probe(files["plain"], backend="pyav" if video._decord() is None else backend, timeout=0)


def test_indices_beyond_the_end(files):
    with pytest.raises(VideoError, match="frame 30 was asked for, but it has 30"): decode(files["plain"], [0, 30])
    with pytest.raises(VideoError, match="frame -1"): decode(files["plain"], [-1])
    with pytest.raises(FsarError, match="at least one"): decode(files["plain"], [])


def test_wrong_arguments(files):
    with pytest.raises(FsarError, match="Did you mean 'decord'"): probe(files["plain"], backend="decrod")
    with pytest.raises(FsarError, match="short_side"): decode(files["plain"], [0], short_side=0)
    with pytest.raises(FsarError, match="max_frames"): decode_all(files["plain"], max_frames=0)


@pytest.mark.parametrize("short_side, shape", [(32, (32, 48)), (100, (100, 150)), (64, (64, 96)), (1, (1, 2))])
def test_short_side(files, short_side, shape):
    for name, size in ("plain", shape), ("turned_90", shape[::-1]):
        assert decode(files[name], [0, 1], short_side=short_side).shape == (2, *size, 3)


def test_one_frame(tmp_path):
    path = write_video(tmp_path / "one.mp4", moving(1))
    assert probe(path).frames == 1 and decode_all(path, max_frames=4)[0].shape == (1, 64, 96, 3)
    assert decode(path, segment_indices(1, 4)).shape == (4, 64, 96, 3)


def test_error_survives_a_process():
    error = pickle.loads(pickle.dumps(VideoError(Path("a.mp4"), "empty")))
    assert (error.path, error.reason, str(error)) == (Path("a.mp4"), "empty", "a.mp4: empty")


# ---- real clips

@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real clips at {REAL}")
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_real_clips(backend, capfd):
    if backend == "decord" and video._decord() is None: pytest.skip("decord is not installed")
    count = {"R6l": 303, "RAT": 72, "SOX": 332, "Sch": 74, "Tru": 48, "WUz": 327, "hmd": 83}  # four promise one more
    for path in sorted(REAL.iterdir()):
        info = probe(path, backend=backend)
        assert info.frames == count.get(path.name[:3], info.frames) and 24 < info.fps < 31
        with pytest.raises(VideoError, match=f"it has {info.frames}"): decode(path, [info.frames], backend=backend)
        last = decode(path, [3, info.frames - 1], backend=backend, short_side=64)
        assert np.abs(last.astype(int) - decode(path, [3, info.frames - 1], backend="pyav", short_side=64)).mean() < 0.1
    assert capfd.readouterr() == ("", "")


# ---- segment sampling

@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 64, 1001])
@pytest.mark.parametrize("count", [1, 3, 8, 16])
def test_one_frame_from_each_segment(frames, count):
    edges = np.arange(count + 1) * frames / count
    for g in (None, generator(0), generator(1)):
        indices = segment_indices(frames, count, g)
        assert indices.shape == (count,) and indices.dtype == np.int64
        assert (np.diff(indices) >= 0).all() and indices[0] >= 0 and indices[-1] < frames
        assert (indices >= np.floor(edges[:-1])).all() and (indices <= edges[1:]).all()
        if frames >= count: assert len(set(indices.tolist())) == count


def test_random_segments_reach_every_frame_and_follow_the_generator():
    draws = np.stack([segment_indices(20, 8, generator(k)) for k in range(400)])
    assert set(draws.ravel().tolist()) == set(range(20))
    assert np.array_equal(segment_indices(20, 8, generator(3)), draws[3])


@pytest.mark.parametrize("frames, count", [(0, 8), (8, 0), (-1, 2)])
def test_impossible_segments(frames, count):
    with pytest.raises(FsarError, match="at least one"): segment_indices(frames, count)


# ---- writing

@pytest.mark.parametrize("size", [(48, 48), (50, 70), (80, 80)])
def test_writing_is_reproducible(tmp_path, size):
    "Small pictures are where x264's lookahead depended on what memory held."
    frames = moving(12, *size)
    for k in range(8):
        junk = [generator(k, j).bytes(5000 * j) for j in range(20)]
        path = write_video(tmp_path / f"{k}.mp4", frames)
        del junk
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1
    decoded, info = decode_all(path)
    assert info.frames == 12 and np.abs(decoded.astype(int) - frames).mean() < 8


@pytest.mark.parametrize("frames", [moving(2, 63, 96), moving(2, 64, 95), moving(2).astype(float), moving(2)[0], moving(2)[:0], [1, 2]])
def test_writing_refuses(tmp_path, frames):
    with pytest.raises(FsarError, match="cannot write .*(even sizes|uint8)"): write_video(tmp_path / "a.mp4", frames)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving(4))
    before = path.read_bytes()
    code = ("import resource, numpy as np; from fsar.data.video import write_video; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));\n"
            f"try: write_video({str(path)!r}, np.random.default_rng(0).integers(0, 256, (20, 64, 96, 3), dtype=np.uint8))\n"
            "except Exception as e: print(type(e).__name__, e)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.startswith(f"FsarError cannot write {path}") and "size" in run.stdout, run.stdout + run.stderr
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FsarError, match="cannot write"): write_video(tmp_path / "nowhere" / "a.mp4", moving(2))
