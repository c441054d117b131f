"""Steps that may overwrite their arguments: the same results, through every freeze and return."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj

pytestmark = pytest.mark.usefixtures("jax_defaults")
X = jax.random.normal(jax.random.key(1), (8, 4))
NAMES = "abc"
SETS = ("", "a", "a", "ab", "b", "", "", "c")
OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "hyperparameters": optax.inject_hyperparams(optax.adamw)(1e-2),
    "several": optax.MultiSteps(optax.adam(1e-2), 2),
    "prodigy": optax.contrib.prodigy(0.1),
}


def forward(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name])
    return x


def linen_step(state, x):
    loss, grads = state.value_and_grad(lambda params: (forward(params, x) ** 2).mean())(state.params)
    return state.apply_gradients(grads=grads), loss


def linen_state(tx, returning="fresh"):
    params = {name: jax.random.normal(jax.random.key(n), (4, 4)) for n, name in enumerate(NAMES)}
    layers = sfj.find_layers(params, forward, X)
    return sfj.linen.TrainState.create(apply_fn=forward, params=params, tx=tx, layers=layers, returning=returning)


@pytest.mark.slow
@pytest.mark.parametrize("returning", ["fresh", "kept"])
@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_train_state_through_freezes_and_returns(tx, returning):
    state, plain = (linen_state(tx, returning) for _ in range(2))
    step, reference = sfj.TrainStep(linen_step, donate=True), jax.jit(linen_step)
    for names in SETS:
        frozen = sfj.Frozen(state.frozen.layers, frozenset(names))
        state, plain = state.freeze(frozen), plain.freeze(frozen)
        old = state
        state, loss = step(state, X)
        plain, expected = reference(plain, X)
        np.testing.assert_array_equal(loss, expected)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)
    assert len(step.programs) == len(set(SETS))


class Net(nnx.Module):
    def __init__(self):
        self.first, self.second, self.last = (nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in range(3))
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.last(self.dropout(nnx.tanh(self.second(nnx.tanh(self.norm(self.first(x)))))))


def nnx_step(model, optimizer, x):
    loss, grads = optimizer.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("lead", [0, 2])
def test_a_model_under_a_policy_that_freezes_and_lets_return(lead):
    def decide(state, layers, *, step, **signals):
        return frozenset(layers.names[: (0, 0, 1, 1, 2, 2, 0)[min(step, 6)]]), state

    def run(**options):
        model = Net()
        optimizer = sfj.nnx.Optimizer(model, optax.adam(1e-2), layers=sfj.nnx.find_layers(model, X))
        step = sfj.TrainStep(nnx_step, **options)
        policy = sfj.Policy(lambda layers, params: (), decide)
        freezer = sfj.nnx.Freezer(model, optimizer, policy, train_step=step, lead=lead)
        losses = []
        for _ in range(10):
            old = model.first.kernel[...], model.last.kernel[...]
            losses.append(float(step(model, optimizer, X)))
            assert [array.is_deleted() for array in old] == [bool(options)] * 2  # also of what is frozen
            freezer.step()
        return losses, nnx.state(model, nnx.Param)

    losses, params = run(donate=True)
    expected, expected_params = run()
    assert losses == expected
    jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(params), nnx.as_pure(expected_params))


@pytest.mark.slow
def test_other_arguments_only_by_name():
    def train_step(state, x, averages):
        state, loss = linen_step(state, x)
        return state, jax.tree.map(lambda a, b: (a + b) / 2, averages, state.params), loss

    for donate, gone in ((True, False), (("state", "averages"), True)):
        state = linen_state(optax.adam(1e-2))
        averages = jax.tree.map(jnp.zeros_like, state.params)
        new, _, _ = sfj.TrainStep(train_step, donate=donate)(state, X, averages)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state))
        assert all(leaf.is_deleted() == gone for leaf in jax.tree.leaves(averages))
        assert not X.is_deleted()
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new.params))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"donate: got 'model', expected True or names of arguments .*: state, x"):
        sfj.TrainStep(linen_step, donate="model")
    with pytest.raises(TypeError, match="train_step: got int, expected a function"):
        sfj.TrainStep(3)
    with pytest.raises(TypeError, match=r"train_step: got linen_step jitted by jax.jit, expected the plain function"):
        sfj.TrainStep(jax.jit(linen_step, donate_argnums=0))
    with pytest.raises(TypeError, match=r"train_step: got nnx_step jitted by nnx.jit, .* leave out nnx.jit, and give"):
        sfj.TrainStep(nnx.jit(nnx_step))
