"""Optimizers to which something shaped like the parameters is given, and one that takes two sets of parameters."""

import jax
import numpy as np
import optax
import pytest

from smartfrz_jax import freeze, migrate_opt_state
from tests.optimizers.network import GRADS, PARAMS, arrays, frozen
from tests.optimizers.table import TWO, biggest, groups

pytestmark = pytest.mark.usefixtures("jax_defaults")

TREES = {
    "labels": (lambda tree: optax.multi_transform(TWO, tree(groups))),
    "mask": (lambda tree: optax.adamw(0.1, weight_decay=0.1, mask=tree(biggest))),
    "masked": (lambda tree: optax.masked(optax.adam(0.1), tree(biggest))),
}


@pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())
def test_a_tree_of_labels_does_what_the_function_of_them_does(make):
    states, params = {}, PARAMS
    given, computed = make(lambda function: function(PARAMS)), make(lambda function: function)
    for now, grads in zip((frozen(), frozen("b"), frozen("a", "b"), frozen()), GRADS, strict=False):
        for tx in (given, computed):
            state = migrate_opt_state(states.get(tx, tx.init(PARAMS)), tx, params, now)
            updates, states[tx] = freeze(tx, now).update(grads, state, params)
        assert arrays(states[given]) == arrays(states[computed])
        params = optax.apply_updates(params, updates)
    assert len(states) == 2


def test_lookahead():
    """It goes around the frozen optimizer; a layer holds still from a moment on at which fast and slow are the same."""
    params, now = optax.LookaheadParams.init_synced(PARAMS), frozen("b")
    fast = optax.adam(0.1)
    tx, stock = (optax.lookahead(inner, 2, 0.5) for inner in (freeze(fast, now), fast))
    some = optax.LookaheadParams.init_synced({name: PARAMS[name] for name in "ac"})
    state, expected = tx.init(params), stock.init(some)
    for grads in GRADS[:4]:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, expected = stock.update({name: grads[name] for name in "ac"}, expected, some)
        some = optax.apply_updates(some, updates)
        for got, alone in ((params.fast, some.fast), (params.slow, some.slow)):
            assert arrays({name: got[name] for name in "ac"}) == arrays(alone)
            for leaf, before in zip(jax.tree.leaves(got["b"]), jax.tree.leaves(PARAMS["b"]), strict=True):
                np.testing.assert_array_equal(leaf, before)
    assert int(state.steps_since_sync) == 0
    state = state._replace(fast_state=migrate_opt_state(state.fast_state, fast, params.fast, frozen()))
    updates, _ = optax.lookahead(freeze(fast, frozen()), 2, 0.5).update(GRADS[4], state, params)
    assert np.all(np.abs(updates.fast["b"]["kernel"]) > 0)
