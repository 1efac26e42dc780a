"""tests/divergence.py: what it finds in kernels whose lanes part, and what it does not where they stay together."""

import re

import pytest

import nvcc
from divergence import divergent

SOURCE = """
#include "warp.h"
using namespace vimpac::warp;

// c += a b, then an exchange, where a condition holds.
#define KERNEL(NAME, CONDITION, SIZE)                                                     \\
  extern "C" __global__ void NAME(float* out, const uint32_t* in, int n, int64_t m) {     \\
    Piece<4> a = load<4>(in + 4 * threadIdx.x);                                            \\
    float c[4] = {};                                                                      \\
    for (int i = 0; i < (SIZE); ++i) {                                                    \\
      if (CONDITION) {                                                                    \\
        mma<BFloat16>(c, {a.w[0], a.w[1], a.w[2], a.w[3]}, {in[n], in[m]});               \\
        c[0] += shfl_xor(c[1], 1);                                                        \\
      }                                                                                   \\
      a.w[i % 4] += in[i];                                                                \\
    }                                                                                     \\
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = c[i];                          \\
  }

KERNEL(together_always, true, 1)
KERNEL(together_block, blockIdx.x < 16, n)
KERNEL(together_number, in[m] > 5, m / n)  // a division of 64 bits calls a function
KERNEL(together_vote, vimpac::warp::ballot(in[threadIdx.x] > 5) != 0, n)
KERNEL(together_loop, i % 3 != 1, in[7])
KERNEL(apart_lanes, lane() < 16, 1)
KERNEL(apart_data, in[threadIdx.x] > 5, 1)
KERNEL(apart_exchanged, shfl(a.w[1], lane() ^ n) > 5, 1)
KERNEL(apart_loop, true, in[threadIdx.x])
KERNEL(apart_deep, n > 5 && (m < 3 || a.w[2] > 7), n)

extern "C" __global__ void apart_return(float* out, const uint32_t* in) {
  if (in[threadIdx.x] == 0) return;
  out[threadIdx.x] = shfl_xor(out[threadIdx.x], 1);
}

extern "C" __global__ void together_again(float* out, const uint32_t* in, int n) {
  float x = out[threadIdx.x];
  if (in[threadIdx.x] > 5) {
    for (int i = 0; i < n; ++i) x = x * x + float(in[i]);
  }
  out[threadIdx.x] = shfl_xor(x, 1);
}

extern "C" __global__ void apart_written(float* out, const uint32_t* in, int n) {
  int count = n;  // the same in all lanes, until they part
  float x = out[threadIdx.x];
  if (in[threadIdx.x] > 5) {
    for (int i = 0; i < n; ++i) count += in[i] > 3, out[i] = float(count);
  }
  if (count > 9) x = shfl_xor(x, 1);
  out[threadIdx.x] = x;
}
"""


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    source = tmp_path_factory.mktemp("divergence") / "kernels.cu"
    source.write_text(SOURCE)
    return nvcc.compile_file(source)[0]


@pytest.mark.parametrize("architecture", nvcc.ARCHITECTURES)
def test_lanes_that_part_are_found(binary, architecture):
    code = nvcc.listings(binary, architecture)
    assert len(code) == 13
    for name, listing in code.items():
        assert re.search(r"HMMA|SHFL", listing)
        assert bool(divergent(listing)) == name.startswith("apart"), name


HEAD = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   ISETP.GE.AND P0, PT, R0, 0x10, PT ;
        /*0020*/                   ISETP.NE.AND P1, PT, RZ, c[0x0][0x160], PT ;
        /*0030*/                   BSSY B0, 0x70 ;
"""
TAIL = """
        /*0070*/                   BSYNC B0 ;
        /*0080*/                   SHFL.BFLY PT, R3, R2, 0x1, 0x1f ;
        /*0090*/                   EXIT ;
"""


@pytest.mark.parametrize(
    "lines, found",
    [
        ("@P0 BRA 0x70; SHFL.BFLY PT, R2, R1, 0x1, 0x1f", 1),
        ("@P1 BRA 0x70; SHFL.BFLY PT, R2, R1, 0x1, 0x1f", 0),
        ("@!P1 BRA P0, 0x70; SHFL.BFLY PT, R2, R1, 0x1, 0x1f", 1),
        ("@P0 BRA 0x80; FADD R2, R1, R1", 1),  # past the barrier: nothing makes the others wait
        ("@P0 SHFL.BFLY PT, R2, R1, 0x1, 0x1f", 1),
        ("@P0 EXIT", 1),
        ("@P0 MOV R5, 0x1; ISETP.NE.AND P2, PT, R5, RZ, PT; @P2 SHFL.BFLY PT, R2, R1, 0x1, 0x1f", 1),
        ("VOTE.ANY P2, P0; @P2 HMMA.16816.F32 R4, R8, R12, R4", 0),
        ("@P1 MOV R0, 0x1; @P1 ISETP.NE.AND P1, PT, R0, RZ, PT; @P1 MOVM.16.MT88 R2, R1", 0),  # R0 differs where not P1
        ("@P1 MOV R0, 0x1; ISETP.NE.AND P1, PT, R0, RZ, PT; @P1 MOVM.16.MT88 R2, R1", 1),
        ("@P0 LOP3.LUT R4, R4, 0x8, RZ, 0xfc, !PT; LOP3.LUT P2, RZ, R4, 0x4, RZ, 0xc0, !PT; @P2 VOTE.ANY R2, PT, P0", 0),
        ("@P0 LOP3.LUT R4, R4, 0x8, RZ, 0xfc, !PT; LOP3.LUT P2, RZ, R4, 0x8, RZ, 0xc0, !PT; @P2 VOTE.ANY R2, PT, P0", 1),
        ("R2P PR, R0, 0x4; @P2 VOTE.ANY R2, PT, P0", 1),
        ("R2P PR, R0, 0x8; @P1 VOTE.ANY R2, PT, P0", 0),
        ("IMAD.WIDE R6, R0, 0x4, RZ; ISETP.NE.AND P2, PT, R7, RZ, PT; @P2 VOTE.ANY R2, PT, P0", 1),
        ("IMAD.WIDE R6, R1, 0x4, R14; ISETP.NE.AND P2, PT, R7, RZ, PT; @P2 VOTE.ANY R2, PT, P0", 0),
        ("MOV R15, R0; IMAD.WIDE R6, R14, 0x4, RZ; ISETP.NE.AND P2, PT, R7, RZ, PT; @P2 VOTE.ANY R2, PT, P0", 0),
        ("IADD3 R6, P2, R0, R1, RZ; @P2 VOTE.ANY R2, PT, P0", 1),
        (
            "@P1 MOV R0, 0x1; ISETP.NE.AND P1, PT, RZ, c[0x0][0x164], PT; @P1 ISETP.NE.AND P2, PT, R0, RZ, PT; "
            "@P2 VOTE.ANY R2, PT, P0",
            1,
        ),  # P1 no longer says where R0 was written
    ],
)
def test_instruction_by_instruction(lines, found):
    middle = "".join(f"        /*{0x40 + 8 * i:04x}*/    {line} ;\n" for i, line in enumerate(lines.split("; ")))
    assert len(divergent(HEAD + middle + TAIL)) == found
