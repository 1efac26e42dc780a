"""`make soak`: all campaigns whole, as many at a time as there are cores. Exit status 1 if one found something wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CAMPAIGNS = ("flips.py", "kills.py", "videos.py")  # the longest first


def main() -> int:
    def run(name: str) -> int:
        command = [sys.executable, str(FOLDER / name)]
        ended = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
        print(f"{name}\n{ended.stdout}", flush=True)
        return ended.returncode

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return int(any(pool.map(run, CAMPAIGNS)))


if __name__ == "__main__":
    sys.exit(main())
