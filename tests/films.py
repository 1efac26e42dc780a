"""Small videos written with PyAV, and what can be read off their frames."""

import errno
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vimpac.data.video import decode

CONTAINERS = {
    "a.mp4": ("libx264", {}),
    "front.mp4": ("libx264", {"movflags": "+faststart"}),
    "fragmented.mp4": ("libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "a.mov": ("mpeg4", {}),
    "a.m4v": ("mpeg4", {}),
    "a.avi": ("mpeg4", {}),
    "a.mkv": ("libx264", {}),
    "vp9.webm": ("libvpx-vp9", {}),
    "vp8.webm": ("libvpx", {}),
    "a.mpg": ("mpeg2video", {}),
    "a.wmv": ("wmv2", {}),
    "a.flv": ("flv", {}),
    "a.ts": ("mpeg2video", {}),
}


QUALITY = {
    "libx264": {"crf": "5"},
    "libx265": {"x265-params": "log-level=none"},
    "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime"},
}


def write_video(path, pictures, rate=25, codec="libx264", times=None, options=None, **coding):
    """pictures: uint8 [n, H, W, 3] with even sides; times: seconds of each, n / rate by default; coding: the encoder's."""
    quality = QUALITY.get(codec, {})
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        stream.options, stream.gop_size, stream.bit_rate = quality, 12, 4_000_000
        for name, value in coding.items():
            setattr(stream.codec_context, name, value)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if times is None else round(1000 * times[number])
            frame.time_base = 1 / Fraction(rate) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def greys(count, height=64, width=96, step=4):
    """Frame i is the grey i * step: a frame's mean tells its number."""
    return np.broadcast_to((np.arange(count) * step).astype(np.uint8)[:, None, None, None], (count, height, width, 3))


def noise(count, height=64, width=96):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def numbers(path, fps, step=4, size=32):
    frames = np.concatenate(list(decode(path, fps, size)), axis=1)
    return np.rint(frames[0].mean((1, 2, 3)) / step).astype(int).tolist()


def quadrants(height, width):
    """Red, green, blue and white quarters, from the top left by rows."""
    picture = np.zeros((1, height, width, 3), np.uint8)
    picture[:, : height // 2, : width // 2, 0] = 255
    picture[:, : height // 2, width // 2 :, 1] = 255
    picture[:, height // 2 :, : width // 2, 2] = 255
    picture[:, height // 2 :, width // 2 :] = 255
    return picture


def corner_colours(frame):
    return [tuple((frame[:, y, x] > 128).astype(int)) for y in (3, -4) for x in (3, -4)]


RED, GREEN, BLUE, WHITE = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)


def patch(path, *changes):
    data = path.read_bytes()
    for old, new in changes:
        assert old in data
        data = data.replace(old, new)
    path.write_bytes(data)


def close_folder(monkeypatch, *closed):
    """As chmod 0 does to everybody but root."""
    scandir = os.scandir

    def refusing(path):
        if Path(path) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
