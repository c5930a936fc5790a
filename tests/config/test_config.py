"""Configs are refused by name or meant: no typo, no wrong type, no field that nothing reads."""

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
from rpt_jax.errors import UserError
from tests.helpers.paths import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
DEFAULTS = dict(leaves(Experiment()))
SECTIONS = {f.name: type(f.default) for f in dataclasses.fields(Experiment) if dataclasses.is_dataclass(f.default)}


def load(path: Path) -> Experiment:
    """Validate what a config file returns."""
    return from_config_dict(load_config_file(str(path)))


def changed(**values: Any) -> dict[str, Any]:
    """Return the default config as plain dicts, with fields changed; `a__b` names the field a.b."""
    config = copy.deepcopy(dataclasses.asdict(Experiment()))
    for name, value in values.items():
        *sections, field = name.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[field] = value
    return config


def refusal(**values: Any) -> str:
    with pytest.raises(UserError) as caught:
        from_config_dict(changed(**values))
    return str(caught.value)


def test_defaults_survive_the_round_trip():
    assert from_config_dict(default_config()) == Experiment()
    assert from_config_dict(default_config().to_dict()) == Experiment()
    assert from_config_dict({}) == Experiment()


def test_misspelt_assignment_is_refused_in_the_config_file_itself():
    with pytest.raises(AttributeError):
        default_config().rollout.temprature = 1.0


def test_values_arrive_where_they_belong():
    experiment = from_config_dict(changed(seed=7, data__seed=8, rollout__temperature=0.5))
    assert (experiment.seed, experiment.data.seed, experiment.rollout.temperature) == (7, 8, 0.5)
    assert {n: v for n, v in leaves(experiment) if DEFAULTS[n] != v}.keys() == {
        "seed",
        "data.seed",
        "rollout.temperature",
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sed": 1}, ("'sed'", "'seed'")),
        ({"rolout": {}}, ("'rolout'", "'rollout'")),
        ({"rollout__temprature": 1.0}, ("'rollout.temprature'", "'rollout.temperature'")),
        ({"mesh__tensors": 2}, ("'mesh.tensors'", "'mesh.tensor'")),
        ({"seed": True}, ("seed=True", "bool", "int")),
        ({"seed": 1.0}, ("seed=1.0", "float", "int")),
        ({"prompt__prefill_think_token": 1}, ("prompt.prefill_think_token=1", "int", "bool")),
        ({"optimizer__learning_rate": "1e-6"}, ("optimizer.learning_rate='1e-6'", "str", "float")),
        ({"optimizer__learning_rate": False}, ("optimizer.learning_rate=False", "bool", "float")),
        ({"data__path": None}, ("data.path=None", "str")),
        ({"training": 3}, ("training=3", "TrainingConfig")),
        ({"task": "rtp"}, ("task='rtp'", "'rpt'")),
        ({"policy__dtype": "float16"}, ("policy.dtype='float16'", "bfloat16")),
        ({"policy__remat": "ful"}, ("policy.remat='ful'", "'full'")),
        ({"rollout__samples_per_prompt": 1}, ("rollout.samples_per_prompt=1", "2")),
        ({"rollout__temperature": 0.0}, ("rollout.temperature=0.0", "0.001")),
        ({"rollout__temperature": float("nan")}, ("rollout.temperature=nan",)),
        ({"training__total_steps": 0}, ("training.total_steps=0",)),
        ({"seed": -1}, ("seed=-1", "between 0 and 4294967295")),
        ({"data__seed": 2**32}, ("data.seed=4294967296", "between 0 and 4294967295")),
        ({"data__held_out_templates": -1}, ("data.held_out_templates=-1",)),
        ({"training__minibatches_per_step": 0}, ("training.minibatches_per_step=0",)),
        ({"objective__reward": "prefx"}, ("objective.reward='prefx'", "'prefix'")),
        ({"objective__loss": "gsop"}, ("objective.loss='gsop'", "'gspo'")),
        ({"objective__loss": "gspo"}, ("objective.aggregation='token_mean'", "'sequence_mean'")),
        ({"divergence__action": "stopp"}, ("divergence.action='stopp'", "'stop'")),
        ({"objective__advantage": "rlo"}, ("objective.advantage='rlo'", "'rloo'")),
        ({"objective__aggregation": "mean"}, ("objective.aggregation='mean'", "token_mean")),
        ({"objective__importance": "masked"}, ("objective.importance='masked'", "'mask'")),
        ({"objective__kl": "k3"}, ("objective.kl=k3 does nothing while objective.kl_weight is 0",)),
        ({"objective__kl_weight": 0.1}, ("objective.kl_weight=0.1 needs objective.kl too",)),
        ({"objective__overlong_weight": 1.0}, ("objective.overlong_weight=1 needs objective.overlong_tokens",)),
        ({"objective__budget_min": 8}, ("objective.budget_min=8 does nothing while objective.budget_weight is 0",)),
        (
            {"objective__importance_low": 0.7},
            ("importance_low=0.7 has no effect", "importance='none'", "belongs to mask."),
        ),
        ({"objective__clip_high": 0.3, "objective__loss": "reinforce"}, ("clip_high=0.3 has no effect", "cispo")),
        ({"objective__overlong_weight": 1.0, "objective__overlong_tokens": 49}, ("at most rollout.max_new_tokens=48",)),
        ({"objective__reference_tokens": 2}, ("objective.reference_tokens=2 has no effect", "'prefix'", "mean_prob")),
        ({"objective__dual_clip": 0.5}, ("objective.dual_clip=0.5", "between 1 and")),
        ({"pretrain__calculation_fraction": 1.5}, ("pretrain.calculation_fraction=1.5", "between 0 and 1.")),
    ],
)
def test_refusal_names_field_value_and_what_was_expected(values: dict[str, Any], said: tuple[str, ...]):
    message = refusal(**values)
    assert all(part in message for part in said), message


# --- the command line --------------------------------------------------------------------------------


def overridden(*overrides: str, **values: Any) -> Experiment:
    return from_config_dict(changed(**values), overrides)


def override_refusal(override: str) -> str:
    with pytest.raises(UserError) as caught:
        overridden(override)
    return str(caught.value)


def test_overrides_arrive_where_they_belong():
    experiment = overridden(
        "seed=7",
        "data.path=a=b",
        "optimizer.learning_rate=3e-4",
        "prompt.prefill_think_token=False",
        "mesh.data=-1",
        "seed=8",
    )
    different = {name: value for name, value in leaves(experiment) if DEFAULTS[name] != value}
    expected = {"seed": 8, "data.path": "a=b", "optimizer.learning_rate": 3e-4, "prompt.prefill_think_token": False}
    assert different == expected and type(experiment.optimizer.learning_rate) is float


def test_an_override_mends_what_the_file_has_wrong():
    assert overridden("rollout.temperature=1", rollout__temperature=0.0).rollout.temperature == 1.0


def test_an_override_needs_no_field_in_the_file():
    assert from_config_dict({"task": "pretrain"}, ["data.seed=4"]).data.seed == 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=20", "unknown config field 'steps'. Did you mean 'profile.steps'?"),
        ("training.steps=20", "unknown config field 'training.steps'. Did you mean 'training.total_steps'?"),
        ("trainin.total_step=20", "unknown config field 'trainin.total_step'. Did you mean 'training.total_steps'?"),
        (
            "TRAINING.Total-Steps=20",
            "unknown config field 'TRAINING.Total-Steps'. Did you mean 'training.total_steps'?",
        ),
        ("learning_rate=1", "unknown config field 'learning_rate'. Did you mean 'optimizer.learning_rate'?"),
        ("policy.temperature=1", "unknown config field 'policy.temperature'. Did you mean 'rollout.temperature'?"),
        ("sed=1", "unknown config field 'sed'. Did you mean 'seed'?"),
        ("seed.value=1", "unknown config field 'seed.value'. There are: task, seed, checkpoint.*, cold_start.*"),
        ("mesh.tensor.size=1", "unknown config field 'mesh.tensor.size'. Did you mean 'mesh.tensor'?"),
        (
            "mesh.xyzzy=1",
            "unknown config field 'mesh.xyzzy'. There are: mesh.data, mesh.fsdp, mesh.tensor, mesh.rollout_tensor,",
        ),
        ("xyzzy=1", "unknown config field 'xyzzy'. There are: task, seed, checkpoint.*, cold_start.*"),
        ("=1", "unknown config field ''. There are: task"),
        ("trainin=1", "unknown config field 'trainin'. Did you mean 'training'?"),
        (
            "training=5",
            "training is a section: set its fields one by one, for example --config.training.total_steps=1000.",
        ),
        ("mesh={}", "mesh is a section"),
        ("seed", "--config.seed has no value: write --config.seed=0, for example."),
        ("seed=", "seed= must be a whole number (int)."),
        ("seed=True", "seed=True must be a whole number (int)."),
        ("seed=1.0", "seed=1.0 must be a whole number (int)."),
        ("data.documents=many", "data.documents=many must be a whole number (int)."),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate=fast must be a number (float)."),
        ("optimizer.learning_rate=true", "optimizer.learning_rate=true must be a number (float)."),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan must be between 0 and 1."),
        ("prompt.prefill_think_token=1", "prompt.prefill_think_token=1 must be true or false (bool)."),
        ("task=rtp", "task='rtp' is not one of: pretrain, rpt, score. Did you mean 'rpt'?"),
    ],
)
def test_an_override_is_refused_by_its_full_name(override: str, said: str):
    assert override_refusal(override).startswith(said)


@hypothesis.given(data=st.data(), name=st.sampled_from(sorted(DEFAULTS)))
@hypothesis.settings(deadline=None, max_examples=100)
def test_one_slip_in_any_name_leads_back_to_it(data: st.DataObject, name: str):
    """A letter dropped, doubled or replaced, in the field's own name and anywhere in it."""
    first = len(name) - len(name.rpartition(".")[2])
    at = data.draw(st.integers(first, len(name) - 1))
    slip = data.draw(st.sampled_from(["", 2 * name[at], "q"]))
    misspelt = name[:at] + slip + name[at + 1 :]
    hypothesis.assume(misspelt not in DEFAULTS and misspelt not in SECTIONS and not misspelt.endswith("."))
    message = override_refusal(f"{misspelt}=1")
    assert message.startswith(f"unknown config field '{misspelt}'.")
    assert f"'{name}'" in message or len(name) - first <= 4, message


@hypothesis.given(text=st.text(max_size=8), name=st.sampled_from(sorted(DEFAULTS)))
@hypothesis.settings(deadline=None, max_examples=300)
def test_any_text_becomes_a_value_of_the_right_type_or_a_sentence(text: str, name: str):
    try:
        values = dict(leaves(overridden(f"{name}={text}")))
    except UserError as error:
        assert name.rpartition(".")[2] in str(error)
    else:
        assert type(values[name]) is type(DEFAULTS[name])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "c = default_config()\n    c.rollout.temprature = 1.0\n    return c",
            ":4 raises AttributeError: .*temperature",
        ),
        ("c = default_config()\n    c.data.path = 3\n    return c", ":4 raises TypeError: .*'path'"),
        ("return undefined", ":3 raises NameError: name 'undefined'"),
        ("return (", ":3 raises SyntaxError"),
        ("return None", " must define get_config()"),
        ("pass\n\nget_config = None", ":1 raises TypeError"),
        ("pass\n\ndel get_config", " must define get_config()"),
    ],
)
def test_a_mistake_in_a_config_file_is_found_by_file_and_line(tmp_path: Path, source: str, said: str):
    path = tmp_path / "mine.py"
    path.write_text(f"from rpt_jax.config import default_config\ndef get_config():\n    {source}\n")
    with pytest.raises(UserError, match=re.escape(str(path)) + said.replace("()", r"\(\)")):
        load_config_file(str(path))


@pytest.mark.parametrize("name", ["rpt_tiny", "configs/rpt_tin.py", "rpt_tiny.py"])
def test_a_config_file_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=f"--config={name} is no file. Did you mean 'configs/rpt_tiny.py'"):
        load_config_file(name)


# --- batches, types, sections ------------------------------------------------------------------------


def test_batch_that_cannot_be_split_is_refused():
    from_config_dict(changed(training__prompts_per_step=48, training__minibatches_per_step=3))
    message = refusal(training__prompts_per_step=48, training__minibatches_per_step=5)
    assert "training.minibatches_per_step" in message and "prompts_per_step=48" in message


def test_microbatch_that_holds_no_rollout_is_refused():
    sizes = {"prompt__max_tokens": 100, "rollout__max_new_tokens": 50}
    from_config_dict(changed(**sizes, training__microbatch_tokens=150))
    message = refusal(**sizes, training__microbatch_tokens=149)
    assert "training.microbatch_tokens=149" in message and "rollout.max_new_tokens = 150" in message


def test_whole_number_is_a_fine_float():
    value = from_config_dict(changed(rollout__temperature=1)).rollout.temperature
    assert value == 1.0 and type(value) is float


WRONG = {
    bool: st.integers() | st.floats() | st.text() | st.none() | st.lists(st.booleans(), max_size=2),
    int: st.booleans() | st.floats() | st.text() | st.none() | st.lists(st.integers(), max_size=2),
    float: st.booleans() | st.text() | st.none() | st.dictionaries(st.text(), st.floats(), max_size=2),
    str: st.booleans() | st.integers() | st.floats() | st.none() | st.binary(max_size=3) | st.just({}),
}


@hypothesis.given(data=st.data(), name=st.sampled_from(sorted(DEFAULTS)))
@hypothesis.settings(deadline=None, max_examples=200)
def test_wrong_type_anywhere_is_refused_by_name(data: st.DataObject, name: str):
    value = data.draw(WRONG[type(DEFAULTS[name])])
    message = refusal(**{name.replace(".", "__"): value})
    assert message.startswith(f"{name}={value!r}")


@hypothesis.given(
    value=st.none() | st.integers() | st.text() | st.lists(st.integers()), name=st.sampled_from(list(SECTIONS))
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_value_in_place_of_a_section_is_refused_by_name(value: Any, name: str):
    assert refusal(**{name: value}).startswith(f"{name}={value!r}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file_is_valid_and_labelled(path: Path):
    load(path)
    label = ast.get_docstring(ast.parse(path.read_text()))
    assert label and all(f"\n{line} " in label for line in ("Command", "Hardware"))
    assert f"--config=configs/{path.name}" in label


def test_14b_is_the_papers_run():
    experiment = load(ROOT / "configs" / "rpt_14b.py")
    stated = {
        "data.held_out_documents": 200,
        "data.entropy_top_k": 16,
        "prompt.template": "v0",
        "prompt.max_tokens": 4096,
        "rollout.samples_per_prompt": 8,
        "rollout.temperature": 0.8,
        "rollout.max_new_tokens": 8192,
        "optimizer.learning_rate": 1e-6,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.999,
        "optimizer.weight_decay": 0.01,
        "optimizer.max_grad_norm": 0.2,
        "training.total_steps": 1000,
        "training.prompts_per_step": 256,
        "training.minibatches_per_step": 1,
        "training.dynamic_sampling_from": 500,
    }
    values = dict(leaves(experiment))
    assert {name: values[name] for name in stated} == stated


class _Reads(ast.NodeVisitor):
    """Finds the config fields that a module reads, as dotted names in `found`.

    An expression stands for a section where it is an argument annotated with the section's class, `.section` of what
    stands for the experiment, or a name or attribute of self that was assigned such an expression. Only `.field` of
    those counts, so that another object's attribute of the same name does not.
    """

    def __init__(self, source: str):
        self.found: set[str] = set()
        self._classes = {schema.__name__: name for name, schema in SECTIONS.items()} | {"Experiment": ""}
        self._scopes: list[dict[str, str]] = [{}]
        self._of_self: dict[str, str] = {}
        self.visit(ast.parse(source))

    def _section(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Attribute) and node.attr in SECTIONS and self._section(node.value) == "":
            return node.attr
        name = ast.unparse(node)
        return next((scope[name] for scope in [*reversed(self._scopes), self._of_self] if name in scope), None)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        section = self._section(node.value)
        if section is not None and isinstance(node.ctx, ast.Load):
            self.found.add(f"{section}.{node.attr}".lstrip("."))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for to, value in pairs:
                section = self._section(value)
                if section is not None:
                    name = ast.unparse(to)
                    (self._of_self if name.startswith("self.") else self._scopes[-1])[name] = section
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        annotated = {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation}
        self._scopes.append({a: self._classes[kind] for a, kind in annotated.items() if kind in self._classes})
        self.generic_visit(node)
        self._scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._of_self = self._of_self, {}
        self.generic_visit(node)
        self._of_self = outer


def test_the_search_for_reads_is_not_fooled():
    reads = """
def a(experiment: Experiment, other):
    t, (x, y) = experiment.training, other
    return experiment.data.seed + t.total_steps + other.mesh.fsdp + other.keep

class B:
    def __init__(self, experiment: Experiment, o: OptimizerConfig):
        self._config, self.size = experiment.rollout, 3
        o.beta1 = 3

    def go(self):
        return self._config.temperature

class C:
    def go(self):
        return self._config.max_new_tokens
"""
    assert _Reads(reads).found & DEFAULTS.keys() == {"data.seed", "training.total_steps", "rollout.temperature"}


def test_every_leaf_is_read():
    """A field that nothing reads is a promise that the run does not keep."""
    modules = [
        path
        for path in (ROOT / "rpt_jax").rglob("*.py")
        if path.name not in ("schema.py", "validation.py", "loading.py", "describe.py")
    ]
    read = set().union(*(_Reads(path.read_text()).found for path in modules))
    assert not DEFAULTS.keys() - read, f"fields that no module reads: {sorted(DEFAULTS.keys() - read)}"
