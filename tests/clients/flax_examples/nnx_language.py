"""Language models written in NNX, as in Flax's examples and elsewhere, at toy size: one function makes one run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from smartfrz_jax.nnx import find_layers
from tests.clients.doors import NnxRun, StateRun

TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 1, 13)


@dataclasses.dataclass
class Config:
    """A plain dataclass: it has no hash."""

    vocabulary: int = 13
    width: int = 8
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 4
    hidden: int = 16
    windows: tuple[int | None, ...] = (3,)


def rotate(x, positions):
    angles = positions[..., None, None] / 10_000 ** (jnp.arange(x.shape[-1] // 2) / x.shape[-1])
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Grouped queries, rotary positions, a sliding window; its projections are einsums."""

    def __init__(self, config, window, *, rngs):
        self.config, self.window = config, window
        self.q_proj = nnx.LinearGeneral(config.width, (config.heads, config.head_dim), use_bias=False, rngs=rngs)
        self.kv_einsum = nnx.Param(
            nnx.initializers.normal(0.2)(rngs.params(), (2, config.kv_heads, config.width, config.head_dim))
        )
        self.o_proj = nnx.LinearGeneral(
            (config.heads, config.head_dim), config.width, axis=(-2, -1), use_bias=False, rngs=rngs
        )
        self.q_norm, self.k_norm = (nnx.RMSNorm(config.head_dim, rngs=rngs) for _ in range(2))

    def __call__(self, x, positions):
        k, v = jnp.einsum("BTD,CKDH->CBTKH", x, self.kv_einsum[...])
        q = rotate(self.q_norm(self.q_proj(x)), positions)
        k = rotate(self.k_norm(k), positions)
        k, v = (jnp.repeat(part, self.config.heads // self.config.kv_heads, axis=2) for part in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k)
        distance = positions[:, :, None] - positions[:, None, :]
        mask = (distance >= 0) if self.window is None else (distance >= 0) & (distance < self.window)
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30))
        return self.o_proj(jnp.einsum("BNTS,BSNH->BTNH", weights, v))


class Block(nnx.Module):
    def __init__(self, config, window, *, rngs):
        self.attention = Attention(config, window, rngs=rngs)
        self.gate, self.up = (nnx.Linear(config.width, config.hidden, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(config.hidden, config.width, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = (nnx.RMSNorm(config.width, rngs=rngs) for _ in range(2))

    @nnx.remat
    def __call__(self, x, positions):
        x = x + self.attention(self.norm1(x), positions)
        y = self.norm2(x)
        return x + self.down(nnx.gelu(self.gate(y)) * self.up(y))


class Gemma(nnx.Module):
    """The configuration is a static attribute of every module; the embedding is the head."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.embedder = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.layers = nnx.List([Block(config, window, rngs=rngs) for window in config.windows])
        self.final_norm = nnx.RMSNorm(config.width, rngs=rngs)

    def __call__(self, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embedder(tokens) * self.config.width**0.5
        for layer in self.layers:
            x = layer(x, positions)
        return self.embedder.attend(self.final_norm(x))


def gemma(door):
    """A configuration without a hash, remat, a tied embedding."""
    model = Gemma(Config(), rngs=nnx.Rngs(0))
    optimizer = door.optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), TOKENS)

    def loss_fn(model, tokens):
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def train_step(model, optimizer, tokens):
        loss, grads = door.grads_of(optimizer, loss_fn)(model, tokens)
        optimizer.update(model, grads)
        return loss

    block = tuple(f"layers/0/{name}" for name in ("attention/q_proj", "attention/o_proj", "gate", "up", "down"))
    return NnxRun(
        door.jit(train_step, model),
        {"model": model, "optimizer": optimizer},
        (TOKENS,),
        {("model", "optimizer"): block},
    )


def graph_definition(door):
    """A ``TrainState`` of the parameters of an NNX model, beside its static graph definition."""

    class TrainState(door.TrainState):
        graphdef: Any = struct.field(pytree_node=False)

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Embed(13, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.1), nnx.Linear(8, 13, rngs=rngs)
    )
    graphdef, params = nnx.split(model)
    state = door.train_state(
        TrainState,
        apply_fn=None,
        params=params,
        tx=optax.adamw(1e-2),
        graphdef=graphdef,
        layers=lambda: find_layers(model, TOKENS, forward=lambda model, tokens: model(tokens, rngs=nnx.Rngs(0))),
    )

    def train_step(state, tokens, key):
        key = jax.random.fold_in(key, state.step)

        def loss_fn(params):
            module = nnx.merge(state.graphdef, params)
            module.set_attributes(deterministic=False)
            logits = module(tokens[:, :-1], rngs=nnx.Rngs(dropout=key))
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), logits

        (loss, _), grads = door.grads_of_params(state, loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), loss

    return StateRun(door.jit(train_step), state, (TOKENS, jax.random.key(1)), ("layers/0", "layers/1"))


EXAMPLES = (gemma, graph_definition)
