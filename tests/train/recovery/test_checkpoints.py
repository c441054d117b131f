"""Which checkpoints are written and stay, and what a run goes on from when one is damaged."""

import contextlib
import gc
import logging
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1

from tests.train.recovery.small_run import STEPS, arrays, assert_same, make, train
from train import log
from train.recovery import resume
from train.recovery.checkpoints import Checkpoints
from train.recovery.config import Every, read_every

pytestmark = pytest.mark.usefixtures("jax_defaults")


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir())


@pytest.mark.parametrize(
    ("text", "every"),
    [("500", Every(500)), ("30s", Every(0, 30.0)), ("10m", Every(0, 600.0)), ("1.5h", Every(0, 5400.0))],
)
def test_how_often(text, every):
    assert read_every(text) == every
    assert read_every(str(every)) == every


@pytest.mark.parametrize("text", ["", "0", "0m", "-5", "5x", "1.5", "m", "5 m"])
def test_how_often_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match=r"expected a number of steps, such as 500.*30s, 10m"):
        read_every(text)


def test_steps_and_time_that_are_due(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "never") as never, Checkpoints(tmp_path / "steps", every=Every(3)) as steps:
        assert [step for step in range(1, 10) if steps.is_due(step)] == [3, 6, 9]
        assert not any(never.is_due(step) for step in range(10))
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    freezer = make()
    with Checkpoints(tmp_path / "time", every=Every(seconds=60)) as timed:
        now = 59.0
        assert not timed.is_due(1)
        now = 61.0
        assert timed.is_due(1)
        timed.save(freezer)
        now = 120.0
        assert not timed.is_due(2)


def test_the_newest_and_the_best_stay(tmp_path):
    freezer, figures = make(), {1: 0.5, 3: 0.9, 5: 0.1}

    def checkpoints():
        return Checkpoints(tmp_path / "run", keep_last=2, keep_best=1, figure="accuracy")

    with checkpoints() as first:
        for step in range(1, 5):
            train(freezer, step)
            first.save(freezer, {"accuracy": figures[step]} if step in figures else None)
            first.save(freezer)  # of the same step: nothing
    assert steps_in(tmp_path / "run") == [3, 4]
    # Of a run that was killed while it wrote one, and while it removed one.
    (tmp_path / "run/00000009.orbax-checkpoint-tmp-1").mkdir()
    (tmp_path / "run/00000002/state").mkdir(parents=True)
    with checkpoints() as second:
        for step in range(5, 8):
            train(freezer, step)
            second.save(freezer, {"accuracy": figures[step]} if step in figures else None)
    assert steps_in(tmp_path / "run") == [3, 6, 7]


def begun(out):
    """A run with checkpoints after 4 and 8 steps, at its end, and what it is there; its log."""
    freezer = make()
    with log.Log(out / "log.jsonl", log.Run("static_prefix", freezer.layers.names)) as history:
        with Checkpoints(out / "checkpoints", keep_last=2) as checkpoints:
            for step in (4, 8):
                train(freezer, step, history)
                checkpoints.save(freezer)
        train(freezer, STEPS, history)
    return arrays(freezer)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return begun(tmp_path_factory.mktemp("run"))


def truncated(checkpoint):
    largest = max(checkpoint.glob("state/d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-40])


def flipped(checkpoint):
    largest = max(checkpoint.glob("state/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))


def foreign(checkpoint):
    shutil.rmtree(checkpoint)
    v1.save(str(checkpoint), {"weights": jnp.ones(3)})


def emptied(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.unlink()


@pytest.fixture
def left_behind():
    """Where a read or a write fails, Orbax leaves others running, which end in warnings: they are waited for."""
    yield
    time.sleep(1)
    gc.collect()


def _leaves_behind(test):
    """Marks a test in which a read or a write of Orbax fails."""
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return ignored(pytest.mark.usefixtures("left_behind")(test))


@_leaves_behind
@pytest.mark.parametrize("damage", [None, truncated, flipped, foreign, emptied])
def test_a_run_goes_on_from_the_newest_that_is_sound(tmp_path, ended, damage):
    assert_same(begun(tmp_path), ended)
    newest, earlier = tmp_path / "checkpoints/00000008", tmp_path / "checkpoints/00000004"
    if damage is not None:
        damage(newest)
    freezer, said = make(), []
    history = resume.restore_newest(freezer, tmp_path, resume.read_started(tmp_path, {}, print), said.append)
    assert freezer.steps == len(history.steps) == (8 if damage is None else 4)
    if damage is not None:
        assert said[0].startswith("warning: path: ")
        assert f"it is put aside into {tmp_path / 'damaged/00000008-0'}" in said[0]
        assert not newest.exists()
        assert earlier.exists()
    train(freezer, STEPS)
    assert_same(arrays(freezer), ended)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(freezer)  # there is room for one of that step
    assert steps_in(tmp_path / "checkpoints") == [STEPS]


@_leaves_behind
def test_where_none_is_sound_nothing_is_moved(tmp_path):
    begun(tmp_path)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        flipped(checkpoint)
    started = resume.read_started(tmp_path, {}, print)
    with pytest.raises(ValueError, match=r"path: .*00000008 is not a complete checkpoint"):
        resume.restore_newest(make(), tmp_path, started, pytest.fail)
    assert steps_in(tmp_path / "checkpoints") == [4, 8]


def test_a_log_that_lost_lines_goes_back_to_what_it_has(tmp_path, ended):
    begun(tmp_path)
    file = tmp_path / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7]))  # the run, and six steps
    freezer = make()
    history = resume.restore_newest(freezer, tmp_path, resume.read_started(tmp_path, {}, print), lambda text: None)
    assert freezer.steps == len(history.steps) == 4


def test_what_is_not_finite_is_not_saved_and_takes_the_place_of_nothing(tmp_path):
    freezer = make()
    with Checkpoints(tmp_path / "run", keep_last=1) as checkpoints:
        train(freezer, 2)
        checkpoints.save(freezer)
        train(freezer, 3)
        params = nnx.state(freezer.model, nnx.Param)
        nnx.update(freezer.model, jax.tree.map(lambda leaf: leaf.at[0].set(np.nan), params))
        with pytest.raises(FloatingPointError, match=r"after step 3, .*'model'.* not finite.*of step 2, is kept"):
            checkpoints.save(freezer)
    assert steps_in(tmp_path / "run") == [2]


@contextlib.contextmanager
def no_room(most):
    """Within it, no file of this process grows beyond some bytes; what pytest catches of the output is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    logging.disable()
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        logging.disable(logging.NOTSET)


@_leaves_behind
@pytest.mark.parametrize("most", [0, 300, 1500])
def test_where_there_is_no_room_it_says_so_and_earlier_checkpoints_stay(tmp_path, most):
    freezer = make()
    with Checkpoints(tmp_path / "run", keep_last=1) as checkpoints:
        train(freezer, 2)
        checkpoints.save(freezer)
        checkpoints.wait()
        train(freezer, 3)
        expected = r"could not be written to .*(?s:.*)File too large.*of step 2, is kept"
        with pytest.raises(OSError, match=expected), no_room(most):  # noqa: PT012
            checkpoints.save(freezer)
            checkpoints.wait()
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()] == ["00000002"]
    restored = make()
    restored.restore(tmp_path / "run/00000002")
    assert restored.steps == 2


@_leaves_behind
def test_a_folder_that_is_gone_is_told(tmp_path):
    freezer = make()

    def run():
        with Checkpoints(tmp_path / "run", keep_last=1) as checkpoints:
            train(freezer, 1)
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").write_text("")
            checkpoints.save(freezer)
            checkpoints.wait()

    with pytest.raises(OSError, match=r"could not be written to .*see that the folder is there"):
        run()
