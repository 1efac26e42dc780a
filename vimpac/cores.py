"""How many cores there are for this process."""

import os


def share_of_cores(processes: int = 1) -> int:
    """Cores that the system lets this process run on, divided among `processes` of a machine; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)
