"""Registries: choices by name, their requirements, and choices that a user registers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from rpt_jax import registry as registries
from rpt_jax.config import from_config_dict
from rpt_jax.corpus.gsm_symbolic import GsmSymbolicOptions
from rpt_jax.errors import UserError
from rpt_jax.prompts.arithmetic_traces import ArithmeticOptions
from rpt_jax.registry import Registry, Requirements
from tests.helpers.paths import ROOT

ALL_REGISTRIES = [value for value in vars(registries).values() if isinstance(value, Registry)]


def make_registry(**options: object) -> Registry:
    return Registry("pond.fish", (), Requirements, **options)


def trout() -> int:
    """A fish of cold
    water.

    It needs oxygen.
    """
    return 1


def test_a_registered_function_is_found_by_its_name() -> None:
    fish = make_registry()
    assert fish.register("trout", fields=("depth",))(trout) is trout
    assert fish["trout"].function is trout
    assert fish["trout"].requirements == Requirements(fields=("depth",))
    assert list(fish) == ["trout"]
    assert len(fish) == 1
    assert [choice.name for choice in fish.choices()] == ["trout"]


def test_the_summary_of_a_choice_is_its_first_paragraph() -> None:
    fish = make_registry()
    fish.register("trout")(trout)
    assert fish["trout"].summary == "A fish of cold water."


def test_a_name_cannot_be_registered_for_two_functions() -> None:
    fish = make_registry()
    fish.register("trout")(trout)
    with pytest.raises(ValueError, match=r"pond\.fish='trout' is already registered by .*trout"):
        fish.register("trout")(lambda: 2)
    assert fish["trout"].function is trout


def test_a_module_that_is_executed_again_may_register_its_functions_again() -> None:
    fish = make_registry()
    for _ in range(2):

        @fish.register("carp")
        def carp() -> int:
            return 3

    assert len(fish) == 1
    assert fish["carp"].function is carp


def test_unknown_requirements_are_rejected() -> None:
    with pytest.raises(TypeError, match="depht"):
        make_registry().register("trout", depht=3)(trout)


def test_an_unknown_name_gets_the_nearest_one_as_a_suggestion() -> None:
    fish = make_registry()
    fish.register("trout")(trout)
    for look_up in (fish.check, fish.__getitem__):
        with pytest.raises(UserError, match="Did you mean 'trout'") as raised:
            look_up("truot")
        assert raised.value.field == "pond.fish"


def test_only_an_optional_registry_accepts_none() -> None:
    make_registry(optional=True).check("none")
    with pytest.raises(UserError) as raised:
        make_registry().check("none")
    assert raised.value.field == "pond.fish"


@pytest.mark.parametrize("registry", ALL_REGISTRIES, ids=lambda registry: registry.field)
def test_built_in_choices_have_a_summary(registry: Registry) -> None:
    assert len(registry) > 0
    for choice in registry.choices():
        assert choice.summary, f"{registry.field}='{choice.name}' has no docstring"


@pytest.mark.parametrize("registry", ALL_REGISTRIES, ids=lambda registry: registry.field)
def test_the_fields_of_a_choice_are_fields_of_its_config_section(registry: Registry) -> None:
    section = registry.field.partition(".")[0]
    known = {field.name for field in dataclasses.fields(getattr(from_config_dict({}), section))}
    for choice in registry.choices():
        assert set(choice.requirements.fields) <= known


@pytest.mark.parametrize(
    ("section", "choice", "field"),
    [
        ("data", {"positions": "threshold"}, {"keep_fraction": 0.5}),
        ("data", {"positions": "quantile"}, {"rescore_windows": 7}),
        ("objective", {"reward": "prefix"}, {"baseline_decay": 0.5}),
        ("objective", {"loss": "clip"}, {"dual_clip": 2.0}),
    ],
)
def test_a_field_that_belongs_to_other_choices_must_keep_its_default(section: str, choice: dict, field: dict) -> None:
    [(name, value)] = field.items()
    with pytest.raises(UserError) as raised:
        from_config_dict({section: choice | field})
    assert raised.value.field == f"{section}.{name}"


def test_a_field_is_accepted_with_the_choice_that_it_belongs_to() -> None:
    experiment = from_config_dict({"data": {"positions": "quantile", "keep_fraction": 0.5}})
    assert experiment.data.keep_fraction == 0.5


def test_options_of_a_choice_come_from_the_config_and_the_command_line() -> None:
    config = {"data": {"source_options": {"documents": 70}}}
    experiment = from_config_dict(
        config,
        [
            "data.source_options.held_out_templates=1",
            "cold_start.total_steps=1",
            "pretrain.traces=arithmetic",
            "pretrain.trace_options.drills_per_window=3",
        ],
    )
    assert experiment.data.source_options == GsmSymbolicOptions(documents=70, held_out_templates=1)
    assert experiment.pretrain.trace_options == ArithmeticOptions(drills_per_window=3)


def test_options_that_are_not_given_have_their_defaults() -> None:
    assert from_config_dict({}).data.source_options == GsmSymbolicOptions()
    assert from_config_dict({}).pretrain.trace_options is None  # "recall" has no options.


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["data.source_options.documnets=7"], "data.source_options.documnets"),
        (["data.source_options.documents=many"], "data.source_options.documents"),
        (["data.source_options=7"], "data.source_options"),
        (["pretrain.traces=arithmetic", "pretrain.trace_options.calculation_fraction=2"],
         "pretrain.trace_options.calculation_fraction"),
    ],
    ids=["unknown name", "wrong type", "no section", "out of range"],
)  # fmt: skip
def test_invalid_options_are_rejected(overrides: list[str], field: str) -> None:
    with pytest.raises(UserError) as raised:
        from_config_dict({}, overrides)
    assert raised.value.field == field


def test_a_misspelled_option_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="Did you mean 'data.source_options.documents'") as raised:
        from_config_dict({"data": {"source_options": {"documnets": 7}}})
    assert raised.value.field == "data.source_options.documnets"


def test_options_of_a_choice_that_has_none_are_rejected() -> None:
    with pytest.raises(UserError, match=r"pretrain\.traces='recall' has no options") as raised:
        from_config_dict({}, ["pretrain.trace_options.drills_per_window=3"])
    assert raised.value.field.startswith("pretrain.trace_options")


MODULE = """
import dataclasses

from rpt_jax.prompts.positions import every_position
from rpt_jax.prompts.traces import RecallTraces
from rpt_jax.registry import POSITION_CHOICES, PROMPT_TEMPLATES, TRACE_WRITERS


@dataclasses.dataclass(frozen=True)
class LoudOptions:
    volume: int = 3


@POSITION_CHOICES.register("above_two_nats")
def above_two_nats(config, entropies):
    return [dataclasses.replace(every_position(config), low=2.0)]


@PROMPT_TEMPLATES.register("quoted")
def quoted():
    return "'{context}'"


@TRACE_WRITERS.register("loud", options=LoudOptions)
class LoudTraces(RecallTraces):
    pass
"""
CONFIG = """
import my_choices

from rpt_jax.config import default_config


def get_config():
    config = default_config()
    config.data.positions = "above_two_nats"
    config.prompt.template = "quoted"
    config.pretrain.traces = "loud"
    return config
"""
LOAD = """
import sys

from rpt_jax.config import from_config_dict, load_config_file
from rpt_jax.errors import UserError
from rpt_jax.prompts.builder import read_template

try:
    experiment = from_config_dict(load_config_file(sys.argv[1]), sys.argv[2:])
except UserError as error:
    sys.exit(str(error))
print(experiment.data.positions, experiment.pretrain.trace_options, read_template(experiment.prompt.template))
"""


def load_in_a_new_process(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Load a config file there, so that what it registers is not registered here."""
    (folder / "my_choices.py").write_text(MODULE)
    (folder / "my_config.py").write_text(CONFIG)
    command = [sys.executable, "-c", LOAD, str(folder / "my_config.py"), *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_module_next_to_the_config_file_may_register_choices(tmp_path: Path) -> None:
    loaded = load_in_a_new_process(tmp_path, "cold_start.total_steps=1", "pretrain.trace_options.volume=5")
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == """above_two_nats LoudOptions(volume=5) ("'", "'")"""


def test_registered_choices_are_suggested_for_misspelled_names(tmp_path: Path) -> None:
    loaded = load_in_a_new_process(tmp_path, "data.positions=above_too_nats")
    assert loaded.returncode == 1
    assert "Did you mean 'above_two_nats'" in loaded.stderr
