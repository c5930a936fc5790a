"""The reinforcement-learning loop: reinforcement pre-training on text, and fine-tuning on questions.

In task "rpt", next-token positions of a corpus become prompts: the policy reasons about each and predicts what follows, and a
prediction is rewarded if it matches the true continuation. In task "rft", prompts are questions, and a response is rewarded if
its answer is verified. In both, GRPO updates the policy on its own rollouts (paper, Equation 4). What the tasks differ in is in
`rpt_jax.tasks`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rpt_jax.config import Experiment, ObjectiveConfig
from rpt_jax.config.derived import cold_start_experiment
from rpt_jax.distributed.mesh import num_batch_shards
from rpt_jax.distributed.processes import is_leader, to_host
from rpt_jax.distributed.sharding import init_optimizer
from rpt_jax.infra.accounting import Clock, Counters, RolloutCost
from rpt_jax.infra.budget import expected_steps, is_last_step
from rpt_jax.infra.checkpoint import Checkpointer
from rpt_jax.infra.console import Progress, show_rollouts
from rpt_jax.infra.divergence import DivergenceMonitor
from rpt_jax.infra.guards import guarded_loop
from rpt_jax.infra.learning_signal import LearningSignal
from rpt_jax.infra.metrics import MetricsWriter, as_floats
from rpt_jax.infra.nan_record import recorded_step, write_record
from rpt_jax.infra.optimizer import LearningRates, make_optimizer
from rpt_jax.infra.out_of_memory import explain_out_of_memory
from rpt_jax.infra.plots import PLOTS, write_plots
from rpt_jax.infra.profiler import ProfileWindow
from rpt_jax.infra.rollout_files import RolloutFiles
from rpt_jax.infra.run_context import RunContext
from rpt_jax.infra.run_format import POLICY
from rpt_jax.infra.trackers import Trackers
from rpt_jax.infra.workdir import COLD_START, RESULT, is_complete
from rpt_jax.model.lora import join_adapters, split_adapters
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.transformer import Params
from rpt_jax.objective.batch import NextTokenBatch, UpdateBatch, UpdateLimits, to_update_batch
from rpt_jax.objective.update import TrainState, update_policy
from rpt_jax.pretrain import (
    cold_start_result,
    delete_cold_start_checkpoints,
    pretrain,
    start_from_cold_start,
)
from rpt_jax.prompts.builder import PromptBatch
from rpt_jax.prompts.selection import training_stage
from rpt_jax.registry import POSITION_CHOICES, REWARDS
from rpt_jax.results import rollout_texts, write_result
from rpt_jax.rewards.flops import reward_flops
from rpt_jax.rewards.rewarder import RewardedRollouts
from rpt_jax.rollout.cost import SamplingCost
from rpt_jax.rollout.dynamic_sampling import first_prompts, prefer_variance
from rpt_jax.rollout.metrics import drawn_metrics, mean_over_rounds, rollout_metrics, status_metrics
from rpt_jax.run_page.build import REPORT, write_page
from rpt_jax.tasks.questions import QuestionTask
from rpt_jax.tasks.task import Task
from rpt_jax.tasks.text import TextTask
from rpt_jax.tokenizers.export import exported_files
from rpt_jax.weights.adapters import save_trained

logger = logging.getLogger(__name__)


def train(experiment: Experiment, workdir: Path, mesh: Mesh, context: RunContext, *, replay: bool = False) -> None:
    """Run task "rpt" or "rft" in `workdir`; resume from the newest checkpoint there.

    Args:
      experiment: the config.
      workdir: directory of the run.
      mesh: the current mesh.
      context: signals, heartbeats and other processes.
      replay: repeat the step that `infra.nan_record` has a record of, and return after it.

    Raises:
      UserError: something that the user can fix.
      FloatingPointError: a metric is NaN or infinite.
      Diverged: a rule of config section `divergence` is broken, and `divergence.action` is "stop".
    """
    training = experiment.training
    if is_complete(workdir, training):
        logger.info(
            "This run is complete: %s. Raise training.total_steps or the budget to continue it, or choose another --workdir.",
            workdir / RESULT,
        )
        return
    config = experiment  # As it was given: after a cold start, the experiment has another starting policy.
    clock = Clock(context.compile_times)
    counters = Counters()

    def end_phase(phase: str) -> None:
        """Add the time since the last phase to `time/<phase>`, and tell the other processes that this one makes progress."""
        clock.lap(phase)
        context.heartbeat.beat(phase)

    # --- 1. Cold start: a short pre-training on reasoning traces, if the config has one ------------
    if experiment.cold_start.total_steps:
        if earlier := cold_start_result(workdir):
            clock.earlier = earlier["seconds"]
        else:
            pretrain(cold_start_experiment(experiment), workdir / COLD_START, mesh, context, replay=replay)
            if replay:
                return  # The recorded step was one of the cold start.
        delete_cold_start_checkpoints(workdir)
        result = cold_start_result(workdir)
        assert result, "the cold start is complete"
        counters.count_flops(result["flops"])
        experiment = start_from_cold_start(experiment, workdir)

    # --- 2. Load the policy and the prompts, and build what the loop needs -------------------------
    objective = experiment.objective
    last_step = recorded_step(workdir) if replay else training.total_steps
    task = make_task(experiment, mesh, workdir, context)
    policy = task.policy
    updates = training.total_steps * training.minibatches_per_step
    optimizer = make_optimizer(experiment.optimizer, updates)
    learning_rates = LearningRates(experiment.optimizer, updates)
    # Copies, because the update donates its state, and the parameters of the starting policy are still needed.
    frozen, trained = split_adapters(task.params)
    params = jax.tree.map(jnp.copy, trained)
    needs_average = REWARDS[objective.reward].requirements.average
    average = jax.tree.map(jnp.copy, trained) if needs_average else None
    state = TrainState(params=params, optimizer=init_optimizer(optimizer, params, mesh), average=average)
    limits = update_limits(experiment, rows=num_batch_shards(mesh))
    reference = task.params if objective.kl != "none" else None
    counters.count_flops(task.preparation_flops)
    divergence = DivergenceMonitor(experiment.divergence)
    signal = LearningSignal(experiment, task.advice)

    # --- 3. Restore the newest checkpoint ----------------------------------------------------------
    checkpoints = Checkpointer(workdir, experiment.checkpoint.keep, state, frozen)
    checkpoints.register_with(context.signals)
    step = 0
    scalars: dict[str, float] = {}  # Of the step that was completed last.
    before: dict[str, Any] | None = None  # Evaluation of the starting policy.
    after: dict[str, Any] | None = None  # Evaluation of the trained policy.
    last_rewarded: RewardedRollouts | None = None  # Rollouts of the last step, until they are shown.
    has_evaluated = False  # In this process.
    last_kept: RewardedRollouts | None = None  # Those of them that are kept, on the host.
    if restored := checkpoints.restore():
        step, state, saved = restored
        task.restore(saved)
        counters.restore(saved["counters"])
        divergence.restore(saved["divergence"])
        clock.earlier = saved["seconds"]
        clock.evaluation = saved["evaluation_seconds"]
        scalars = saved["scalars"]
        before = saved["before"] if saved["evaluated"] == task.evaluated else None
        logger.info("Resuming from step %d of %s.", step, workdir)
    end_phase("setup")

    def params_now() -> Params:
        """Return all parameters of the current policy."""
        return join_adapters(frozen, state.params)

    def budget_spent() -> dict[str, Any]:
        """Return what decides on the last step, as arguments of the functions of `infra.budget`."""
        return {"training": training, "step": step, "flops": counters.flops, "seconds": clock.training_seconds}

    def stage_checkpoint() -> None:
        """Stage the current step: after its update, and before its evaluation and its line of metrics."""
        run = {
            "stream": task.stream.get_state(),
            "counters": counters.state(),
            "divergence": divergence.state(),
            "seconds": clock.seconds,
            "evaluation_seconds": clock.evaluation,
            "scalars": scalars,
            "before": before,
            "evaluated": task.evaluated,
            **task.state(),
        }
        checkpoints.stage(step, state, run)

    def sample_and_reward(weights: Params, prompts: PromptBatch) -> tuple[RewardedRollouts, SamplingCost, RolloutCost]:
        """Return rollouts of `weights` with their rewards, what sampling took, and the total cost, which is counted."""
        rollouts, sampling = task.sample(weights, prompts, step)
        end_phase("rollout")
        rewarded = task.reward(state.with_frozen(frozen), prompts, rollouts, step)
        cost = rollout_cost(policy.config, objective, rewarded, sampling)
        counters.count_rollouts(cost)
        return rewarded, sampling, cost

    stage_checkpoint()
    is_last = is_last_step(**budget_spent())
    with (
        MetricsWriter(workdir, step - 1, Trackers(config, workdir)) as metrics,
        RolloutFiles(
            workdir, step, training.log_rollouts_every, evaluations=experiment.evaluation.keep_rollouts
        ) as files,
        Progress(
            experiment.task,
            expected_steps(**budget_spent()),
            step,
            interludes_left=lambda done: interludes_left(experiment, done, progress.total),
            alike=alike_interludes(experiment),
            compile_seconds=lambda: context.compile_times.total_seconds,
        ) as progress,
        ProfileWindow(experiment.profile, workdir) as profile,
        guarded_loop(replay) as take_recompiled,
        contextlib.closing(task),
    ):
        checkpoints.write_first(files.flush)
        while True:
            # --- 4. Evaluate the current policy, and write the metrics of the step before ----------
            if before is None:
                with progress.interlude("full evaluation"), files.evaluation(0) as keep:
                    before = task.evaluate(task.params, step=0, full=True, keep=keep)
                task.show_evaluations({"before": before})
                end_phase("evaluation")
                stage_checkpoint()
            evaluation, after = evaluate(experiment, task, step, params_now(), before, progress, files, is_last=is_last)
            end_phase("evaluation")
            metrics.write(step, scalars | evaluation | clock.scalars())
            if evaluation:
                files.call(functools.partial(update_page, workdir))
                if last_rewarded and not has_evaluated:
                    # After a resume, the first evaluation compiles programs for its larger batches, which needs no warning.
                    take_recompiled()
                has_evaluated = True
            if last_rewarded and step % training.log_rollouts_every == 0:
                texts = rollout_texts(last_rewarded, task.tokenizer, task.statuses, task.truths, count=2)
                show_rollouts(f"step {step}", texts)
                if last_kept:
                    metrics.show_table("rollouts", step, functools.partial(task.rollout_table, last_kept, step=step))
            last_rewarded = last_kept = None
            if is_last:
                break
            if step >= last_step:
                logger.info("Step %d was replayed, and all its metrics are finite.", step)
                checkpoints.close()
                return

            step += 1
            flops_before = counters.flops
            profile.begin_step(step)

            # --- 5. Choose prompts again with the current policy, if it is time --------------------
            if task.rescoring_is_due(step):
                with progress.interlude("rescoring"):
                    counters.count_flops(task.rescore(step, params_now()))
                end_phase("rescore")

            # --- 6. Sample rollouts and reward them ------------------------------------------------
            task.stream.enter_stage(training_stage(step, training.total_steps, task.stream.stages))
            prompts = next(task.stream)
            end_phase("data")
            weights = task.sample.weights(params_now())
            end_phase("reshard")
            with progress.part("sampling"):
                rewarded, sampling, generated = sample_and_reward(weights, prompts)
            drawn = [drawn_metrics(rewarded.reward_PxG)]

            # Dynamic sampling: groups whose samples all have the same reward have no gradient. Replace them by new prompts.
            dynamic = step >= training.dynamic_sampling_from
            rounds = 1
            with progress.interlude("dynamic sampling") if dynamic else contextlib.nullcontext():
                while dynamic and rounds < training.dynamic_sampling_rounds and not rewarded.all_vary():
                    end_phase("reward")
                    fresh, fresh_sampling, fresh_generated = sample_and_reward(weights, next(task.stream))
                    drawn.append(drawn_metrics(fresh.reward_PxG))
                    rewarded = prefer_variance(rewarded, fresh)
                    sampling = sampling.plus(fresh_sampling)
                    generated = generated.plus(fresh_generated)
                    rounds += 1
            del weights  # The update needs the memory.
            rollout_scalars = jax.device_get(rollout_metrics(rewarded, sampling)) | {"groups/rounds": rounds}
            rollout_scalars |= jax.device_get(status_metrics(rewarded.status_PxG, task.statuses))
            rollout_scalars |= mean_over_rounds(jax.device_get(drawn)) | task.reward_metrics()
            rollout_scalars |= task.stream.take_metrics()
            if training.kept_prompts_per_step:
                kept = to_host(first_prompts(rewarded, training.kept_prompts_per_step))
                files.add_training(step, functools.partial(task.rollout_table, kept, step=step))
                last_kept = kept
            end_phase("reward")

            # --- 7. Update the policy --------------------------------------------------------------
            documents = task.documents(rewarded)
            batch = make_update_batch(objective, rewarded, only_informative=dynamic, documents=documents)
            learning_rate = learning_rates.next(state.optimizer)
            # The update donates the state that is staged, so a stop signal must wait until the new one is staged.
            with context.signals.defer(), explain_out_of_memory("the update", update_memory_fields(experiment)):
                try:
                    as_floats(step, rollout_scalars)
                    state, losses = update_policy(policy, optimizer, objective, limits, state, batch, reference, frozen)
                    scalars = as_floats(step, rollout_scalars | jax.device_get(losses))
                except FloatingPointError as error:
                    # The update returned the state unchanged. Save it with a record of the step. In a replay, JAX's own check may
                    # have raised after the state was donated, and the record exists already.
                    if not replay:
                        record_failure(workdir, step, error, experiment.seed, rewarded)
                        checkpoints.replace_staged_state(state)
                        checkpoints.save_and_wait()
                    raise
                counters.count_update(
                    used=rewarded.size(),
                    generated=generated,
                    learned=int(scalars["update/tokens"]),
                    flops=scalars["update/flops"],
                )
                end_phase("update")
                scalars["update/learning_rate"] = learning_rate
                for warning in (
                    divergence.check(step, scalars) + take_recompiled() + signal.check_rollouts(step, scalars)
                ):
                    logger.warning(warning)
                scalars |= counters.scalars() | clock.speed(counters.flops - flops_before, generated.response_tokens)
                stage_checkpoint()
            is_last = is_last_step(**budget_spent())

            # --- 8. Save, and stop if a signal asks for it -----------------------------------------
            checkpoints.check_writes()
            context.stop_if_requested(checkpoints.save_and_wait)
            if step % experiment.checkpoint.every_steps == 0 or is_last:
                checkpoints.save()
            end_phase("checkpoint")
            profile.end_step(step)
            progress.total = step if is_last else expected_steps(**budget_spent())
            progress.advance(status(scalars, dynamic))
            last_rewarded = rewarded

    # --- 9. Write the policy, the result and the plots ---------------------------------------------
    checkpoints.wait()  # A finished run has its last step, so that it can be continued.
    files = exported_files(task.tokenizer)
    path = experiment.policy.path
    save_trained(workdir / POLICY, policy, state.params, path, files, task.tokenizer.fingerprint)
    if is_leader():
        assert after is not None
        evaluations = task.result(before, after)
        write_result(workdir, config, evaluations, steps=step, flops=counters.flops, clock=clock)
        task.show_evaluations({"before": before, "after": after})
        update_page(workdir)
        write_plots(workdir)
        logger.info("Plots: %s", ", ".join(map(str, sorted((workdir / PLOTS).glob("*.png")))))
        logger.info("Complete in %.0f s: %s, with the page %s", clock.seconds, workdir / RESULT, workdir / REPORT)
    checkpoints.close()


def make_task(experiment: Experiment, mesh: Mesh, workdir: Path, context: RunContext) -> Task:
    """Return the task of an experiment, with its policy and data loaded. Raises: UserError."""
    make = {"rpt": TextTask, "rft": QuestionTask}[experiment.task]
    return make(experiment, mesh, workdir, context)


def evaluate(
    experiment: Experiment,
    task: Task,
    step: int,
    params: Params,
    before: dict[str, Any],
    progress: Progress,
    files: RolloutFiles,
    *,
    is_last: bool,
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Evaluate the policy if the step calls for it.

    Args:
      experiment: the config.
      task: evaluates.
      step: number of completed steps.
      params: the current policy.
      before: evaluation of the starting policy, which is that of step 0.
      progress: of the training loop.
      files: keep the rollouts.
      is_last: whether this is the last step.

    Returns:
      Scalars for `metrics.jsonl` (empty if the step is not evaluated), and the full evaluation if this is the last step.
    """
    if step == 0:
        return task.evaluation_metrics(before), None
    if is_last:
        with progress.interlude("full evaluation"), files.evaluation(step) as keep:
            after = task.evaluate(params, step=step, full=True, keep=keep)
        return task.evaluation_metrics(after), after
    if step % experiment.evaluation.every_steps == 0:
        with progress.interlude("evaluation"), files.evaluation(step) as keep:
            return task.evaluation_metrics(task.evaluate(params, step=step, full=False, keep=keep)), None
    return {}, None


def interludes_left(experiment: Experiment, done: int, total: int) -> dict[str, int]:
    """Return how many interludes are still to come when `done` of `total` steps have just been completed.

    These are evaluations, rescorings, and the further rounds of dynamic sampling of a step.
    """

    def multiples(every: int) -> int:
        """Return how many multiples of `every` there are from `done`, which is followed by its evaluation, to before the end."""
        return (total - 1) // every - (max(1, done) - 1) // every

    is_rescored = POSITION_CHOICES[experiment.data.positions].requirements.rescored
    return {
        "evaluation": multiples(experiment.evaluation.every_steps),
        "full evaluation": 1,
        "rescoring": multiples(experiment.data.rescore_every_steps) if is_rescored else 0,
        "dynamic sampling": max(0, total - max(done, experiment.training.dynamic_sampling_from - 1)),
    }


def alike_interludes(experiment: Experiment) -> dict[str, tuple[str, float]]:
    """Return what an interlude that has not happened yet is expected to take, see `Progress`."""
    evaluation = experiment.evaluation
    unseen = 0 if experiment.asks_questions else evaluation.unseen_positions
    return {
        "evaluation": ("full evaluation", evaluation.positions / (evaluation.positions + unseen)),
        "full evaluation": ("evaluation", 1.0),
        "dynamic sampling": ("sampling", experiment.training.dynamic_sampling_rounds - 1),
    }


def update_page(workdir: Path) -> None:
    """Write the page of the run. An error is logged: it must not end the run, which does not depend on the page."""
    try:
        logger.debug("Page: %s", write_page([workdir], workdir / REPORT))
    except Exception as error:  # noqa: BLE001
        logger.warning(
            "The page of the run could not be written (%s: %s); the run goes on.", type(error).__name__, error
        )


def make_update_batch(
    objective: ObjectiveConfig,
    rewarded: RewardedRollouts,
    *,
    only_informative: bool,
    documents: NextTokenBatch | None,
) -> UpdateBatch:
    """Return the batch of an update: rollouts with their group-relative advantages (see `to_update_batch`)."""
    prompts = rewarded.prompts
    rollouts = rewarded.rollouts
    return to_update_batch(
        objective,
        prompts_PxS=prompts.tokens_PxS,
        lengths_P=prompts.lengths_P,
        window_P=prompts.window_P,
        tokens_PxGxT=rollouts.tokens_PxGxT,
        response_lengths_PxG=rollouts.lengths_PxG,
        sampler_logprobs_PxGxT=rollouts.logprobs_PxGxT,
        reward_PxG=rewarded.reward_PxG,
        only_informative=only_informative,
        documents=documents,
    )


def record_failure(workdir: Path, step: int, error: FloatingPointError, seed: int, rewarded: RewardedRollouts) -> None:
    """Record the prompts of a step with a non-finite metric."""
    prompts = rewarded.prompts
    write_record(
        workdir, step, error, seed, ids=prompts.ids_P, documents=prompts.window_P, positions=prompts.position_P
    )


def update_limits(experiment: Experiment, rows: int) -> UpdateLimits:
    """Return the sizes of the update, with `rows` packed rows per forward pass: one for each batch shard."""
    training = experiment.training
    return UpdateLimits(
        minibatches=training.minibatches_per_step,
        rows=rows,
        microbatch_tokens=training.microbatch_tokens,
        logit_chunk_tokens=training.logit_chunk_tokens,
        temperature=experiment.rollout.temperature,
        max_new_tokens=experiment.rollout.max_new_tokens,
    )


def update_memory_fields(experiment: Experiment) -> dict[str, int | str]:
    """Return the config fields that bound the memory of an update, with their values."""
    return {
        "training.microbatch_tokens": experiment.training.microbatch_tokens,
        "policy.remat": experiment.policy.remat,
        "training.logit_chunk_tokens": experiment.training.logit_chunk_tokens,
    }


def rollout_cost(
    config: ModelConfig, objective: ObjectiveConfig, rewarded: RewardedRollouts, sampling: SamplingCost
) -> RolloutCost:
    """Return the tokens of rollouts, and the FLOPs of sampling and rewarding them, fetched from the devices."""
    prompt_tokens, response_tokens = rewarded.size()
    rewarding = reward_flops(config, objective, rewarded.prompts.lengths_P, rewarded.rollouts.lengths_PxG)
    flops = sum(map(float, jax.device_get((sampling.flops, rewarding))))
    return RolloutCost(prompt_tokens=prompt_tokens, response_tokens=response_tokens, flops=flops)


def status(scalars: dict[str, Any], dynamic: bool) -> str:
    """Return a few words on a step, for the progress bar."""
    words = f"reward {scalars['reward/mean']:.3f}  length {scalars['length/mean']:.0f}"
    if dynamic and scalars["groups/zero_variance"] > 0:
        words += f"  {scalars['groups/zero_variance']:.0%} of groups without variance"
    return words
