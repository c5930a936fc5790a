"""Next-token pre-training of a base policy on windows of documents and on traces of next-token reasoning (the cold start)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rpt_jax.config import DataConfig, Experiment
from rpt_jax.corpus.prepared import corpus_directory, open_and_report, open_prepared, tokenize_on_leader
from rpt_jax.corpus.sources import training_texts
from rpt_jax.corpus.tokenization import ShardPlan, plan_shards
from rpt_jax.corpus.tokenized import Windows
from rpt_jax.distributed.processes import is_leader
from rpt_jax.distributed.sharding import init_optimizer, init_parameters, shard_prompts
from rpt_jax.errors import UserError
from rpt_jax.infra.accounting import Clock
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.budget import expected_steps, is_last_step
from rpt_jax.infra.checkpoint import Checkpointer
from rpt_jax.infra.console import Progress
from rpt_jax.infra.guards import guarded_loop
from rpt_jax.infra.learning_signal import LearningSignal
from rpt_jax.infra.metrics import MetricsWriter, as_floats
from rpt_jax.infra.nan_record import recorded_step, write_record
from rpt_jax.infra.optimizer import LearningRates, make_optimizer
from rpt_jax.infra.out_of_memory import explain_out_of_memory
from rpt_jax.infra.profiler import ProfileWindow
from rpt_jax.infra.provenance import provenance
from rpt_jax.infra.run_context import RunContext
from rpt_jax.infra.run_format import POLICY
from rpt_jax.infra.shared_files import share
from rpt_jax.infra.storage import checkpoint_directory, push, with_urls
from rpt_jax.infra.trackers import Trackers
from rpt_jax.infra.workdir import COLD_START, RESULT, is_complete, read_result
from rpt_jax.model.attention.dispatch import Context
from rpt_jax.model.experts import balance_terms, expert_counts, expert_shares, load_metrics
from rpt_jax.model.flops import causal_pairs, training_flops
from rpt_jax.model.lora import join_adapters, split_adapters
from rpt_jax.model.model_config import preset
from rpt_jax.model.precision import in_policy_precision
from rpt_jax.model.transformer import Params, Transformer, apply_with_routing, head
from rpt_jax.objective.logprobs import token_logprobs
from rpt_jax.objective.update import TrainState, if_finite, keep_if
from rpt_jax.prompts.pipeline import example_stream
from rpt_jax.prompts.pretraining_examples import ExampleMaker
from rpt_jax.prompts.sampled_traces import traces_fingerprint
from rpt_jax.rewards.boxable import boxable_tokens
from rpt_jax.setup import load_policy_to_train, make_policy
from rpt_jax.tokenizers.export import exported_files
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.tokenizers.training import train_sentencepiece
from rpt_jax.weights.adapters import save_trained
from rpt_jax.weights.model_files import MODEL_CONFIG_FILE

logger = logging.getLogger(__name__)

# Bytes of text to train a tokenizer on. The trainer needs many times this in memory.
_TOKENIZER_BYTES = 2**26


@jax.named_scope("loss")
def mixed_loss(
    policy: Transformer,
    params: Params,
    batch: dict[str, jax.Array],
    weights: tuple[float, float],
    balance_weight: float,
    logit_chunk_tokens: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the weighted sum of the mean cross-entropies of window tokens and trace tokens (paper, Equation 1).

    Each window of a document runs once, for its own loss and as the context of its traces; each trace attends to its own prefix
    of it. The load-balancing term is of all tokens that have a loss.

    Args:
      policy: the model.
      params: its parameters.
      batch: arrays of `ExampleMaker.make`, stacked.
      weights: of windows and of traces.
      balance_weight: of the load-balancing term of a policy with experts; 0 for none.
      logit_chunk_tokens: tokens whose logits exist at once.

    Returns:
      The loss, and the metrics `loss/document` and `loss/trace` in nats per token; the latter is 0 if traces have no weight.
      Of a policy with experts, also those of its load, and `loss/balance` with a `balance_weight`.
    """
    inputs_Nx1xS = batch["inputs"][:, None]
    positions_Nx1xS = jnp.broadcast_to(jnp.arange(inputs_Nx1xS.shape[2], dtype=jnp.int32), inputs_Nx1xS.shape)
    (hidden_Nx1xSxD, kv), routing = apply_with_routing(policy, params, inputs_Nx1xS, positions_Nx1xS)

    def mean_nll(hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        logprobs = token_logprobs(
            head(policy, params),
            hidden.reshape(-1, hidden.shape[-1]),
            targets.reshape(-1),
            temperature=1.0,
            logit_chunk_tokens=logit_chunk_tokens,
        )
        return -jnp.sum(logprobs * mask.reshape(-1)) / jnp.maximum(mask.sum(), 1)

    document = mean_nll(hidden_Nx1xSxD, batch["targets"], batch["mask"])
    loss = weights[0] * document
    metrics = {"loss/document": document, "loss/trace": jnp.zeros(())}
    routed = [(routing, batch["mask"][:, None])] if routing is not None and weights[0] else []
    if weights[1]:
        context = Context(kv=kv, end_NxGxQ=batch["trace_prefix"])
        (traced_NxKxTxD, _), routing = apply_with_routing(
            policy, params, batch["trace_inputs"], batch["trace_position"], (context,), batch["trace_segment"]
        )
        metrics["loss/trace"] = mean_nll(traced_NxKxTxD, batch["trace_targets"], batch["trace_mask"])
        loss += weights[1] * metrics["loss/trace"]
        if routing is not None:
            routed.append((routing, batch["trace_mask"]))

    if routed:
        shares_LxE = expert_shares(sum((expert_counts(*part) for part in routed), jnp.int32(0)))
        metrics |= load_metrics(shares_LxE)
        if balance_weight:
            balance = sum(jnp.sum(balance_terms(routing, shares_LxE) * mask) for routing, mask in routed)
            metrics["loss/balance"] = balance / jnp.maximum(sum(mask.sum() for _, mask in routed), 1)
            loss += balance_weight * metrics["loss/balance"]
    return loss, metrics


def update_flops(policy: Transformer, batch: Mapping[str, np.ndarray], trace_weight: float) -> float:
    """Return the model FLOPs of an update, a forward and a backward pass, without padding.

    Args:
      policy: the policy.
      batch: arrays of `ExampleMaker.make`, stacked, on the host.
      trace_weight: 0 if traces are left out.
    """
    mask_NxS = batch["mask"]
    window_tokens_N = np.where(mask_NxS.any(axis=1), mask_NxS.shape[1] - mask_NxS[:, ::-1].argmax(axis=1), 0)
    tokens = int(window_tokens_N.sum())
    pairs = causal_pairs(window_tokens_N).sum()
    if trace_weight:
        is_trace = batch["trace_segment"] > 0
        tokens += int(is_trace.sum())
        # A token of a trace attends to its prefix of the window, to the trace before it and to itself.
        pairs += (batch["trace_position"][is_trace] + 1).sum()
    frozen = policy.lora is not None
    return training_flops(policy.config, tokens=tokens, pairs=float(pairs), head_tokens=tokens, frozen=frozen)


@functools.partial(
    jax.jit,
    static_argnames=("policy", "optimizer", "weights", "balance_weight", "logit_chunk_tokens"),
    donate_argnames=("state",),
)
@jax.named_scope("update")
@in_policy_precision
def pretrain_step(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: dict[str, jax.Array],
    frozen: Params | None = None,
    *,
    weights: tuple[float, float],
    balance_weight: float,
    logit_chunk_tokens: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one AdamW step on `mixed_loss`.

    The state is returned unchanged if no token has a weight, or if a metric is not finite.

    Args:
      policy, optimizer, weights, balance_weight, logit_chunk_tokens: static.
      state: donated.
      batch: arrays of `ExampleMaker.make`, stacked.
      frozen: parameters of the policy that are not trained; None if all are.

    Returns:
      The new state, and metrics by their names in metrics.jsonl.
    """

    def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        return mixed_loss(policy, join_adapters(frozen, params), batch, weights, balance_weight, logit_chunk_tokens)

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    learns = (weights[0] > 0) & batch["mask"].any() | (weights[1] > 0) & batch["trace_mask"].any()
    metrics["gradient/norm"] = optax.tree.norm(grads)
    metrics["update/norm"] = jnp.where(learns, optax.tree.norm(updates), 0.0)
    metrics["update/skipped"] = 1.0 - learns
    params: Any = optax.apply_updates(state.params, updates)
    new_state = keep_if(learns, TrainState(params=params, optimizer=optimizer_state), state)
    metrics["parameters/norm"] = optax.tree.norm(new_state.params)
    return if_finite(metrics, new_state, state), metrics


def pretrain(experiment: Experiment, workdir: Path, mesh: Mesh, context: RunContext, *, replay: bool = False) -> None:
    """Train a base policy from random weights or from `policy.path`; resume from the newest checkpoint in `workdir`.

    The policy is written to `pretrain.export`, or to `workdir/policy` if that is empty; then result.json says that the run is
    complete.

    Args:
      experiment: the config.
      workdir: directory of the run.
      mesh: the current mesh.
      context: signals, heartbeats and other processes.
      replay: repeat the step that `infra.nan_record` has a record of, and return after it.

    Raises:
      UserError: something that the user can fix.
      FloatingPointError: a metric is NaN or infinite.
    """
    directory = Path(experiment.pretrain.export or workdir / POLICY)
    training = experiment.training
    if is_complete(workdir, training) and (directory / MODEL_CONFIG_FILE).is_file():
        logger.info(
            "This pre-training is complete: the policy is in %s. Raise training.total_steps or the budget to continue it.",
            directory,
        )
        return

    # --- 1. Load the policy and the windows --------------------------------------------------------
    clock = Clock(context.compile_times)
    config = experiment.pretrain
    total_steps = training.total_steps
    # The files of the corpus are listed once, if they are needed.
    plan = functools.cache(functools.partial(plan_shards, experiment.data))
    policy, params, tokenizer = _load_or_init(experiment, plan, workdir, mesh, context)
    windows = _training_windows(experiment.data, plan, workdir, tokenizer, context)
    optimizer = make_optimizer(experiment.optimizer, total_steps)
    frozen, trained = split_adapters(params)
    del params
    state = TrainState(params=trained, optimizer=init_optimizer(optimizer, trained, mesh))
    boxable_V = boxable_tokens(tokenizer.byte_vocab, experiment.prompt)
    traces = traces_fingerprint(config, tokenizer)
    maker = ExampleMaker(experiment, tokenizer, windows, boxable_V)
    stream = example_stream(maker.make, len(windows), batch=config.windows_per_step, seed=experiment.seed)

    # --- 2. Restore the newest checkpoint ----------------------------------------------------------
    checkpoints = Checkpointer(workdir, experiment.checkpoint.keep, state, frozen)
    checkpoints.register_with(context.signals)
    step = 0
    flops = 0.0
    if restored := checkpoints.restore():
        step, state, saved = restored
        if saved.get("traces", "") != traces:
            raise UserError(
                "the checkpoint was made with other traces than pretrain.trace_options.path has now: restore them, or choose "
                "another --workdir.",
                field="pretrain.trace_options.path",
            )
        stream.set_state(saved["stream"])
        flops = saved["flops"]
        clock.earlier = saved["seconds"]

    def budget_spent() -> dict[str, Any]:
        """Return what decides on the last step, as arguments of the functions of `infra.budget`."""
        return {"training": training, "step": step, "flops": flops, "seconds": clock.seconds}

    def stage_checkpoint() -> None:
        """Stage the current step."""
        run = {"stream": stream.get_state(), "flops": flops, "seconds": clock.seconds, "traces": traces}
        checkpoints.stage(step, state, run)

    stage_checkpoint()
    is_last = is_last_step(**budget_spent())

    learning_rates = LearningRates(experiment.optimizer, total_steps)
    signal = LearningSignal(experiment)
    step_options: dict[str, Any] = {
        "weights": (config.document_weight, config.trace_weight),
        "balance_weight": experiment.objective.balance_weight,
        "logit_chunk_tokens": experiment.training.logit_chunk_tokens,
    }
    memory_fields = {
        "pretrain.windows_per_step": config.windows_per_step,
        "policy.remat": experiment.policy.remat,
        "training.logit_chunk_tokens": experiment.training.logit_chunk_tokens,
    }
    last_step = recorded_step(workdir) if replay else total_steps
    with (
        MetricsWriter(workdir, step, Trackers(experiment, workdir)) as metrics,
        Progress("pretrain", expected_steps(**budget_spent()), step) as progress,
        ProfileWindow(experiment.profile, workdir) as profile,
        guarded_loop(replay) as take_recompiled,
    ):
        while not is_last and step < last_step:
            step += 1

            # --- 3. Update the policy on the next batch --------------------------------------------
            began = time.monotonic()
            profile.begin_step(step)
            examples = next(stream)
            flops += update_flops(policy, examples, config.trace_weight)
            batch = shard_prompts(examples, mesh)
            learning_rate = learning_rates.next(state.optimizer)
            # The update donates the state that is staged, so a stop signal must wait until the new one is staged.
            with context.signals.defer(), explain_out_of_memory("the pre-training update", memory_fields):
                try:
                    state, losses = pretrain_step(policy, optimizer, state, batch, frozen, **step_options)
                    scalars = as_floats(step, jax.device_get(losses))
                except FloatingPointError as error:
                    # The update returned the state unchanged. Save it with a record of the step. In a replay, JAX's own check may
                    # have raised after the state was donated, and the record exists already.
                    if not replay:
                        write_record(workdir, step, error, experiment.seed, documents=batch["document"])
                        checkpoints.replace_staged_state(state)
                        checkpoints.save_and_wait()
                    raise
                scalars |= {
                    "update/learning_rate": learning_rate,
                    "flops/train_total": flops,
                    "data/passes": step * config.windows_per_step / len(windows),
                }
                metrics.write(step, scalars | {"time/step": time.monotonic() - began})
                stage_checkpoint()
            is_last = is_last_step(**budget_spent())
            for warning in take_recompiled() + signal.check_traces(step, scalars):
                logger.warning(warning)

            # --- 4. Save, and stop if a signal asks for it -----------------------------------------
            checkpoints.check_writes()
            context.stop_if_requested(checkpoints.save_and_wait)
            context.heartbeat.beat(f"pretraining step {step}")
            profile.end_step(step)
            progress.total = step if is_last else expected_steps(**budget_spent())
            progress.advance(f"window {scalars['loss/document']:.3f}  trace {scalars['loss/trace']:.3f} nats/token")
            if step % experiment.checkpoint.every_steps == 0 or is_last:
                checkpoints.save()
    checkpoints.close()

    # --- 5. Write the policy -----------------------------------------------------------------------
    if replay:
        logger.info("Step %d was replayed, and all its metrics are finite.", last_step)
        return
    files = exported_files(tokenizer)
    save_trained(directory, policy, state.params, experiment.policy.path, files, tokenizer.fingerprint)
    if is_leader():
        push(directory)
        spent = {"steps": step, "flops": flops, "seconds": clock.seconds}
        result = {**provenance(), **spent, "policy": with_urls(str(directory))}
        atomic_write(workdir / RESULT, json.dumps(result, indent=1) + "\n")
    logger.info("The policy is in %s.", directory)


# --- cold start ------------------------------------------------------------------------------------


def cold_start_result(workdir: Path) -> dict[str, Any] | None:
    """Return the result of the cold start of the run in `workdir`, None if it is not complete. Raises: UserError, if damaged."""
    return read_result(workdir / COLD_START)


def delete_cold_start_checkpoints(workdir: Path) -> None:
    """Delete the checkpoints of a complete cold start: its policy replaces them, at a third of their size."""
    share(workdir / COLD_START, "cold start")
    if is_leader():
        with contextlib.suppress(OSError):
            checkpoint_directory(workdir / COLD_START).rmtree()


def start_from_cold_start(experiment: Experiment, workdir: Path) -> Experiment:
    """Return the experiment with the policy of the cold start as its starting policy."""
    policy = dataclasses.replace(experiment.policy, path=str(workdir / COLD_START / POLICY))
    return dataclasses.replace(experiment, policy=policy)


# --- loading ---------------------------------------------------------------------------------------


def check_vocab_size(experiment: Experiment) -> None:
    """Raise UserError if the tokenizer that is trained for random weights would not have the vocabulary of the preset."""
    if experiment.policy.path:
        return
    vocab_size = experiment.pretrain.vocab_size
    expected = preset(experiment.policy.preset).vocab
    if vocab_size != expected:
        raise UserError(
            f"pretrain.vocab_size={vocab_size} must be the vocabulary of policy.preset='{experiment.policy.preset}', {expected}.",
            field="pretrain.vocab_size",
        )


def _load_or_init(
    experiment: Experiment, plan: Callable[[], ShardPlan], workdir: Path, mesh: Mesh, context: RunContext
) -> tuple[Transformer, Params, Tokenizer]:
    """Load the policy of `policy.path`, or initialize one and train a tokenizer on the documents. Raises: UserError."""
    if experiment.policy.path:
        return load_policy_to_train(experiment, mesh)

    # Train the tokenizer in one process: the others, and a run that resumes, load its file.
    path = workdir / "tokenizer.model"
    if is_leader() and not path.exists():
        whole = plan().whole
        with Progress("read for a tokenizer, file ranges", 2 * whole.steps) as progress:

            def advance() -> None:
                progress.advance()
                context.heartbeat.beat("reading for a tokenizer")

            texts = training_texts(experiment.data, whole, _TOKENIZER_BYTES, advance)
            train_sentencepiece(texts, experiment.pretrain.vocab_size, path)
    share(workdir, "tokenizer")
    tokenizer = load_tokenizer(workdir)
    policy = make_policy(experiment.policy, preset(experiment.policy.preset), tokenizer)
    return policy, init_parameters(policy, mesh, experiment.seed), tokenizer


def _training_windows(
    data: DataConfig, plan: Callable[[], ShardPlan], workdir: Path, tokenizer: Tokenizer, context: RunContext
) -> Windows:
    """Open the training windows of `data.prepared`, or tokenize them into `workdir/corpus`. Raises: UserError."""
    if data.prepared:
        return open_prepared(data, tokenizer, Path(data.prepared)).corpus.windows("train")
    directory = corpus_directory(workdir, data, plan(), tokenizer)
    tokenize_on_leader(data, plan(), tokenizer, directory, context.heartbeat)
    return open_and_report(data, plan(), directory).windows("train")
