"""Inter-layer scheduling of SlimFit (arXiv 2305.18513)."""

import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import Layer, Layers, policies

NAMES = ("a", "b", "c", "d")
LAYERS = Layers(tuple(Layer(name, (f"{name}/kernel",), (f"{name}/kernel",)) for name in NAMES))


def run(policy, speeds, steps, frozen_too=(), start=1.0):
    """The layers that train in each step; a layer that trains moves by a share of its weights, its speed at that step.

    Args:
        policy: The policy.
        speeds: From the number of a step to the speeds by layer.
        steps: Their number.
        frozen_too: Layers that do not move, whatever the policy decides.
        start: What each weight is at first.
    """
    weights = dict.fromkeys(NAMES, start)

    def params():
        return {f"{name}/kernel": jnp.full(3, weights[name]) for name in NAMES}

    state = policy.init(LAYERS, params())
    frozen, state = policy.update(state, LAYERS, step=0, params=params)
    trained = []
    for step in range(1, steps + 1):
        active = set(NAMES) - frozen
        trained.append(active)
        for name in active - set(frozen_too):
            weights[name] *= 1 + speeds(step)[name]
        frozen, state = policy.update(state, LAYERS, step=step, params=params)
    return trained, state


def test_those_that_moved_least_are_frozen_once_each_had_its_turn():
    speeds = dict(zip(NAMES, (0.4, 0.1, 0.3, 0.2), strict=True))
    trained, state = run(policies.slimfit(0.5, switch_every=1, keep=()), lambda step: speeds, 20)
    assert set().union(*trained[:4]) == set(NAMES)
    assert all(active == {"a", "c"} for active in trained[4:])
    for name, distance in zip(NAMES, state.distances, strict=True):
        assert distance == pytest.approx(speeds[name], rel=1e-5)


def test_frozen_layers_return_when_those_that_train_move_less():
    def speeds(step):
        return dict.fromkeys(NAMES, 0.5**step)

    trained, _ = run(policies.slimfit(0.5, switch_every=1, keep=()), speeds, 30)
    late = trained[10:]
    assert all(len(active) == 2 for active in late)
    assert all(sum(name in active for active in late) >= 5 for name in NAMES)


def test_decisions_compare_one_step_with_the_one_before():
    speeds = dict(zip(NAMES, (0.4, 0.1, 0.3, 0.2), strict=True))
    trained, state = run(policies.slimfit(0.25, switch_every=5, keep=()), lambda step: speeds, 30)
    changes = [step for step in range(1, 30) if trained[step] != trained[step - 1]]
    assert all(step % 5 == 0 for step in changes)
    assert trained[-1] == {"a", "c", "d"}
    assert state.distances[0] == pytest.approx(0.4, rel=1e-5)


def test_a_layer_that_something_else_has_frozen_keeps_its_distance():
    speeds = dict(zip(NAMES, (0.4, 0.1, 0.3, 0.2), strict=True))
    _, state = run(policies.slimfit(0.0, switch_every=1, keep=()), lambda step: speeds, 5, frozen_too=("b",))
    assert state.distances[1] > 1e29
    assert state.distances[0] < 1


def test_no_copies_between_the_step_before_a_decision_and_the_decision():
    policy = policies.slimfit(0.5, switch_every=4, keep=())
    for steps, held in ((2, 0), (3, 2), (4, 0), (6, 0), (7, 2)):
        _, state = run(policy, lambda step: dict.fromkeys(NAMES, 0.1), steps)
        assert len(state.before.held) == held
        assert sum(copy.size for copy in state.before.copies.values()) == 4 - held + 3 * held


def test_weights_that_are_not_finite():
    with pytest.raises(FloatingPointError, match="params: not finite after step 3 in layer 'a'"):
        run(
            policies.slimfit(0.0, switch_every=1, keep=()),
            lambda s: {n: float("nan") if n == "a" and s == 3 else 0.1 for n in NAMES},
            4,
        )


@pytest.mark.slow
def test_imaginary_parts_count():
    speeds = dict(zip(NAMES, (0.4, 0.1, 0.3, 0.2), strict=True))
    (real, _), (imaginary, state) = (
        run(policies.slimfit(0.5, switch_every=1, keep=()), lambda step: speeds, 12, start=start) for start in (1.0, 1j)
    )
    assert imaginary == real
    np.testing.assert_allclose(state.distances, list(speeds.values()), rtol=1e-5)


@pytest.mark.parametrize("switch_every", [4, 6])
def test_where_a_step_moves_nothing_the_next_that_does_decides(switch_every):
    """Of four steps one updates, as with optax.MultiSteps; those between are not taken for frozen layers."""
    policy = policies.slimfit(0.5, switch_every=switch_every, keep=())

    def speeds(step):
        return dict(zip(NAMES, (0.4, 0.1, 0.3, 0.2) if step % 4 == 3 else 4 * (0.0,), strict=True))

    trained, state = run(policy, speeds, 48)
    assert trained[-1] == {"a", "c"}
    np.testing.assert_allclose(state.distances, [0.4, 0.1, 0.3, 0.2], rtol=1e-5)
