"""Precision of matrix products of float32 numbers, by name; docs/concepts/precision.md says which products the programs have.

    name            CPU       GPU                                     TPU
    float32         float32   float32, without tensor cores           six bfloat16 products
    tensorfloat32   float32   TensorFloat-32 (10 bits of mantissa)    three bfloat16 products; six with Pallas kernels
    bfloat16        operands rounded to bfloat16, products summed in float32, on every platform

Without a name, XLA computes "float32" products with TensorFloat-32 on a GPU and with one bfloat16 product on a TPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Fn = TypeVar("Fn", bound=Callable[..., Any])

_ACCELERATORS = ("gpu", "tpu")
MATMUL_PRECISIONS = {"float32": jax.lax.Precision.HIGHEST, "tensorfloat32": jax.lax.Precision.HIGH}


def choose_dtype(name: str, platform: str) -> str:
    """Return the dtype of the layers that `policy.dtype` stands for on a platform: "float32" or "bfloat16"."""
    if name != "auto":
        return name
    return "bfloat16" if platform in _ACCELERATORS else "float32"


def choose_head_precision(name: str, platform: str) -> str:
    """Return the precision of the head that `policy.head_precision` stands for on a platform."""
    if name != "auto":
        return name
    return "bfloat16" if platform in _ACCELERATORS else "tensorfloat32"


def in_policy_precision(fn: Fn) -> Fn:
    """Decorate a function of (policy, …) so that its products of float32 numbers have the precision of the policy.

    Every compiled program that runs the policy is decorated, so sampler and trainer have the same precision. Products in
    bfloat16 have one precision only; kernels for them do not accept a name.
    """

    @functools.wraps(fn)
    def run(policy: Any, *args: Any, **kwargs: Any) -> Any:
        if policy.dtype != jnp.float32:
            return fn(policy, *args, **kwargs)
        # Pallas kernels for a TPU know one or six bfloat16 products, not three.
        precision = "float32" if policy.attention == "tpu_kernels" else policy.precision
        with jax.default_matmul_precision(MATMUL_PRECISIONS[precision].name.lower()):
            return fn(policy, *args, **kwargs)

    return run  # pyright: ignore[reportReturnType] (it has the signature of `fn`)


def head_product(hidden_MxD: jax.Array, matrix_VxD: jax.Array, precision: str) -> jax.Array:
    """Return hidden · matrixᵀ, float32 [M, V], for operands of any dtype.

    Args:
      hidden_MxD: hidden states.
      matrix_VxD: matrix of the output head.
      precision: "float32", "tensorfloat32" or "bfloat16"; the gradient has it too.
    """
    if precision == "bfloat16":
        return _bfloat16_product(hidden_MxD, matrix_VxD)
    hidden_MxD = hidden_MxD.astype(jnp.float32)
    return jnp.einsum("md,vd->mv", hidden_MxD, matrix_VxD, precision=MATMUL_PRECISIONS[precision])


@jax.custom_vjp
def _bfloat16_product(hidden_MxD: jax.Array, matrix_VxD: jax.Array) -> jax.Array:
    return _rounded_einsum("md,vd->mv", hidden_MxD, matrix_VxD)


def _bfloat16_forward(hidden_MxD: jax.Array, matrix_VxD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _bfloat16_product(hidden_MxD, matrix_VxD), (hidden_MxD, matrix_VxD)


def _bfloat16_backward(operands: tuple[jax.Array, jax.Array], gradient_MxV: jax.Array) -> tuple[jax.Array, jax.Array]:
    # All operands are rounded, but no sum is: the gradient of the matrix adds up over chunks of tokens in float32.
    hidden_MxD, matrix_VxD = operands
    return (
        _rounded_einsum("mv,vd->md", gradient_MxV, matrix_VxD).astype(hidden_MxD.dtype),
        _rounded_einsum("mv,md->vd", gradient_MxV, hidden_MxD).astype(matrix_VxD.dtype),
    )


_bfloat16_product.defvjp(_bfloat16_forward, _bfloat16_backward)


def _rounded_einsum(pattern: str, x: jax.Array, y: jax.Array) -> jax.Array:
    operands = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jnp.einsum(pattern, *operands, preferred_element_type=jnp.float32, precision=jax.lax.Precision.DEFAULT)
