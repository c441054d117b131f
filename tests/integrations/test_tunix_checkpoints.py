"""What the policy knows, beside the checkpoints of a trainer that is like Tunix's, which need not be installed."""

import os
import types

import jax
import pytest

from smartfrz_jax.integrations.tunix_checkpoints import Checkpoints
from smartfrz_jax.pytrees.file_paths import as_path
from tests.support.buckets import buckets


@pytest.fixture(params=["local", "bucket"])
def root(request, tmp_path, monkeypatch):
    """The trainer's own folder; what is beside it lies in ``tmp_path / "bucket"`` either way."""
    monkeypatch.chdir(tmp_path)
    with buckets(tmp_path) as bucket:
        yield f"{bucket}/run" if request.param == "bucket" else str(tmp_path / "bucket/run")


class Manager:
    """Keeps the last two steps."""

    def __init__(self, steps=()):
        self.steps, self._checkpoint_manager = list(steps), self

    def should_save(self, step):
        return True

    def all_steps(self):
        return self.steps

    def save(self, step, *args, **options):
        self.steps = sorted({*self.steps, step})[-2:]
        return True


class Freezer:
    """Saves folders with nothing in them."""

    frozen, steps, optimizer, restored = "its own", 0, types.SimpleNamespace(frozen="its own"), None

    def adopt(self, frozen):
        pass

    def save_run(self, path, run, *, overwrite):
        as_path(path).mkdir(parents=True)

    def restore_run(self, path, run):
        self.restored = os.fspath(path)


def checkpoints(root, freezer, *, steps=(), done=0):
    config = types.SimpleNamespace(checkpoint_root_directory=root)
    trainer = types.SimpleNamespace(checkpoint_manager=Manager(steps), config=config, train_steps=done)
    return Checkpoints(trainer, freezer, None)


@pytest.mark.parametrize(("process", "left"), [(0, ["2", "3"]), (1, ["1", "2", "3"])])
def test_folders_of_steps_that_the_trainer_has_dropped_go_on_the_first_process(
    root, tmp_path, monkeypatch, process, left
):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    ours = checkpoints(root, Freezer())
    assert all(ours.save(step, None) for step in (1, 2, 3))
    assert sorted(os.listdir(tmp_path / "bucket/run-freezing")) == left


def test_a_run_goes_on_from_the_folder_of_its_step(root):
    checkpoints(root, Freezer()).save(3, None)
    there, new = Freezer(), Freezer()
    checkpoints(f"{root}/", there, done=3).restore()
    assert there.restored == f"{root}-freezing/3"
    assert checkpoints(root, new, done=4).restore() == "its own"
    assert (new.restored, new.steps) == (None, 4)


def test_a_step_that_was_saved_without_a_policy_has_no_folder(root, tmp_path):
    assert checkpoints(root, Freezer(), steps=[3]).save(3, None, force=True)
    assert not (tmp_path / "bucket/run-freezing").exists()
