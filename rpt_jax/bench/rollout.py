"""Generated tokens a second of the rollout engine, and where its time goes.

Every run samples --samples responses to each prompt of --prompts, an .npz with `prompts` (int32 [P, S], padded on the right) and
`lengths` (int32 [P]); prompts that begin alike are found and prefilled once. Compiling is not counted. Tokens are those of the
responses. The tail is what is left once the queue is empty and the live batch has shrunk for the first time. The memory bound is
the time to read, in each step, every weight once, the filled keys of every live rollout, and those of the prompts once; it is
held against the fastest of as many reads of a large array.
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

from rpt_jax.bench.measure import interleaved
from rpt_jax.config import PolicyConfig
from rpt_jax.errors import UserError
from rpt_jax.model.transformer import in_compute_dtype
from rpt_jax.rollout.engine import decode_until, live_sizes, start_decoding
from rpt_jax.rollout.generate import sample_rollouts
from rpt_jax.rollout.memory import cache_bytes, device_memory, plan_slots, rollout_memory
from rpt_jax.rollout.prefix_sharing import Prompts, share_prefixes
from rpt_jax.rollout.rollouts import Decoding, Rollouts
from rpt_jax.setup import make_policy
from rpt_jax.weights.hf import load_policy

_READ = 2**28  # Bytes of the array that is read; more than any cache holds.


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a Hugging Face directory or a .gguf file")
    parser.add_argument("--prompts", type=Path, required=True, help="an .npz with `prompts` and `lengths`")
    parser.add_argument("--samples", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument(
        "--stop_ids", default="", help="ids that end a response, as in 7,71; none: all are of full length"
    )
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--slots", type=int, default=0, help="rollouts that are live at once; 0: as many as fit")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens that are prefilled at one time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table. Raises: UserError, where the files or the numbers are at fault."""
    prompts_PxS, lengths_P = read_prompts(options.prompts)
    shape, params, _ = load_policy(options.model)
    if prompts_PxS.max() >= shape.vocab:
        raise UserError(
            f"{options.prompts}: id {prompts_PxS.max()} is not in the vocabulary of {shape.vocab} of {options.model}."
        )
    policy = make_policy(PolicyConfig(dtype=options.dtype), shape)
    params = jax.jit(in_compute_dtype, static_argnums=0)(policy, params)
    prompts = share_prefixes(prompts_PxS, lengths_P, np.arange(len(lengths_P), dtype=np.int32))
    rollouts, tokens = len(lengths_P) * options.samples, options.max_new_tokens
    memory = rollout_memory(
        shape,
        options.dtype,
        prompts=len(prompts_PxS),
        prompt_tokens=prompts_PxS.shape[1],
        samples=options.samples,
        max_new_tokens=tokens,
        tensor=1,
    )
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    slots = plan_slots(options.slots, rollouts, memory, weights, device_memory())
    decoding = Decoding(
        samples=options.samples,
        max_new_tokens=tokens,
        temperature=options.temperature,
        stop_ids=_stop_ids(options.stop_ids),
        slots=slots,
        prefill_tokens=options.chunk,
    )
    sizes, key = live_sizes(slots, rollouts), jax.random.key(options.seed)

    def head_start(params: Any, prompts: Prompts, key: jax.Array, running: int | None) -> Any:
        batch, live = start_decoding(policy, params, prompts, key, None, decoding)
        return live if running is None else decode_until(policy, decoding, batch, live, running)

    part = jax.jit(head_start, static_argnames="running")
    big = jnp.ones(_READ // 4, jnp.float32)
    calls: dict[str, Callable[[], Any]] = {
        "all": lambda: sample_rollouts(policy, params, prompts, key, decoding),
        "prefill": lambda: part(params, prompts, key, None),
        "until the tail": lambda: part(params, prompts, key, [*sizes[1:], 0][0]),
        "read": (lambda read: lambda: read(big))(jax.jit(jnp.sum)),
    }
    result, work = calls["all"]()
    seconds = interleaved(calls, options.repeats)
    generated = int(result.lengths_PxG.sum())
    decoded = generated - int((result.lengths_PxG > 0).sum())
    whole, prefill = seconds["all"].median, seconds["prefill"].median
    moved = int(work.steps.sum()) * weights + _keys_read(result, prompts) * cache_bytes(shape, options.dtype)
    figures = {
        "tokens_per_second": generated / whole,
        "fastest": generated / seconds["all"].low,
        "slowest": generated / seconds["all"].high,
        "generated_tokens": generated,
        "seconds": whole,
        "prefill_seconds": prefill,
        "decode_seconds": whole - prefill,
        "tail_seconds": max(0.0, whole - seconds["until the tail"].median),
        "decode_steps": int(work.steps.sum()),
        "slots": slots,
        "occupancy": decoded / max(int(work.slots.sum()), 1),
        "of_memory_bound": moved / (_READ / seconds["read"].low) / max(whole - prefill, 1e-9),
        "peak_memory_gib": _peak_memory() / 2**30,
    }
    return list(figures), [[float(f"{value:.4g}") if isinstance(value, float) else value for value in figures.values()]]


def read_prompts(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts [P, S] and their lengths [P], int32. Raises: UserError, where the file does not hold them."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            prompts_PxS, lengths_P = arrays["prompts"], arrays["lengths"]
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--prompts={path}: {reason}. An .npz with `prompts` [P, S] and `lengths` [P] is expected."
        ) from None
    fits = prompts_PxS.ndim == 2 and lengths_P.shape == prompts_PxS.shape[:1] and len(lengths_P) > 0
    whole = fits and all(x.dtype.kind in "iu" for x in (prompts_PxS, lengths_P))
    if not whole or not 1 <= lengths_P.min() <= lengths_P.max() <= prompts_PxS.shape[1] or prompts_PxS.min() < 0:
        raise UserError(
            f"--prompts={path}: `prompts` {prompts_PxS.dtype}{list(prompts_PxS.shape)} and `lengths` "
            f"{lengths_P.dtype}{list(lengths_P.shape)} must be whole numbers, [P, S] ids and [P] lengths from 1 to S."
        )
    return prompts_PxS.astype(np.int32), lengths_P.astype(np.int32)


def _stop_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise UserError(f"--stop_ids={text} must be ids with commas between them, as in 7,71.") from None


def _keys_read(rollouts: Rollouts, prompts: Prompts) -> int:
    """Keys that decoding has to read, each prompt's or root's once a step as long as one of its rollouts is live."""
    lengths_PxG = np.asarray(rollouts.lengths_PxG).astype(np.int64)
    own = (lengths_PxG * (lengths_PxG - 1) // 2).sum()
    steps_P, members_NxW = lengths_PxG.max(axis=1), prompts.members_NxW
    if members_NxW is None:
        return int(own + (prompts.lengths_P * steps_P).sum())
    steps_N = np.append(steps_P, 0)[members_NxW].max(axis=1)
    return int(own + (prompts.lengths_N * steps_N).sum() + (prompts.tail_lengths_P * steps_P).sum())


def _peak_memory() -> int:
    """Bytes: an accelerator's own, or the process's."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
