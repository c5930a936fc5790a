"""Suites that sample, on the policy that comes with the package, against the evaluator of the training loop and the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpt_jax import evaluate
from rpt_jax.config import from_config_dict, load_config_file
from rpt_jax.corpus.entropy import Scorer
from rpt_jax.distributed.mesh import use_mesh
from rpt_jax.evaluation.multiple_choice import read_letter
from rpt_jax.evaluation.next_token import EvaluationSet, sample_predictions
from rpt_jax.infra.run_context import RunContext
from rpt_jax.prompts.builder import PromptBuilder, stack
from rpt_jax.prompts.positions import Position
from rpt_jax.rewards.rewarder import Rewarder
from rpt_jax.rollout.sampler import Sampler
from rpt_jax.setup import mesh_from_config, set_up
from rpt_jax.sizes.plan import plan_run
from tests.helpers.evaluation import question_flags
from tests.helpers.paths import CONFIGS
from tests.helpers.runs import SMALL

pytestmark = pytest.mark.slow


def run(workdir: Path, *arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the command; return the summary and the records that it wrote."""
    assert evaluate.main(["evaluate", f"--workdir={workdir}", *arguments]) == 0
    records = [json.loads(line) for line in (workdir / "records.jsonl").read_text().splitlines()]
    return json.loads((workdir / "evaluation.json").read_text()), records


def test_next_token_suite_finds_what_the_evaluator_of_the_training_loop_finds(tmp_path: Path):
    config = str(CONFIGS / "rpt_tiny.py")
    read_by_suite = (
        "data.",
        "prompt.",
        "rollout.",
        "training.prompts_per_step",
        "evaluation.positions",
        "evaluation.samples",
    )
    overrides = [f"{name}={value}" for name, value in SMALL.items() if name.startswith(read_by_suite)]
    flags = ["--suite=next_token", f"--config={config}", *(f"--config.{override}" for override in overrides)]
    summary, records = run(tmp_path / "suite", *flags)

    experiment = from_config_dict(load_config_file(config), overrides)
    mesh = mesh_from_config(experiment.mesh)
    with use_mesh(mesh):
        experiment = plan_run(experiment, mesh)
        setup = set_up(experiment, mesh, tmp_path / "setup", RunContext())
        # The positions of the records, as the training loop evaluates them.
        numbers = setup.held_out.numbers_N.tolist()
        places = [tuple(map(int, record["id"].split(":"))) for record in records]
        positions = [
            Position(window=numbers.index(number), position=position, entropy=record["entropy"])
            for (number, position), record in zip(places, records, strict=True)
        ]
        assert len(positions) == SMALL["evaluation.positions"]
        builder = PromptBuilder(experiment.prompt, setup.tokenizer)
        prompts = [builder.build(i, setup.held_out[p.window], p) for i, p in enumerate(positions)]
        batch = experiment.training.prompts_per_step
        batches = [stack(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
        sample = Sampler(experiment, setup.policy, setup.tokenizer, mesh, builder)
        reward = Rewarder(experiment, setup.policy, setup.tokenizer, mesh, builder)
        rewarded = sample_predictions(
            sample, reward, sample.weights(setup.params), EvaluationSet(positions=positions, batches=batches)
        )
        scorer = Scorer(setup.policy, setup.params, setup.tokenizer, mesh, experiment)
        scores = scorer.score(setup.held_out)

    np.testing.assert_array_equal([record["correct"] for record in records], rewarded.reward_PxG)
    np.testing.assert_array_equal([record["lengths"] for record in records], rewarded.rollouts.lengths_PxG)
    direct = [record["scores"]["direct/first_token"] for record in records]
    assert direct == [float(scores[p.window].top1_correct_S[p.position]) for p in positions]
    entropies = [scores[p.window].entropy_S[p.position] for p in positions]
    np.testing.assert_allclose(
        [p.entropy for p in positions], entropies, atol=1e-3
    )  # They are stored in half precision.
    random_at_1 = summary["scores"]["reasoning/prefix/random@1"]["micro"]["mean"]
    assert random_at_1 == pytest.approx(np.mean(rewarded.reward_PxG)) and 0 < summary["device_busy"] <= 1
    assert summary["summary"]["difficulties"]["direct/prefix"]["easy"]["positions"] == len(records)


def test_predictions_after_the_own_reasoning_are_those_of_the_responses(tmp_path: Path):
    """At a temperature of almost 0 the predictions after unchanged reasoning must be the ones that followed it at first."""
    flags = ["--suite=altered_reasoning", f"--config={CONFIGS / 'rpt_tiny.py'}"]
    overrides = {name: value for name, value in SMALL.items() if name.startswith("data.")} | {
        "evaluation.positions": 20,
        "evaluation.prompts_per_batch": 16,
        "evaluation.samples": 2,
        "evaluation.temperature": 1e-3,
    }
    flags += [f"--config.{name}={value}" for name, value in overrides.items()]
    summary, records = run(tmp_path / "out", *flags)
    finished = [record for record in records if all(record["finished"])]
    assert len(records) == 20 and len(finished) > 10
    for rule in ("prefix", "first_token"):
        own = [record["scores"][f"own/{rule}"] for record in finished]
        assert own == [record["scores"][f"reasoning/{rule}/random@1"] for record in finished]
    difference = summary["summary"]["differences"]["empty minus own"]
    means = [np.mean([record["scores"][f"{name}/prefix"] for record in records]) for name in ("empty", "own")]
    assert difference["mean"] == pytest.approx(means[0] - means[1])
    assert difference["low"] <= difference["mean"] <= difference["high"]


@pytest.mark.parametrize(("suite", "name"), [("multiple_choice", "multiple_choice"), ("questions", "evaluation")])
def test_suites_of_questions_read_their_own_responses(suite: str, name: str, tmp_path: Path):
    verifier = {"questions.verifier": "choice"} if suite == "questions" else {}
    flags = [f"--suite={suite}", f"--config={CONFIGS / 'rft_tiny.py'}", *question_flags(tmp_path, **verifier)]
    flags += [f"--config.{name}.samples=4", f"--config.{name}.max_new_tokens=24", "--config.prompt.max_tokens=256"]
    summary, records = run(tmp_path / "out", *flags)
    assert [len(record["responses"]) for record in records] == [4, 4, 4]
    assert max(max(record["lengths"]) for record in records) <= 24
    means = [record["scores"]["avg@4"] for record in records]
    assert summary["scores"]["avg@4"]["micro"]["mean"] == pytest.approx(np.mean(means))
    assert set(summary["scores"]) >= {"avg@4", "pass@2", "pass@4"}
    if suite == "multiple_choice":
        letters = [[read_letter(response) for response in record["responses"]] for record in records]
        assert letters == [record["letters"] for record in records]
        unparsed = [letter is None for of_question in letters for letter in of_question]
        assert summary["summary"]["unparsed"] == pytest.approx(np.mean(unparsed))
        # A letter at random in place of none.
        random, _ = run(tmp_path / "random", *flags, "--config.multiple_choice.unparsed=random")
        assert random["summary"]["unparsed"] == summary["summary"]["unparsed"]
    else:
        assert sum(summary["summary"]["status"].values()) == pytest.approx(1.0)
