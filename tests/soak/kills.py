"""Kills at random moments: tokenizing and training end with what an uninterrupted run gives, however often they were killed.

    python tests/soak/kills.py [--kills 50] [--seed 0]

Prints a line for each wrong outcome; ends with one JSON line. Exit status 1 if an outcome was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [entry for entry in (str(TESTS), str(TESTS.parent)) if entry not in sys.path]

from films import noise, write_video  # noqa: E402
from runs import Run, arguments, metrics, model_bytes, undrawn, write_store  # noqa: E402
from vimpac.data.store import TokenStore  # noqa: E402

TOKENIZE = """
import sys
from functools import partial
from vimpac.commands import main as cli
from vimpac.data import build as tokenize
if sys.argv[1] == "each":
    tokenize.StoreWriter = partial(tokenize.StoreWriter, shard_seconds=0.0)  # every video a shard
sys.exit(cli.main(["tokenize", *sys.argv[2:], "--codes=32", "--frame-size=32", "--fps=5"]))
"""
LONGEST = 120.0  # seconds; a run that takes longer hangs


def tokenizing(kills: int, seed: int, folder: Path) -> list[str]:
    """Kills `vimpac tokenize` that often in all, each run again until it ends; what was wrong."""
    (folder / "videos").mkdir(parents=True)
    for number in range(8):
        write_video(folder / "videos" / f"{number}.mp4", noise(15 + 5 * number), codec="mpeg4")
    script = folder / "run.py"
    script.write_text(TOKENIZE)
    command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}

    def start(out: Path, shards: str = "one") -> subprocess.Popen:
        words = [*command, shards, str(folder / "videos"), str(out)]
        return subprocess.Popen(
            words, env=environment, stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w"), start_new_session=True
        )

    started = time.monotonic()
    if start(folder / "whole").wait(LONGEST):
        return [f"the uninterrupted run failed: {(folder / 'log').read_text()}"]
    expected, whole = _contents(folder / "whole"), time.monotonic() - started

    def attempt(number: int, rng: random.Random) -> tuple[int, str]:
        """Kills of one store until it was finished, and what was wrong with it."""
        out, shards, killed = folder / "store", rng.choice(["one", "each"]), 0
        shutil.rmtree(out, ignore_errors=True)
        while True:
            process = start(out, shards)
            if killed < 4:
                time.sleep(rng.uniform(0, 1.2 * whole))
                killed += _kill(process, rng)
            try:
                code = process.wait(LONGEST)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return killed, "hangs"
            if code == 0:
                return killed, "" if _contents(out) == expected else "another store"
            if code not in (-signal.SIGKILL, 128 + signal.SIGTERM, 130, -signal.SIGTERM, -signal.SIGINT):
                return killed, f"exit status {code}: {(folder / 'log').read_text()}"

    return _campaign("tokenizing", attempt, kills, seed)


def _kill(process: subprocess.Popen, rng: random.Random) -> int:
    """Ends the process, its group, or one of its workers; 1 if it was still there."""
    if process.poll() is not None:
        return 0
    kind = rng.choice(["parent", "parent", "group", "term", "int"])
    number = {"term": signal.SIGTERM, "int": signal.SIGINT}.get(kind, signal.SIGKILL)
    (os.killpg if kind in ("group", "int") else os.kill)(process.pid, number)
    return 1


def _contents(folder: Path) -> tuple:
    store = TokenStore(folder, verify=True)
    return store.names, store.settings, store.failed, [store.read(n).tobytes() for n in range(len(store))]


def training(kills: int, seed: int, folder: Path, ranks: int = 1) -> list[str]:
    """The same of training, in one process or several of which one is killed."""
    store = write_store(folder / "tokens")
    words = lambda name, **options: arguments(store, folder / name, steps=12, save_every=3, **options)  # noqa: E731
    for name in ("first", "whole"):  # the first also waits until the server that processes are forked from has imported torch
        started = time.monotonic()
        whole = Run(words(name), folder / "log", ranks, undrawn)
        if any(whole.wait(LONGEST)):
            return [f"the uninterrupted run failed: {whole.output}"]
    expected, seconds = (metrics(folder / "whole"), model_bytes(folder / "whole")), time.monotonic() - started

    def attempt(number: int, rng: random.Random) -> tuple[int, str]:
        killed = 0
        shutil.rmtree(folder / "run", ignore_errors=True)
        while True:
            run = Run(words("run", resume=(folder / "run" / "config.json").exists()), folder / "log", ranks, undrawn)
            if killed < 4:
                time.sleep(rng.uniform(0, 1.2 * seconds))
                process = rng.choice(run.processes)
                if process.is_alive():
                    process.kill()
                    killed += 1
                    _end_as_torchrun_does(run)
            codes = run.wait(LONGEST)
            if not any(codes):
                found = metrics(folder / "run"), model_bytes(folder / "run")
                return killed, "" if found == expected else "other metrics or weights"
            if not set(codes) <= {0, 1, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM} or "Traceback" in run.output:
                return killed, f"exit statuses {codes}: {run.output}"

    return _campaign(f"training in {ranks}", attempt, kills, seed)


def _end_as_torchrun_does(run: Run) -> None:
    """Those that a lost process leaves behind may wait for it for minutes, if they had not found each other yet."""
    for process in run.processes:
        process.join(3)
    run.signal(signal.SIGTERM)
    for process in run.processes:
        process.join(10)
        process.kill()


def _campaign(title: str, attempt: Callable[[int, random.Random], tuple[int, str]], kills: int, seed: int) -> list[str]:
    done, wrong, number = 0, [], 0
    while done < kills and number < 10 * kills:  # an attempt may end before it is killed
        killed, what = attempt(number, random.Random(f"{title} {seed} {number}"))
        if what:
            wrong.append(f"{title}, seed {seed}, attempt {number} of {killed} kills: {what}")
        done += killed
        number += 1
    if done < kills:
        wrong.append(f"{title}: only {done} of {kills} kills hit a run")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of tokenizing, and of training")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    wrong, seconds = [], {}
    for name, campaign in (
        ("tokenizing", lambda folder: tokenizing(asked.kills, asked.seed, folder)),
        ("training", lambda folder: training(asked.kills - asked.kills // 3, asked.seed, folder)),
        ("training in two processes", lambda folder: training(asked.kills // 3, asked.seed, folder, ranks=2)),
    ):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            wrong += campaign(Path(folder))
        seconds[name] = round(time.monotonic() - started)
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    print(json.dumps({"soak": "kills", "kills": asked.kills, "seed": asked.seed, "seconds": seconds, "bad": len(wrong)}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
