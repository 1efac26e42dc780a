"""Damages small videos and decodes each in a process of its own: frames or CorruptVideo, nothing else, and soon.

Example: python tests/soak/videos.py --count 300 --seed 0
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from films import CONTAINERS, noise, write_video  # noqa: E402
from vimpac.data.clock import LONGEST_STILLS  # noqa: E402
from vimpac.data.video import decode  # noqa: E402
from vimpac.errors import CorruptVideo  # noqa: E402

SECONDS = 60
"""For one video. The most frames that it may have take some 10 on one core."""
MEMORY = 2 << 30
"""Bytes of address space that decoding may take."""
FPS, PICTURES = 2, 1000
OTHERS = {"h264.avi": ("libx264", {}), "h264.ts": ("libx264", {}), "h264.wmv": ("libx264", {}), "hevc.mp4": ("libx265", {})}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300, help="how many damaged videos (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="video number K of a seed is always the same (default: 0)")
    parser.add_argument("--only", type=int, help="this number alone; its file is kept, and its name printed")
    arguments = parser.parse_args()
    numbers = range(arguments.count) if arguments.only is None else [arguments.only]
    bad = soak(numbers, arguments.seed, keep=arguments.only is not None)
    for line in bad:
        print(line)
    print(json.dumps({"soak": "videos", "tried": len(numbers), "bad": len(bad)}))
    return 1 if bad else 0


def soak(numbers, seed: int, keep: bool = False) -> list[str]:
    """A line for each of the damaged videos that did not end as it must."""
    with tempfile.TemporaryDirectory() as folder:
        return list(_failures(Path(folder), numbers, seed, keep))


def _failures(folder: Path, numbers, seed: int, keep: bool) -> Iterator[str]:
    sources = _sources(folder)
    for number in numbers:
        source = sources[number % len(sources)]
        damaged = folder / f"damaged-{number}{source.suffix}"
        how, data = damage(source.read_bytes(), np.random.default_rng([seed, number]))
        damaged.write_bytes(data)
        outcome = _outcome(damaged)
        if keep:
            print(f"{shutil.copy(damaged, tempfile.gettempdir())}: {source.name}, {how}: {outcome}")
        if not outcome.startswith("ok"):
            yield f"{source.name}, {how}: {outcome}; again: python tests/soak/videos.py --seed {seed} --only {number}"
        damaged.unlink()


def _sources(folder: Path) -> list[Path]:
    for name, (codec, options) in {**CONTAINERS, **OTHERS}.items():
        write_video(folder / name, noise(30, 48, 64), rate=10, codec=codec, options=options, bit_rate=400_000)
    for path in (TESTS / "videos").iterdir():
        shutil.copy(path, folder)
    return sorted(folder.iterdir())


def damage(data: bytes, generator: np.random.Generator) -> tuple[str, bytes]:
    """What was done, and the damaged bytes. Half of the damage is in the first 2 KB or the last, where headers are."""
    size = len(data)
    length = int(min(size // 2, generator.choice([1, 8, 64, 512, 4096])))
    at = int(generator.integers(0, size - length))
    if generator.random() < 0.5:
        edge = int(generator.integers(0, min(2048, size - length)))
        at = edge if generator.random() < 0.5 else size - length - edge
    out = bytearray(data)
    match kind := generator.choice(["bits", "noise", "cut", "repeated", "zeros", "removed"]):
        case "bits":
            places = generator.integers(at, at + max(length, 1), generator.integers(1, 5))
            for place in places:
                out[place] ^= 1 << int(generator.integers(8))
        case "noise":
            out[at : at + length] = generator.bytes(length)
        case "cut":
            del out[max(at, 16) :]
        case "repeated":
            out[at:at] = out[at : at + length]
        case "zeros":
            out[at : at + length] = bytes(length)
        case "removed":
            del out[at : at + length]
    return f"{kind} at {at}, {length} bytes", bytes(out)


def _outcome(path: Path) -> str:
    context = multiprocessing.get_context("fork")  # what is imported need not be imported again
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_decode, args=(path, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(SECONDS) else f"not finished after {SECONDS} s"
    except EOFError:
        process.join()
        return f"the process died with status {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _decode(path: Path, sender) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    count = 0
    try:
        for chunk in decode(path, FPS, 32):
            count += chunk.shape[1]
            if count > FPS * (LONGEST_STILLS + PICTURES):
                return sender.send(f"{count} frames, and no end")
        sender.send(f"ok: {count} frames")
    except CorruptVideo as error:
        sender.send(f"ok: {error}")
    except MemoryError as error:
        sender.send(f"more than {MEMORY >> 30} GB of memory: {error}")
    except Exception as error:  # whatever it is, it is what this looks for
        sender.send(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main())
