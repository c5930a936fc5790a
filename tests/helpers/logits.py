"""Logits of complete sequences, by the package and by `transformers`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.model.transformer import Transformer, head, prefill

torch = pytest.importorskip("torch", reason="a requirement in tests/requirements.txt, which launch/test.sh installs")


def hf_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return the logits [N, S, V] of a model of `transformers`."""
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()


@functools.partial(jax.jit, static_argnames="policy")
def full_forward(policy: Transformer, params: Any, tokens_NxS: jax.typing.ArrayLike) -> jax.Array:
    """Return the logits [N, S, V] of complete sequences."""
    hidden, _, _ = prefill(policy, params, tokens_NxS, jnp.full(tokens_NxS.shape[:1], tokens_NxS.shape[1]))
    return jnp.einsum("nsd,vd->nsv", hidden, head(policy, params).matrix_VxD)
