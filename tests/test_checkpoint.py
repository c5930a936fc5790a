"""Checkpoints that come back whole or not at all, workdirs that belong to one config, and the optimiser's arithmetic."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rpt_jax.config import Experiment, OptimizerConfig, TrainingConfig
from rpt_jax.errors import UserError
from rpt_jax.infra.checkpoint import CONFIG, Checkpointer, abstract, claimed_workdir
from rpt_jax.infra.optimizer import make_optimizer, make_schedule
from rpt_jax.objective.update import TrainState

# --- the optimiser -----------------------------------------------------------------------------------


def test_constant_schedule_with_and_without_warmup():
    schedule = make_schedule(OptimizerConfig(learning_rate=0.3), 100)
    np.testing.assert_allclose([schedule(step) for step in (0, 1, 99, 500)], 0.3)
    schedule = make_schedule(OptimizerConfig(learning_rate=0.3, warmup_steps=10), 100)
    rates = [schedule(step) for step in (0, 1, 5, 10, 11, 99)]
    np.testing.assert_allclose(rates, [0, 0.03, 0.15, 0.3, 0.3, 0.3], rtol=1e-6)


def test_cosine_schedule_ends_at_a_tenth():
    for warmup in (0, 20):
        config = OptimizerConfig(learning_rate=0.3, warmup_steps=warmup, schedule="cosine")
        schedule, middle = make_schedule(config, 100), (100 + warmup) // 2
        np.testing.assert_allclose([schedule(step) for step in (warmup, middle, 100)], [0.3, 0.165, 0.03], rtol=1e-5)
        assert all(schedule(step) > schedule(step + 1) for step in range(warmup, 100))


def test_adamw_by_hand():
    """Three steps of the textbook in NumPy: a clipped global norm, bias correction, decoupled weight decay."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.05, max_grad_norm=0.2, epsilon=1e-3)
    optimizer, rng = make_optimizer(config, 10), np.random.default_rng(0)
    params = {"a": rng.standard_normal(3, np.float32), "b": rng.standard_normal((2, 2), np.float32)}
    state, ours = optimizer.init(params), params
    m = v = {name: 0.0 for name in params}
    for step in (1, 2, 3):
        scale = np.float32(0.01 if step == 2 else 1)
        grads = {name: scale * rng.standard_normal(x.shape, np.float32) for name, x in params.items()}
        updates, state = optimizer.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert (norm < 0.2) == (step == 2)
        clipped = {name: g * min(1, 0.2 / norm) for name, g in grads.items()}
        m = {name: config.beta1 * m[name] + (1 - config.beta1) * g for name, g in clipped.items()}
        v = {name: config.beta2 * v[name] + (1 - config.beta2) * g**2 for name, g in clipped.items()}
        for name, x in params.items():
            mean, square = m[name] / (1 - config.beta1**step), v[name] / (1 - config.beta2**step)
            params[name] = x - 0.1 * (mean / (np.sqrt(square) + 1e-3) + 0.05 * x)
            np.testing.assert_allclose(ours[name], params[name], rtol=1e-4, atol=1e-6)


# --- the workdir -------------------------------------------------------------------------------------


def claim(workdir: Path, experiment: Experiment) -> None:
    with claimed_workdir(workdir, experiment):
        pass


def test_a_workdir_belongs_to_one_config(tmp_path):
    experiment, workdir = Experiment(seed=3), tmp_path / "a" / "b"
    claim(workdir, experiment)
    written = (workdir / CONFIG).read_text()
    claim(workdir, Experiment(seed=3))
    assert (workdir / CONFIG).read_text() == written and json.loads(written)["training.total_steps"] == 1000
    other = dataclasses.replace(experiment, training=TrainingConfig(total_steps=7))
    with pytest.raises(UserError, match=r"training.total_steps: 1000 there, 7 now.*another --workdir"):
        claim(workdir, other)
    assert (workdir / CONFIG).read_text() == written
    assert [path.name for path in workdir.iterdir()] == [CONFIG]


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
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


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


# --- checkpoints -------------------------------------------------------------------------------------

RUN = {"stream": {"next_index": 37, "nested": [1, 2.5, None]}, "counters": {"tokens": 2**40}, "fingerprint": "ab12"}


def make_state(seed: int) -> TrainState:
    rng = np.random.default_rng(seed)
    params = {"layers": {"q": jnp.asarray(rng.standard_normal((2, 5)), jnp.float32)}, "norm": jnp.ones(3)}
    return TrainState(params, make_optimizer(OptimizerConfig(), 10).init(params))


def same(ours, theirs) -> bool:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, ours, theirs))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Return a workdir with checkpoints of steps 2 and 4; that of step 1 has made way for them."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(workdir, keep=2)
    for step in (1, 2, 4):
        checkpointer.save(step, make_state(step), RUN | {"step": step})
    checkpointer.close()
    return workdir


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def restore(workdir: Path, state: TrainState):
    checkpointer = Checkpointer(workdir, keep=2)
    try:
        return checkpointer.restore(abstract(state))
    finally:
        checkpointer.close()


def contents(workdir: Path) -> dict[str, str]:
    files = (path for path in workdir.rglob("*") if path.is_file())
    return {str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_was_saved_comes_back_bit_for_bit(saved):
    step, state, run = restore(saved, make_state(0))
    assert step == 4 and run == RUN | {"step": 4}
    assert same(state, make_state(4)) and isinstance(state, TrainState)


def test_only_so_many_are_kept(saved):
    assert sorted(path.name for path in (saved / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "4"]


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path, make_state(0)) is None


def test_what_is_saved_later_is_what_comes_back(copy):
    """Restored, changed by a donating step, saved again: the write in the background has its own copy."""
    checkpointer = Checkpointer(copy, keep=2)
    _, state, run = checkpointer.restore(abstract(make_state(0)))
    checkpointer.save(5, state, run | {"step": 5})
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    checkpointer.close()
    step, state, run = restore(copy, make_state(0))
    assert step == run["step"] == 5 and same(state, make_state(4))


def test_a_checkpoint_that_was_never_committed_does_not_count(copy):
    """What a run leaves behind that is killed while it writes."""
    unfinished = copy / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / "4", unfinished)
    shutil.rmtree(unfinished / "run")
    step, state, _ = restore(copy, make_state(0))
    assert step == 4 and same(state, make_state(4))


def damaged_files(saved: Path) -> list[Path]:
    """Return every file of the newest checkpoint, largest first."""
    files = [path for path in (saved / "checkpoints" / "4").rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


# Where one read fails, orbax drops the others, and what is left of them complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_was_cut_short_is_refused_and_left_alone(saved, tmp_path):
    """Each of its files in turn, emptied or cut in half: an error that names the directory, or the state as it was."""
    refused, expected = set(), make_state(4)
    for number, victim in enumerate(damaged_files(saved)):
        for keep in (0.0, 0.5):
            workdir = Path(shutil.copytree(saved, tmp_path / f"{number}-{keep}"))
            path = workdir / victim.relative_to(saved)
            os.truncate(path, int(path.stat().st_size * keep))
            before = contents(workdir)
            try:
                step, state, run = restore(workdir, make_state(0))
            except UserError as error:
                assert str(workdir / "checkpoints" / "4") in str(error) and "damaged" in str(error)
                refused.add(path.parent.name if path.name == "metadata" else path.name)
            else:
                # Files that the state does not depend on, such as orbax's notes.
                assert step == 4 and same(state, expected) and run == RUN | {"step": 4}, victim
            assert contents(workdir) == before, victim
    assert len(refused) >= 3, refused


def test_the_older_checkpoint_serves_where_the_newer_is_moved_away(copy):
    """As the message on a damaged one says."""
    shutil.move(copy / "checkpoints" / "4", copy / "damaged")
    step, state, run = restore(copy, make_state(0))
    assert step == run["step"] == 2 and same(state, make_state(2))


@pytest.mark.parametrize("part", ["state", "run"])
def test_a_checkpoint_without_one_of_its_parts(copy, part):
    shutil.rmtree(copy / "checkpoints" / "4" / part)
    with pytest.raises(UserError, match=f"{copy / 'checkpoints' / '4'} is damaged"):
        restore(copy, make_state(0))


def test_a_checkpoint_of_other_parameters(copy):
    before, more = contents(copy), make_state(0)
    more.params["layers"]["k"] = jnp.ones(2)
    with pytest.raises(UserError, match=f"{copy / 'checkpoints' / '4'} is damaged or not this run's"):
        restore(copy, more)
    assert contents(copy) == before


def test_a_checkpoint_of_another_shape(tmp_path):
    """Refused, not cut or filled up with zeros. One array: orbax would drop its reads of others, and complain of that."""
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(3, {"width": jnp.ones(5)}, {})
    checkpointer.close()
    for size in (4, 6):
        with pytest.raises(UserError, match=f"{tmp_path / 'checkpoints' / '3'} is damaged or not this run's"):
            restore(tmp_path, {"width": jnp.ones(size)})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cut_inside_the_numbers_of_a_large_array(tmp_path):
    """Small arrays lie inside orbax's index; large ones in files of their own, whose loss it reports in another way."""
    state = {"embedding": jax.random.normal(jax.random.key(0), (512, 256))}
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(3, state, {})
    checkpointer.close()
    largest = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, 300_000)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path / 'checkpoints' / '3'} is damaged"):
        restore(tmp_path, state)
    assert contents(tmp_path) == before
