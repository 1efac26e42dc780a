"""Philox4x32: the published answers, eager and compiled, and the helpers on its words."""

import pytest
import torch

from extension import needs_compiler
from vimpac.ops.philox import below, philox, seed_tensor, split_words

ONES, PI_COUNTER, PI_KEY = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
KNOWN = [  # Random123's kat_vectors: rounds, counter, key, answer
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI_COUNTER, PI_KEY, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def philox_ints(counter, seed, rounds=10):
    """Philox4x32 in Python's own integers, which never wrap: the oracle of every test of a mask."""
    (c0, c1, c2, c3), k0, k1 = counter, seed & ONES, seed >> 32 & ONES
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & ONES, (p0 >> 32) ^ c3 ^ k1, p0 & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c0, c1, c2, c3


def key_seed(key):
    """The two key words as one signed 64-bit seed."""
    seed = key[0] | key[1] << 32
    return seed - 2**64 if seed >= 2**63 else seed


@pytest.mark.parametrize("rounds, counter, key, answer", KNOWN)
def test_known_answers(rounds, counter, key, answer, device):
    words = philox(tuple(torch.tensor(c, device=device) for c in counter), seed_tensor(key_seed(key), device), rounds)
    assert tuple(w.item() for w in words) == answer
    assert philox_ints(counter, key_seed(key), rounds) == answer


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64])
@pytest.mark.parametrize("rounds", [7, 10])
def test_matches_python_integers(rounds, seed, device):
    counters = torch.randint(2**32, (4, 50), generator=torch.Generator().manual_seed(0)).to(device)
    words = torch.stack(philox(tuple(counters), seed_tensor(seed, device), rounds), -1)
    assert words.tolist() == [list(philox_ints(c, seed, rounds)) for c in counters.T.tolist()]


@needs_compiler
def test_compiled_products_do_not_overflow(device):
    """A compiler takes a product of two positive words for positive; scalar and vector code differ in what then happens."""
    counters = torch.randint(2**32, (5, 1), generator=torch.Generator().manual_seed(0)).to(device)

    def words(counters, seed):
        return torch.stack(philox((counters, counters >> 7, torch.arange(33, device=device), 1), seed, 7), -1)

    compiled = torch.compile(words, fullgraph=True)
    for seed in (0, -1, -(2**62), 2**63 - 1, key_seed(PI_KEY)):
        seed = seed_tensor(seed, device)
        assert torch.equal(compiled(counters, seed), words(counters, seed))


def test_counters_broadcast_with_ints(device):
    words = philox((torch.arange(3, device=device)[:, None], 5, torch.arange(2, device=device), 9), seed_tensor(4, device))
    assert [tuple(w[2, 1].item() for w in words)] == [philox_ints((2, 5, 1, 9), 4)]
    assert all(w.shape == (3, 2) and w.dtype == torch.int64 for w in words)


def test_split_words_and_below(device):
    values = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), -(2**32) - 7]
    low, high = split_words(torch.tensor(values, device=device))
    assert low.tolist() == [v % 2**32 for v in values]
    assert high.tolist() == [(v >> 32) % 2**32 for v in values]
    words = [0, 1, 2**31, ONES]
    for bound in (1, 3, 8192, 2**31):
        assert below(torch.tensor(words, device=device), bound).tolist() == [w * bound // 2**32 for w in words]


def test_seed_tensor(device):
    seed = seed_tensor(-5, device)
    assert (seed.item(), seed.dtype, seed.ndim, seed.device.type) == (-5, torch.int64, 0, device.type)
    assert seed_tensor(seed, seed.device) is seed


@pytest.mark.parametrize(
    "seed, shown",
    [
        (1.5, "1.5"),
        (True, "True"),
        ("7", "'7'"),
        (None, "None"),
        (2**63, str(2**63)),
        (-(2**63) - 1, str(-(2**63) - 1)),
        (torch.tensor(1.0), "torch.float32"),
        (torch.tensor(1, dtype=torch.int32), "torch.int32"),
        (torch.tensor([1]), r"\(1,\)"),
        (torch.tensor(1, device="meta"), "meta"),
    ],
)
def test_bad_seeds_are_shown(seed, shown):
    with pytest.raises(ValueError, match=f"seed must.*{shown}"):
        seed_tensor(seed, torch.device("cpu"))
