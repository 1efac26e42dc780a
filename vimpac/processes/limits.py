"""What this process may use of the machine: its cores, and what its control groups (version 1 or 2) allow in memory and time.

root: the folder with /proc and /sys, another one in tests. A file that cannot be read sets no limit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def memory_left(root: Path = ROOT) -> int | None:
    """Bytes that may still be allocated up to the nearest limit. The page cache counts as free."""
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")}
    left = []
    for version, folder in _groups("memory", root):
        limit, usage, prefix = names[version]
        with suppress(OSError, ValueError):  # no limit, or none of this kind
            left.append(max(0, _number(folder / limit) - _number(folder / usage) + _cached(folder / "memory.stat", prefix)))
    return min(left, default=None)


def cores_allowed(root: Path = ROOT) -> float | None:
    """CPU time that the strictest group allows, in cores: 0.3 for 30 ms of every 100."""
    allowed = []
    for version, folder in _groups("cpu", root):
        with suppress(OSError, ValueError):
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = (str(_number(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
            if int(quota) > 0 and int(period) > 0:  # "max", or -1: no limit
                allowed.append(int(quota) / int(period))
    return min(allowed, default=None)


def share_of_cores(processes: int = 1) -> int:
    """Cores that this process may use, if `processes` of the machine share them; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (allowed := cores_allowed()) is not None:
        cores = min(cores, math.ceil(allowed))
    return max(1, cores // processes)


def _number(path: Path) -> int:
    return int(path.read_text())


def _cached(stat: Path, prefix: str) -> int:
    with suppress(OSError, ValueError):
        values = dict(line.split() for line in stat.read_text().splitlines())
        return sum(int(values.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return 0


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """(version, folder) of this process's group and of those above it, in each hierarchy with the controller."""
    try:
        mounts, groups = ((root / "proc/self" / name).read_text().splitlines() for name in ("mountinfo", "cgroup"))
    except (OSError, UnicodeDecodeError):
        return
    own = {}  # version → path of this process's group
    for line in groups:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            own[2] = path
        elif controller in controllers.split(","):
            own[1] = path
    for line in mounts:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version is None or version not in own or (version == 1 and controller not in options.split(",")):
            continue
        shown, mounted = before.split(" ")[3:5]  # the group that appears at the mount point
        try:
            below = PurePosixPath(own[version]).relative_to(shown)
        except ValueError:  # outside of what is mounted here, but the limits of the mounted group still apply
            below = PurePosixPath()
        top = root / mounted.lstrip("/")
        folder = top / below
        for group in (folder, *folder.parents):
            yield version, group
            if group == top:
                break
