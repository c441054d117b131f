"""A run of a small network with a freezing policy, its log, and its checkpoints."""

import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from train import log
from train.loop import make_step

X = np.random.default_rng(0).standard_normal((4, 8), np.float32)
TX = optax.adam(0.1)
STEPS = 12


def loss_fn(model, x):
    return (model(x) ** 2).mean()


STEP = sfj.TrainStep(make_step(loss_fn))


def make(returning="fresh"):
    """A freezer of a network of three layers, of which the first freezes after three steps."""
    model = nnx.Sequential(*[nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(3)])
    optimizer = sfj.nnx.Optimizer(model, TX, layers=sfj.nnx.find_layers(model, X), returning=returning)
    return sfj.nnx.Freezer(model, optimizer, sfj.static_prefix([(0.25, 0.4)], total_steps=STEPS), train_step=STEP)


def train(freezer, until, history=None):
    """Trains up to a step; the steps go to the log of a run, too."""
    while freezer.steps < until:
        loss = STEP(freezer.model, freezer.optimizer, X)
        freezer.step(loss=loss)
        if history is not None:
            history.add(log.Step(freezer.steps, float(loss), 1.0, 0.0, 0, 1.0, 1))


def arrays(freezer):
    return {name: np.asarray(array) for name, array in freezer.contents().state.items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
