"""Checkpoints: restored exactly or refused, whatever part of them is damaged."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import OptimizerConfig
from rpt_jax.errors import UserError
from rpt_jax.infra.checkpoint import Checkpointer, open_parameters
from rpt_jax.infra.optimizer import make_optimizer
from rpt_jax.infra.run_format import FORMAT
from rpt_jax.objective.update import TrainState
from tests.helpers.processes import CHILD_SECONDS

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
    """Return a workdir with checkpoints of steps 2 and 4; that of step 1 was deleted for them."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(workdir, 2, make_state(0))
    for step in (1, 2, 4):
        checkpointer.stage(step, make_state(step), RUN | {"step": step})
        checkpointer.save()
    checkpointer.close()
    return workdir


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def restore(workdir: Path, state: TrainState, frozen=None):
    checkpointer = Checkpointer(workdir, 2, state, frozen)
    try:
        return checkpointer.restore()
    finally:
        checkpointer.close()


def contents(workdir: Path) -> dict[str, str]:
    files = (path for path in workdir.rglob("*") if path.is_file())
    return {str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_state_is_restored_bit_for_bit(saved):
    step, state, run = restore(saved, make_state(0))
    assert step == 4 and run == RUN | {"step": 4}
    assert same(state, make_state(4)) and isinstance(state, TrainState)


def test_single_parameters_are_read_or_refused(saved):
    step, read = open_parameters(saved, None)
    assert step == 4
    np.testing.assert_array_equal(read(("layers", "q")), make_state(4).params["layers"]["q"])
    with pytest.raises(UserError, match=r"it has no parameter layers\.k") as raised:
        read(("layers", "k"))
    assert raised.value.field == "--workdir"


def test_old_checkpoints_are_deleted(saved):
    assert sorted(path.name for path in (saved / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "4"]


def test_without_a_checkpoint_nothing_is_restored(tmp_path):
    assert restore(tmp_path, make_state(0)) is None


def test_a_state_beside_other_frozen_arrays_is_refused(tmp_path):
    """It belongs to the arrays that it was trained with, which are not in the checkpoint."""
    frozen = {"q": jnp.arange(3.0)}
    checkpointer = Checkpointer(tmp_path, 2, make_state(0), frozen)
    checkpointer.stage(1, make_state(1), RUN)
    checkpointer.save()
    checkpointer.close()
    _, state, _ = restore(tmp_path, make_state(0), frozen)
    assert same(state, make_state(1))
    for other in ({"q": jnp.arange(3.0) + 1e-6}, None):
        with pytest.raises(UserError) as raised:
            restore(tmp_path, make_state(0), other)
        assert raised.value.field == "policy.path"


def test_a_save_copies_the_state_before_it_is_donated(copy):
    """A step that donates the state does not affect the write in the background."""
    checkpointer = Checkpointer(copy, 2, make_state(0))
    _, state, run = checkpointer.restore()
    checkpointer.stage(5, state, run | {"step": 5})
    checkpointer.save()
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    checkpointer.close()
    step, state, run = restore(copy, make_state(0))
    assert step == run["step"] == 5 and same(state, make_state(4))


def test_an_uncommitted_checkpoint_is_ignored(copy):
    """A run that is killed while writing leaves one."""
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


# When one read fails, orbax abandons the others, which causes warnings.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["empty", "half", "flipped"])
def test_a_damaged_checkpoint_is_reported_and_set_aside(saved, tmp_path, caplog, kind):
    """Each file in turn is damaged: either the state is intact, or the checkpoint before it is used and the damaged one kept."""
    set_aside = set()
    for number, victim in enumerate(damaged_files(saved)):
        workdir = Path(shutil.copytree(saved, tmp_path / str(number)))
        path = workdir / victim.relative_to(saved)
        damage(kind, path)
        before = contents(workdir)
        step, state, run = restore(workdir, make_state(0))
        assert same(state, make_state(step)) and run == RUN | {"step": step}, victim
        said = "\n".join(record.message for record in caplog.records if record.name.startswith("rpt_jax."))
        caplog.clear()
        if step == 4:
            # The state does not depend on this file.
            assert contents(workdir) == before and not said, victim
        else:
            assert step == 2 and "checkpoint of step 4 is damaged" in said and str(workdir / "damaged" / "4-0") in said
            moved = {name.replace("checkpoints/4/", "damaged/4-0/"): digest for name, digest in before.items()}
            assert contents(workdir) == moved, victim
            set_aside.add(path.parent.name if path.name == "metadata" else path.name)
    assert len(set_aside) >= 3, set_aside


def test_flipped_bits_in_large_arrays_are_detected(tmp_path):
    """The largest file holds the numbers themselves, whose format has no checksum of its own."""
    state = {"embedding": jax.random.normal(jax.random.key(0), (64, 256))}
    checkpointer = Checkpointer(tmp_path / "good", 2, state)
    for step in (1, 2):
        checkpointer.stage(step, state, {})
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


@pytest.mark.parametrize("item", ["state", "run"])
def test_a_checkpoint_without_one_of_its_items_is_set_aside(copy, item):
    shutil.rmtree(copy / "checkpoints" / "4" / item)
    step, state, _ = restore(copy, make_state(0))
    assert step == 2 and same(state, make_state(2)) and (copy / "damaged" / "4-0").is_dir()


def save_until_it_fails(checkpointer: Checkpointer) -> None:
    """Save as a loop does: an error is raised by the save itself, or in a later step."""
    checkpointer.save()
    end = time.monotonic() + CHILD_SECONDS
    while time.monotonic() < end:
        checkpointer.check_writes()
        time.sleep(0.01)


@pytest.mark.parametrize("cause", ["vanished", "full"])
def test_a_failed_write_is_raised_in_a_later_step(tmp_path, cause):
    state = {"embedding": jax.random.normal(jax.random.key(0), (512, 256))}
    checkpointer = Checkpointer(tmp_path, 2, state)
    checkpointer.stage(1, state, RUN)
    checkpointer.save()
    checkpointer.check_writes()
    while not (tmp_path / "checkpoints" / "1").exists():
        time.sleep(0.01)
    checkpointer.stage(2, state, RUN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if cause == "full":  # Like a full disk: files cannot grow.
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        else:
            (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
            (tmp_path / "checkpoints").write_text("in the way")
        with pytest.raises(OSError, match="a checkpoint could not be written .*the one before it remains"):
            save_until_it_fails(checkpointer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if cause == "vanished":
        (tmp_path / "checkpoints").unlink()
        (tmp_path / "elsewhere").rename(tmp_path / "checkpoints")
    step, restored, _ = restore(tmp_path, state)
    assert step == 1 and same(restored, state)


def test_a_checkpoint_with_other_parameters_is_refused(copy):
    before, more = contents(copy), make_state(0)
    more.params["layers"]["k"] = jnp.ones(2)
    with pytest.raises(
        UserError, match=f"{copy / 'checkpoints' / '4'} is damaged, or it belongs to another model"
    ) as raised:
        restore(copy, more)
    assert raised.value.field == "--workdir"
    assert contents(copy) == before


def test_a_checkpoint_with_another_shape_is_refused(tmp_path):
    """It is neither cropped nor padded. (With several arrays, orbax would abandon reads and warn about it.)"""
    checkpointer = Checkpointer(tmp_path, 1, {"width": jnp.ones(5)})
    checkpointer.stage(3, {"width": jnp.ones(5)}, {})
    checkpointer.save()
    checkpointer.close()
    for size in (4, 6):
        with pytest.raises(
            UserError, match=f"{tmp_path / 'checkpoints' / '3'} is damaged, or it belongs to another model"
        ):
            restore(tmp_path, {"width": jnp.ones(size)})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_truncated_large_array_is_refused(tmp_path):
    """Orbax stores large arrays in separate files, and reports their loss with another exception than for small ones."""
    state = {"embedding": jax.random.normal(jax.random.key(0), (512, 256))}
    checkpointer = Checkpointer(tmp_path, 1, state)
    checkpointer.stage(3, state, {})
    checkpointer.save()
    checkpointer.close()
    largest = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, 300_000)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path / 'checkpoints' / '3'} is damaged") as raised:
        restore(tmp_path, state)
    assert raised.value.field == "--workdir"
    assert contents(tmp_path) == before


def test_a_checkpoint_of_an_older_format_is_refused(copy):
    """Format 1 had no format number, and called the checksums marks."""
    before = make_state(0)
    path = copy / "checkpoints" / "4" / "run" / "metadata"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"run": content["run"], "marks": content["checksums"]}))
    files = contents(copy)
    with pytest.raises(
        UserError, match=rf"checkpoints/4 has format 1 .* reads format {FORMAT} only. Choose another --work"
    ):
        restore(copy, before)
    assert contents(copy) == files, "nothing is moved or deleted"
