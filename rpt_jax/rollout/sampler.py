"""Sampling of batches of prompts, for training and for evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.distributed.mesh import DECODING
from rpt_jax.distributed.sharding import make_reshard_fn, shard_prompts
from rpt_jax.infra.out_of_memory import explain_out_of_memory
from rpt_jax.model.transformer import Params, Transformer, in_compute_dtype
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder
from rpt_jax.rollout.cost import SamplingCost, sampling_cost
from rpt_jax.rollout.generate import replica_count, sample_rollouts
from rpt_jax.rollout.prefix_sharing import Prompts, separate, share_prefixes
from rpt_jax.rollout.rollouts import DecodeWork, Decoding, Rollouts
from rpt_jax.tokenizers.tokenizer import Tokenizer

# The `step` of evaluations, so that all of them use the same noise.
EVALUATION_STEP = 2**31 - 1


class Sampler:
    """Samples responses to batches of prompts with one compiled program."""

    def __init__(
        self,
        experiment: Experiment,
        policy: Transformer,
        tokenizer: Tokenizer,
        mesh: Mesh,
        builder: PromptBuilder,
        *,
        answers: bool = False,
    ):
        """
        Args:
          experiment: the config.
          policy: the decoder.
          tokenizer: gives the stop tokens and, to end responses at their box, the bytes of tokens.
          mesh: the devices.
          builder: gives the length of the prompt template.
          answers: see `Decoding`.
        """
        self._max_tail_tokens = max_tail_tokens(experiment, builder)
        self._mesh = mesh
        self._policy = policy
        self._decoding = dataclasses.replace(make_decoding(experiment, tokenizer), answers=answers)
        self._memory_fields = {
            "rollout.decode_slots": self._decoding.slots,
            "rollout.prefill_tokens": self._decoding.prefill_tokens,
            "rollout.max_new_tokens": self._decoding.max_new_tokens,
        }
        self._key = jax.random.key(experiment.seed)
        self._box_vocab = jax.device_put(tokenizer.byte_vocab) if experiment.rollout.stop_at_box else None
        self._reshard = make_reshard_fn(policy, mesh, functools.partial(in_compute_dtype, policy))

    def weights(self, params: Params) -> Params:
        """Return parameters in the dtype and the sharding that decoding uses, the argument of `__call__`."""
        return jax.block_until_ready(self._reshard(params)) if self._reshard else params

    def __call__(self, weights: Params, prompts: PromptBatch, step: int) -> tuple[Rollouts, SamplingCost]:
        """Sample G responses to each prompt.

        Args:
          weights: from `weights`.
          prompts: the prompts, on the host.
          step: determines the sampling noise, with the run's seed and the prompt ids.

        Returns: the rollouts, sharded like the training batch, and what they cost.

        Raises: UserError, if a device runs out of memory.
        """
        with self.explain_out_of_memory():
            shared, rollouts, work = jax.block_until_ready(self.launch(weights, prompts, step))
        return rollouts, sampling_cost(self._policy.config, shared, rollouts, work)

    def explain_out_of_memory(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that turns JAX's error for a device out of memory into a UserError that names fields of sampling."""
        return explain_out_of_memory("sampling", self._memory_fields, mesh_fields=["mesh.rollout_tensor"])

    def launch(self, weights: Params, prompts: PromptBatch, step: int) -> tuple[Prompts, Rollouts, DecodeWork]:
        """Start to sample G responses to each prompt, without waiting for them; use it in `explain_out_of_memory`.

        Args:
          weights, prompts, step: as those of `__call__`.

        Returns: the prompts with their shared prefixes, the rollouts, and the work that decoding takes.
        """
        shared = shard_prompts(find_shared_prefixes(prompts, self._max_tail_tokens), self._mesh, DECODING)
        key = jax.random.fold_in(self._key, jax.device_put(np.uint32(step)))
        rollouts, work = sample_rollouts(self._policy, weights, shared, key, self._decoding, self._box_vocab)
        return shared, rollouts, work


def sampling_numbers(experiment: Experiment) -> list[float]:
    """Return the numbers that two evaluations must have in common to be comparable: samples, temperature and length limit."""
    rollout = experiment.rollout
    return [rollout.samples_per_prompt, rollout.temperature, rollout.max_new_tokens]


def max_tail_tokens(experiment: Experiment, builder: PromptBuilder) -> int:
    """Return the most tokens of a prompt after the prefix it shares with another, or 0 if prompts share no prefixes.

    Of two positions of a document, one's context is a prefix of the other's; only the end of the template, and the right context
    of a segment, follow it.
    """
    return max(1, builder.max_tail_tokens) if experiment.data.positions_per_window > 1 else 0


def find_shared_prefixes(prompts: PromptBatch, max_tail_tokens: int) -> Prompts:
    """Return the prompts with their shared prefixes, or each as its own root if `max_tail_tokens` is 0."""
    if max_tail_tokens == 0:
        return separate(prompts.tokens_PxS, prompts.lengths_P, prompts.ids_P)
    return share_prefixes(
        prompts.tokens_PxS, prompts.lengths_P, prompts.ids_P, tail=max_tail_tokens, parts=replica_count()
    )


def make_decoding(experiment: Experiment, tokenizer: Tokenizer) -> Decoding:
    """Return the sampling parameters of a config, whose decode slots are planned (0 for all rollouts).

    Args:
      experiment: the config.
      tokenizer: gives the stop tokens and the end-of-thinking token.
    """
    rollout = experiment.rollout
    return Decoding(
        samples=rollout.samples_per_prompt,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        stop_ids=tokenizer.stop_ids,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        end_think_id=tokenizer.end_think_id,
        slots=rollout.decode_slots,
        prefill_tokens=rollout.prefill_tokens,
    )
