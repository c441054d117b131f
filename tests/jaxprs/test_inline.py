"""Stacks of blocks that are scanned over must look like the same blocks one after another."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import smartfrz_jax as sfj
from smartfrz_jax.layers import dataflow, outputs

DEPTH, WIDTH = 3, 4


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), jnp.float32)


PARAMS = {
    "blocks": [
        {"w2": normal(WIDTH, WIDTH, seed=i), "w1": normal(WIDTH, WIDTH, seed=10 + i), "b": normal(WIDTH, seed=i)}
        for i in range(DEPTH)
    ],
    "head": normal(WIDTH, 2),
    "a_stem": normal(3, WIDTH),
}
GROUPS = {
    "stem": ["a_stem"],
    **{f"{i}/{w}": [f"blocks/{i}/{leaf}" for leaf in w] for i in range(DEPTH) for w in (("w1", "b"), ("w2",))},
    "head": ["head"],
}
X = normal(5, 3)


def block(p, x):
    return x + jnp.tanh(x @ p["w1"] + p["b"][None]) @ p["w2"]


def around(blocks):
    """The network with ``blocks`` as a function of (list of parameters, x)."""
    return lambda params, x: blocks(params["blocks"], x @ params["a_stem"]) @ params["head"]


def one_after_another(blocks, x):
    for p in blocks:
        x = block(p, x)
    return x


def scanned(stack, body=block, **options):
    def run(blocks, x):
        return lax.scan(lambda x, p: (body(p, x), None), x, jax.tree.map(stack, *blocks), **options)[0]

    return run


def stack(*leaves):
    return jnp.stack(leaves)


def concatenate(*leaves):
    return jnp.concatenate([leaf[None] for leaf in leaves])


def concatenate_of_stacks(*leaves):
    return jnp.concatenate([jnp.stack(leaves[:2]), leaves[2].reshape(1, *leaves[2].shape)])


def stack_in_another_type(*leaves):
    return jnp.stack(leaves).astype(jnp.float16).astype(jnp.float32)


def backwards(blocks, x):
    return scanned(stack, reverse=True)(blocks[::-1], x)


def with_outputs(blocks, x):
    def body(carry, p):
        y = block(p, carry)
        return y, (y, carry)

    _, (ys, carries) = lax.scan(body, x, jax.tree.map(stack, *blocks))
    return ys[-1] + 0.0 * carries[0]


def with_keys_and_rates(blocks, x):
    def body(x, scanned):
        p, key, rate = scanned
        return jnp.where(jax.random.bernoulli(key, rate, x.shape), block(p, x), x), None

    keys, rates = jax.random.split(jax.random.key(0), DEPTH), jnp.ones(DEPTH)
    return lax.scan(body, x, (jax.tree.map(stack, *blocks), keys, rates))[0]


BLOCKS = {
    "stack": scanned(stack),
    "concatenate": scanned(concatenate),
    "concatenate_of_stacks": scanned(concatenate_of_stacks),
    "unroll": scanned(stack, unroll=2),
    "jit": jax.jit(scanned(stack, jax.jit(block))),
    "remat": scanned(stack, jax.checkpoint(block)),
    "remat_of_jit": scanned(stack, jax.checkpoint(jax.jit(block), policy=jax.checkpoint_policies.dots_saveable)),
    "remat_of_scan": jax.checkpoint(scanned(stack)),
    "backwards": backwards,
    "with_outputs": with_outputs,
    "with_keys_and_rates": with_keys_and_rates,
}


@pytest.mark.parametrize("blocks", [*BLOCKS.values(), scanned(stack_in_another_type)], ids=[*BLOCKS, "another_type"])
def test_layers_and_consumption_are_those_of_the_unrolled_network(blocks):
    expected = dataflow.consumption(around(one_after_another), PARAMS, X)
    got = dataflow.consumption(around(blocks), PARAMS, X)
    assert sorted(got.first, key=lambda name: (got.first[name], name)) == sorted(
        expected.first, key=lambda name: (expected.first[name], name)
    )
    assert got.sources == expected.sources
    layers = sfj.find_layers(PARAMS, around(blocks), X)
    assert layers == sfj.find_layers(PARAMS, around(one_after_another), X)
    assert layers.names == ("a_stem", "blocks/0", "blocks/1", "blocks/2", "head")


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.slow
def test_taps_are_those_of_the_unrolled_network(blocks):
    expected = outputs.layer_outputs(PARAMS, GROUPS, around(one_after_another), X)(PARAMS, X)
    got = outputs.layer_outputs(PARAMS, GROUPS, around(blocks), X)(PARAMS, X)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_nested_scans():
    params = {"blocks": PARAMS["blocks"] + PARAMS["blocks"][:1], "head": PARAMS["head"], "a_stem": PARAMS["a_stem"]}

    def two_by_two(blocks, x):
        pairs = [jax.tree.map(stack, *blocks[i : i + 2]) for i in (0, 2)]

        def outer(x, pair):
            return lax.scan(lambda x, p: (block(p, x), None), x, pair)[0], None

        return lax.scan(outer, x, jax.tree.map(stack, *pairs))[0]

    expected = dataflow.consumption(around(one_after_another), params, X)
    assert dataflow.consumption(around(two_by_two), params, X).sources == expected.sources


def test_recurrence_over_time_stays_whole():
    def forward(p, x):
        def body(h, row):
            h = jnp.tanh(row @ p["in"] + h @ p["rec"])
            return h, h

        return lax.scan(body, jnp.zeros(4), x)[1] @ p["head"]

    params = {"head": jnp.ones((4, 2)), "in": jnp.ones((3, 4)), "rec": jnp.ones((4, 4))}
    used = dataflow.consumption(forward, params, normal(64, 3))
    assert used.last["in"] == used.last["rec"] < used.last["head"] < 64


def test_a_stacked_block_is_one_layer_that_ends_with_its_last_row():
    params = {
        "down": jnp.stack([p["w2"] for p in PARAMS["blocks"]]),
        "up": jnp.stack([p["w1"] for p in PARAMS["blocks"]]),
        "head": PARAMS["head"],
    }

    def forward(p, x):
        def body(x, w):
            return jnp.tanh(x @ w[0]) @ w[1], None

        return lax.scan(body, x, (p["up"], p["down"]))[0] @ p["head"]

    x = normal(5, WIDTH)
    layers = sfj.find_layers(params, forward, x)
    assert layers.names == ("up+down", "head")
    groups = {name: [name] for name in params} | {layers[0].name: layers[0].params}
    got = outputs.layer_outputs(params, groups, forward, x)(params, x)
    expected = {}
    for up, down in zip(params["up"], params["down"], strict=True):
        expected["up"] = x @ up
        expected["down"] = x = jnp.tanh(expected["up"]) @ down
    expected |= {"head": x @ params["head"], "up+down": x}
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(WIDTH, 8, rngs=rngs), nnx.Linear(8, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Net(nnx.Module):
    def __init__(self, scan: bool):
        rngs = nnx.Rngs(0)
        self.scan = scan
        self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x):
        if self.scan:
            graphdef, first = nnx.split(self.blocks[0])
            states = [first, *(nnx.state(block) for block in self.blocks[1:])]
            body = jax.checkpoint(lambda x, state: (nnx.merge(graphdef, state)(x), None))
            x, _ = lax.scan(body, x, jax.tree.map(stack, *states))
        else:
            x = functools.reduce(lambda x, block: block(x), self.blocks, x)
        return self.head(x)


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_nnx_blocks():
    x = normal(5, WIDTH)
    plain, scan = Net(scan=False), Net(scan=True)
    layers = sfj.nnx.find_layers(plain, x)
    assert sfj.nnx.find_layers(scan, x) == layers
    assert len(layers) == 2 * DEPTH + 1
    chex.assert_trees_all_close(
        sfj.nnx.features(scan, layers, x)(scan, x), sfj.nnx.features(plain, layers, x)(plain, x), rtol=1e-5, atol=1e-6
    )
