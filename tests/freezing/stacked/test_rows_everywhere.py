"""Rows of stacked blocks are layers to the account, the cache, the sampling of weights and the outputs of layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.cost.check import Measured, check_saving, jaxpr_of
from smartfrz_jax.cost.step_program import StepProgram
from smartfrz_jax.predictor.probe import contributions
from smartfrz_jax.predictor.sampling import Tailoring
from tests.freezing.stacked.networks import (
    BLOCKS,
    DEPTH,
    LAYERS,
    PARAMS,
    SETS,
    UNROLLED,
    X,
    by_scan,
    like_params,
    loss,
    rows,
    unrolled,
    unrolled_loss,
)  # fmt: skip
from tests.support.train_steps import make_step

pytestmark = pytest.mark.usefixtures("jax_defaults")


@functools.cache
def accounts():
    tx = optax.adam(0.1)
    stacked = sfj.account(PARAMS, LAYERS, loss, X, tx=tx)
    return stacked, sfj.account(rows(PARAMS), UNROLLED, unrolled_loss, X, tx=tx)


@pytest.mark.slow
@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_the_account_is_that_of_the_network_unrolled(names):
    stacked, plain = accounts()
    got, expected = stacked.flops(sfj.Frozen(LAYERS, names)), plain.flops(sfj.Frozen(UNROLLED, names))
    assert got.total == pytest.approx(expected.total, rel=0.01)
    for layer in LAYERS.names:
        assert got.by_layer[layer].total == pytest.approx(expected.by_layer[layer].total, rel=0.03), layer
    assert stacked.scans == []


@pytest.mark.slow
def test_the_account_of_rows_that_are_not_along_the_first_axis():
    def moved(params, x):
        return loss(params | {"up": jnp.moveaxis(params["up"], 1, 0)}, x)

    params = PARAMS | {"up": jnp.moveaxis(PARAMS["up"], 0, 1)}
    layers = sfj.find_layers(params, moved, X, rows=True)
    account = sfj.account(params, layers, moved, X, tx=optax.adam(0.1))
    for names in (BLOCKS[:3], BLOCKS[::2]):
        expected = accounts()[0].flops(sfj.Frozen(LAYERS, names)).total
        assert account.flops(sfj.Frozen(layers, names)).total == pytest.approx(expected, rel=0.01)


def measured(frozen, *, stopped):
    """A step by its jaxpr: with its scan split, or with gradients that are stopped alone."""
    jaxpr = jaxpr_of(jax.jit(sfj.value_and_grad(loss, frozen)).trace(PARAMS, X))
    if stopped:
        jaxpr = jaxpr_of(jax.jit(jax.value_and_grad(lambda p, x: loss(frozen.stop_gradient(p), x))).trace(PARAMS, X))
    cost = sfj.cost.ProgramCost(StepProgram(jaxpr, "cpu").cost(), 0.0, 0, 0, 0, 0.0, 0.0)
    return Measured(frozen, cost, jaxpr)


@pytest.mark.slow
def test_the_check_of_a_saving_counts_rows():
    account = sfj.account(PARAMS, LAYERS, loss, X)
    nothing, front = sfj.Frozen(LAYERS), sfj.Frozen(LAYERS, SETS["prefix"])
    before = measured(nothing, stopped=False)
    assert check_saving(account, before, measured(front, stopped=False)) is None
    finding = check_saving(account, before, measured(front, stopped=True))
    assert finding.layers == SETS["prefix"]


def test_freezeouts_rates_are_refused():
    schedules = sfj.policies.freezeout_schedules(LAYERS, learning_rate=0.1, total_steps=10)
    with pytest.raises(ValueError, match="layers: got rows of stacked parameters"):
        sfj.policies.scale_by_layer_schedule(LAYERS, schedules)


def test_the_summary_shares_the_optimizer_among_the_rows_that_train():
    freezer = sfj.Freezer(sfj.policies.never(), LAYERS, PARAMS, frozen=sfj.Frozen(LAYERS, BLOCKS[:2]))
    summary = freezer.summary(tx=optax.adam(0.1))
    of_layer = {layer.name: layer for layer in summary.layers}
    size = sum(PARAMS[name][0].size for name in ("up", "bias", "down"))
    assert [of_layer[name].params for name in BLOCKS] == [size] * DEPTH
    assert [of_layer[name].optimizer_bytes for name in BLOCKS] == [0, 0] + [8 * size] * (DEPTH - 2)


def test_outputs_are_those_of_the_network_unrolled():
    forward = lambda params, x: by_scan(params, x)[0]  # noqa: E731
    got = sfj.layer_outputs(PARAMS, LAYERS, forward, X)(PARAMS, X)
    expected = sfj.layer_outputs(rows(PARAMS), UNROLLED, unrolled, X)(rows(PARAMS), X)
    assert tuple(got) == LAYERS.names
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, expected)


def test_sampled_weights_are_those_of_the_network_unrolled():
    sampled = Tailoring.create(LAYERS, PARAMS, size=16)(PARAMS)
    np.testing.assert_array_equal(sampled, Tailoring.create(UNROLLED, rows(PARAMS), size=16)(rows(PARAMS)))


@pytest.mark.slow
def test_the_front_is_put_back_row_by_row():
    start, depths = like_params(), [0, 1, 3, 6]
    probes = [functools.partial(jax.jit(each), x=X) for each in (loss, unrolled_loss)]
    got = contributions(LAYERS, probes[0], PARAMS, start, depths=depths)
    expected = contributions(UNROLLED, probes[1], rows(PARAMS), rows(start), depths=depths)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert len(set(got[depths].tolist())) == len(depths)


def smartfrz():
    config = sfj.predictor.PredictorConfig(size=16, hidden=4, features=4, head_hidden=4)
    times = sfj.policies.Schedule(record_every=1, evaluate_every=2, min_records=2, window=2)
    predictor = sfj.Predictor(config, rngs=nnx.Rngs(0))
    return sfj.smartfrz(predictor, total_steps=4, schedule=times, probe=functools.partial(jax.jit(loss), x=X))


POLICIES = {
    "smartfrz": smartfrz,
    "slimfit": lambda: sfj.policies.slimfit(0.5, switch_every=2),
    "autofreeze": lambda: sfj.autofreeze(evaluate_every=2),
    "grades": lambda: sfj.policies.grades(0.1, total_steps=4, grace=0.25, evaluate_every=2),
    "relative norm": lambda: sfj.policies.relative_gradient_norm(0.1, evaluate_every=2, batches=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_policies_that_look_at_the_network_get_its_own_parameters(make):
    """Those that ask it for losses or gradients, and those that look at weights or gradients of each row."""
    freezer, params = sfj.Freezer(make(), LAYERS, PARAMS), PARAMS
    for step in range(4):
        params = jax.tree.map(lambda leaf, step=step: (0.9 + 0.01 * step) * leaf, params)
        grads = freezer.frozen.active_leaves(jax.tree.map(lambda leaf, step=step: leaf / (step + 1), PARAMS))
        freezer.observe(lambda params=params: params, loss=jnp.float32(1.0), grads=grads)
    assert freezer.steps == 4


@pytest.mark.slow
def test_the_prefix_is_cached_up_to_the_first_row_that_trains():
    def simple(params, x):
        x, _ = jax.lax.scan(lambda x, row: (jnp.tanh(x @ row), None), x @ params["stem"], params["w"])
        return jnp.square(x @ params["head"]).mean()

    params = {"stem": PARAMS["stem"], "w": jnp.stack([PARAMS["stem"]] * 4), "head": PARAMS["head"]}
    layers = sfj.find_layers(params, simple, X, rows=True)
    frozen = sfj.Frozen(layers, layers.names[:3])
    cache = sfj.PrefixCache(params, frozen, simple, X)
    assert [shape.shape for shape in cache.frontier] == [X.shape[1:]]
    activations = cache.activations(params, X)
    value, grads = sfj.value_and_grad(cache.loss, frozen)(params, activations, X)
    whole, expected = sfj.value_and_grad(simple, frozen)(params, X)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), grads, expected)


class Scanned(nnx.Module):
    """A scan over the rows of one variable, which are along any axis."""

    def __init__(self, axis):
        rows = jnp.stack([PARAMS["stem"]] * 4, axis)
        self.axis, self.w, self.head = axis, nnx.Param(rows), nnx.Param(PARAMS["head"])

    def __call__(self, x):
        rows = jnp.moveaxis(self.w[...], self.axis, 0)
        return jax.lax.scan(lambda x, row: (jnp.tanh(x @ row), None), x, rows)[0] @ self.head[...]


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_a_cached_step_follows_rows_that_freeze_and_return(axis):
    def loss_fn(model, x):
        return jnp.square(model(x)).mean()

    losses = {}
    for keeps in (False, True):
        model = Scanned(axis)
        layers = sfj.nnx.find_layers(model, X, rows=True)
        optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=layers)
        step = sfj.TrainStep(make_step(loss_fn))
        if keeps:
            account = sfj.nnx.account(model, layers, loss_fn, X[:16])
            step = sfj.nnx.CachedStep(make_step, loss_fn, examples=len(X), account=account, total_steps=99)
        losses[keeps] = []
        for number in (0, 1, 3, 2):
            optimizer.freeze(model, sfj.Frozen(layers, layers.names[:number]))
            for indices in (np.arange(16), np.arange(16, 32), np.arange(8, 24)):
                given = (indices, X[indices]) if keeps else (X[indices],)
                losses[keeps].append(float(step(model, optimizer, *given)))
            if keeps and number:
                assert step.cache.frozen == optimizer.frozen
                assert step.cache.store.is_complete
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-5)
