"""No two arrays of a migrated state share memory, nor with the parameters: the step may be given all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smartfrz_jax as sfj
from smartfrz_jax import freeze, migrate_opt_state
from tests.optimizers.network import GRADS, LAYERS, PARAMS, frozen
from tests.optimizers.table import CASES

pytestmark = pytest.mark.usefixtures("jax_defaults")


def pointers(tree):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return [leaf.unsafe_buffer_pointer() for leaf in leaves]


@pytest.mark.parametrize("name", CASES)
def test_no_buffer_stands_twice(name):
    """From an optimizer's first state, ours or optax's own, when a layer freezes, and when it returns."""
    tx = CASES[name].tx
    taken = pointers((freeze(tx, frozen()).init(PARAMS), PARAMS))
    assert len(set(taken)) == len(taken)
    state = tx.init(PARAMS)
    for now in (frozen(), frozen("b"), frozen()):
        state = migrate_opt_state(state, tx, PARAMS, now)
        taken = pointers((state, PARAMS))
        assert len(set(taken)) == len(taken)


@pytest.mark.parametrize("returning", ["fresh", "kept"])
@pytest.mark.parametrize("tx", [optax.contrib.prodigy(), optax.contrib.mechanize(optax.sgd(1.0)), optax.contrib.dog()])
@pytest.mark.slow
def test_a_donated_state_goes_on(tx, returning):
    params = jax.tree.map(jnp.copy, PARAMS)
    create = sfj.linen.TrainState.create
    state = create(apply_fn=None, params=params, tx=tx, layers=LAYERS, returning=returning)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads), donate_argnums=0)
    for now, grads in zip((frozen(), frozen("b"), frozen(), frozen("a")), GRADS, strict=False):
        state = step(state.freeze(now), grads)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def test_arrays_that_are_nobody_elses_are_not_copied():
    tx = optax.adam(0.1)
    state = freeze(tx, frozen()).init(PARAMS)
    assert set(pointers(migrate_opt_state(state, tx, PARAMS, frozen("b")))) < set(pointers(state))
