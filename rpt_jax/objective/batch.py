"""What an update learns from, and how: a batch of groups, documents beside them, and the objective's part of the config."""

from __future__ import annotations

from typing import NamedTuple

import jax

from rpt_jax.objective.loss import ClipRange


class NextTokenBatch(NamedTuple):
    """Text for next-token cross-entropy: `targets` follow `inputs`, both int32 [N, S]; `mask_NxS` is bool."""

    inputs_NxS: jax.Array
    targets_NxS: jax.Array
    mask_NxS: jax.Array


class UpdateBatch(NamedTuple):
    """P groups of G responses.

    Attributes:
      prompts_PxS, lengths_P: int32 prompts, padded on the right.
      window_P: int32, the document that each prompt is from: those of one document may begin alike.
      tokens_PxGxT: int32 responses.
      mask_PxGxT: bool, True for response tokens up to and including the stop token.
      sampler_logprobs_PxGxT: float32, what the sampler believed; for the mismatch alone.
      advantages_PxG: float32.
      counted_P: bool, groups that belong to the batch; all but those that dynamic sampling could not replace.
      documents: those that the P prompts are from, where their cross-entropy is learned beside the responses.
    """

    prompts_PxS: jax.Array
    lengths_P: jax.Array
    window_P: jax.Array
    tokens_PxGxT: jax.Array
    mask_PxGxT: jax.Array
    sampler_logprobs_PxGxT: jax.Array
    advantages_PxG: jax.Array
    counted_P: jax.Array
    documents: NextTokenBatch | None = None


class UpdateConfig(NamedTuple):
    """`rows` (at least one a device), `row_tokens` and `chunk` (tokens of logits) bound memory and do not change the result.

    The others are the objective: names in objective/loss.py, and numbers that belong to them (see `config.ObjectiveConfig`).
    """

    minibatches: int
    rows: int
    row_tokens: int
    chunk: int
    temperature: float
    bounds: ClipRange
    loss: str = "clip"
    aggregation: str = "token_mean"
    response_limit: int = 1
    importance: str = "none"
    importance_low: float = 0.5
    importance_high: float = 2.0
    kl: str = "none"
    kl_weight: float = 0.0
    entropy_weight: float = 0.0
    document_weight: float = 0.0
    average_decay: float = 0.0

    @property
    def every_group_matters(self) -> bool:
        """Whether groups without variance have a gradient, or must be looked at to know which of their tokens count."""
        return self.kl != "none" or self.entropy_weight > 0 or self.importance == "mask"

    @property
    def sums(self) -> tuple[str, ...]:
        """What is added up over microbatches to be reported."""
        optional = {"kl": self.kl != "none", "entropy": self.entropy_weight > 0, "weight": self.importance != "none"}
        return ("loss", "ratio", "clipped", "mismatch", "worst", *(name for name, on in optional.items() if on))
