"""Over a hundred damaged, odd and hostile files, prepared in one call: each ends in the store, with the right frames, or in quarantine, with a plain reason."""
import functools
import json
import multiprocessing
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import ColorRange
from PIL import Image
from test_video import cut, encode, silence, turned

from fsar.data import decoding, video
from fsar.core.basics import generator
from fsar.data.decoding import MEMORY, Worker, prepare_video
from fsar.data.store import open_store
from fsar.data.video import MAX_PIXELS, VideoError, decode, decode_all, probe, write_video

SIDE, TIMEOUT, GOOD = 32, 8, 6  # short side of the stored frames; seconds for one video; healthy files between the bad ones
decord = pytest.mark.skipif(video._decord() is None, reason="decord is not installed")


def scene(frames: int = 20, height: int = 48, width: int = 64) -> np.ndarray:
    "uint8 (F, H, W, 3): soft enough to survive any codec; left, right, up, down and every frame differ."
    t, y, x = np.ogrid[:frames, :height, :width]
    x, y, t = x / max(width - 1, 1), y / max(height - 1, 1), t / max(frames - 1, 1)
    return np.stack([30 + 190 * x + 0 * (y + t), 20 + 160 * y + 60 * t + 0 * x, 40 + 180 * t * (1 - x) + 0 * y], -1).round().astype(np.uint8)


def scaled(frames: np.ndarray) -> np.ndarray:
    "As the store keeps them, before compression."
    height, width = (round(n * SIDE / min(frames.shape[1:3])) for n in frames.shape[1:3])
    return np.stack([np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BILINEAR)) for f in frames])


class Fault:
    "A file and what must become of it. `expect`: number of frames in the store, pattern of the reason in quarantine, or None where both are right."
    def __init__(self, make: Callable[[Path], object], expect: int | str | None, source: Callable[[], np.ndarray] | None = None, tolerance: float = 4) -> None:
        self.make, self.expect, self.source, self.tolerance = make, expect, source, tolerance  # mean absolute difference from `source`, of 255


FAULTS: dict[str, Fault] = {}  # file name → fault


def fault(name: str, make: Callable[[Path], object], expect: int | str | None, source: Callable[[], np.ndarray] | None = None, **options) -> None:
    assert name not in FAULTS, name
    FAULTS[name] = Fault(make, expect, source, **options)


# whole files to damage: four containers, and an MP4 with its index in front

@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    return whole_files(tmp_path_factory.mktemp("whole"))


def whole_files(folder: Path) -> dict[str, bytes]:
    noisy = np.clip(scene(20, 72, 96) + generator(0).integers(-50, 50, (20, 72, 96, 3)), 0, 255).astype(np.uint8)  # so that a tenth of the file is a tenth of the film
    same = {"g": 5, "x264-params": video.X264}  # the same bytes in every run
    files = {"mp4": encode(folder / "whole.mp4", noisy, **same), "mkv": encode(folder / "whole.mkv", noisy, **same), "avi": encode(folder / "whole.avi", noisy, "mpeg4", g=5),
             "webm": encode(folder / "whole.webm", noisy, "libvpx-vp9", g=5, cpu_used=8), "ts": encode(folder / "whole.ts", noisy, **same)}
    with av.open(str(files["mp4"])) as old, av.open(str(folder / "front.mp4"), "w", options={"movflags": "faststart"}) as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size: packet.stream = copy; new.mux(packet)
    files["front.mp4"] = folder / "front.mp4"
    return {name: path.read_bytes() for name, path in files.items()}


WHOLE: dict[str, bytes] = {}  # filled before the files are made
CUT_OFF = "truncated: .* are there|not a readable video: |damaged|not one frame|no video, only data"


def truncated(kind: str, tenths: int):
    return lambda path: path.write_bytes(WHOLE[kind][:len(WHOLE[kind]) * tenths // 10])


def flipped(kind: str, seed: int, start: float = 0, end: float = 1, count: int = 8):
    "Another value for some bytes between two parts of the file."
    def make(path: Path) -> None:
        data, g = bytearray(WHOLE[kind]), generator(seed)
        for k in g.integers(int(start * len(data)), int(end * len(data)), count): data[k] ^= int(g.integers(1, 256))
        path.write_bytes(data)
    return make


for kind in ("mp4", "front.mp4", "mkv", "avi", "webm"):
    for tenths in range(1, 10):  # nine tenths of a file whose end holds no pictures may be all that matters: a tenth is forgiven
        fault(f"cut_{tenths}0%.{kind}", truncated(kind, tenths), CUT_OFF if kind == "mp4" or tenths < 9 else None)
for kind in ("mp4", "mkv", "avi", "webm", "ts"):
    for seed in range(4): fault(f"flipped_{seed}.{kind}", flipped(kind, seed), None)
    for seed in range(4, 6): fault(f"flipped_head_{seed}.{kind}", flipped(kind, seed, end=0.05, count=3), None)
    fault(f"flipped_a_lot.{kind}", flipped(kind, 6, start=0.3, end=0.7, count=400), None)


# no video at all

ADDRESS: list[str] = []  # of this test's server, once it runs


def text(content: str): return lambda path: path.write_text(content.replace("ADDRESS", *ADDRESS) if "ADDRESS" in content else content)


def data(content: bytes): return lambda path: path.write_bytes(content)


def picture(format: str, **options): return lambda path: Image.fromarray(scene(1)[0]).save(path, format, **options)


def gif(frames: np.ndarray):
    def make(path: Path) -> None:
        first, *others = [Image.fromarray(f).quantize(256) for f in frames]
        first.save(path, "GIF", save_all=True, append_images=others, duration=40)
    return make


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file: file.writestr("clip.mp4", WHOLE["mp4"])


def song_with_cover(path: Path) -> None:
    with av.open(str(path), "w") as container:
        sound, cover = container.add_stream("aac", rate=16000, layout="mono"), container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic
        for k in range(8): container.mux(sound.encode(quiet(k)))
        container.mux(sound.encode())
        container.mux(cover.encode(av.VideoFrame.from_ndarray(scene(1, 64, 64)[0])))
        container.mux(cover.encode())


def quiet(k: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, 1024 * k
    return frame


fault("empty.mp4", data(b""), "the file is empty")
fault("noise.mp4", data(generator(1).bytes(20000)), "not a readable video")
fault("zeros.avi", data(bytes(20000)), "not a readable video|not one frame|no video")
fault("words.mp4", text("this is no video\n" * 99), "not a readable video")
fault("page.mp4", text("<!DOCTYPE html>\n<html><body>404: not found</body></html>"), "not a video but a web page")
fault("sign_in.webm", text("\n  <html><head><title>Sign in</title></head></html>"), "not a video but a web page")
fault("denied.mp4", text('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'), "not a video but an XML document")
fault("pointer.mp4", text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 99\n"), "Git LFS pointer")
fault("jpeg.avi", picture("JPEG"), "not a video but a JPEG picture")
fault("png.mp4", picture("PNG"), "not a video but a PNG picture")
fault("webp.webm", picture("WEBP"), "not a video but a WebP picture")
fault("tiff.mp4", picture("TIFF"), "not a video but a TIFF picture")
fault("bmp.mp4", picture("BMP"), "not a readable video: no container of moving pictures")
fault("gif.avi", gif(scene(8)), 8, lambda: scene(8), tolerance=6)  # a GIF moves
fault("archive.mkv", archive, "not a video but a zip archive")
fault("song.mp4", silence, "it holds no video, only audio")
fault("song_with_cover.mp4", song_with_cover, "it holds no video, only a cover picture, audio")
fault("head.mp4", data(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41"), "not a readable video|no video")
fault("head.avi", lambda path: path.write_bytes(WHOLE["avi"][:WHOLE["avi"].index(b"movi") + 4]), CUT_OFF)
fault("head.webm", lambda path: path.write_bytes(WHOLE["webm"][:WHOLE["webm"].index(b"\x1f\x43\xb6\x75")]), CUT_OFF)
fault("head_and_index.mp4", lambda path: path.write_bytes(WHOLE["front.mp4"][:WHOLE["front.mp4"].index(b"mdat") + 4]), CUT_OFF)


# files that point at other files: beside them lies `target.mp4`, healthy, and somebody listens at the address

HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
DASH = '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet><Representation id="1" bandwidth="1"><BaseURL>target.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>'
PLAYLIST = "not a video but a playlist"


def playlist_in_disguise(path: Path) -> None:
    "A playlist to one FFmpeg, a transport stream to another."
    path.write_bytes(HLS.format("target.ts").encode() + WHOLE["ts"])


fault("target.mp4", lambda path: path.write_bytes(WHOLE["mp4"]), 20)
fault("target.ts", lambda path: path.write_bytes(WHOLE["ts"]), 20)
fault("concat.mp4", text("ffconcat version 1.0\nfile target.mp4\n"), PLAYLIST)
fault("concat_secret.mp4", text("ffconcat version 1.0\nfile '/etc/passwd'\n"), PLAYLIST)
fault("hls.mp4", text(HLS.format("target.ts")), PLAYLIST)
fault("hls.ts", text(HLS.format("target.ts")), PLAYLIST)
fault("hls.m3u8", text(HLS.format("target.ts")), PLAYLIST)
fault("hls_network.m3u8", text(HLS.format("http://ADDRESS/a.ts")), PLAYLIST)
fault("hls_disguised.ts", playlist_in_disguise, PLAYLIST)
fault("reference.mp4", text("[Reference]\nRef1=http://ADDRESS/a.mp4\n"), PLAYLIST)
fault("winamp.avi", text("[playlist]\nFile1=http://ADDRESS/a.mp4\n"), PLAYLIST)
fault("dash.mp4", text(DASH), "not a video but an XML document")
fault("session.mp4", text("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"), "description of a stream")


# healthy but odd: the frames must be right

def coded(codec: str, pixels: str, frames: Callable[[], np.ndarray] = scene, **options):
    def make(path: Path) -> None:
        encode(path, frames(), codec, pixels, **{k.replace("_", "-"): v for k, v in options.items()})
    return make


def odd(name: str, codec: str, pixels: str, frames: Callable[[], np.ndarray] = scene, tolerance: float = 4, **options) -> None:
    fault(name, coded(codec, pixels, frames, **options), len(frames()), frames, tolerance=tolerance)


def gray() -> np.ndarray: return scene()[..., 1:2].repeat(3, -1)


def in_palette(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "pal8"
        for frame in scene():
            image = Image.fromarray(frame).quantize(256)
            colours = np.asarray(image.getpalette() + [0] * 768, np.uint8)[:768].reshape(256, 3)
            alpha = np.full((256, 1), 255, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray((np.asarray(image), np.concatenate([alpha, colours], -1)), format="pal8")))
        container.mux(stream.encode())


def see_through(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=25, options={"cpu-used": "8"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuva420p"
        for frame in scene():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.concatenate([frame, np.full((48, 64, 1), 200, np.uint8)], -1), format="rgba").reformat(format="yuva420p")))
        container.mux(stream.encode())


def full_range(frames: Callable[[], np.ndarray], pixels: str):
    "H.264 whose values go from 0 to 255 and not, as is usual, from 16 to 235."
    def make(path: Path) -> None:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
            stream.codec_context.color_range = ColorRange.JPEG
            for frame in frames(): container.mux(stream.encode(av.VideoFrame.from_ndarray(frame).reformat(format=pixels, dst_color_range="JPEG")))
            container.mux(stream.encode())
    return make


def flat(height: int, width: int, count: int = 2): return lambda: scene(count, height, width)


@functools.cache
def cinema() -> np.ndarray: return scene(2, 540, 960).repeat(8, 1).repeat(8, 2)  # 8K


SVT = {"preset": 12, "crf": 10, "svtav1_params": "lp=1"}
FINE = {"qmin": 1, "qmax": 2}  # the old encoders blur without it
QUIET_HEVC = {"preset": "ultrafast", "x265_params": "log-level=none:pools=1"}
odd("hevc.mp4", "libx265", "yuv420p", **QUIET_HEVC)
odd("hevc_10_bit.mkv", "libx265", "yuv420p10le", **QUIET_HEVC)
odd("vp8.webm", "libvpx", "yuv420p", cpu_used=8)
odd("vp9.webm", "libvpx-vp9", "yuv420p", cpu_used=8)
odd("av1.mp4", "libsvtav1", "yuv420p", lambda: scene(10, 64, 96), **SVT)
odd("mpeg4.avi", "mpeg4", "yuv420p", bf=2, **FINE)
odd("mpeg2.mpg", "mpeg2video", "yuv420p", **FINE)
odd("flash.flv", "flv1", "yuv420p", **FINE)
odd("windows.wmv", "wmv2", "yuv420p", **FINE)
odd("huffyuv.avi", "huffyuv", "yuv422p")
odd("prores.mov", "prores", "yuv422p10le")
odd("yuv444p.mp4", "libx264", "yuv444p")
odd("yuv422p10.mkv", "libx264", "yuv422p10le")
odd("gray16.mkv", "ffv1", "gray16le", gray)
odd("rgb.mkv", "ffv1", "bgr0")
odd("bgr24.avi", "rawvideo", "bgr24")
odd("gbrp.mp4", "libx264rgb", "rgb24")  # decodes as gbrp
odd("yuv410p.avi", "ffv1", "yuv410p", tolerance=6)
fault("palette.avi", in_palette, 20, scene, tolerance=6)
fault("see_through.webm", see_through, 20, scene)
fault("full_range.mp4", full_range(scene, "yuvj420p"), 20, scene)
fault("gray.mp4", full_range(gray, "gray"), 20, gray)
odd("full_range.avi", "mjpeg", "yuvj420p")
odd("interlaced.mp4", "libx264", "yuv420p", x264_params="tff=1")
odd("interlaced.mpg", "mpeg2video", "yuv420p", flags="+ildct+ilme", **FINE)
odd("one_frame.mp4", "libx264", "yuv420p", lambda: scene(1))
odd("1×1.avi", "ffv1", "bgr0", flat(1, 1, 5))
fault("2×2.mp4", coded("libx264", "yuv420p", flat(2, 2, 5)), 5)  # one sample of colour for the whole picture
odd("33×17.mp4", "libx264", "yuv444p", flat(17, 33, 5), tolerance=6)
odd("17×33.mkv", "ffv1", "bgr0", flat(33, 17, 5), tolerance=2)
odd("h264.avi", "libx264", "yuv420p", bf=2, g=5)
odd("h264.ts", "libx264", "yuv420p", bf=2, g=100)
odd("banner.mp4", "libx264", "yuv420p", flat(32, 512, 5))  # sixteen times as wide as high, and no wider
fault("narrow.mkv", coded("ffv1", "yuv420p", flat(2, 4000)), "4000×2 pixels is too narrow to scale")
fault("tower.avi", coded("huffyuv", "yuv422p", flat(4096, 2)), "2×4096 pixels is too narrow to scale")
odd("8k_mjpeg.avi", "mjpeg", "yuvj420p", cinema)
odd("8k_h264.mp4", "libx264", "yuv420p", cinema, preset="ultrafast")
odd("8k_hevc.mp4", "libx265", "yuv420p", cinema, **QUIET_HEVC | {"x265_params": "log-level=none:pools=1:bframes=0:frame-threads=1"})  # else without times, now and then

# wrong containers

for name, kind in (("avi.mp4", "avi"), ("mkv.avi", "mkv"), ("mp4.webm", "mp4"), ("webm.mp4", "webm"), ("ts.mp4", "ts"), ("front.mkv", "front.mp4")):
    fault(f"really_{name}", lambda path, kind=kind: path.write_bytes(WHOLE[kind]), 20)


# how the picture is shown, and when

def shown(matrix: tuple[int, int, int, int]):
    return lambda path: turned(write_video(path.with_suffix(".tmp"), scene()), path, matrix)


fault("turned_90.mp4", shown((0, 1, -1, 0)), 20, lambda: np.rot90(scene(), -1, (1, 2)))
fault("turned_180.mp4", shown((-1, 0, 0, -1)), 20, lambda: np.rot90(scene(), 2, (1, 2)))
fault("turned_270.mp4", shown((0, -1, 1, 0)), 20, lambda: np.rot90(scene(), 1, (1, 2)))
fault("mirrored.mp4", shown((-1, 0, 0, 1)), 20, lambda: scene()[:, :, ::-1])
fault("mirrored_turned.mp4", shown((0, 1, 1, 0)), 20, lambda: scene().transpose(0, 2, 1, 3))
fault("skewed.mp4", shown((1, 1, 1, 1)), None)  # a matrix without an inverse
fault("uneven.mp4", lambda path: encode(path, scene(), times=np.cumsum(generator(2).integers(20, 400, 20)).tolist()), 20, scene)
fault("negative_times.mkv", lambda path: encode(path, scene(), times=(np.arange(20) * 100 - 700).tolist()), None)


def retimed(change: Callable[[int, av.Packet], None]):
    "Packets of an AVI (MPEG-4) or MP4 copied with other times."
    def make(path: Path) -> None:
        with av.open(str(encode(path.with_suffix(".tmp.mkv"), scene(), "mpeg4"))) as old, av.open(str(path), "w") as new:
            copy = new.add_stream_from_template(old.streams.video[0])
            for k, packet in enumerate(p for p in old.demux(video=0) if p.size):
                change(k, packet)
                packet.stream = copy
                new.mux(packet)
    return make


def far_apart(k: int, packet: av.Packet) -> None: packet.pts = packet.dts = (1 << 40) * k


def with_edit_list(path: Path) -> None:
    content = bytearray(encode(path.with_suffix(".tmp.mp4"), scene(), g=5, bf=2).read_bytes())
    at = content.find(b"elst") + 16
    start, = struct.unpack_from(">i", content, at)
    struct.pack_into(">i", content, at, start + 512 * 8)  # begins eight frames later
    path.write_bytes(content)


def without_times(path: Path) -> None:
    "Raw H.264, no container at all."
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in scene(): container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def changing_size(path: Path) -> None:
    "Two transport streams of different sizes, one after the other."
    parts = [encode(path.with_suffix(f".{k}.ts"), scene()[10 * k:10 * k + 10] if not k else enlarged(), g=5).read_bytes() for k in (0, 1)]
    path.write_bytes(b"".join(parts))


def enlarged() -> np.ndarray: return np.stack([np.asarray(Image.fromarray(f).resize((128, 96))) for f in scene()[10:]])


def two_videos(path: Path) -> None:
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, scale in zip(streams, (1, 2)): stream.height, stream.width, stream.pix_fmt = 48 * scale, 64 * scale, "yuv420p"
        for frame in scene():
            for stream, content in zip(streams, (frame, np.zeros((96, 128, 3), np.uint8))): container.mux(stream.encode(av.VideoFrame.from_ndarray(content)))
        for stream in streams: container.mux(stream.encode())


def long_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=16000, layout="mono")
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in scene(): container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
        for k in range(80): container.mux(sound.encode(quiet(k)))  # five seconds, the picture has less than one
        container.mux(sound.encode())


fault("far_apart.mkv", retimed(far_apart), None)
fault("edit_list.mp4", with_edit_list, 12, lambda: scene()[8:])
fault("no_container.mp4", without_times, 20, scene)
fault("changing_size.ts", changing_size, 20, scene)
fault("cut_between_keys.mp4", lambda path: cut(encode(path.with_suffix(".tmp.mp4"), scene(), g=8, bf=0), path, 3), None)
fault("two_videos.mp4", two_videos, 20, scene)
fault("long_sound.mp4", long_sound, 20, scene)
fault("long_sound.mkv", long_sound, 20, scene)
fault("long_sound_cut.mkv", lambda path: long_sound(path) or path.write_bytes(path.read_bytes()[:path.stat().st_size // 3]), CUT_OFF)


# headers that lie, bombs

def patched(kind: str, tag: bytes, offset: int, *values: int, form: str = ">I"):
    "A whole file with other numbers some bytes after a tag."
    def make(path: Path) -> None:
        content = bytearray(WHOLE[kind])
        at = content.index(tag) + offset
        for k, value in enumerate(values): struct.pack_into(form, content, at + k * struct.calcsize(form), value)
        path.write_bytes(content)
    return make


def long_film(path: Path) -> None:
    "20,000 tiny frames, whose brightness tells their place."
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.height = stream.width = 16
        stream.pix_fmt = "yuv420p"
        for k in range(20_000):
            frame = av.VideoFrame(16, 16, "yuv420p")
            for plane, value in zip(frame.planes, (16 + k // 100, 128, 128)): plane.update(bytes([value]) * plane.buffer_size)
            container.mux(stream.encode(frame))


def bomb(side: int, declared: int):
    "A PNG of kilobytes that unpacks to a quarter of a gigabyte, as the one picture of a film that declares some size."
    def make(path: Path) -> None:
        def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        packer, rows = zlib.compressobj(9), bytes(1 + side)
        body = b"".join(packer.compress(rows) for _ in range(side)) + packer.flush()
        png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
        with av.open(str(path), "w") as container:
            stream = container.add_stream("png", rate=25)
            stream.height = stream.width = declared
            stream.pix_fmt = "gray"
            packet = av.Packet(png)
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, 0, 0, True
            container.start_encoding()
            container.mux(packet)
    return make


def swollen(path: Path) -> None:
    "JPEG pictures that announce 65,500 × 65,500 pixels, in an AVI that says 64 × 48."
    content = encode(path.with_suffix(".tmp.avi"), scene(), "mjpeg", "yuvj420p").read_bytes()
    path.write_bytes(content.replace(b"\xff\xc0\0\x11\x08" + struct.pack(">HH", 48, 64), b"\xff\xc0\0\x11\x08" + struct.pack(">HH", 65500, 65500)))


def unknown_codec(path: Path) -> None: path.write_bytes(WHOLE["mp4"].replace(b"avc1", b"zzzz"))


fault("announces_100000.avi", patched("avi", b"avih", 8 + 16, 100_000, form="<I"), None)  # only the main header: nobody reads that number
fault("announces_100000_frames.avi", patched("avi", b"strh", 8 + 32, 100_000, form="<I"), "truncated: 20 of 100000 frames are there")
fault("announces_100000.mp4", patched("front.mp4", b"stsz", 4 + 8, 100_000), CUT_OFF)
fault("announces_100000_times.mp4", patched("front.mp4", b"stts", 4 + 8, 100_000), None)
fault("announces_4000000000.mp4", patched("front.mp4", b"stsz", 4 + 4, 1, 4_000_000_000), CUT_OFF)
fault("giant.avi", patched("avi", b"strf", 8 + 4, 65535, 65535, form="<I"), None)  # the pictures themselves know better, or not
fault("giant.mkv", lambda path: coded("ffv1", "yuv420p")(path) or path.write_bytes(path.read_bytes().replace(b"\xb0\x81\x40\xba\x81\x30", b"\xb0\x81\xff\xba\x81\xff")), None)
fault("swollen.avi", swollen, "damaged|not one frame|too large")
fault("bomb.mov", bomb(16_000, 16_000), "16000×16000 pixels is too large: more than 67 million pixels")
fault("bomb_disguised.mov", bomb(16_000, 64), "too large|not one frame|damaged")
fault("long.avi", long_film, 64)
fault("unknown_codec.mp4", unknown_codec, "compressed in a way that is not known here")


# the file system

def unreadable(path: Path) -> None:
    path.write_bytes(WHOLE["mp4"])
    path.chmod(0)


def deleted(path: Path) -> None: path.write_bytes(WHOLE["mp4"]); path.unlink()


NAMES = {"x" * 240 + ".mp4": 20, "take:2.mp4": 20, "http:video.mp4": 20, "%03d.mp4": 20, "-y.mp4": 20, "quo'te\".mp4": 20, "new\nline.mp4": 20, "ünï 動画 🎬.mp4": 20}
if sys.platform == "linux": NAMES[os.fsdecode(b"not_utf_\xff\xfe.mp4")] = 20  # other systems have no such names
for name, frames in NAMES.items(): fault(name, lambda path: path.write_bytes(WHOLE["mp4"]), frames)
fault("circle.mp4", lambda path: path.symlink_to(path.name), "symbolic links lead in a circle")
fault("circle_of_two.mp4", lambda path: (path.symlink_to("circle_back.tmp"), path.with_name("circle_back.tmp").symlink_to(path.name)), "lead in a circle")
fault("dangling.mp4", lambda path: path.symlink_to("nowhere.mp4"), "no such file \\(a symbolic link leads nowhere\\)")
fault("link.mp4", lambda path: path.symlink_to("target.mp4"), 20)
fault("device.mp4", lambda path: path.symlink_to("/dev/zero"), "not a regular file")
fault("folder.mp4", lambda path: path.mkdir(), "this is a folder")
fault("pipe.mp4", lambda path: os.mkfifo(path), "not a regular file")
fault("below_a_file.mp4/clip.mp4", lambda path: path.parent.write_text("a file"), "a part of its path is not a folder")
fault("deleted.mp4", deleted, "no such file")
fault("unreadable.mp4", unreadable, 20 if not hasattr(os, "geteuid") or os.geteuid() == 0 else "permission denied")  # nothing is forbidden to root, see below


# all of them in one call, in a process of its own, so that what is measured and printed is theirs

RUN = """
import json, os, resource, sys, time, warnings
import pandas as pd
from fsar.data.store import prepare
request = json.loads(sys.stdin.read())
with pd.option_context("mode.string_storage", "python"):  # the strings of pyarrow refuse names that are not UTF-8
    manifest = pd.DataFrame(request["rows"], columns=["video", "path", "class", "split", "source"])
began = time.monotonic()
warnings.simplefilter("ignore")
store = prepare(manifest, request["out"], short_side=request["side"], workers=2, timeout=request["timeout"], progress=False)
json.dump({"seconds": time.monotonic() - began, "megabytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}, open(request["measured"], "w"))
"""


@pytest.fixture(scope="module")
def server():
    "Somebody who listens at the address that playlists name."
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        ADDRESS[:] = [f"127.0.0.1:{listener.getsockname()[1]}"]
        yield listener


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, whole, server):
    "The store, and what making it cost."
    root = tmp_path_factory.mktemp("faults")
    files, out = root / "files", root / "out"
    files.mkdir()
    WHOLE.update(whole)
    good = {f"good_{k}.mp4": write_video(files / f"good_{k}.mp4", scene(10 + k)) for k in range(GOOD)}
    for name, f in FAULTS.items(): f.make(files / name)
    names = [*FAULTS]
    for k, name in enumerate(good): names.insert(k * len(FAULTS) // GOOD, name)
    rows = [[f"v{k}", str(files / name), "c", "train", f"v{k}"] for k, name in enumerate(names)]
    request = {"rows": rows, "out": str(out), "side": SIDE, "timeout": TIMEOUT, "measured": str(root / "measured.json")}
    run = subprocess.run([sys.executable, "-c", RUN], input=json.dumps(request), capture_output=True, text=True, cwd=files, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return open_store(out), dict(zip((r[0] for r in rows), names)), json.loads((root / "measured.json").read_text()), run


@pytest.fixture(scope="module")
def outcome(prepared) -> dict[str, int | str]:
    "File name → row in the store, or reason."
    store, names, *_ = prepared
    kept = {names[v]: row for row, v in enumerate(store.index.video)}
    return kept | {names[v]: reason for v, reason in zip(store.quarantine.video, store.quarantine.reason)}


def test_there_are_enough_faults(): assert len(FAULTS) >= 60


def test_every_file_is_accounted_for(prepared, outcome):
    store, names, *_ = prepared
    assert sorted(outcome) == sorted(names.values()) and len(store) + len(store.quarantine) == len(FAULTS) + GOOD
    assert not set(store.index.video) & set(store.quarantine.video)


def test_healthy_files_are_all_there(prepared, outcome):
    for k in range(GOOD): compare(prepared[0], outcome[f"good_{k}.mp4"], scene(10 + k), tolerance=3)


def compare(store, row: int, source: np.ndarray, tolerance: float) -> None:
    assert isinstance(row, int), row
    frames = store.frames(row, range(store.index.frames[row])).movedim(1, -1).numpy()
    expected = scaled(source)
    assert frames.shape == expected.shape and store.index.decoded[row] == len(source)
    assert np.abs(frames.astype(int) - expected).mean(axis=(1, 2, 3)).max() < tolerance


@pytest.mark.parametrize("name", [n for n, f in FAULTS.items()], ids=lambda n: ascii(n[-40:]))
def test_outcome(prepared, outcome, name):
    fault, found = FAULTS[name], outcome[name]
    if isinstance(found, int): assert fault.expect in (None, prepared[0].index.frames[found])
    else:
        assert not isinstance(fault.expect, int), found
        assert fault.expect is None or re.search(fault.expect, found), found
    if fault.source is not None: compare(prepared[0], found, fault.source(), fault.tolerance)


def test_reasons_are_for_people(outcome):
    reasons = [r for r in outcome.values() if isinstance(r, str)]
    for reason in reasons:
        assert 10 < len(reason) < 160 and "\n" not in reason, reason
        assert not re.search(r"Traceback|Errno|0x[0-9a-f]{6}|Error\b|unforeseen|crashed|/files/", reason), reason
    assert len(set(reasons)) >= 15


def test_it_took_bounded_time_and_memory_and_printed_nothing(prepared):
    *_, measured, run = prepared
    assert measured["seconds"] < 120 and measured["megabytes"] < 1500, measured
    assert (run.stdout, run.stderr) == ("", "")


def test_nobody_was_called(prepared, server):
    with pytest.raises(BlockingIOError): server.accept()


# one by one: what does not fit into the common call

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a second process with other rights")
def test_without_permission():
    "In a process that has given up root's rights, if it had them."
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which only its owner may enter
        os.chmod(folder, 0o755)
        path = write_video(Path(folder) / "unreadable.mp4", scene())
        path.chmod(0)
        pipe, answer = multiprocessing.get_context("fork").Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=powerless, args=(path, answer))
        process.start()
        assert pipe.poll(30) and pipe.recv() == {"reason": "cannot be read: permission denied", "file": None}
        process.join()


def powerless(path: Path, answer) -> None:
    if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)
    record, _ = prepare_video(str(path), SIDE, None, 90, TIMEOUT)
    answer.send({k: record[k] for k in ("reason", "file")})


@pytest.mark.parametrize("change", ["grows", "vanishes", "is replaced"])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, change):
    "A download still running; a file tidied away; another one under its name."
    path = write_video(tmp_path / "clip.mp4", scene())

    def decode_and_change(*args, **options):
        result = decode_all(*args, **options)
        if change == "grows": path.write_bytes(path.read_bytes() + b"more")
        if change == "vanishes": path.unlink()
        if change == "is replaced": write_video(path, scene(9))
        return result
    monkeypatch.setattr(decoding, "decode_all", decode_and_change)
    record, block = prepare_video(str(path), SIDE, None, 90, TIMEOUT)
    assert record["reason"] == "it changed while it was read" and not block
    assert record["size"] == (path.stat().st_size if path.exists() else -1)  # as it is now: a later run sees whether it changed again


def test_a_download_in_progress_costs_nothing_else(tmp_path):
    "One file grows all the time while three others are decoded; it is never taken for whole and good with other bytes than it has."
    paths = [write_video(tmp_path / f"{k}.mp4", scene(12 + k)) for k in range(4)]
    running = threading.Event()

    def download():
        while not running.wait(0.001):
            with open(paths[0], "ab") as file: file.write(b"more")
    thread = threading.Thread(target=download)
    thread.start()
    try: answers = {name: record for name, record, _ in decoding.decode_many([(p.name, request(p)) for p in paths], 2)}
    finally: running.set(); thread.join()
    assert [answers[f"{k}.mp4"].get("frames") for k in (1, 2, 3)] == [13, 14, 15]
    assert answers["0.mp4"]["reason"] == "it changed while it was read"


def request(path: Path, **changes) -> dict: return {"path": str(path), "short_side": SIDE, "max_frames": 64, "quality": 95, "timeout": TIMEOUT} | changes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process")
@pytest.mark.parametrize("backend", [None, "pyav"])
def test_memory_is_bounded(tmp_path, backend):
    "A picture of 8K in a process of 250 MB: said in words, and the next video is read as if nothing had been."
    large, small = encode(tmp_path / "large.avi", cinema(), "mjpeg", "yuvj420p"), write_video(tmp_path / "small.mp4", scene())
    worker = Worker(memory=250 << 20)
    try:
        record, block = worker(request(large, backend=backend))
        assert record["reason"] == "needs more memory than 0.244 GB to decode" and not block
        assert "max_frames keeps fewer" in worker(request(large, backend=backend, max_frames=None))[0]["reason"]
        assert worker(request(small))[0]["frames"] == 20
    finally: worker.stop()


def test_a_header_that_asks_for_too_much_is_a_video_error(tmp_path, monkeypatch):
    "Whoever reads without a worker gets the error that the functions promise."
    path = write_video(tmp_path / "a.mp4", scene())
    def starved(*args, **options): raise av.error.MemoryError(12, "Cannot allocate memory")
    monkeypatch.setattr(av, "open", starved)
    with pytest.raises(VideoError, match="not a readable video: it asks for more memory than there is"): probe(path)
    assert "needs more memory than" in prepare_video(str(path), SIDE, 64, 90, TIMEOUT)[0]["reason"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process")
def test_workers_are_bounded_by_default(tmp_path):
    worker = Worker()
    try:
        worker.start()
        limits = Path(f"/proc/{worker.process.pid}/limits").read_text()
        assert re.search(rf"Max data size +{MEMORY} ", limits) and re.search("Max core file size +0 ", limits)
    finally: worker.stop()


@decord
def test_a_crash_of_decord_is_not_the_end(tmp_path, monkeypatch):
    "The second attempt is PyAV's."
    start = Worker.start
    path = write_video(tmp_path / "clip.mp4", scene())

    def start_doomed(self):
        start(self)
        if len(asked) == 0: self.process.kill()
    asked, exchange = [], Worker._exchange

    def ask(self, wanted):
        asked.append(wanted.get("backend"))
        return exchange(self, wanted)
    monkeypatch.setattr(Worker, "start", start_doomed)
    monkeypatch.setattr(Worker, "_exchange", ask)
    worker = Worker()
    try: assert worker(request(path))[0]["frames"] == 20 and asked == [None, "pyav"]
    finally: worker.stop()


@pytest.mark.parametrize("backend", [None, "pyav", pytest.param("decord", marks=decord)])
def test_no_backend_follows_a_pointer(tmp_path, whole, server, backend):
    (tmp_path / "target.mp4").write_bytes(whole["mp4"])
    (tmp_path / "target.ts").write_bytes(whole["ts"])
    WHOLE.update(whole)
    for name, f in FAULTS.items():
        if f.expect == PLAYLIST:
            f.make(tmp_path / name)
            with pytest.raises(VideoError, match=PLAYLIST): probe(tmp_path / name, backend=backend)
    with pytest.raises(BlockingIOError): server.accept()


def test_containers_alone_keep_pointers_out(tmp_path, monkeypatch, whole):
    "Without the look at the first bytes: the list of containers is what FFmpeg itself obeys."
    monkeypatch.setattr(video, "NOT_VIDEO", {})
    (tmp_path / "target.mp4").write_bytes(whole["mp4"])
    for name in ("concat.mp4", "hls.m3u8", "dash.mp4", "session.mp4", "jpeg.avi"):
        FAULTS[name].make(tmp_path / name)
        with pytest.raises(VideoError, match="not a readable video"): probe(tmp_path / name)


@decord
@pytest.mark.parametrize("name", ["far_apart.mkv", "two_videos.mp4", "h264.ts"])
def test_decord_is_kept_from_files_it_reads_wrongly(tmp_path, name):
    FAULTS[name].make(tmp_path / name)
    assert probe(tmp_path / name).backend == "pyav"
    with pytest.raises(VideoError, match="decord is not exact here"): probe(tmp_path / name, backend="decord")


@pytest.mark.parametrize("backend", [None, "pyav", pytest.param("decord", marks=decord)])
def test_single_frames_of_h264_in_avi(tmp_path, backend):
    "decord finds others after seeking."
    path = encode(tmp_path / "a.avi", scene(), g=5)
    assert np.abs(decode(path, [3, 12, 17], backend=backend).astype(int) - scene()[[3, 12, 17]]).mean() < 4


@decord
def test_many_large_pictures_are_read_few_at_a_time(tmp_path, monkeypatch):
    path, sizes, visit = encode(tmp_path / "a.avi", scene(12), "mjpeg", "yuvj420p"), [], video._visit
    monkeypatch.setattr(video, "BATCH", 3 * 48 * 64)
    monkeypatch.setattr(video, "_visit", lambda *args: sizes.append(args[-1]) or visit(*args))
    frames, info = decode_all(path, backend="decord")
    assert sizes == [3] and np.abs(frames.astype(int) - scene(12)).mean() < 4


@pytest.mark.parametrize("size, short_side, fine", [((32, 512), 32, True), ((32, 514), 32, False), ((514, 32), 32, False), ((32, 514), None, True)])
def test_narrow_pictures_are_refused_only_where_they_are_scaled(tmp_path, size, short_side, fine):
    path = write_video(tmp_path / "a.mp4", scene(2, *size))
    if fine: assert decode_all(path, short_side=short_side)[0].shape == (2, *size, 3)
    else:
        with pytest.raises(VideoError, match="too narrow to scale"): decode_all(path, short_side=short_side)


def test_the_bound_on_pixels_holds_when_the_size_changes_on_the_way(tmp_path, monkeypatch):
    changing_size(tmp_path / "a.ts")
    assert probe(tmp_path / "a.ts").frames == 20
    monkeypatch.setattr(video, "MAX_PIXELS", 100 * 80)  # between the sizes of the two halves
    with pytest.raises(VideoError, match="damaged"): probe(tmp_path / "a.ts", backend="pyav")
    assert MAX_PIXELS >= 2 * 7680 * 4320 - 1e6
