"""The reward of rollouts follows the config."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import Experiment, from_config_dict
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.model.model_config import preset
from rpt_jax.model.transformer import Transformer
from rpt_jax.prompts.builder import PromptBuilder, stack
from rpt_jax.prompts.positions import Position
from rpt_jax.prompts.response_format import BOX
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.rewards.rewarder import Rewarder
from rpt_jax.rollout.rollouts import Ended, Rollouts
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from tests.helpers.paths import TINY

TOKENIZER = load_tokenizer(TINY)


def experiment(reading: str) -> Experiment:
    return from_config_dict({"policy": {"path": str(TINY)}, "prompt": {"box_reading": reading, "max_tokens": 16}})


@pytest.mark.parametrize(("reading", "status"), [("balanced", Status.EMPTY), ("to_end", Status.CORRECT)])
def test_predictions_are_read_as_the_config_says(reading: str, status: Status) -> None:
    """The text goes on with `})`, which closes a box that is read up to its balancing brace."""
    config = experiment(reading)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    builder = PromptBuilder(config.prompt, TOKENIZER)
    context, continuation = TOKENIZER.encode("f({x"), TOKENIZER.encode("})")
    prompts = stack([builder.build(0, [*context, *continuation], Position(0, len(context), 1.0))])
    response = [
        TOKENIZER.end_think_id,
        *TOKENIZER.encode(BOX),
        *continuation,
        *TOKENIZER.encode("}"),
        TOKENIZER.eos_id,
    ]
    rollouts = Rollouts(
        tokens_PxGxT=jnp.array([[response]]),
        lengths_PxG=jnp.array([[len(response)]]),
        logprobs_PxGxT=jnp.zeros((1, 1, len(response))),
        ended_PxG=jnp.array([[Ended.STOP]]),
    )
    with use_mesh(mesh):
        rewarder = Rewarder(config, Transformer(config=preset("tiny")), TOKENIZER, mesh, builder)
        rewarded = rewarder.prefix_match(prompts, rollouts)
    assert np.asarray(rewarded.status_PxG).tolist() == [[status]]
    assert np.asarray(rewarded.reward_PxG).tolist() == [[status == Status.CORRECT]]
