import jax
import jax.numpy as jnp

from smartfrz_jax import find_layers, policies


def test_freezes_nothing_and_has_no_state():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    layers = find_layers(params, lambda p, x: x @ p["a"] @ p["b"], jnp.ones((1, 2)))
    policy = policies.never()
    state = policy.init(layers, params)
    assert jax.tree.leaves(state) == []
    for step in (1, 10, 10**9):
        assert policy.update(state, layers, step=step, params=lambda: params) == (frozenset(), state)
