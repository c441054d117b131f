"""Blocks of an ``nnx.scan`` freeze row by row: BatchNorms and dropouts run in evaluation mode where they froze."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj

pytestmark = pytest.mark.usefixtures("jax_defaults")
DEPTH, WIDTH = 4, 4
X = jax.random.normal(jax.random.key(0), (16, WIDTH))
FROZEN = ["stem", "blocks/0", "blocks/2"]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.BatchNorm(WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        """The output, and the mask of the dropout."""
        return x + jnp.tanh(self.norm(self.dense(x))), self.drop(jnp.ones(WIDTH))


class Net(nnx.Module):
    def __init__(self, rngs, *, remat=False, block: Any = Block):
        self.stem, self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 3, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=DEPTH)(nnx.vmap(block))(rngs)
        self.remat = remat

    def __call__(self, x):
        def run(block, x):
            return block(x)

        body = nnx.remat(run) if self.remat else run
        x, masks = nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))(self.blocks, self.stem(x))
        return self.head(x), masks


def loss_fn(model, x):
    out, masks = model(x)
    return jnp.square(out).mean(), masks


def created(*, remat=False, block: Any = Block):
    model = Net(nnx.Rngs(0), remat=remat, block=block)
    layers = sfj.nnx.find_layers(model, X, rows=True)
    return model, sfj.nnx.Optimizer(model, optax.adam(0.1), layers=layers)


@nnx.jit
def step(model, optimizer, x):
    (loss, masks), grads = optimizer.value_and_grad(loss_fn, has_aux=True)(model, x)
    optimizer.update(model, grads)
    return loss, masks, grads


class Counting(nnx.Module):
    """A block of the user's own with a mode, that counts its calls in either."""

    def __init__(self, rngs):
        self.dense, self.calls = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.BatchStat(jnp.zeros(()))
        self.deterministic = False

    def __call__(self, x):
        self.calls[...] += 1
        return (x if self.deterministic else self.dense(x)), x[0]


class Training(Block):
    """A block that says itself that its BatchNorm trains."""

    def __call__(self, x):
        return self.norm(self.dense(x), use_running_average=False), x[0]


@pytest.mark.slow
def test_a_module_that_runs_in_both_modes_writes_its_variables_once():
    model, optimizer = created(block=Counting)
    optimizer.freeze(model, FROZEN)
    optimizer.with_frozen(loss_fn)(model, X)
    assert model.blocks.calls[...].tolist() == [0, 1, 0, 1]


def test_a_norm_of_frozen_rows_that_is_told_to_train_is_refused():
    model, optimizer = created(block=Training)
    optimizer.freeze(model, FROZEN)
    with pytest.raises(ValueError, match=r"BatchNorm of stacked blocks with use_running_average=False"):
        optimizer.with_frozen(loss_fn)(model, X)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_frozen_rows_run_in_evaluation_mode_and_the_others_as_ever(remat):
    (plain, unfrozen), (model, optimizer) = created(), created(remat=remat)
    _, all_masks, _ = step(plain, unfrozen, X)
    optimizer.freeze(model, FROZEN)
    start = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model)))
    loss, masks, grads = step(model, optimizer, X)
    # Random streams of rows that train are those of the scan that nothing splits, bit for bit.
    assert np.all(masks[np.array([0, 2])] == 1.0)
    np.testing.assert_array_equal(masks[np.array([1, 3])], all_masks[np.array([1, 3])])
    assert np.any(masks[np.array([1, 3])] == 0.0)
    # Block by block, in the mode of each.
    x = X @ start["stem"]["kernel"] + start["stem"]["bias"]
    norm = model.blocks.norm
    for row in range(DEPTH):
        block = Block(nnx.Rngs(0))
        nnx.update(block, jax.tree.map(lambda leaf, row=row: leaf[row], start["blocks"]))
        block.train() if row in (1, 3) else block.eval()
        x, _ = block(x)
        for name in ("mean", "var"):
            got = getattr(norm, name)[...][row]
            np.testing.assert_allclose(got, getattr(block.norm, name)[...], rtol=1e-5, atol=1e-6)
            if row in (0, 2):
                np.testing.assert_array_equal(got, start["blocks"]["norm"][name][row])
    out = x @ start["head"]["kernel"] + start["head"]["bias"]
    np.testing.assert_allclose(loss, jnp.square(out).mean(), rtol=1e-5)
    kernel = model.blocks.dense.kernel[...]
    for row in range(DEPTH):
        moved = bool(np.any(kernel[row] != start["blocks"]["dense"]["kernel"][row]))
        assert moved == (row in (1, 3)) == bool(np.any(grads["blocks"]["dense"]["kernel"][row]))
    assert type(model.blocks.drop) is nnx.Dropout
    assert optimizer.opt_state.inner_states["train"].inner_state[0].mu["blocks"]["dense"]["kernel"].shape[0] == 2


@pytest.mark.slow
def test_a_policy_freezes_rows_in_a_compiled_step_and_the_run_is_restored(tmp_path):
    def run(steps, save_at=None, restore=False):
        model, optimizer = created()
        train_step = sfj.TrainStep(lambda model, optimizer, x: plain_step(model, optimizer, x))
        policy = sfj.static_prefix([(0.3, 0.5)], total_steps=4)
        freezer = sfj.nnx.Freezer(model, optimizer, policy, train_step=train_step)
        if restore:
            freezer.restore(tmp_path / "run")
        for done in range(freezer.steps, steps):
            loss = train_step(model, optimizer, X)
            freezer.step(loss=loss)
            if done + 1 == save_at:
                freezer.save(tmp_path / "run")
        return freezer.frozen, nnx.as_pure(nnx.state(model, nnx.Param))

    def plain_step(model, optimizer, x):
        (loss, _), grads = optimizer.value_and_grad(loss_fn, has_aux=True)(model, x)
        optimizer.update(model, grads)
        return loss

    frozen, params = run(4, save_at=3)
    assert frozen.rows
    again, restored = run(4, restore=True)
    assert again == frozen
    jax.tree.map(functools.partial(np.testing.assert_array_equal), restored, params)
