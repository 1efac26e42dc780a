"""Times of frames: those of FFmpeg's best effort, bridged where they are missing, repeated or jump, and bounded."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import pytest

from films import greys, numbers, write_video
from vimpac.data import clock as clock_module
from vimpac.data import container as container_module
from vimpac.data.clock import LONGEST_STILLS, Clock, TimedFrame, at_rate
from vimpac.data.video import decode
from vimpac.errors import CorruptVideo

VIDEOS = Path(__file__).parents[1] / "videos"


def clock_times(pts, dts=None, time_base=Fraction(1, 10), rate=10, jumps=True):
    clock = Clock(time_base, rate, jumps)
    return [float(clock.read(*stamps) * time_base) for stamps in zip(pts, dts or [None] * len(pts), strict=True)]


@pytest.mark.parametrize(
    "pts, expected",
    [
        ([7, 8, 9], [0, 0.1, 0.2]),
        ([None, None, None], [0, 0.1, 0.2]),
        ([0, None, 2, None, 4], [0, 0.1, 0.2, 0.3, 0.4]),
        ([0, 2, 2, 6], [0, 0.2, 0.2, 0.6]),
        ([0, 1, 10_000_000, 10_000_001], [0, 0.1, 0.2, 0.3]),
        ([50, 51, 0, 1], [0, 0.1, 0.2, 0.3]),
    ],
)
def test_missing_repeated_and_jumping_times(pts, expected):
    assert clock_times(pts) == pytest.approx(expected)


@pytest.mark.parametrize("jumps", [True, False])
@pytest.mark.parametrize(
    "pts, last",
    [
        ([0, 1, 9, 5, 10], 1.0),  # a hole, then one frame out of order
        ([0, None, None, 2, 20, 21], 2.1),  # frames without a time before a gap
        ([0, 1, 1, 1, 30, 31], 3.1),  # a time that is repeated before a gap
    ],
)
def test_a_gap_counts_once(pts, last, jumps):
    assert clock_times(pts, jumps=jumps)[-1] == pytest.approx(last)


def test_presentation_times_that_run_backwards():
    """As FFmpeg reads B-frames from a container that has decoding times alone; the decoder's last frame has none."""
    times = clock_times([1, 3, 4, 2, 6, 7, 5, 8], [2, 3, 4, 5, 6, 7, 8, None])
    assert times[3:] == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7]) and times[:3] == sorted(times[:3])


def test_presentation_times_count_while_decoding_times_are_no_better():
    assert clock_times([0, 1, 5, 6, 7], [0, 1, 2, 3, 4]) == pytest.approx([0, 0.1, 0.5, 0.6, 0.7])


@pytest.mark.parametrize("dts", [None, [0] * 50])
def test_clock_that_stands_still(dts):
    """Then the usual rate counts."""
    assert clock_times([0] * 50, dts)[-1] == pytest.approx(4.9)


def test_only_clocks_that_jump_jump():
    pts = [0, 1, 900, 901]
    assert clock_times(pts, jumps=False) == pytest.approx([0, 0.1, 90, 90.1])
    assert clock_times(pts, jumps=True) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert clock_times([0, 1, 2, 1000, 0], jumps=False)[-1] == pytest.approx(100)


def test_times_are_bounded():
    bound = int(LONGEST_STILLS)
    assert clock_times([0, bound], time_base=Fraction(1), jumps=False) == [0, bound]
    with pytest.raises(CorruptVideo, match=r"damaged time or frame rate: its first 2 frames would last 48 hours"):
        clock_times([0, bound + 3], time_base=Fraction(1), jumps=False)
    assert len(clock_times([100 * bound + i for i in range(1000)], time_base=Fraction(1), jumps=False)) == 1000


def test_a_picture_a_second_may_last_for_ever(monkeypatch):
    monkeypatch.setattr(clock_module, "LONGEST_STILLS", Fraction(10))
    assert clock_times(range(1000), time_base=Fraction(1))[-1] == 999
    with pytest.raises(CorruptVideo, match="its first 13 frames would last"):
        clock_times(range(0, 2000, 2), time_base=Fraction(1))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov", "a.ts", "a.flv"])
def test_still_screen(tmp_path, name):
    """One frame in 90 s: a clock jumps where a broadcast could be cut, elsewhere the picture stays."""
    if name == "a.avi":  # it holds a chunk for each frame that is left out
        path = write_video(tmp_path / name, greys(20, step=10), rate=10, codec="mpeg4", times=[i / 10 for i in range(20)])
        assert len(numbers(path, 2)) == 4
        return
    path = write_video(tmp_path / name, greys(20, step=10), rate=10, times=[i / 10 + 90 * (i > 9) for i in range(20)])
    shown = numbers(path, 2, step=10)
    if name in ("a.ts", "a.flv"):
        assert shown == [0, 5, 10, 15]
    else:
        assert shown == [0, 5] + [9] * 180 + [10, 15]


def test_still_screen_of_hours(tmp_path):
    path = write_video(tmp_path / "a.mp4", greys(4, step=50), rate=10, times=[0, 1, 3 * 3600, 3 * 3600 + 10])
    assert numbers(path, 0.1, step=50) == [0] + [1] * 1079 + [2, 3]


@pytest.mark.parametrize("lasts, frames", [(0.5, 1), (0, 100), (200, 100)])
def test_last_picture_after_a_still(lasts, frames):
    """It does not last as long as the one before it if the container tells better."""
    shown = [TimedFrame(0, 0, "a"), TimedFrame(1000, 10 * lasts, "b")]
    assert list(at_rate(iter(shown), 1, Fraction(1, 10))) == ["a"] * 100 + ["b"] * frames


def test_last_picture_with_the_time_of_the_one_before():
    assert list(at_rate(iter([TimedFrame(0, 0, "a"), TimedFrame(0, 0, "b")]), 2, Fraction(1, 10))) == ["b"]
    assert list(at_rate(iter([TimedFrame(0, 0, "a"), TimedFrame(10, 0, "b"), TimedFrame(10, 0, "c")]), 2, Fraction(1, 10))) == [
        "a",
        "a",
        "c",
        "c",
    ]


@pytest.mark.parametrize("name", ["a.avi", "a.wmv"])
def test_b_frames_without_presentation_times(tmp_path, name):
    assert numbers(write_video(tmp_path / name, greys(50)), 25) == list(range(50))


def test_packed_b_frames():
    """XviD's: two frames in one packet of an AVI, then an empty one. 40 greys at 10 a second."""
    shown = numbers(VIDEOS / "xvid_packed.avi", 2, step=1)
    assert len(shown) == 8 and all(20 < b - a < 27 for a, b in pairwise(shown))


def test_empty_packets_repeat_the_picture():
    """Theora's: 37 packets at 10 a second, most of the last 27 empty."""
    frames = numbers(VIDEOS / "theora_still.ogv", 10, step=1)
    with av.open(str(VIDEOS / "theora_still.ogv")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.dts is not None]
    assert sum(not packet.size for packet in packets) > 20
    assert len(frames) == len(packets) == 37


def test_empty_packets_at_the_end(monkeypatch):
    packets = container_module._packets
    monkeypatch.setattr(container_module, "_packets", lambda *of: (p for p in packets(*of) if p is None or p.dts != 36))
    assert len(numbers(VIDEOS / "theora_still.ogv", 10, step=1)) == 36


@pytest.mark.parametrize("field, seconds", [(20, r"2.68e\+07"), (24, "3.73e-09")])  # dwScale, dwRate
def test_avi_frame_rate_with_a_flipped_bit(tmp_path, field, seconds):
    path = write_video(tmp_path / "a.avi", greys(40), rate=10, codec="mpeg4")
    data = bytearray(path.read_bytes())
    at = data.index(b"strh") + 8 + field
    assert int.from_bytes(data[at : at + 4], "little") == {20: 1, 24: 10}[field]
    data[at + 3] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CorruptVideo, match=f"damaged frame rate: {seconds} seconds a frame, expected 0.001 to 60"):
        list(decode(path, 2, 32))


def test_mp4_duration_with_a_flipped_bit(tmp_path):
    path = write_video(tmp_path / "a.mp4", greys(50), codec="mpeg4", options={"use_editlist": "0"})
    data = bytearray(path.read_bytes())
    step = data.index(b"stts") + 16
    assert int.from_bytes(data[step : step + 4], "big") == 512
    data[step] ^= 0x20
    path.write_bytes(data)
    with pytest.raises(CorruptVideo, match="damaged time or frame rate"):
        list(decode(path, 0.001, 32))


def test_bound_comes_before_any_frame_of_the_gap(tmp_path, monkeypatch):
    """Nothing is yielded for hours that the file does not have."""
    path = write_video(tmp_path / "a.mp4", greys(3, step=50), rate=10, times=[0, 1, 3 * 3600])
    monkeypatch.setattr(clock_module, "LONGEST_STILLS", Fraction(3600))
    chunks = decode(path, 2, 32, chunk=1)
    assert len([next(chunks), next(chunks)]) == 2
    with pytest.raises(CorruptVideo, match="its first 3 frames would last 3 hours"):
        next(chunks)
