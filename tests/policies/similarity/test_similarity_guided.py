import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import policies
from tests.policies.similarity.curves import LAYERS, PARAMS, REFERENCE, features, run


def test_freezes_each_layer_when_its_own_curve_is_flat():
    curve = [  # a: flat from the third on; b: flat from the start; c: climbs; d: the head, flat
        (0.2, 0.5, 0.1, 0.9),
        (0.4, 0.51, 0.2, 0.9),
        (0.6, 0.5, 0.3, 0.9),
        (0.61, 0.5, 0.4, 0.9),
        (0.6, 0.5, 0.5, 0.9),
        (0.6, 0.9, 0.6, 0.9),
    ]
    decisions, state, _ = run(policies.similarity_guided(REFERENCE, 1, window=3, tolerance=0.02), curve)
    assert decisions == ["", "", "b", "b", "ab", "ab"]
    np.testing.assert_allclose(state.cka[:, 2], [0.4, 0.5, 0.6], atol=1e-5)
    assert state.cka.shape == (3, 4)


def test_tolerance_is_the_range_over_the_window():
    drift = [(c, c, c, c) for c in (0.50, 0.515, 0.53)]  # neighbours differ by 0.015, the ends by 0.03
    assert run(policies.similarity_guided(REFERENCE, 1, window=3, tolerance=0.02), drift)[0][-1] == ""
    assert run(policies.similarity_guided(REFERENCE, 1, window=3, tolerance=0.031), drift)[0][-1] == "abc"


def test_computes_features_only_at_evaluations_and_only_while_something_may_freeze():
    policy = policies.similarity_guided(REFERENCE, 4, window=2)
    decisions, _, calls = run(policy, [(0.5,) * 4] * 5, every=4)
    assert calls == [4, 8]  # at 8 all but the head have frozen
    assert decisions == [""] * 7 + ["abc"] * 13


def test_reference_of_kept_layers_is_not_needed():
    reference = {name: REFERENCE[name] for name in "bc"}
    policy = policies.similarity_guided(reference, 1, window=2, keep=["a", "d"])
    assert run(policy, [(0.5,) * 4] * 2)[0] == ["", "bc"]


def test_a_layer_with_constant_output_has_cka_zero_and_freezes():
    policy = policies.similarity_guided(REFERENCE, 1, window=2)
    state = policy.init(LAYERS, PARAMS)
    dead = features([0.1] * 4) | {"b": jnp.ones((12, 1))}
    for step in (1, 2):
        names, state = policy.update(state, LAYERS, step=step, params=lambda: PARAMS, features=lambda: dead)
    assert names == {"a", "b", "c"}
    assert state.cka[1, 1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate_every": 0}, "evaluate_every: got 0"),
        ({"window": 1}, "window: got 1, expected an integer of at least 2"),
        ({"tolerance": -0.1}, "tolerance: got -0.1"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        policies.similarity_guided(REFERENCE, **({"evaluate_every": 1} | options))


def test_says_which_output_is_missing():
    with pytest.raises(ValueError, match=r"reference: lacks the output of 2 layer\(s\), such as 'b'"):
        policies.similarity_guided({"a": REFERENCE["a"]}, 1).init(LAYERS, PARAMS)
    policy = policies.similarity_guided(REFERENCE, 1)
    with pytest.raises(ValueError, match=r"features: lacks the output of 1 layer\(s\), such as 'c'"):
        policy.update(
            policy.init(LAYERS, PARAMS),
            LAYERS,
            step=1,
            params=lambda: PARAMS,
            features=lambda: {name: REFERENCE[name] for name in "abd"},
        )


def test_stops_at_features_that_are_not_finite():
    policy = policies.similarity_guided(REFERENCE, 1)
    broken = features([0.5] * 4) | {"c": jnp.full((12, 1), jnp.nan)}
    with pytest.raises(FloatingPointError, match="features: not finite after step 7 in layer 'c'"):
        policy.update(policy.init(LAYERS, PARAMS), LAYERS, step=7, params=lambda: PARAMS, features=lambda: broken)
