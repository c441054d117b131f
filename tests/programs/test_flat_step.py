"""Steps as functions of flat arrays: what they change is written back, whatever the arguments hold."""

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors, nnx, struct

from smartfrz_jax.programs import flat_step
from smartfrz_jax.programs.arguments import Arguments
from smartfrz_jax.programs.nnx_call import Bounds, Watch
from tests.support.flattenings import Flattenings

pytestmark = pytest.mark.usefixtures("jax_defaults")


class Net(nnx.Module):
    def __init__(self):
        self.head = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.scale = 1.0


@struct.dataclass
class Holder:
    content: Any


def compiled(step, *args, donate: Any = False):
    traced, targets = flat_step.trace(step, Arguments(args), donate)
    call = flat_step.Call(traced.lower().compile(), targets)

    def run(*args):
        parts = Arguments(args)
        return call(parts, Watch(parts.nodes))

    return run, targets


def test_only_what_changes_is_returned_and_written():
    model = Net()

    def double(model, x):
        model.head.bias[...] *= 2
        model.head.kernel[...] = model.head.kernel[...]
        return x.sum()

    model.head.bias[...] = jnp.ones(2)
    run, targets = compiled(double, model, jnp.ones(3))
    assert len(targets) == 1
    kernel = model.head.kernel[...]
    assert run(model, jnp.ones(3)) == 3.0
    assert model.head.bias[...].tolist() == [2.0, 2.0]
    assert model.head.kernel[...] is kernel
    other = Net()
    run(other, jnp.ones(3))  # of any modules that are made alike
    assert other.head.bias[...].tolist() == [0.0, 0.0]


def test_modules_inside_of_other_arguments_without_taking_them_apart(monkeypatch):
    nets = [nnx.Linear(2, 2, rngs=nnx.Rngs(n)) for n in range(4)]

    def add(first, others, holder, x):
        for n, net in enumerate((first, others["a"][0], others["b"], holder.content[0])):
            net.bias[...] += (n + 1) * x
        return {"sum": x.sum()}

    args = nets[0], {"a": [nets[1]], "b": nets[2]}, Holder((nets[3], jnp.ones(1))), jnp.ones(2)
    run, targets = compiled(add, *args)
    assert len(targets) == 4
    flattenings = Flattenings(monkeypatch)
    assert run(*args)["sum"] == 2.0
    assert flattenings.count == 0
    for n, net in enumerate(nets):
        np.testing.assert_array_equal(net.bias[...], n + 1.0)


def test_variables_by_themselves_and_values_that_swap():
    first, second = nnx.Variable(jnp.zeros(())), nnx.Variable(jnp.ones(()))

    def step(model, first, others):
        first[...], others["second"][...] = others["second"][...], first[...] + 5

    args = Net(), first, {"second": second}
    run, _ = compiled(step, *args)
    run(*args)
    assert (first[...], second[...]) == (1.0, 5.0)


def test_variables_that_share_an_array():
    model = Net()
    model.other = nnx.Param(jnp.zeros(2))
    model.other[...] = model.head.bias[...]

    def step(model):
        model.other[...] += 1
        return model.head.bias[...] + 0

    run, _ = compiled(step, model)
    np.testing.assert_array_equal(run(model), 0.0)
    np.testing.assert_array_equal(model.other[...], 1.0)
    np.testing.assert_array_equal(model.head.bias[...], 0.0)


def test_shared_variables_are_one():
    model = Net()
    twin = [model, nnx.Sequential(model.head)]

    def step(nets):
        nets[0].head.bias[...] += 1
        nets[1].layers[0].bias[...] += 1

    run, targets = compiled(step, twin)
    run(twin)
    assert len(targets) == 1
    np.testing.assert_array_equal(model.head.bias[...], 2.0)


class TestCalledInTheUsualWay:
    """What changes more than the values of variables is a program of ``nnx.jit``."""

    def test_a_step_that_returns_a_module(self):
        model = Net()
        run, targets = compiled(lambda model: model.head, model)
        assert targets is None
        assert run(model) is model.head

    def test_a_step_that_changes_attributes(self):
        model = Net()

        def grow(model):
            model.scale = model.scale + 1.0
            return jnp.ones(())

        run, targets = compiled(grow, model)
        assert targets is None
        run(model)
        assert model.scale == 2.0

    def test_a_step_that_adds_a_variable(self):
        model = Net()

        def add(model, x):
            model.seen = nnx.Intermediate(x)

        run, targets = compiled(add, model, jnp.ones(2))
        assert targets is None
        run(model, jnp.ones(2))
        np.testing.assert_array_equal(model.seen[...], 1.0)

    def test_arrays_that_are_no_variables(self):
        model = Net()
        model.table = nnx.data(jnp.zeros(2))

        def step(model):
            model.table = model.table + 1

        run, targets = compiled(step, model)
        assert targets is None
        run(model)
        run(model)
        np.testing.assert_array_equal(model.table, 2.0)


def test_what_is_put_into_a_variable_may_be_numpy_or_a_number():
    model = Net()

    def reset(model):
        model.head.bias[...] = np.full(2, 3.0, np.float32)
        model.head.kernel.set_raw_value(jnp.zeros((2, 2)))

    run, targets = compiled(reset, model)
    assert len(targets) == 2
    run(model)
    np.testing.assert_array_equal(model.head.bias[...], 3.0)
    np.testing.assert_array_equal(model.head.kernel[...], 0.0)


def test_donated_variables_come_back_even_if_they_are_the_same():
    model, x = Net(), jnp.ones(2)

    def step(model, x):
        model.head.bias[...] += x
        return x + 1

    run, targets = compiled(step, model, x, donate=frozenset([0]))
    assert len(targets) == 2
    old = [model.head.bias[...], model.head.kernel[...]]
    kernel = np.array(old[1])
    run(model, x)
    assert [array.is_deleted() for array in old] == [True, True]
    assert not x.is_deleted()
    np.testing.assert_array_equal(model.head.kernel[...], kernel)
    run, _ = compiled(step, model, x, donate=frozenset([1]))
    run(model, x)
    assert x.is_deleted()


class TestBounds:
    def bound(self, *nodes):
        bounds, parts = Bounds(), Arguments(nodes)
        bounds.bind(parts, Watch(parts.nodes), "program")
        return bounds, parts.call

    def test_holds_for_the_very_same_modules(self):
        model, other = Net(), Net()
        bounds, call = self.bound(model, jnp.ones(2))
        bound = bounds[call]
        assert bound.holds(Arguments((model, jnp.ones(2))))
        assert not bound.holds(Arguments((other, jnp.ones(2))))
        assert not bound.holds(Arguments((model, other, jnp.ones(2))))

    @pytest.mark.slow
    def test_is_gone_when_a_module_is(self):
        model, other = Net(), Net()
        bounds, call = self.bound(model, {"a": [other]})
        assert call in bounds
        gone = weakref.ref(other)
        del other
        gc.collect()
        assert gone() is None
        assert call not in bounds

    def test_lone_variables_are_not_kept_alive(self):
        variable = nnx.Variable(jnp.ones(2))
        bounds, _ = self.bound(Net(), variable)
        assert not bounds


def test_errors_of_the_step_are_its_own():
    with pytest.raises(ZeroDivisionError):
        compiled(lambda model: 1 / 0, Net())
    outside = Net()

    def step(model):
        outside.head.bias[...] += model.head.bias[...]

    with pytest.raises(errors.TraceContextError, match="different trace"):
        compiled(step, Net())


def test_nodes_in_variables():
    """optax puts empty nodes where a layer is frozen."""
    model = Net()
    model.nothing = nnx.Variable(optax.MaskedNode())
    run, targets = compiled(lambda model: model.head.bias[...] + 1, model)
    assert targets == []
    np.testing.assert_array_equal(run(model), 1.0)
    assert jax.tree.leaves(model.nothing.get_raw_value()) == []
