"""The emulator of warps itself: what it reports, and how it interleaves blocks."""

import ctypes
import re

import pytest

from warp_emulator import build


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return build("faults", tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_fault", "^$"),
        ("diverges", "thread 5: lanes diverge: shuffle, lane 0 is at ballot"),
        ("returns_early", "thread 7: lane is not at the warp's shuffle, it has returned"),
        ("misses_barrier", "__syncthreads that 24 threads of the block never reach"),
        ("reads_outside", "thread 31: load of 4 bytes outside all buffers"),
        ("misaligned", "thread 0: misaligned load of 16 bytes"),
        ("writes_input", "thread 0: store to a read-only buffer"),
        ("polls_in_vain", "thread 0: polls a number that no block changes"),
    ],
)
def test_reports(faults, name, message):
    function = getattr(faults, name)
    function.restype = ctypes.c_char_p
    assert re.search(message, function().decode())


def lost_additions(faults, resident, seed):
    return faults.lost_additions(ctypes.c_uint(resident), ctypes.c_uint(seed))


def test_blocks_take_turns_as_the_seed_says(faults):
    """Eight blocks add to a number by a load and a store: what is lost differs from seed to seed, and is the same again."""
    lost = [lost_additions(faults, 4, seed) for seed in range(10)]
    assert len(set(lost)) > 1 and max(lost) > 0
    assert lost == [lost_additions(faults, 4, seed) for seed in range(10)]
    assert lost_additions(faults, 1, 0) == 0  # one after another


@pytest.mark.parametrize("seed", range(4))
def test_blocks_wait_for_each_other(faults, seed):
    """Blocks in a ring: each waits for the block before it, with shared memory of its own."""
    faults.ring.restype = ctypes.c_char_p
    assert faults.ring(ctypes.c_uint(8), ctypes.c_uint(seed)).decode() == ""
    assert "polls" in faults.ring(ctypes.c_uint(1), ctypes.c_uint(seed)).decode()  # the last one never starts
