"""Reinforcement pre-training: the loop of the paper, one call a stage.

Next-token positions of the corpus become prompts; the policy reasons and predicts; whole-token prefixes of the true
continuation are rewarded; GRPO updates the policy on exactly what it sampled (paper, Equation 4).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax import report
from rpt_jax.config import Experiment
from rpt_jax.corpus.entropy import next_token_rows
from rpt_jax.distributed.sharding import (
    check_batches,
    init_optimizer,
    is_leader,
    num_batch_shards,
    shard_prompts,
    to_host,
)
from rpt_jax.errors import UserError
from rpt_jax.evaluate import DIFFICULTIES, Evaluator, evaluation_metrics
from rpt_jax.infra.accounting import BatchSize, Clock, Counters
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.checkpoint import Checkpointer
from rpt_jax.infra.divergence import DivergenceMonitor
from rpt_jax.infra.guards import guarded_loop
from rpt_jax.infra.metrics import MetricsWriter, Progress, RolloutText, as_floats, show_rollouts, table
from rpt_jax.infra.nan_record import recorded_step, write_record
from rpt_jax.infra.optimizer import make_optimizer
from rpt_jax.infra.signals import defer_signals
from rpt_jax.model.transformer import Params
from rpt_jax.objective.batch import NextTokenBatch, UpdateLimits, to_update_batch
from rpt_jax.objective.update import TrainState, update_policy
from rpt_jax.pretrain import cold_start
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.selection import OwnEntropies, own_entropies, refresh_is_due, training_order, training_stream
from rpt_jax.registry import REWARDS
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.rewards.rewarder import RewardedRollouts, Rewarder
from rpt_jax.rollout.dynamic_sampling import first_prompts, prefer_variance
from rpt_jax.rollout.metrics import rollout_metrics
from rpt_jax.rollout.sampler import Sampler
from rpt_jax.setup import Setup, check_sampling, set_up
from rpt_jax.tokenizers.tokenizer import END_THINK, Tokenizer
from rpt_jax.weights.hf import save_policy

RESULT = "result.json"


def train(experiment: Experiment, workdir: Path, mesh: Mesh, replay: bool = False) -> None:
    """Run reinforcement pre-training in `workdir`; resumes from the newest checkpoint there.

    Args:
      replay: stop after the step that `infra.numerics` has a record of.

    Raises: UserError, for what the user can mend; FloatingPointError, where a number becomes NaN or infinite.
    """
    if is_complete(workdir):
        print(f"This run is complete: {workdir / RESULT}. Choose another --workdir to run it again.")
        return
    clock, t = Clock(), experiment.training
    check_batches(mesh, {"data.score_batch_windows": experiment.data.score_batch_windows})
    check_sampling(experiment, mesh)
    if (experiment := cold_start(experiment, workdir, mesh, replay)) is None:
        return
    last = recorded_step(workdir) if replay else t.total_steps
    setup = set_up(experiment, mesh, workdir)
    builder = PromptBuilder(experiment.prompt, setup.tokenizer)
    sample = Sampler(experiment, setup.policy, setup.tokenizer, mesh, builder)
    reward = Rewarder(experiment, setup.policy, setup.tokenizer, mesh, builder)
    stream = training_stream(experiment, setup, builder)
    evaluator = Evaluator(experiment, setup, sample, reward, builder)
    optimizer = make_optimizer(experiment.optimizer, t.total_steps * t.minibatches_per_step)
    # Copies, because the update donates its state and the starting policy's parameters are still needed.
    params = jax.tree.map(jnp.copy, setup.params)
    average = (
        jax.tree.map(jnp.copy, setup.params) if REWARDS[experiment.objective.reward].requirements.average else None
    )
    state = TrainState(params, init_optimizer(optimizer, params, mesh), average)
    objective, limits = experiment.objective, update_limits(experiment, num_batch_shards(mesh))
    reference = setup.params if experiment.objective.kl != "none" else None
    counters, watch = make_counters(experiment, setup), DivergenceMonitor(experiment.divergence)
    checkpoints = Checkpointer(workdir, experiment.checkpoint.keep, state)
    step, scalars, before, own, rewarded = 0, {}, None, None, None
    if restored := checkpoints.restore():
        step, state, saved = restored
        check_saved(step, saved, experiment, setup)
        if saved["own"]:
            own = OwnEntropies.from_state(saved["own"])
            stream.renew(training_order(experiment, setup, own))
        stream.set_state(saved["stream"])
        counters.restore(saved["counters"])
        watch.restore(saved["watch"])
        clock.earlier, scalars = saved["seconds"], saved["scalars"]
        before = saved["before"] if saved["evaluated"] == evaluator.counts else None
        print(f"Going on from step {step} of {workdir}.")
    clock.lap("setup")

    def hold() -> None:
        """What a checkpoint holds: the step as it is after its update, and before it is evaluated and reported."""
        run = {"stream": stream.get_state(), "counters": counters.state(), "watch": watch.state()}
        run |= {"seconds": clock.seconds, "corpus": setup.prepared.fingerprint}
        run |= {"scalars": scalars, "before": before, "evaluated": evaluator.counts}
        checkpoints.hold(step, state, run | {"own": own.state() if own else None})

    hold()
    bar = Progress("rpt", t.total_steps, step)
    with MetricsWriter(workdir, step - 1) as metrics, bar as progress, guarded_loop(replay) as compiled_again:
        while True:
            if before is None:
                before = evaluator.full(setup.params)
                show_evaluation("before", before)
                hold()
            evaluation, after = evaluate(experiment, evaluator, step, state.params, before)
            clock.lap("evaluation")
            metrics.write(step, scalars | evaluation | clock.scalars())
            if rewarded and step % t.log_rollouts_every == 0:
                show_rollouts(f"step {step}", readable(rewarded, setup.tokenizer, count=2))
            if step == t.total_steps:
                break
            if step >= last:
                print(f"Every number of step {step} is finite.")
                return checkpoints.close()
            step, spent = step + 1, counters.flops
            if refresh_is_due(experiment, step):
                own = own_entropies(experiment, setup, state.params, step)
                stream.renew(training_order(experiment, setup, own))
                counters.count_scored(own.tokens)
                clock.lap("refresh")
            prompts = next(stream)
            clock.lap("data")
            weights = sample.weights(state.params)
            clock.lap("reshard")
            rollouts, usage = sample(weights, prompts, step)
            jax.block_until_ready(rollouts)
            clock.lap("rollout")
            rewarded = reward(state, prompts, rollouts, step)
            generated = counters.count_rollouts(rewarded.size())
            dynamic, rounds = step >= t.dynamic_sampling_from, 1
            while dynamic and rounds < t.dynamic_sampling_rounds and not rewarded.all_vary():
                clock.lap("reward")
                prompts = next(stream)
                rollouts, fresh_usage = sample(weights, prompts, step)
                jax.block_until_ready(rollouts)
                clock.lap("rollout")
                fresh = reward(state, prompts, rollouts, step)
                generated = generated.plus(counters.count_rollouts(fresh.size()))
                rewarded, usage = prefer_variance(rewarded, fresh), usage.plus(fresh_usage)
                rounds += 1
            del weights  # The update needs the room.
            rolled = jax.device_get(rollout_metrics(rewarded, usage)) | {"groups/rounds": rounds}
            clock.lap("reward")
            documents = load_documents(experiment, setup, rewarded) if objective.document_weight else None
            batch = to_update_batch(
                objective,
                prompts_PxS=rewarded.prompts.tokens_PxS,
                lengths_P=rewarded.prompts.lengths_P,
                window_P=rewarded.prompts.window_P,
                tokens_PxGxT=rewarded.rollouts.tokens_PxGxT,
                response_lengths_PxG=rewarded.rollouts.lengths_PxG,
                sampler_logprobs_PxGxT=rewarded.rollouts.logprobs_PxGxT,
                reward_PxG=rewarded.reward_PxG,
                only_informative=dynamic,
                documents=documents,
            )
            with defer_signals():
                try:
                    as_floats(step, rolled)
                    state, losses = update_policy(setup.policy, optimizer, objective, limits, state, batch, reference)
                    scalars = as_floats(step, rolled | jax.device_get(losses))
                except FloatingPointError as error:
                    if not replay:  # Which has donated its state, and needs no other record.
                        record_failure(workdir, step, error, experiment.seed, rewarded)
                        checkpoints.save_unchanged(state)
                    raise
                count_update(counters, rewarded, generated, documents, scalars)
                clock.lap("update")
                for warning in watch.check(step, scalars) + compiled_again():
                    print(f"warning: {warning}")
                scalars |= counters.scalars() | clock.speed(counters.flops - spent, generated.response_tokens)
                hold()
            checkpoints.check()
            if step % experiment.checkpoint.every_steps == 0 and step < t.total_steps:
                checkpoints.save()
            clock.lap("checkpoint")
            progress.advance(status(scalars, dynamic))
    source, mark = setup.tokenizer.source, setup.tokenizer.fingerprint
    save_policy(workdir / "policy", setup.policy.config, state.params, source, mark)
    finish(workdir, before, after, clock.seconds, experiment.seed)
    checkpoints.close()


def evaluate(
    experiment: Experiment, evaluator: Evaluator, step: int, params: Params, before: dict[str, Any]
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Return the evaluation scalars of a step, none where it has none, and the full evaluation of the last step."""
    if step == 0:
        return evaluation_metrics(before["reasoning"], before["direct"]), None
    if step == experiment.training.total_steps:
        after = evaluator.full(params)
        return evaluation_metrics(after["reasoning"], after["direct"]), after
    if step % experiment.evaluation.every_steps == 0:
        return evaluation_metrics(evaluator.reasoning(params, evaluator.held_out)[0]), None
    return {}, None


def record_failure(workdir: Path, step: int, error: FloatingPointError, seed: int, rewarded: RewardedRollouts) -> None:
    """Say which prompts a step had that met a number which is not finite."""
    p = rewarded.prompts
    write_record(workdir, step, error, seed, ids=p.ids_P, documents=p.window_P, positions=p.position_P)


def update_limits(experiment: Experiment, devices: int) -> UpdateLimits:
    """Return the sizes of the update; each of `devices` runs one row of packed tokens at a time."""
    training, rollout = experiment.training, experiment.rollout
    return UpdateLimits(
        minibatches=training.minibatches_per_step,
        rows=devices,
        microbatch_tokens=training.microbatch_tokens,
        logit_chunk_tokens=training.logit_chunk_tokens,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
    )


def make_counters(experiment: Experiment, setup: Setup) -> Counters:
    """Counters that know how often the config's objective runs a token forward."""
    o, minibatches = experiment.objective, experiment.training.minibatches_per_step
    needs = REWARDS[o.reward].requirements
    passes = BatchSize(needs.prompt_passes, needs.response_passes)
    return Counters(setup.policy.config.matmul_parameters, passes, (minibatches > 1) + (o.kl != "none"))


def count_update(
    counters: Counters,
    rewarded: RewardedRollouts,
    generated: BatchSize,
    documents: NextTokenBatch | None,
    scalars: dict[str, float],
) -> None:
    """Count the update that left `scalars`."""
    text = int(jax.device_get(documents.mask_NxS.sum())) if documents else 0
    learned, trunk = (int(scalars[f"update/{name}"]) for name in ("tokens", "trunk_tokens"))
    counters.count_update(rewarded.size(), learned, trunk, generated, text)


def load_documents(experiment: Experiment, setup: Setup, rewarded: RewardedRollouts) -> NextTokenBatch:
    """The documents that the prompts are from, one a prompt, as next-token prediction reads them."""
    rows = [setup.train[i] for i in to_host(rewarded.prompts.window_P)]
    size = experiment.data.max_document_tokens
    inputs, targets, lengths = next_token_rows(rows, len(rows), setup.tokenizer.bos_id, size)
    return shard_prompts(NextTokenBatch(inputs, targets, np.arange(size) < lengths[:, None]), setup.mesh)


def is_complete(workdir: Path) -> bool:
    """Whether the run has its result. Raises: UserError, where that is damaged."""
    path = workdir / RESULT
    try:
        return path.exists() and "after" in json.loads(path.read_bytes())
    except (TypeError, ValueError):
        raise UserError(
            f"{path} is damaged. Move it away and run the same command again: it goes on from the last checkpoint."
        ) from None


def check_saved(step: int, saved: dict[str, Any], experiment: Experiment, setup: Setup) -> None:
    """Raises: UserError, where the checkpoint is beyond the last step, or was made on another corpus than the run has now."""
    if step > experiment.training.total_steps:
        raise UserError(
            f"training.total_steps={experiment.training.total_steps} must be at least {step}: so many steps this run has made."
        )
    if saved["corpus"] != setup.prepared.fingerprint:
        raise UserError(
            f"the checkpoint was made on another prepared corpus (fingerprint {saved['corpus'][:12]}… then, "
            f"{setup.prepared.fingerprint[:12]}… now): put that one back, or choose another --workdir."
        )


def status(scalars: dict[str, Any], dynamic: bool) -> str:
    """A few words on a step, for the progress line."""
    words = f"reward {scalars['reward/mean']:.3f}  length {scalars['length/mean']:.0f}"
    if dynamic and scalars["groups/zero_variance"] > 0:
        words += f"  {scalars['groups/zero_variance']:.0%} of groups still without variance"
    return words


def readable(rewarded: RewardedRollouts, tokenizer: Tokenizer, count: int) -> list[RolloutText]:
    """The first sample of the first `count` prompts, as text."""
    rows = to_host(first_prompts(rewarded, count))
    texts = []
    for i in range(count):
        response = rows.rollouts.tokens_PxGxT[i, 0, : rows.rollouts.lengths_PxG[i, 0]].tolist()
        # The reward takes both for the end of thinking, the special token and what spells it.
        spelled = (END_THINK.encode() if t == tokenizer.end_think_id else tokenizer.token_bytes([t]) for t in response)
        reasoning, ended, prediction = b"".join(spelled).partition(END_THINK.encode())
        first_token = int(np.flatnonzero(rows.prompts.boundaries_PxRp1[i])[0])
        texts.append(
            RolloutText(
                prompt=tokenizer.token_bytes(rows.prompts.tokens_PxS[i, : rows.prompts.lengths_P[i]]),
                reasoning=reasoning,
                prediction=prediction if ended else None,
                truth=rows.prompts.reference_PxR[i, :first_token].tobytes(),
                reward=float(rows.reward_PxG[i, 0]),
                status=Status(rows.status_PxG[i, 0]).name.lower().replace("_", " "),
            )
        )
    return texts


def show_evaluation(name: str, result: dict[str, Any]) -> None:
    """Print one evaluation: accuracy with its 95 % interval and the number of positions, by split."""
    parts = {"": result, ", unseen templates": result.get("unseen_templates", {})}
    rows = [
        (f"{mode}{where}", *(_interval(part[mode][split]) for split in DIFFICULTIES))
        for where, part in parts.items()
        for mode in ("direct", "reasoning")
        if mode in part
    ]
    table(f"Next-token accuracy, {name} (%, 95 % interval, positions)", ("predicted", *DIFFICULTIES), rows)
    details = result["details"]
    print(f"format rate {details['format_rate']:.1%}, response length {details['response_length']:.1f} tokens")


def _interval(split: dict[str, Any]) -> str:
    if not split["positions"]:
        return "no positions"
    low, high = 100 * split["low"], 100 * split["high"]
    return f"{100 * split['accuracy']:.1f} ({low:.1f}-{high:.1f}), {split['positions']}"


def finish(workdir: Path, before: dict[str, Any], after: dict[str, Any], seconds: float, seed: int) -> None:
    """Write result.json, the last thing of a complete run, then show the table and draw the plots."""
    if not is_leader():
        return
    result: dict[str, Any] = {"wall_seconds": seconds, "seed": seed}
    for part in ("details", "unseen_templates"):
        result[part] = {"before": before.pop(part, None), "after": after.pop(part, None)}
    result |= {"before": before, "after": after}
    atomic_write(workdir / RESULT, json.dumps(result, indent=1) + "\n")
    for name in ("before", "after"):
        unseen = {"unseen_templates": result["unseen_templates"][name]} if result["unseen_templates"][name] else {}
        show_evaluation(name, result[name] | unseen | {"details": result["details"][name]})
    print(f"Plots: {', '.join(str(path) for path in report.write_plots(workdir))}")
    print(f"Complete in {seconds:.0f} s: {workdir / RESULT}")
