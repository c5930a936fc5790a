"""Registries of the choices that a config field may name.

A choice is one decorated function (or class, for a trace writer). What the rest of the program must know about it, such as the
forward passes that a reward takes or the config fields that belong to it, is declared in the decorator; config checks, cost
estimates and the reference page read it from there.

    @REWARDS.register("first_token")
    def first_token_reward(inputs: RewardInputs) -> jax.Array:
        ...

A user's own choice is registered the same way, in the config file or in a module that it imports.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from rpt_jax.errors import check_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a choice needs, and which config fields belong to it.

    Attributes:
      fields: fields of the same config section that only have an effect with this choice, or with others that list them too.
      needs: (field, value) pairs of the same section that this choice requires.
      options: frozen dataclass of settings that only this choice has; None for no settings. A second config field holds its
        instance, such as `data.source_options` for `data.source` and `pretrain.trace_options` for `pretrain.traces`.
    """

    fields: tuple[str, ...] = ()
    needs: tuple[tuple[str, str], ...] = ()
    options: type | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRequirements(Requirements):
    """Requirements of a training reward.

    Attributes:
      prompt_passes: forward passes over a step's prompts before the update, sampling included.
      response_passes: forward passes over a step's responses before the update, sampling included.
      end_of_thinking: whether the tokenizer must have an end-of-thinking token.
      average: whether the reward is computed with the moving average of the parameters, which must then be kept.
      targets: what it can compare with: "token" (the next token), "segment" (a target that ends) or, the default, both.
    """

    prompt_passes: int = 1
    response_passes: int = 1
    end_of_thinking: bool = False
    average: bool = False
    targets: tuple[str, ...] = ("token", "segment")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRequirements(Requirements):
    """Requirements of a source of documents or questions.

    Attributes:
      check: called with the source's config section before anything is read; raises `UserError` if a package or a file is
        missing. None for no check.
    """

    check: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifierRequirements(Requirements):
    """Requirements of a verifier.

    Attributes:
      box: whether it reads the last box of the answer, so that a response without a box is wrong; if not, it reads all that
        follows the end of thinking.
      answers: whether a question must have an accepted answer.
      choices: whether a question must have options.
      imports: modules of other packages that it needs; a worker process imports them before its first answer.
    """

    box: bool = True
    answers: bool = True
    choices: bool = False
    imports: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionRequirements(Requirements):
    """Requirements of a choice of positions.

    Attributes:
      rescored: whether positions are chosen again during training, by the entropies of the current policy.
      staged: whether the positions come in stages, each for an equal part of `training.total_steps`.
      scored: whether the choice depends on the proxy's entropies, so that scoring the corpus is a cost of training.
      reported_fields: fields of section "data" that determine the choice, quoted in messages about it.
    """

    rescored: bool = False
    staged: bool = False
    scored: bool = True
    reported_fields: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetRequirements(Requirements):
    """Requirements of a kind of targets.

    Attributes:
      segments: whether a target ends, so that a prediction is compared with no more than it.
    """

    segments: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceRequirements(Requirements):
    """Requirements of a trace writer.

    Attributes:
      check: called with section `pretrain` and the tokenizer before the first step; raises `UserError` if the traces cannot be
        written. None for no check.
    """

    check: Callable[..., Any] | None = None


Function = TypeVar("Function", bound=Callable[..., Any])
RequirementsT = TypeVar("RequirementsT", bound=Requirements)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice(Generic[RequirementsT]):
    """A registered function, its name in the config and its requirements."""

    name: str
    function: Callable[..., Any]
    requirements: RequirementsT

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        return inspect.cleandoc(self.function.__doc__ or "").partition("\n\n")[0].replace("\n", " ")


class Registry(Generic[RequirementsT]):
    """The functions that a config field can name. Iterating yields the names, built-in ones first."""

    def __init__(
        self,
        field: str,
        builtin: str | tuple[str, ...],
        requirements: type[RequirementsT],
        *,
        optional: bool = False,
    ):
        """
        Args:
          field: the config field that names a choice, such as "objective.reward".
          builtin: module, or modules, that register the built-in choices; imported when the registry is first read, because
            these modules import this one.
          requirements: class of a choice's requirements.
          optional: whether the field may also be "none", which no function is registered for.
        """
        self.field = field
        self.optional = optional
        self._builtin = (builtin,) if isinstance(builtin, str) else builtin
        self._requirements = requirements
        self._choices: dict[str, Choice[RequirementsT]] = {}

    def register(self, name: str, **requirements: Any) -> Callable[[Function], Function]:
        """Return a decorator that registers a function as `name`.

        Args:
          name: what the config field is set to.
          requirements: fields of the registry's requirements class.

        Raises: ValueError, if another function is registered as `name`.
        """

        def decorate(function: Function) -> Function:
            known = self._choices.get(name)
            # A config file is run again by every worker process, and then registers the same functions again.
            if known and _origin(known.function) != _origin(function):
                raise ValueError(f"{self.field}='{name}' is already registered by {_origin(known.function)}")
            self._choices[name] = Choice(name=name, function=function, requirements=self._requirements(**requirements))
            return function

        return decorate

    def check(self, name: str) -> None:
        """Check that the config field may be `name`. Raises: UserError, with the nearest name, if not."""
        check_choice(self.field, name, [*self, *(["none"] if self.optional else [])])

    def __getitem__(self, name: str) -> Choice[RequirementsT]:
        """Return the choice called `name`. Raises: UserError, with the nearest name, if there is none."""
        self._load()
        check_choice(self.field, name, self._choices)
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._choices)

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._choices

    def __len__(self) -> int:
        self._load()
        return len(self._choices)

    def choices(self) -> list[Choice[RequirementsT]]:
        """Return all choices, built-in ones first."""
        self._load()
        return list(self._choices.values())

    def _load(self) -> None:
        for module in self._builtin:
            importlib.import_module(module)


def _origin(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


REWARDS = Registry("objective.reward", "rpt_jax.rewards.catalogue", RewardRequirements)
ADVANTAGES = Registry("objective.advantage", "rpt_jax.objective.advantage", Requirements)
LOSSES = Registry("objective.loss", "rpt_jax.objective.loss", Requirements)
AGGREGATIONS = Registry("objective.aggregation", "rpt_jax.objective.loss", Requirements)
KL_ESTIMATORS = Registry("objective.kl", "rpt_jax.objective.loss", Requirements, optional=True)
IMPORTANCE_WEIGHTS = Registry("objective.importance", "rpt_jax.objective.loss", Requirements, optional=True)
CORPUS_SOURCES = Registry(
    "data.source",
    (
        "rpt_jax.corpus.gsm_symbolic",
        "rpt_jax.corpus.champ",
        "rpt_jax.corpus.math_solutions",
        "rpt_jax.corpus.readers",
    ),
    SourceRequirements,
)
QUESTION_SOURCES = Registry(
    "questions.source",
    (
        "rpt_jax.questions.files",
        "rpt_jax.questions.published",
        "rpt_jax.questions.multiple_choice_sources",
        "rpt_jax.questions.reasoning_gym_tasks",
        "rpt_jax.questions.worked_solutions",
    ),
    SourceRequirements,
)
VERIFIERS = Registry("questions.verifier", "rpt_jax.rewards.verifiers", VerifierRequirements)
POSITION_CHOICES = Registry("data.positions", "rpt_jax.prompts.positions", PositionRequirements)
TARGETS = Registry("data.targets", "rpt_jax.prompts.targets", TargetRequirements)
PROMPT_TEMPLATES = Registry("prompt.template", "rpt_jax.prompts.templates", Requirements)
TRACE_WRITERS = Registry(
    "pretrain.traces",
    ("rpt_jax.prompts.traces", "rpt_jax.prompts.arithmetic_traces", "rpt_jax.prompts.sampled_traces"),
    TraceRequirements,
)
OBJECTIVE_REGISTRIES = (REWARDS, ADVANTAGES, LOSSES, AGGREGATIONS, KL_ESTIMATORS, IMPORTANCE_WEIGHTS)
ALL_REGISTRIES = (
    *OBJECTIVE_REGISTRIES,
    POSITION_CHOICES,
    TARGETS,
    CORPUS_SOURCES,
    QUESTION_SOURCES,
    VERIFIERS,
    PROMPT_TEMPLATES,
    TRACE_WRITERS,
)


def position_fields(data: Any) -> str:
    """Return the fields of a `DataConfig` that determine the choice of positions, and their values, for messages."""
    names = ["positions", *POSITION_CHOICES[data.positions].requirements.reported_fields]
    return ", ".join(f"data.{name}={getattr(data, name)!r}" for name in names)
