import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.programs.nnx_call import Watch
from tests.support.flattenings import Flattenings

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


def plain_step(model, optimizer, x):
    loss, grads = optimizer.value_and_grad(loss_fn)(model, x)
    optimizer.update(model, grads)
    return {"loss": loss}


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


@pytest.mark.slow
def test_the_same_bits_as_nnx_jit_and_modules_are_not_taken_apart(monkeypatch):
    (model, optimizer), (plain, plain_optimizer) = setting(), setting()
    step, train_step = sfj.TrainStep(plain_step), nnx.jit(plain_step)
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
    step, train_step = sfj.TrainStep(plain_step), nnx.jit(plain_step)
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
    step, train_step = sfj.TrainStep(plain_step), nnx.jit(plain_step)
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
    step, train_step = sfj.TrainStep(plain_step), nnx.jit(plain_step)
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
    step = sfj.TrainStep(plain_step)
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
    step = sfj.TrainStep(plain_step)
    for n in range(3):
        step(model, optimizer, batch(n))
    with pytest.raises(TypeError, match="dot_general"):
        step(model, optimizer, jnp.ones((6, 5)))
    step(model, optimizer, batch(3))
    assert len(step.programs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("donate", [True, ("model", "optimizer"), "model"])
def test_donated_buffers_are_given_up(donate):
    (model, optimizer), (plain, plain_optimizer) = setting(), setting()
    step, reference = sfj.TrainStep(plain_step, donate=donate), nnx.jit(plain_step)
    for n in range(5):
        old = model.head.kernel[...]
        reference(plain, plain_optimizer, batch(n))
        step(model, optimizer, batch(n))
        assert old.is_deleted()
    assert_same((model, plain), (optimizer, plain_optimizer))


@pytest.mark.slow
def test_models_take_turns_and_are_not_kept_alive(monkeypatch):
    step, nets = sfj.TrainStep(plain_step), [setting() for _ in range(2)]
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
    step = sfj.TrainStep(plain_step)
    for n in range(3):
        step(model, optimizer, batch(n))
    old = [weakref.ref(leaf) for leaf in jax.tree.leaves(nnx.state(optimizer))]
    optimizer.freeze(model, ["first"])
    step(model, optimizer, batch(3))
    gc.collect()
    assert not any(leaf() is not None for leaf in old)


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
