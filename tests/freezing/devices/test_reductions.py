"""Freezing on many devices: what is frozen is not reduced, and runs decide as on one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import smartfrz_jax as sfj
from smartfrz_jax import Frozen
from tests.freezing.devices.network import (
    ADAMW,
    KINDS,
    NAMES,
    WIDTHS,
    X,
    batch,
    compiled_text,
    gradient_shapes,
    make,
    mesh_of,
    reduced,
    replicate,
    run,
    train_step,
)

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]
FROZEN_SETS = ((), NAMES[:1], NAMES[:3], (NAMES[2],), (NAMES[0], NAMES[3]))


@pytest.mark.slow
def test_gradients_of_frozen_layers_are_not_reduced(mesh):
    model, optimizer = make(ADAMW)
    replicate(model, mesh)
    replicate(optimizer, mesh)
    sizes = {}
    for frozen in FROZEN_SETS:
        optimizer.freeze(model, Frozen(optimizer.frozen.layers, frozenset(frozen)))
        shapes = reduced(compiled_text(train_step, model, optimizer, *batch(mesh)))
        assert shapes == gradient_shapes([name for name in NAMES if name not in frozen])
        sizes[frozen] = sum(4 * math.prod(shape) for shape in shapes)
    for frozen in FROZEN_SETS:
        params = sum(4 * (WIDTHS[NAMES.index(name)] + 1) * WIDTHS[NAMES.index(name) + 1] for name in frozen)
        assert sizes[()] - sizes[frozen] == params


def test_a_clip_and_a_logged_norm_do_not_bring_the_reductions_back(mesh):
    @nnx.jit
    def with_norm(model, optimizer, x, y):
        _, grads = optimizer.value_and_grad(lambda model, x: jnp.square(model(x) - y).mean())(model, x)
        optimizer.update(model, grads)
        return optax.tree.norm(grads)

    model, optimizer = make()
    optimizer.freeze(model, NAMES[:2])
    replicate(model, mesh)
    replicate(optimizer, mesh)
    shapes = reduced(compiled_text(with_norm, model, optimizer, *batch(mesh)))
    assert [shape for shape in shapes if shape] == [shape for shape in gradient_shapes(NAMES[2:]) if shape]


def test_gradients_of_frozen_layers_of_a_bare_pytree_are_not_reduced(mesh):
    params = {name: {"kernel": jnp.ones((n, m))} for name, n, m in zip(NAMES, WIDTHS[:-1], WIDTHS[1:], strict=True)}

    def apply_fn(params, x):
        for name in NAMES:
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    layers = sfj.find_layers(params, apply_fn, X)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=params, tx=ADAMW, layers=layers)

    @jax.jit
    def step(state, x, y):
        loss, grads = state.value_and_grad(lambda params: jnp.square(apply_fn(params, x) - y).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    for frozen in FROZEN_SETS:
        state = state.freeze(Frozen(layers, frozenset(frozen)))
        expected = [shape for shape in gradient_shapes([n for n in NAMES if n not in frozen]) if len(shape) != 1]
        assert reduced(compiled_text(step, state, *batch(mesh))) == expected


def test_batch_norm_of_frozen_layers_is_not_reduced_either(mesh):
    model, optimizer = make(norm=True)
    replicate(model, mesh)
    replicate(optimizer, mesh)
    optimizer.freeze(model, NAMES[:3])
    assert reduced(compiled_text(train_step, model, optimizer, *batch(mesh))) == gradient_shapes(NAMES[3:])


class Stillness(sfj.Predictor):
    """Confident if the records differ little from the newest."""

    def __init__(self):
        super().__init__(sfj.predictor.PredictorConfig(size=8, hidden=4, features=4, head_hidden=4), rngs=nnx.Rngs(0))

    def __call__(self, observation):
        records, mask = observation.records, observation.mask
        moved = jnp.max(jnp.where(mask[:, None], jnp.abs(records - records[-1:]), 0.0))
        return jnp.stack([moved, jnp.float32(0.012)])


POLICIES = {
    "smartfrz": lambda: sfj.smartfrz(
        Stillness(),
        schedule=sfj.policies.Schedule(record_every=1, evaluate_every=2, window=3, patience=1),
        caution=0.5,
        order="any",
    ),
    "autofreeze": lambda: sfj.autofreeze(evaluate_every=3, percentile=60),
    "static prefix": lambda: sfj.static_prefix([(0.4, 0.85)], total_steps=12),
}


@functools.cache
def run_alone(policy):
    """The run on a single device."""
    freezer, params, _ = run(policy())
    return freezer.events, params


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS["params"], ids=KINDS["ids"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_run_on_many_devices_decides_and_computes_what_one_on_a_single_device_does(kind, policy):
    events, expected = run_alone(policy)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        freezer, params, held = run(policy(), mesh)
    assert freezer.events == events
    assert freezer.events
    assert not freezer.frozen.names.issuperset(NAMES)
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert held
    for name, leaf in held.items():
        np.testing.assert_array_equal(params[name], leaf, err_msg=name)


def test_batch_norm_of_a_sharded_batch_has_the_statistics_of_the_whole_batch(mesh):
    model, optimizer = make(norm=True)
    kernel = np.float64(model.layers[0].kernel[...])
    replicate(model, mesh)
    replicate(optimizer, mesh)
    train_step(model, optimizer, *batch(mesh))
    hidden = np.float64(X) @ kernel
    np.testing.assert_allclose(model.norms[0].mean[...], 0.01 * hidden.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(model.norms[0].var[...], 0.99 + 0.01 * hidden.var(0), rtol=1e-5)
