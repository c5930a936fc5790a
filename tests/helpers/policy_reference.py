"""Independent reference implementation of the policy in NumPy and float64.

It runs one sequence at a time, without padding, branches, cache or scan.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.transformer import Params, Transformer

# Two layers, so that keys of the wrong layer are noticed; two kv heads with two query heads each.
SHAPE = ModelConfig(layers=2, width=16, heads=4, kv_heads=2, head_size=8, ffn=24, vocab=48)
POLICY = Transformer(SHAPE)
# Five experts are an odd number; three of them leave enough that most tokens choose different ones.
MOE_SHAPE = dataclasses.replace(
    SHAPE, ffn=7, qk_norm=True, experts=5, experts_per_token=3, normalize_expert_weights=True, tied=False
)
# For gradients, which take seconds per layer to compile.
SHALLOW = Transformer(dataclasses.replace(SHAPE, layers=1))


def random_params(policy: Transformer, seed: int) -> Params:
    """Return random float32 parameters, also for norms and biases: ones and zeros would hide parameters that are not used."""
    tokens = np.zeros((1, 1, 1), np.int32)
    init = jax.eval_shape(lambda: nn.meta.unbox(policy.init(jax.random.key(0), tokens, tokens)["params"]))
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = 0.25 * rng.standard_normal(leaf.shape)
        return jax.numpy.asarray(1 + noise if path[-1].key.endswith("norm") else noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, init)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def rotate(x_SxC: np.ndarray, base: float) -> np.ndarray:
    """Rotate the pair (x_j, x_{j + C/2}) at position s by the angle s · base^(-2j/C), as a complex number."""
    size = x_SxC.shape[-1]
    angle = np.arange(x_SxC.shape[-2])[:, None] * base ** (-2 * np.arange(size // 2) / size)
    turned = (x_SxC[..., : size // 2] + 1j * x_SxC[..., size // 2 :]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def causal_attention(q_SxC: np.ndarray, k_SxC: np.ndarray, v_SxC: np.ndarray) -> np.ndarray:
    scores = q_SxC @ k_SxC.T / np.sqrt(q_SxC.shape[-1])
    return softmax(np.where(np.tri(len(scores), dtype=bool), scores, -np.inf)) @ v_SxC


def swiglu(x_SxD: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gate_SxF = x_SxD @ gate
    return (gate_SxF / (1 + np.exp(-gate_SxF)) * (x_SxD @ up)) @ down


def mixture(x_SxD: np.ndarray, p: dict[str, np.ndarray], config: ModelConfig) -> np.ndarray:
    """Run every expert on every token, and weight their outputs; experts that a token did not choose have a weight of 0."""
    probabilities_SxE = softmax(x_SxD @ p["router"])
    threshold_Sx1 = np.sort(probabilities_SxE)[:, [-config.experts_per_token]]
    weights_SxE = np.where(probabilities_SxE >= threshold_Sx1, probabilities_SxE, 0)
    if config.normalize_expert_weights:
        weights_SxE = weights_SxE / weights_SxE.sum(-1, keepdims=True)
    outputs = [swiglu(x_SxD, p["gate"][e], p["up"][e], p["down"][e]) for e in range(config.experts)]
    return sum(weights_SxE[:, [e]] * outputs[e] for e in range(config.experts))


def hidden(params: Params, config: ModelConfig, tokens: list[int]) -> np.ndarray:
    """Return the final hidden states [S, D] of one sequence."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x_SxD = params["embedding"][np.asarray(tokens)]
    for i in range(config.layers):
        p = {name: leaf[i] for name, leaf in params["layers"].items()}
        y_SxD, out_SxD = rms_norm(x_SxD, p["attention_norm"], config.norm_epsilon), np.zeros_like(x_SxD)
        for k in range(config.kv_heads):
            key, value = y_SxD @ p["k"][:, k], y_SxD @ p["v"][:, k]
            if config.qkv_bias:
                key, value = key + p["k_bias"][0, k, 0, 0], value + p["v_bias"][0, k, 0, 0]
            if config.qk_norm:
                key = rms_norm(key, p["k_norm"], config.norm_epsilon)
            for r in range(config.heads // config.kv_heads):
                query = y_SxD @ p["q"][:, k, r]
                if config.qkv_bias:
                    query = query + p["q_bias"][0, k, 0, r, 0]
                if config.qk_norm:
                    query = rms_norm(query, p["q_norm"], config.norm_epsilon)
                turned = rotate(query, config.rope_base), rotate(key, config.rope_base)
                out_SxD = out_SxD + causal_attention(*turned, value) @ p["o"][k, r]
        x_SxD = x_SxD + out_SxD
        y_SxD = rms_norm(x_SxD, p["ffn_norm"], config.norm_epsilon)
        if config.experts:
            x_SxD = x_SxD + mixture(y_SxD, p, config)
        else:
            x_SxD = x_SxD + swiglu(y_SxD, p["gate"], p["up"], p["down"])
    return rms_norm(x_SxD, params["norm"], config.norm_epsilon)


def logits(params: Params, config: ModelConfig, tokens: list[int]) -> np.ndarray:
    """Return the logits [S, V] of one sequence."""
    return hidden(params, config, tokens) @ np.asarray(params["embedding" if config.tied else "head"], np.float64).T
