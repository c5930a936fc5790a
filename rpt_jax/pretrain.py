"""Next-token pre-training of a base policy: documents, mixed with cold-start traces of next-token reasoning."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rpt_jax.config import Experiment
from rpt_jax.data.cold_start import TraceWriter
from rpt_jax.data.corpus import Document
from rpt_jax.data.tokenizer import Tokenizer
from rpt_jax.objective.logprobs import token_logprobs
from rpt_jax.policy.transformer import Params, Transformer, head, prefill


class TrainState(NamedTuple):
    params: Params
    optimizer: optax.OptState


class ExampleMaker:
    """Turns a document into arrays: its tokens, and K traces that branch off from random positions of it."""

    def __init__(self, experiment: Experiment, tokenizer: Tokenizer, documents: Sequence[Document]):
        self._config, self._size = experiment.pretrain, experiment.data.max_document_tokens
        self._min_context = experiment.data.min_context
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode_batch([d.text for d in documents])
        share, limit = self._config.calculation_share, self._config.trace_tokens
        self._writers = [
            TraceWriter(tokenizer, d.text, ids, share, limit) for d, ids in zip(documents, self._ids, strict=True)
        ]

    def make(self, document: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return tokens [S], target_mask [S], trace inputs and targets [K, T], trace_mask [K, T] and prefixes [K].

        Half of the traces stand where a calculation is due, if the document has such places: they are rare, and a format
        is learnt from examples.
        """
        t, k, size = self._tokenizer, self._config.traces_per_document, self._config.trace_tokens
        tokens = np.array([t.bos_id, *self._ids[document], t.eos_id], np.int32)[: self._size + 1]
        last = min(len(tokens), self._size) - 1
        special = [p for p in self._writers[document].calculation_positions if self._min_context <= p <= last]
        anywhere = rng.integers(min(self._min_context, last), last + 1, size=k)
        places = [
            int(rng.choice(special)) if special and i % 2 else int(p) for i, p in enumerate(anywhere)
        ]
        places = [min(p, len(self._ids[document]) - 1) for p in places]
        traces = [self._writers[document].write(p, rng)[:size] for p in places]
        rows = np.zeros((k, size + 1), np.int32)
        for row, trace in zip(rows, traces, strict=True):
            row[: len(trace) + 1] = [t.think_id, *trace]
        lengths = np.array([len(trace) for trace in traces], np.int32)
        padded = np.pad(tokens, (0, self._size + 1 - len(tokens)))
        return {
            "inputs": padded[:-1],
            "targets": padded[1:],
            "mask": np.arange(self._size) < len(tokens) - 1,
            "trace_inputs": rows[:, :-1],
            "trace_targets": rows[:, 1:],
            "trace_mask": np.arange(size) < lengths[:, None],
            "prefix": np.array(places, np.int32) + 1,  # The beginning-of-sequence token and the tokens before the place.
        }


def mixed_loss(
    policy: Transformer, params: Params, batch: dict[str, jax.Array], trace_weight: float, chunk: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of the documents' tokens plus `trace_weight` times that of the traces' tokens (paper, Equation 1).

    A document runs once, for its own loss and as the context of its K traces, each of which sees its own prefix of it.
    """
    inputs_NxS, traces_NxKxT = batch["inputs"], batch["trace_inputs"]
    lengths_N = jnp.full(inputs_NxS.shape[:1], inputs_NxS.shape[1], jnp.int32)
    hidden_NxSxD, context, _ = prefill(policy, params, inputs_NxS, lengths_N)
    visible_NxKx1xS = (jnp.arange(inputs_NxS.shape[1]) < batch["prefix"][..., None])[:, :, None]
    positions_NxKxT = batch["prefix"][..., None] + jnp.arange(traces_NxKxT.shape[-1], dtype=jnp.int32)
    context = context._replace(visible_NxGxQxS=visible_NxKx1xS)
    traced_NxKxTxD, _ = policy.apply({"params": params}, traces_NxKxT, positions_NxKxT, (context,))

    def mean_nll(hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        logprobs = token_logprobs(head(params), hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), 1.0, chunk)
        return -jnp.sum(logprobs * mask.reshape(-1)) / jnp.maximum(mask.sum(), 1)

    document = mean_nll(hidden_NxSxD, batch["targets"], batch["mask"])
    trace = mean_nll(traced_NxKxTxD, batch["trace_targets"], batch["trace_mask"])
    return document + trace_weight * trace, {"loss/document": document, "loss/trace": trace}


@functools.partial(jax.jit, static_argnames=("policy", "optimizer", "trace_weight", "chunk"), donate_argnames=("state",))
def pretrain_step(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    trace_weight: float,
    chunk: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One AdamW step on `mixed_loss`."""
    loss = functools.partial(mixed_loss, policy, batch=batch, trace_weight=trace_weight, chunk=chunk)
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    metrics["gradient/norm"] = optax.global_norm(grads)
    return TrainState(optax.apply_updates(state.params, updates), optimizer_state), metrics
