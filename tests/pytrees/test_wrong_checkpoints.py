"""Whoever restores a checkpoint that is not theirs, or is damaged, is told so, and nothing has changed."""

import dataclasses
import shutil

import jax
import numpy as np
import orbax.checkpoint as orbax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax import freezeout
from tests.bad_input import scenes

pytestmark = pytest.mark.usefixtures("jax_defaults")


def params(width=2):
    return {name: {"kernel": np.full((width, width), 0.5, np.float32)} for name in "abc"}


def named(layers, rename):
    """The layers, the last one perhaps under another name."""
    *others, last = layers
    return sfj.Layers((*others, dataclasses.replace(last, name="other"))) if rename else layers


class Bare:
    """A loop that keeps its parameters itself."""

    def __init__(self, policy, width=2, rename=False):
        self.arrays = params(width)
        self.freezer = sfj.Freezer(policy, named(scenes.layers(), rename), self.arrays)

    def save(self, path):
        self.freezer.save_run(path, self.arrays)

    def restore(self, path):
        self.arrays = self.freezer.restore_run(path, self.arrays)


class Linen:
    def __init__(self, policy, width=2, rename=False):
        self.state = scenes.train_state(layers=named(scenes.layers(), rename), params=params(width))
        self.freezer = sfj.linen.Freezer(self.state, policy)

    @property
    def arrays(self):
        return self.state

    def save(self, path):
        self.freezer.save(path, self.state)

    def restore(self, path):
        self.state = self.freezer.restore(path, self.state)


class OfNnx:
    def __init__(self, policy, width=2, rename=False):
        self.model = nnx.Sequential(*(nnx.Linear(width, width, rngs=nnx.Rngs(0)) for _ in range(2)))
        found = sfj.nnx.find_layers(self.model, np.ones((4, width), np.float32))
        optimizer = sfj.nnx.Optimizer(self.model, scenes.TX, layers=named(found, rename))
        self.freezer = sfj.nnx.Freezer(self.model, optimizer, policy)

    @property
    def arrays(self):
        return nnx.as_pure(nnx.state((self.model, self.freezer.optimizer)))

    def save(self, path):
        self.freezer.save(path)

    def restore(self, path):
        self.freezer.restore(path)


DOORS = {"bare": Bare, "linen": Linen, "nnx": OfNnx}


@pytest.fixture(scope="module", params=DOORS)
def door(request):
    return DOORS[request.param]


@pytest.fixture(scope="module")
def folder(door, tmp_path_factory):
    """Checkpoints of a run, and what is none of it."""
    root = tmp_path_factory.mktemp("checkpoints")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        door(freezeout(total_steps=100)).save(root / "run")
        door(freezeout(total_steps=100), width=3).save(root / "of other shapes")
        scenes.predictor().save(root / "of a predictor")
    orbax.PyTreeCheckpointer().save(root / "of something else", params())
    (root / "empty").mkdir()
    (root / "a file").write_text("not a checkpoint")
    for name, damage in DAMAGE.items():
        shutil.copytree(root / "run", root / name)
        file = root / name / "_CHECKPOINT_METADATA"
        file.write_bytes(damage(file.read_bytes()))
    return root


def flip(content: bytes) -> bytes:
    place = content.index(b'"steps"') + 1
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {"truncated": lambda content: content[: len(content) // 2], "flipped": flip, "emptied": lambda content: b""}


def refused(run, path, error, words):
    """Asserts that a run refuses a checkpoint and goes on as it was."""
    before, state = run.arrays, (run.freezer.frozen, run.freezer.steps, run.freezer.policy_state)
    with pytest.raises(error, match=rf"^path: .*{words}"):
        run.restore(path)
    assert (run.freezer.frozen, run.freezer.steps) == state[:2]
    jax.tree.map(np.testing.assert_array_equal, (run.arrays, run.freezer.policy_state), (before, state[2]))


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("nowhere", FileNotFoundError, "there is no directory .*nowhere; expected the checkpoint of a training run"),
        ("a file", FileNotFoundError, "there is no directory .*it is a file"),
        ("empty", ValueError, "not a complete checkpoint of a training run"),
        ("of a predictor", ValueError, "is not the checkpoint of a training run"),
        ("of something else", ValueError, "is not (a complete|the) checkpoint of a training run"),
        ("of other shapes", ValueError, r"does not fit: .* is float32\[3.*\] there, expected float32\[2"),
        ("truncated", ValueError, "is not (a complete|the) checkpoint of a training run"),
        ("flipped", ValueError, "its metadata are not those that were saved"),
        ("emptied", ValueError, "is not (a complete|the) checkpoint of a training run"),
    ],
)
def test_a_run_refuses_what_is_not_its_own(door, folder, name, error, words):
    refused(door(freezeout(total_steps=100)), folder / name, error, words)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (freezeout(total_steps=50), "saved with the policy 'freezeout' and total_steps=int 100, expected .*int 50"),
        (sfj.static_prefix([(0, 0.5)], total_steps=100), "expected name=str 'static_prefix'"),
        (freezeout(total_steps=100, t0=0.3), r"\(1 options differ\); make the policy as for the saved run"),
    ],
    ids=["length", "policy", "option"],
)
def test_a_run_of_another_policy_or_length_is_refused(door, folder, policy, words):
    refused(door(policy), folder / "run", ValueError, words)


def test_a_run_of_other_layers_is_refused(door, folder):
    words = r"was saved with (\d) layers, this network has \1; in only one of them: .*other"
    refused(door(freezeout(total_steps=100), rename=True), folder / "run", ValueError, words)


def test_a_run_is_restored(door, folder):
    """So that the others are refused for what is wrong with them."""
    run = door(freezeout(total_steps=100))
    run.freezer.steps = 7
    run.restore(folder / "run")
    assert run.freezer.steps == 0


@pytest.mark.parametrize("name", ["nowhere", "a file", "empty", "run", "of something else"])
def test_a_predictor_refuses_what_is_none(folder, name):
    error = FileNotFoundError if name in ("nowhere", "a file") else ValueError
    with pytest.raises(error, match=r"^path: .* a predictor"):
        sfj.Predictor.restore(folder / name)
