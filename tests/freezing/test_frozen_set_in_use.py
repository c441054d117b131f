"""The frozen set of record is the one in use, or the next step is an error that says the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj

pytestmark = pytest.mark.usefixtures("jax_defaults")

X = jnp.ones((4, 4))
TX = optax.sgd(0.1)  # keeps nothing of a layer, so that nothing else tells


def make():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))
    return model, sfj.nnx.Optimizer(model, TX, layers=sfj.nnx.find_layers(model, X))


def train(model, optimizer, x):
    loss, grads = optimizer.value_and_grad(lambda model, x: jnp.square(model(x) - 1).mean())(model, x)
    optimizer.update(model, grads)
    return loss


def kernels(model):
    return [np.array(layer.kernel[...]) for layer in model.layers]


def moved(model, before):
    return [not np.array_equal(new, old) for new, old in zip(kernels(model), before, strict=True)]


BINDINGS = {
    "cached_partial": lambda model, optimizer: nnx.cached_partial(nnx.jit(train), model, optimizer),
    "jit_partial": lambda model, optimizer: nnx.jit_partial(train, model, optimizer, graph=False),
}


@pytest.mark.parametrize("binding", BINDINGS)
def test_a_bound_step_ends_with_the_frozen_set_that_it_was_bound_with(binding):
    model, optimizer = make()
    step = BINDINGS[binding](model, optimizer)
    step(X)
    optimizer.freeze(model, ["layers/0"])
    before = kernels(model)
    with pytest.raises(ValueError, match=r"optimizer: its frozen set has changed.*cached_partial.*bind it again"):
        step(X)
    assert moved(model, before) == [False, False]
    BINDINGS[binding](model, optimizer)(X)
    assert moved(model, before) == [False, True]
    assert int(optimizer.step[...]) == 2


def test_a_set_that_does_not_change_ends_nothing():
    model, optimizer = make()
    step = BINDINGS["cached_partial"](model, optimizer)
    step(X)
    optimizer.freeze(model, [])
    step(X)
    assert int(optimizer.step[...]) == 2


def test_what_was_split_before_is_refused():
    model, optimizer = make()
    graphdef, state = nnx.split((model, optimizer))
    optimizer.freeze(model, ["layers/0"])

    @jax.jit
    def step(state):
        model, optimizer = nnx.merge(graphdef, state)
        train(model, optimizer, X)
        return nnx.state((model, optimizer))

    for given in (state, nnx.as_pure(state)):
        with pytest.raises(ValueError, match=r"optimizer: its frozen set has changed.*nnx.split"):
            step(given)


def functional(model, optimizer):
    """A loop's own state, and its step."""
    graphdef, state = nnx.split((model, optimizer))

    @jax.jit
    def step(state):
        model, optimizer = nnx.merge(graphdef, state)
        train(model, optimizer, X)
        return nnx.state((model, optimizer))

    return state, step


def test_a_freezer_notices_that_a_copy_trains():
    model, optimizer = make()
    freezer = sfj.nnx.Freezer(model, optimizer, sfj.static_prefix([(0.5, 0.5)], total_steps=4))
    state, step = functional(model, optimizer)
    freezer.step()
    step(state)
    with pytest.raises(ValueError, match=r"optimizer: has made no step.*nnx.update\(\(model, optimizer\), state\)"):
        freezer.step()
    assert not optimizer.frozen.names


def test_a_loop_with_its_own_state_works_as_the_message_says():
    model, optimizer = make()
    freezer = sfj.nnx.Freezer(model, optimizer, sfj.static_prefix([(0.5, 0.5)], total_steps=4))
    state, step = functional(model, optimizer)
    for _ in range(4):
        before = kernels(model)
        state = step(state)
        nnx.update((model, optimizer), state)
        assert moved(model, before) == [not optimizer.frozen.names, True]
        if freezer.step().names and not freezer.events[1:]:
            state, step = functional(model, optimizer)
    assert optimizer.frozen.names == {"layers/0"}


@pytest.mark.slow
def test_a_step_that_was_skipped_is_no_copy_that_trains():
    """The loop decides in Python, so that the optimizer's step is the very same array."""
    model, optimizer = make()
    freezer = sfj.nnx.Freezer(model, optimizer, sfj.static_prefix([(0.5, 0.5)], total_steps=4))
    train(model, optimizer, X)
    freezer.step()
    freezer.step()  # nothing has changed before
    assert optimizer.frozen.names == {"layers/0"}
    model, optimizer = make()
    freezer = sfj.nnx.Freezer(model, optimizer, sfj.static_prefix([(0.25, 0.5), (0.5, 0.0)], total_steps=4))
    train(model, optimizer, X)
    assert freezer.step(loss=jnp.float32(1)).names == {"layers/0"}
    assert not freezer.step(loss=jnp.float32(jnp.nan)).names  # the change before was made by the same array
    assert not optimizer.frozen.names
