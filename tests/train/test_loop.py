"""The training loop: what it logs of a step."""

import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from train.log import Log, Run
from train.loop import training


def loss_fn(model, x):
    return (model(x) ** 2).mean()


@pytest.mark.parametrize("predicted", [None, 7.0])
@pytest.mark.slow
def test_flops_are_those_of_the_program_or_as_predicted(tmp_path, jax_defaults, predicted):
    def train_step(model, optimizer, x):
        loss, grads = optimizer.value_and_grad(loss_fn)(model, x)
        optimizer.update(model, grads)
        return loss

    x = jnp.ones((4, 8))
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=sfj.nnx.find_layers(model, x))
    freezer, step = sfj.nnx.Freezer(model, optimizer, sfj.policies.never()), sfj.TrainStep(train_step)
    asked = []

    def flops(frozen):
        asked.append(frozen)
        return predicted

    with Log(tmp_path / "log.jsonl", Run("never", optimizer.frozen.layers.names)) as log:
        steps = training(log, model, optimizer, freezer, step, [(x,)] * 2, flops=flops if predicted else None)
        assert list(steps) == [1, 2]
    assert [one.flops for one in log.run.steps] == [predicted or step.programs[0].cost.flops] * 2
    assert set(asked) == ({optimizer.frozen} if predicted else set())
