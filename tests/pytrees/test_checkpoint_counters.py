"""Runs whose state has numbers of Python, saved and restored at any moment, go on bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import dynamic_scale

import smartfrz_jax as sfj
from smartfrz_jax import linen

pytestmark = pytest.mark.usefixtures("jax_defaults")

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
POLICY = sfj.policies.static_prefix([(0.5, 0.5)], total_steps=4)


def counted():
    """Gradient descent whose rate, and direction, hang on numbers of Python in its state."""

    def init(params):
        return {
            "n": 0,
            "rate": 0.5,
            "flip": False,
            "best": float("inf"),
            "double": np.float64(1 / 3),
            "long": np.int64(1),
        }

    def update(grads, state, params=None):
        scale = state["rate"] / (state["n"] + 1) * jnp.where(state["flip"], 0.5, 1.0) * state["double"]
        new = {
            "n": state["n"] + 1, "rate": state["rate"] * 0.9, "flip": jnp.logical_not(state["flip"]),
            "best": jnp.minimum(state["best"], optax.tree.norm(grads)), "double": state["double"] * 0.99,
            "long": state["long"] * 3,
        }  # fmt: skip
        return jax.tree.map(lambda grad: -scale * grad, grads), new

    return optax.GradientTransformation(init, update)


class State(linen.TrainState):
    """With numbers that Flax's examples have in theirs."""

    epoch: int = 0
    warm: bool = True
    scale: dynamic_scale.DynamicScale | None = None


TX = counted()


def apply(params, x):
    return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


def new_state():
    params = {name: {"kernel": jnp.eye(4) * scale} for name, scale in (("a", 1.0), ("b", 0.5))}
    layers = sfj.find_layers(params, apply, X)
    return State.create(
        apply_fn=apply, params=params, tx=TX, layers=layers, scale=dynamic_scale.DynamicScale(growth_interval=2)
    )


@jax.jit
def linen_step(state):
    loss, grads = state.value_and_grad(lambda params: jnp.mean(state.apply_fn(params, X) ** 2))(state.params)
    grown = state.scale.replace(scale=state.scale.scale * 2, fin_steps=state.scale.fin_steps + 1)
    return state.apply_gradients(grads=grads, epoch=state.epoch + 1, warm=state.epoch < 2, scale=grown), loss


def linen_run(start, stop, path, state=None, freezer=None):
    state = new_state() if state is None else state
    freezer = linen.Freezer(state, POLICY) if freezer is None else freezer
    if start is not None:
        state = freezer.restore(path, state)
    for _ in range(start or 0, stop):
        state, loss = linen_step(state)
        state = freezer.step(state, loss=loss)
    return state, freezer


def assert_same(got, expected):
    jitted = jax.jit(lambda tree: tree)
    for a, b in zip(jax.tree.leaves(jitted(got)), jax.tree.leaves(jitted(expected)), strict=True):
        assert (a.dtype, a.weak_type) == (b.dtype, b.weak_type)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_linen_run_with_numbers_of_python_goes_on_bit_for_bit(tmp_path, at):
    straight, _ = linen_run(None, 4, None)
    state, freezer = linen_run(None, at, None)
    freezer.save(tmp_path / "x", state)
    assert_same(linen_run(at, 4, tmp_path / "x")[0], straight)  # into a new state
    later, freezer = linen_run(None, 4, None)
    assert_same(linen_run(at, 4, tmp_path / "x", later, freezer)[0], straight)  # into one that has trained


class Counted(nnx.Module):
    """With a number of Python in a variable."""

    def __init__(self):
        self.a, self.b = (nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in (0, 1))
        self.calls = nnx.BatchStat(0)

    def __call__(self, x):
        self.calls.set_value(self.calls.get_value() + 1)
        return self.b(jnp.tanh(self.a(x))) / self.calls.get_value()


@nnx.jit
def nnx_step(model, optimizer):
    loss, grads = optimizer.value_and_grad(lambda model: jnp.mean(model(X) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def nnx_run(start, stop, path, freezer=None):
    if freezer is None:
        model = Counted()
        layers = sfj.nnx.find_layers(model, X)
        freezer = sfj.nnx.Freezer(model, sfj.nnx.Optimizer(model, TX, layers=layers), POLICY)
    if start is not None:
        freezer.restore(path)
    for _ in range(start or 0, stop):
        freezer.step(loss=nnx_step(freezer.model, freezer.optimizer))
    return freezer


def arrays(freezer):
    return nnx.as_pure(nnx.state((freezer.model, freezer.optimizer)))


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)])
def test_an_nnx_run_with_numbers_of_python_goes_on_bit_for_bit(tmp_path, at):
    straight = arrays(nnx_run(None, 4, None))
    nnx_run(None, at, None).save(tmp_path / "x")
    assert_same(arrays(nnx_run(at, 4, tmp_path / "x")), straight)
    assert_same(arrays(nnx_run(at, 4, tmp_path / "x", nnx_run(None, 4, None))), straight)
