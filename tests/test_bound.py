import dataclasses
import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct

import smartfrz_jax as sfj
from smartfrz_jax.abstract import Arguments
from smartfrz_jax.bound import Watch, bind

pytestmark = pytest.mark.usefixtures("jax_defaults")


class Net(nnx.Module):
    def __init__(self, seed: int = 0):
        rngs = nnx.Rngs(params=seed, dropout=seed + 1)
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)
        self.scale = 1.0

    def __call__(self, x):
        return self.scale * self.head(self.dropout(nnx.relu(self.norm(self.first(x)))))


def loss_fn(model, x):
    return jnp.mean(model(x) ** 2)


@struct.dataclass
class Holder:
    content: Any


@dataclasses.dataclass
class Taking:
    """A program of which only the first results are taken."""

    compiled: Any
    results: int

    def __call__(self, x):
        return self.compiled(x)[: self.results]


def make_step():
    @nnx.jit
    def train_step(model, optimizer, x):
        loss, grads = optimizer.value_and_grad(loss_fn)(model, x)
        optimizer.update(model, grads)
        return {"loss": loss}

    return train_step


TX = optax.adamw(1e-2)


def setting(tx=TX):
    model = Net()
    layers = sfj.nnx.find_layers(model, jnp.ones((2, 4)))
    return model, sfj.nnx.Optimizer(model, tx, wrt=nnx.Param, layers=layers)


def batch(step: int, size: int = 6) -> jax.Array:
    return jax.random.normal(jax.random.key(step), (size, 4))


def assert_same(*pairs):
    for a, b in pairs:
        for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
            x, y = (jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (x, y))
            np.testing.assert_array_equal(x, y)


class Flattenings:
    """Counts how often NNX takes modules apart."""

    def __init__(self, monkeypatch):
        from flax.nnx import graphlib

        self.count = 0
        for name in ("flatten", "unflatten"):
            monkeypatch.setattr(graphlib, name, self.counted(getattr(graphlib, name)))
        for context, name in ((graphlib.SplitContext, "flatten"), (graphlib.MergeContext, "unflatten")):
            monkeypatch.setattr(context, name, self.counted(getattr(context, name)))

    def counted(self, function):
        def counting(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return counting


@pytest.mark.slow
def test_the_same_bits_as_nnx_jit_and_modules_are_not_taken_apart(monkeypatch):
    (model, optimizer), (plain, plain_optimizer) = setting(), setting()
    step, train_step = sfj.TrainStep(make_step()), make_step()
    flattenings = Flattenings(monkeypatch)
    counts = []
    for n in range(12):
        if n == 4:
            optimizer.freeze(model, ["first"])
            plain_optimizer.freeze(plain, ["first"])
        size = 6 if n % 3 else 5  # two programs take turns
        expected = train_step(plain, plain_optimizer, batch(n, size))
        before = flattenings.count
        program = step.program(model, optimizer, batch(n, size))
        got = step(model, optimizer, batch(n, size))
        assert program.frozen == optimizer.frozen
        counts.append(flattenings.count - before)
        np.testing.assert_array_equal(got["loss"], expected["loss"])
        assert_same((model, plain), (optimizer, plain_optimizer))
    assert len(step.programs) == 4
    assert counts[0] > 0
    assert counts[10:] == [0, 0]


@pytest.mark.slow
def test_a_value_that_is_set_between_steps_is_used():
    (model, optimizer), (plain, plain_optimizer) = setting(), setting()
    step, train_step = sfj.TrainStep(make_step()), make_step()
    for n in range(6):
        for net in (model, plain):
            if n == 4:
                net.head.bias[...] = jnp.full(3, 7.0)
        train_step(plain, plain_optimizer, batch(n))
        step(model, optimizer, batch(n))
    assert_same((model, plain), (optimizer, plain_optimizer))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.eval(),
        lambda net: setattr(net, "scale", 3.0),
        lambda net: setattr(net.dropout, "deterministic", True),
        lambda net: net.head.kernel.set_metadata(note="new"),
    ],
    ids=["eval", "static attribute", "of a submodule", "metadata"],
)
def test_what_a_module_is_made_of_is_part_of_the_program(change):
    (model, optimizer), (plain, plain_optimizer) = setting(), setting()
    step, train_step = sfj.TrainStep(make_step()), make_step()
    for n in range(8):
        if n == 4:
            change(model)
            change(plain)
        train_step(plain, plain_optimizer, batch(n))
        step(model, optimizer, batch(n))
    assert_same((model, plain), (optimizer, plain_optimizer))
    assert len(step.programs) == 2


@pytest.mark.slow
def test_a_new_submodule_trains_in_place_of_the_old():
    (model, optimizer), (plain, plain_optimizer) = setting(), setting()
    step, train_step = sfj.TrainStep(make_step()), make_step()
    for n in range(8):
        for net in (model, plain):
            if n == 4:
                net.head = Net(9).head
        train_step(plain, plain_optimizer, batch(n))
        step(model, optimizer, batch(n))
    assert_same((model, plain), (optimizer, plain_optimizer))


@pytest.mark.slow
def test_arrays_on_another_device_are_another_program():
    model, optimizer = setting()
    step = sfj.TrainStep(make_step())
    for n in range(3):
        step(model, optimizer, batch(n))
    other = jax.devices()[1]
    for node in (model, optimizer):
        nnx.update(node, jax.device_put(nnx.state(node), other))
    for n in range(3):
        loss = step(model, optimizer, jax.device_put(batch(n), other))["loss"]
    assert loss.devices() == {other}
    assert len(step.programs) == 2


@pytest.mark.slow
def test_an_error_of_the_step_itself_is_not_hidden():
    model, optimizer = setting()
    step = sfj.TrainStep(make_step())
    for n in range(3):
        step(model, optimizer, batch(n))
    with pytest.raises(TypeError, match="dot_general"):
        step(model, optimizer, jnp.ones((6, 5)))
    step(model, optimizer, batch(3))
    assert len(step.programs) == 1


@pytest.mark.slow
def test_donated_buffers_are_given_up():
    @nnx.jit(donate_argnums=(0, 1))
    def train_step(model, optimizer, x):
        loss, grads = optimizer.value_and_grad(loss_fn)(model, x)
        optimizer.update(model, grads)
        return loss

    (model, optimizer), (plain, plain_optimizer) = setting(), setting()
    step, reference = sfj.TrainStep(train_step), make_step()
    for n in range(5):
        old = model.head.kernel[...]
        reference(plain, plain_optimizer, batch(n))
        step(model, optimizer, batch(n))
        assert old.is_deleted()
    assert_same((model, plain), (optimizer, plain_optimizer))


@pytest.mark.slow
def test_models_take_turns_and_are_not_kept_alive(monkeypatch):
    step, nets = sfj.TrainStep(make_step()), [setting() for _ in range(2)]
    flattenings, count = Flattenings(monkeypatch), 0
    for n in range(6):
        for model, optimizer in nets:
            before = flattenings.count
            step(model, optimizer, batch(n))
            count = flattenings.count - before
    assert count == 0
    del model, optimizer
    alive = [[weakref.ref(leaf) for leaf in jax.tree.leaves(nnx.state(net))] for net in nets]
    del nets[1]
    gc.collect()
    assert all(leaf() is not None for leaf in alive[0])
    assert not any(leaf() is not None for leaf in alive[1])


@pytest.mark.slow
def test_old_optimizer_state_is_released_at_the_first_step_after_a_freeze():
    model, optimizer = setting()
    step = sfj.TrainStep(make_step())
    for n in range(3):
        step(model, optimizer, batch(n))
    old = [weakref.ref(leaf) for leaf in jax.tree.leaves(nnx.state(optimizer))]
    optimizer.freeze(model, ["first"])
    step(model, optimizer, batch(3))
    gc.collect()
    assert not any(leaf() is not None for leaf in old)


class TestBind:
    """What cannot be attributed is called in the usual way."""

    def stage(self, function, *args):
        return nnx.jit(function).lower(*args).compile()

    def settle(self, stage, *args):
        """The second call: NNX sorts attributes in the first."""
        bind(stage, Arguments(args))
        return bind(stage, Arguments(args))

    def test_binds(self):
        model = Net()

        def double(model, x):
            model.head.bias[...] *= 2
            return x.sum()

        out, bound = self.settle(self.stage(double, model, batch(0)), model, batch(0))
        assert bound is not None
        assert bound.holds(Arguments((model, batch(0))))
        model.head.bias[...] = jnp.ones(3)
        np.testing.assert_array_equal(bound(Arguments((model, batch(0)))), out)
        assert model.head.bias[...].tolist() == [2.0, 2.0, 2.0]
        assert not bound.holds(Arguments((Net(), batch(0))))

    @pytest.mark.slow
    def test_binds_modules_inside_of_other_arguments(self, monkeypatch):
        nets = [nnx.Linear(2, 2, rngs=nnx.Rngs(n)) for n in range(4)]

        def double(first, others, holder, x):
            for n, net in enumerate((first, others["a"][0], others["b"], holder.content[0])):
                net.bias[...] += (n + 1) * x
            return {"sum": x.sum()}

        args = nets[0], {"a": [nets[1]], "b": nets[2]}, Holder((nets[3], jnp.ones(1))), jnp.ones(2)
        _, bound = self.settle(self.stage(double, *args), *args)
        assert bound is not None
        assert bound.holds(Arguments(args))
        flattenings = Flattenings(monkeypatch)
        assert bound(Arguments(args))["sum"] == 2.0
        assert flattenings.count == 0
        for n, net in enumerate(nets):
            np.testing.assert_array_equal(net.bias[...], 3.0 * (n + 1))
        assert not bound.holds(Arguments((nets[0], {"a": [nets[2]], "b": nets[1]}, *args[2:])))
        del args
        del net
        gone = weakref.ref(nets.pop(1))
        gc.collect()
        assert gone() is None

    def test_variables_by_themselves(self):
        model, first, second = (
            nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
            nnx.Variable(jnp.zeros(())),
            nnx.Variable(jnp.ones(())),
        )

        def step(model, first, others, x):
            first[...] += 1
            others["second"][...] += 1
            return x.sum()

        args = model, first, {"second": second}, jnp.ones(2)
        _, bound = self.settle(self.stage(step, *args), *args)
        assert bound is None
        assert (first[...], second[...]) == (2.0, 3.0)

    def test_variables_that_share_an_array(self):
        model = Net()

        def total(model):
            return model.norm.scale.sum() + 2 * model.norm.bias.sum()

        stage = self.stage(total, model)
        assert self.settle(stage, model)[1] is not None
        model.norm.scale[...] = model.norm.bias[...]
        out, bound = bind(stage, Arguments((model,)))
        assert bound is None
        assert out == 0.0

    def test_a_step_that_returns_a_module(self):
        model = Net()
        out, bound = self.settle(self.stage(lambda model: model.head, model), model)
        assert bound is None
        assert out is model.head

    def test_a_result_that_nothing_takes(self):
        x = jnp.ones(2)
        double = jax.jit(lambda x: (2 * x, x + 1))
        for stage, is_bound in ((Taking(double, 2), True), (Taking(double, 1), False)):
            out, bound = bind(stage, Arguments((x,)))
            np.testing.assert_array_equal(out[0], [2.0, 2.0])
            assert (bound is not None) == is_bound

    def test_a_step_that_changes_attributes(self):
        model = Net()

        def grow(model):
            model.scale = model.scale + 1.0
            return jnp.ones(())

        _, bound = bind(self.stage(grow, model), Arguments((model,)))
        assert bound is None
        assert model.scale == 2.0


def test_watch_sees_pytrees_that_change_in_place():
    model = Net()
    model.notes = nnx.data({"a": nnx.Variable(jnp.ones(2))})
    model.names = nnx.data([nnx.Variable(jnp.ones(2))])
    watch = Watch((model,))
    assert watch.is_unchanged()
    model.names.append(nnx.Variable(jnp.zeros(2)))
    assert not watch.is_unchanged()
    watch = Watch((model,))
    model.notes["a"] = nnx.Variable(jnp.ones(2))
    assert not watch.is_unchanged()
    watch = Watch((model,))
    model.notes["a"].set_raw_value(optax.MaskedNode())  # pyright: ignore[reportArgumentType]
    assert not watch.is_unchanged()
