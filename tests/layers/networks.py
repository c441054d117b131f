"""Networks whose layers the tests know."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from smartfrz_jax import Layers, find_layers


class TransformerBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm1")(x)
        q, k, v = (nn.Dense(8, name=name)(y) for name in ("query", "key", "value"))
        y = jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v
        x = x + nn.Dense(8, name="out")(y)
        y = nn.LayerNorm(name="norm2")(x)
        return x + nn.Dense(8, name="fc2")(nn.gelu(nn.Dense(16, name="fc1")(y)))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="z_embed")(tokens)
        x = x + self.param("position", nn.initializers.normal(), (1, 5, 8))
        for i in range(12):
            x = TransformerBlock(name=f"encoderblock_{i}")(x)
        return nn.Dense(3, name="a_head")(nn.LayerNorm(name="encoder_norm")(x)[:, 0])


def transformer_layers(granularity) -> Layers:
    tokens = jnp.zeros((2, 5), int)
    net = Transformer()
    params = jax.eval_shape(net.init, jax.random.key(0), tokens)["params"]
    return find_layers(params, lambda params, x: net.apply({"params": params}, x), tokens, granularity=granularity)


def linear(p, x):
    return x @ p["b"]["kernel"] @ p["a"]["kernel"]


LINEAR = {"a": {"kernel": jnp.eye(2)}, "b": {"kernel": jnp.eye(2)}, "c": {"kernel": jnp.eye(2)}}
ROW = jnp.ones((1, 2))
