"""Configuration of the decoder and presets for published models."""

from __future__ import annotations

import dataclasses
from typing import Any

from rpt_jax.errors import UserError, check_choice
from rpt_jax.model.rope import Llama3, Scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder: everything that determines the policy except its parameters.

    Letters in shape suffixes: L layers, D width, H query heads, K key/value heads, C head size, F feed-forward size,
    V vocabulary, E experts, A experts of a token. Each key/value head serves R = H / K query heads.

    Attributes:
      layers: number of transformer layers (L).
      width: size of the residual stream (D).
      heads: number of query heads (H), a multiple of `kv_heads`.
      kv_heads: number of key/value heads (K).
      head_size: size of a query, key or value vector (C), even.
      ffn: hidden size of the SwiGLU feed-forward layer, or of each expert (F).
      vocab: rows of the embedding (V), which may exceed the number of tokens.
      rope_base: base of the rotary frequencies.
      rope_scaling: how the rotary frequencies are changed for longer contexts; None for no change.
      norm_epsilon: added to the mean square in every RMSNorm.
      qkv_bias: whether the query, key and value projections have a bias (Qwen2).
      qk_norm: whether queries and keys are normalized per head (Qwen3).
      tied: whether the output head is the embedding matrix.
      experts: number of experts of every feed-forward layer (E); 0 for a dense layer.
      experts_per_token: experts that each token runs through (A); 0 without experts.
      normalize_expert_weights: whether the weights of a token's experts are divided by their sum (Qwen3).
      context: longest sequence that the model was trained for, in tokens. It is stored with the weights, has no effect on
        the computation, and is ignored when two configs are compared.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    rope_base: float = 10_000.0
    rope_scaling: Scaling | None = None
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = True
    experts: int = 0
    experts_per_token: int = 0
    normalize_expert_weights: bool = False
    context: int = dataclasses.field(default=32_768, compare=False)

    def __post_init__(self) -> None:
        if self.qkv_bias and self.qk_norm:
            raise ValueError("qkv_bias and qk_norm cannot be combined: no model family of config.json has both.")
        if self.experts and not self.qk_norm:
            raise ValueError("experts need qk_norm: the only model family of config.json with experts has it.")
        if not min(self.experts, 1) <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must be between 1 and experts={self.experts}."
            )

    @property
    def parameters(self) -> int:
        """Number of parameters, including the embedding and the head."""
        bias = self.head_size * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        qk_norm = 2 * self.head_size if self.qk_norm else 0
        norms = 2 * self.width
        embedding_and_head = self.vocab * self.width * (1 if self.tied else 2)
        return self.layer_matrix_parameters + self.layers * (bias + qk_norm + norms) + self.width + embedding_and_head

    @property
    def layer_matrix_parameters(self) -> int:
        """Number of parameters of the layers' matrices, those of all experts included."""
        router = self.width * self.experts
        return self.layers * (self._attention_parameters + router + max(1, self.experts) * 3 * self.width * self.ffn)

    @property
    def matmul_parameters(self) -> int:
        """Number of parameters that a token is multiplied with: matrices of the layers and the head.

        Of the experts, those that a token runs through. Norms, biases and the embedding lookup do not count.
        """
        router = self.width * self.experts
        ffn = max(1, self.experts_per_token) * 3 * self.width * self.ffn
        return self.layers * (self._attention_parameters + router + ffn) + self.vocab * self.width

    @property
    def _attention_parameters(self) -> int:
        return self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)


def _qwen2(
    layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocab: int = 151_936, **options: Any
) -> ModelConfig:
    """Return a config of the Qwen2 family; `options` are further fields, which override its defaults."""
    fields = {
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": width // heads,
        "ffn": ffn,
        "vocab": vocab,
        "rope_base": 1e6,
        "qkv_bias": True,
        "context": 131_072,
    }
    return ModelConfig(**fields | options)


def _qwen3(layers: int, width: int, heads: int, ffn: int, **options: Any) -> ModelConfig:
    """Return a config of the Qwen3 family; `options` are further fields, which override its defaults."""
    fields = {
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": 8,
        "head_size": 128,
        "ffn": ffn,
        "vocab": 151_936,
        "rope_base": 1e6,
        "qk_norm": True,
        "context": 40_960,
    }
    return ModelConfig(**fields | options)


def _qwen3_moe(layers: int, width: int, heads: int, ffn: int) -> ModelConfig:
    experts = {"experts": 128, "experts_per_token": 8, "normalize_expert_weights": True}
    return _qwen3(layers, width, heads, ffn, tied=False, kv_heads=4, **experts)


def _llama3(
    layers: int, width: int, heads: int, head_size: int, ffn: int, factor: float = 8.0, tied: bool = False
) -> ModelConfig:
    return ModelConfig(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=8,
        head_size=head_size,
        ffn=ffn,
        vocab=128_256,
        rope_base=5e5,
        rope_scaling=Llama3(
            factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
        ),
        norm_epsilon=1e-5,
        tied=tied,
        context=131_072,
    )


def _smollm2(layers: int, width: int, heads: int, kv_heads: int, ffn: int, rope_base: float) -> ModelConfig:
    return ModelConfig(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=64,
        ffn=ffn,
        vocab=49_152,
        rope_base=rope_base,
        norm_epsilon=1e-5,
        context=8192,
    )


# Values of the published config.json files, in the order of the arguments of the functions above. Base and instruct models of
# one size have the same architecture.
PRESETS = {
    # Not published models: small enough to train on two CPU cores.
    "tiny": ModelConfig(layers=4, width=128, heads=4, kv_heads=2, head_size=32, ffn=384, vocab=1024),
    # As many parameters of a token as "tiny": two of eight experts.
    "tiny-moe": ModelConfig(
        layers=4,
        width=128,
        heads=4,
        kv_heads=2,
        head_size=32,
        ffn=192,
        vocab=1024,
        qk_norm=True,
        experts=8,
        experts_per_token=2,
        normalize_expert_weights=True,
    ),
    "smollm2-135m": _smollm2(30, 576, 9, 3, 1536, 1e5),
    "smollm2-360m": _smollm2(32, 960, 15, 5, 2560, 1e5),
    "smollm2-1.7b": _smollm2(24, 2048, 32, 32, 8192, 1.3e5),
    "qwen2.5-0.5b": _qwen2(24, 896, 14, 2, 4864, context=32_768),
    "qwen2.5-1.5b": _qwen2(28, 1536, 12, 2, 8960),
    "qwen2.5-3b": _qwen2(36, 2048, 16, 2, 11_008, context=32_768),
    "qwen2.5-7b": _qwen2(28, 3584, 28, 4, 18_944, 152_064, tied=False),
    "qwen2.5-14b": _qwen2(48, 5120, 40, 8, 13_824, 152_064, tied=False, norm_epsilon=1e-5),
    "qwen2.5-32b": _qwen2(64, 5120, 40, 8, 27_648, 152_064, tied=False, norm_epsilon=1e-5),
    # Distilled from Qwen2.5-Math, which has another rotary base; the head is not tied.
    "r1-distill-qwen-1.5b": _qwen2(28, 1536, 12, 2, 8960, tied=False, rope_base=1e4),
    "r1-distill-qwen-7b": _qwen2(28, 3584, 28, 4, 18_944, 152_064, tied=False, rope_base=1e4),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12_288, tied=False),
    "qwen3-14b": _qwen3(40, 5120, 40, 17_408, tied=False),
    "qwen3-32b": _qwen3(64, 5120, 64, 25_600, tied=False),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 32, 768),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 64, 1536),
    "llama3.2-1b": _llama3(16, 2048, 32, 64, 8192, factor=32.0, tied=True),
    "llama3.2-3b": _llama3(28, 3072, 24, 128, 8192, factor=32.0, tied=True),
    "llama3.1-8b": _llama3(32, 4096, 32, 128, 14_336),
    "llama3.1-70b": _llama3(80, 8192, 64, 128, 28_672),
}
# Models with exactly the architecture of another preset.
PRESETS |= {
    "r1-distill-qwen-14b": PRESETS["qwen2.5-14b"],
    "r1-distill-qwen-32b": PRESETS["qwen2.5-32b"],
    "r1-distill-llama-8b": PRESETS["llama3.1-8b"],
    "r1-distill-llama-70b": PRESETS["llama3.1-70b"],
    "llama3.3-70b": PRESETS["llama3.1-70b"],
}


def preset(name: str, field: str = "policy.preset") -> ModelConfig:
    """Return the preset called `name`, which the config field or option `field` gives.

    Raises: UserError with the nearest name if there is none.
    """
    return PRESETS[check_choice(field, name, PRESETS)]


def check_preset(path: str, name: str, config: ModelConfig) -> None:
    """Check that the policy in `path` has the architecture of preset `name`.

    Args:
      path: value of `policy.path`, for the message.
      name: value of `policy.preset`; "" accepts any architecture.
      config: architecture that was read from `path`.

    Raises: UserError that lists the fields that differ.
    """
    if not name or preset(name) == config:
        return
    expected = preset(name)
    differences = [
        f"{f.name} {getattr(config, f.name)} instead of {getattr(expected, f.name)}"
        for f in dataclasses.fields(ModelConfig)
        if f.compare and getattr(config, f.name) != getattr(expected, f.name)
    ]
    raise UserError(
        f"The policy in policy.path='{path}' does not match policy.preset='{name}': {', '.join(differences)}. "
        "Set policy.preset to the preset of this policy, or to '' to accept any architecture.",
        field="policy.preset",
    )
