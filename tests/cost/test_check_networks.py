"""Savings of steps on several devices, and of whole networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import smartfrz_jax as sfj
from models.deit import DeiT
from models.resnet import BasicBlock, ResNet
from smartfrz_jax.cost.check import check_saving
from tests.cost.measured_steps import PARAMS, WIDTHS, X, Y, account, every_grad, frozen_set, measured, trained

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]


# Several devices.


def sharded_program(names, split_state=(), **kwargs):
    """A step on eight devices; of the optimizer's state, leaves of some shapes are split between them."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    frozen = frozen_set(names)
    step, opt_state = trained(frozen, **kwargs)

    def placed(tree, sharding):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)), tree)

    params, state = (
        placed(PARAMS, lambda leaf: replicated),
        placed(opt_state, lambda leaf: split if leaf.shape in split_state else replicated),
    )
    return measured(frozen, step, params, state, *placed((X, Y), lambda leaf: split))


def test_sums_over_devices_fall_by_the_frozen_parameters():
    before, after = sharded_program(""), sharded_program("ab")
    every, some = (sum(4 * (n * m + m) for n, m in map(WIDTHS.get, names)) for names in ("abcd", "ab"))
    assert before.cost.devices == after.cost.devices == 8
    assert 0 <= before.cost.collectives.reduced_bytes - every < 64  # the loss
    assert before.cost.collectives.reduced_bytes - after.cost.collectives.reduced_bytes == some
    assert check_saving(account(), before, after) is None


def test_sums_over_devices_that_stay():
    before, after = sharded_program(""), sharded_program("ab", grads_of=every_grad, log=optax.tree.norm)
    assert before.cost.collectives.reduced_bytes == after.cost.collectives.reduced_bytes
    finding = check_saving(account(), before, after)
    assert finding.cause == "norm"
    assert f"Predicted: {4 * (24 * 32 + 32 + 32 * 32 + 32):,} bytes less in sums over the 8 devices" in finding.message


def test_state_that_was_split_and_goes_while_other_state_comes_that_is_whole():
    before, after = (sharded_program(names, [WIDTHS["b"]]) for names in ("acd", "bcd"))
    assert before.cost.argument_bytes < after.cost.argument_bytes  # of a device, though all have less than before
    assert check_saving(account(), before, after, notable=1.0) is None


def test_split_state_that_stays():
    before = sharded_program("", [WIDTHS["b"]])
    after = sharded_program("b", [WIDTHS["b"]], tx=optax.adam(1e-3))
    assert check_saving(account(), before, after).cause == "optimizer"


# NNX.


def small_resnet(rngs, stages=2, **kwargs):
    return ResNet((1,) * stages, (8, 16)[:stages], BasicBlock, num_classes=10, stem="cifar", rngs=rngs, **kwargs)


def small_vit(rngs, **kwargs):
    sizes = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "num_classes": 10}
    return DeiT(**{**sizes, "dropout": 0.1, "drop_path": 0.1, "rngs": rngs, **kwargs})


def model_loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x).astype(jnp.float32), y).mean()


IMAGES = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)


def nnx_program(model, layers, names, tx, stock=False):
    graphdef, state = nnx.split(model)
    frozen = sfj.Frozen(layers, frozenset(names))

    def make(state):
        model = nnx.merge(graphdef, state)
        optimizer = sfj.nnx.Optimizer(model, tx, wrt=nnx.Param, layers=layers)
        optimizer.freeze(model, frozen)
        return optimizer

    optimizer_def, optimizer_state = nnx.split(nnx.eval_shape(make, state))

    def step(state, optimizer_state, x, y):
        model, optimizer = nnx.merge(graphdef, state), nnx.merge(optimizer_def, optimizer_state)
        value_and_grad = nnx.value_and_grad if stock else optimizer.value_and_grad
        loss, grads = value_and_grad(model_loss)(model, x, y)
        optimizer.update(model, grads)
        return loss, optax.tree.norm(nnx.as_pure(grads)), nnx.state(model), nnx.state(optimizer)

    return measured(frozen, step, state, optimizer_state, *IMAGES)


CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
SGD = optax.sgd(0.1, momentum=0.9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "tx", "parts"),
    [
        (small_resnet, SGD, ("first", "middle", "all but the head")),
        (functools.partial(small_resnet, stages=1, dtype=jnp.bfloat16), CLIPPED, ("half", "middle")),
        (small_vit, CLIPPED, ("half", "middle", "all")),
        (functools.partial(small_vit, depth=3, dropout=0.0, scan=True), optax.MultiSteps(SGD, 4), ("half", "middle")),
    ],
    ids=["resnet", "resnet-bfloat16", "vit", "vit-scan-accumulated"],
)
def test_networks_are_not_reported(make, tx, parts):
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    layers = sfj.nnx.find_layers(model, IMAGES[0])
    costs = sfj.nnx.account(model, layers, model_loss, *IMAGES, tx=tx)
    names, third = layers.names, len(layers) // 3
    sets = {"first": names[:1], "half": names[: len(names) // 2], "middle": names[third : 2 * third]}
    sets |= {"all but the head": names[:-1], "all": names}
    before = nnx_program(model, layers, (), tx)
    for part in parts:
        assert check_saving(costs, before, nnx_program(model, layers, sets[part], tx), notable=0.5) is None, part


@pytest.mark.slow
def test_the_stock_gradients_of_nnx():
    model = nnx.eval_shape(lambda: small_vit(dropout=0.0, drop_path=0.0, rngs=nnx.Rngs(0)))
    layers = sfj.nnx.find_layers(model, IMAGES[0])
    costs = sfj.nnx.account(model, layers, model_loss, *IMAGES, tx=SGD)
    half = layers.names[: len(layers) // 2]
    before = nnx_program(model, layers, (), SGD)
    finding = check_saving(costs, before, nnx_program(model, layers, half, SGD, stock=True))
    assert finding.cause == "norm"
    assert finding.layers == half
