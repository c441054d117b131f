"""Which axis counts the examples, and which functions mix them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend import core as jex
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from models.deit import DeiT
from models.resnet import BasicBlock, ResNet
from smartfrz_jax.jaxprs import example_axis, inline
from smartfrz_jax.jaxprs.example_axis_rules import Axis, Mixed, Value
from tests.support.prefix_caches import IMAGES, N, X
from tests.support.rounding import assert_close

pytestmark = pytest.mark.usefixtures("jax_defaults")


def larger(a, b):
    """The pair with the larger first value, as in a pooling that gives places too."""
    return tuple(jnp.where(a[0] > b[0], one, other) for one, other in zip(a, b, strict=True))


def with_a_jaxpr(x):
    """A primitive of which nobody knows what it does with the jaxpr that it has."""
    unknown = jex.Primitive("unknown")
    unknown.def_abstract_eval(lambda x, jaxpr: x)
    return unknown.bind(x, jaxpr=jax.make_jaxpr(jnp.sin)(1.0))


def on_devices(function):
    mesh = jax.make_mesh((N,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:N])
    return jax.shard_map(function, mesh=mesh, in_specs=P("d"), out_specs=P("d"))


KEEPS = {
    "on devices": lambda x: on_devices(lambda x: jnp.tanh(x) * 2)(x),
    "elementwise": lambda x: jnp.exp(x) + x * jnp.arange(6.0)[None],
    "row added": lambda x: x + jnp.ones((N, 6)),
    "softmax": lambda x: jax.nn.softmax(x),
    "layer norm": lambda x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True),
    "transposed": lambda x: (x.T * 2).T @ jnp.ones((6, 2)),
    "product": lambda x: jnp.einsum("nd,de->en", x, jnp.ones((6, 2))),
    "attention": lambda x: jnp.einsum("nd,ne->nde", x, x),
    "merged and split again": lambda x: (x.reshape(N * 2, 3) @ jnp.ones((3, 5))).reshape(N, 2, 5),
    "unstacked": lambda x: jnp.add(*jnp.moveaxis(x.reshape(N, 2, 3), 1, 0)),
    "heads": lambda x: jnp.moveaxis(x.reshape(N, 3, 2), 1, 0)[2],
    "slice": lambda x: x[:, 2:4],
    "dynamic slice": lambda x: lax.dynamic_slice_in_dim(x, 1, 3, axis=1),
    "class token": lambda x: jnp.concatenate([jnp.broadcast_to(jnp.arange(2.0), (N, 2)), x], axis=1),
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 2))),
    "stacked": lambda x: jnp.stack([x, x * 2], axis=0),
    "sorted": lambda x: jnp.sort(x, axis=1),
    "cumulative": lambda x: jnp.cumsum(x, axis=1),
    "top k": lambda x: lax.top_k(x, 2)[0],
    "argmax": lambda x: x.argmax(1),
    "embedded": lambda x: jnp.eye(9)[x.argmax(1)],
    "embedded with constants": lambda x: jnp.eye(9)[jnp.zeros((N, 3), int)].sum() * x + jnp.eye(6)[jnp.zeros(N, int)],
    "taken along": lambda x: jnp.take_along_axis(x, x.argsort(1), 1),
    "taken along a table that is the same for all": lambda x: jnp.take_along_axis(
        jnp.broadcast_to(jnp.arange(9.0), (N, 9)), x.argsort(1), 1
    ),
    "masked": lambda x: jnp.where(x > 0, x, -1.0),
    "scan over features": lambda x: lax.scan(lambda c, v: (c + v, c * v), jnp.zeros(N), x.T)[1],
    "loop": lambda x: lax.fori_loop(0, 3, lambda _, v: jnp.sin(v), x),
    "branches": lambda x: lax.cond(jnp.array(True), jnp.sin, jnp.cos, x),
    "map over steps": lambda x: lax.map(lambda a: a * x, jnp.arange(3.0)),
    "relu, jit, checkpoint": lambda x: jax.checkpoint(jax.jit(jax.nn.relu))(x),
    "fixed mean": lambda x: x + jnp.arange(6.0).mean(),
    "own reduction": lambda x: lax.reduce(x, -9.0, jnp.logaddexp, (1,)),
    "own reduction of the transposed": lambda x: lax.reduce(x.T, -9.0, jnp.logaddexp, (0,)),
    "own reduction, with constants": lambda x: lax.reduce((x, jnp.ones((N, 6))), (0.0, 0.0), larger, (1,))[1],
    "own window": lambda x: lax.reduce_window(x, 1.0, lax.mul, (1, 2), (1, 2), "VALID"),
    "own window of two": lambda x: lax.reduce_window((x, x * 2), (0.0, 0.0), larger, (1, 2), (1, 2), "VALID")[1],
    "exclusive or": lambda x: lax.reduce((x > 0).astype(int), 0, lax.bitwise_xor, (1,)),
}
MIXES = {
    "batch norm": lambda x: (x - x.mean(0)) / x.std(0),
    "maximum of all": lambda x: x / x.max(),
    "position in the batch": lambda x: x + jnp.arange(4.0)[:, None],
    "similarities": lambda x: x @ x.T,
    "sum by product": lambda x: jnp.ones((2, N)) @ x,
    "flipped": lambda x: x[::-1],
    "rolled": lambda x: jnp.roll(x, 1, axis=0),
    "mixup": lambda x: 0.5 * x + 0.5 * jnp.concatenate([x[1:], x[:1]]),
    "first": lambda x: x - x[:1],
    "merged the wrong way": lambda x: x.T.reshape(-1),
    "cumulative": lambda x: jnp.cumsum(x, axis=0),
    "sorted": lambda x: jnp.sort(x, axis=0),
    "padded": lambda x: jnp.pad(x, ((1, 0), (0, 0))),
    "taken": lambda x: x[jnp.array([0, 0, 1, 1])],
    "scan over examples": lambda x: lax.scan(lambda c, v: (c + v, c), jnp.zeros(6), x)[1],
    "dropout": lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape),
    "loop until": lambda x: lax.while_loop(lambda v: (v < 3).all(), lambda v: v + 1, x),
    "branch by the batch": lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    "position by one-hot": lambda x: x + jnp.eye(6)[jnp.arange(N)],
    "position by a table": lambda x: jnp.take_along_axis(jnp.arange(24.0).reshape(N, 6), x.argsort(1), 1),
    "device": lambda x: on_devices(lambda x: x * (1 + jax.lax.axis_index("d")))(x),
    "unknown": lambda x: jnp.linalg.cholesky(jnp.einsum("nd,ne->nde", x, x)),
    "unknown with a jaxpr": with_a_jaxpr,
    "own reduction": lambda x: lax.reduce(x, -9.0, jnp.logaddexp, (0, 1)),
    "own reduction, by position": lambda x: lax.reduce((x, jnp.eye(N, 6)), (0.0, 0.0), larger, (1,))[1],
    "own window": lambda x: lax.reduce_window(x, 1.0, lax.mul, (2, 1), (1, 1), "VALID"),
    "own window of two": lambda x: lax.reduce_window((x, x * 2), (0.0, 0.0), larger, (2, 1), (1, 1), "VALID")[1],
}


def axes_of(function):
    return example_axis.of_jaxpr(jax.make_jaxpr(function)(X).jaxpr, [Value(Axis(0))])


@pytest.mark.parametrize("name", KEEPS)
def test_examples_apart(name):
    (value,) = axes_of(KEEPS[name])
    out = np.asarray(KEEPS[name](X))
    others = np.asarray(KEEPS[name](X.at[1:].set(7.0)[jnp.array([1, 2, 0, 3])]))  # the first of them is now the third
    rows, other_rows = (np.moveaxis(a, value.axis.position, 0).reshape(N, -1) for a in (out, others))
    assert_close(other_rows[2], rows[0])


@pytest.mark.parametrize("name", MIXES)
def test_examples_mixed(name):
    with pytest.raises(Mixed):
        axes_of(MIXES[name])


@pytest.mark.parametrize("name", KEEPS)
def test_the_axis_is_the_same_where_examples_may_depend_on_each_other(name):
    assert axis_if_dependent(KEEPS[name]) == axes_of(KEEPS[name])[0].axis


@pytest.mark.parametrize("name", MIXES)
def test_the_axis_where_examples_do_depend_on_each_other(name):
    dependent = {"batch norm", "maximum of all", "position in the batch", "first", "mixup", "dropout",
                 "branch by the batch", "position by one-hot", "own reduction, by position", "position by a table",
                 "device"}  # fmt: skip
    found = axis_if_dependent(MIXES[name])
    assert found == Axis(0) if name in dependent else isinstance(found, str)


def axis_if_dependent(function):
    jaxpr = jax.make_jaxpr(function)(X).jaxpr
    return example_axis.axes(jaxpr, [Axis(0)])[jaxpr.outvars[0]]


def test_convolution_and_pooling_keep_examples_apart():
    def function(x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, jnp.ones((3, 3, 3, 4)), (2, 2), "SAME", dimension_numbers=numbers)
        return nnx.max_pool(x, (2, 2), (2, 2)) + nnx.avg_pool(x, (2, 2), (2, 2))

    closed = jax.make_jaxpr(function)(IMAGES)
    assert example_axis.of_jaxpr(closed.jaxpr, [Value(Axis(0))])[0].axis == Axis(0)


NETWORKS = {
    "resnet": lambda rngs: ResNet((1, 1), (4, 8), BasicBlock, num_classes=3, stem="cifar", rngs=rngs),
    "deit": lambda rngs: DeiT(image_size=8, patch_size=4, dim=8, depth=2, heads=2, num_classes=3, rngs=rngs),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_of_every_value_twice_the_examples_make_that_axis_twice_as_long_and_no_other(name):
    model = nnx.eval_shape(lambda: NETWORKS[name](nnx.Rngs(0)))
    model.eval()
    graphdef, state = nnx.split(model)

    def forward(x, state):
        return nnx.merge(graphdef, state)(x)

    def traced(n):
        closed = jax.make_jaxpr(forward)(jax.ShapeDtypeStruct((n, *IMAGES.shape[1:]), IMAGES.dtype), state)
        return inline.inline(closed, closed.jaxpr.invars[1:], closed.jaxpr.invars[:1], rules=True).jaxpr

    jaxpr, twice = traced(N), traced(2 * N)
    known = example_axis.axes(jaxpr, [Axis(0), *[None] * (len(jaxpr.invars) - 1)])
    counted = 0
    for eqn, other in zip(jaxpr.eqns, twice.eqns, strict=True):
        assert eqn.primitive is other.primitive
        for var, longer in zip(eqn.outvars, other.outvars, strict=True):
            if var in known:
                shape, axis = list(var.aval.shape), known[var]
                shape[axis.position] *= 2
                assert shape[axis.position] == 2 * N * axis.inner
                assert tuple(shape) == longer.aval.shape
                counted += 1
    assert counted > 20
