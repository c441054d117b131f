"""The rule of GradES (arXiv 2509.01842)."""

import jax.numpy as jnp
import pytest

from smartfrz_jax import Layer, Layers, policies

NAMES = ("a", "b", "c")
LAYERS = Layers(tuple(Layer(name, (f"{name}/kernel", f"{name}/bias"), (f"{name}/kernel",)) for name in NAMES))
PARAMS = {f"{name}/{part}": jnp.ones(shape) for name in NAMES for part, shape in (("kernel", (2, 2)), ("bias", 2))}


def run(policy, gradient, steps):
    """The frozen layers after each step; ``gradient(name, step)`` is each entry of the gradient of a kernel."""
    state, decisions, frozen = policy.init(LAYERS, PARAMS), [], frozenset()
    for step in range(1, steps + 1):
        grads = {f"{name}/kernel": jnp.full((2, 2), gradient(name, step)) for name in NAMES if name not in frozen}
        grads |= {f"{name}/bias": jnp.full(2, 100.0 * step) for name in NAMES if name not in frozen}
        frozen, state = policy.update(state, LAYERS, step=step, params=lambda: PARAMS, grads=grads)
        decisions.append(set(frozen))
    return decisions, state


def slopes(name, step):
    return {"a": 0.01, "b": 0.1, "c": 0.02}[name] * step  # of four entries: changes of 0.04, 0.4, 0.08


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.03, set()), (0.05, {"a"}), (0.1, {"a", "c"}), (1.0, {"a", "b", "c"})]
)
def test_freezes_what_changes_by_less_than_the_threshold_in_any_order(threshold, expected):
    policy = policies.grades(threshold, total_steps=10, grace=0.0, evaluate_every=1, keep=())
    decisions, _ = run(policy, slopes, 2)
    assert decisions == [set(), expected]


@pytest.mark.parametrize(("grace", "first"), [(0.0, 2), (0.25, 5), (0.5, 10), (1.0, 20)])
def test_not_before_the_grace_period_is_over(grace, first):
    decisions, _ = run(policies.grades(1.0, total_steps=20, grace=grace, evaluate_every=1, keep=()), slopes, 20)
    assert [bool(frozen) for frozen in decisions] == [step >= first for step in range(1, 21)]


def test_evaluations_compare_two_steps_in_a_row():
    policy = policies.grades(0.1, total_steps=20, grace=0.0, evaluate_every=4, keep=())
    decisions, _ = run(policy, slopes, 8)
    assert decisions == [set()] * 3 + [{"a", "c"}] * 5


def test_what_is_frozen_stays_so():
    policy = policies.grades(0.1, total_steps=20, grace=0.0, evaluate_every=1, keep=())
    decisions, _ = run(policy, lambda name, step: 0.0 if step < 3 else float(step), 8)
    assert decisions[1:] == [set(NAMES)] * 7


def test_a_change_that_is_not_finite_freezes_nothing():
    policy = policies.grades(1e6, total_steps=20, grace=0.0, evaluate_every=1, keep=())
    decisions, _ = run(policy, lambda name, step: float("nan") if name == "a" else 1.0, 5)
    assert decisions[-1] == {"b", "c"}


def test_keeps_copies_for_one_step_only():
    policy = policies.grades(1e-3, total_steps=20, grace=0.5, evaluate_every=4, keep=())
    sizes = []
    for steps in range(1, 14):
        _, state = run(policy, slopes, steps)
        sizes.append(len(state.before.held))
    assert sizes == [3 if step + 1 >= 10 and (step + 1) % 4 == 0 else 0 for step in range(1, 14)]


def test_layers_without_gradients_are_passed_over():
    policy = policies.grades(1.0, total_steps=10, grace=0.0, evaluate_every=1, keep=())
    state = policy.init(LAYERS, PARAMS)
    for step in (1, 2):
        frozen, state = policy.update(
            state, LAYERS, step=step, params=lambda: PARAMS, grads={"b/kernel": jnp.ones((2, 2))}
        )
    assert frozen == {"b"}


def test_gradients_of_another_network():
    policy = policies.grades(1.0, total_steps=10, grace=0.0, evaluate_every=1)
    with pytest.raises(ValueError, match="grads: none of the 1 gradients is of a layer's kernel"):
        policy.update(policy.init(LAYERS, PARAMS), LAYERS, step=1, params=lambda: PARAMS, grads={"d": jnp.ones(2)})


def test_imaginary_parts_count():
    policy = policies.grades(0.1, total_steps=20, grace=0.0, evaluate_every=4, keep=())
    assert run(policy, lambda name, step: 1j * slopes(name, step), 8)[0] == run(policy, slopes, 8)[0]
