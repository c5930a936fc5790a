"""Run directories: locked by one process, and resumed only with a compatible config."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest

from rpt_jax.config import (
    ColdStartConfig,
    DataConfig,
    Experiment,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    PolicyConfig,
    TrainingConfig,
)
from rpt_jax.config.reference import field_docs
from rpt_jax.errors import UserError
from rpt_jax.infra.run_format import FORMAT, format_stamp
from rpt_jax.infra.workdir import RUN_CONFIG, claimed_workdir, finished_steps, is_run_directory, read_run_config

# Of the right format, but without a config, or with something else in its place.
STAMPED = json.dumps(format_stamp()).encode()
STAMPED_LIST = json.dumps({**format_stamp(), "config": 3}).encode()


def claim(workdir: Path, experiment: Experiment) -> None:
    with claimed_workdir(workdir, experiment):
        pass


def test_a_workdir_belongs_to_one_config(tmp_path):
    experiment, workdir = Experiment(seed=3), tmp_path / "a" / "b"
    claim(workdir, experiment)
    written = (workdir / RUN_CONFIG).read_text()
    claim(workdir, Experiment(seed=3))
    assert (workdir / RUN_CONFIG).read_text() == written and json.loads(written)["config"][
        "training.total_steps"
    ] == 1000
    other = dataclasses.replace(experiment, training=TrainingConfig(prompts_per_step=7))
    with pytest.raises(
        UserError, match=r"training.prompts_per_step: 256 there, 7 now.*another --workdir, or add --force"
    ) as raised:
        claim(workdir, other)
    assert raised.value.field == "training.prompts_per_step"
    assert (workdir / RUN_CONFIG).read_text() == written
    assert sorted(path.name for path in workdir.iterdir()) == ["lock", RUN_CONFIG]


@pytest.mark.parametrize("name", [document.name for document in field_docs() if document.memory])
def test_a_memory_field_may_change(tmp_path, name):
    section, _, field = name.partition(".")
    before = getattr(Experiment(), section)
    value = getattr(before, field)
    other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else f"not {value}"
    claim(tmp_path, Experiment())
    claim(tmp_path, dataclasses.replace(Experiment(), **{section: dataclasses.replace(before, **{field: other})}))


def test_the_config_is_written_atomically(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device", str(tmp_path / RUN_CONFIG))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError) as raised:
            claim(tmp_path, Experiment())
        assert raised.value.field == "--workdir"
    assert not (tmp_path / RUN_CONFIG).exists()
    assert not is_run_directory(tmp_path)
    claim(tmp_path, Experiment())
    assert is_run_directory(tmp_path) and read_run_config(tmp_path)["seed"] == 0


def test_a_new_workdir_is_released_if_the_run_cannot_start(tmp_path):
    with pytest.raises(UserError, match="no such corpus"), claimed_workdir(tmp_path, Experiment(seed=1)):
        raise UserError("no such corpus")
    claim(tmp_path, Experiment(seed=2))
    with pytest.raises(UserError, match="later"), claimed_workdir(tmp_path, Experiment(seed=2)):
        raise UserError("later")
    assert read_run_config(tmp_path)["seed"] == 2, "the config of an earlier run stays"


def test_a_refused_resume_leaves_the_run_as_it_was(tmp_path):
    def contents():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    claim(tmp_path, Experiment())
    result = {**format_stamp(), "steps": 1000, "flops": 1.0, "seconds": 1.0}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1000}\n')
    (tmp_path / "checkpoints" / "1000").mkdir(parents=True)
    before = contents()
    longer = Experiment(training=TrainingConfig(total_steps=1001), policy=PolicyConfig(dtype="bfloat16"))
    with pytest.raises(UserError, match="frozen"), claimed_workdir(tmp_path, longer):
        assert "result_1000.json" in contents()
        raise UserError("other frozen weights")
    assert contents() == before
    # Once a step is done, the changes stay.
    with pytest.raises(UserError, match="diverged"), claimed_workdir(tmp_path, longer):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1000}\n{"step": 1001}\n')
        raise UserError("diverged")
    assert "result_1000.json" in contents() and read_run_config(tmp_path)["policy.dtype"] == "bfloat16"


@pytest.mark.parametrize("output", ["metrics.jsonl", "result.json", "checkpoints/20"])
def test_a_run_with_output_keeps_its_workdir(tmp_path, output):
    with pytest.raises(UserError, match="damaged"), claimed_workdir(tmp_path, Experiment(seed=1)):
        (tmp_path / output).parent.mkdir(exist_ok=True)
        (tmp_path / output).write_text("")
        raise UserError("damaged")
    with pytest.raises(UserError) as raised:
        claim(tmp_path, Experiment(seed=2))
    assert raised.value.field == "seed"
    # A finished run has nothing to resume.
    assert ("--force" in str(raised.value)) == (output != "result.json")


def test_output_without_a_run_config_is_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    with pytest.raises(UserError) as raised:
        claim(tmp_path, Experiment())
    assert raised.value.field == "--workdir"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "metrics.jsonl"]


def test_a_field_that_only_one_config_has_is_named(tmp_path):
    """One that the run lacks has been added since, so its default was what the run did."""
    claim(tmp_path, Experiment())
    fields = read_run_config(tmp_path)

    def rewrite(config: dict[str, object]) -> None:
        (tmp_path / RUN_CONFIG).write_text(json.dumps({**format_stamp(), "config": config}))

    rewrite(fields | {"gone.field": 1})
    with pytest.raises(UserError, match="gone.field: 1 there, None now"):
        claim(tmp_path, Experiment())
    rewrite({name: value for name, value in fields.items() if name != "seed"})
    claim(tmp_path, Experiment())
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        claim(tmp_path, Experiment(seed=1))


@pytest.mark.parametrize("content", [b"", b'{"seed": 0', b"\xff\xfe", b"[]", b"3", STAMPED, STAMPED_LIST])
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / RUN_CONFIG).write_bytes(content)
    with pytest.raises(UserError) as raised:
        claim(tmp_path, Experiment())
    assert raised.value.field == "--workdir"
    assert (tmp_path / RUN_CONFIG).read_bytes() == content


@pytest.mark.parametrize("inside", ["", "inside", "two/inside"])
def test_a_workdir_that_cannot_be_created_is_refused(tmp_path, inside):
    (tmp_path / "file").write_text("in the way")
    workdir = tmp_path / "file" / inside
    with pytest.raises(UserError) as raised:
        claim(workdir, Experiment())
    assert raised.value.field == "--workdir"
    assert (tmp_path / "file").read_text() == "in the way"


def test_some_fields_may_change_and_others_with_force(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="rpt_jax")
    claim(tmp_path, Experiment())
    training = TrainingConfig(total_steps=7, log_rollouts_every=3)
    longer = Experiment(training=training, mesh=MeshConfig(fsdp=2), policy=PolicyConfig(dtype="bfloat16"))
    claim(tmp_path, longer)
    assert "mesh.fsdp: 1 there, 2 now" in caplog.text
    assert read_run_config(tmp_path)["training.total_steps"] == 7, "the new values are written"
    other = dataclasses.replace(longer, optimizer=OptimizerConfig(learning_rate=0.5), seed=4)
    with pytest.raises(UserError, match="optimizer.learning_rate: 1e-06 there, 0.5 now; seed: 0 there, 4 now"):
        claim(tmp_path, other)
    with claimed_workdir(tmp_path, other, force=True):
        pass
    claim(tmp_path, other)


def test_changes_of_a_cold_start_that_is_complete_are_said_to_have_no_effect(tmp_path, caplog):
    claim(tmp_path, Experiment(cold_start=ColdStartConfig(total_steps=5)))
    with claimed_workdir(tmp_path, Experiment(cold_start=ColdStartConfig(total_steps=6)), force=True):
        pass
    assert not caplog.records
    (tmp_path / "cold_start" / "policy").mkdir(parents=True)
    with claimed_workdir(tmp_path, Experiment(cold_start=ColdStartConfig(total_steps=7)), force=True):
        pass
    [record] = caplog.records
    assert "no effect: cold_start.total_steps: 6 there, 7 now" in record.getMessage()


def with_adapters(**fields) -> Experiment:
    return Experiment(policy=PolicyConfig(lora=LoraConfig(**fields)))


@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        (Experiment(), Experiment(cold_start=ColdStartConfig(total_steps=5)), "cold_start.total_steps"),
        (Experiment(cold_start=ColdStartConfig(total_steps=5)), Experiment(), "cold_start.total_steps"),
        (Experiment(task="pretrain"), Experiment(), "task"),
        (with_adapters(rank=8), with_adapters(rank=4), "policy.lora.rank"),
        (with_adapters(rank=8), with_adapters(rank=8, alpha=1.0), "policy.lora.alpha"),
        (with_adapters(rank=8), with_adapters(rank=8, targets="q_proj"), "policy.lora.targets"),
        (
            with_adapters(rank=8),
            Experiment(policy=PolicyConfig(dtype="bfloat16", lora=LoraConfig(rank=8))),
            "policy.dtype",
        ),
    ],
)
def test_the_beginning_of_a_run_cannot_change_once_it_has_a_checkpoint(tmp_path, before, after, field):
    claim(tmp_path, before)
    with claimed_workdir(tmp_path, after, force=True):
        pass
    with claimed_workdir(tmp_path, before, force=True):
        (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    with pytest.raises(UserError) as raised, claimed_workdir(tmp_path, after, force=True):
        pass
    assert raised.value.field == field
    claim(tmp_path, before)


def test_two_runs_cannot_use_one_workdir_at_once(tmp_path):
    with claimed_workdir(tmp_path, Experiment()):
        with pytest.raises(UserError) as raised:
            claim(tmp_path, Experiment())
        assert raised.value.field == "--workdir"
    claim(tmp_path, Experiment())


def test_several_scoring_processes_can_use_one_workdir(tmp_path):
    first, second = (Experiment(task="score", data=DataConfig(shard=f"{i}/2")) for i in range(2))
    with claimed_workdir(tmp_path, first):
        claim(tmp_path, second)


OLD_CONFIG = {"seed": 0, "policy.path": "configs/tiny", "data.kept_share": 0.2}


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("config.json", OLD_CONFIG, "format 1 (written by an older rpt_jax)"),
        (
            RUN_CONFIG,
            {"format": FORMAT + 1, "version": "9.9.9", "config": {}},
            f"format {FORMAT + 1} (written by rpt_jax 9.9.9)",
        ),
        (RUN_CONFIG, {"format": "x", "version": "0.0.1", "config": {}}, "format x (written by rpt_jax 0.0.1)"),
    ],
)
def test_a_run_of_another_format_is_refused(tmp_path, name, content, found):
    (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    with pytest.raises(UserError) as raised:
        claim(tmp_path, Experiment())
    text = str(raised.value)
    assert text.startswith(f"{tmp_path / name} has {found}, but ") and f"reads format {FORMAT} only" in text
    assert raised.value.field == "--workdir" and "Choose another --workdir" in text
    assert json.loads((tmp_path / name).read_text()) == content
    with pytest.raises(UserError, match="has format"):
        read_run_config(tmp_path)
    assert is_run_directory(tmp_path)


def test_the_config_of_a_model_is_not_mistaken_for_a_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert not is_run_directory(tmp_path)
    claim(tmp_path, Experiment())
    assert is_run_directory(tmp_path) and read_run_config(tmp_path)["seed"] == 0


def finish(workdir: Path, steps: int, checkpoints: tuple[int, ...]) -> None:
    """Leave what a finished run leaves."""
    claim(workdir, Experiment(training=TrainingConfig(total_steps=steps)))
    for step in checkpoints:
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    (workdir / "result.json").write_text(json.dumps({**format_stamp(), "steps": steps, "flops": 1e9, "seconds": 60.0}))
    (workdir / "policy").mkdir()
    (workdir / "policy" / "config.json").write_text("{}")


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    finish(tmp_path, 5, checkpoints=(4, 5))
    assert finished_steps(tmp_path) == 5
    claim(tmp_path, Experiment(training=TrainingConfig(total_steps=7)))
    assert finished_steps(tmp_path) is None and json.loads((tmp_path / "result_5.json").read_text())["steps"] == 5
    assert not (tmp_path / "policy").exists() and (tmp_path / "policy_5" / "config.json").is_file()
    assert read_run_config(tmp_path)["training.total_steps"] == 7


@pytest.mark.parametrize(("checkpoints", "steps"), [((4, 5), 4), ((4,), 4), ((), 7)])
def test_a_finished_run_is_neither_shortened_nor_started_again(tmp_path, checkpoints, steps):
    """With fewer steps, and with more but no checkpoint, nothing is changed."""
    finish(tmp_path, 5, checkpoints)
    before = (tmp_path / RUN_CONFIG).read_bytes()
    with pytest.raises(UserError) as raised:
        claim(tmp_path, Experiment(training=TrainingConfig(total_steps=steps)))
    assert raised.value.field == "training.total_steps"
    assert (tmp_path / RUN_CONFIG).read_bytes() == before and finished_steps(tmp_path) == 5


def test_an_unfinished_run_is_not_shortened_below_its_checkpoint(tmp_path):
    claim(tmp_path, Experiment())
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    with pytest.raises(UserError) as raised:
        claim(tmp_path, Experiment(training=TrainingConfig(total_steps=19)))
    assert raised.value.field == "training.total_steps" and read_run_config(tmp_path)["training.total_steps"] == 1000
    claim(tmp_path, Experiment(training=TrainingConfig(total_steps=20)))


def test_a_result_without_its_number_of_steps_is_refused(tmp_path):
    finish(tmp_path, 5, checkpoints=(5,))
    for content in (b"", b"[3]", b'{"steps": 5', json.dumps(format_stamp()).encode()):
        (tmp_path / "result.json").write_bytes(content)
        with pytest.raises(UserError) as raised:
            claim(tmp_path, Experiment(training=TrainingConfig(total_steps=5)))
        assert raised.value.field == "--workdir"
