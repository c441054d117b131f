"""A small tied network, and the same untied: bare, with Linen and with NNX, and its frozen steps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths

WORDS, WIDTH, DEPTH = 48, 32, 4
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, WORDS, size=(8, 16)))
TABLE, ROWS = RNG.standard_normal((WORDS, WIDTH)) / 4, RNG.standard_normal((DEPTH, WIDTH, WIDTH)) / 6


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, IDS).mean()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(WIDTH, use_bias=False, name="up")(x)), None


class LinenNet(nn.Module):
    """Blocks whose stacked weights an ``nn.scan`` reads."""

    tied: bool

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(WORDS, WIDTH, name="embed")
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH)
        x, _ = blocks(name="blocks")(embed(ids), None)
        return embed.attend(x) if self.tied else nn.Dense(WORDS, use_bias=False, name="head")(x)


class NNXNet(nnx.Module):
    """Blocks one by one."""

    def __init__(self, tied):
        rngs = nnx.Rngs(0)
        self.embed, self.tied = nnx.Embed(WORDS, WIDTH, rngs=rngs), tied
        self.blocks = nnx.List([nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(DEPTH)])
        if not tied:
            self.head = nnx.Linear(WIDTH, WORDS, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + jnp.tanh(block(x))
        return self.embed.attend(x) if self.tied else self.head(x)


class Case:
    """A network, its layers, and the gradients of its loss for a frozen set."""

    def __init__(self, params, loss, layers):
        self.params, self.loss, self.layers = params, loss, layers
        self.account = sfj.account(params, layers, loss, IDS, tx=optax.adam(0.1))
        self.front = frozenset(layers.names[: 1 + DEPTH // 2])

    @functools.cache  # noqa: B019
    def step(self, *names):
        frozen = sfj.Frozen(self.layers, names)

        def step(params, ids):
            value, grads = self.value_and_grad(frozen)(params, ids)
            return value, [leaf for name, leaf in paths.flatten(grads).items() if not frozen.is_frozen(name)], grads

        # What is zero is no result, so that nothing is computed for it.
        lowered = jax.jit(lambda *args: step(*args)[:2]).lower(self.params, IDS)
        return frozen, lowered.compile(), jax.jit(step)(self.params, IDS)

    def value_and_grad(self, frozen):
        return sfj.value_and_grad(self.loss, frozen)


class NNXCase(Case):
    def value_and_grad(self, frozen):
        model, optimizer = self.objects()
        optimizer.freeze(model, frozen)
        graphdef = nnx.graphdef(model)

        def run(params, ids):
            model = nnx.merge(graphdef, params, copy=True)
            value, grads = optimizer.value_and_grad(lambda model, ids: cross_entropy(model(ids)))(model, ids)
            return value, nnx.to_pure_dict(grads)

        return run

    def objects(self):
        model = NNXNet("head" not in self.params)
        nnx.update(model, self.params)
        return model, sfj.nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param, layers=self.layers)


def bare(tied):
    tables = {"embed": TABLE} if tied else {"embed": TABLE, "head": TABLE}
    params = jax.tree.map(functools.partial(jnp.asarray, dtype=jnp.float32), tables | {"blocks": ROWS})

    def loss(params, ids):
        def block(x, row):
            return x + jnp.tanh(x @ row), None

        x, _ = jax.lax.scan(jax.checkpoint(block), params["embed"][ids], params["blocks"])
        return cross_entropy(x @ params["embed" if tied else "head"].T)

    return Case(params, loss, sfj.find_layers(params, loss, IDS, rows=True, lookups=True))


def linen(tied):
    net = LinenNet(tied)
    params = {"embed": {"embedding": TABLE}, "blocks": {"up": {"kernel": ROWS}}}
    params |= {} if tied else {"head": {"kernel": TABLE.T}}
    params = jax.tree.map(functools.partial(jnp.asarray, dtype=jnp.float32), params)
    layers = sfj.linen.find_layers(net, {"params": params}, IDS, rows=True, lookups=True)

    def loss(params, ids):
        return cross_entropy(net.apply({"params": params}, ids))

    return Case(params, loss, layers)


def of_nnx(tied):
    model = NNXNet(tied)
    model.embed.embedding[...] = jnp.asarray(TABLE, jnp.float32)
    for i, block in enumerate(model.blocks):
        block.kernel[...] = jnp.asarray(ROWS[i], jnp.float32)
    if not tied:
        model.head.kernel[...] = jnp.asarray(TABLE.T, jnp.float32)
    graphdef, params = nnx.split(model)

    def loss(params, ids):
        return cross_entropy(nnx.merge(graphdef, params, copy=True)(ids))

    return NNXCase(nnx.to_pure_dict(params), loss, sfj.nnx.find_layers(model, IDS, lookups=True))


@functools.cache
def case(make, tied):
    return make(tied)
