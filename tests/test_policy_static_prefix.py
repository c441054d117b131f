import jax.numpy as jnp
import pytest

from smartfrz_jax import Layer, Layers, policies

NAMES = ("a", "b", "c", "d", "e")
LAYERS = Layers(tuple(Layer(name, (name,), (name,)) for name in NAMES))
PARAMS = {name: jnp.ones((2, 2)) for name in NAMES}


def frozen_at(policy, step):
    return "".join(sorted(policy.update(policy.init(LAYERS, PARAMS), LAYERS, step=step, params=lambda: PARAMS)[0]))


@pytest.mark.parametrize(("budget", "expected"), [(0.0, ""), (0.19, ""), (0.2, "a"), (0.6, "abc"), (1.0, "abcd")])
def test_longest_prefix_within_the_budget(budget, expected):
    assert frozen_at(policies.static_prefix(budget, total_steps=10), 1) == expected


def test_a_later_moment_allows_more():
    policy = policies.static_prefix(0.3, total_steps=10, at=0.5)  # 3 of 5 layers for half of the run
    assert [frozen_at(policy, step) for step in (1, 4, 5, 10)] == ["", "", "abc", "abc"]


def test_moment_is_not_a_step_late_by_rounding():
    assert frozen_at(policies.static_prefix(0.5, total_steps=100, at=0.07), 7) == "ab"  # 0.07 * 100 > 7


def test_costs():
    costs = {"a": 1, "b": 6, "c": 1, "d": 1, "e": 1}
    assert frozen_at(policies.static_prefix(0.69, total_steps=10, costs=costs), 1) == "a"
    assert frozen_at(policies.static_prefix(0.7, total_steps=10, costs=costs), 1) == "ab"


def test_kept_layers_are_passed_over():
    assert frozen_at(policies.static_prefix(0.4, total_steps=10, keep=["a"]), 1) == "bc"
    assert frozen_at(policies.static_prefix(1.0, total_steps=10, keep=()), 1) == "abcde"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.5}, "budget: got 1.5"),
        ({"total_steps": 0}, "total_steps: got 0"),
        ({"costs": dict.fromkeys("abcd", 1)}, "costs: got nothing for layer 'e'"),
        ({"costs": dict.fromkeys("abcdef", 1)}, "costs: no layer is called 'f'"),
        ({"costs": dict.fromkeys("abcde", 1) | {"b": -1}}, "costs: got -1 for layer 'b'"),
        ({"costs": dict.fromkeys("abcde", 1) | {"b": float("nan")}}, "costs: got nan for layer 'b'"),
        ({"costs": dict.fromkeys("abcde", 1) | {"b": float("inf")}}, "costs: got inf for layer 'b'"),
        ({"costs": dict.fromkeys("abcde", 0)}, "costs: got only zeros"),
    ],
)
@pytest.mark.parametrize("make", [policies.static_prefix, policies.random])
def test_refuses_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**({"budget": 0.5, "total_steps": 10} | options)).init(LAYERS, PARAMS)


def test_refuses_a_moment_outside_the_run():
    with pytest.raises(ValueError, match=r"at: got -0\.1"):
        policies.static_prefix(0.5, total_steps=10, at=-0.1)
