"""Checkpoints that come back whole or not at all, workdirs that belong to one config, and the optimizer's arithmetic."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rpt_jax.config import OptimizerConfig
from rpt_jax.errors import UserError
from rpt_jax.infra.checkpoint import Checkpointer
from rpt_jax.infra.optimizer import make_optimizer, make_schedule
from rpt_jax.objective.update import TrainState
from tests.helpers.paths import ROOT

# --- the optimizer -----------------------------------------------------------------------------------


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
    checkpointer = Checkpointer(workdir, 2, make_state(0))
    for step in (1, 2, 4):
        checkpointer.hold(step, make_state(step), RUN | {"step": step})
        checkpointer.save()
    checkpointer.close()
    return workdir


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def restore(workdir: Path, state: TrainState):
    checkpointer = Checkpointer(workdir, 2, state)
    try:
        return checkpointer.restore()
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
    checkpointer = Checkpointer(copy, 2, make_state(0))
    _, state, run = checkpointer.restore()
    checkpointer.hold(5, state, run | {"step": 5})
    checkpointer.save()
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


def damage(kind: str, path: Path) -> None:
    data = bytearray(path.read_bytes())
    if kind == "flipped" and data:
        data[len(data) // 2] ^= 4
    elif kind == "half":
        del data[len(data) // 2 :]
    elif kind == "empty":
        data.clear()
    path.write_bytes(data)


# Where one read fails, orbax drops the others, and what is left of them complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["empty", "half", "flipped"])
def test_a_damaged_checkpoint_is_named_and_set_aside(saved, tmp_path, capsys, kind):
    """Each of its files in turn: the state as it was, or the checkpoint before it, and the damaged one kept."""
    set_aside = set()
    for number, victim in enumerate(damaged_files(saved)):
        workdir = Path(shutil.copytree(saved, tmp_path / str(number)))
        path = workdir / victim.relative_to(saved)
        damage(kind, path)
        before = contents(workdir)
        step, state, run = restore(workdir, make_state(0))
        assert same(state, make_state(step)) and run == RUN | {"step": step}, victim
        said = capsys.readouterr().out
        if step == 4:
            # Files that the state does not depend on, such as orbax's notes.
            assert contents(workdir) == before and not said, victim
        else:
            assert step == 2 and "checkpoint of step 4 is damaged" in said and str(workdir / "damaged" / "4-0") in said
            moved = {name.replace("checkpoints/4/", "damaged/4-0/"): digest for name, digest in before.items()}
            assert contents(workdir) == moved, victim
            set_aside.add(path.parent.name if path.name == "metadata" else path.name)
    assert len(set_aside) >= 3, set_aside


def test_every_flipped_bit_of_what_was_saved_is_noticed(tmp_path):
    """The largest file holds the numbers themselves, where no format complains of one that is another number."""
    state = {"embedding": jax.random.normal(jax.random.key(0), (64, 256))}
    checkpointer = Checkpointer(tmp_path / "good", 2, state)
    for step in (1, 2):
        checkpointer.hold(step, state, {})
        checkpointer.save()
    checkpointer.close()
    files = [path for path in (tmp_path / "good" / "checkpoints" / "2").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size).relative_to(tmp_path / "good")
    size, noticed = (tmp_path / "good" / largest).stat().st_size, 0
    for number in range(10):
        workdir = Path(shutil.copytree(tmp_path / "good", tmp_path / str(number)))
        data = bytearray((workdir / largest).read_bytes())
        data[number * size // 10 + 7] ^= 1 << number % 8
        (workdir / largest).write_bytes(data)
        step, restored, _ = restore(workdir, state)
        assert same(restored, state)
        noticed += step == 1
    assert noticed >= 8, noticed


@pytest.mark.parametrize("part", ["state", "run"])
def test_a_checkpoint_without_one_of_its_parts(copy, part):
    shutil.rmtree(copy / "checkpoints" / "4" / part)
    step, state, _ = restore(copy, make_state(0))
    assert step == 2 and same(state, make_state(2)) and (copy / "damaged" / "4-0").is_dir()


def save_until_it_fails(checkpointer: Checkpointer) -> None:
    """Save as a loop does: an error comes with the save itself, or with a later step."""
    checkpointer.save()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        checkpointer.check()
        time.sleep(0.01)


@pytest.mark.parametrize("cause", ["vanished", "full"])
def test_a_failed_write_surfaces_with_the_next_step(tmp_path, cause):
    state = {"embedding": jax.random.normal(jax.random.key(0), (512, 256))}
    checkpointer = Checkpointer(tmp_path, 2, state)
    checkpointer.hold(1, state, RUN)
    checkpointer.save()
    checkpointer.check()
    while not (tmp_path / "checkpoints" / "1").exists():
        time.sleep(0.01)
    checkpointer.hold(2, state, RUN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if cause == "full":  # Of what a disk without room does, the part that needs no disk: files stop growing.
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        else:
            (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
            (tmp_path / "checkpoints").write_text("in the way")
        with pytest.raises(OSError, match="a checkpoint could not be written .*the one before it stands"):
            save_until_it_fails(checkpointer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if cause == "vanished":
        (tmp_path / "checkpoints").unlink()
        (tmp_path / "elsewhere").rename(tmp_path / "checkpoints")
    step, restored, _ = restore(tmp_path, state)
    assert step == 1 and same(restored, state)


def test_a_checkpoint_of_other_parameters(copy):
    before, more = contents(copy), make_state(0)
    more.params["layers"]["k"] = jnp.ones(2)
    with pytest.raises(UserError, match=f"{copy / 'checkpoints' / '4'} is damaged or not this run's"):
        restore(copy, more)
    assert contents(copy) == before


def test_a_checkpoint_of_another_shape(tmp_path):
    """Refused, not cut or filled up with zeros. One array: orbax would drop its reads of others, and complain of that."""
    checkpointer = Checkpointer(tmp_path, 1, {"width": jnp.ones(5)})
    checkpointer.hold(3, {"width": jnp.ones(5)}, {})
    checkpointer.save()
    checkpointer.close()
    for size in (4, 6):
        with pytest.raises(UserError, match=f"{tmp_path / 'checkpoints' / '3'} is damaged or not this run's"):
            restore(tmp_path, {"width": jnp.ones(size)})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cut_inside_the_numbers_of_a_large_array(tmp_path):
    """Small arrays lie inside orbax's index; large ones in files of their own, whose loss it reports in another way."""
    state = {"embedding": jax.random.normal(jax.random.key(0), (512, 256))}
    checkpointer = Checkpointer(tmp_path, 1, state)
    checkpointer.hold(3, state, {})
    checkpointer.save()
    checkpointer.close()
    largest = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, 300_000)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path / 'checkpoints' / '3'} is damaged"):
        restore(tmp_path, state)
    assert contents(tmp_path) == before


def test_what_was_saved_on_one_mesh_comes_back_on_another(tmp_path):
    """Eight devices, then two, then one: the digests of a checkpoint do not depend on where its arrays lie."""
    for what, devices, fsdp, tensor in (("save", 8, 4, 2), ("restore", 2, 1, 2), ("restore", 1, 1, 1)):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        run = [sys.executable, "-m", "tests.helpers.checkpoint_child", what, str(tmp_path), str(fsdp), str(tensor)]
        done = subprocess.run(run, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, timeout=120)
        assert done.stdout == f"{what} {devices}\n", done.stderr
