"""Generated, labelled videos: a textured shape moves over a textured, drifting ground.

The class is the motion. Motions come in pairs: the second of a pair is the first played backwards, so the two have the same
frames. Position, angle and size have the same distribution at every time in every motion (the position wraps around the frame,
the size cycles), so a single frame does not reveal the motion. It does show the other labels, the shape and its texture.

Lengths are in cells, an eighth of the frame's side: one 8×8 patch when the video is tokenized at 64 pixels.
"""

from __future__ import annotations

import colorsys
import csv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimpac.config import SynthesizeConfig
from vimpac.errors import InputError
from vimpac.files.atomic import make_folder, replacing
from vimpac.processes.limits import share_of_cores

PAIRS = (
    ("right", "left"),
    ("down", "up"),
    ("clockwise", "counterclockwise"),
    ("grow", "shrink"),
    ("forward", "reversed"),  # bursts of speed from rest; backwards: braking to rest
)
MOTIONS = tuple(name for pair in PAIRS for name in pair)
BACKWARDS = tuple(second for _, second in PAIRS)
SHAPES = ("circle", "square", "triangle", "cross")
TEXTURES = ("stripes", "checks", "dots", "rings")
GROUNDS = ("stripes", "checks", "dots", "slants", "waves")

CELLS = 8
SPEED = 2.0  # cells per second: one patch per frame at 2 fps, so a moving texture has the same tokens one patch further
GROUND_PHASES = 2  # the ground starts at a multiple of 1/2 cell, so that a small vocabulary covers its patches
TURN_SECONDS = 4.0  # per turn: 45° per frame at 2 fps; half of the shape is lit, so that no symmetry hides the turn
GROW_SECONDS = 4.0  # per cycle: in 2 seconds the size changes by a factor of √2, with at most one restart
BURST_SECONDS = 2.0  # 2 seconds show every speed of a burst
RADIUS = (1.25, 2.5)  # cells, of the circle; the other shapes have its area. A triangle of 2.5 reaches 3.9, which still fits
HUES = 8  # few colours, far apart, so that they survive chroma subsampling and a vocabulary of a few hundred codes
SHADE = 0.55  # brightness of the unlit half of a shape
PAINT_PIXELS = 2**15  # painted at a time, so that intermediate arrays stay near the cache
THREAD_FRAMES = 2048  # with fewer frames, starting threads costs more than it saves
ENCODER = {  # nearly lossless, so that tokens depend on the drawing, not on the encoder
    "libx264": {"preset": "veryfast", "crf": "8"},
    "mpeg4": {"qmin": "1", "qmax": "1"},
}


class Label(NamedTuple):
    """A row of labels.csv."""

    video: str
    motion: str
    shape: str
    texture: str


@dataclass(frozen=True)
class Scene:
    """All random choices of one video. Lengths in cells, angles in radians, phases in cycles, colours 0…1."""

    motion: str
    shape: str
    texture: str
    position: np.ndarray  # [2] x, y of the shape's centre
    heading: np.ndarray  # [2] ±1: the diagonal along which bursts go
    angle: float
    size_phase: float
    burst_phase: float
    ground: str
    ground_axis: int  # 0: drifts along x; 1: along y
    ground_sign: int
    ground_phase: np.ndarray  # [2] along and across the drift
    colours: np.ndarray  # [4, 3] RGB of the ground's two tones and of the shape's two


def motion_names() -> tuple[str, ...]:
    """The classes, in label order; 2k and 2k + 1 are each other played backwards."""
    return MOTIONS


def draw_scene(seed: int, index: int, motion: str | None = None) -> Scene:
    """The scene of one video, a function of (seed, index). `motion` replaces the motion and nothing else."""
    rng = np.random.default_rng([seed, index])
    ground_hue, step = rng.integers(HUES), rng.integers(2, HUES - 1)  # the shape's hue is at least two steps away
    return Scene(
        motion=motion or _motion(seed, index),
        shape=SHAPES[rng.integers(len(SHAPES))],
        texture=TEXTURES[rng.integers(len(TEXTURES))],
        position=rng.uniform(0, CELLS, 2),
        heading=rng.choice([-1.0, 1.0], 2),
        angle=rng.uniform(0, 2 * np.pi),
        size_phase=rng.uniform(),
        burst_phase=rng.uniform(),
        ground=GROUNDS[rng.integers(len(GROUNDS))],
        ground_axis=int(rng.integers(2)),
        ground_sign=int(rng.choice([-1, 1])),
        ground_phase=rng.integers(0, 2 * GROUND_PHASES, 2) / GROUND_PHASES,
        colours=_colours(ground_hue / HUES, (ground_hue + step) / HUES),
    )


def render(
    seed: int, index: int, seconds: float = 8.0, fps: float = 8.0, size: int = 96, motion: str | None = None
) -> tuple[np.ndarray, Label]:
    """Draws one video → frames uint8 [F, size, size, 3] RGB with F = round(seconds · fps), and its labels.

    The picture is a function of (seed, index) alone. `motion` replaces the motion and nothing else.
    """
    scene = draw_scene(seed, index, motion)
    times = np.arange(max(1, round(seconds * fps))) / fps
    frames = np.empty((len(times), size, size, 3), np.uint8)
    batch = max(1, PAINT_PIXELS // size**2)
    for start in range(0, len(times), batch):
        frames[start : start + batch] = _paint(scene, times[start : start + batch], size)
    if scene.motion in BACKWARDS:
        frames = np.ascontiguousarray(frames[::-1])
    return frames, Label(f"{index:05d}.mp4", scene.motion, scene.shape, scene.texture)


def trajectory(scene: Scene, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the shape is at `times` (seconds [F]) under the first motion of the scene's pair.

    → centre [F, 2] in cells, angle [F] in radians (clockwise on the screen), radius [F] in cells.
    """
    position = np.repeat(scene.position[None], len(times), 0)
    angle = np.full(len(times), scene.angle)
    size_phase = np.full(len(times), scene.size_phase)
    match PAIRS[MOTIONS.index(scene.motion) // 2][0]:
        case "right":
            position[:, 0] += SPEED * times
        case "down":
            position[:, 1] += SPEED * times
        case "clockwise":
            angle += 2 * np.pi * times / TURN_SECONDS
        case "grow":
            size_phase += times / GROW_SECONDS
        case "forward":
            path = _burst(scene.burst_phase + times / BURST_SECONDS) - _burst(scene.burst_phase)
            position += scene.heading * path[:, None]
    small, large = RADIUS
    return position % CELLS, angle, small * (large / small) ** (size_phase % 1)


def synthesize(out: Path, config: SynthesizeConfig, report: Callable[[int, int], None] | None = None) -> list[Label]:
    """Writes `config.videos` mp4 files OUT/00000.mp4 … and, last, OUT/labels.csv (video, motion, shape, texture).

    A file appears under its name only when it is complete, and an interrupted run leaves no labels.csv.
    report(done, total): called after each video. Returns the rows of labels.csv.
    Raises InputError if OUT exists and is not an empty folder.
    """
    out = Path(out)
    make_folder(out)
    if any(out.iterdir()):
        raise InputError(f"{out} is not empty, expected a new or empty folder; remove its files or choose another OUT")
    codec = _codec()
    labels = []
    for label in _in_parallel(lambda index: _write(out, index, config, codec), config):
        labels.append(label)
        if report:
            report(len(labels), config.videos)
    _write_labels(out / "labels.csv", labels)
    return labels


def _in_parallel(write: Callable[[int], Label], config: SynthesizeConfig) -> Iterator[Label]:
    """Labels in video order. Threads suffice, because numpy and the encoder release the GIL."""
    if config.videos * round(config.seconds * config.fps) < THREAD_FRAMES:
        yield from map(write, range(config.videos))
        return
    pool = ThreadPoolExecutor(share_of_cores())
    try:
        yield from pool.map(write, range(config.videos))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, does not write the rest first


def _codec() -> str:
    import av

    return "libx264" if "libx264" in av.codecs_available else "mpeg4"


def _write(out: Path, index: int, config: SynthesizeConfig, codec: str) -> Label:
    frames, label = render(config.seed, index, config.seconds, config.fps, config.size)
    with replacing(out / label.video) as temporary:
        _encode(temporary, frames, config.fps, codec)
    return label


def _encode(path: Path, frames: np.ndarray, fps: float, codec: str) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=ENCODER[codec])
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # videos are already written in parallel
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def _write_labels(path: Path, labels: list[Label]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Label._fields)
        writer.writerows(labels)
        file.flush()


def _motion(seed: int, index: int) -> str:
    """Every len(MOTIONS) videos show each motion once, in a random order."""
    block, place = divmod(index, len(MOTIONS))
    return MOTIONS[np.random.default_rng([seed, block, 1]).permutation(len(MOTIONS))[place]]


def _colours(ground_hue: float, shape_hue: float) -> np.ndarray:
    tones = ((ground_hue, 0.75, 0.35), (ground_hue, 0.45, 0.80), (shape_hue, 0.85, 1.0), (shape_hue, 0.30, 1.0))
    return np.array([colorsys.hsv_to_rgb(hue % 1, saturation, value) for hue, saturation, value in tones], np.float32)


def _burst(phase: np.ndarray | float) -> np.ndarray:
    """Cells travelled: in each cycle the speed rises linearly from 0 to twice SPEED."""
    return SPEED * BURST_SECONDS * (np.floor(phase) + (phase % 1) ** 2)


def _paint(scene: Scene, times: np.ndarray, size: int) -> np.ndarray:
    """→ uint8 [F, size, size, 3]."""
    pixels = CELLS * (np.arange(size, dtype=np.float32) + 0.5) / size
    dark, light, deep, pale = scene.colours
    frames = _mix(dark, light, _ground(scene, times, pixels))

    centre, angle, radius = (a.astype(np.float32) for a in trajectory(scene, times))
    dx, dy = (_wrap(pixels[None] - c[:, None]) for c in centre.T)  # [F, size]
    cos, sin = (np.cos(angle) / radius)[:, None, None], (np.sin(angle) / radius)[:, None, None]
    u = cos * dx[:, None, :] + sin * dy[:, :, None]  # the shape's own coordinates: radius 1, not turned
    v = cos * dy[:, :, None] - sin * dx[:, None, :]
    sharpness = radius[:, None, None] * size / CELLS  # pixels per unit of u and v
    lit = SHADE + (1 - SHADE) * _soften(v, sharpness)
    inside = _soften(_distance(scene.shape, u, v), sharpness)
    painted = _mix(deep, pale, _texture(scene.texture, 2 * u, 2 * v, sharpness / 2)) * lit[..., None]
    frames += inside[..., None] * (painted - frames)
    return np.rint(255 * frames).astype(np.uint8)


def _mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    return first + share[..., None] * (second - first)


def _wrap(offset: np.ndarray) -> np.ndarray:
    return (offset + CELLS / 2) % CELLS - CELLS / 2


def _ground(scene: Scene, times: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Share of the lighter tone [F, size, size]. The drift is across stripes and waves, so that it is visible."""
    drift = (scene.ground_phase[0] - scene.ground_sign * SPEED * times) % CELLS
    along = pixels[None] + drift[:, None].astype(np.float32)  # [F, size]
    across = np.broadcast_to(pixels + np.float32(scene.ground_phase[1]), along.shape)
    if scene.ground_axis == 0:
        u, v = along[:, None, :], across[:, :, None]
    else:
        u, v = along[:, :, None], across[:, None, :]
    share = _texture(scene.ground, u, v, len(pixels) / CELLS)
    return np.broadcast_to(share, (len(times), len(pixels), len(pixels)))


def _soften(distance: np.ndarray, sharpness: np.ndarray | float) -> np.ndarray:
    """1 where the distance is positive, 0 where it is negative, with a ramp of one pixel between: anti-aliased edges."""
    return np.clip(distance * sharpness + 0.5, 0, 1)


def _bands(x: np.ndarray, sharpness: np.ndarray | float) -> np.ndarray:
    """1 on [0, 1), 0 on [1, 2), and so on."""
    return _soften(0.5 - np.abs((x + 0.5) % 2 - 1), sharpness)


def _texture(name: str, u: np.ndarray, v: np.ndarray, sharpness: np.ndarray | float) -> np.ndarray:
    """Share of the lighter tone at u, v, with period 2 in both, except waves (4 along u). sharpness: pixels per unit."""
    match name:
        case "stripes":
            return _bands(u, sharpness)
        case "checks":
            first, second = _bands(u, sharpness), _bands(v, sharpness)
            return first + second - 2 * first * second
        case "dots":
            return _soften(0.65 - np.hypot((u % 2) - 1, (v % 2) - 1), sharpness)
        case "rings":
            return _bands(np.hypot(u, v), sharpness)
        case "slants":
            return _bands(u + v, sharpness)
        case "waves":
            return 0.5 + 0.5 * np.sin(np.pi / 2 * u)
    raise AssertionError(name)


def _distance(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How far u, v is inside the shape (negative outside). Every shape has the area of the unit circle."""
    match name:
        case "circle":
            return 1 - np.hypot(u, v)
        case "square":
            return 0.886 - np.maximum(np.abs(u), np.abs(v))
        case "triangle":
            return 0.777 - np.maximum(0.866 * np.abs(u) + 0.5 * v, -v)
        case "cross":
            u, v = np.abs(u), np.abs(v)
            return np.minimum(1.189 - np.maximum(u, v), 0.396 - np.minimum(u, v))
    raise AssertionError(name)
