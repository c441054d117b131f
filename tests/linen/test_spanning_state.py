"""State of a module around several layers, of which only some are frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths

pytestmark = pytest.mark.usefixtures("jax_defaults")

X = jax.random.normal(jax.random.key(0), (4, 3))


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="second")(nn.relu(nn.Dense(5, name="first")(x)))


class Spectral(nn.Module):
    """One norm around two layers, with vectors of each kernel, named by its path."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.SpectralNorm(Pair(name="pair"), name="norm")(x, update_stats=True))


class Counting(nn.Module):
    """Two layers, and variables that belong to both: their names tell of no parameter."""

    @nn.compact
    def __call__(self, x):
        calls = self.variable("batch_stats", "calls", jnp.zeros, ())
        mean = self.variable("batch_stats", "kernel/mean", jnp.zeros, (4,))
        calls.value += 1
        x = nn.Dense(4, name="second")(nn.relu(nn.Dense(5, name="first")(x)))
        mean.value = 0.5 * mean.value + x.mean(0)
        return x


class Counted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(Counting(name="pair")(x))


def state_after(net, *frozen, steps=2):
    """The variables that do not train before and after some steps, by name."""
    variables = net.init(jax.random.key(1), X)
    layers = sfj.linen.find_layers(net, variables, X)
    chosen = sfj.Frozen(layers, frozenset(name for name in layers.names if name.endswith(frozen)))
    assert len(chosen.names) == len(frozen)
    statistics = before = variables["batch_stats"]
    for _ in range(steps):
        with sfj.linen.hold(chosen):
            _, updates = net.apply(
                {"params": variables["params"], "batch_stats": statistics}, X, mutable=["batch_stats"]
            )
        statistics = updates["batch_stats"]
    return paths.flatten(before), paths.flatten(statistics)


@pytest.mark.parametrize(
    ("frozen", "held"),
    [
        ((), ""),
        (("first",), "norm/pair/first"),
        (("second",), "norm/pair/second"),
        (("first", "second"), "norm/pair"),
    ],
    ids=["nothing", "first", "second", "both"],
)
@pytest.mark.slow
def test_what_is_named_by_a_parameter_is_held_with_its_layer(frozen, held):
    before, after = state_after(Spectral(), *frozen)
    assert len(before) == 4
    for name, leaf in before.items():
        assert np.array_equal(after[name], leaf) == bool(held and name.startswith(held)), name


@pytest.mark.parametrize(("frozen", "is_held"), [((), False), (("first",), False), (("first", "second"), True)])
def test_what_belongs_to_several_layers_goes_on_until_all_are_frozen(frozen, is_held):
    before, after = state_after(Counted(), *frozen)
    assert set(before) == {"pair/calls", "pair/kernel/mean"}
    for name, leaf in before.items():
        assert np.array_equal(after[name], leaf) == is_held, name
