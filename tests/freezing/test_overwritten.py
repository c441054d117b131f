"""Values that are overwritten by their gradients: the scales of Flax's operations in fp8."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths

pytestmark = pytest.mark.usefixtures("jax_defaults")


class Net(nn.Module):
    """Two layers in fp8, whose names sort against the order of use, and one that is not."""

    @nn.compact
    def __call__(self, x):
        for name in ("z_first", "a_second"):
            x = nn.relu(nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp, name=name)(x))
        return nn.Dense(4, name="head")(x)


NET, X = Net(), jnp.linspace(-1.0, 1.0, 256).reshape(16, 16)
VARIABLES = NET.init(jax.random.key(0), X)
NAMES = ("params/z_first", "params/a_second", "params/head")


def loss_fn(params):
    return jnp.square(NET.apply(params, X)).mean()


def steps(state, value_and_grad, n=3):
    for _ in range(n):
        state = state.apply_gradients(grads=value_and_grad(state)(loss_fn)(state.params)[1])
    return state


def ours(tx, **options):
    layers = sfj.linen.find_layers(NET, VARIABLES, X)
    return sfj.linen.TrainState.create(apply_fn=NET.apply, params=VARIABLES, tx=tx, layers=layers, **options)


def test_they_belong_to_the_layer_that_they_are_the_scales_of():
    layers = sfj.linen.find_layers(NET, VARIABLES, X)
    assert layers == sfj.find_layers(VARIABLES, NET.apply, X)
    assert layers.names == NAMES
    for layer in layers[:2]:
        module = layer.name.removeprefix("params/")
        assert set(layer.params) == {name for name in layers.owner if module in name.split("/")}
        assert len(layer.params) == 2 + 6
        assert layer.kernels == (f"{layer.name}/kernel",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [optax.adam(1e-2), optax.masked(optax.sgd(0.1), jax.tree.map(lambda leaf: leaf.ndim > 1, VARIABLES["params"]))],
    ids=["adam", "a mask of the parameters proper"],
)
def test_a_step_is_the_stock_one(tx):
    stock = train_state.TrainState.create(apply_fn=NET.apply, params=VARIABLES, tx=tx)
    expected = paths.flatten(steps(stock, lambda state: jax.value_and_grad).params)
    actual = paths.flatten(steps(ours(tx), lambda state: state.value_and_grad).params)
    assert actual.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(actual[name], leaf, err_msg=name)
    history = "_overwrite_with_gradient/z_first/Fp8DirectDotGeneralOp_0/input_amax_history"
    assert jax.tree.structure(ours(tx).unfrozen_opt_state) == jax.tree.structure(stock.opt_state)
    assert np.any(actual[history]), "nothing was overwritten, so nothing is tested"


@pytest.mark.slow
@pytest.mark.parametrize("returning", ["fresh", "kept"])
def test_those_of_a_frozen_layer_hold_still_and_return(returning):
    state = steps(ours(optax.adam(1e-2), returning=returning), lambda state: state.value_and_grad, 1)
    state = state.freeze(["params/a_second"])
    before, after = state.params, steps(state, lambda state: state.value_and_grad, 1)
    moved = jax.tree.map(lambda old, new: not np.array_equal(old, new), before, after.params)
    for name, has_moved in paths.flatten(moved).items():
        if name.startswith("params") or name.endswith("history"):
            assert has_moved == ("a_second" not in name), name
        elif "a_second" in name:
            assert not has_moved, name
    after = after.freeze(sfj.Frozen(after.frozen.layers))
    again = steps(after, lambda state: state.value_and_grad, 1)
    assert not np.array_equal(again.params["params"]["a_second"]["kernel"], before["params"]["a_second"]["kernel"])


def test_nnx_has_no_operations_in_fp8():
    """Where it gets some, what they overwrite must be kept from the optimizer in ``nnx.Optimizer``, too."""
    assert not [name for name in dir(nnx) if "fp8" in name.lower()]
