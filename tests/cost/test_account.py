"""The account of a train step: against closed forms."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import smartfrz_jax as sfj
from models.layers.depthwise import depthwise_convolution

pytestmark = pytest.mark.usefixtures("jax_defaults")

N, WIDTH = 32, 8
SGD = optax.sgd(0.1, momentum=0.9)
# Trace and momentum, the rate, and the sum with the weight: 2, 1 and 1 for every parameter.
SGD_FLOPS = 4


def shape(*dims: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


PARAMS = {name: shape(WIDTH, WIDTH) for name in "abc"}
X = shape(N, WIDTH)
MATMUL = 2 * N * WIDTH**2


def chain(params, x):
    return jnp.sum(x @ params["a"] @ params["b"] @ params["c"])


def branches(params, x):
    """``b`` is beside ``a``, not behind it."""
    return jnp.sum((x @ params["a"] + x @ params["b"]) @ params["c"])


def frozen(layers: sfj.Layers, *names: str) -> sfj.Frozen:
    return sfj.Frozen(layers, frozenset(names))


def linear_parts(loss, names: str) -> list[float]:
    layers = sfj.find_layers(PARAMS, loss, X)
    parts = sfj.account(PARAMS, layers, loss, X).flops(frozen(layers, *names)).by_kind["linear"]
    return [part / MATMUL for part in parts[:3]]


@pytest.mark.parametrize(
    ("loss", "names", "expected"),
    [
        (chain, "", [3, 3, 2]),  # the gradient of the input is never needed
        (chain, "a", [3, 2, 1]),
        (chain, "ab", [3, 1, 0]),
        (chain, "b", [3, 2, 2]),  # behind an active layer: its gradient passes through
        (chain, "c", [3, 2, 2]),
        (chain, "bc", [3, 1, 2]),
        (chain, "abc", [3, 0, 0]),
        (branches, "", [3, 3, 1]),
        (branches, "a", [3, 2, 1]),
        (branches, "ab", [3, 1, 0]),
    ],
)
def test_gradients_are_computed_where_an_active_layer_needs_them(loss, names, expected):
    assert linear_parts(loss, names) == expected


def test_layers_and_kinds_add_up():
    layers = sfj.find_layers(PARAMS, branches, X)
    step = sfj.account(PARAMS, layers, branches, X, tx=SGD).flops(frozen(layers, "b"))
    for split in (step.by_layer, step.by_kind):
        np.testing.assert_allclose(np.sum(list(split.values()), axis=0), step.parts)
    assert step.total == step.parts.total == step.parts.needed
    assert tuple(step.by_layer) == ("", *layers.names)
    # With the sum of both branches, and with that of all outputs.
    assert step.forward_by_layer == {"a": MATMUL, "b": MATMUL + N * WIDTH, "c": MATMUL + N * WIDTH - 1}
    assert step.by_layer["b"].weight_gradients == 0
    assert step.by_layer["b"].update == 0
    assert step.by_layer["a"].weight_gradients == MATMUL
    assert step.by_kind["update"].total == step.parts.update == 2 * SGD_FLOPS * WIDTH**2
    assert "linear" in str(step)


def test_saving_is_relative():
    layers = sfj.find_layers(PARAMS, chain, X)
    account = sfj.account(PARAMS, layers, chain, X)
    some, more = frozen(layers, "a"), frozen(layers, "a", "b")
    assert account.saving(some) == 1 - account.flops(some).total / account.flops().total
    assert account.saving(more, some) == 1 - account.flops(more).total / account.flops(some).total
    assert account.saving(some, some) == 0
    assert 0 < account.saving(some) < account.saving(more) < 2 / 3


def test_saving_with_a_cumulative_sum_over_a_long_axis():
    def loss(params, x):
        return jnp.mean((jnp.cumsum(jax.nn.relu(x @ params["a"]), axis=1) @ params["b"]) ** 2)

    params, x = {name: PARAMS[name] for name in "ab"}, shape(2, 1024, WIDTH)
    layers = sfj.find_layers(params, loss, x)
    account = sfj.account(params, layers, loss, x)
    for some in (frozen(layers), frozen(layers, "a")):
        program = sfj.program_cost(jax.jit(sfj.value_and_grad(loss, some)), params, x)
        assert account.flops(some).total == pytest.approx(program.flops, rel=0.02)


def test_optimizers_with_state_and_clipping():
    layers = sfj.find_layers(PARAMS, chain, X)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))
    account = sfj.account(PARAMS, layers, chain, X, tx=adam)
    update = account.flops().parts.update
    assert update > 3 * 10 * WIDTH**2
    assert account.flops(frozen(layers, "a")).parts.update == pytest.approx(2 / 3 * update)


def test_examples_are_counted_by_the_first_input_that_has_an_axis():
    layers = sfj.find_layers(PARAMS, chain, X)
    account = sfj.account(PARAMS, layers, lambda params, key, x: chain(params, x), jax.random.key(0), X)
    assert account.examples == N


def test_errors():
    layers = sfj.find_layers(PARAMS, chain, X)
    with pytest.raises(ValueError, match="inputs: none of them has a first axis"):
        sfj.account(PARAMS, layers, lambda params, x: chain(params, x * jnp.ones((N, WIDTH))), shape())
    with pytest.raises(ValueError, match=r"params: 'd' belongs to no layer.*find_layers"):
        sfj.account(PARAMS | {"d": shape(3)}, layers, chain, X, tx=SGD)
    with pytest.raises(ValueError, match="inputs: got none"):
        sfj.account(PARAMS, layers, lambda params: chain(params, jnp.ones((N, WIDTH))))
    with pytest.raises(ValueError, match=r"loss_fn: the first value that it returns has shape \(32,\)"):
        sfj.account(PARAMS, layers, lambda params, x: (x @ params["a"]).sum(1), X)
    with pytest.raises(ValueError, match="loss_fn: the loss depends on no parameter"):
        sfj.account(PARAMS, layers, lambda params, x: x.sum(), X)
    other = sfj.find_layers({"z": PARAMS["a"]}, lambda params, x: x @ params["z"], X)
    with pytest.raises(ValueError, match="frozen: got a set of a network of 1 layers"):
        sfj.account(PARAMS, layers, chain, X).flops(frozen(other, "z"))
    for call in ("flops", "saving", "trace", "reached_through"):
        with pytest.raises(TypeError, match=r"frozen: got .*list.*, expected a smartfrz_jax.Frozen; make it with"):
            getattr(sfj.account(PARAMS, layers, chain, X), call)(["a"])
    with pytest.raises(ValueError, match=r"tx: cannot be priced, as it asks for more than gradients.*value_fn"):
        sfj.account(PARAMS, layers, chain, X, tx=optax.lbfgs())


def linear_mean_pool(h):
    return jnp.einsum("btd,t->bd", h, jnp.arange(h.shape[1], dtype=h.dtype))


def test_a_pooling_without_inputs_has_no_elements():
    params, x = {name: PARAMS[name] for name in "ab"}, shape(4, 5, WIDTH)

    def loss(params, x):
        return jnp.sum(linear_mean_pool(x @ params["a"]) @ params["b"])

    account = sfj.account(params, sfj.find_layers(params, loss, x), loss, x)
    assert account.elements["pooling"] == 0
    assert account.counted["linear"] == 5 * WIDTH**2 + 5 * WIDTH + WIDTH**2


POOLINGS = {
    "product": lambda h: jax.lax.reduce_window(h, 1.0, jax.lax.mul, (1, 2, 1), (1, 2, 1), "VALID"),
    "smallest": lambda h: jax.lax.reduce_window(h, jnp.inf, jax.lax.min, (1, 2, 1), (1, 2, 1), "VALID"),
    "reduction": lambda h: jax.lax.reduce(h, -jnp.inf, jnp.logaddexp, (1,)),
    "exclusive or": lambda h: jax.lax.reduce(h.astype(int), 0, jax.lax.bitwise_xor, (1,)),
}


@pytest.mark.parametrize("name", [*POOLINGS, "precision", "scattered"])
def test_kinds_of_what_has_reduce_in_its_name(name):
    def scattered(h):
        return jax.lax.psum_scatter(h, "devices", scatter_dimension=1, tiled=True)

    function = POOLINGS.get(name, scattered if name == "scattered" else lambda h: jax.lax.reduce_precision(h, 8, 7))
    params, x = {name: PARAMS[name] for name in "ab"}, shape(4, 8, WIDTH)

    def loss(params, x):
        h = x @ params["a"]
        return jnp.sum(jax.lax.stop_gradient(function(h))) + jnp.sum(h @ params["b"])

    account = sfj.account(params, sfj.find_layers(params, loss, x), loss, x)
    assert account.elements.get("pooling", 0) == (4 * 8 * WIDTH if name in POOLINGS else 0)


def kernel(x, y, out):
    out[...] = x[...] @ y[...]


@jax.custom_vjp
def product(x, y):
    return pl.pallas_call(kernel, out_shape=shape(N, WIDTH), interpret=True)(x, y)


product.defvjp(lambda x, y: (product(x, y), (x, y)), lambda both, dy: (dy @ both[1].T, both[0].T @ dy))


def test_a_kernel_costs_what_the_product_in_it_costs():
    def loss(params, x, product=product):
        return jnp.sum(jnp.tanh(product(x, params["a"])) @ params["b"])

    params = {name: PARAMS[name] for name in "ab"}
    steps = []
    for function in (loss, lambda params, x: loss(params, x, jnp.matmul)):
        layers = sfj.find_layers(params, function, X)
        steps.append(sfj.account(params, layers, function, X).flops(frozen(layers, "b")))
    assert steps[0].parts == steps[1].parts
    assert steps[0].by_layer == steps[1].by_layer


STEPS = 4


def recurrence(params, h, x):
    return jnp.tanh(x @ params["a"] + h @ params["b"])


def unrolled(params, xs):
    h = jnp.zeros(xs.shape[1:])
    for t in range(STEPS):
        h = recurrence(params, h, jax.lax.index_in_dim(xs, t, keepdims=False))
    return h


def scanned(params, xs, h=None):
    h = jnp.zeros(xs.shape[1:]) if h is None else h
    return jax.lax.scan(lambda h, x: (recurrence(params, h, x), None), h, xs)[0]


def scanned_twice(params, xs):
    parts = xs.reshape(2, STEPS // 2, *xs.shape[1:])
    return jax.lax.scan(lambda h, xs: (scanned(params, xs, h), None), jnp.zeros(xs.shape[1:]), parts)[0]


def scanned_on_devices(params, xs):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P(None, "rows")), "out_specs": P("rows"), "check_vma": False}
    return jax.shard_map(scanned, mesh=mesh, **specs)(params, xs)


@pytest.mark.parametrize("forward", [scanned, scanned_twice, scanned_on_devices])
def test_layers_in_a_loop_over_the_data_are_told_apart(forward):
    xs = shape(STEPS, N, WIDTH)
    accounts = []
    for function in (unrolled, forward):

        def loss(params, xs, function=function):
            return jnp.sum(function(params, xs) @ params["c"])

        accounts.append(sfj.account(PARAMS, sfj.find_layers(PARAMS, loss, xs), loss, xs))
    written_out, account = accounts
    assert account.macs["linear"] == written_out.macs["linear"] == (2 * STEPS + 1) * MATMUL // 2
    assert account.flops().forward_by_layer == written_out.flops().forward_by_layer
    for names in ("", "a", "ab", "b"):
        step, whole = (each.flops(frozen(each.layers, *names)) for each in (account, written_out))
        # A loop has the gradient of the state that it begins with, too, and adds gradients of weights to zeros.
        assert whole.total <= step.total < whole.total + 1.5 * MATMUL
        assert [name for name in "abc" if step.by_layer[name].weight_gradients == 0] == list(names)
        for split in (step.by_layer, step.by_kind):
            np.testing.assert_allclose(np.sum(list(split.values()), axis=0), step.parts)


def test_the_gates_of_a_recurrent_network_are_told_apart():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.LSTMCell(4, 16, rngs=rngs), rngs=rngs)
            self.head = nnx.Linear(16, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.rnn(x)[:, -1])

    model, x = nnx.eval_shape(lambda: Network(nnx.Rngs(0))), shape(8, 20, 4)
    account = sfj.nnx.account(model, sfj.nnx.find_layers(model, x), lambda model, x: model(x).sum(), x)
    gate, steps = (4 * 16, 16 * 16), 8 * 20
    assert account.macs["linear"] == 4 * sum(gate) * steps + 8 * 16 * 2
    assert account.elements["bias"] == 4 * 16 * steps + 8 * 2
    costs = account.flops().forward_by_layer
    assert {costs[f"rnn/cell/{name}"] for name in ("ii", "if_", "ig", "io")} == {2 * gate[0] * steps}
    for name in ("hi", "hf", "hg", "ho"):  # with the bias, the sum, the activation and the products of gates
        assert 2 * gate[1] * steps < costs[f"rnn/cell/{name}"] < 1.2 * 2 * gate[1] * steps


def test_multiply_adds_are_not_changed_by_padding():
    model = nnx.eval_shape(lambda: nnx.Conv(3, 5, (3, 3), padding=1, rngs=nnx.Rngs(0)))
    images = shape(2, 8, 8, 3)
    account = sfj.nnx.account(model, sfj.nnx.find_layers(model, images), lambda model, x: model(x).sum(), images)
    assert account.macs["convolution"] == 2 * 64 * 9 * 3 * 5
    assert account.elements["bias"] == 2 * 64 * 5
    assert account.counted["convolution"] == 64 * 9 * 3 * 5


def test_what_xla_adds_for_depthwise_convolutions_is_apart():
    def make(**options):
        return nnx.eval_shape(lambda: nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=nnx.Rngs(0), **options))

    parts = []
    for model in (make(), make(conv_general_dilated=depthwise_convolution)):
        images = shape(2, 8, 8, 8)
        account = sfj.nnx.account(model, sfj.nnx.find_layers(model, images), lambda m, x: m(x).sum(), images)
        assert +account.macs == {"convolution": 2 * 64 * 9 * 8}
        parts.append(account.flops().by_kind["convolution"])
    plain, ours = parts
    assert plain.weight_gradients > 0
    assert plain.added > 7 * plain.weight_gradients
    assert ours.added == 0
    # XLA leaves out the positions on padding in its convolutions.
    assert plain.needed < ours.needed < 1.6 * plain.needed


# Networks.


def test_an_account_keeps_no_arrays_alive():
    params, x = {name: jnp.ones((WIDTH, WIDTH)) for name in "abc"}, jnp.ones((N, WIDTH))
    layers = sfj.find_layers(params, chain, x)
    account = sfj.account(params, layers, chain, x, tx=SGD)
    alive = [weakref.ref(array) for array in params.values()]
    del params
    gc.collect()
    assert [array() for array in alive] == [None] * 3
    assert account.trace(frozen(layers, "a")).jaxpr.eqns
