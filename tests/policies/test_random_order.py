import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax import Layer, Layers, policies


def network(n):
    names = [f"l{i:02d}" for i in range(n)]
    return Layers(tuple(Layer(name, (name,), (name,)) for name in names)), {name: jnp.ones((1, 1)) for name in names}


def frozen_share(policy, layers, params, total_steps, weights):
    """Share of the run's cost that was frozen, counted step by step."""
    state, frozen, total = policy.init(layers, params), frozenset(), 0.0
    for step in range(1, total_steps + 1):
        total += sum(weights[name] for name in frozen)  # this step ran with these frozen
        frozen, state = policy.update(state, layers, step=step, params=lambda: params)
    return total / total_steps / sum(weights.values())


@settings(max_examples=30, deadline=None)
@given(
    budget=st.floats(0, 1),
    n=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    costs=st.lists(st.floats(0.01, 100), min_size=12, max_size=12),
)
def test_frozen_share_is_the_budget(budget, n, seed, costs):
    total_steps = 200
    layers, params = network(n)
    weights = dict(zip(layers.names, costs, strict=False))
    policy = policies.random(budget, total_steps=total_steps, seed=seed, costs=weights, keep=())
    share = frozen_share(policy, layers, params, total_steps, weights)
    # Moments are rounded to steps; freezing before the first step happens after it.
    assert abs(share - budget) <= 1.0 / total_steps + 1e-9


def test_long_run_meets_the_budget_with_the_head_kept():
    layers, params = network(9)
    state = policies.random(0.3, total_steps=10**6, seed=3).init(layers, params)
    moments = np.minimum(state.freeze_at, 10**6)
    assert moments[-1] == 10**6
    assert np.mean(1 - moments / 10**6) == pytest.approx(0.3, abs=1e-6)


def test_seed_makes_the_order_and_nothing_else_does():
    layers, params = network(12)

    def moments(**options):
        return policies.random(0.4, total_steps=1000, **options).init(layers, params).freeze_at.tolist()

    assert moments(seed=1) == moments(seed=1)
    assert moments(seed=1) != moments(seed=2)
    orders = {tuple(np.argsort(moments(seed=seed)[:-1])) for seed in range(10)}
    assert len(orders) == 10
    assert tuple(range(11)) not in orders


def test_budget_zero_freezes_nothing_and_the_whole_budget_everything():
    layers, params = network(5)
    assert frozen_share(policies.random(0, total_steps=50), layers, params, 50, dict.fromkeys(layers.names, 1)) == 0
    state = policies.random(1, total_steps=50, keep=()).init(layers, params)
    assert state.freeze_at.tolist() == [0] * 5


def test_says_how_much_can_be_reached():
    layers, params = network(4)
    with pytest.raises(ValueError, match=re.escape("budget: got 0.8, but the layers that may freeze make up 0.75")):
        policies.random(0.8, total_steps=50).init(layers, params)
    policies.random(0.75, total_steps=50).init(layers, params)
    costs = dict(zip(layers.names, (1, 1, 1, 7), strict=True))
    with pytest.raises(ValueError, match=r"make up 0\.3 of the cost"):
        policies.random(0.5, total_steps=50, costs=costs).init(layers, params)
