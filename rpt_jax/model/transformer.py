"""Decoder-only transformer (pre-norm RMSNorm, RoPE, GQA, SwiGLU) for training, prefill and decoding.

New tokens are passed as `tokens_NxGxQ`: N prompts, G branches per prompt (its sampled responses), Q tokens per branch. Earlier
tokens that they attend to are passed as contexts: keys and values of the prompt, shared by its branches, or of the branch.

    prefill    G = 1, Q = prompt length, no context
    decoding   Q = 1, attention over the KV cache (`cached_attention`)
    scoring    prefill of the prompts, then their continuations with the prompt as context
    training   G = 1, Q = row length: prompts and responses packed into rows (attention/packed.py)

Parameters and activations carry logical axis names, which distributed/sharding.py maps to mesh axes:

    prompt     the batch of prompts or rows (N)
    sequence   tokens of a packed row (Q), sharded between the matrix products of a layer if sequence parallelism is on
    width      the residual stream of a parameter (D); activations keep it unsharded
    kv_heads   key/value heads (K), each with its R query heads
    ffn        hidden units of the feed-forward layer (F)
    experts    experts of the feed-forward layer (E), whose hidden units are not split
    vocab      rows of the embedding and the head (V)
    layers     the stack of layers (L), never sharded
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.spmd import with_logical_constraint

from rpt_jax.model.attention.blockwise import ATTENTION_RESULT
from rpt_jax.model.attention.dispatch import AttentionFn, Context, KeyValues, attend
from rpt_jax.model.attention.key_ranges import KeyRanges
from rpt_jax.model.attention.packed import attend_packed
from rpt_jax.model.experts import EXPERT_PRODUCT, ROUTING, ExpertMatrices, Routing, route, run_experts
from rpt_jax.model.lora import Lora
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.rope import Scaling, rope_frequencies

Params = dict[str, Any]
LogicalAxes = tuple[str | None, ...]
# For each context, and then for the new tokens themselves: begin and end of each query's keys, as in `Context`.
ContextRanges = tuple[tuple[jax.Array | None, jax.Array | None], ...]

_MATRICES = ("q", "k", "v", "o", "router", "gate", "up", "down")
# What a layer saves for its backward pass, by `policy.remat`. "dots" saves the results of the projections, of the experts' first
# products and of attention kernels, and recomputes the rest. It never saves attention scores, whose size is quadratic in the
# length. "full" saves only the input of the layer. "none", which is not in this table, saves everything.
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_RESULT, EXPERT_PRODUCT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Apply RMSNorm (Zhang and Sennrich, arXiv 1910.07467) over the last axis.

    Args:
      x: activations [..., D]; the norm is computed in float32 and returned in the dtype of `x`.
      scale: float32 [D].
      epsilon: added to the mean square.
    """
    # Drop axes of size 1: with them, XLA's CPU backend takes ten times as long to compute the gradient of `scale`.
    x32 = x.astype(jnp.float32).reshape(*(size for size in x.shape[:-1] if size > 1), x.shape[-1])
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * scale).astype(x.dtype).reshape(x.shape)


def rotary_angles(
    positions_NxGxQ: jax.Array, head_size: int, base: float, scaling: Scaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Compute the cosines and sines of rotary position embedding (RoPE; Su et al., arXiv 2104.09864).

    Args:
      positions_NxGxQ: integer positions.
      head_size: size C of a query or key vector.
      base: base of the rotary frequencies.
      scaling: change of the frequencies for longer contexts, or None.

    Returns: cosines and sines [N, G, Q, 1, C / 2], always float32: bfloat16 rounds position 257 to 256.
    """
    frequency, factor = rope_frequencies(head_size, base, scaling)
    angle = positions_NxGxQ[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Apply rotary position embedding to the last axis, pairing its first half with its second half.

    Args:
      x: queries or keys [..., C].
      cos, sin: results of `rotary_angles`, broadcastable to [..., C / 2].
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def project(x: jax.Array, w: jax.Array, axes: int = 1) -> jax.Array:
    """Contract the last `axes` axes of `x` with the first `axes` axes of `w`.

    Both are reshaped to matrices first: for the gradient of `w`, XLA's CPU backend copies operands with more than two axes,
    which made forward and backward of the feed-forward layer 1.6 times as slow.
    """
    rows = x.shape[: x.ndim - axes]
    outputs = w.shape[axes:]
    size = math.prod(w.shape[:axes])
    return (x.reshape(-1, size) @ w.reshape(size, -1)).reshape(*rows, *outputs)


def constrain_with_gradient(x: jax.Array, axes: LogicalAxes, gradient_axes: LogicalAxes) -> jax.Array:
    """Constrain the sharding of `x` to logical axes, and that of its gradient to others.

    An all-gather in the forward pass thereby becomes a reduce-scatter in the backward pass, and vice versa. If the gradient had
    the axes of `x`, XLA would replicate gradients whose tokens are sharded before it multiplies them.

    Args:
      x: any array.
      axes: logical axis names of `x`, one per axis.
      gradient_axes: logical axis names of the gradient of `x`.
    """
    return _constrain(x, axes, gradient_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _constrain(x: jax.Array, axes: LogicalAxes, gradient_axes: LogicalAxes) -> Any:
    return with_logical_constraint(x, axes)


def _constrain_forward(x: jax.Array, axes: LogicalAxes, gradient_axes: LogicalAxes) -> tuple[jax.Array, None]:
    return with_logical_constraint(x, axes), None


def _constrain_backward(
    axes: LogicalAxes, gradient_axes: LogicalAxes, residuals: None, dx: jax.Array
) -> tuple[jax.Array]:
    return (with_logical_constraint(dx, gradient_axes),)


_constrain.defvjp(_constrain_forward, _constrain_backward)


def _partitioned(init: Callable[..., Any], axes: LogicalAxes) -> Callable[..., Any]:
    """Return an initializer of a parameter with logical axis names; `Module.param` returns the plain array."""
    return nn.with_logical_partitioning(init, axes)


def segment_starts(segments_NxGxQ: jax.Array) -> jax.Array:
    """Return the index of the first token of each token's segment, int32 [N, G, Q].

    Args:
      segments_NxGxQ: segment numbers; a segment is a run of equal numbers.
    """
    indices_Q = jnp.arange(segments_NxGxQ.shape[-1], dtype=jnp.int32)
    changed = jnp.diff(segments_NxGxQ, axis=-1, prepend=segments_NxGxQ[..., :1]) != 0
    return jax.lax.cummax(jnp.where(changed, indices_Q, 0), axis=segments_NxGxQ.ndim - 1)


class Layer(nn.Module):
    """Transformer layer: attention and a SwiGLU feed-forward network, each pre-normalized and with a residual connection.

    The feed-forward network may have experts (model/experts.py); the layer then records which of them each token runs through in
    the collection `ROUTING`, for callers of `apply` that make it mutable.

    Attributes:
      config: architecture.
      dtype: dtype of activations and of the matrices in products; parameters are stored in float32.
      attention: name of the attention implementation, as `choose_attention` returns it.
      lora: adapters of the matrices, which are then frozen and stored in `dtype`; None for none.
    """

    config: ModelConfig
    dtype: Any
    attention: str
    lora: Lora | None = None

    def _project(self, x: jax.Array, name: str, dims: tuple[int, ...], axes: LogicalAxes, inputs: int = 1) -> jax.Array:
        """Contract the last `inputs` axes of `x` with the first ones of matrix `name`, and add the product of its adapters.

        Args:
          x: activations in `dtype`.
          name: of the parameter.
          dims: its dimensions, the input axes first.
          axes: their logical names.
          inputs: number of input axes.
        """
        init = nn.initializers.normal(math.prod(dims[:inputs]) ** -0.5)
        y = project(x, self._matrix(name, dims, axes, init, self.dtype if self.lora else jnp.float32), inputs)
        if self.lora is None or name not in self.lora.targets:
            return y
        rank = self.lora.rank
        a = self._matrix(f"{name}_lora_a", (*dims[:inputs], rank), (*axes[:inputs], None), init, jnp.float32)
        b_dims = (rank, *dims[inputs:])
        b = self._matrix(f"{name}_lora_b", b_dims, (None, *axes[inputs:]), nn.initializers.zeros, jnp.float32)
        return y + project(self.lora.scale * project(x, a, inputs), b)

    def _matrix(self, name: str, dims: tuple[int, ...], axes: LogicalAxes, init: Any, stored: Any) -> jax.Array:
        """Return a matrix parameter, stored in dtype `stored`, in `dtype` and gathered over the fsdp axis."""
        # All-gather over "width" (FSDP) and reduce-scatter the gradient. Without the constraint, XLA shards the width of the
        # activations instead and sums partial products, which takes twice as long on 256 chips.
        gathered = tuple(None if axis == "width" else axis for axis in axes)
        param = self.param(name, _partitioned(init, axes), dims, stored)
        return constrain_with_gradient(param.astype(self.dtype), gathered, axes)

    def _constant(self, name: str, dims: tuple[int, ...], axes: LogicalAxes, value: float) -> jax.Array:
        """Return a float32 parameter, initialized with a constant."""
        init = _partitioned(nn.initializers.constant(value), axes)
        return self.param(name, init, dims, jnp.float32)

    @nn.compact
    def __call__(
        self,
        x_NxGxQxD: jax.Array,
        kvs: tuple[KeyValues, ...],
        ranges: ContextRanges | KeyRanges,
        rotary: tuple[jax.Array, jax.Array],
        cached_attention: AttentionFn | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Run the layer.

        Args:
          x_NxGxQxD: residual stream of the new tokens, in `dtype`.
          kvs: this layer's keys and values of each context.
          ranges: begin and end of each query's keys in each context and in the new tokens; or `KeyRanges` for packed rows,
            which have no contexts.
          rotary: cosines and sines of the positions of the new tokens, from `rotary_angles`.
          cached_attention: attention of the new queries over a KV cache and over the new keys and values, for caches with
            another layout. It replaces attention over `kvs`.

        Returns: the residual stream after this layer, and this layer's keys and values of the new tokens.
        """
        config = self.config
        # Sequence parallelism: between the matrix products, the tokens of a packed row are sharded over the tensor axes; inside
        # them every device has all tokens and shards heads or hidden units. Only packed rows have a length that is known to be
        # divisible.
        between = ("prompt", None, "sequence" if isinstance(ranges, KeyRanges) else None, None)
        inside = ("prompt", None, None, None)

        with jax.named_scope("attention"):
            scale = self._constant("attention_norm", (config.width,), (None,), 1.0)
            y_NxGxQxD = rms_norm(x_NxGxQxD, scale, config.norm_epsilon)
            y_NxGxQxD = constrain_with_gradient(y_NxGxQxD, inside, between)
            y_NxGxQxD, kv = self._attention(y_NxGxQxD, kvs, ranges, rotary, cached_attention)
            x_NxGxQxD = x_NxGxQxD + constrain_with_gradient(y_NxGxQxD, between, inside)

        with jax.named_scope("ffn"):
            scale = self._constant("ffn_norm", (config.width,), (None,), 1.0)
            y_NxGxQxD = rms_norm(x_NxGxQxD, scale, config.norm_epsilon)
            y_NxGxQxD = constrain_with_gradient(y_NxGxQxD, inside, between)
            y_NxGxQxD = self._expert_ffn(y_NxGxQxD) if config.experts else self._ffn(y_NxGxQxD)
            x_NxGxQxD = x_NxGxQxD + constrain_with_gradient(y_NxGxQxD, between, inside)
        return x_NxGxQxD, kv

    def _attention(
        self,
        x_NxGxQxD: jax.Array,
        kvs: tuple[KeyValues, ...],
        ranges: ContextRanges | KeyRanges,
        rotary: tuple[jax.Array, jax.Array],
        cached_attention: AttentionFn | None,
    ) -> tuple[jax.Array, KeyValues]:
        """Compute attention on the normalized residual stream; arguments and results are those of `__call__`."""
        config = self.config
        width = config.width
        kv_heads = config.kv_heads
        head_size = config.head_size
        heads_per_kv = config.heads // kv_heads

        # Project: q [N, G, Q, K, R, C], k and v [N, G, Q, K, C].
        q_dims = (width, kv_heads, heads_per_kv, head_size)
        kv_dims = (width, kv_heads, head_size)
        kv_axes = ("width", "kv_heads", None)
        q = self._project(x_NxGxQxD, "q", q_dims, (*kv_axes, None))
        k = self._project(x_NxGxQxD, "k", kv_dims, kv_axes)
        v = self._project(x_NxGxQxD, "v", kv_dims, kv_axes)
        if config.qkv_bias:
            dims = (1, kv_heads, 1, 1, head_size)
            axes = (None, "kv_heads", None, None, None)
            bias_q = self._constant("q_bias", (1, kv_heads, 1, heads_per_kv, 1, head_size), (*axes, None), 0.0)
            bias_k = self._constant("k_bias", dims, axes, 0.0)
            bias_v = self._constant("v_bias", dims, axes, 0.0)
            q = q + bias_q.astype(self.dtype).reshape(q_dims[1:])
            k = k + bias_k.astype(self.dtype).reshape(kv_dims[1:])
            v = v + bias_v.astype(self.dtype).reshape(kv_dims[1:])
        if config.qk_norm:
            q = rms_norm(q, self._constant("q_norm", (head_size,), (None,), 1.0), config.norm_epsilon)
            k = rms_norm(k, self._constant("k_norm", (head_size,), (None,), 1.0), config.norm_epsilon)

        # Encode the positions. Keys are rotated before they are cached.
        cos, sin = rotary
        q = rotate(q, cos[..., None, :], sin[..., None, :])
        k = rotate(k, cos, sin)

        # Move the heads before the tokens: q [N, K, G, R, Q, C], k and v [N, K, G, Q, C]. A kernel that takes tokens first moves
        # them back, and XLA then removes both transpositions.
        q = q.transpose(0, 3, 1, 4, 2, 5)
        k, v = (x.transpose(0, 3, 1, 2, 4) for x in (k, v))
        q, k, v = (with_logical_constraint(x, ("prompt", "kv_heads")) for x in (q, k, v))
        new = KeyValues(k=k, v=v)

        # Attend over a packed row, a KV cache, or the contexts and the new tokens.
        if isinstance(ranges, KeyRanges):
            out_NxKxGxRxQxC = attend_packed(q, k, v, ranges, self.attention)
        elif cached_attention is not None:
            out_NxKxGxRxQxC = cached_attention(q, new)
        else:
            contexts = [
                Context(kv=kv, begin_NxGxQ=begin, end_NxGxQ=end)
                for kv, (begin, end) in zip((*kvs, new), ranges, strict=True)
            ]
            out_NxKxGxRxQxC = attend(q, contexts, self.attention)
        out_NxGxQxKxRxC = out_NxKxGxRxQxC.transpose(0, 2, 4, 1, 3, 5)
        return self._project(
            out_NxGxQxKxRxC, "o", (*q_dims[1:], width), ("kv_heads", None, None, "width"), inputs=3
        ), new

    def _ffn(self, x_NxGxQxD: jax.Array) -> jax.Array:
        """Compute SwiGLU (Shazeer, arXiv 2002.05202) on the normalized residual stream."""
        config = self.config
        dims = (config.width, config.ffn)
        gate = self._project(x_NxGxQxD, "gate", dims, ("width", "ffn"))
        up = self._project(x_NxGxQxD, "up", dims, ("width", "ffn"))
        hidden_NxGxQxF = with_logical_constraint(nn.silu(gate) * up, ("prompt", None, None, "ffn"))
        return self._project(hidden_NxGxQxF, "down", dims[::-1], ("ffn", "width"))

    def _expert_ffn(self, x_NxGxQxD: jax.Array) -> jax.Array:
        """Compute a mixture of SwiGLU experts on the normalized residual stream."""
        config = self.config
        stored = self.dtype if self.lora else jnp.float32

        def matrix(name: str, dims: tuple[int, ...], axes: LogicalAxes) -> jax.Array:
            init = nn.initializers.normal(dims[-2] ** -0.5)
            return self._matrix(name, dims, axes, init, stored)

        router_DxE = matrix("router", (config.width, config.experts), ("width", None))
        dims = (config.experts, config.width, config.ffn)
        matrices = ExpertMatrices(
            gate_ExDxF=matrix("gate", dims, ("experts", "width", None)),
            up_ExDxF=matrix("up", dims, ("experts", "width", None)),
            down_ExFxD=matrix("down", (config.experts, config.ffn, config.width), ("experts", None, "width")),
        )
        if self.is_initializing():
            # Parameters are made with a single token, which a mesh cannot split.
            return x_NxGxQxD
        routing = route(x_NxGxQxD, router_DxE, config.experts_per_token, config.normalize_expert_weights)
        self.sow(ROUTING, "routing", routing, reduce_fn=lambda _, new: new, init_fn=lambda: routing)
        return run_experts(x_NxGxQxD, routing, matrices)


class Transformer(nn.Module):
    """Decoder without its output head: from tokens to final hidden states, keys and values.

    Attributes:
      config: architecture.
      dtype: dtype of activations and of the matrices in products; parameters are stored in float32.
      remat: what layers save for the backward pass: "none" (everything), "dots" or "full" (only their input).
      attention: name of the attention implementation, as `choose_attention` returns it.
      absent_ids: ids of the vocabulary without a token, most of them padding; the head gives them no probability.
      precision: of products of float32 numbers in the layers, where `dtype` is float32 (model/precision.py).
      head_precision: of the head's products.
      lora: adapters, beside which all other parameters are frozen and stored as `in_compute_dtype` returns them; None for none.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "reference"
    absent_ids: tuple[int, ...] = ()
    precision: str = "tensorfloat32"
    head_precision: str = "tensorfloat32"
    lora: Lora | None = None

    @property
    def table_dtype(self) -> Any:
        """Dtype of the embedding and the head for decoding: that of the head's products, if the layers have it too."""
        is_bfloat16 = self.head_precision == jnp.dtype(self.dtype).name == "bfloat16"
        return jnp.bfloat16 if is_bfloat16 else jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens_NxGxQ: jax.Array,
        positions_NxGxQ: jax.Array,
        contexts: Sequence[Context] = (),
        segments_NxGxQ: jax.Array | None = None,
        key_ranges: KeyRanges | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Run all layers.

        Without `key_ranges`, attention among the new tokens is causal; padding on the right is therefore harmless.

        Args:
          tokens_NxGxQ: int32 token ids.
          positions_NxGxQ: int32 positions in the sequence of each branch.
          contexts: earlier keys and values, with a leading L axis, and which of them each new token attends to.
          segments_NxGxQ: segment numbers, if several sequences are packed one after the other into a branch; tokens attend only
            to new tokens of their own segment.
          key_ranges: which keys of its row each token attends to, for packed rows (attention/packed.py); G is then 1, and
            `contexts` and `segments_NxGxQ` are not used.

        Returns: hidden_NxGxQxD after the final norm, in `dtype`, and `KeyValues` [L, N, K, G, Q, C] of the new tokens.
        """
        config = self.config

        # Embed the tokens.
        init = _partitioned(nn.initializers.normal(config.width**-0.5), ("vocab", "width"))
        stored = self.table_dtype if self.lora else jnp.float32
        embedding_VxD = self.param("embedding", init, (config.vocab, config.width), stored)
        if not config.tied:
            # Only created here; `head` reads it.
            self.param("head", init, (config.vocab, config.width), stored)
        x_NxGxQxD = embed({"embedding": embedding_VxD}, tokens_NxGxQ, self.dtype)
        rotary = rotary_angles(positions_NxGxQ, config.head_size, config.rope_base, config.rope_scaling)

        # Scan over the layers: parameters are stacked, and a layer is compiled once.
        layer = Layer
        if self.remat != "none":
            # `prevent_cse` is not needed inside a scan, where XLA cannot merge the recomputation with the forward pass.
            layer = nn.remat(Layer, policy=_REMAT_POLICIES[self.remat], prevent_cse=False)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, ROUTING: 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType] (the stub omits tuples)
            length=config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config=config, dtype=self.dtype, attention=self.attention, lora=self.lora, name="layers")

        # The ranges of keys are the same in every layer; keys and values are scanned with the layers.
        kvs = tuple(context.kv for context in contexts)
        if key_ranges is not None:
            ranges = key_ranges
        else:
            begin_NxGxQ = None if segments_NxGxQ is None else segment_starts(segments_NxGxQ)
            ranges = (*((context.begin_NxGxQ, context.end_NxGxQ) for context in contexts), (begin_NxGxQ, None))
        x_NxGxQxD, new = layers(x_NxGxQxD, kvs, ranges, rotary)

        norm_init = _partitioned(nn.initializers.ones, (None,))
        scale = self.param("norm", norm_init, (config.width,), jnp.float32)
        with jax.named_scope("final_norm"):
            return rms_norm(x_NxGxQxD, scale, config.norm_epsilon), new


@jax.named_scope("embed")
def embed(params: Params, tokens_NxGxQ: jax.Array, dtype: Any) -> jax.Array:
    """Look up token embeddings.

    Args:
      params: `embedding`, float32 [V, D], is read.
      tokens_NxGxQ: int32 token ids.
      dtype: of the result.

    Returns: [N, G, Q, D].
    """
    # Gather the width of the table before the lookup: otherwise XLA shards the result by width, and has no efficient way from
    # there to sharding by prompt.
    table_VxD = with_logical_constraint(params["embedding"], ("vocab", None))
    x_NxGxQxD = table_VxD[tokens_NxGxQ].astype(dtype)
    return with_logical_constraint(x_NxGxQxD, ("prompt", None, None, None))


def in_compute_dtype(policy: Transformer, params: Params) -> Params:
    """Return parameters for decoding: matrices that each step would round to `policy.dtype` are rounded once for all steps."""
    layers = {
        name: x.astype(policy.dtype) if name.partition("_lora_")[0] in _MATRICES else x
        for name, x in params["layers"].items()
    }
    tables = {name: params[name].astype(policy.table_dtype) for name in ("embedding", "head") if name in params}
    return params | {"layers": layers} | tables


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix_VxD", "absent_V"], meta_fields=["precision"])
@dataclasses.dataclass(frozen=True)
class Head:
    """Output head, which maps hidden states to logits.

    Attributes:
      matrix_VxD: float32, or bfloat16 for decoding if that is the head's precision.
      absent_V: bool, ids without a token, which get no probability; None if every id has a token.
      precision: of the products, as in model/precision.py.
    """

    matrix_VxD: jax.Array
    absent_V: np.ndarray | None = None
    precision: str = "tensorfloat32"


@jax.named_scope("head")
def head(policy: Transformer, params: Params) -> Head:
    """Return the output head of a policy; its matrix is the embedding if the two are tied."""
    # Gather the width. Hidden states are sharded by prompt only, and XLA would otherwise shard them by width.
    matrix_VxD = with_logical_constraint(params.get("head", params["embedding"]), ("vocab", None))
    absent_V = np.isin(np.arange(policy.config.vocab), policy.absent_ids) if policy.absent_ids else None
    return Head(matrix_VxD=matrix_VxD, absent_V=absent_V, precision=policy.head_precision)


def apply_with_routing(
    policy: Transformer, params: Params, *inputs: Any, **options: Any
) -> tuple[tuple[jax.Array, KeyValues], Routing | None]:
    """Run the policy; return its outputs, and the experts of the tokens, [L, N, G, Q, …], None if it has none."""
    result: Any = policy.apply(
        {"params": params}, *inputs, **options, mutable=[ROUTING] if policy.config.experts else False
    )
    if not policy.config.experts:
        return result, None
    outputs, variables = result
    return outputs, variables[ROUTING]["layers"]["routing"]


def prefill(
    policy: Transformer, params: Params, prompts_PxS: jax.Array, lengths_P: jax.Array
) -> tuple[jax.Array, Context, jax.Array]:
    """Run the prompts through the policy.

    Args:
      policy: the decoder.
      params: its parameters.
      prompts_PxS: int32 token ids, padded on the right.
      lengths_P: int32 prompt lengths without padding, at least 1.

    Returns: hidden_PxSxD of every token, the prompts as a context for their branches (keys and values with a leading L axis),
      and hidden_PxD of the last token of each prompt.
    """
    size = prompts_PxS.shape[1]
    positions_PxS = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), prompts_PxS.shape)
    outputs = policy.apply({"params": params}, prompts_PxS[:, None], positions_PxS[:, None])
    hidden, kv = cast(tuple[jax.Array, KeyValues], outputs)
    last_PxD = jnp.take_along_axis(hidden[:, 0], (lengths_P - 1)[:, None, None], axis=1)[:, 0]
    return hidden[:, 0], Context(kv=kv, end_NxGxQ=lengths_P[:, None, None]), last_PxD


def branch_hidden(
    policy: Transformer, params: Params, prompts_PxS: jax.Array, lengths_P: jax.Array, responses_PxGxT: jax.Array
) -> jax.Array:
    """Return the hidden states that predict each response token, hidden_PxGxTxD.

    Each prompt is run once for its G responses, forward and backward (S + G·T tokens).

    Args:
      policy: the decoder.
      params: its parameters.
      prompts_PxS: int32 token ids, padded on the right.
      lengths_P: int32 prompt lengths without padding, at least 1.
      responses_PxGxT: int32 token ids, padded on the right.
    """
    _, prompt, last_PxD = prefill(policy, params, prompts_PxS, lengths_P)
    steps_T = jnp.arange(responses_PxGxT.shape[-1], dtype=jnp.int32)
    positions = jnp.broadcast_to(lengths_P[:, None, None] + steps_T, responses_PxGxT.shape)
    hidden, _ = policy.apply({"params": params}, responses_PxGxT[..., :-1], positions[..., :-1], (prompt,))
    # The first response token is predicted by the last prompt token.
    first = jnp.broadcast_to(last_PxD[:, None, None], (*responses_PxGxT.shape[:2], 1, last_PxD.shape[-1]))
    return jnp.concatenate([first, hidden], axis=2)
