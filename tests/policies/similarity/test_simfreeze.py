"""The rule of SimFreeze (arXiv 2401.16694): flat curves freeze, moved ones return."""

import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import policies
from tests.policies.similarity.curves import LAYERS, PARAMS, REFERENCE, features, run


def test_freezes_each_layer_when_its_own_curve_is_flat():
    curve = [  # a: flat from the third on; b: flat from the start; c: falls; d: the head, flat
        (0.9, 0.5, 0.9, 0.9),
        (0.7, 0.502, 0.8, 0.9),
        (0.6, 0.5, 0.7, 0.9),
        (0.601, 0.5, 0.6, 0.9),
        (0.6, 0.5, 0.5, 0.9),
    ]
    decisions, state, _ = run(policies.simfreeze(REFERENCE, 1, window=3, tolerance=0.01), curve)
    assert decisions == ["", "", "b", "b", "ab"]
    np.testing.assert_allclose(state.at_freeze, [0.6, 0.5, 0, 0], atol=1e-5)


def test_change_is_relative_and_from_one_evaluation_to_the_next():
    slow = [(c, c / 10, 0.5, 0.5) for c in (0.50, 0.504, 0.508, 0.512)]  # 0.8 % each, 2.4 % in all
    assert run(policies.simfreeze(REFERENCE, 1, window=4, tolerance=0.01), slow)[0][-1] == "abc"
    assert run(policies.simfreeze(REFERENCE, 1, window=4, tolerance=0.007), slow)[0][-1] == "c"


def test_a_frozen_layer_that_moved_trains_until_it_is_flat_again():
    values = (0.6, 0.6, 0.605, 0.6, 0.5, 0.5, 0.5, 0.5)  # 0.605 is within 1 % of 0.6, 0.5 is not
    curve = [(c, 0.9 - 0.1 * i, 0.1 + 0.1 * i, 0.9) for i, c in enumerate(values)]
    decisions, state, _ = run(policies.simfreeze(REFERENCE, 1, window=2, tolerance=0.01), curve)
    assert decisions == ["", "a", "a", "a", "", "a", "a", "a"]
    assert state.at_freeze[0] == pytest.approx(0.5, abs=1e-5)


def test_new_data_have_their_own_reference():
    """At a change of the data the function gives outputs of the network before the run on the new ones."""
    moved = {name: jnp.asarray(3.0 * value[::-1] + 1.0) for name, value in REFERENCE.items()}
    given = [REFERENCE]
    policy = policies.simfreeze(lambda: given[-1], 1, window=2)
    state, decisions = policy.init(LAYERS, PARAMS), []
    for step in range(1, 7):
        if step == 4:
            given.append(moved)
        out = REFERENCE if step < 4 else features([0.3] * 4)
        names, state = policy.update(state, LAYERS, step=step, params=lambda: PARAMS, features=lambda out=out: out)
        decisions.append("".join(sorted(names)))
    assert decisions == ["", "abc", "abc", "", "abc", "abc"]


def test_compares_at_evaluations_only_frozen_layers_too():
    decisions, _, calls = run(policies.simfreeze(REFERENCE, 4, window=2), [(0.5,) * 4] * 4, every=4)
    assert calls == [4, 8, 12, 16]
    assert decisions == [""] * 7 + ["abc"] * 9


def test_reference_of_kept_layers_is_not_needed():
    policy = policies.simfreeze({name: REFERENCE[name] for name in "bc"}, 1, window=2, keep=["a", "d"])
    assert run(policy, [(0.5,) * 4] * 2)[0] == ["", "bc"]


def test_stops_at_features_that_are_not_finite():
    policy = policies.simfreeze(REFERENCE, 1)
    broken = features([0.5] * 4) | {"c": jnp.full((12, 1), jnp.nan)}
    with pytest.raises(FloatingPointError, match="features: not finite after step 7 in layer 'c'"):
        policy.update(policy.init(LAYERS, PARAMS), LAYERS, step=7, params=lambda: PARAMS, features=lambda: broken)
