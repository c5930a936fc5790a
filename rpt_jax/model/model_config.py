"""Shapes of the one decoder family, by name."""

from __future__ import annotations

import dataclasses

from rpt_jax.errors import UserError, check_choice
from rpt_jax.model.rope import Llama3, Scaling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What fixes a policy but for its parameters. Letters: L layers, D width, H heads, K kv heads, C head size, F, V."""

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
    # Positions that it is meant for. Goes along with the weights and changes nothing here, so it tells no shapes apart.
    context: int = dataclasses.field(default=32_768, compare=False)

    def __post_init__(self):
        if self.qkv_bias and self.qk_norm:
            raise ValueError("qkv_bias and qk_norm together are no family's: no config.json could say it.")

    @property
    def parameters(self) -> int:
        """Number of parameters, embedding and head included."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        bias = self.head_size * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        qk_norm = 2 * self.head_size if self.qk_norm else 0
        layer = attention + bias + qk_norm + 3 * self.width * self.ffn + 2 * self.width
        return self.layers * layer + self.width + self.vocab * self.width * (1 if self.tied else 2)

    @property
    def matmul_parameters(self) -> int:
        """Parameters that a token is multiplied with: all but the norms, the biases and an untied input embedding."""
        layer = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads) + 3 * self.width * self.ffn
        return self.layers * layer + self.vocab * self.width


def _qwen2(layers, width, heads, kv_heads, ffn, vocab=151_936, **others) -> ModelConfig:
    facts = {"rope_base": 1e6, "qkv_bias": True, "context": 131_072} | others
    return ModelConfig(layers, width, heads, kv_heads, width // heads, ffn, vocab, **facts)


def _qwen3(layers, width, heads, ffn, tied) -> ModelConfig:
    facts = {"rope_base": 1e6, "qk_norm": True, "context": 40_960}
    return ModelConfig(layers, width, heads, 8, 128, ffn, 151_936, tied=tied, **facts)


def _llama3(layers, width, heads, head_size, ffn, factor=8.0, tied=False) -> ModelConfig:
    facts = {"rope_base": 5e5, "rope_scaling": Llama3(factor, 1.0, 4.0, 8192), "norm_epsilon": 1e-5, "context": 131_072}
    return ModelConfig(layers, width, heads, 8, head_size, ffn, 128_256, tied=tied, **facts)


def _smollm2(layers, width, heads, kv_heads, ffn, rope_base) -> ModelConfig:
    return ModelConfig(layers, width, heads, kv_heads, 64, ffn, 49_152, rope_base, norm_epsilon=1e-5, context=8192)


# Each as its published config.json has it. Base and instruct models of a size differ in what they learned, not in shape.
PRESETS = {
    # Ours: small enough to learn on two processor cores while one watches.
    "tiny": ModelConfig(layers=4, width=128, heads=4, kv_heads=2, head_size=32, ffn=384, vocab=1024),
    "smollm2-135m": _smollm2(30, 576, 9, 3, 1536, 1e5),
    "smollm2-360m": _smollm2(32, 960, 15, 5, 2560, 1e5),
    "smollm2-1.7b": _smollm2(24, 2048, 32, 32, 8192, 1.3e5),
    "qwen2.5-0.5b": _qwen2(24, 896, 14, 2, 4864, context=32_768),
    "qwen2.5-1.5b": _qwen2(28, 1536, 12, 2, 8960),
    "qwen2.5-3b": _qwen2(36, 2048, 16, 2, 11_008, context=32_768),
    "qwen2.5-7b": _qwen2(28, 3584, 28, 4, 18_944, 152_064, tied=False),
    "qwen2.5-14b": _qwen2(48, 5120, 40, 8, 13_824, 152_064, tied=False, norm_epsilon=1e-5),
    "qwen2.5-32b": _qwen2(64, 5120, 40, 8, 27_648, 152_064, tied=False, norm_epsilon=1e-5),
    # The two small ones come from Qwen2.5-Math, with another base of the angles, and have a head of their own.
    "r1-distill-qwen-1.5b": _qwen2(28, 1536, 12, 2, 8960, tied=False, rope_base=1e4),
    "r1-distill-qwen-7b": _qwen2(28, 3584, 28, 4, 18_944, 152_064, tied=False, rope_base=1e4),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12_288, tied=False),
    "qwen3-14b": _qwen3(40, 5120, 40, 17_408, tied=False),
    "qwen3-32b": _qwen3(64, 5120, 64, 25_600, tied=False),
    "llama3.2-1b": _llama3(16, 2048, 32, 64, 8192, factor=32.0, tied=True),
    "llama3.2-3b": _llama3(28, 3072, 24, 128, 8192, factor=32.0, tied=True),
    "llama3.1-8b": _llama3(32, 4096, 32, 128, 14_336),
    "llama3.1-70b": _llama3(80, 8192, 64, 128, 28_672),
}
# The distilled models with the very shape of another.
PRESETS |= {
    "r1-distill-qwen-14b": PRESETS["qwen2.5-14b"],
    "r1-distill-qwen-32b": PRESETS["qwen2.5-32b"],
    "r1-distill-llama-8b": PRESETS["llama3.1-8b"],
    "r1-distill-llama-70b": PRESETS["llama3.1-70b"],
    "llama3.3-70b": PRESETS["llama3.1-70b"],
}


def preset(name: str) -> ModelConfig:
    """Return the shape called `name`. Raises: UserError, where there is none, with the nearest name."""
    return PRESETS[check_choice("policy.preset", name, PRESETS)]


def check_preset(path: str, name: str, shape: ModelConfig) -> None:
    """Refuse a policy in `path` whose `shape` is not the preset's, where one is named. Raises: UserError."""
    if not name or preset(name) == shape:
        return
    compared = [
        (f.name, getattr(shape, f.name), getattr(preset(name), f.name))
        for f in dataclasses.fields(ModelConfig)
        if f.compare
    ]
    differing = ", ".join(f"{field} {theirs} instead of {ours}" for field, theirs, ours in compared if theirs != ours)
    raise UserError(
        f"policy.path='{path}' does not hold policy.preset='{name}': {differing}. Give its preset, or '' for any."
    )
