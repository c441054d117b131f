"""Which layer the variables that do not train belong to: statistics, vectors of norms of weights, counters."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from smartfrz_jax.nnx import find_layers

pytestmark = pytest.mark.usefixtures("jax_defaults")

X = jax.ShapeDtypeStruct((2, 4), jnp.float32)


def linear():
    return nnx.Linear(4, 4, rngs=nnx.Rngs(0))


class Statistics(nnx.Module):
    """A user's own: the mean of what its linear map returns, which is written and not read, and a count of calls."""

    def __init__(self):
        self.linear = linear()
        self.mean, self.calls = nnx.BatchStat(jnp.zeros(4)), nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        x = self.linear(x)
        self.mean[...], self.calls[...] = x.mean(0), self.calls[...] + 1
        return x


class Pair(nnx.Module):
    """Two linear maps, whose inputs and outputs it counts and averages."""

    def __init__(self):
        self.first, self.second = linear(), linear()
        self.calls, self.before, self.after = (nnx.BatchStat(jnp.zeros(())) for _ in range(3))

    def __call__(self, x):
        self.calls[...] += 1
        self.before[...] = x.mean()
        x = self.second(self.first(x))
        self.after[...] = x.mean()
        return x


class Sown(nnx.Module):
    def __init__(self):
        self.linear = linear()

    def __call__(self, x):
        self.inputs = nnx.Intermediate(x)
        return self.linear(x)


def normalised(norm, make=linear):
    return norm(make(), rngs=nnx.Rngs(0))


def two():
    return nnx.Sequential(linear(), linear())


SPECTRAL = {"batch_stats/('kernel', 'u')", "batch_stats/('kernel', 'sigma')"}
OF_TWO = "('layers', {}, 'kernel', '{}')"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: normalised(nnx.SpectralNorm), {"layer_instance": SPECTRAL}),
        (lambda: normalised(nnx.WeightNorm), {"layer_instance": {"scales/('kernel',)"}}),
        (
            lambda: normalised(nnx.SpectralNorm, two),
            {
                f"layer_instance/layers/{i}": {f"batch_stats/{OF_TWO.format(i, s)}" for s in ("u", "sigma")}
                for i in range(2)
            },
        ),
        (Statistics, {"linear": {"mean", "calls"}}),
        (Pair, {"": {"before"}, "first": {"calls"}, "second": {"calls", "after"}}),
        (lambda: nnx.BatchNorm(4, use_bias=False, use_scale=False, rngs=nnx.Rngs(0)), {"": {"mean", "var"}}),
        (lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), {"": {"rngs/count", "rngs/key"}}),
        (Sown, {"linear": set()}),
    ],
    ids=["spectral", "weight", "spectral of two", "own", "own of two", "batch norm", "dropout", "sown"],
)
def test_state_belongs_to_the_layer_whose_weights_or_outputs_it_is_made_of(make, expected):
    """Between two linear maps; ``""`` is the one before."""
    model = nnx.Sequential(linear(), make(), linear())
    layers = find_layers(model, X)
    expected = {
        f"layers/1/{layer}" if layer else "layers/0": {f"layers/1/{name}" for name in names}
        for layer, names in expected.items()
    }
    found = {layer.name: {*layer.params, *layer.state} for layer in layers}  # scales train in newer versions of Flax
    found = {
        layer: {name for name in names if not name.endswith(("/kernel", "/bias"))} for layer, names in found.items()
    }
    assert {layer: names for layer, names in found.items() if names or layer in expected} == expected
    assert len(layers) == 2 + len(expected.keys() - {"layers/0"})
    for layer in find_layers(model, X, granularity=lambda name: "/".join(name.split("/")[:2])):
        assert len(layer.state) == len(set(layer.state))


def test_a_counter_of_the_whole_network_belongs_to_all_layers():
    class Net(nnx.Module):
        def __init__(self):
            self.a, self.b, self.calls = linear(), linear(), nnx.Variable(jnp.zeros((), int))

        def __call__(self, x):
            self.calls[...] += 1
            return self.b(self.a(x))

    assert [layer.state for layer in find_layers(Net(), X)] == [("calls",), ("calls",)]
