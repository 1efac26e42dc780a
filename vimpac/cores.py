"""How many cores there are for this process."""

import math
import os

from vimpac.cgroup import cores_allowed


def share_of_cores(processes: int = 1) -> int:
    """Cores that this process may run on and has time for, divided among `processes` of a machine; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (allowed := cores_allowed()) is not None:
        cores = min(cores, math.ceil(allowed))
    return max(1, cores // processes)
