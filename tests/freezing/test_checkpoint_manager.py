"""Checkpoints that Orbax's own manager writes beside the training loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from orbax.checkpoint import v1

import smartfrz_jax as sfj

pytestmark = pytest.mark.usefixtures("jax_defaults")
X = np.random.default_rng(0).standard_normal((4, 8), np.float32)
TX = optax.adam(0.1)


def train_step(model, optimizer, x):
    loss, grads = optimizer.value_and_grad(lambda model, x: (model(x) ** 2).mean())(model, x)
    optimizer.update(model, grads)
    return loss


def make():
    model = nnx.Sequential(*[nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(3)])
    optimizer = sfj.nnx.Optimizer(model, TX, layers=sfj.nnx.find_layers(model, X), returning="kept")
    step = sfj.TrainStep(train_step, donate=True)
    policy = sfj.static_prefix([(0.25, 0.4)], total_steps=8)
    return step, sfj.nnx.Freezer(model, optimizer, policy, train_step=step)


def train(run, steps):
    step, freezer = run
    for _ in range(steps):
        freezer.step(loss=step(freezer.model, freezer.optimizer, X))
    return jax.tree.map(np.asarray, freezer.contents().state)


def test_what_a_manager_saves_is_of_its_moment_though_donated_training_goes_on(tmp_path):
    run = make()
    saved = train(run, 4)
    freezer = run[1]
    assert freezer.frozen.names
    with v1.training.Checkpointer(tmp_path) as checkpointer:
        response = checkpointer.save_async(freezer.steps, **freezer.contents()._asdict())
        ended = train(run, 4)
        assert response.result()
        path = checkpointer.latest.path
    resumed = make()
    resumed[1].restore(path)
    assert resumed[1].steps == 4
    for name, array in resumed[1].contents().state.items():
        np.testing.assert_array_equal(array, saved[name], err_msg=name)
    for name, array in train(resumed, 4).items():
        np.testing.assert_array_equal(array, ended[name], err_msg=name)


def test_the_older_manager_has_the_same_with_the_metadata(tmp_path):
    run = make()
    saved = train(run, 4)
    state, metadata = run[1].contents()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(4, args=ocp.args.StandardSave(state), custom_metadata=metadata)
    resumed = make()
    resumed[1].restore(tmp_path / "4")
    for name, array in resumed[1].contents().state.items():
        np.testing.assert_array_equal(array, saved[name], err_msg=name)


def test_linen_and_other_loops_have_the_same(tmp_path):
    def forward(params, x):
        return x @ params["a"] @ params["b"]

    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    layers = sfj.find_layers(params, forward, X)
    state = sfj.linen.TrainState.create(apply_fn=forward, params=params, tx=TX, layers=layers)
    linen = sfj.linen.Freezer(state, sfj.policies.never())
    plain = sfj.Freezer(sfj.policies.never(), layers, params)
    with v1.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, **linen.contents(state)._asdict())
        checkpointer.save(2, **plain.run_contents(params)._asdict())
        first, second = (str(checkpoint.path) for checkpoint in checkpointer.checkpoints)
    restored = linen.restore(first, jax.tree.map(jnp.zeros_like, state))
    np.testing.assert_array_equal(restored.params["a"], params["a"])
    np.testing.assert_array_equal(plain.restore_run(second, params)["b"], params["b"])
