"""What Debian's ffmpeg writes, by codec, container, B-frames and rate: the frames put in, as many as ffprobe says."""

import json
import math
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest

from vimpac.data.video import decode

pytestmark = pytest.mark.skipif(
    shutil.which("ffmpeg") is None or shutil.which("ffprobe") is None, reason="needs ffmpeg (tests/install_debian.sh)"
)

STEP = 5  # grey levels between a frame and the next, so that a frame's mean tells its number
FRAMES = 48
CODECS = {  # name: options that keep the greys apart
    "h264": "libx264 -preset ultrafast -qp 4 -bf 0",
    "h264 bf": "libx264 -preset ultrafast -qp 4 -bf 2 -b_strategy 0",
    "h264 pyramid": "libx264 -preset veryfast -qp 4 -bf 5 -b_strategy 0 -b-pyramid normal",
    "hevc": "libx265 -preset ultrafast -x265-params log-level=none:qp=4:bframes=0",
    "hevc bf": "libx265 -preset ultrafast -x265-params log-level=none:qp=4:bframes=4",
    "mpeg4": "mpeg4 -q:v 2",
    "mpeg4 bf": "mpeg4 -q:v 2 -bf 2",
    "xvid packed": "libxvid -q:v 2 -bf 2",
    "mpeg2": "mpeg2video -q:v 2",
    "mpeg2 bf": "mpeg2video -q:v 2 -bf 2",
    "mpeg1 bf": "mpeg1video -q:v 2 -bf 2",
    "vp8": "libvpx -deadline realtime -cpu-used 8 -b:v 4M -auto-alt-ref 1 -lag-in-frames 4",
    "vp9": "libvpx-vp9 -deadline realtime -cpu-used 8 -b:v 4M",
    "wmv2": "wmv2 -q:v 2",
    "flv1": "flv1 -q:v 2",
    "msmpeg4": "msmpeg4 -q:v 2",
    "theora": "libtheora -q:v 10",
    "mjpeg": "mjpeg -q:v 2 -pix_fmt yuvj420p",
    "ffv1": "ffv1",
}
NTSC, CINEMA = Fraction(30000, 1001), Fraction(24000, 1001)
FILMS = [  # codec, extension, frames a second
    *(("h264", extension, 25) for extension in ("mp4", "mkv", "avi", "ts", "flv")),
    *(("h264 bf", extension, 25) for extension in ("mp4", "mov", "mkv", "avi", "ts", "flv", "wmv", "mpg")),
    *(("h264 bf", "avi", rate) for rate in (12.5, NTSC, 60)),
    *(("h264 bf", "mp4", rate) for rate in (12.5, NTSC)),
    *(("h264 bf", extension, "vfr") for extension in ("mp4", "mkv", "ts")),
    *(("h264 pyramid", extension, 24) for extension in ("avi", "wmv", "mp4")),
    *(("hevc", "ts", 25), ("hevc bf", "mp4", CINEMA), ("hevc bf", "mkv", CINEMA)),
    *(("mpeg4", "avi", 12.5), ("mpeg4 bf", "avi", 25), ("mpeg4 bf", "mp4", 25), ("mpeg4 bf", "wmv", 25)),
    *(("xvid packed", "avi", rate) for rate in (10, 25, NTSC)),
    *(("mpeg2", "ts", 25), ("mpeg2 bf", "mpg", NTSC), ("mpeg2 bf", "vob", NTSC), ("mpeg2 bf", "ts", NTSC)),
    *(("mpeg2 bf", "avi", NTSC), ("mpeg1 bf", "mpg", 25), ("mpeg1 bf", "avi", 25)),
    *(("vp8", "webm", 25), ("vp8", "webm", "vfr"), ("vp9", "webm", 60), ("wmv2", "wmv", NTSC), ("flv1", "flv", NTSC)),
    *(("msmpeg4", "avi", 15), ("theora", "ogv", NTSC), ("mjpeg", "avi", 10), ("mjpeg", "mov", 60), ("ffv1", "mkv", 25)),
]


def true_times(rate):
    """Seconds at which each frame is put in. vfr: steps of 36 to 412 ms, each longer than the one before."""
    numbers = np.arange(FRAMES)
    return numbers * (numbers + 8) / 250 if rate == "vfr" else numbers / float(rate)


def write(folder, codec, extension, rate):
    path = folder / f"{codec}-{rate}.{extension}".replace(" ", "-").replace("/", "-")
    pictures = np.broadcast_to((STEP * np.arange(FRAMES, dtype=np.uint8))[:, None, None, None], (FRAMES, 48, 64, 3))
    timing = "-vf setpts=N*(N+8) -fps_mode vfr" if rate == "vfr" else "-fps_mode passthrough"
    source = f"-f rawvideo -pix_fmt rgb24 -s 64x48 -r {250 if rate == 'vfr' else rate} -i -"
    command = f"ffmpeg -v error -y {source} -threads 1 {timing} -pix_fmt yuv420p -g 30 -c:v {CODECS[codec]} {path}"
    subprocess.run(command.split(), input=pictures.tobytes(), check=True, capture_output=True, timeout=60)
    return path


def told_times(path, rate):
    """Seconds of each frame by ffprobe's best effort, a frame later than the one before where it knows none."""
    entries = "-select_streams v -show_entries frame=best_effort_timestamp_time -of json"
    told = subprocess.run(["ffprobe", "-v", "error", *entries.split(), path], check=True, capture_output=True, timeout=60)
    times = []
    for frame in json.loads(told.stdout)["frames"]:
        best = frame.get("best_effort_timestamp_time")
        times.append(times[-1] + 1 / float(rate) if best is None else float(best))
    return np.array(times) - times[0]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """By each of FILMS: its file, and its frames' times as ffprobe tells them. Two processes at a time."""
    folder = tmp_path_factory.mktemp("films")

    def make(film):
        path = write(folder, *film)
        return path, told_times(path, film[2])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FILMS, pool.map(make, FILMS), strict=True))


def count(times, fps):
    """How many of the times 0, 1/fps, 2/fps … lie before the end, if the last frame lasts as long as the one before it."""
    return math.ceil(round((2 * times[-1] - times[-2] - times[0]) * fps, 6))


@pytest.mark.parametrize("film", FILMS, ids=lambda film: "-".join(map(str, film)))
def test_frames_on_screen(films, film):
    """Every frame is the one that was put in at its time.

    Two differences in numbers of frames are allowed. From the truth, one, where the end lies within a millisecond of a frame's
    time: several containers round to milliseconds. From ffprobe, one: where it has no presentation times, it takes the first
    one or two steps for longer or shorter than they are, and it does not know the last frame's length either.
    """
    path, told = films[film]
    times = true_times(film[2])
    for fps in (2, 7):
        frames = np.concatenate(list(decode(path, fps, 32)), 1)[0]
        shown = np.rint(frames.mean((1, 2, 3)) / STEP).astype(int).tolist()
        expected = [int(np.searchsorted(times, k / fps + 1e-6, side="right")) - 1 for k in range(len(shown))]
        assert shown == expected
        end = 2 * times[-1] - times[-2]
        assert len(shown) == count(times, fps) or abs(end - round(end * fps) / fps) < 1e-3
        assert abs(len(shown) - count(told, fps)) <= 1


def test_enough_films():
    assert len(set(FILMS)) == len(FILMS) >= 40
