"""Relative gradient norms as Auto-RGN has them (arXiv 2210.11466), and who is frozen for them."""

import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import Layer, Layers, policies

NAMES = ("a", "b", "c")
LAYERS = Layers(tuple(Layer(name, (f"{name}/kernel", f"{name}/bias"), (f"{name}/kernel",)) for name in NAMES))
SIZES = {"a": 1.0, "b": 2.0, "c": 10.0}
PARAMS = {f"{name}/kernel": jnp.full((2, 2), SIZES[name]) for name in NAMES} | {
    f"{name}/bias": jnp.full(2, 1e3) for name in NAMES
}


def run(policy, slope, steps):
    """The frozen layers after each step; ``slope(name, step)`` is each entry of the gradient of a kernel."""
    state, decisions, frozen = policy.init(LAYERS, PARAMS), [], frozenset()
    for step in range(1, steps + 1):
        grads = {f"{name}/kernel": jnp.full((2, 2), slope(name, step)) for name in NAMES if name not in frozen}
        grads |= {f"{name}/bias": jnp.full(2, 1e5) for name in NAMES if name not in frozen}
        frozen, state = policy.update(state, LAYERS, step=step, params=lambda: PARAMS, grads=grads)
        decisions.append("".join(sorted(frozen)))
    return decisions, state


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, ""), (0.15, "c"), (0.25, "bc"), (1.0, "bc")])
def test_the_norm_is_that_of_the_gradient_over_that_of_the_weights(threshold, expected):
    # Gradients of 5, 2 and 5 over weights of 1, 2 and 10: RGN 5, 1, 0.5, over the largest 1, 0.2, 0.1.
    policy = policies.relative_gradient_norm(threshold, 1, batches=1, keep=())
    decisions, state = run(policy, lambda name, step: {"a": 5.0, "b": 2.0, "c": 5.0}[name], 1)
    np.testing.assert_allclose(state.norms, [5.0, 1.0, 0.5], rtol=1e-6)
    assert decisions == [expected]


def test_a_decision_is_made_from_the_last_batches_before_it():
    # Steps 3 and 4 of each four count: there b has 0.2 and 0.6 of a.
    policy = policies.relative_gradient_norm(0.41, 4, batches=2, keep=("c",))
    decisions, state = run(policy, lambda name, step: 2 * (0.0, 9.0, 0.2, 0.6)[step % 4 - 1] if name == "b" else 1.0, 4)
    np.testing.assert_allclose(state.norms[:2], [1.0, 0.4], rtol=1e-6)
    assert decisions == ["", "", "", "b"]


def test_a_layer_returns_when_the_largest_norm_has_fallen():
    # a falls from 1 by tenths; b froze at 0.29, which is below half of 0.6, and not of 0.5.
    policy = policies.relative_gradient_norm(0.5, 1, batches=1, keep=("c",))
    decisions, _ = run(policy, lambda name, step: {"a": 1.1 - 0.1 * step, "b": 0.58, "c": 0.0}[name], 7)
    assert decisions == ["b"] * 5 + [""] * 2


def test_gradients_that_are_not_finite_are_left_out():
    def slope(name, step):
        return float("nan") if name == "b" and step == 1 else {"a": 1.0, "b": 0.2, "c": 100.0}[name]

    decisions, state = run(policies.relative_gradient_norm(0.5, 2, batches=2, keep=("c",)), slope, 2)
    np.testing.assert_allclose(state.norms, [1.0, 0.1, 10.0], rtol=1e-6)
    assert decisions == ["", "ab"]


def test_a_layer_that_never_had_a_gradient_is_not_frozen():
    policy = policies.relative_gradient_norm(1.0, 1, batches=1, keep=())
    grads = {"a/kernel": jnp.ones((2, 2)), "c/kernel": jnp.ones((2, 2))}
    names, _ = policy.update(policy.init(LAYERS, PARAMS), LAYERS, step=1, params=lambda: PARAMS, grads=grads)
    assert names == {"c"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threshold": 2}, "threshold: got 2"),
        ({"evaluate_every": 0}, "evaluate_every: got 0"),
        ({"batches": 7}, "batches: got 7, expected at most the steps between decisions, 6"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(ValueError, match=text):
        policies.relative_gradient_norm(**{"threshold": 0.1, "evaluate_every": 6} | options)


@pytest.mark.parametrize(
    ("grads", "text"),
    [
        ({"d": jnp.ones(2)}, "grads: none of the 1 gradients is of a layer's kernel"),
        ({"a/kernel": jnp.ones(3)}, r"grads: 'a/kernel' has shape \(3,\), expected that of the parameter, \(2, 2\)"),
    ],
)
def test_gradients_of_another_network(grads, text):
    policy = policies.relative_gradient_norm(0.1, 1, batches=1)
    with pytest.raises(ValueError, match=text):
        policy.update(policy.init(LAYERS, PARAMS), LAYERS, step=1, params=lambda: PARAMS, grads=grads)
