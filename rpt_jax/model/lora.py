"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685): y = x W + (alpha / rank) · (x A) B, with W frozen and A and B trained.

The sampler and the trainer apply the adapters in the same way, without merging them into W: a merged matrix would be a second
copy of the policy, and in bfloat16 its rounding would be larger than what the adapters have learned at first.

The adapters of matrix `q` of a layer are its parameters `q_lora_a`, with the input axes of `q` and the rank, and `q_lora_b`, with
the rank and the output axes. B is zero at first, so that the policy starts as it was.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rpt_jax.config import Experiment
from rpt_jax.config.schema import lora_targets
from rpt_jax.model.model_config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapters of a policy.

    Attributes:
      rank: size of the axis between A and B.
      alpha: the products of the adapters are scaled by alpha / rank.
      targets: parameters with adapters, such as "q" and "down".
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor of the adapters' products."""
        return self.alpha / self.rank

    def parameters(self, config: ModelConfig) -> int:
        """Return the number of parameters of the adapters."""
        sizes = matrix_sizes(config)
        return config.layers * self.rank * sum(sum(sizes[target]) for target in self.targets)


def lora_of(experiment: Experiment) -> Lora | None:
    """Return the adapters that an experiment trains; None if it trains all parameters, or none."""
    config = experiment.policy.lora
    if not config.rank or not experiment.trains:
        return None
    targets = tuple(name.removesuffix("_proj") for name in lora_targets(config.targets))
    return Lora(rank=config.rank, alpha=config.alpha, targets=targets)


def matrix_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of each matrix of a layer that can have adapters, with the head axes merged.

    Experts cannot.
    """
    queries = config.heads * config.head_size
    keys = config.kv_heads * config.head_size
    attention = {
        "q": (config.width, queries),
        "k": (config.width, keys),
        "v": (config.width, keys),
        "o": (queries, config.width),
    }
    if config.experts:
        return attention
    return attention | {
        "gate": (config.width, config.ffn),
        "up": (config.width, config.ffn),
        "down": (config.ffn, config.width),
    }


def is_adapter(name: str) -> bool:
    """Return whether a parameter of a layer is that of an adapter."""
    return name.endswith(("_lora_a", "_lora_b"))


def split_adapters(params: Any) -> tuple[Any, Any]:
    """Split a tree with the structure of a policy's parameters into what is frozen and what is trained.

    These are all but the adapters, and the adapters. In a policy without adapters nothing is frozen (None), and all is trained.
    """
    adapters = {name: x for name, x in params["layers"].items() if is_adapter(name)}
    if not adapters:
        return None, params
    frozen = {name: x for name, x in params["layers"].items() if not is_adapter(name)}
    return params | {"layers": frozen}, {"layers": adapters}


def join_adapters(frozen: Any, trained: Any) -> Any:
    """Return the tree that `split_adapters` split."""
    return trained if frozen is None else frozen | {"layers": frozen["layers"] | trained["layers"]}
