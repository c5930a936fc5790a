"""Next-token pre-training of a base policy: documents, mixed with cold-start traces of next-token reasoning."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.data.cold_start import TraceWriter
from rpt_jax.data.corpus import REJECTED, Document, load_corpus
from rpt_jax.data.pipeline import example_stream
from rpt_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from rpt_jax.errors import UserError
from rpt_jax.infra.checkpoint import Checkpointer, abstract
from rpt_jax.infra.metrics import MetricsWriter, Progress
from rpt_jax.infra.optimizer import make_optimizer
from rpt_jax.infra.sharding import check_batches, init_optimizer, init_parameters, shard_prompts
from rpt_jax.objective.logprobs import token_logprobs
from rpt_jax.objective.update import TrainState
from rpt_jax.policy.hf import save_policy
from rpt_jax.policy.presets import preset
from rpt_jax.policy.transformer import Params, Transformer, head, prefill
from rpt_jax.setup import load_start, make_policy


class ExampleMaker:
    """Turns a document into arrays: its tokens, and traces that branch off from positions of it, packed into rows."""

    def __init__(self, experiment: Experiment, tokenizer: Tokenizer, documents: Sequence[Document]):
        self._config, self._size = experiment.pretrain, experiment.data.max_document_tokens
        self._min_context = experiment.data.min_context
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode_batch([d.text for d in documents])
        traces = (self._config.calculation_share, self._config.row_tokens, self._config.recalled_tokens)
        self._writers = [
            TraceWriter(tokenizer, d.text, ids, *traces) for d, ids in zip(documents, self._ids, strict=True)
        ]

    def make(self, document: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return one example, random in where its traces stand and what its drills ask.

        `inputs`, `targets`, `mask`: the document, [S]. `trace_inputs`, `trace_targets`, `trace_mask`: K rows of T tokens of
        packed traces, [K, T], and for each of their tokens `trace_segment` (which trace of its row), `trace_prefix` (how many
        of the inputs its trace continues) and `trace_position`.
        """
        t, size = self._tokenizer, self._size
        tokens = np.array([t.bos_id, *self._ids[document], t.eos_id], np.int32)[: size + 1]
        padded = np.pad(tokens, (0, size + 1 - len(tokens)))
        example = {"inputs": padded[:-1], "targets": padded[1:], "mask": np.arange(size) < len(tokens) - 1}
        writer = self._writers[document]
        traces = [(p, writer.write(p, rng), 0) for p in self._places(document, rng) if writer.can_box(p)]
        drills = [drill for _ in range(self._config.drills_per_document) if (drill := writer.drill(rng))]
        return example | self._pack([*traces, *((None, *drill) for drill in drills)])

    def _places(self, document: int, rng: np.random.Generator) -> list[int]:
        """Positions to reason at: a share, where there are such, inside the result of a calculation, the rest anywhere.

        Calculations are rare, and how to carry them out is learnt from examples.
        """
        last = min(len(self._ids[document]), self._size) - 1
        first, count = min(self._min_context, last), self._config.traces_per_document
        due = [p for p in self._writers[document].calculation_positions if first <= p <= last]
        places = rng.integers(first, last + 1, size=count)
        if due:
            share = round(count * self._config.due_share)
            places[:share] = rng.choice(due, size=share)
        return [int(p) for p in rng.permutation(places)]

    def _pack(self, traces: Sequence[tuple[int | None, list[int], int]]) -> dict[str, np.ndarray]:
        """Put each (place, trace, given tokens) into the first row that has room; those that fit nowhere are left out.

        A trace without a place sees nothing but itself, and its given tokens are not to be learnt.
        """
        shape = (self._config.rows_per_document, self._config.row_tokens)
        names = ("inputs", "targets", "mask", "segment", "prefix", "position")
        rows = {name: np.zeros(shape, bool if name == "mask" else np.int32) for name in names}
        used = np.zeros(shape[0], int)
        for number, (place, trace, given) in enumerate(traces, start=1):
            fitting = np.flatnonzero(used + len(trace) <= shape[1])
            if not len(fitting):
                continue
            row, columns = fitting[0], slice(used[fitting[0]], used[fitting[0]] + len(trace))
            used[row] += len(trace)
            rows["inputs"][row, columns] = [self._tokenizer.think_id, *trace[:-1]]
            rows["targets"][row, columns] = trace
            rows["mask"][row, columns] = np.arange(len(trace)) >= given
            rows["segment"][row, columns] = number
            # The beginning-of-sequence token, and the document's tokens before the place.
            prefix = 0 if place is None else place + 1
            rows["prefix"][row, columns] = prefix
            rows["position"][row, columns] = prefix + np.arange(len(trace))
        return {f"trace_{name}": array for name, array in rows.items()}


def mixed_loss(
    policy: Transformer, params: Params, batch: dict[str, jax.Array], trace_weight: float, chunk: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of the documents' tokens plus `trace_weight` times that of the traces' tokens (paper, Equation 1).

    A document runs once, for its own loss and as the context of its traces, each of which sees its own prefix of it.
    """
    inputs_NxS = batch["inputs"]
    lengths_N = jnp.full(inputs_NxS.shape[:1], inputs_NxS.shape[1], jnp.int32)
    hidden_NxSxD, context, _ = prefill(policy, params, inputs_NxS, lengths_N)
    context = context._replace(end_NxGxQ=batch["trace_prefix"])
    traced_NxKxTxD, _ = policy.apply(
        {"params": params}, batch["trace_inputs"], batch["trace_position"], (context,), batch["trace_segment"]
    )

    def mean_nll(hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        logprobs = token_logprobs(head(params), hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), 1.0, chunk)
        return -jnp.sum(logprobs * mask.reshape(-1)) / jnp.maximum(mask.sum(), 1)

    document = mean_nll(hidden_NxSxD, batch["targets"], batch["mask"])
    trace = mean_nll(traced_NxKxTxD, batch["trace_targets"], batch["trace_mask"])
    return document + trace_weight * trace, {"loss/document": document, "loss/trace": trace}


@functools.partial(
    jax.jit, static_argnames=("policy", "optimizer", "trace_weight", "chunk"), donate_argnames=("state",)
)
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
    metrics["gradient/norm"] = optax.tree.norm(grads)
    return TrainState(optax.apply_updates(state.params, updates), optimizer_state), metrics


def pretrain(experiment: Experiment, workdir: Path, mesh: Mesh) -> None:
    """Train a base policy, from random weights or from `policy.path`; resumes from the newest checkpoint in `workdir`.

    The finished policy is written to `pretrain.export`, or to `workdir/policy` where that is empty. Raises: UserError.
    """
    config, total = experiment.pretrain, experiment.training.total_steps
    check_batches(mesh, {"pretrain.documents_per_step": config.documents_per_step})
    directory = Path(config.export or workdir / "policy")
    documents = load_corpus(experiment.data, workdir / REJECTED).train
    policy, params, tokenizer = _start(experiment, workdir, documents, mesh)
    optimizer = make_optimizer(experiment.optimizer, total)
    state = TrainState(params, init_optimizer(optimizer, params, mesh))
    maker = ExampleMaker(experiment, tokenizer, documents)
    stream = example_stream(maker.make, len(documents), batch=config.documents_per_step, seed=experiment.seed)

    checkpoints, start = Checkpointer(workdir, experiment.checkpoint.keep), 0
    if restored := checkpoints.restore(abstract(state)):
        start, state, run = restored
        stream.set_state(run["stream"])
    chunk = experiment.training.logit_chunk_tokens
    with MetricsWriter(workdir, start) as metrics, Progress("pretrain", total, start) as progress:
        for step in range(start + 1, total + 1):
            began = time.monotonic()
            batch = shard_prompts(next(stream), mesh)
            state, scalars = pretrain_step(
                policy, optimizer, state, batch, trace_weight=config.trace_weight, chunk=chunk
            )
            scalars = {name: float(value) for name, value in scalars.items()}
            metrics.write(step, scalars | {"time/step": time.monotonic() - began})
            progress.advance(f"document {scalars['loss/document']:.3f}  trace {scalars['loss/trace']:.3f} nats a token")
            if step % experiment.checkpoint.every_steps == 0 or step == total:
                checkpoints.save(step, state, {"stream": stream.get_state()})
    checkpoints.close()
    save_policy(directory, policy.shape, state.params, tokenizer.source, tokenizer.fingerprint)
    print(f"The policy is in {directory}.")


def _start(
    experiment: Experiment, workdir: Path, documents: Sequence[Document], mesh: Mesh
) -> tuple[Transformer, Params, Tokenizer]:
    """The policy of `policy.path`, or random weights and a tokenizer trained on the documents. Raises: UserError."""
    if experiment.policy.path:
        return load_start(experiment.policy, mesh)
    path, shape = workdir / "tokenizer.model", preset(experiment.policy.preset)
    vocab_size = experiment.pretrain.vocab_size
    if vocab_size != shape.vocab:
        raise UserError(
            f"pretrain.vocab_size={vocab_size} must be the vocabulary of policy.preset='{experiment.policy.preset}', "
            f"{shape.vocab}."
        )
    if not path.exists():
        train_sentencepiece((d.text for d in documents), vocab_size, path)
    policy = make_policy(experiment.policy, shape)
    return policy, init_parameters(policy, mesh, experiment.seed), load_tokenizer(workdir)
