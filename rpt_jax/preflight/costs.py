"""What a program computes, by formula, how often its loops go round, and the time that follows: all for full lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rpt_jax.config import Experiment
from rpt_jax.describe import attention_flops, describe
from rpt_jax.infra.sharding import prompt_ways
from rpt_jax.policy.packed import BLOCK, PANEL
from rpt_jax.policy.target import target_platform
from rpt_jax.preflight.hlo import Traffic
from rpt_jax.preflight.programs import Step
from rpt_jax.preflight.topology import Chip
from rpt_jax.rollout.engine import live_sizes
from rpt_jax.rollout.kv_cache import block_size

# Rows of `describe` that a program's FLOPs are in.
_FLOPS = {
    "sample": ("FLOPs of sampling",),
    "training reward": ("FLOPs of the reward",),
    "update": ("FLOPs of the update", "FLOPs of the documents"),
}


class Times(NamedTuple):
    """Seconds that a chip would take for each part, were it at its maker's figures: the longest is the bound."""

    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> str:
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """The longest part, as if the others ran beside it: less than a real run takes."""
        return max(self)


def times(chip: Chip, flops: float, moved: Traffic) -> Times:
    """What a program's figures imply on a chip."""
    far = chip.far_speed or chip.link_speed
    network = sum(size / (chip.link_speed if c.in_host else far) for c, size in moved.sent.items())
    return Times(flops / chip.flops, moved.memory / chip.memory_speed, network)


def flops_a_chip(experiment: Experiment, step: Step) -> dict[str, float]:
    """FLOPs of each program on each chip, what rematerialisation repeats included; none where there are hardly any."""
    setup, chips = step.setup, step.setup.mesh.size
    documents, size = experiment.evaluation.score_documents, experiment.data.max_document_tokens
    shape = setup.policy.shape
    scoring = documents * (2 * shape.matmul_parameters * size + attention_flops(shape, size**2))
    flops = {"score": scoring / chips}
    rows = [] if experiment.task == "score" else describe(experiment, chips)
    for name, begins in _FLOPS.items():
        flops[name] = sum(row.value for row in rows if row.what.startswith(begins)) / chips
    if experiment.policy.remat == "full":
        flops["update"] *= 4 / 3  # Forward, forward again and backward in place of forward and backward.
    return flops


def turns(experiment: Experiment, step: Step) -> Mapping[str, tuple[float, ...]]:
    """How often the loops go round whose end the data decide on, where every prompt and every response is as long as may be."""
    e, platform, prompt, response = (
        experiment,
        target_platform(),
        experiment.prompt.max_tokens,
        experiment.rollout.max_new_tokens,
    )
    row, panel, block = e.training.microbatch_tokens, PANEL[platform], BLOCK[platform]
    ways = prompt_ways(step.setup.mesh)
    prompts, samples = -(-e.training.prompts_per_step // ways), e.rollout.samples_per_prompt
    parts = -(-prompt // e.rollout.prefill_tokens)
    rows = min(prompts, max(1, e.rollout.prefill_tokens // -(-prompt // parts)))
    slots = live_sizes(-(-step.decoding.slots // ways), prompts * samples)[0] if step.decoding else 1
    in_a_row = max(1, (row - prompt) // response)
    passes = -(-e.training.prompts_per_step * -(-samples // in_a_row) // ways)
    # A panel of queries goes over as many blocks as the one of them that sees most: its prompt and half of a response.
    packed = (prompt + (response + min(panel, response)) / 2) / block
    own, shared = (-(-length // block_size(platform, length)) for length in (response, prompt))
    return {
        # All live until the last one ends; the smaller batches have no turn.
        "engine.decode_until": (-(-prompts * samples // slots) * (response - 1), 0),
        "kv_cache._over_own": ((own + 1) / 2,),
        "kv_cache._over_shared": (shared,),
        "prefill._run_roots": (-(-prompts // rows),),
        "prefill._run_roots.<locals>.run_rows": (parts,),
        "blockwise._over_keys": (max(1.0, prompt / block / 2),),
        "gradient.policy_gradient": (passes,),
        "gradient.response_logprobs": (passes,),
        "packed.attend_packed": (packed,),
        "layers._attention/shard_map": (packed,),
        "reward._read": (4 * response,),  # A byte a turn, of which text has about four a token.
    }
