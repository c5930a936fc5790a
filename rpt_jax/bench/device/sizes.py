"""What the parts measure: models, numbers of live rollouts and contexts, the most important ones first."""

from __future__ import annotations

from typing import NamedTuple


class Workload(NamedTuple):
    """Rollouts of a model, and the update on them.

    Attributes:
      model: preset of `policy.preset`.
      live: rollouts that are decoded at once, in groups of `SAMPLES`.
      context: tokens of a prompt and its response, half of them each.
    """

    model: str
    live: int
    context: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt."""
        return self.context // 2

    @property
    def response_tokens(self) -> int:
        """Tokens of a response."""
        return self.context - self.prompt_tokens

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return max(1, self.live // SAMPLES)


class Sizes(NamedTuple):
    """Sizes of all parts.

    Attributes:
      workloads: of rollouts and updates.
      row_tokens: tokens of the packed rows whose attention is measured.
      parity_tokens: tokens of the rows whose attention is compared with the reference, which holds all scores.
      copy_bytes: of the array that measures the memory bandwidth.
      matrix: rows of the matrices that measure the peak.
      step_prompts: prompts of a whole step.
      step_tokens: limits of prompts and of responses of a whole step.
    """

    workloads: tuple[Workload, ...]
    row_tokens: int
    parity_tokens: int
    copy_bytes: int
    matrix: int
    step_prompts: int
    step_tokens: int

    @property
    def models(self) -> tuple[str, ...]:
        """The models of the workloads, without repetitions."""
        return tuple(dict.fromkeys(workload.model for workload in self.workloads))


SAMPLES = 8  # Responses per prompt, as in the paper.

_SMALL = ("qwen2.5-0.5b", "qwen2.5-1.5b", "smollm2-135m")
SIZES = {
    "full": Sizes(
        workloads=tuple(
            Workload(model, live, context)
            for live, context in ((256, 256), (256, 1024), (1024, 256), (1024, 1024))
            for model in _SMALL
        ),
        row_tokens=16_384,
        parity_tokens=2048,
        copy_bytes=2**31,
        matrix=8192,
        step_prompts=32,
        step_tokens=256,
    ),
    # Runs through all of the code on a CPU; its figures mean nothing.
    "tiny": Sizes(
        workloads=(Workload("tiny", 8, 16),),
        row_tokens=192,
        parity_tokens=192,
        copy_bytes=2**20,
        matrix=128,
        step_prompts=1,
        step_tokens=32,
    ),
}
