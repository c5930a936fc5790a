"""Question source "reasoning_gym": generated problems of any task of the package reasoning-gym, with the task's own scorer."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rpt_jax.config import QuestionsConfig
from rpt_jax.errors import UserError, check_choice
from rpt_jax.questions.question import Question, SourceQuestion
from rpt_jax.registry import QUESTION_SOURCES

# A mixture of other tasks, which are named directly here.
_EXCLUDED_TASKS = {"composite"}
# Tasks whose scorers read an answer with `eval`: they read it as a Python literal instead.
_LITERAL_TASKS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
# Tasks whose scorers evaluate an answer as a formula with SymPy, which executes what the answer says.
_FORMULA_TASKS = (
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
)
_FORMULA = re.compile(r"[\w\s+\-*/^(),.]*", re.ASCII)
_ATTRIBUTE = re.compile(r"[A-Za-z_)]\s*\.|\.\s*[A-Za-z_]")
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt", "Abs", "pi")
)


@dataclasses.dataclass(frozen=True)
class ReasoningGymOptions:
    """Settings of the generator."""

    # Name of the task in reasoning-gym, such as "chain_sum"; several are separated by commas and become categories.
    task: str = "chain_sum"
    # Number of questions to generate for each task, training and test together.
    size: int = 1000
    # Settings of the task itself as a JSON object, such as '{"max_terms": 3}'; "" for its defaults. They apply to every task.
    parameters: str = ""

    def __post_init__(self) -> None:
        if self.size < 1:
            field = "questions.source_options.size"
            raise UserError(f"{field}={self.size} must be at least 1.", field=field)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return [name.strip() for name in self.task.split(",")]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the task. Raises: UserError, if they are not a JSON object."""
        try:
            settings = json.loads(self.parameters or "{}")
        except ValueError:
            settings = None
        if not isinstance(settings, dict):
            field = "questions.source_options.parameters"
            raise UserError(
                f"{field}={self.parameters!r} must be a JSON object, such as '{{\"max_terms\": 3}}'.", field=field
            )
        return settings


def check_tasks(config: QuestionsConfig) -> None:
    """Check that the package is installed, and that it has the tasks with these settings. Raises: UserError."""
    options = config.source_options or ReasoningGymOptions()
    factory = _import_factory()
    for task in options.tasks:
        check_choice("questions.source_options.task", task, set(factory.DATASETS) - _EXCLUDED_TASKS)
        try:
            factory.create_dataset(task, seed=config.seed, size=options.size, **options.settings)
        except (TypeError, ValueError, AssertionError) as error:
            field = "questions.source_options.parameters"
            raise UserError(
                f"{field}={options.parameters!r}: task '{task}' refuses it: {error}.", field=field
            ) from None


@QUESTION_SOURCES.register("reasoning_gym", options=ReasoningGymOptions, check=check_tasks)
def generate_reasoning_gym(config: QuestionsConfig) -> Iterator[SourceQuestion]:
    """Generate problems of tasks of reasoning-gym, which are the same for the same `questions.seed`."""
    check_tasks(config)
    options = config.source_options or ReasoningGymOptions()
    for task, entries in _generate(options, config.seed).items():
        for number, entry in enumerate(entries):
            yield SourceQuestion(
                Question(
                    id=f"{task}:{config.seed}:{number}",
                    text=entry["question"],
                    answers=() if entry["answer"] is None else (str(entry["answer"]),),
                    category=task if len(options.tasks) > 1 else "",
                    place=f"reasoning_gym {task}:{number}",
                    data={"task": task, "parameters": options.parameters, "entry": entry},
                )
            )


def score_entry(answer: str, data: Mapping[str, Any]) -> float:
    """Return the score that a task gives an answer, from 0 to 1.

    Nothing of the answer is executed. The scorers of some tasks would do that, so their answers are checked before, or are read
    in another way.

    Args:
      answer: the answer.
      data: `Question.data` of this source.
    """
    task = data["task"]
    if task in _FORMULA_TASKS and not is_plain_formula(answer):
        return 0.0
    dataset = _scoring_dataset(task, data["parameters"])
    try:
        return float(dataset.score_answer(answer, data["entry"]))
    except RecursionError:  # The answer is nested too deep for the task's parser.
        return 0.0


def is_plain_formula(text: str) -> bool:
    """Return whether a text has only numbers, operators, single letters and elementary functions."""
    return (
        _FORMULA.fullmatch(text) is not None
        and not _ATTRIBUTE.search(text)
        and all(len(name) == 1 or name in _FUNCTIONS for name in _NAME.findall(text))
    )


@functools.lru_cache(maxsize=64)
def _scoring_dataset(task: str, parameters: str) -> Any:
    settings = ReasoningGymOptions(parameters=parameters).settings
    dataset = _import_factory().create_dataset(task, seed=0, size=1, **settings)
    if task in _LITERAL_TASKS:
        # A name of the module comes before the built-in function.
        sys.modules[type(dataset).__module__].__dict__["eval"] = ast.literal_eval
    return dataset


def _import_factory() -> Any:
    try:
        return importlib.import_module("reasoning_gym.factory")
    except ImportError as error:
        raise UserError(
            "questions.source='reasoning_gym' needs the package reasoning-gym: pip install reasoning-gym==0.1.25",
            field="questions.source",
        ) from error


def _generate(options: ReasoningGymOptions, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the entries of each task, generated by another process, in which the order of sets does not vary.

    Some tasks iterate over sets of strings, and would generate other problems in every process. Raises: UserError, if it fails.
    """
    settings = {"seed": seed, "size": options.size, **options.settings}
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps([options.tasks, settings])],
        env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(
            f"reasoning-gym cannot generate questions.source_options.task='{options.task}': {lines[-1]}. Choose another task, or "
            "other parameters.",
            field="questions.source_options.task",
        )
    return pickle.loads(done.stdout)  # Our own process wrote it.


def _write_entries(arguments: str) -> None:
    """Write the entries of tasks to the standard output, pickled: scorers need their tuples and fractions, which JSON lacks."""
    # Some tasks print while they generate.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tasks, settings = json.loads(arguments)
    create = _import_factory().create_dataset
    pickle.dump({task: list(create(task, **settings)) for task in tasks}, output)
    output.close()


if __name__ == "__main__":
    _write_entries(sys.argv[1])
