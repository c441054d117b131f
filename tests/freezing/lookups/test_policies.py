"""Policies that look at weights and gradients, where the lookups in a table are a layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.predictor.probe import contributions
from smartfrz_jax.predictor.sampling import Tailoring

pytestmark = pytest.mark.usefixtures("jax_defaults")

IDS = jnp.arange(6)[None]
RNG = np.random.default_rng(0)
PARAMS = {name: jnp.asarray(RNG.standard_normal((8, 8)), jnp.float32) for name in ("embed", "a", "b")}


def loss(params, ids):
    return jnp.square(jnp.tanh(params["embed"][ids] @ params["a"]) @ params["b"] @ params["embed"].T).mean()


LAYERS = sfj.find_layers(PARAMS, loss, IDS, lookups=True)


def smartfrz():
    config = sfj.predictor.PredictorConfig(size=16, hidden=4, features=4, head_hidden=4)
    times = sfj.policies.Schedule(record_every=1, evaluate_every=2, min_records=2, window=2)
    return sfj.smartfrz(sfj.Predictor(config, rngs=nnx.Rngs(0)), total_steps=4, schedule=times)


POLICIES = {
    "smartfrz": smartfrz,
    "slimfit": lambda: sfj.policies.slimfit(0.5, switch_every=2),
    "autofreeze": lambda: sfj.autofreeze(evaluate_every=2),
    "grades": lambda: sfj.policies.grades(0.1, total_steps=4, grace=0.25, evaluate_every=2),
    "freezeout": lambda: sfj.freezeout(total_steps=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_policies_see_the_table_as_the_weights_of_its_lookups(make):
    freezer, params = sfj.Freezer(make(), LAYERS, PARAMS), PARAMS
    for step in range(4):
        params = jax.tree.map(lambda leaf, step=step: (0.9 + 0.01 * step) * leaf, params)
        grads = freezer.frozen.active_leaves(jax.tree.map(lambda leaf, step=step: leaf / (step + 1), PARAMS))
        freezer.observe(lambda params=params: params, loss=jnp.float32(1.0), grads=grads)
    assert freezer.steps == 4


def test_weights_of_lookups_are_sampled_from_the_table():
    sampled = Tailoring.create(LAYERS, PARAMS, size=16)(PARAMS)
    assert LAYERS.names[0] == "embed/lookup"
    assert set(np.asarray(sampled[0]).tolist()) <= set(np.asarray(PARAMS["embed"]).ravel().tolist())


@pytest.mark.slow
def test_the_table_is_put_back_with_its_head():
    start = jax.tree.map(lambda leaf: leaf + 1, PARAMS)
    probe = functools.partial(jax.jit(loss), ids=IDS)
    got = contributions(LAYERS, probe, PARAMS, start, depths=[0, 1, 3])
    reverted = {0: {}, 1: {"a": start["a"]}, 3: start}
    expected = [float(probe(PARAMS | reverted[depth]) - probe(PARAMS)) for depth in (0, 1, 3)]
    np.testing.assert_allclose(got[[0, 1, 3]], expected, rtol=1e-5)
    assert expected[0] == 0 != expected[1]
