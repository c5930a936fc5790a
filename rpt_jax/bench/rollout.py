"""Generated tokens per second of the rollout engine, and the time of its phases.

Every run samples --samples responses to each prompt: of --prompts, an .npz with `prompts` (int32 [P, S], padded on the
right) and `lengths` (int32 [P]), or random ones. Shared prefixes of prompts are found and prefilled once. Compilation
is not counted. Tokens are response tokens. The tail begins when the queue is empty and the live batch has shrunk for
the first time. The memory bound is the time to read, in each decode step, every weight once, the filled keys of every
live rollout, and those of the prompts once, at the fastest rate at which a large array was read.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.bench.measure import interleaved, round_to_4_digits
from rpt_jax.bench.options import not_negative, positive, positive_number
from rpt_jax.config import PolicyConfig
from rpt_jax.config.loading import packaged_configs
from rpt_jax.config.user_paths import expand_home, user_path
from rpt_jax.errors import UserError
from rpt_jax.model.precision import in_policy_precision
from rpt_jax.model.transformer import Transformer, in_compute_dtype
from rpt_jax.rollout.engine import decode_until, live_sizes, start_decoding
from rpt_jax.rollout.generate import sample_rollouts
from rpt_jax.rollout.memory import cache_bytes, device_memory, plan_slots, rollout_memory
from rpt_jax.rollout.prefix_sharing import Prompts, share_prefixes
from rpt_jax.rollout.rollouts import Decoding
from rpt_jax.setup import make_policy
from rpt_jax.weights.hf import load_policy

# Bytes of the array whose reads measure the memory bandwidth: larger than any cache.
_READ_BYTES = 2**28


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument(
        "--model",
        type=expand_home,
        default=str(packaged_configs() / "tiny"),
        help="Hugging Face directory or .gguf file; default: configs/tiny",
    )
    parser.add_argument(
        "--prompts", type=user_path, help=".npz file with `prompts` and `lengths`; default: random prompts"
    )
    parser.add_argument("--random-prompts", type=positive, default=32, help="number of random prompts")
    parser.add_argument("--prompt-tokens", type=positive, default=128, help="tokens of each random prompt")
    parser.add_argument(
        "--shared-tokens", type=not_negative, default=0, help="first tokens that all random prompts share"
    )
    parser.add_argument("--samples", type=positive, default=8, help="responses per prompt")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="length limit of responses")
    parser.add_argument(
        "--stop-ids", default="", help="token ids that end a response, as in 7,71; without any, all have full length"
    )
    parser.add_argument("--temperature", type=positive_number, default=0.8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--decode-slots", type=not_negative, default=0, help="rollouts that are live at once; 0: as many as fit"
    )
    parser.add_argument("--prefill-tokens", type=positive, default=4096, help="tokens that are prefilled at once")
    parser.add_argument(
        "--steps-per-check",
        type=not_negative,
        default=0,
        help="decode steps between two checks which rollouts have ended; 0: the platform's number",
    )
    parser.add_argument("--seed", type=not_negative, default=0)
    parser.add_argument("--repeats", type=positive, default=3)


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the row of the table.

    Raises:
      UserError: a file or a number is invalid.
    """
    # Load the policy and the prompts.
    config, params, _ = load_policy(options.model, field="--model")
    prompts_PxS, lengths_P = read_prompts(options.prompts) if options.prompts else random_prompts(options, config.vocab)
    if prompts_PxS.max() >= config.vocab:
        raise UserError(
            f"{options.prompts}: id {prompts_PxS.max()} is not in the vocabulary of {config.vocab} of {options.model}.",
            field="--prompts",
        )
    policy = make_policy(PolicyConfig(dtype=options.dtype), config)
    params = jax.jit(in_compute_dtype, static_argnums=0)(policy, params)
    prompts = share_prefixes(prompts_PxS, lengths_P, np.arange(len(lengths_P), dtype=np.int32))

    # Plan the decode slots.
    rollouts = len(lengths_P) * options.samples
    memory = rollout_memory(
        config,
        options.dtype,
        prompts=len(prompts_PxS),
        prompt_tokens=prompts_PxS.shape[1],
        samples=options.samples,
        max_new_tokens=options.max_new_tokens,
        tensor=1,
    )
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    slots = plan_slots(options.decode_slots, rollouts, memory, weight_bytes, device_memory())
    decoding = Decoding(
        samples=options.samples,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        stop_ids=_parse_stop_ids(options.stop_ids),
        slots=slots,
        prefill_tokens=options.prefill_tokens,
        steps_per_check=options.steps_per_check,
    )

    # Time whole runs, their beginnings, and reads of memory.
    key = jax.random.key(options.seed)
    sizes = live_sizes(slots, rollouts)
    tail_size = sizes[1] if len(sizes) > 1 else 0

    def until(policy: Transformer, params: Any, prompts: Prompts, key: jax.Array, running: int | None) -> Any:
        """Prefill and, unless `running` is None, decode until at most `running` rollouts are live."""
        inputs, state = start_decoding(policy, params, prompts, key, None, decoding)
        return state if running is None else decode_until(policy, decoding, inputs, state, running)

    until_jit = jax.jit(in_policy_precision(until), static_argnames=("policy", "running"))
    array = jnp.ones(_READ_BYTES // 4, jnp.float32)
    read = jax.jit(jnp.sum)
    calls: dict[str, Callable[[], Any]] = {
        "all": lambda: sample_rollouts(policy, params, prompts, key, decoding),
        "prefill": lambda: until_jit(policy, params, prompts, key, None),
        "until the tail": lambda: until_jit(policy, params, prompts, key, tail_size),
        "read": lambda: read(array),
    }
    result, work = calls["all"]()
    seconds = interleaved(calls, options.repeats)

    # Derive the figures.
    generated = int(result.lengths_PxG.sum())
    decoded = generated - int((result.lengths_PxG > 0).sum())
    steps = int(work.steps.sum())
    total_seconds = seconds["all"].median
    prefill_seconds = seconds["prefill"].median
    decode_seconds = total_seconds - prefill_seconds
    bytes_read = steps * weight_bytes + keys_read(result.lengths_PxG, prompts) * cache_bytes(config, options.dtype)
    bandwidth = _READ_BYTES / seconds["read"].fastest
    figures: dict[str, float] = {
        "tokens_per_second": generated / total_seconds,
        "fastest": generated / seconds["all"].fastest,
        "slowest": generated / seconds["all"].slowest,
        "generated_tokens": generated,
        "seconds": total_seconds,
        "prefill_seconds": prefill_seconds,
        "decode_seconds": decode_seconds,
        "tail_seconds": max(0.0, total_seconds - seconds["until the tail"].median),
        "decode_steps": steps,
        "slots": slots,
        "occupancy": decoded / max(int(work.slots.sum()), 1),
        "of_memory_bound": bytes_read / bandwidth / max(decode_seconds, 1e-9),
        "peak_memory_gib": _peak_memory() / 2**30,
    }
    values = figures.values()
    return list(figures), [[round_to_4_digits(value) if isinstance(value, float) else value for value in values]]


def random_prompts(options: argparse.Namespace, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts [P, S] of random ids, and their lengths [P], int32.

    Raises:
      UserError: more tokens are shared than there are.
    """
    count = options.random_prompts
    length = options.prompt_tokens
    if options.shared_tokens > length:
        raise UserError(
            f"--shared-tokens={options.shared_tokens} must be at most --prompt-tokens={length}.",
            field="--shared-tokens",
        )
    rng = np.random.default_rng(options.seed)
    prompts_PxS = rng.integers(0, vocab, (count, length), dtype=np.int32)
    prompts_PxS[:, : options.shared_tokens] = prompts_PxS[0, : options.shared_tokens]
    return prompts_PxS, np.full(count, length, np.int32)


def read_prompts(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts [P, S] and their lengths [P], int32.

    Raises:
      UserError: the file does not hold them.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            prompts_PxS = arrays["prompts"]
            lengths_P = arrays["lengths"]
    except (OSError, ValueError, KeyError) as error:
        # NumPy's ValueError recommends to load pickles.
        reason = "no arrays can be read" if isinstance(error, ValueError) else str(error)
        raise UserError(
            f"--prompts={path}: {reason}. Expected an .npz with `prompts` [P, S] and `lengths` [P].", field="--prompts"
        ) from None
    has_shapes = prompts_PxS.ndim == 2 and lengths_P.shape == prompts_PxS.shape[:1] and len(lengths_P) > 0
    are_integers = has_shapes and all(x.dtype.kind in "iu" for x in (prompts_PxS, lengths_P))
    if not are_integers or not 1 <= lengths_P.min() <= lengths_P.max() <= prompts_PxS.shape[1] or prompts_PxS.min() < 0:
        raise UserError(
            f"--prompts={path}: `prompts` {prompts_PxS.dtype}{list(prompts_PxS.shape)} and `lengths` "
            f"{lengths_P.dtype}{list(lengths_P.shape)} must be integers: ids [P, S] and lengths [P] from 1 to S.",
            field="--prompts",
        )
    return prompts_PxS.astype(np.int32), lengths_P.astype(np.int32)


def _parse_stop_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise UserError(
            f"--stop-ids={text} must be token ids separated by commas, as in 7,71.", field="--stop-ids"
        ) from None


def keys_read(lengths_PxG: Any, prompts: Prompts) -> int:
    """Return how many keys decoding reads: those of a prompt or a root once per step while one of its rollouts is live.

    Args:
      lengths_PxG: response lengths, an array of JAX or NumPy.
      prompts: the prompts.
    """
    lengths_PxG = np.asarray(lengths_PxG).astype(np.int64)
    own = (lengths_PxG * (lengths_PxG - 1) // 2).sum()
    steps_P = np.maximum(lengths_PxG.max(axis=1) - 1, 0)  # The first token is sampled from the prefill.
    members_NxW = prompts.members_NxW
    if members_NxW is None:
        return int(own + (prompts.lengths_P * steps_P).sum())
    steps_N = np.append(steps_P, 0)[members_NxW].max(axis=1)
    return int(own + (prompts.lengths_N * steps_N).sum() + (prompts.tail_lengths_P * steps_P).sum())


def _peak_memory() -> int:
    """Return the peak bytes of the accelerator or, on a CPU, of the process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
