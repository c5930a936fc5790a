"""Workdirs that belong to one config and, at one time, to one process."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from rpt_jax.config import DataConfig, Experiment, MeshConfig, OptimizerConfig, PolicyConfig, TrainingConfig
from rpt_jax.errors import UserError
from rpt_jax.infra.workdir import CONFIG, claimed_workdir


def claim(workdir: Path, experiment: Experiment) -> None:
    with claimed_workdir(workdir, experiment):
        pass


def test_a_workdir_belongs_to_one_config(tmp_path):
    experiment, workdir = Experiment(seed=3), tmp_path / "a" / "b"
    claim(workdir, experiment)
    written = (workdir / CONFIG).read_text()
    claim(workdir, Experiment(seed=3))
    assert (workdir / CONFIG).read_text() == written and json.loads(written)["training.total_steps"] == 1000
    other = dataclasses.replace(experiment, training=TrainingConfig(prompts_per_step=7))
    with pytest.raises(
        UserError, match=r"training.prompts_per_step: 256 there, 7 now.*another --workdir, or add --force"
    ):
        claim(workdir, other)
    assert (workdir / CONFIG).read_text() == written
    assert sorted(path.name for path in workdir.iterdir()) == [CONFIG, "lock"]


def test_a_config_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device", str(tmp_path / CONFIG))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=f"--workdir={tmp_path} cannot be used .*No space left"):
            claim(tmp_path, Experiment())
    assert not (tmp_path / CONFIG).exists()
    claim(tmp_path, Experiment())
    assert json.loads((tmp_path / CONFIG).read_text())["seed"] == 0


def test_bad_input_before_anything_is_made_gives_the_workdir_up(tmp_path):
    with pytest.raises(UserError, match="no such corpus"), claimed_workdir(tmp_path, Experiment(seed=1)):
        raise UserError("no such corpus")
    claim(tmp_path, Experiment(seed=2))
    with pytest.raises(UserError, match="later"), claimed_workdir(tmp_path, Experiment(seed=2)):
        raise UserError("later")
    assert json.loads((tmp_path / CONFIG).read_text())["seed"] == 2, "an earlier run's config is not ours to remove"


@pytest.mark.parametrize("output", ["metrics.jsonl", "result.json", "checkpoints/20"])
def test_a_run_that_has_begun_keeps_its_workdir(tmp_path, output):
    with pytest.raises(UserError, match="damaged"), claimed_workdir(tmp_path, Experiment(seed=1)):
        (tmp_path / output).parent.mkdir(exist_ok=True)
        (tmp_path / output).write_text("")
        raise UserError("damaged")
    with pytest.raises(UserError, match="seed: 1 there, 2 now"):
        claim(tmp_path, Experiment(seed=2))


def test_what_nobody_says_the_origin_of_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    with pytest.raises(UserError, match=f"{tmp_path / 'metrics.jsonl'} is there.*another --workdir"):
        claim(tmp_path, Experiment())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "metrics.jsonl"]


def test_a_field_that_one_config_lacks_is_named(tmp_path):
    claim(tmp_path, Experiment())
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(fields | {"gone.field": 1}))
    with pytest.raises(UserError, match="gone.field: 1 there, None now"):
        claim(tmp_path, Experiment())
    (tmp_path / CONFIG).write_text(json.dumps({name: value for name, value in fields.items() if name != "seed"}))
    with pytest.raises(UserError, match="seed: None there, 0 now"):
        claim(tmp_path, Experiment())


@pytest.mark.parametrize("content", [b"", b'{"seed": 0', b"\xff\xfe", b"[]", b"3"])
def test_a_config_that_is_damaged(tmp_path, content):
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=f"{CONFIG} is damaged.*another --workdir"):
        claim(tmp_path, Experiment())
    assert (tmp_path / CONFIG).read_bytes() == content


@pytest.mark.parametrize("inside", ["", "inside", "two/inside"])
def test_a_workdir_that_cannot_be_made(tmp_path, inside):
    (tmp_path / "file").write_text("in the way")
    workdir = tmp_path / "file" / inside
    with pytest.raises(UserError, match=f"--workdir={workdir} cannot be used .*{tmp_path / 'file'}"):
        claim(workdir, Experiment())
    assert (tmp_path / "file").read_text() == "in the way"


def test_fields_that_may_change_and_those_that_may_with_force(tmp_path, capsys):
    claim(tmp_path, Experiment())
    training = TrainingConfig(total_steps=7, log_rollouts_every=3)
    longer = Experiment(training=training, mesh=MeshConfig(fsdp=2), policy=PolicyConfig(dtype="bfloat16"))
    claim(tmp_path, longer)
    assert "mesh.fsdp: 1 there, 2 now" in capsys.readouterr().out
    assert json.loads((tmp_path / CONFIG).read_text())["training.total_steps"] == 7, "what holds now is written"
    other = dataclasses.replace(longer, optimizer=OptimizerConfig(learning_rate=0.5), seed=4)
    with pytest.raises(UserError, match="optimizer.learning_rate: 1e-06 there, 0.5 now; seed: 0 there, 4 now"):
        claim(tmp_path, other)
    with claimed_workdir(tmp_path, other, force=True):
        pass
    claim(tmp_path, other)


def test_two_runs_in_one_workdir(tmp_path):
    with claimed_workdir(tmp_path, Experiment()):
        with pytest.raises(UserError, match=f"--workdir={tmp_path} is in use by another run"):
            claim(tmp_path, Experiment())
    claim(tmp_path, Experiment())


def test_shards_are_prepared_in_one_workdir_at_once(tmp_path):
    first, second = (Experiment(task="score", data=DataConfig(shard=f"{i}/2")) for i in range(2))
    with claimed_workdir(tmp_path, first):
        claim(tmp_path, second)
