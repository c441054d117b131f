import jax.numpy as jnp
import pytest

from smartfrz_jax import Layer, Layers, policies

NAMES = ("a", "b", "c", "d", "e")
LAYERS = Layers(tuple(Layer(name, (name,), (name,)) for name in NAMES))
PARAMS = {name: jnp.ones((2, 2)) for name in NAMES}


def frozen_at(policy, step):
    return "".join(sorted(policy.update(policy.init(LAYERS, PARAMS), LAYERS, step=step, params=lambda: PARAMS)[0]))


@pytest.mark.parametrize(("share", "expected"), [(0.0, ""), (0.19, ""), (0.2, "a"), (0.6, "abc"), (1.0, "abcd")])
def test_longest_prefix_within_the_share(share, expected):
    assert frozen_at(policies.static_prefix([(0.0, share)], total_steps=10), 1) == expected


def test_from_the_moment_on():
    policy = policies.static_prefix([(0.5, 0.6)], total_steps=10)
    assert [frozen_at(policy, step) for step in (1, 4, 5, 10)] == ["", "", "abc", "abc"]


def test_stages_one_after_another():
    policy = policies.static_prefix(((0.0, 0.2), (0.3, 0.6), (0.5, 1.0)), total_steps=10)
    expected = ["a", "a", "abc", "abc", "abcd", "abcd"]
    assert [frozen_at(policy, step) for step in (1, 2, 3, 4, 5, 10)] == expected


def test_of_stages_at_the_same_moment_the_larger_counts():
    assert frozen_at(policies.static_prefix([(0.5, 0.2), (0.5, 0.4)], total_steps=10), 5) == "ab"


def test_layers_train_again_where_the_share_falls():
    policy = policies.static_prefix([(0.0, 0.6), (0.3, 0.2), (0.5, 0.0), (0.8, 0.4)], total_steps=10)
    expected = ["abc", "abc", "a", "a", "", "", "ab", "ab"]
    assert [frozen_at(policy, step) for step in (1, 2, 3, 4, 5, 7, 8, 10)] == expected
    assert policy.start is not None
    assert policy.start(policy.init(LAYERS, PARAMS), LAYERS) == {"a", "b", "c"}


def test_moment_is_not_a_step_late_by_rounding():
    assert frozen_at(policies.static_prefix([(0.07, 0.5)], total_steps=100), 7) == "ab"  # 0.07 * 100 > 7


def test_costs():
    costs = {"a": 1, "b": 6, "c": 1, "d": 1, "e": 1}
    assert frozen_at(policies.static_prefix([(0.0, 0.69)], total_steps=10, costs=costs), 1) == "a"
    assert frozen_at(policies.static_prefix([(0.0, 0.7)], total_steps=10, costs=costs), 1) == "ab"


def test_a_layer_that_costs_nothing_trains_where_the_share_is_0():
    costs = dict.fromkeys(NAMES, 1) | {"a": 0}  # as an embedding in which tokens are looked up
    policy = policies.static_prefix([(0.0, 0.5), (0.4, 0.0), (0.8, 0.2)], total_steps=10, costs=costs)
    assert [frozen_at(policy, step) for step in (1, 3, 4, 7, 8)] == ["abc", "abc", "", "", "a"]


def test_kept_layers_are_passed_over():
    assert frozen_at(policies.static_prefix([(0.0, 0.4)], total_steps=10, keep=["a"]), 1) == "bc"
    assert frozen_at(policies.static_prefix([(0.0, 1.0)], total_steps=10, keep=()), 1) == "abcde"


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (dict.fromkeys("abcd", 1), "costs: got nothing for layer 'e'"),
        (dict.fromkeys("abcdef", 1), "costs: no layer is called 'f'"),
        (dict.fromkeys("abcde", 1) | {"b": -1}, "costs: got -1 for layer 'b'"),
        (dict.fromkeys("abcde", 1) | {"b": float("nan")}, "costs: got nan for layer 'b'"),
        (dict.fromkeys("abcde", 1) | {"b": float("inf")}, "costs: got inf for layer 'b'"),
        (dict.fromkeys("abcde", 0), "costs: got only zeros"),
    ],
)
@pytest.mark.parametrize("make", [policies.static_prefix, policies.random])
def test_refuses_bad_costs(make, costs, message):
    options = {"stages": [(0.0, 0.5)]} if make is policies.static_prefix else {"budget": 0.5}
    with pytest.raises(ValueError, match=message):
        make(total_steps=10, costs=costs, **options).init(LAYERS, PARAMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps: got 0"),
        ({"stages": []}, r"stages: got \[\], expected at least one pair \(share of training, share of the cost\)"),
        ({"stages": 0.5}, "stages: got 0.5, expected at least one pair"),
        ({"stages": (0.5, 1.0)}, r"stages: got \(0.5, 1.0\), expected at least one pair"),
        ({"stages": [(0.1, 0.2, 0.3)]}, "expected at least one pair"),
        ({"stages": [(-0.1, 0.5)]}, "stages: moment: got -0.1"),
        ({"stages": [(0.0, 1.5)]}, "stages: share of the cost: got 1.5"),
        ({"stages": [(0.5, 0.5), (0.0, 1.0)]}, "expected moments that do not fall"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        policies.static_prefix(**({"total_steps": 10, "stages": [(0.0, 0.5)]} | options))
