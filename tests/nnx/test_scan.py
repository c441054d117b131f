"""A scan over stacked blocks gives what the blocks one by one give, and freezing saves as much."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.interpreters import partial_eval

import smartfrz_jax as sfj
from models.bert import Bert
from models.deit import DeiT
from models.llama import Llama
from smartfrz_jax.nnx import scan_blocks
from smartfrz_jax.pytrees import paths

IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
IDS = jax.random.randint(jax.random.key(1), (4, 6), 0, 20)
MASK = jnp.asarray(np.arange(6)[None] < np.array([6, 4, 3, 2])[:, None], jnp.int32)
DEPTH = 4
PARTS = ("attn/qkv", "self/key", "output/dense", "q_proj")
# Compiles in half the time; the results are the same.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def deit(**kwargs):
    settings = {"image_size": 8, "patch_size": 4, "dim": 8, "depth": DEPTH, "heads": 2, "num_classes": 3}
    rates = {"dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.3}
    return DeiT(**{**settings, **rates, "rngs": nnx.Rngs(0), **kwargs})


def bert(**kwargs):
    settings = {"vocab_size": 20, "max_positions": 8, "dim": 8, "depth": DEPTH, "heads": 2, "hidden": 12}
    return Bert(**{**settings, "num_classes": 3, "rngs": nnx.Rngs(0), **kwargs})


def llama(**kwargs):
    settings = {"vocab_size": 3, "dim": 8, "depth": DEPTH, "heads": 2, "kv_heads": 1, "hidden": 12}
    return Llama(**{**settings, "rngs": nnx.Rngs(0), **kwargs})


NETWORKS = {"deit": (deit, (IMAGES,)), "bert": (bert, (IDS, MASK)), "llama": (llama, (IDS % 3, MASK))}


def started(state):
    """Values for the variables: weights so large that all of the network shows in the output."""
    rng, streams = np.random.default_rng(0), iter(jax.random.split(jax.random.key(2), 99))

    def draw(name, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return next(streams)
        if name.endswith("depth"):
            return jnp.float32(int(name.split("/")[1]) / (DEPTH - 1))
        values = 0.3 * rng.normal(size=leaf.shape) + name.endswith("scale")
        return jnp.asarray(values if jnp.issubdtype(leaf.dtype, jnp.floating) else np.zeros(leaf.shape), leaf.dtype)

    return paths.tree_map(draw, nnx.as_pure(state))


def arrays(state):
    """Leaves by name, random keys as their bits."""
    return {
        name: np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for name, leaf in paths.flatten(nnx.as_pure(state)).items()
    }


def loss_fn(model, *inputs):
    return jnp.square(model(*inputs) - jnp.arange(3, dtype=jnp.float32)[None]).mean()


@functools.cache
def abstract(network, scan):
    """A network with shapes in place of values and its optimizer, made once, the inputs and the layers."""
    make, inputs = NETWORKS[network]
    model = nnx.eval_shape(partial(make, scan=scan))
    layers = sfj.nnx.find_layers(model, *inputs)
    graphdef, state = nnx.split(model)
    sgd = optax.sgd(0.1)
    optimizer = nnx.eval_shape(lambda state: sfj.nnx.Optimizer(nnx.merge(graphdef, state), sgd, layers=layers), state)
    return graphdef, state, optimizer, inputs, layers


def value_and_grad(network, scan, frozen):
    """A pure function of the model's variables to (loss, gradients, new variables), and these variables, abstract."""
    graphdef, state, optimizer, inputs, layers = abstract(network, scan)
    optimizer = nnx.clone(optimizer)
    optimizer.frozen = sfj.Frozen(layers, frozenset(frozen))

    def run(state):
        model = nnx.merge(graphdef, state, copy=True)
        loss, grads = optimizer.value_and_grad(loss_fn)(model, *inputs)
        return loss, nnx.as_pure(grads), nnx.state(model)

    return run, state


def frozen_sets(layers):
    """Names of layers to freeze: nothing, a prefix, whole blocks in the middle, parts of blocks, everything."""
    ends = [i for i, name in enumerate(layers.names) if name.endswith(("mlp/fc2", "output/dense", "mlp/down_proj"))]
    ends = [i for i in ends if "attention" not in layers.names[i]]
    return {
        "none": (),
        "embeddings": layers.names[:3],
        "prefix": layers.names[: ends[1] + 1],
        "middle": layers.names[ends[0] + 1 : ends[2] + 1],
        "parts": tuple(
            name for name in layers.names if name.endswith(("attn/qkv", "self/key", "output/dense", "q_proj"))
        ),
        "all": layers.names,
    }


def multiplications(jaxpr, times=1):
    """Multiplications in matrix products; the body of a scan counts as often as it runs."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += times * eqn.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
        inside = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for param in eqn.params.values():
            if hasattr(inner := getattr(param, "jaxpr", param), "eqns"):
                total += multiplications(inner, inside)
    return total


def needed(run, state):
    """The jaxpr without what nothing depends on, as XLA would leave it."""
    jaxpr = jax.make_jaxpr(run)(state).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("network", NETWORKS)
def test_layers_and_variables_are_the_same_with_and_without_scan(network):
    make, inputs = NETWORKS[network]
    unrolled, scanned = (nnx.eval_shape(partial(make, scan=scan)) for scan in (False, True))
    assert nnx.state(scanned) == nnx.state(unrolled)
    for granularity in ("layer", "block"):
        layers = sfj.nnx.find_layers(unrolled, *inputs, granularity=granularity)
        assert sfj.nnx.find_layers(scanned, *inputs, granularity=granularity) == layers


@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.slow
def test_scan_changes_neither_outputs_nor_gradients_nor_random_streams(network):
    """For every frozen set, in training mode; the blocks draw from their own streams, as they would one by one."""
    _, state, *_, layers = abstract(network, False)
    before = started(state)
    frozen = frozen_sets(layers)["middle"]
    runs = {}
    for scan in (False, True):
        run, _ = value_and_grad(network, scan, frozen)
        loss, grads, after = jax.jit(run, compiler_options=QUICKLY)(before)
        runs[scan] = loss, arrays(grads), arrays(after)
    for expected, found in zip(runs[False], runs[True], strict=True):
        expected, found = ({"loss": tree} if not isinstance(tree, dict) else tree for tree in (expected, found))
        assert found.keys() == expected.keys()
        for name, leaf in expected.items():
            scale = max(np.abs(leaf).max(), 1e-3) if leaf.dtype == np.float32 else 0
            np.testing.assert_allclose(found[name], leaf, rtol=0, atol=1e-5 * scale, err_msg=name)
    _, grads, after = runs[True]
    held = {name for layer in layers if layer.name in frozen for name in (*layer.params, *layer.state)}
    counts = 0
    for name, leaf in arrays(before).items():
        if name in grads:
            blind = "self/key/bias" in name  # the softmax, to what is added to all keys
            assert blind or grads[name].any() == (name not in held), name
        if name in held:
            np.testing.assert_array_equal(after[name], leaf, err_msg=name)
        elif name.endswith("count"):
            counts += 1
            assert after[name] == leaf + 1, name
    assert counts > DEPTH or network == "llama", "which draws nothing"


@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.slow
def test_freezing_saves_the_same_matrix_products_with_scan(network):
    *_, layers = abstract(network, False)
    counts = {}
    for name, frozen in frozen_sets(layers).items():
        unrolled, scanned = (multiplications(needed(*value_and_grad(network, scan, frozen))) for scan in (False, True))
        assert scanned == unrolled, name
        counts[name] = scanned
    assert counts["all"] < counts["prefix"] < counts["middle"] < counts["none"]
    assert counts["embeddings"] < counts["none"]
    assert counts["parts"] < counts["none"]
    assert counts["none"] > 2.9 * counts["all"], "the image or the words themselves have no gradient"


class Doubling(nnx.Module):
    """``x * 2 + args``; its weight has a shape that its structure does not tell."""

    def __init__(self, size=1, *, calls=0):
        self.frozen_params: frozenset[str] = frozenset()
        self.weight = nnx.Param(jnp.full(size, 2.0))
        self.calls = nnx.Variable(jnp.asarray(calls))

    def __call__(self, x, *args):
        self.calls[...] += 1
        return x * self.weight[0] + sum(args)


def scans(blocks, *args):
    jaxpr = jax.make_jaxpr(lambda x: scan_blocks(nnx.clone(blocks), x, *args))(jnp.ones(3)).jaxpr
    return [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]


def test_blocks_that_are_alike_in_a_row_are_scanned_together():
    assert scans(nnx.List([Doubling() for _ in range(4)])) == [4]
    assert scans(nnx.List([Doubling()])) == []
    assert scans(nnx.List([Doubling(size) for size in (1, 1, 2, 1, 3, 3, 3)])) == [2, 3]
    blocks = nnx.List([Doubling() for _ in range(7)])
    for block in blocks[2:5]:
        block.frozen_params = frozenset({"weight"})
    assert scans(blocks) == [2, 3, 2]


def test_further_arguments_reach_every_block_and_variables_are_written_back():
    blocks = nnx.List([Doubling(calls=10 * i) for i in range(3)])
    assert scan_blocks(blocks, jnp.ones(()), jnp.float32(1)) == ((1 * 2 + 1) * 2 + 1) * 2 + 1
    assert [int(block.calls[...]) for block in blocks] == [1, 11, 21]
    assert scan_blocks(blocks[:0], 5) == 5


@pytest.mark.slow
def test_a_block_that_occurs_again_finds_its_variables_as_it_left_them():
    block = Doubling()
    assert scan_blocks([block] * 3, jnp.ones(())) == 8
    assert block.calls[...] == 3

    blocks = [Doubling(calls=i) for i in range(4)]
    blocks[2].calls = blocks[1].calls
    assert scan_blocks(blocks, jnp.ones(())) == 16
    assert [int(block.calls[...]) for block in blocks] == [1, 3, 3, 4]


def test_what_is_shared_and_only_read_is_no_reason_to_part_blocks():
    blocks = nnx.List([Doubling() for _ in range(4)])
    for block in blocks:
        block.weight = blocks[0].weight
    assert scans(blocks) == [4]
    blocks[2].calls = blocks[1].calls
    assert scans(blocks) == [2, 2]


def test_a_dropout_that_blocks_share_draws_anew_in_each():
    class Dropping(nnx.Module):
        def __init__(self, drop):
            self.drop = drop

        def __call__(self, x):
            return self.drop(x)

    drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    expected = drop(drop(drop(jnp.ones(32))))
    drop.rngs.count[...] = jnp.uint32(0)
    np.testing.assert_array_equal(scan_blocks([Dropping(drop) for _ in range(3)], jnp.ones(32)), expected)
    assert drop.rngs.count[...] == 3


def test_modules_learn_which_of_their_parameters_are_frozen_while_the_loss_is_differentiated():
    class Net(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([Doubling() for _ in range(2)])

        def __call__(self, x):
            seen.append([block.frozen_params for block in self.blocks])
            return scan_blocks(self.blocks, x)

    seen = []
    model = Net()
    layers = sfj.nnx.find_layers(model, jnp.ones(2), granularity=lambda name: name.rpartition("/")[0])
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=layers)
    optimizer.freeze(model, ["blocks/0"])
    _, grads = optimizer.value_and_grad(lambda model: model(jnp.ones(2)).sum())(model)
    assert seen[-1] == [frozenset({"weight"}), frozenset()]
    assert [block.frozen_params for block in model.blocks] == [frozenset(), frozenset()]
    assert [float(block.weight[0]) for block in grads.blocks.values()] == [0.0, 4.0]
