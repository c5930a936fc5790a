"""Config files, overrides and the rules that a config must meet."""

from __future__ import annotations

import ast
import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from rpt_jax.config import Experiment, default_config, from_config_dict, load_config_file
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.config.reference import field_docs, section_docs
from rpt_jax.config.renamed import RENAMED
from rpt_jax.errors import UserError
from tests.helpers.paths import EXPERIMENTS, ROOT
from tests.helpers.snapshots import assert_matches_snapshot

DEFAULT = from_config_dict({})
DEFAULTS = dict(leaves(DEFAULT))
TYPED = sorted(name for name, value in DEFAULTS.items() if value is not None)
SECTIONS = {f.name: type(f.default) for f in dataclasses.fields(Experiment) if dataclasses.is_dataclass(f.default)}


def changed(**values: Any) -> dict[str, Any]:
    """Return the default config as nested dicts, with fields changed; `a__b` names the field a.b."""
    config = copy.deepcopy(dataclasses.asdict(DEFAULT))
    for name, value in values.items():
        *sections, field = name.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[field] = value
    return config


def overridden(*overrides: str, **values: Any) -> Experiment:
    return from_config_dict(changed(**values), overrides)


def refused(*overrides: str, **values: Any) -> UserError:
    """Return the error that a config is refused with."""
    with pytest.raises(UserError) as caught:
        overridden(*overrides, **values)
    return caught.value


# Values that are refused, and the field that the error is about.
REFUSED_VALUES = [
    ({"sed": 1}, "sed"),
    ({"rolout": {}}, "rolout"),
    ({"rollout__temprature": 1.0}, "rollout.temprature"),
    ({"mesh__tensors": 2}, "mesh.tensors"),
    ({"seed": True}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"prompt__prefill_think_token": 1}, "prompt.prefill_think_token"),
    ({"optimizer__learning_rate": "1e-6"}, "optimizer.learning_rate"),
    ({"optimizer__learning_rate": False}, "optimizer.learning_rate"),
    ({"data__path": None}, "data.path"),
    ({"training": 3}, "training"),
    ({"task": "rtp"}, "task"),
    ({"policy__dtype": "float16"}, "policy.dtype"),
    ({"policy__remat": "ful"}, "policy.remat"),
    ({"policy__precision": "bfloat16"}, "policy.precision"),
    ({"policy__precision": "float32", "policy__dtype": "bfloat16"}, "policy.precision"),
    ({"policy__head_precision": "float16"}, "policy.head_precision"),
    ({"training__logit_chunk_tokens": -1}, "training.logit_chunk_tokens"),
    ({"rollout__samples_per_prompt": 1}, "rollout.samples_per_prompt"),
    ({"rollout__temperature": 0.0}, "rollout.temperature"),
    ({"rollout__temperature": float("nan")}, "rollout.temperature"),
    ({"rollout__top_k": 5}, "objective.importance"),
    ({"prompt__box_reading": "to the end"}, "prompt.box_reading"),
    ({"prompt__box_reading": "to_end", "rollout__stop_at_box": True}, "rollout.stop_at_box"),
    ({"training__total_steps": 0}, "training.total_steps"),
    ({"training__minibatches_per_step": 0}, "training.minibatches_per_step"),
    ({"training__prompts_per_step": 48, "training__minibatches_per_step": 5}, "training.minibatches_per_step"),
    (
        {"prompt__max_tokens": 100, "rollout__max_new_tokens": 50, "training__microbatch_tokens": 149},
        "training.microbatch_tokens",
    ),
    ({"prompt__max_tokens": 63, "data__min_context": 64}, "prompt.max_tokens"),
    ({"seed": -1}, "seed"),
    ({"data__seed": 2**32}, "data.seed"),
    ({"mesh__data": 0}, "mesh.data"),
    ({"data__source": "paht"}, "data.source"),
    ({"data__source_options": 3}, "data.source_options"),
    ({"data__source_options": {"document": 1}}, "data.source_options.document"),
    ({"data__source_options": {"documents": 0}}, "data.source_options.documents"),
    ({"data__source_options": {"held_out_templates": -1}}, "data.source_options.held_out_templates"),
    ({"data__source": "path", "data__source_options": {"documents": 1}}, "data.source_options"),
    ({"data__positions": "treshold"}, "data.positions"),
    ({"data__keep_fraction": 0.5}, "data.keep_fraction"),
    ({"data__path": "texts"}, "data.path"),
    ({"data__text_field": "content"}, "data.text_field"),
    ({"data__group_by": "id"}, "data.group_by"),
    ({"data__positions": "quantile", "data__entropy_threshold": 1.2}, "data.entropy_threshold"),
    ({"data__shard": "0/2"}, "data.shard"),
    ({"task": "score", "data__prepared": "runs/score"}, "data.prepared"),
    (
        {"pretrain__traces": "arithmetic", "pretrain__trace_options": {"calculation_fraction": 1.5}},
        "pretrain.trace_options.calculation_fraction",
    ),
    ({"questions__source": "gms8k"}, "questions.source"),
    ({"questions__verifier": "boxed"}, "questions.verifier"),
    ({"questions__verifier": "reasoning_gym"}, "questions.source"),
    ({"questions__source": "gsm8k", "questions__path": "questions.jsonl"}, "questions.path"),
    ({"questions__source": "math", "questions__source_options": {"task": "gcd"}}, "questions.source_options"),
    ({"questions__source": "reasoning_gym", "questions__source_options": {"size": 0}}, "questions.source_options.size"),
    ({"questions__question_template": "{a}", "questions__question_field": "b"}, "questions.question_field"),
    ({"questions__test_questions": -1}, "questions.test_questions"),
    ({"questions__verifier_seconds": 0.0}, "questions.verifier_seconds"),
    ({"questions__min_passes": 2}, "questions.min_passes"),
    (
        {"questions__pass_rates": "rates.jsonl", "questions__min_passes": 4, "questions__max_passes": 3},
        "questions.max_passes",
    ),
    ({"questions__path": "https://example.org/questions.jsonl"}, "questions.path"),
    ({"objective__reward": "prefx"}, "objective.reward"),
    ({"objective__loss": "gsop"}, "objective.loss"),
    ({"objective__loss": "gspo"}, "objective.aggregation"),
    ({"objective__advantage": "rlo"}, "objective.advantage"),
    ({"objective__aggregation": "mean"}, "objective.aggregation"),
    ({"objective__importance": "masked"}, "objective.importance"),
    ({"objective__importance_low": 0.7}, "objective.importance_low"),
    ({"objective__clip_high": 0.3, "objective__loss": "reinforce"}, "objective.clip_high"),
    ({"objective__dual_clip": 0.5, "objective__loss": "dual_clip"}, "objective.dual_clip"),
    ({"objective__reference_tokens": 2}, "objective.reference_tokens"),
    ({"objective__kl": "k3"}, "objective.kl"),
    ({"objective__kl_weight": 0.1}, "objective.kl"),
    ({"objective__overlong_weight": 1.0}, "objective.overlong_tokens"),
    ({"objective__overlong_weight": 1.0, "objective__overlong_tokens": 49}, "objective.overlong_tokens"),
    ({"objective__budget_min": 8}, "objective.budget_min"),
    ({"divergence__action": "stopp"}, "divergence.action"),
    (
        {"task": "pretrain", "pretrain__document_weight": 0.0, "pretrain__trace_weight": 0.0},
        "pretrain.trace_weight",
    ),
    ({"training__total_steps": 20, "profile__start": 21}, "profile.start"),
    ({"objective__clip_high": 0.28}, "objective.clip_high"),
    ({"objective__loss": "dual_clip", "objective__dual_clip": 2.0}, "objective.dual_clip"),
    ({"objective__loss": "reinforce", "training__minibatches_per_step": 2}, "objective.loss"),
    (
        {"objective__reward": "log_prob", "objective__reference_tokens": 9, "prompt__reference_bytes": 8},
        "objective.reference_tokens",
    ),
    (
        {
            "task": "rft",
            "questions__path": "questions.jsonl",
            "questions__verifier": "contains",
            "prompt__template": "question",
            "objective__format_weight": 0.5,
        },
        "objective.format_weight",
    ),
]

# Command-line assignments that are refused, and the field that the error is about.
REFUSED_OVERRIDES = [
    ("steps=20", "steps"),
    ("training.steps=20", "training.steps"),
    ("trainin.total_step=20", "trainin.total_step"),
    ("TRAINING.Total-Steps=20", "TRAINING.Total-Steps"),
    ("learning_rate=1", "learning_rate"),
    ("policy.temperature=1", "policy.temperature"),
    ("sed=1", "sed"),
    ("seed.value=1", "seed.value"),
    ("mesh.tensor.size=1", "mesh.tensor.size"),
    ("mesh.xyzzy=1", "mesh.xyzzy"),
    ("xyzzy=1", "xyzzy"),
    ("=1", ""),
    ("trainin=1", "trainin"),
    ("training=5", "training"),
    ("mesh={}", "mesh"),
    ("seed", "seed"),
    ("seed=", "seed"),
    ("seed=True", "seed"),
    ("seed=1.0", "seed"),
    ("data.source_options=many", "data.source_options"),
    ("data.source_options.documents=many", "data.source_options.documents"),
    ("data.source_options.document=1", "data.source_options.document"),
    ("pretrain.trace_options.drills_per_window=1", "pretrain.trace_options"),
    ("optimizer.learning_rate=fast", "optimizer.learning_rate"),
    ("optimizer.learning_rate=true", "optimizer.learning_rate"),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate"),
    ("prompt.prefill_think_token=1", "prompt.prefill_think_token"),
    ("task=rtp", "task"),
]


def test_defaults_survive_a_round_trip():
    assert from_config_dict(default_config()) == DEFAULT
    assert from_config_dict(default_config().to_dict()) == DEFAULT


def test_assigning_to_an_unknown_field_raises_in_the_config_file():
    with pytest.raises(AttributeError):
        default_config().rollout.temprature = 1.0


def test_values_arrive_in_their_fields():
    experiment = from_config_dict(changed(seed=7, data__seed=8, rollout__temperature=0.5))
    different = {name: value for name, value in leaves(experiment) if DEFAULTS[name] != value}
    assert different == {"seed": 7, "data.seed": 8, "rollout.temperature": 0.5}


@pytest.mark.parametrize(("values", "field"), REFUSED_VALUES)
def test_an_impossible_value_is_refused_with_its_field(values: dict[str, Any], field: str):
    assert refused(**values).field == field


@pytest.mark.parametrize(("override", "field"), REFUSED_OVERRIDES)
def test_an_impossible_override_is_refused_with_its_field(override: str, field: str):
    assert refused(override).field == field


@pytest.mark.parametrize("old", [name for name in RENAMED if name.count(".") == 1])
def test_a_renamed_field_is_refused_with_its_new_name(old: str):
    section, _, field = old.partition(".")
    for error in (refused(f"{old}=1"), refused(**{f"{section}__{field}": 1})):
        assert error.field == old and RENAMED[old] in str(error)
    assert RENAMED[old] in {document.name for document in field_docs()}


def test_a_renamed_option_is_refused_with_its_new_name():
    old = "pretrain.trace_options.drills_per_document"
    with pytest.raises(UserError, match=RENAMED[old]) as raised:
        from_config_dict({"pretrain": {"traces": "arithmetic"}}, [f"{old}=1"])
    assert raised.value.field == old


def test_messages():
    """The texts of all errors above, in one place to be read."""
    errors = [refused(**values) for values, _ in REFUSED_VALUES]
    errors += [refused(override) for override, _ in REFUSED_OVERRIDES]
    assert_matches_snapshot("".join(f"{error}\n" for error in errors), Path(__file__).with_name("messages.txt"))


def test_overrides_arrive_in_their_fields():
    experiment = overridden(
        "seed=7",
        "policy.path=a=b",
        "data.source_options.documents=5",
        "optimizer.learning_rate=3e-4",
        "prompt.prefill_think_token=False",
        "mesh.data=-1",
        "seed=8",
    )
    different = {name: value for name, value in leaves(experiment) if DEFAULTS[name] != value}
    assert different == {
        "seed": 8,
        "policy.path": "a=b",
        "data.source_options.documents": 5,
        "optimizer.learning_rate": 3e-4,
        "prompt.prefill_think_token": False,
    }
    assert type(experiment.optimizer.learning_rate) is float


def test_an_override_replaces_an_impossible_value_of_the_file():
    assert overridden("rollout.temperature=1", rollout__temperature=0.0).rollout.temperature == 1.0


def test_an_override_works_for_a_field_that_the_file_lacks():
    assert from_config_dict({"task": "pretrain"}, ["data.seed=4"]).data.seed == 4


def test_options_follow_the_choice_that_an_override_makes():
    overrides = [
        "pretrain.trace_options.drills_per_window=2",
        "pretrain.traces=arithmetic",
        "cold_start.total_steps=1",
    ]
    assert from_config_dict({}, overrides).pretrain.trace_options.drills_per_window == 2
    assert from_config_dict({}, ["data.source=champ"]).data.source_options is None
    file = {"data": {"source_options": {"documents": 5}}}
    assert from_config_dict(file, ["data.source=champ"]).data.source_options is None
    assert from_config_dict(file, ["data.source=gsm_symbolic"]).data.source_options.documents == 5


@hypothesis.given(data=st.data(), name=st.sampled_from(TYPED))
@hypothesis.settings(deadline=None, max_examples=100)
def test_one_typo_in_any_name_suggests_the_name(data: st.DataObject, name: str):
    """A letter dropped, doubled or replaced, in the field's own name and anywhere in it."""
    first = len(name) - len(name.rpartition(".")[2])
    at = data.draw(st.integers(first, len(name) - 1))
    slip = data.draw(st.sampled_from(["", 2 * name[at], "q"]))
    misspelled = name[:at] + slip + name[at + 1 :]
    hypothesis.assume(misspelled not in DEFAULTS and misspelled not in SECTIONS and not misspelled.endswith("."))
    message = str(refused(f"{misspelled}=1"))
    assert message.startswith(f"unknown config field '{misspelled}'.")
    assert f"'{name}'" in message or len(name) - first <= 4, message


@hypothesis.given(text=st.text(max_size=8), name=st.sampled_from(TYPED))
@hypothesis.settings(deadline=None, max_examples=300)
def test_any_text_becomes_a_value_of_the_right_type_or_an_error_about_the_field(text: str, name: str):
    try:
        values = dict(leaves(overridden(f"{name}={text}")))
    except UserError as error:
        assert name.rpartition(".")[2] in f"{error.field} {error}"
    else:
        assert type(values[name]) is type(DEFAULTS[name])


@pytest.mark.parametrize(
    ("source", "line", "field"),
    [
        ("c = default_config()\n    c.rollout.temprature = 1.0\n    return c", 4, "rollout.temprature"),
        ("c = default_config()\n    c.data.path = 3\n    return c", 4, "data.path"),
        ("c = default_config()\n    c.data.kept_share = 1\n    return c", 4, "data.kept_share"),
        ("c = default_config()\n    c.optimiser.epsilon = 1\n    return c", 4, "optimiser"),
        ("c = default_config()\n    c.update({'mesh': {'data': 'two'}})\n    return c", 4, "mesh.data"),
        ("c = default_config()\n\n    c.training.total_steps = -5\n    return c", 5, "training.total_steps"),
        ("c = default_config()\n    s = c.objective\n    s.loss = 'pppo'\n    return c", 5, "objective.loss"),
        ("c = default_config()\n    c.mesh = {'data': 0}\n    return c", 4, "mesh.data"),
        (
            "c = default_config()\n    c.data.source_options.documents = 0\n    return c",
            4,
            "data.source_options.documents",
        ),
        ("return undefined", 3, "--config"),
        ("return (", 3, "--config"),
        ("return None", None, "--config"),
        ("pass\n\nget_config = None", 1, "--config"),
        ("pass\n\ndel get_config", None, "--config"),
    ],
)
def test_an_error_in_a_config_file_is_reported_with_file_and_line(
    tmp_path: Path, source: str, line: int | None, field: str
):
    path = tmp_path / "mine.py"
    path.write_text(f"from rpt_jax.config import default_config\ndef get_config():\n    {source}\n")
    with pytest.raises(UserError) as raised:
        from_config_dict(load_config_file(str(path)))
    assert raised.value.field == field
    assert str(raised.value).startswith(f"{path}:{line}" if line else f"{path} must define")


def test_the_line_of_a_config_file_is_not_blamed_for_a_value_of_the_command_line(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from rpt_jax.config import default_config\ndef get_config():\n"
        "    c = default_config()\n    c.training.total_steps = 5\n    return c\n"
    )
    with pytest.raises(UserError) as raised:
        from_config_dict(load_config_file(str(path)), ["training.total_steps=-5"])
    assert raised.value.field == "training.total_steps" and "mine.py" not in str(raised.value)


def test_a_config_can_be_copied():
    for copied in (copy.deepcopy(default_config()), default_config().copy_and_resolve_references()):
        copied.seed = 3
        assert from_config_dict(copied) == dataclasses.replace(DEFAULT, seed=3)


@pytest.mark.parametrize("path", ["evaluation.foo", "configs/nope.py"])
def test_an_unlike_name_gets_no_suggestion(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as raised:
        load_config_file(path) if path.endswith(".py") else from_config_dict({}, [f"{path}=1"])
    assert "Did you mean" not in str(raised.value)


@pytest.mark.parametrize("name", ["rpt_tiny", "configs/rpt_tin.py", "rpt_tiny.py"])
def test_a_missing_config_file_is_reported_with_the_nearest_one(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        UserError, match=re.escape(f"config file not found: {name}. Did you mean 'configs/rpt_tiny.py'?")
    ):
        load_config_file(name)


def test_an_integer_is_accepted_for_a_float():
    value = from_config_dict(changed(rollout__temperature=1)).rollout.temperature
    assert value == 1.0 and type(value) is float


WRONG = {
    bool: st.integers() | st.floats() | st.text() | st.none() | st.lists(st.booleans(), max_size=2),
    int: st.booleans() | st.floats() | st.text() | st.none() | st.lists(st.integers(), max_size=2),
    float: st.booleans() | st.text() | st.none() | st.dictionaries(st.text(), st.floats(), max_size=2),
    str: st.booleans() | st.integers() | st.floats() | st.none() | st.binary(max_size=3) | st.just({}),
}


@hypothesis.given(data=st.data(), name=st.sampled_from(TYPED))
@hypothesis.settings(deadline=None, max_examples=200)
def test_a_value_of_a_wrong_type_is_refused_with_its_field(data: st.DataObject, name: str):
    value = data.draw(WRONG[type(DEFAULTS[name])])
    assert refused(**{name.replace(".", "__"): value}).field == name


@hypothesis.given(
    value=st.none() | st.integers() | st.text() | st.lists(st.integers()), name=st.sampled_from(list(SECTIONS))
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_a_value_in_place_of_a_section_is_refused_with_its_name(value: Any, name: str):
    assert refused(**{name: value}).field == name


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_config_file_is_valid_and_its_docstring_says_how_to_run_it(path: Path):
    from_config_dict(load_config_file(str(path)))
    label = ast.get_docstring(ast.parse(path.read_text()))
    assert label and all(f"\n{line} " in label for line in ("Command", "Hardware"))
    assert f"--config=configs/{path.name}" in label


def test_every_field_has_a_sentence_of_documentation():
    documents = field_docs()
    assert {document.name for document in documents} >= DEFAULTS.keys()
    for document in documents:
        assert document.text.endswith(".") and (document.text[0].isupper() or document.text[0] == '"'), document.name
    assert all(section_docs().values()) and section_docs().keys() == {*SECTIONS, "policy.lora"}


def test_a_text_field_beside_a_template_is_refused_unless_a_part_has_no_template():
    overrides = ["data.source=path", "data.text_field=content"]
    with pytest.raises(UserError) as raised:
        from_config_dict({}, [*overrides, "data.document_template={content}"])
    assert raised.value.field == "data.text_field"
    assert from_config_dict({}, [*overrides, "data.document_template={content}|||"]).data.text_field == "content"
