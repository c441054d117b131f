"""The pattern of big_vision, at toy size: bare pytrees and masks."""

import re

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import smartfrz_jax as sfj
from smartfrz_jax.linen import find_layers
from smartfrz_jax.pytrees import paths
from tests.clients.doors import BareRun, Freezing, make_params

IMAGES = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3))
LABELS = jnp.array([0, 2, 1, 2])


class Encoder1DBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm1")(x))
        y = nn.Dense(16, name="up")(nn.LayerNorm(name="norm2")(x))
        return x + nn.Dense(8, name="down")(nn.gelu(y))


class Vit(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(8, (4, 4), strides=(4, 4), name="embedding")(images)
        x = x.reshape(len(x), -1, 8)
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, x.shape[1], 8))
        x = Encoder1DBlock(name="encoder")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="encoder_norm")(x).mean(1))


def masks(params, *patterns):
    """For each pattern a tree of booleans: the leaves whose names it matches, the first that does."""
    names = list(paths.flatten(params))
    first = {name: next((i for i, p in enumerate(patterns) if re.fullmatch(p, name)), None) for name in names}
    return [paths.tree_map(lambda name, _, i=i: first[name] == i, params) for i in range(len(patterns))]


def make_tx(params):
    """Learning rates, weight decay and what is frozen by hand are chosen by patterns of names."""
    frozen, rest = masks(params, "pos_embedding", ".*")
    head, others = masks(params, "head/.*", ".*")
    (kernels,) = masks(params, ".*/kernel")
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 1, 10)
    return optax.chain(
        optax.masked(optax.set_to_zero(), frozen),
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.scale_by_adam(b2=0.95, mu_dtype=jnp.bfloat16), rest),
        optax.masked(optax.scale(10.0), head),
        optax.masked(optax.scale(0.5), others),
        optax.masked(optax.add_decayed_weights(1e-2), kernels),
        optax.masked(optax.scale_by_schedule(schedule), rest),
        optax.scale(-1.0),
    )


def big_vision(door):
    """Donated parameters and optimizer state, masks, mixup, norms that are logged."""
    model = Vit()
    params = make_params(model.init, jax.random.key(0), IMAGES)
    tx, layers = make_tx(params), find_layers(model, {"params": params}, IMAGES)

    def make_step(frozen):
        value_and_grad, tx_of_step, apply_updates = door.bare(tx, frozen)

        def update_fn(params, opt_state, images, labels, key):
            ratio = jax.random.beta(key, 0.2, 0.2)
            images = ratio * images + (1 - ratio) * images[::-1]
            targets = ratio * jax.nn.one_hot(labels, 3) + (1 - ratio) * jax.nn.one_hot(labels[::-1], 3)

            def loss_fn(params):
                logits = model.apply({"params": params}, images)
                return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1).mean()

            loss, grads = value_and_grad(loss_fn)(params)
            updates, opt_state = tx_of_step.update(grads, opt_state, params)
            params = apply_updates(params, updates)
            return params, opt_state, jnp.stack([loss, optax.tree.norm(grads), optax.tree.norm(updates)])

        return update_fn

    start = sfj.Frozen(layers) if isinstance(door, Freezing) else None
    frozen = [name for name in layers.names if name.startswith(("embedding", "encoder/", "pos_embedding"))]
    carry = params, door.bare(tx, start).tx.init(params)
    return BareRun(make_step, tx, carry, (IMAGES, LABELS, jax.random.key(1)), start, frozen)


EXAMPLES = (big_vision,)
