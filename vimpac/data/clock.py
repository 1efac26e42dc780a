"""When each frame of a video is on screen: times that never run backwards, and the frames on screen at a fixed rate."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from vimpac.errors import CorruptVideo

if TYPE_CHECKING:
    import av

LONGEST_STEP = Fraction(60)
"""Seconds. In containers whose clock can jump, a larger gap between two frames is such a jump, not a frame shown that long."""
LONGEST_STILLS = Fraction(48 * 3600)
"""Seconds that a video may last, plus one second for each of its frames. More means a damaged time or rate."""
REORDERED = 16
"""Frames. Codecs reorder no more than this, so a time further back than this many steps is a jump of the clock."""


class TimedFrame(NamedTuple):
    """A frame and when it appears on screen, in ticks of the file's time base."""

    at: int | Fraction
    """Since the first frame."""
    duration: int
    """According to the container, 0 if unknown."""
    frame: av.VideoFrame


class _Stamps:
    """Presentation or decoding times of a file's frames, and how often they ran backwards."""

    def __init__(self):
        self._stamp: int | None = None
        self._last: int | None = None
        self._zero: int | Fraction | None = None
        self.faults = 0

    @property
    def known(self) -> bool:
        return self._last is not None

    def read(self, stamp: int | None) -> None:
        self._stamp = stamp
        if stamp is not None:
            self.faults += self._last is not None and stamp <= self._last
            self._last = stamp

    def due(self) -> int | Fraction | None:
        return None if self._stamp is None or self._zero is None else self._stamp - self._zero

    def agree(self, now: int | Fraction, again: bool) -> None:
        """Sets the zero point so that the current stamp means `now`. again: even if it is already set."""
        if again:
            self._zero = None
        if self._zero is None and self._stamp is not None:
            self._zero = self._stamp - now


class Clock:
    """Times that never run backwards, though those of a file may be missing, repeated, out of order, or jump.

    jumps: whether this container's clock can jump, as in a broadcast. Other clocks count from the start of the file, so there
    a long gap means that a frame stays on screen.
    """

    def __init__(self, time_base: Fraction, rate: Fraction | None, jumps: bool):
        self._second = 1 / time_base
        # Ticks are integers, for speed. Steps computed from a rate may not be, and are used only where times are missing.
        self._usual = self._step = self._second / Fraction(rate or 25)
        self._jumps, self._longest_step = jumps, LONGEST_STEP * self._second
        self._presented, self._decoded = _Stamps(), _Stamps()
        self._frames, self._now = 0, 0

    def read(self, pts: int | None, dts: int | None = None) -> int | Fraction:
        """Ticks since the first frame, for the next frame in decoding order.

        pts, dts: its presentation time and the decoding time of the packet that completed it.
        The presentation time is used unless it has run backwards more often than the decoding time, as in FFmpeg
        (guess_correct_pts in libavcodec/decode.c): if a container has no presentation times, FFmpeg guesses them, wrongly
        with B-frames.
        """
        self._presented.read(pts)
        self._decoded.read(dts)
        due = self._due()
        jumped = self._jumps and due is not None and self._jumped(due - self._now)
        if self._frames:
            self._advance(None if jumped else due)
        self._frames += 1
        if self._now > (self._frames + LONGEST_STILLS) * self._second:
            hours = round(self._now / self._second / 3600)
            raise CorruptVideo(f"has a damaged time or frame rate: its first {self._frames} frames would last {hours} hours")
        self._presented.agree(self._now, jumped)
        self._decoded.agree(self._now, jumped)
        return self._now

    def _due(self) -> int | Fraction | None:
        """When the frame appears according to the more reliable of the two times, None if that is missing."""
        if self._decoded.known and self._presented.faults > self._decoded.faults:
            return self._decoded.due()
        due = self._presented.due()
        return self._decoded.due() if due is None else due

    def _jumped(self, ahead: int | Fraction) -> bool:
        return ahead > self._longest_step or -ahead > max(self._second, REORDERED * self._step)

    def _advance(self, due: int | Fraction | None) -> None:
        if self._stands_still():
            self._now = max(self._now + self._step, self._frames * self._usual)
        elif due is None:
            self._now += self._step
        elif due > self._now:
            self._step, self._now = due - self._now, due

    def _stands_still(self) -> bool:
        """Whether most frames repeat an earlier time, so that both times are useless and the usual rate counts."""
        if self._frames <= REORDERED or not (self._presented.faults or self._decoded.faults):
            return False
        faults = [times.faults for times in (self._presented, self._decoded) if times.known]
        return 2 * min(faults) > self._frames


def at_rate(frames: Iterator[TimedFrame], fps: float, time_base: Fraction) -> Iterator[av.VideoFrame]:
    """The frame on screen at k / fps seconds for each k. The last frame lasts as long as the one before it.

    If that was more than a second, the last frame's own duration counts if it is shorter: a still frame must not count twice.
    """
    period = 1 / Fraction(fps).limit_denominator(100_000) / time_base
    due, step, shown = 0, period, None
    for following in frames:
        while shown is not None and due < following.at:
            yield shown.frame
            due += period
        if shown is not None:
            step = following.at - shown.at or step
        shown = following
    if shown is None:
        return
    lasts = min(step, shown.duration or step) if step * time_base > 1 else step
    while due < shown.at + lasts:
        yield shown.frame
        due += period
