"""One decoded frame → square views: geometry (pixel shape, display matrix, resize, crop) and colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vimpac.data.format import View
from vimpac.errors import CorruptVideo

if TYPE_CHECKING:
    import av
    from av.video.reformatter import VideoReformatter

LONGEST_SIDE = 100
"""Longest side in multiples of the shorter. Beyond this the file is damaged, and resizing would fill the memory."""

# swscale's bicubic | accurate rounding | full chroma interpolation | bit-exact. Plain bicubic darkens by up to two levels
# and gives different bytes on different machines. This takes 0.9 instead of 0.65 ms per frame (1280×720 to 228×128).
_SCALING = 0x4 | 0x40000 | 0x2000 | 0x80000


class Viewer:
    """Renders the views of a video's frames, as squares of `size` pixels.

    pixel_shape: width of a pixel divided by its height; frames are stretched to square pixels.
    """

    def __init__(self, size: int, views: Sequence[View], pixel_shape: float):
        from av.video.reformatter import VideoReformatter

        self._size, self._views, self._pixel_shape = size, views, pixel_shape
        self._reformatters = {view.resize: VideoReformatter() for view in views}

    def render(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 sRGB [views, 3, size, size]."""
        matrix = _display_matrix(frame)
        pictures = {}
        for resize, reformatter in self._reformatters.items():
            width, height = _shorter_side(frame.width * self._pixel_shape, frame.height, round(resize * self._size))
            pictures[resize] = _upright(_to_srgb(frame, reformatter, width, height), matrix).transpose(2, 0, 1)
        return np.stack([_crop(pictures[view.resize], self._size, view) for view in self._views])


def _shorter_side(width: float, height: int, side: int) -> tuple[int, int]:
    shorter, longer = sorted((width, height))
    if longer > LONGEST_SIDE * shorter:
        raise CorruptVideo(f"has pictures of {width:.4g} × {height} square pixels, expected sides of at most {LONGEST_SIDE}:1")
    scale = side / min(width, height)
    return max(side, round(width * scale)), max(side, round(height * scale))


def _crop(picture: np.ndarray, size: int, view: View) -> np.ndarray:
    if view.flip:  # before the crop, as in the released program: a flipped corner is the mirrored other corner
        picture = picture[:, :, ::-1]
    _, height, width = picture.shape
    share = {"top-left": 0.0, "center": 0.5, "bottom-right": 1.0}[view.crop]
    top, left = int(share * (height - size)), int(share * (width - size))
    return picture[:, top : top + size, left : left + size]


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int] | None:
    """(a, b, c, d) of the frame's display matrix: a point (x, y) is shown at (ax + cy, bx + dy). None: no matrix.

    VideoFrame.rotation cannot replace it: it confuses mirroring with rotation and drops fractions of a degree.
    """
    from av.sidedata.sidedata import Type

    # PyAV's stub knows only names as keys.
    data = frame.side_data.get(Type.DISPLAYMATRIX)  # pyright: ignore[reportCallIssue, reportArgumentType]
    if data is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32, 5).tolist()
    return a, b, c, d


def _upright(picture: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """The picture [H, W, 3] as the display matrix shows it, rotated to the nearest right angle."""
    if matrix is None:
        return picture
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, right, down = picture.transpose(1, 0, 2), c, b
    else:
        right, down = a, d
    return picture[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


# Transfer characteristics (ITU-T H.273) far from sRGB. All others are close enough to be treated as sRGB.
_PQ, _HLG = 16, 18
_NOT_SHOWN = {8: "linear", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE ST 428"}
_BT709, _UNSPECIFIED, _BT2020 = 1, 2, 9  # primaries
_BT2020_TO_BT709 = np.array(  # ITU-R BT.2087-0, of linear light
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
_BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
_REFERENCE_WHITE = 203.0
"""cd/m², of white paper in HDR according to ITU-R BT.2408, hence of sRGB's white."""
_HLG_PEAK, _HLG_GAMMA = 1000.0, 1.2
"""cd/m², and the system gamma of a display with that peak (ITU-R BT.2100)."""


def _to_srgb(frame: av.VideoFrame, reformatter: VideoReformatter, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]. swscale handles the frame's matrix and range, but not its transfer characteristics."""
    from av.error import FFmpegError

    if frame.color_trc in _NOT_SHOWN:
        raise CorruptVideo(f"has colours in {_NOT_SHOWN[frame.color_trc]} light, expected SDR, PQ or HLG")
    hdr = frame.color_trc in (_PQ, _HLG)
    try:
        shown = reformatter.reformat(frame, width, height, "rgb48le" if hdr else "rgb24", interpolation=_SCALING)
    except FFmpegError as error:  # such as YCgCo's or ICtCp's matrix
        codes = f"pixel format {frame.format.name}, matrix {frame.colorspace} of ITU-T H.273"
        raise CorruptVideo(f"has colours that cannot be converted to RGB ({codes}): {error.strerror}") from error
    pixels = shown.to_ndarray()
    return _hdr_to_srgb(pixels, frame.color_trc, frame.color_primaries) if hdr else pixels


def _hdr_to_srgb(pixels: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """uint16 RGB in PQ or HLG → uint8 sRGB of the same light, clipped at the reference white.

    This is the inverse of ITU-R BT.2408's mapping of SDR into HDR by linear scaling.
    """
    if primaries not in (_BT709, _BT2020, _UNSPECIFIED):
        raise CorruptVideo(f"has HDR colours of primaries {primaries} (ITU-T H.273), expected BT.2020's or BT.709's")
    codes = pixels.astype(np.float32) / 65535
    light = (_pq_light(codes) if transfer == _PQ else _hlg_light(codes)) / _REFERENCE_WHITE
    if primaries != _BT709:  # those of BT.2100, which defines PQ and HLG, are BT.2020's
        light = light @ _BT2020_TO_BT709.T
    light = light.clip(0, 1)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    return np.rint(255 * srgb).astype(np.uint8)


def _pq_light(codes: np.ndarray) -> np.ndarray:
    """cd/m² of PQ codes from 0 to 1: the EOTF of SMPTE ST 2084."""
    powered = codes ** (32 / 2523)
    return 10_000 * (np.maximum(powered - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * powered)) ** (16384 / 2610)


def _hlg_light(codes: np.ndarray) -> np.ndarray:
    """cd/m² of HLG codes from 0 to 1: the inverse OETF and the OOTF of ITU-R BT.2100."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - c) / a) + b) / 12)
    luminance = scene @ _BT2020_LUMINANCE
    return _HLG_PEAK * luminance[..., None] ** (_HLG_GAMMA - 1) * scene
