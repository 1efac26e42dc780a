"""The budget of a layer's memory traffic, counted by the compiler's schedule."""

import dataclasses

import pytest

import step_traffic
from extension import needs_compiler, needs_cpu

pytestmark = [needs_cpu, needs_compiler]


@pytest.mark.parametrize(
    "norm, units, kept",
    [
        # Attention 4 + 7 a block, residual connections 3 + 4 a block and MLP, GELU 8 + 16 with the activation made again.
        ("post", 67, 15),
        # The residual stream in float32 takes 2 a tensor, and is cast for every product.
        ("pre", 122, 22),
    ],
)
def test_a_layer_of_small_keeps_its_budget(norm, units, kept):
    found = step_traffic.count_layer(dataclasses.replace(step_traffic.PRESETS["small 5x128"], norm=norm))
    assert found.all <= units + 0.5 and found.kept <= kept + 0.5


def test_the_embedding_keeps_its_budget():
    assert step_traffic.count_around(step_traffic.PRESETS["small 5x128"]) <= 25
