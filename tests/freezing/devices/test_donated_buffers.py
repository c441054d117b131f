"""Donated buffers of active layers are used again."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax import Frozen
from smartfrz_jax.cost.measured import program_cost
from tests.freezing.devices.network import ADAMW, NAMES, WIDTHS, X, Y, arrays, compiled_text, make, step, train_step

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]


def aliases(text) -> int:
    """How many results take the place of an argument."""
    (table,) = re.findall(r"input_output_alias=\{(.*?)\}, entry", text)
    return len(re.findall(r"(?:may|must)-alias", table))


def peak_bytes(jitted, *args) -> int:
    return program_cost(jitted, *args).peak_bytes


@pytest.mark.parametrize("frozen", [NAMES[:2], NAMES[:3], (NAMES[1],)], ids=["half", "most", "middle"])
def test_donated_buffers_in_nnx(frozen):
    donating = nnx.jit(step, donate_argnums=(0, 1))
    model, optimizer = make()
    optimizer.freeze(model, list(frozen))
    before = arrays(model)
    expected_model, expected_optimizer = make()
    expected_optimizer.freeze(expected_model, list(frozen))
    leaves = len(jax.tree.leaves(nnx.state((model, optimizer))))
    assert aliases(compiled_text(donating, model, optimizer, X, Y)) == leaves
    saved = peak_bytes(train_step, model, optimizer, X, Y) - peak_bytes(donating, model, optimizer, X, Y)
    # Of active parameters XLA may hold the new beside the old for a while, for the backward pass needs the old.
    assert saved >= sum(leaf.nbytes for name, leaf in before.items() if name.startswith(frozen))
    for _ in range(3):
        donating(model, optimizer, X, Y)
        train_step(expected_model, expected_optimizer, X, Y)
    expected = arrays(expected_model)
    for name, leaf in arrays(model).items():
        assert np.array_equal(leaf, before[name]) == name.startswith(frozen), name
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    optimizer.freeze(model, Frozen(optimizer.frozen.layers))
    donating(model, optimizer, X, Y)


def test_donated_buffers_of_a_bare_pytree():
    params = {name: {"kernel": jnp.ones((n, m))} for name, n, m in zip(NAMES, WIDTHS[:-1], WIDTHS[1:], strict=True)}

    def apply_fn(params, x):
        for name in NAMES:
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    layers = sfj.find_layers(params, apply_fn, X)
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=params, tx=ADAMW, layers=layers).freeze(NAMES[:2])

    def step(state, x, y):
        loss, grads = state.value_and_grad(lambda params: jnp.square(apply_fn(params, x) - y).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    donating = jax.jit(step, donate_argnames="state")
    before = jax.tree.map(np.array, state.params)
    assert aliases(compiled_text(donating, state, X, Y)) == len(jax.tree.leaves(state))
    saved = peak_bytes(jax.jit(step), state, X, Y) - peak_bytes(donating, state, X, Y)
    assert saved >= sum(state.params[name]["kernel"].nbytes for name in NAMES[:2])
    pointers = {name: state.params[name]["kernel"].unsafe_buffer_pointer() for name in NAMES[:2]}
    for _ in range(3):
        old = state
        state, _ = donating(state, X, Y)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    for name in NAMES:
        kernel = state.params[name]["kernel"]
        assert np.array_equal(kernel, before[name]["kernel"]) == (name in NAMES[:2])
        assert name not in pointers or kernel.unsafe_buffer_pointer() == pointers[name]
