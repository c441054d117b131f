import jax.numpy as jnp
import pytest

from smartfrz_jax import Layer, Layers, policies

NAMES = ("a", "b", "c", "d", "e")
LAYERS = Layers(tuple(Layer(name, (name,), (name,)) for name in NAMES))
PARAMS = {name: jnp.ones((2, 2)) for name in NAMES}


def frozen_at(policy, step):
    return "".join(sorted(policy.update(policy.init(LAYERS, PARAMS), LAYERS, step=step, params=lambda: PARAMS)[0]))


def beginning(policy):
    return "".join(sorted(policy.start(policy.init(LAYERS, PARAMS), LAYERS)))


def test_the_front_waits_and_then_all_train():
    policy = policies.auto(total_steps=100)
    assert beginning(policy) == "ab"
    assert [frozen_at(policy, step) for step in (1, 34, 35, 42)] == ["ab", "ab", "", ""]


def test_it_is_the_schedule_of_the_long_runs():
    """Which have it by the name that their other schedules have: ``static:half,none:0.35``."""
    policy, measured = policies.auto(total_steps=97), policies.static_prefix([(0, 0.5), (0.35, 0)], total_steps=97)
    assert beginning(policy) == beginning(measured)
    assert [frozen_at(policy, step) for step in range(1, 98)] == [frozen_at(measured, step) for step in range(1, 98)]


def test_of_a_pretrained_network_nothing_stops():
    assert frozen_at(policies.auto(total_steps=100), 100) == ""


@pytest.mark.parametrize("options", [{"pretrained": False}, {"caution": 0.95}], ids=["from scratch", "caution"])
def test_layers_stop_as_with_progress(options):
    policy, progress = policies.auto(total_steps=100, **options), policies.progress(total_steps=100)
    after = range(35, 101)
    assert [frozen_at(policy, step) for step in after] == [frozen_at(progress, step) for step in after]
    assert frozen_at(policy, 100) == "abc"


def test_the_front_of_random_weights_does_not_wait():
    policy = policies.auto(total_steps=100, pretrained=False)
    assert beginning(policy) == frozen_at(policy, 1) == ""


def test_what_stops_at_once_is_frozen_before_the_first_step():
    assert beginning(policies.auto(total_steps=100, caution=0.0)) == "abcd"
    assert beginning(policies.auto(total_steps=100, caution=0.0, pretrained=False)) == "abcd"


def test_the_front_is_half_of_the_cost():
    policy = policies.auto(total_steps=100, costs={"a": 1, "b": 1, "c": 1, "d": 2, "e": 1})
    assert beginning(policy) == "abc"
    too_large = policies.auto(total_steps=100, costs={"a": 5, "b": 1, "c": 1, "d": 1, "e": 1})
    assert beginning(too_large) == ""


def test_a_layer_that_costs_nothing_waits_with_the_front_alone():
    costs = dict.fromkeys(NAMES, 1) | {"a": 0}
    waits, trains = (policies.auto(total_steps=100, costs=costs, pretrained=pretrained) for pretrained in (True, False))
    assert [frozen_at(waits, step) for step in (1, 34, 35, 100)] == ["abc", "abc", "", ""]
    assert beginning(trains) == frozen_at(trains, 1) == frozen_at(trains, 10) == ""


def test_kept_layers_neither_wait_nor_stop():
    policy = policies.auto(total_steps=100, caution=0.95, keep=["a"])
    assert beginning(policy) == "bc"
    assert frozen_at(policy, 100) == "bc"


def test_pretrained_is_a_bool():
    with pytest.raises(TypeError, match=r"pretrained: got str 'yes', expected True or False"):
        policies.auto(total_steps=100, pretrained="yes")
