"""The policy: one pre-norm decoder (RMSNorm, RoPE, GQA, SwiGLU) for training, prefill and decode alike.

New tokens come as `tokens_NxGxQ`: N prompts, G branches of each, Q tokens a branch. What they may look at besides each
other comes as contexts: the prompt's keys, shared by its branches, and the branch's own past. So

    prefill   Q = S, G = 1, no context
    decode    Q = 1, contexts = (prompt, past)
    scoring   Q = S, G = 1 for the prompts, then Q = T with context (prompt,) for their continuations
    training  Q = W, G = 1: rows of prompts and responses, each token of which sees its own part of the row (packed.py)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rpt_jax.model.attention.blockwise import RESULT
from rpt_jax.model.attention.dispatch import Context, KeyValues, attend
from rpt_jax.model.attention.packed import KeyRanges, attend_packed
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.rope import Scaling, rope_frequencies

Params = dict[str, Any]
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
# What a layer keeps for its backward pass, by the names of `policy.remat`: the results of its projections and of attention in
# blocks (never scores, which are what takes memory), or nothing but its input. Under "none" it keeps everything.
_REMAT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RESULT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32 whatever the dtype of `x`."""
    # Without leading axes of size 1: XLA's CPU backend takes ten times as long for the gradient of `scale` where there are any.
    x32 = x.astype(jnp.float32).reshape(*(size for size in x.shape[:-1] if size > 1), x.shape[-1])
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * scale).astype(x.dtype).reshape(x.shape)


def rotary_angles(
    positions_NxGxQ: jax.Array, head_size: int, base: float, scaling: Scaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [N, 1, G, Q, C/2] in float32: bfloat16 cannot tell position 256 from 257."""
    frequency, factor = rope_frequencies(head_size, base, scaling)
    angle = positions_NxGxQ[:, None, :, :, None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding of the last axis, first half against second half."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def project(x: jax.Array, w: jax.Array, axes: int = 1) -> jax.Array:
    """Contract the last `axes` of `x` with the first of `w`, as a product of two matrices.

    XLA's CPU backend copies operands with more axes than two for the gradient of `w`: forward and backward of a feed-forward
    part took 1.6 times as long.
    """
    rows, kept, size = x.shape[: x.ndim - axes], w.shape[axes:], math.prod(w.shape[:axes])
    return (x.reshape(-1, size) @ w.reshape(size, -1)).reshape(*rows, *kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def laid_out(x: jax.Array, axes: tuple[str | None, ...], gradient_axes: tuple[str | None, ...]) -> jax.Array:
    """`x` along logical axes, and its gradient along others: what is gathered one way is summed and split the other way.

    With the same ones both ways, XLA would look for a way to multiply a gradient whose tokens are split, and copy it whole.
    """
    return nn.with_logical_constraint(x, axes)


def _lay_out(
    x: jax.Array, axes: tuple[str | None, ...], gradient_axes: tuple[str | None, ...]
) -> tuple[jax.Array, None]:
    return nn.with_logical_constraint(x, axes), None


def _lay_gradient_out(axes: tuple[str | None, ...], gradient_axes: tuple[str | None, ...], _: None, dx: jax.Array):
    return (nn.with_logical_constraint(dx, gradient_axes),)


laid_out.defvjp(_lay_out, _lay_gradient_out)


def segment_starts(segments_NxGxQ: jax.Array) -> jax.Array:
    """Index at which the run of equal numbers that each token is part of begins, int32 [N, G, Q]."""
    indices_Q = jnp.arange(segments_NxGxQ.shape[-1], dtype=jnp.int32)
    changed = jnp.diff(segments_NxGxQ, axis=-1, prepend=segments_NxGxQ[..., :1]) != 0
    return jax.lax.cummax(jnp.where(changed, indices_Q, 0), axis=segments_NxGxQ.ndim - 1)


class Layer(nn.Module):
    """Attention and SwiGLU, each on the normalized residual."""

    config: ModelConfig
    dtype: Any
    attention: str

    def _weight(self, name: str, dims: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), axes)
        # Fetched whole for the layer, over devices that have other tokens. Left to itself, XLA splits the tokens' width over many
        # such devices instead, and sums what they multiply: on 256 chips twice the time.
        whole = tuple(None if axis == "width" else axis for axis in axes)
        return laid_out(self.param(name, init, dims, jnp.float32).astype(self.dtype), whole, axes)

    def _constant(self, name: str, dims: tuple[int, ...], axes: tuple[str | None, ...], value: float) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.constant(value), axes)
        return self.param(name, init, dims, jnp.float32)

    @nn.compact
    def __call__(
        self,
        x_NxGxQxD: jax.Array,
        kvs: tuple[KeyValues, ...],
        ranges: tuple[tuple[jax.Array | None, jax.Array | None], ...] | KeyRanges,
        rotary: tuple[jax.Array, jax.Array],
        look: Callable[[jax.Array, KeyValues], jax.Array] | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Return the residual stream after this layer, and this layer's keys and values of the new tokens.

        `look`, of queries and new keys, takes the place of attention over `kvs`: for caches laid out in another way.
        """
        s = self.config
        # Rows of an update are long, and as many tokens as were asked for: what else runs may be of any length.
        between = ("prompt", None, "sequence" if isinstance(ranges, KeyRanges) else None, None)
        inside = ("prompt", None, None, None)
        scale = self._constant("attention_norm", (s.width,), (None,), 1.0)
        y_NxGxQxD = laid_out(rms_norm(x_NxGxQxD, scale, s.norm_epsilon), inside, between)
        y_NxGxQxD, kv = self._attention(y_NxGxQxD, kvs, ranges, rotary, look)
        x_NxGxQxD = x_NxGxQxD + laid_out(y_NxGxQxD, between, inside)
        scale = self._constant("ffn_norm", (s.width,), (None,), 1.0)
        y_NxGxQxD = laid_out(rms_norm(x_NxGxQxD, scale, s.norm_epsilon), inside, between)
        return x_NxGxQxD + laid_out(self._ffn(y_NxGxQxD), between, inside), kv

    def _attention(self, x_NxGxQxD, kvs, ranges, rotary, look) -> tuple[jax.Array, KeyValues]:
        s, group = self.config, self.config.heads // self.config.kv_heads
        wq = self._weight("q", (s.width, s.kv_heads, group, s.head_size), ("width", "kv_heads", None, None), s.width)
        wk = self._weight("k", (s.width, s.kv_heads, s.head_size), ("width", "kv_heads", None), s.width)
        wv = self._weight("v", (s.width, s.kv_heads, s.head_size), ("width", "kv_heads", None), s.width)
        wo = self._weight(
            "o", (s.kv_heads, group, s.head_size, s.width), ("kv_heads", None, None, "width"), s.heads * s.head_size
        )
        q = project(x_NxGxQxD, wq).transpose(0, 3, 1, 4, 2, 5)
        k, v = (project(x_NxGxQxD, w).transpose(0, 3, 1, 2, 4) for w in (wk, wv))
        if s.qkv_bias:
            dims, axes = (1, s.kv_heads, 1, 1, s.head_size), (None, "kv_heads", None, None, None)
            bias_q = self._constant("q_bias", (1, s.kv_heads, 1, group, 1, s.head_size), (*axes, None), 0.0)
            q = q + bias_q.astype(self.dtype)
            k = k + self._constant("k_bias", dims, axes, 0.0).astype(self.dtype)
            v = v + self._constant("v_bias", dims, axes, 0.0).astype(self.dtype)
        if s.qk_norm:
            q = rms_norm(q, self._constant("q_norm", (s.head_size,), (None,), 1.0), s.norm_epsilon)
            k = rms_norm(k, self._constant("k_norm", (s.head_size,), (None,), 1.0), s.norm_epsilon)
        cos, sin = rotary
        q, k = rotate(q, cos[:, :, :, None], sin[:, :, :, None]), rotate(k, cos, sin)
        q, k, v = (nn.with_logical_constraint(x, ("prompt", "kv_heads")) for x in (q, k, v))
        new = KeyValues(k, v)
        if isinstance(ranges, KeyRanges):
            out_NxKxGxRxQxC = attend_packed(q, k, v, ranges, self.attention)
        elif look is None:
            contexts = [Context(kv, *seen) for kv, seen in zip((*kvs, new), ranges, strict=True)]
            out_NxKxGxRxQxC = attend(q, contexts, self.attention)
        else:
            out_NxKxGxRxQxC = look(q, new)
        return project(out_NxKxGxRxQxC.transpose(0, 2, 4, 1, 3, 5), wo, axes=3), new

    def _ffn(self, x_NxGxQxD: jax.Array) -> jax.Array:
        s = self.config
        gate = project(x_NxGxQxD, self._weight("gate", (s.width, s.ffn), ("width", "ffn"), s.width))
        up = project(x_NxGxQxD, self._weight("up", (s.width, s.ffn), ("width", "ffn"), s.width))
        down = self._weight("down", (s.ffn, s.width), ("ffn", "width"), s.ffn)
        hidden_NxGxQxF = nn.with_logical_constraint(nn.silu(gate) * up, ("prompt", None, None, "ffn"))
        return project(hidden_NxGxQxF, down)


class Transformer(nn.Module):
    """The decoder without its head: tokens in, final hidden states and new keys and values out."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "reference"
    absent_ids: tuple[int, ...] = ()  # Of the vocabulary, those that stand for no token: padding, for the most part.

    @nn.compact
    def __call__(
        self,
        tokens_NxGxQ: jax.Array,
        positions_NxGxQ: jax.Array,
        contexts: Sequence[Context] = (),
        segments_NxGxQ: jax.Array | None = None,
        seen: KeyRanges | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Run the trunk.

        Args:
          tokens_NxGxQ: int32 ids; right padding is harmless, since no real token ever sees what comes after it.
          positions_NxGxQ: int32 positions in the sequence that the branch belongs to.
          contexts: earlier keys (with a leading L axis) and which of them each new token sees.
          segments_NxGxQ: where several sequences are packed into one branch, one after the other, a number for each: tokens see
            their own only.
          seen: what the tokens see of each other, for rows of another order than left to right; G is 1, and nothing else is seen.

        Returns: hidden_NxGxQxD after the final norm, in `dtype`, and `KeyValues` [L, N, K, G, Q, C] of the new tokens.
        """
        s = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(s.width**-0.5), ("vocab", "width"))
        embedding_VxD = self.param("embedding", init, (s.vocab, s.width), jnp.float32)
        if not s.tied:
            self.param("head", init, (s.vocab, s.width), jnp.float32)
        x_NxGxQxD = embed({"embedding": embedding_VxD}, tokens_NxGxQ, self.dtype)
        rotary = rotary_angles(positions_NxGxQ, s.head_size, s.rope_base, s.rope_scaling)
        since_NxGxQ = None if segments_NxGxQ is None else segment_starts(segments_NxGxQ)
        layer = Layer
        if self.remat != "none":
            # In a loop XLA cannot undo the recomputation, and the barriers against that would only cost.
            layer = nn.remat(Layer, policy=_REMAT[self.remat], prevent_cse=False)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=s.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(s, self.dtype, self.attention, name="layers")
        kvs = tuple(context.kv for context in contexts)
        ranges = seen or (*((context.begin_NxGxQ, context.end_NxGxQ) for context in contexts), (since_NxGxQ, None))
        x_NxGxQxD, new = layers(x_NxGxQxD, kvs, ranges, rotary)
        scale = self.param("norm", nn.with_logical_partitioning(nn.initializers.ones, (None,)), (s.width,), jnp.float32)
        return rms_norm(x_NxGxQxD, scale, s.norm_epsilon), new


def embed(params: Params, tokens_NxGxQ: jax.Array, dtype: Any) -> jax.Array:
    """Look tokens up in the embedding, [N, G, Q, D]."""
    # Left to itself, XLA splits what is looked up by width, as the table is, and finds no way from there to prompts.
    table_VxD = nn.with_logical_constraint(params["embedding"], ("vocab", None))
    x_NxGxQxD = table_VxD[tokens_NxGxQ].astype(dtype)
    return nn.with_logical_constraint(x_NxGxQxD, ("prompt", None, None, None))


def in_compute_dtype(policy: Transformer, params: Params) -> Params:
    """Parameters as decoding reads them: the layers' matrices in the dtype to which each layer would round them anyway."""
    layers = {k: x.astype(policy.dtype) if k in _MATRICES else x for k, x in params["layers"].items()}
    return params | {"layers": layers}


class Head(NamedTuple):
    """What makes logits of hidden states.

    Attributes:
      matrix_VxD: float32.
      absent_V: bool, ids that stand for no token and have no probability; None where all do.
    """

    matrix_VxD: jax.Array
    absent_V: np.ndarray | None = None


def head(policy: Transformer, params: Params) -> Head:
    """Return the policy's head; its matrix is its own, or the embedding where they are tied."""
    # Hidden states are split by prompt alone: without this, XLA would split them by width, as the matrix is.
    matrix_VxD = nn.with_logical_constraint(params.get("head", params["embedding"]), ("vocab", None))
    absent = policy.absent_ids
    return Head(matrix_VxD, np.isin(np.arange(policy.config.vocab), absent) if absent else None)


def prefill(
    policy: Transformer, params: Params, prompts_PxS: jax.Array, lengths_P: jax.Array
) -> tuple[jax.Array, Context, jax.Array]:
    """Run the prompts once.

    Args:
      prompts_PxS: int32 ids, padded on the right.
      lengths_P: int32 number of real tokens, at least 1.

    Returns: hidden_PxSxD of every token, the prompts as a context for their branches, and hidden_PxD of the last real token.
    """
    size = prompts_PxS.shape[1]
    positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), prompts_PxS.shape)
    hidden, kv = policy.apply({"params": params}, prompts_PxS[:, None], positions[:, None])
    last_PxD = jnp.take_along_axis(hidden[:, 0], (lengths_P - 1)[:, None, None], axis=1)[:, 0]
    return hidden[:, 0], Context(kv, end_NxGxQ=lengths_P[:, None, None]), last_PxD


def branch_hidden(
    policy: Transformer, params: Params, prompts_PxS: jax.Array, lengths_P: jax.Array, responses_PxGxT: jax.Array
) -> jax.Array:
    """Return hidden_PxGxTxD, whose entry t is the state that predicts response token t.

    The prompt runs once for its G responses, forward and backward (S + G·T tokens).
    """
    _, prompt, last_PxD = prefill(policy, params, prompts_PxS, lengths_P)
    steps_T = jnp.arange(responses_PxGxT.shape[-1], dtype=jnp.int32)
    positions = jnp.broadcast_to(lengths_P[:, None, None] + steps_T, responses_PxGxT.shape)
    hidden, _ = policy.apply({"params": params}, responses_PxGxT[..., :-1], positions[..., :-1], (prompt,))
    first = jnp.broadcast_to(last_PxD[:, None, None], (*responses_PxGxT.shape[:2], 1, last_PxD.shape[-1]))
    return jnp.concatenate([first, hidden], axis=2)
