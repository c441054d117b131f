"""Static attributes of modules need not be hashable: configurations of language models are plain dataclasses."""

import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct

import smartfrz_jax as sfj

pytestmark = pytest.mark.usefixtures("jax_defaults")
X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


@dataclasses.dataclass
class Config:
    """Compared by its values; has no hash."""

    width: int = 3
    scale: float = 2.0
    names: list = dataclasses.field(default_factory=lambda: ["a"])


class Plain:
    """Compared by identity."""

    def __init__(self, scale=2.0):
        self.scale = scale


class Unequal(Plain):
    """Cannot be compared, like a NumPy array."""

    __hash__ = None

    def __eq__(self, other):
        raise ValueError("the truth value is ambiguous")


class Net(nnx.Module):
    def __init__(self, config):
        self.config = nnx.static(config)
        self.first, self.last = (nnx.Linear(3, 3, rngs=nnx.Rngs(seed)) for seed in range(2))

    def __call__(self, x):
        scale = self.config["scale"] if isinstance(self.config, dict) else self.config.scale
        return scale * self.last(nnx.tanh(self.first(x)))


def plain_step(model, optimizer, x):
    loss, grads = optimizer.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss


TX = optax.adam(1e-2)


def setting(config):
    model = Net(config)
    return model, sfj.nnx.Optimizer(model, TX, layers=sfj.nnx.find_layers(model, X))


KINDS = {
    "dataclass": (Config(), Config(scale=3.0)),
    "dict": ({"scale": 2.0, "names": ["a"]}, {"scale": 3.0, "names": ["a"]}),
    "by identity": (Plain(), Plain(3.0)),
    "not comparable": (Unequal(), Unequal(3.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "other"), KINDS.values(), ids=KINDS)
def test_told_apart_by_equality_or_identity(config, other):
    model, optimizer = setting(config)
    plain = setting(config)
    step = sfj.TrainStep(plain_step)
    for n in range(5):
        if n == 3:
            for net in (model, plain[0]):
                net.config = other
        # Not jitted: nnx.jit does not take what cannot be compared.
        np.testing.assert_allclose(step(model, optimizer, X), plain_step(*plain, X), rtol=1e-5)
    assert len(step.programs) == 2
    model.config = config
    step(model, optimizer, X)
    assert len(step.programs) == 2  # the first one again


def test_an_equal_configuration_is_the_same_program():
    model, optimizer = setting(Config())
    step = sfj.TrainStep(plain_step)
    step(model, optimizer, X)
    model.config = copy.deepcopy(model.config)
    step(model, optimizer, X)
    other = setting(Config())
    step(*other, X)
    assert len(step.programs) == 1


@pytest.mark.parametrize("config", [one for one, _ in KINDS.values()], ids=KINDS)
@pytest.mark.slow
def test_programs_are_compiled_ahead(config):
    model, optimizer = setting(config)
    step = sfj.TrainStep(plain_step)

    def decide(state, layers, *, step, **signals):
        return frozenset(layers.names[:1] if step >= 2 else ()), state

    policy = sfj.Policy(lambda layers, params: (), decide)
    freezer = sfj.nnx.Freezer(model, optimizer, policy, train_step=step, lead=1)
    for _ in range(5):
        step(model, optimizer, X)
        freezer.step()
    assert [program.ahead for program in step.programs] == [False, True]


class State(sfj.linen.TrainState):
    """With a static field of the user's."""

    config: object = struct.field(pytree_node=False, kw_only=True)


@pytest.mark.parametrize("kind", ["dataclass", "dict", "by identity"])  # as far as jax.jit compares them
def test_static_fields_of_a_train_state(kind):
    config, other = KINDS[kind]
    params = {name: jnp.eye(3) for name in "ab"}

    def apply_fn(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    layers = sfj.find_layers(params, apply_fn, X)
    state = State.create(apply_fn=apply_fn, params=params, tx=TX, layers=layers, config=config)

    def train_step(state, x):
        scale = state.config["scale"] if isinstance(state.config, dict) else state.config.scale
        loss, grads = state.value_and_grad(lambda params: (scale * apply_fn(params, x) ** 2).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    step = sfj.TrainStep(train_step)
    losses = [float(step(state.replace(config=one), X)[1]) for one in (config, other, config)]
    assert losses[0] == losses[2] != losses[1]
    assert len(step.programs) == 2
