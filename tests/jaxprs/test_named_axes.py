"""Networks that average over an axis which only the step has: BatchNorm with ``axis_name``."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import smartfrz_jax as sfj
from smartfrz_jax import linen
from smartfrz_jax.jaxprs import named_axes

pytestmark = pytest.mark.usefixtures("jax_defaults")

X = jax.random.normal(jax.random.key(0), (2, 8, 4))  # for two devices
ROWS = X[0]


class NNXNet(nnx.Module):
    def __init__(self, axis: str | None = "batch"):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])
        self.norm = nnx.BatchNorm(4, axis_name=axis, rngs=rngs)

    def __call__(self, x):
        return self.layers[2](jnp.tanh(self.layers[1](self.norm(self.layers[0](x)))))


class LinenNet(nn.Module):
    axis: str | None = "batch"

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, axis_name=self.axis, name="norm")(nn.Dense(4, name="first")(x))
        return nn.Dense(4, name="third")(jnp.tanh(nn.Dense(4, name="second")(x)))


def bare(params, x, axis: str | None = "batch"):
    x = x @ params["first"]
    mean = jnp.mean(x) if axis is None else jax.lax.pmean(jnp.mean(x), axis)
    return jnp.tanh((x - mean) @ params["second"]) @ params["third"]


BARE = {name: jax.random.normal(jax.random.key(i), (4, 4)) for i, name in enumerate(("third", "second", "first"))}
NAMES = ("first", "second", "third")


def squares(out):
    return jnp.square(out).mean()


def of_nnx(axis):
    model = NNXNet(axis)
    layers = sfj.nnx.find_layers(model, ROWS)
    return layers, sfj.nnx.account(model, layers, lambda model, x: squares(model(x)), ROWS, tx=optax.sgd(0.1))


def of_linen(axis):
    net = LinenNet(axis)
    variables = LinenNet(None).init(jax.random.key(0), ROWS)
    layers = linen.find_layers(net, variables, ROWS)

    def loss(params, x):
        return squares(net.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0])

    return layers, sfj.account(variables["params"], layers, loss, ROWS, tx=optax.sgd(0.1), hold=linen.hold)


def of_bare(axis):
    layers = sfj.find_layers(BARE, partial(bare, axis=axis), ROWS)
    return layers, sfj.account(BARE, layers, lambda p, x: squares(bare(p, x, axis)), ROWS, tx=optax.sgd(0.1))


@pytest.mark.parametrize("make", [of_nnx, of_linen, of_bare])
@pytest.mark.slow
def test_layers_and_account_are_those_of_one_device(make):
    (layers, account), (expected, alone) = make("batch"), make(None)
    assert layers == expected
    assert account.macs == alone.macs
    for n in range(len(layers) + 1):
        frozen = sfj.Frozen(layers, frozenset(layers.names[:n]))
        got, want = account.flops(frozen), alone.flops(frozen)
        assert got.by_kind["linear"] == want.by_kind["linear"]
        assert want.total <= got.total <= 1.1 * want.total  # and the sums over devices
    account.trace(sfj.Frozen(layers, frozenset(layers.names[:1])))


def test_sums_over_devices_are_priced_as_xla_does():
    def loss(params, x):
        return jnp.sum(jax.lax.pmean(jnp.tanh(x @ params["a"]), "batch") ** 2)

    params, x = {"a": jnp.ones((32, 4))}, jnp.ones((2, 8, 32))
    layers = sfj.find_layers(params, loss, x[0])
    step = jax.pmap(jax.value_and_grad(loss), axis_name="batch", in_axes=(None, 0), devices=jax.devices()[:2])
    compiled = step.lower(params, x).compile().cost_analysis()["flops"]
    assert sfj.account(params, layers, loss, x[0]).flops().total == pytest.approx(compiled, rel=0.05)


def under(kind, function):
    """``function`` of parameters and one device's rows, on two."""
    if kind == "vmap":
        return jax.vmap(function, axis_name="batch", in_axes=(None, 0))
    if kind == "pmap":
        return jax.pmap(function, axis_name="batch", in_axes=(None, 0), devices=jax.devices()[:2])
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))

    def stacked(params, x):
        return jax.tree.map(lambda leaf: leaf[None], function(params, x[0]))

    return jax.jit(jax.shard_map(stacked, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P("batch"), check_vma=False))


def every_gradient(function):
    return lambda params, x: jax.lax.pmean(function(params, x), "batch")


def stopped(params, names):
    return {name: jax.lax.stop_gradient(leaf) if name in names else leaf for name, leaf in params.items()}


@pytest.mark.parametrize("kind", ["vmap", "pmap", "shard_map"])
@pytest.mark.parametrize("names", [(), ("first",), ("second",)], ids=str)
@pytest.mark.slow
def test_gradients_are_the_stock_ones(kind, names):
    frozen = sfj.Frozen(sfj.find_layers(BARE, bare, ROWS), frozenset(names))

    def loss(params, x):
        return squares(bare(params, x))

    def stock(params, x):
        return jax.value_and_grad(lambda params: loss(stopped(params, names), x))(params)

    expected = under(kind, every_gradient(stock))(BARE, X)
    found = under(kind, every_gradient(sfj.value_and_grad(loss, frozen)))(BARE, X)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vmap", "pmap", "shard_map"])
def test_gradients_and_statistics_of_nnx_are_the_stock_ones(kind):
    model = NNXNet()
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=sfj.nnx.find_layers(model, ROWS))
    graphdef, state = nnx.split(model)

    def step(value_and_grad, state, x):
        model = nnx.merge(graphdef, state, copy=True)
        loss, grads = value_and_grad(lambda model, x: squares(model(x)))(model, x)
        return loss, nnx.as_pure(grads), nnx.as_pure(nnx.state(model, nnx.BatchStat))

    expected = under(kind, partial(step, nnx.value_and_grad))(state, X)
    found = under(kind, partial(step, optimizer.value_and_grad))(state, X)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.ptp(np.asarray(found[2]["norm"]["mean"]), axis=0).max() == 0, "the same on both"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vmap", "pmap", "shard_map"])
def test_gradients_and_statistics_of_linen_are_the_stock_ones(kind):
    net, variables = LinenNet(), LinenNet(None).init(jax.random.key(0), ROWS)
    layers = linen.find_layers(net, variables, ROWS)
    state = linen.TrainState.create(apply_fn=net.apply, params=variables["params"], tx=optax.sgd(0.1), layers=layers)

    def loss(params, x):
        out, updates = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return squares(out), updates

    def step(value_and_grad, params, x):
        return value_and_grad(params, x)

    expected = under(kind, partial(step, jax.value_and_grad(loss, has_aux=True)))(variables["params"], X)
    found = under(kind, partial(step, state.value_and_grad(loss, has_aux=True)))(variables["params"], X)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_axis_has_the_size_that_it_has_under_pmap():
    closed = named_axes.make_jaxpr(lambda x: jax.lax.all_gather(jax.lax.psum(x, "a"), "b"))(1.0)
    assert closed.out_avals[0].shape == (jax.device_count(),)
    with pytest.raises(NameError, match="other"):
        named_axes.make_jaxpr(lambda x: x * other)(1.0)
