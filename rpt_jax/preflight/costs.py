"""What a program computes, by formula, how often its loops go round, and the time that follows: all for full lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rpt_jax.config import Experiment
from rpt_jax.describe import attention_flops, describe
from rpt_jax.distributed.mesh import DECODING, num_batch_shards
from rpt_jax.model.attention.packed import BLOCK, PANEL
from rpt_jax.model.attention.platform import target_platform
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


def update_rows(experiment: Experiment) -> int:
    """Rows of `training.microbatch_tokens` that an update's groups take: whole groups or, where none fits, parts of one."""
    t, prompt, response = experiment.training, experiment.prompt.max_tokens, experiment.rollout.max_new_tokens
    samples, in_a_row = experiment.rollout.samples_per_prompt, (t.microbatch_tokens - prompt) // response
    if in_a_row >= samples:
        return -(-t.prompts_per_step // (t.microbatch_tokens // (prompt + samples * response)))
    return t.prompts_per_step * -(-samples // max(1, in_a_row))


def flops_a_chip(experiment: Experiment, step: Step) -> dict[str, float]:
    """FLOPs of each program on each chip, where it has more than a few.

    Beyond what `describe` counts, an update runs a prompt again in each row that has responses to it, and with
    rematerialization everything forward again.
    """
    setup, chips = step.setup, step.setup.mesh.size
    documents, size = experiment.data.score_batch_windows, experiment.data.max_document_tokens
    shape = setup.policy.config
    scoring = documents * (2 * shape.matmul_parameters * size + attention_flops(shape, size**2))
    flops = {"score": scoring / chips}
    rows = [] if experiment.task == "score" else describe(experiment, chips)
    for name, begins in _FLOPS.items():
        flops[name] = sum(row.value for row in rows if row.what.startswith(begins)) / chips
    if experiment.policy.remat == "full":
        flops["update"] *= 4 / 3  # Forward, forward again and backward in place of forward and backward.
    tree = experiment.prompt.max_tokens + experiment.rollout.samples_per_prompt * experiment.rollout.max_new_tokens
    trees = experiment.training.prompts_per_step * tree
    flops["update"] *= max(1.0, update_rows(experiment) * experiment.training.microbatch_tokens / trees)
    return flops


def turns(experiment: Experiment, step: Step) -> Mapping[str, tuple[float, ...]]:
    """How often the loops go round whose end the data decide on, where every prompt and every response is as long as may be."""
    e, platform = experiment, target_platform()
    prompt, response = e.prompt.max_tokens, e.rollout.max_new_tokens
    panel, block = PANEL[platform], BLOCK[platform]
    replicas = num_batch_shards(step.setup.mesh, DECODING)
    prompts, samples = -(-e.training.prompts_per_step // replicas), e.rollout.samples_per_prompt
    parts = -(-prompt // e.rollout.prefill_tokens)
    rows = min(prompts, max(1, e.rollout.prefill_tokens // -(-prompt // parts)))
    slots = live_sizes(-(-step.decoding.slots // replicas), prompts * samples)[0] if step.decoding else 1
    passes = -(-update_rows(e) // num_batch_shards(step.setup.mesh))
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
        "prefix_match._read": (4 * response,),  # A byte a turn, of which text has about four a token.
    }
