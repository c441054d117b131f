"""With ``rows=True`` each row of stacked blocks is a layer."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax import linen
from smartfrz_jax.layers.rows import Row, Stack, stacked, unstacked
from tests.layers.test_stacks import DEPTH, PARAMS, LinenNet, NNXNet, X, by_for_loop, by_index, by_scan, by_stack

pytestmark = pytest.mark.usefixtures("jax_defaults")
ROWS = ("stem", "blocks/0", "blocks/1", "blocks/2", "head")


@pytest.mark.parametrize("net", [LinenNet(), LinenNet(remat=True), LinenNet(axis=1)])
def test_linen(net):
    variables = jax.eval_shape(net.init, jax.random.key(0), X)
    layers = linen.find_layers(net, variables, X, rows=True)
    assert layers.names == ROWS
    assert layers.stacks["blocks/up/kernel"] == Stack(net.axis, ROWS[1:4])
    at = ":,1" if net.axis else "1"
    assert layers[2].kernels == (f"blocks/up/kernel[{at}]", f"blocks/down/kernel[{at}]")
    # The normalisation behind the last block belongs to it, that of the blocks has a row in each.
    assert {name for name in layers[3].params if not name.startswith("blocks")} == {"final/scale", "final/bias"}
    assert layers.arrays["blocks/norm/scale"] == ROWS[1:4]
    assert layers.arrays["stem/kernel"] == ("stem",)


@pytest.mark.slow
def test_nnx():
    layers = sfj.nnx.find_layers(NNXNet(nnx.Rngs(0)), X, rows=True)
    assert layers.names == ROWS
    assert set(layers[2].state) == {
        "blocks/norm/mean[1]", "blocks/norm/var[1]", "blocks/drop/rngs/count[1]", "blocks/drop/rngs/key[1]",
    }  # fmt: skip


@pytest.mark.parametrize("forward", [by_scan, jax.jit(by_scan), jax.checkpoint(by_scan)])
def test_bare_pytrees(forward):
    layers = sfj.find_layers(PARAMS, forward, X, rows=True)
    assert layers.names == ("stem", "up+down/0", "up+down/1", "up+down/2", "head")
    assert sfj.find_layers(PARAMS, forward, X, rows=True, granularity="block") == layers


@pytest.mark.parametrize("forward", [by_index, by_for_loop])
def test_what_is_read_otherwise_stays_whole(forward):
    assert sfj.find_layers(PARAMS, forward, X, rows=True).names == ("stem", "up+down", "head")


def test_nothing_is_stacked():
    params = {"stem": PARAMS["stem"], "b": PARAMS["stem"], "c": PARAMS["stem"], "head": PARAMS["head"]}
    assert sfj.find_layers(params, by_stack, X, rows=True) == sfj.find_layers(params, by_stack, X)


def test_a_table_of_vectors_that_a_recurrence_reads_stays_whole():
    params = {"positions": jnp.ones((4, 8)), "w": jnp.ones((8, 8))}

    def forward(params, x):
        return jax.lax.scan(lambda x, row: (jnp.tanh((x + row) @ params["w"]), None), x, params["positions"])[0]

    assert set(sfj.find_layers(params, forward, jnp.ones(8), rows=True).names) == {"positions", "w"}


def test_granularity_by_a_function_groups_arrays_before_their_rows():
    layers = sfj.find_layers(PARAMS, by_scan, X, rows=True, granularity=lambda name: name)
    assert layers.names == (
        "stem", *(f"up/{row}" for row in range(DEPTH)), *(f"down/{row}" for row in range(DEPTH)), "head",
    )  # fmt: skip


def test_rows_and_back():
    tree, stacks = {"a": {"w": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(2)}, {"a/w": Stack(1, ("x", "y", "z"))}
    flat = unstacked(tree, stacks)
    assert {name: leaf.tolist() for name, leaf in flat.items()} == {
        "a/w[:,0]": [0, 3], "a/w[:,1]": [1, 4], "a/w[:,2]": [2, 5], "b": [1, 1],
    }  # fmt: skip
    assert jax.tree.map(jnp.array_equal, stacked(flat, tree, stacks), tree) == {"a": {"w": True}, "b": True}
    assert unstacked(tree, {}) is tree
    assert Row("w", 1, 2).of(jax.ShapeDtypeStruct((4, 5, 6), "float32")).shape == (4, 6)
