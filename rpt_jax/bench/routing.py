"""How often the sampler and the update route a token to different experts.

The policy samples --samples responses of --max-new-tokens tokens to each of --random-prompts random prompts; then the update's
forward pass runs over the same tokens, packed into rows. A router is that of one token in one layer. A difference of rounding
before it, between decoding and packed rows, can exchange experts whose probabilities are nearly equal.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.bench.options import add_compute_options, at_least, not_negative, policy_config, positive
from rpt_jax.bench.rollout import random_prompts
from rpt_jax.config.user_paths import expand_home
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.distributed.sharding import init_parameters
from rpt_jax.errors import UserError
from rpt_jax.model.model_config import preset
from rpt_jax.model.precision import in_policy_precision
from rpt_jax.model.transformer import Params, Transformer, in_compute_dtype
from rpt_jax.objective.gradient import run_rows
from rpt_jax.objective.packing import pack_groups
from rpt_jax.rollout.engine import decode, start_decoding
from rpt_jax.rollout.prefix_sharing import Prompts, separate
from rpt_jax.rollout.rollouts import Decoding
from rpt_jax.setup import make_policy
from rpt_jax.weights.hf import load_policy


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument(
        "--model", type=expand_home, default="", help="Hugging Face directory; default: random weights of --preset"
    )
    parser.add_argument("--preset", default="tiny-moe", help="preset of policy.preset; default: tiny-moe")
    parser.add_argument("--random-prompts", type=positive, default=8, help="number of prompts")
    parser.add_argument("--prompt-tokens", type=positive, default=64, help="tokens of each prompt")
    parser.add_argument("--shared-tokens", type=not_negative, default=0, help="first tokens that all prompts share")
    parser.add_argument("--samples", type=positive, default=4, help="responses per prompt")
    parser.add_argument("--max-new-tokens", type=at_least(2), default=64, help="tokens of each response")
    parser.add_argument("--seed", type=not_negative, default=0)
    add_compute_options(parser, remat="none")


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the row of the table.

    Raises:
      UserError: a number is invalid, or the policy has no experts.
    """
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    if options.model:
        config, params, _ = load_policy(options.model, field="--model")
    else:
        config, params = preset(options.preset, field="--preset"), None
    if not config.experts:
        raise UserError(
            "the policy has no experts, so nothing is routed.", field="--model" if options.model else "--preset"
        )
    policy = make_policy(policy_config(options), config)
    if params is None:
        params = init_parameters(policy, mesh, options.seed)
    prompts_PxS, lengths_P = random_prompts(options, config.vocab)
    prompts = separate(prompts_PxS, lengths_P, np.arange(len(lengths_P), dtype=np.int32))
    decoding = Decoding(
        samples=options.samples,
        max_new_tokens=options.max_new_tokens,
        temperature=1.0,
        stop_ids=(),
        steps_per_check=max(1, options.max_new_tokens - 1),  # A single check, after the last token.
    )

    with use_mesh(mesh):
        weights = jax.jit(in_compute_dtype, static_argnums=0)(policy, params)
        sample = jax.jit(in_policy_precision(sampler_experts), static_argnums=(0, 4))
        tokens_RxT, sampled = sample(policy, weights, prompts, jax.random.key(options.seed), decoding)
        again = jax.jit(in_policy_precision(update_experts), static_argnums=0)
        trained = again(policy, params, prompts_PxS, lengths_P, tokens_RxT.reshape(len(lengths_P), options.samples, -1))

    # The order of a token's experts does not matter.
    is_same_RxTxL = (jnp.sort(sampled) == jnp.sort(trained)).all(axis=-1)
    figures = {
        "tokens": is_same_RxTxL[..., 0].size,
        "layers": config.layers,
        "different_routers": float(1 - is_same_RxTxL.mean()),
        "tokens_with_a_different_router": float(1 - is_same_RxTxL.all(axis=-1).mean()),
    }
    return list(figures), [list(figures.values())]


def sampler_experts(
    policy: Transformer, params: Params, prompts: Prompts, key: jax.Array, decoding: Decoding
) -> tuple[jax.Array, jax.Array]:
    """Sample R = P·G responses of full length.

    Returns: their tokens, int32 [R, T], and the experts of all but the last, int32 [R, T - 1, L, A].
    """
    inputs, state = start_decoding(policy, params, prompts, key, None, decoding)
    order_R = jnp.argsort(state.rollout_M)  # There is a slot for each rollout.
    state, sampled = decode(policy, decoding, inputs, state)
    assert sampled.routing is not None
    experts_KxLxRxA = sampled.routing.experts
    return state.rollouts.tokens_PxGxT, jnp.moveaxis(experts_KxLxRxA, 2, 0)[order_R]


def update_experts(
    policy: Transformer, params: Params, prompts_PxS: jax.Array, lengths_P: jax.Array, tokens_PxGxT: jax.Array
) -> jax.Array:
    """Return the experts of all response tokens but the last in the update's forward pass, int32 [R, T - 1, L, A].

    Responses of full length are packed into rows, two in each.
    """
    config = policy.config
    count, samples, size = tokens_PxGxT.shape
    responses = count * samples
    groups = pack_groups(
        prompts_PxS=prompts_PxS,
        lengths_P=lengths_P,
        tokens_PxGxT=tokens_PxGxT,
        response_lengths_PxG=jnp.full((count, samples), size, jnp.int32),
        window_P=jnp.arange(count, dtype=jnp.int32),
        used_P=jnp.ones(count, bool),
        rows=1,
        microbatch_tokens=prompts_PxS.shape[1] + 2 * size,
    )
    per_token = config.layers * config.experts_per_token

    def fill(index: jax.Array, experts_RxTxX: jax.Array) -> jax.Array:
        rows = groups.rows(index)
        _, routing = run_rows(policy, params, rows)
        assert routing is not None
        experts_NxWxX = jnp.moveaxis(routing.experts, 0, 2).reshape(*rows.tokens_NxW.shape, per_token)
        experts_NxJxTxX = jax.vmap(lambda x_NxW: rows.split(x_NxW, size), in_axes=-1, out_axes=-1)(experts_NxWxX)
        responses_NxJ = jnp.where(rows.lengths_NxJ > 0, rows.responses_NxJ, responses)
        return experts_RxTxX.at[responses_NxJ].set(experts_NxJxTxX, mode="drop")

    zeros = jnp.zeros((responses, size, per_token), jnp.int32)
    experts_RxTxX = jax.lax.fori_loop(0, groups.passes, fill, zeros)
    # The first token of a response in a row is the last one of its prompt.
    return experts_RxTxX[:, 1:].reshape(responses, size - 1, config.layers, config.experts_per_token)
