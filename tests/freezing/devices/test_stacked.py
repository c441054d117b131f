"""Stacked blocks on many devices: frozen rows are not reduced, and what is sharded stays so."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import smartfrz_jax as sfj
from smartfrz_jax.predictor.sampling import Tailoring
from tests.freezing.devices.network import COLLECTIVE, compiled_text, mesh_of
from tests.models.transformers import IMAGES, tiny_deit

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]

ROWS, WIDTH, HIDDEN = 8, 16, 24
TX = optax.adamw(0.01)
_RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(_RNG.standard_normal(shape) / 4, jnp.float32)


PARAMS = {
    "stem": normal(WIDTH, WIDTH),
    "up": normal(ROWS, WIDTH, HIDDEN),
    "down": normal(ROWS, HIDDEN, WIDTH),
    "head": normal(WIDTH, 8),
}
X, Y = normal(32, WIDTH), normal(32, 8)


def loss(params, x, y, gather=lambda w: w):
    x = x @ gather(params["stem"])
    rows = params["up"], params["down"]
    x, _ = jax.lax.scan(lambda x, row: (x + jnp.tanh(x @ gather(row[0])) @ gather(row[1]), None), x, rows)
    return jnp.square(x @ gather(params["head"]) - y).mean()


LAYERS = sfj.find_layers(PARAMS, loss, X, Y, rows=True)
FRONT = sfj.Frozen(LAYERS, LAYERS.names[:5])  # the stem and four rows
ALL = sfj.Frozen(LAYERS)


def gathered(w):
    """Fully sharded training: a weight is whole on all devices where it is used, its gradient is reduced."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return (jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint)(w, PartitionSpec())


def step_of(frozen, gather):
    tx = sfj.freeze(TX, frozen)

    def step(params, opt_state, x, y):
        _, grads = sfj.value_and_grad(lambda params: loss(params, x, y, gather), frozen)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return sfj.apply_updates(params, updates, frozen), opt_state

    return jax.jit(step)


def run(params, x, y, gather=lambda w: w):
    """Two steps with a frozen front and two with nothing frozen; what the steps lead to, and their programs."""
    opt_state, out = sfj.freeze(TX, ALL).init(params), []
    for frozen in (FRONT, ALL):
        opt_state = sfj.migrate_opt_state(opt_state, TX, params, frozen)
        before = moments(opt_state)
        program = step_of(frozen, gather).lower(params, opt_state, x, y).compile()
        for _ in range(2):
            params, opt_state = program(params, opt_state, x, y)
        out.append((params, before, moments(opt_state), program))
    return out


@functools.cache
def run_alone():
    one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(one):  # the test that asks first may be in the context of another
        return run(PARAMS, X, Y)


def moments(opt_state):
    return opt_state.inner_states["train"].inner_state[0].mu


def reduced_rows(text):
    """How many gradients of one row, of either stack, a program reduces over the devices."""
    trips = dict(re.findall(r'body=%([\w.-]+).*?"known_trip_count":\{"n":"(\d+)"', text))
    found = 0
    for name, body in re.findall(r"^(?:ENTRY )?%([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(re.findall(COLLECTIVE, body)))
        sides = [sorted(map(int, filter(None, shape.split(",")))) for shape in shapes]
        found += int(trips.get(name, 1)) * sides.count([WIDTH, HIDDEN])
    return found


def placed(mesh, of_stacks):
    specs = {name: of_stacks if leaf.ndim == 3 else PartitionSpec(None, "data") for name, leaf in PARAMS.items()}
    params = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in PARAMS.items()}
    return params, *jax.device_put((X, Y), NamedSharding(mesh, PartitionSpec("data")))


def test_fully_sharded_rows_train_as_on_one_device_and_frozen_ones_are_not_reduced(mesh):
    params, x, y = placed(mesh, PartitionSpec(None, None, "data"))
    where = {name: leaf.sharding for name, leaf in params.items()}
    for got, expected in zip(run(params, x, y, gathered), run_alone(), strict=True):
        assert reduced_rows(got[3].as_text()) == 2 * got[2]["up"].shape[0]
        for name, leaf in got[0].items():
            np.testing.assert_allclose(leaf, expected[0][name], rtol=1e-4, atol=1e-6, err_msg=name)
            assert leaf.sharding.is_equivalent_to(where[name], leaf.ndim)
        for name in ("up", "down"):
            for state in got[1:3]:
                assert state[name].sharding.is_equivalent_to(where[name], 3)


def test_rows_divided_among_the_devices_keep_shares_of_their_state():
    """Four rows cannot be divided among eight devices; another axis is."""
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        params, x, y = placed(mesh, PartitionSpec("data"))
        for got, expected in zip(run(params, x, y, gathered), run_alone(), strict=True):
            for name, leaf in got[0].items():
                np.testing.assert_allclose(leaf, expected[0][name], rtol=1e-4, atol=1e-6, err_msg=name)
            for name in ("up", "down"):
                for state in got[1:3]:
                    assert state[name].addressable_shards[0].data.size == state[name].size // 8
                assert got[1][name].sharding == got[2][name].sharding


def sharded_deit(mesh):
    """A network whose blocks are not stacked; each kernel is divided along its last side that is long enough."""
    model = tiny_deit()
    params = nnx.as_pure(nnx.state(model, nnx.Param))

    def spec(leaf):
        at = max((axis for axis, side in enumerate(leaf.shape) if side % 8 == 0), default=None)
        return PartitionSpec(*("data" if axis == at else None for axis in range(leaf.ndim)))

    where = jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), params)
    return sfj.nnx.find_layers(model, IMAGES), params, jax.device_put(params, where)


NETWORKS = {
    "rows among devices": lambda mesh: (LAYERS, PARAMS, placed(mesh, PartitionSpec("data"))[0]),
    "each row divided": lambda mesh: (LAYERS, PARAMS, placed(mesh, PartitionSpec(None, "data"))[0]),
    "not stacked": sharded_deit,
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_weights_of_sharded_layers_are_sampled_where_they_lie(make):
    layers, params, sharded = make(mesh_of(AxisType.Auto))
    sample = Tailoring.create(layers, params, size=16)
    text = compiled_text(jax.jit(lambda sample, params: sample(params)), sample, sharded)
    moved = set(re.findall(r"(all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\(", text))
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    shares = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(sharded)]
    assert moved == {"all-reduce"}  # of what was sampled
    assert max(sizes) <= max(*shares, 16 * len(layers))
    np.testing.assert_array_equal(sample(sharded), sample(params))
