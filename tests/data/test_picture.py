"""A picture as a player shows it: pixel shape, display matrix, colours."""

import math
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from films import BLUE, GREEN, RED, WHITE, corner_colours, greys, quadrants, write_video
from vimpac.data import picture as picture_module
from vimpac.data.format import View
from vimpac.data.video import decode
from vimpac.errors import CorruptVideo

PQ, HLG, LINEAR, BT709, BT2020, P3 = 16, 18, 8, 1, 9, 12


def turned(degrees, mirror=1):
    """The MP4 display matrix (a, b, c, d) that turns clockwise, after mirroring left to right for -1."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [round(0x10000 * value) for value in (mirror * cosine, mirror * sine, -sine, cosine)]


UPRIGHT, RIGHT, DOWN, LEFT = (
    [RED, GREEN, BLUE, WHITE],
    [BLUE, RED, WHITE, GREEN],
    [WHITE, BLUE, GREEN, RED],
    [GREEN, WHITE, RED, BLUE],
)


@pytest.mark.parametrize(
    "matrix, corners",
    [
        (turned(0), UPRIGHT),
        (turned(90), RIGHT),
        (turned(180), DOWN),
        (turned(270), LEFT),
        *((turned(degrees), UPRIGHT) for degrees in (1, -1, 44, -44, 0.1)),
        *((turned(degrees), RIGHT) for degrees in (89, 91, 46)),
        *((turned(degrees), DOWN) for degrees in (179, 181)),
        *((turned(degrees), LEFT) for degrees in (269, 271)),
        (turned(0, mirror=-1), [GREEN, RED, WHITE, BLUE]),
        (turned(180, mirror=-1), [BLUE, WHITE, RED, GREEN]),
        (turned(90, mirror=-1), [WHITE, GREEN, BLUE, RED]),
        (turned(270, mirror=-1), [RED, BLUE, GREEN, WHITE]),
        (turned(2, mirror=-1), [GREEN, RED, WHITE, BLUE]),
        ([0, 0, 0, 0], UPRIGHT),
    ],
)
def test_display_matrix(tmp_path, matrix, corners):
    """Phones store portrait as landscape with a matrix: a quarter turn clockwise brings blue to the top left."""
    a, b, c, d = matrix
    path = write_video(tmp_path / "a.mp4", quadrants(64, 64))
    upright = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    data = path.read_bytes()
    track = data.index(b"tkhd")
    assert data.index(upright, track) > 0
    shown = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(data[:track] + data[track:].replace(upright, shown, 1))
    assert corner_colours(next(decode(path, 2, 32))[0, 0]) == corners


@pytest.mark.parametrize(
    "name, height, width, shape", [("a.mp4", 96, 48, "8/3"), ("a.mkv", 48, 96, "3/4"), ("a.avi", 64, 64, "2")]
)
def test_pixels_that_are_not_square(tmp_path, name, height, width, shape):
    """A circle, drawn on the picture as it is shown, is one in the middle of the frame."""
    shape = Fraction(shape)
    y, x = np.mgrid[:height, :width] + 0.5
    across = (x - width / 2) * float(shape)
    circle = np.hypot(y - height / 2, across) < 0.4 * min(height, width * shape)
    pictures = np.where(circle, 255, 0).astype(np.uint8)[None, ..., None].repeat(3, -1)
    path = write_video(tmp_path / name, pictures, sample_aspect_ratio=shape, codec="mpeg4")
    frame = next(decode(path, 2, 32))[0, 0, 1] > 127
    assert [abs(frame.any(axis).sum() - 25.6) < 1.5 for axis in (0, 1)] == [True, True]


def test_a_damaged_pixel_shape_does_not_fill_the_memory(tmp_path):
    path = write_video(tmp_path / "a.mp4", greys(1, 400, 16), sample_aspect_ratio=Fraction(1, 10))
    with pytest.raises(CorruptVideo, match=r"pictures of 1.6 × 400 square pixels, expected sides of at most 100:1"):
        list(decode(path, 2, 32))


@pytest.mark.parametrize(
    "transfer, code, srgb",
    [  # ITU-R BT.2408: the PQ codes of 0, 100, 203 and 1000 cd/m², and HLG's of the same 203 and of a grey card, 26 cd/m²
        (PQ, 0.0, 0),
        (PQ, 0.508, 186),  # 100/203 of white: 255 × (1.055 × 0.4926^(1/2.4) - 0.055)
        (PQ, 0.5807, 255),
        (PQ, 0.7518, 255),
        (HLG, 0.0, 0),
        (HLG, 0.38, 101),  # 26.2/203 of white
        (HLG, 0.75, 255),
    ],
)
@pytest.mark.parametrize("primaries", [BT709, BT2020])
def test_hdr_greys(transfer, code, srgb, primaries):
    pixels = np.full((1, 1, 3), round(65535 * code), np.uint16)
    assert picture_module._hdr_to_srgb(pixels, transfer, primaries).tolist() == [[[srgb] * 3]]


def pq_code(nits):
    powered = (nits / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * powered) / (1 + 2392 / 128 * powered)) ** (2523 / 32)


def test_sdr_put_into_hdr_comes_back():
    """BT.2408's mapping of SDR: white at 203 cd/m², and BT.709's primaries in BT.2020's (ITU-R BT.2087)."""
    srgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    light = np.where(srgb <= 10, srgb / 255 / 12.92, ((srgb / 255 + 0.055) / 1.055) ** 2.4)
    wide = light @ np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]).T
    pixels = np.rint(65535 * pq_code(203 * wide)).astype(np.uint16)
    # The matrices have four digits: 1e-4 of white's light is one level of sRGB's dark codes, a slope of 12.92 × 255.
    np.testing.assert_allclose(picture_module._hdr_to_srgb(pixels, PQ, BT2020), srgb, atol=2)


def test_hdr_file(tmp_path):
    """A PQ grey of 100 cd/m², in 8 bits: 12 levels of sRGB a code there would be seen."""
    pictures = np.full((2, 64, 64, 3), round(255 * pq_code(100)), np.uint8)
    path = write_video(tmp_path / "a.mp4", pictures, color_trc=PQ, color_primaries=BT2020, colorspace=BT2020)
    assert abs(next(decode(path, 25, 32)).mean() - 186) < 3


@pytest.mark.parametrize(
    "colours, reason",
    [
        ({"color_trc": LINEAR}, "colours in linear light, expected SDR, PQ or HLG"),
        ({"color_trc": PQ, "color_primaries": P3}, "HDR colours of primaries 12"),
        ({"colorspace": 8}, "cannot be converted to RGB .pixel format yuv420p, matrix 8 of ITU-T H.273"),
    ],
)
def test_colours_that_cannot_be_shown_right(tmp_path, colours, reason):
    path = write_video(tmp_path / "a.mp4", greys(2), **colours)
    with pytest.raises(CorruptVideo, match=reason):
        list(decode(path, 25, 32))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix, red, blue", [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (9, 0.2627, 0.0593)])
def test_matrix_and_range(matrix, red, blue, full):
    """A colour by the matrices of BT.709, BT.601 and BT.2020, in limited and in full range."""
    colour = np.array([200, 50, 80]) / 255
    luma = colour @ [red, 1 - red - blue, blue]
    chroma = np.array([(colour[2] - luma) / (1 - blue), (colour[0] - luma) / (1 - red)]) / 2
    codes = [255 * luma, *(255 * chroma + 128)] if full else [219 * luma + 16, *(224 * chroma + 128)]
    planes = np.concatenate([np.full(size, round(code)) for size, code in zip((4096, 1024, 1024), codes, strict=True)])
    frame = av.VideoFrame.from_ndarray(planes.reshape(96, 64).astype(np.uint8), format="yuv420p")
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    shown = picture_module.Viewer(32, (View(),), 1.0).render(frame)
    # Codes are rounded to whole numbers, which are worth up to 2.2 levels of a colour.
    np.testing.assert_allclose(shown.mean((0, 2, 3)), 255 * colour, atol=2.5)
