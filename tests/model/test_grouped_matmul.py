"""Products of groups of rows with matrices, against NumPy; what they cost; and their lowering for GPUs and TPUs."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from rpt_jax.model.grouped_matmul import grouped_matmul

RNG = np.random.default_rng(0)
# Examples with as many rows and groups as others are one program.
ROWS, GROUPS = 305, 45
SIZES = {
    "empty groups": [0, 0, *RNG.multinomial(ROWS, RNG.dirichlet(np.ones(GROUPS - 3))), 0],
    "rows after the last group": RNG.multinomial(ROWS // 2, np.full(GROUPS, 1 / GROUPS)),
    "one group has all rows": ROWS * (np.arange(GROUPS) == 7),
    "no rows": np.zeros(GROUPS),
}


def gradients(rows: jax.Array, matrices: jax.Array, sizes: jax.Array, directions: jax.Array) -> Any:
    """Return the products, and the gradients of rows and matrices if `directions` are those of the products."""
    products, pull_back = jax.vjp(lambda *inputs: grouped_matmul(*inputs, sizes), rows, matrices)
    return products, *pull_back(directions)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 1e-5), (jnp.bfloat16, 0.02)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("sizes_E", SIZES.values(), ids=SIZES.keys())
def test_products_and_gradients_equal_those_of_each_group(sizes_E: np.ndarray, dtype: Any, tolerance: float) -> None:
    """NaNs in the rows after the last group change no other result."""
    sizes_E = np.asarray(sizes_E, np.int32)
    used = sizes_E.sum()
    rows, matrices, directions = (
        RNG.standard_normal(dims).astype(dtype) for dims in ((ROWS, 7), (GROUPS, 7, 3), (ROWS, 3))
    )
    rows[used:] = directions[used:] = np.nan
    ours = jax.jit(gradients)(rows, matrices, sizes_E, directions)

    rows, matrices, directions = (array.astype(np.float64) for array in (rows[:used], matrices, directions[:used]))
    group_S = np.repeat(np.arange(GROUPS), sizes_E)
    matrices_gradient = np.zeros_like(matrices)
    np.add.at(matrices_gradient, group_S, rows[:, :, None] * directions[:, None])
    products = np.einsum("si,sio->so", rows, matrices[group_S])
    rows_gradient = np.einsum("so,sio->si", directions, matrices[group_S])

    assert all(array.dtype == dtype for array in ours)
    for actual, expected in zip(
        (ours[0][:used], ours[1][:used], ours[2]), (products, rows_gradient, matrices_gradient), strict=True
    ):
        scale = np.abs(expected).max(initial=1)
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=tolerance * scale)


# --- cost and lowering, for the experts of a layer of Qwen3-30B-A3B with a sixteenth of its width ---

EXPERTS, INPUTS, OUTPUTS = 128, 128, 48


def layer_arguments(rows: int) -> list[jax.ShapeDtypeStruct]:
    """Return the arguments of `gradients`."""
    sizes = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)
    matrices = jax.ShapeDtypeStruct((EXPERTS, INPUTS, OUTPUTS), jnp.bfloat16)
    inputs, directions = (jax.ShapeDtypeStruct((rows, width), jnp.bfloat16) for width in (INPUTS, OUTPUTS))
    return [inputs, matrices, sizes, directions]


def product_flops(jaxpr: Any) -> int:
    """Return the FLOPs of all matrix products, those of a loop as often as it runs."""
    flops = 0
    for equation in jaxpr.eqns:
        assert equation.primitive.name not in ("while", "cond"), "the data decide on the cost"
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            dims = equation.invars[0].aval.shape
            flops += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(dims[axis] for axis in contracted)
        turns = equation.params.get("length", 1)
        flops += turns * sum(product_flops(inner) for inner in jaxprs_in_params(equation.params))
    return flops


@pytest.mark.parametrize(("tokens", "most"), [(1, 1.0), (64, 3.0), (8192, 1.2)])
def test_padding_costs_little(tokens: int, most: float) -> None:
    arguments = layer_arguments(8 * tokens)
    ideal = 3 * 2 * 8 * tokens * INPUTS * OUTPUTS
    traced = jax.jit(gradients).trace(*arguments)
    assert ideal <= product_flops(traced.jaxpr) <= most * ideal


def test_memory_does_not_grow_with_the_groups() -> None:
    """Apart from the gradient of the matrices."""
    arguments = layer_arguments(8 * 512)
    arrays = sum(math.prod(x.shape) * x.dtype.itemsize for x in arguments)
    memory = jax.jit(gradients).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * arrays


@pytest.mark.parametrize(
    ("platform", "instruction", "other"), [("cuda", "dot_general", "ragged_dot"), ("tpu", "ragged_dot", "while")]
)
def test_they_lower_for_their_platform(platform: str, instruction: str, other: str) -> None:
    """On a TPU by the instruction for it; on a GPU by products of blocks."""
    kind, name = ("NVIDIA H100 80GB HBM3", "gpu") if platform == "cuda" else ("TPU v5p", "tpu")
    device = jax.sharding.AbstractDevice(kind, num_cores=None, platform=name)
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(gradients).trace(*layer_arguments(8 * 512))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(instruction) >= 3 and other not in text
