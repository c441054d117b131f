"""Blocks of an ``nn.scan`` freeze row by row: BatchNorms and dropouts run in evaluation mode where they froze."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smartfrz_jax as sfj
from smartfrz_jax import linen

pytestmark = pytest.mark.usefixtures("jax_defaults")
DEPTH, WIDTH = 4, 4
X = jax.random.normal(jax.random.key(0), (16, WIDTH))


class Block(nn.Module):
    """Returns the mask of its dropout, too."""

    train: bool = True
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, shared):
        y = nn.BatchNorm(use_running_average=not self.train, name="norm")(nn.Dense(WIDTH, name="dense")(x))
        return x + jnp.tanh(y) + shared, nn.Dropout(self.rate, deterministic=not self.train)(jnp.ones(WIDTH))


class Net(nn.Module):
    rate: float = 0.5
    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="stem")(x)
        blocks = nn.scan(
            nn.remat(Block) if self.remat else Block,
            variable_axes={"params": self.axis, "batch_stats": self.axis},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=DEPTH,
        )
        x, masks = blocks(rate=self.rate, name="blocks")(x, x.mean(axis=0, keepdims=True))
        return nn.Dense(3, name="head")(x), masks


class State(linen.TrainState):
    batch_stats: dict


@functools.cache
def created(net):
    variables = net.init(jax.random.key(1), X)
    layers = linen.find_layers(net, variables, X, rows=True)
    return State.create(
        apply_fn=net.apply,
        params=variables["params"],
        tx=optax.adam(0.1),
        layers=layers,
        batch_stats=variables["batch_stats"],
        keep_grads=True,
    )


@jax.jit
def step(state, x):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        streams = {"dropout": jax.random.fold_in(jax.random.key(2), state.step)}
        (out, masks), updates = state.apply_fn(variables, x, mutable=["batch_stats"], rngs=streams)
        return jnp.square(out).mean(), (masks, updates["batch_stats"])

    (loss, (masks, stats)), grads = state.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss, masks, grads


def rows_of(tree, axis):
    return [jax.tree.map(lambda leaf, row=row: jnp.take(leaf, row, axis), tree) for row in range(DEPTH)]


class Attention(nn.Module):
    """Sees a sequence word by word, and keeps the weights of its attention."""

    @nn.compact
    def __call__(self, x, _):
        options = {"dropout_rate": 0.5, "deterministic": False, "decode": True}
        return x + nn.MultiHeadDotProductAttention(2, **options, name="attend")(x, sow_weights=True), None


@pytest.mark.slow
def test_a_module_that_runs_in_both_modes_writes_and_sows_once():
    axes, streams = {"params": 0, "cache": 0, "intermediates": 0}, {"params": True, "dropout": True}
    net = nn.scan(Attention, variable_axes=axes, split_rngs=streams, length=2)()
    streams = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    variables = net.init(streams, X[None], None)

    def loss_fn(params, word):
        both = {"params": params, "cache": variables["cache"]}
        (out, _), new = net.apply(both, word, None, rngs=streams, mutable=["cache", "intermediates"])
        return jnp.square(out).mean(), new

    word, params = X[None, :1], variables["params"]
    layers = sfj.find_layers(params, lambda params, word: loss_fn(params, word)[0], word, rows=True)
    state = linen.TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1), layers=layers)
    _, new = jax.jit(state.freeze("*/0").with_frozen(loss_fn))(params, word)
    assert new["cache"]["attend"]["cache_index"].tolist() == [1, 1]
    assert len(new["intermediates"]["attend"]["attention_weights"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("net", [Net(), Net(axis=1, remat=True)], ids=["first axis", "remat"])
def test_frozen_rows_run_in_evaluation_mode_and_the_others_as_ever(net):
    state = created(net)
    before, names = state.freeze([]), ["stem", "blocks/0", "blocks/2"]
    after, loss, masks, grads = step(state.freeze(names), X)
    _, _, all_masks, _ = step(before, X)
    # Random streams of rows that train are those of the scan that nothing splits, bit for bit.
    assert np.all(masks[np.array([0, 2])] == 1.0)
    np.testing.assert_array_equal(masks[np.array([1, 3])], all_masks[np.array([1, 3])])
    # Block by block, in the mode of each.
    params, stats = rows_of(state.params["blocks"], net.axis), rows_of(state.batch_stats["blocks"], net.axis)
    x = X @ state.params["stem"]["kernel"] + state.params["stem"]["bias"]
    shared = x.mean(axis=0, keepdims=True)
    for row in range(DEPTH):
        block = Block(train=row in (1, 3), rate=net.rate)
        variables = {"params": params[row], "batch_stats": stats[row]}
        (x, _), new = block.apply(variables, x, shared, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
        got = rows_of(after.batch_stats["blocks"], net.axis)[row]
        if row in (0, 2):
            jax.tree.map(np.testing.assert_array_equal, got, stats[row])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, new["batch_stats"])
    out = x @ state.params["head"]["kernel"] + state.params["head"]["bias"]
    np.testing.assert_allclose(loss, jnp.square(out).mean(), rtol=1e-5)
    for row in (0, 2):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(rows_of(grads["blocks"], net.axis)[row]))
    assert set(after.grads) == set(state.frozen.layers.owner) - after.frozen.params
    kernel = after.opt_state.inner_states["train"].inner_state[0].mu["blocks"]["dense"]["kernel"]
    assert kernel.shape[net.axis] == 2


@pytest.mark.slow
def test_with_nothing_frozen_the_step_is_that_of_flax_bit_for_bit():
    """And so are rows that come back later, of moments and all."""
    from flax.training.train_state import TrainState

    net = Net()
    state = created(net)

    @jax.jit
    def stock(state, stats, x):
        def loss_fn(params):
            streams = {"dropout": jax.random.fold_in(jax.random.key(2), state.step)}
            variables = {"params": params, "batch_stats": stats}
            (out, _), updates = net.apply(variables, x, mutable=["batch_stats"], rngs=streams)
            return jnp.square(out).mean(), updates["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), stats, loss

    theirs, stats = TrainState.create(apply_fn=None, params=state.params, tx=optax.adam(0.1)), state.batch_stats
    theirs, stats, loss = stock(theirs, stats, X)
    ours, own, _, _ = step(state, X)
    assert own == loss
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    frozen = ours.freeze(["blocks/1"])
    back = frozen.freeze(type(frozen.frozen)(frozen.frozen.layers))
    moments = [s.opt_state.inner_states["train"].inner_state[0].mu["blocks"]["dense"]["kernel"] for s in (ours, back)]
    np.testing.assert_array_equal(np.delete(moments[0], 1, 0), np.delete(moments[1], 1, 0))
    assert not np.any(moments[1][1])
