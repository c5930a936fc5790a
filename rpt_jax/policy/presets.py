"""Shapes of the one decoder family, by name."""

from __future__ import annotations

import dataclasses

from rpt_jax.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Shape:
    """What fixes the parameters of a policy. Letters: L layers, D width, H heads, K kv heads, C head size, F, V."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = True

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


PRESETS = {
    # Ours: small enough to learn on two processor cores while one watches.
    "tiny": Shape(layers=4, width=128, heads=4, kv_heads=2, head_size=32, ffn=384, vocab=1024),
    # The paper's: DeepSeek-R1-Distill-Qwen-14B has the shape of Qwen2.5-14B; the vocabulary is padded to 152,064.
    "qwen2.5-14b": Shape(
        layers=48, width=5120, heads=40, kv_heads=8, head_size=128, ffn=13_824, vocab=152_064,
        rope_base=1_000_000.0, norm_epsilon=1e-5, qkv_bias=True, tied=False,
    ),
}  # fmt: skip


def preset(name: str) -> Shape:
    """Return the shape called `name`. Raises: UserError, where there is none, with the nearest name."""
    return PRESETS[check_choice("policy.preset", name, PRESETS)]


def check_preset(path: str, name: str, shape: Shape) -> None:
    """Refuse a policy in `path` whose `shape` is not the preset's, where one is named. Raises: UserError."""
    if not name or preset(name) == shape:
        return
    theirs, ours = dataclasses.asdict(shape), dataclasses.asdict(preset(name))
    differing = ", ".join(
        f"{field} {theirs[field]} instead of {ours[field]}" for field in ours if theirs[field] != ours[field]
    )
    raise UserError(
        f"policy.path='{path}' does not hold policy.preset='{name}': {differing}. Give its preset, or '' for any."
    )
